"""evaluate.py: test, predict and export what a run left, and what others saved; and runs that start from weights."""

import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from common import ROOT, as_pil, check_same_end, distil, error_of, read_log, stop_within_an_epoch, timeless, train
from PIL import Image

import evaluate
import train_teacher
from dataset import create_dataset, dataset_dict, digits
from dataset.cifar import CIFAR100
from helper import checkpoint
from inputs import UserError
from models import create_model
from models.export import ONNX, SUFFIXES, load_exported
from options.parse import parse_teacher
from report.scores import score

HAS_ONNX = all(importlib.util.find_spec(name) for name in ONNX)
NEEDS_ONNX = pytest.mark.skipif(not HAS_ONNX, reason="no ONNX here: pip install -r requirements-export.txt")
FORMS = [pytest.param(form, marks=NEEDS_ONNX if form == "onnx" else []) for form in SUFFIXES]


def call(*argv):
    """Return the text and the values of a command."""
    return evaluate.run(evaluate.parse_args(["--device", "cpu", *map(str, argv)]))


def fails(*argv):
    return error_of(call, *argv)


@pytest.fixture
def alone(teacher, tmp_path):
    """Return a file of weights without its run's folder."""
    return shutil.copy(teacher / "ckpt_epoch_2.pth", tmp_path / "weights.pth")


def val_target():
    """Return the classes of the test images, of which there are few here; see conftest.py."""
    return dataset_dict["digits"]().val_target


def bare(path):
    """Write the weights of a file as earlier versions did: alone."""
    torch.save(checkpoint.load(path)["model"], path)
    return path


def tree_of(folder, names, size=(40, 60)):
    for split in ("train", "val"):
        for number, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for image in range(2):
                pixels = np.random.default_rng(10 * number + image).integers(256, size=(*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{image}.png")
    return folder


# ---------------------------------------------------------------- test


def test_a_folder_and_its_file_have_the_scores_of_the_log(tmp_path):
    folder, count = train(f"--model resnet8 --epochs 2 --run_dir {tmp_path / 'run'}"), len(val_target())
    alone = shutil.copy(folder / "ckpt_epoch_2.pth", tmp_path / "weights.pth")
    log, (text, values) = read_log(folder)[-1], call(folder)
    assert values["top1"] == pytest.approx(log["top1"]) and values["top5"] == pytest.approx(log["top5"])
    assert values["loss"] == pytest.approx(log["test_loss"], rel=1e-5)
    assert (values["network"], values["dataset"], values["samples"]) == ("resnet8", "digits", count)
    assert sum(each["samples"] for each in values["classes"]) == count
    assert [each["name"] for each in values["classes"]] == [str(digit) for digit in range(10)]
    assert f"top-1, %          {values['top1']:5.2f}" in text and f"{values['ece']:.2f}" in text
    of_file = call(alone, "--batch_size", 7)[1]
    assert values["sha256"] == of_file["sha256"] == checkpoint.file_hash(alone)
    assert of_file["ece"] == pytest.approx(values["ece"], abs=1e-4) and of_file["top1"] == values["top1"]


def test_bare_weights_take_their_data_set_from_the_run_or_from_a_flag(teacher, tmp_path):
    old = shutil.copytree(teacher, tmp_path / "old")
    for path in old.glob("*_*.pth"):
        bare(path)
    expected = call(teacher)[1]["top1"]
    assert call(old)[1]["top1"] == expected
    alone = shutil.copy(old / "ckpt_epoch_2.pth", tmp_path / "weights.pth")
    assert call(alone, "--dataset", "digits")[1]["top1"] == expected
    assert "says which data set the weights belong to: add --dataset, one of cifar10, cifar100" in fails(alone)
    (tmp_path / "config.json").write_text('{"model_type": "of another program", "options": {"dataset": "digits"}}')
    assert "says which data set" in fails(alone)


def test_a_students_folder_and_its_best_weights(teacher, tmp_path):
    folder = distil(f"--path-t {teacher} --model_s resnet8 --epochs 2 --run_dir {tmp_path / 'run'}")
    log = read_log(folder)
    assert call(folder)[1]["top1"] == pytest.approx(log[-1]["top1"])
    best = max(record["top1"] for record in log)
    assert call(folder / "resnet8_best.pth")[1]["top1"] == pytest.approx(best)
    info = checkpoint.load_network(folder / "resnet8_best.pth").info
    assert (info.network, info.dataset, info.image_size) == ("resnet8", "digits", 32)


def test_the_command_prints_a_table_or_nothing_but_json(alone):
    prefixed = {"module." + key: value for key, value in checkpoint.load(alone)["model"].items()}
    torch.save(prefixed, alone)  # so that there is a note
    command = [sys.executable, "evaluate.py", alone, "--dataset", "digits", "--device", "cpu"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.startswith("note: ") and "ECE, %, 15 bins" in shown and "classes, worst first" in shown
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["samples"] == 360 and "note: " in done.stderr


def test_a_tree_of_images_is_evaluated_by_its_classes_names(tmp_path, capsys):
    tree = tree_of(tmp_path / "data", ["cat", "dog", "eel"])
    line = f"--dataset folder --data_dir {tree} --image_size 24 --num_workers 0 --train_subset 0 --batch_size 3"
    folder = train(f"{line} --model resnet8 --epochs 1 --run_dir {tmp_path / 'run'}")
    values = call(folder, "--num_workers", 0)[1]  # data_dir and image_size are the run's
    assert [each["name"] for each in values["classes"]] == ["cat", "dog", "eel"]
    assert values["top1"] == pytest.approx(read_log(folder)[-1]["top1"])
    alone = shutil.copy(folder / "resnet8_last.pth", tmp_path / "weights.pth")
    assert "--data_dir is missing" in fails(alone)
    (_, images) = call(alone, "--predict", tree / "val/cat/0.png")
    assert {each["name"] for each in images[0]["classes"]} == {"cat", "dog", "eel"}
    (tree / "train/cat").rename(tree / "train/ant")
    (tree / "val/cat").rename(tree / "val/ant")
    capsys.readouterr()
    assert call(alone, "--data_dir", tree, "--num_workers", 0)[1]["samples"] == 6
    assert "note: the classes of this data set have other names" in capsys.readouterr().out


def test_another_data_set_is_normalised_as_in_training(alone, tmp_path, capsys):
    tree = tree_of(tmp_path / "data", [f"class{i}" for i in range(10)], (32, 32))
    values = call(alone, "--dataset", "folder", "--data_dir", tree, "--num_workers", 0)[1]
    assert "normalised as in the network's training" in capsys.readouterr().out
    files = sorted((tree / "val").rglob("*.png"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    images = (pixels / 255 - digits.MEAN[0]) / digits.STD[0]
    model = checkpoint.load_network(alone).model.eval()
    with torch.no_grad():
        expected = score(model(images), torch.arange(10).repeat_interleave(2), [str(i) for i in range(10)])
    assert (values["top1"], values["ece"]) == pytest.approx((expected.top1, expected.ece), abs=1e-3)


@pytest.mark.full
def test_a_published_network_has_its_published_accuracy(cifar100_dir):
    """The weights are those of github.com/chenyaofo/pytorch-cifar-models, which states 68.83 for resnet20."""
    weights = ROOT.parent / "shared/data/teachers/resnet20.pth"
    if not weights.is_file():
        pytest.skip("the published resnet20.pth is not here")
    values = call(weights, "--dataset", "cifar100", "--data_dir", cifar100_dir)[1]
    assert values["network"] == "resnet20" and values["top1"] == pytest.approx(68.83, abs=0.05)
    assert values["classes"][0]["name"] == "apple" and values["samples"] == 10_000


def test_cifar100_has_the_names_of_its_classes(cifar100_dir):
    names = CIFAR100.load(str(cifar100_dir)).class_names
    assert len(names) == 100 and (names[0], names[99]) == ("apple", "worm")


# ---------------------------------------------------------------- predict


def test_an_image_of_the_data_set_is_predicted_as_in_the_test(alone, tmp_path, monkeypatch):
    data = create_dataset("digits", batch_size=64, seed=1, device="cpu")
    pixels = digits.load().val_images[:2]
    files = [tmp_path / "0.png", tmp_path / "1.bmp"]
    for file, image in zip(files, pixels, strict=True):
        as_pil(image).save(file)
    monkeypatch.setattr(evaluate, "create_dataset", None)  # it is not needed
    text, images = call(alone, "--predict", *files)
    model = checkpoint.load_network(alone).model.eval()
    with torch.no_grad():
        expected = model(next(iter(data.val)).images[:2]).softmax(1)
    for file, found, probability in zip(files, images, expected, strict=True):
        assert found["file"] == str(file) and str(file) in text and len(found["classes"]) == 5
        shares = {each["name"]: each["probability"] for each in found["classes"]}
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        assert shares == pytest.approx({name: probability[int(name)].item() for name in shares}, abs=1e-5)
        assert max(shares, key=shares.get) == str(probability.argmax().item())


@pytest.mark.parametrize(("mode", "size"), [("RGB", (500, 333)), ("L", (8, 8)), ("RGBA", (33, 32)), ("P", (1, 200))])
def test_images_of_any_size_and_kind_are_predicted(mode, size, alone, tmp_path):
    Image.new(mode, size).save(tmp_path / "x.png")
    (found,) = call(alone, "--predict", tmp_path / "x.png")[1]
    assert len(found["classes"]) == 5 and 0 < sum(each["probability"] for each in found["classes"]) <= 1 + 1e-9


def test_bare_weights_predict_with_the_data_sets_names(alone, tmp_path):
    Image.new("RGB", (50, 40), (200, 10, 30)).save(tmp_path / "x.png")
    expected = call(alone, "--predict", tmp_path / "x.png")[1]
    assert call(bare(alone), "--dataset", "digits", "--predict", tmp_path / "x.png")[1] == expected


def test_what_is_no_image_is_refused(alone, tmp_path):
    (tmp_path / "x.png").write_text("text")
    assert "x.png cannot be read (it is no image that Pillow knows)" in fails(alone, "--predict", tmp_path / "x.png")
    assert "cannot be read (No such file" in fails(alone, "--predict", tmp_path / "none.png")
    assert "is no regular file" in fails(alone, "--predict", tmp_path)


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [None, 4])
def test_an_exported_network_gives_the_same_logits(form, batch, teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "run")
    more = ["--export_batch", batch] if batch else []
    text, values = call(folder, "--export", form, *more)
    output = folder / f"ckpt_epoch_2{SUFFIXES[form]}"
    assert values["file"] == str(output) and str(output) in text
    assert f"{values['largest_difference']:.2g}" in text and values["largest_difference"] < 1e-4
    model, images = (
        checkpoint.load_network(folder / "ckpt_epoch_2.pth").model.eval(),
        torch.randn(batch or 5, 3, 32, 32),
    )
    with torch.no_grad():
        torch.testing.assert_close(load_exported(form, output)(images), model(images), rtol=1e-4, atol=1e-4)
    before = output.read_bytes()
    assert "is there already: give another --output, or add --overwrite" in fails(folder, "--export", form, *more)
    assert output.read_bytes() == before
    output.write_bytes(b"old")
    call(folder, "--export", form, "--overwrite", *more)
    assert output.read_bytes() != b"old"


@NEEDS_ONNX
def test_a_fixed_batch_is_in_the_onnx_file_and_no_data_beside_it(alone, tmp_path):
    import onnx

    for batch, expected in ((3, 3), (None, "batch")):
        output = tmp_path / f"{batch}.onnx"
        call(alone, "--export", "onnx", "--output", output, *(["--export_batch", batch] if batch else []))
        shape = onnx.load(output).graph.input[0].type.tensor_type.shape.dim
        assert (shape[0].dim_value or shape[0].dim_param, shape[1].dim_value) == (expected, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"weights.pth", "3.onnx", "None.onnx"}


@pytest.mark.parametrize("form", FORMS)
def test_a_network_that_is_not_the_same_is_not_written(form, alone, monkeypatch):
    monkeypatch.setattr(evaluate, "load_exported", lambda *_: lambda images: torch.ones(len(images), 10))
    says = fails(alone, "--export", form)
    assert "the logits of the exported network differ by up to" in says and "nothing is written" in says
    assert not alone.with_suffix(SUFFIXES[form]).exists()


def test_without_its_packages_onnx_says_what_to_install(alone, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install -r requirements-export.txt" in fails(alone, "--export", "onnx")


@pytest.mark.full
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["resnet8x4_double", "ResNet50", "wrn_16_2", "vgg8", "MobileNetV2", "ShuffleV1",
                                  "ShuffleV2"])  # fmt: skip
def test_every_family_is_exported(name, form, tmp_path):
    torch.save(create_model(name, 10).state_dict(), tmp_path / "x.pth")
    assert call(tmp_path / "x.pth", "--export", form)[1]["largest_difference"] < 1e-3


# ---------------------------------------------------------------- errors


def test_what_cannot_be_evaluated_is_said_in_one_sentence(alone, tmp_path, teacher):
    assert "there is no file or folder" in fails(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "holds no weights: give the folder of one run, or a file" in fails(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text("{}")
    assert "holds a run that is not finished: finish it, or give a file" in fails(tmp_path / "empty")
    assert "cannot be read" in fails("a\0b")
    (tmp_path / "odd.pth").write_text("text")
    assert "is damaged" in fails(tmp_path / "odd.pth")
    assert "holds a resnet8, not a vgg8: leave --model out" in fails(alone, "--model", "vgg8")
    assert "have 32 pixels a side" in fails(alone, "--image_size", 64)
    torch.save(create_model("resnet8", 7).state_dict(), tmp_path / "seven.pth")
    assert "was trained for 7 classes, and digits has 10" in fails(tmp_path / "seven.pth", "--dataset", "digits")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--predict", "a.png", "--export", "onnx"], "give one of them"), (["--output", "x"], "belong to --export"),
        (["--overwrite"], "belong to --export"), (["--export", "pickle"], "unknown format 'pickle'; the known ones"),
        (["--export_batch", "0", "--export", "onnx"], "--export_batch must be from 1"), (["--model", "x"], "unknown"),
        (["--batch_size", "0"], "--batch_size must be"), (["--image-size", "1"], "--image_size must be from 8"),
        (["--dataset", "x"], "unknown data set 'x'"), (["--device", "x"], "'x' is no device"), (["--x"], "--help"),
    ],
)  # fmt: skip
def test_wrong_flags_are_refused(argv, says, teacher):
    assert says in error_of(lambda: evaluate.run(evaluate.parse_args([str(teacher), *argv])))


# ---------------------------------------------------------------- runs that start from weights

LINE = "--model resnet8 --epochs 2 --learning_rate 1e-9 "


def test_a_run_starts_from_weights_and_is_another_run_than_one_that_does_not(alone, tmp_path):
    folder = train(f"{LINE} --init_weights {alone} --run_dir {tmp_path / 'run'}")
    config = json.loads((folder / "config.json").read_text())
    assert config["init_sha256"] == checkpoint.file_hash(alone) and config["options"]["init_weights"] == str(alone)
    begun, ended = (checkpoint.load_weights(path) for path in (alone, folder / "resnet8_last.pth"))
    torch.testing.assert_close(ended["conv1.weight"], begun["conv1.weight"])
    assert not torch.allclose(begun["conv1.weight"], create_model("resnet8", 10).conv1.weight)
    with pytest.raises(UserError, match="other initial weights"):
        train(f"{LINE} --run_dir {folder}")
    torch.save(checkpoint.load(alone) | {"more": 1}, alone)  # other content at the same path
    with pytest.raises(UserError, match="other initial weights"):
        train(f"{LINE} --init_weights {alone} --run_dir {folder}")
    other = train(f"{LINE} --run_dir {tmp_path / 'other'}")
    assert json.loads((other / "config.json").read_text())["init_sha256"] is None
    with pytest.raises(UserError, match="other initial weights"):
        train(f"{LINE} --init_weights {alone} --run_dir {other}")


def test_runs_of_before_there_were_initial_weights_go_on(tmp_path, alone, capsys):
    folder = train(f"--model resnet8 --epochs 1 --run_dir {tmp_path / 'run'}")
    config = json.loads((folder / "config.json").read_text())
    del config["init_sha256"], config["options"]["init_weights"]
    (folder / "config.json").write_text(json.dumps(config))
    train(f"--model resnet8 --epochs 1 --run_dir {folder}")
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="other initial weights"):
        train(f"--model resnet8 --epochs 1 --init_weights {alone} --run_dir {folder}")


def test_a_student_starts_from_weights_and_resumes_without_their_file(teacher, alone, tmp_path, monkeypatch):
    line = f"--path-t {teacher} --model_s resnet8 --epochs 2 --init_weights {alone} --run_dir "
    whole = distil(f"{line}{tmp_path / 'whole'}")
    stop_within_an_epoch(monkeypatch, f"{line}{tmp_path / 'stopped'}", 4)
    alone.unlink()
    check_same_end(whole, distil(f"{line}{tmp_path / 'stopped'}"))
    with pytest.raises(UserError, match="there is no file .*weights.pth"):
        distil(f"{line}{tmp_path / 'new'}")
    assert not (tmp_path / "new").exists()


def test_weights_for_other_classes_keep_all_but_the_classifier(tmp_path, capsys):
    path = tmp_path / "x.pth"
    torch.save(create_model("resnet8", 3).state_dict(), path)
    folder = train(f"{LINE} --init_weights {path} --run_dir {tmp_path / 'run'}")
    assert "note: the classifier starts anew" in capsys.readouterr().out
    torch.testing.assert_close(
        checkpoint.load_weights(folder / "resnet8_last.pth")["conv1.weight"],
        checkpoint.load_weights(path)["conv1.weight"],
    )
    torch.save(create_model("resnet14", 10).state_dict(), path)
    with pytest.raises(UserError, match="holds a resnet14, not a resnet8: .*--init_weights"):
        train(f"{LINE} --init_weights {path} --run_dir {tmp_path / 'wrong'}")


def test_weights_that_are_started_from_change_the_result_and_nothing_else_does(alone, tmp_path):
    runs = [
        timeless(train(f"--model resnet8 --epochs 1 {more} --run_dir {tmp_path / name}"))
        for name, more in (("a", ""), ("b", f"--init_weights {alone}"), ("c", f"--init_weights {alone}"))
    ]
    assert runs[1] == runs[2] != runs[0]


def test_seeds_side_by_side_start_from_the_same_weights_and_say_so_once(alone, tmp_path, capsys):
    torch.save({"module." + key: value for key, value in checkpoint.load(alone)["model"].items()}, alone)
    line = f"--dataset digits --train_subset 96 --batch_size 32 {LINE} --init_weights {alone} --trials 2"
    folders = train_teacher.train(parse_teacher(f"{line} --run_dir {tmp_path / 'run'}".split()))
    assert capsys.readouterr().out.count("the prefix module. is removed") == 1
    begun = checkpoint.load_weights(alone)["conv1.weight"]
    for folder in folders:
        torch.testing.assert_close(checkpoint.load_weights(folder / "resnet8_last.pth")["conv1.weight"], begun)
