"""SimKD's students, which keep their projector: tested, exported, resumed, and used as a teacher."""

import importlib.util

import pytest
import torch
from common import check_same_end, distil, error_of, read_log, stop_within_an_epoch, train

import evaluate
from helper import checkpoint
from models import create_model
from models.export import ONNX, SUFFIXES, load_exported
from models.projected import Projected

HAS_ONNX = all(importlib.util.find_spec(name) for name in ONNX)
NEEDS_ONNX = pytest.mark.skipif(not HAS_ONNX, reason="no ONNX here: pip install -r requirements-export.txt")
FORMS = [pytest.param(form, marks=[NEEDS_ONNX, pytest.mark.full] if form == "onnx" else []) for form in SUFFIXES]
LINE = "--model_s resnet8 --distill simkd --epochs 1 --simkd_factor 4"
NAME = "simkd:resnet8:64x8x8:4:32"


def call(*argv):
    return evaluate.run(evaluate.parse_args(["--device", "cpu", *map(str, argv)]))[1]


@pytest.fixture
def composite(teacher, tmp_path_factory):
    """Return the folder of a run that the first test trains."""
    return distil(f"{LINE} --path-t {teacher} --run_dir {tmp_path_factory.getbasetemp() / 'simkd'}")


def test_the_composite_is_what_is_tested_and_saved(composite, teacher):
    log, values = read_log(composite)[-1], call(composite)
    assert (values["network"], values["top1"]) == (NAME, pytest.approx(log["top1"]))
    assert values["loss"] == pytest.approx(log["test_loss"], rel=1e-5)
    model, name, info = checkpoint.load_network(composite / "resnet8_best.pth")
    assert isinstance(model, Projected) and name == info.network == NAME
    expert = checkpoint.load_network(teacher / "ckpt_epoch_2.pth").model
    assert torch.equal(model.classifier.weight, expert.classifier.weight)
    assert not any(key.startswith("net.fc") for key in model.state_dict())


@pytest.mark.parametrize("form", FORMS)
def test_the_composite_is_exported(composite, form, tmp_path):
    values = call(composite, "--export", form, "--output", tmp_path / "x")
    assert values["largest_difference"] < 1e-4
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = checkpoint.load_network(composite / "resnet8_last.pth").model.eval()(images)
    torch.testing.assert_close(load_exported(form, tmp_path / "x")(images), expected, rtol=1e-3, atol=1e-4)


def test_images_are_predicted_by_the_composite(composite, tmp_path):
    from PIL import Image

    Image.new("RGB", (32, 32), "white").save(tmp_path / "x.png")
    (image,) = call(composite, "--predict", tmp_path / "x.png")
    assert len(image["classes"]) == 5


def test_an_interrupted_composite_ends_bit_identical(composite, teacher, tmp_path, monkeypatch):
    line = f"{LINE} --path-t {teacher} --run_dir {tmp_path / 'run'}"
    stop_within_an_epoch(monkeypatch, line)
    check_same_end(composite, distil(line))


def test_the_composite_teaches(composite, tmp_path):
    line = f"--path-t {composite} --model_s resnet8 --epochs 1 --distill"
    for distill in ("simkd", "ofd"):
        folder = distil(f"{line} {distill} --run_dir {tmp_path / distill}")
        assert read_log(folder)[-1]["loss"] > 0
    assert checkpoint.load_network(tmp_path / "simkd/resnet8_last.pth").name == "simkd:resnet8:64x8x8:2:32"


def test_what_cannot_be_done_with_the_composite_is_said(composite, teacher, tmp_path):
    file = composite / "resnet8_last.pth"
    says = error_of(train, f"--model resnet8 --epochs 1 --init_weights {file} --run_dir {tmp_path / 'run'}")
    assert "holds a student of SimKD with its projector, which is no resnet8" in says
    assert "is no resnet8 (it has no conv1.weight): leave --model out" in error_of(call, file, "--model", "resnet8")
    line = f"--path-t {file} --model_t resnet8 --model_s resnet8 --epochs 1 --run_dir {tmp_path / 'run'}"
    assert "is no resnet8 (it has no conv1.weight): leave --model_t out" in error_of(distil, line)
    bare = tmp_path / "bare.pth"
    torch.save(checkpoint.load(file)["model"], bare)
    assert "with its projector and does not say of which network" in error_of(call, bare)
    for name in ("simkd:resnet8:0x8x8:4:32", "simkd:resnet8", "simkd:resnet8:64x8x8:4:32x"):
        assert f"'{name}' names no student of SimKD" in error_of(create_model, name, 10)


def test_a_student_without_a_bias_stays_without(teacher, tmp_path):
    line = f"--path-t {teacher} --model_s resnet8 --epochs 1 --distill cat_kd --cat_without_bias"
    folder = distil(f"{line} --run_dir {tmp_path / 'run'}")
    assert checkpoint.load_network(folder / "resnet8_last.pth").model.classifier.bias.abs().max() == 0
