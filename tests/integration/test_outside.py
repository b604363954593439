"""Networks and weights from elsewhere: timm, Hugging Face, the hub."""

import copy
import hashlib
import re

import pytest
import torch
from common import distil, read_log, train

from helper import checkpoint
from helper.run_files import read_config
from inputs import UserError, this_python
from models import create_model, download, feature_widths, outside
from models.projected import Projected
from options.parse import parse_teacher

timm = pytest.importorskip("timm", reason="timm is not installed (requirements-networks.txt)")
NETWORKS = [
    ("resnet10t", 32, 6), ("mobilenetv3_small_050", 32, 6), ("convnext_atto", 64, 5), ("vit_tiny_patch16_224", 224, 13),
    ("regnetx_002", 32, 6), ("swin_tiny_patch4_window7_224", 224, 5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "size", "features"), NETWORKS)
def test_a_timm_network_is_timms_with_features_and_classifier(name, size, features):
    model, theirs = create_model(f"timm:{name}", 7), timm.create_model(name, num_classes=7)
    assert list(model.state_dict()) == list(theirs.state_dict())
    model.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        output = model.eval()(x, is_feat=True)
        torch.testing.assert_close(output.logits, theirs.eval()(x), rtol=0, atol=0)
        torch.testing.assert_close(output.logits, model(x), rtol=0, atol=0)
    assert len(output.features) == features and output.features[-1].shape == (2, model.classifier.in_features)
    assert len(feature_widths(model, size, maps=True)) == features


def test_its_weights_keep_their_names_within_another_module():
    task = torch.nn.ModuleDict({"student": create_model("timm:resnet10t", 3)})
    state = task.state_dict()
    assert "student.conv1.0.weight" in state and not any(".net." in key for key in state)
    state = {key: torch.full_like(value, 2) for key, value in state.items()}
    task.load_state_dict(state)
    assert bool((task["student"].net.fc.weight == 2).all())


@pytest.mark.parametrize("distill", ["kd", "vid", "srrl"])
def test_a_timm_teacher_and_a_timm_student(distill, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("--model timm:mobilenetv3_small_050 --epochs 1")
    folder = distil(f"--model_t timm:mobilenetv3_small_050 --model_s timm:resnet10t --epochs 1 --distill {distill}")
    assert str(folder).startswith(
        f"save/student_model/digits_timm_mobilenetv3_small_050_timm_resnet10t/{distill}_fixed"
    )
    assert read_config(folder)["teacher"] == "timm:mobilenetv3_small_050"
    assert len(read_log(folder)) == 1 and (folder / "timm_resnet10t_last.pth").exists()


def test_simkd_keeps_the_layers_of_a_timm_student_that_it_cannot_leave_out():
    for name in ("timm:mobilenetv2_050", "timm:resnet10t"):
        student = Projected(create_model(name, 7), [24, 4, 4], 2, 64, torch.nn.Linear(24, 7))
        features = student.eval()(torch.zeros(1, 3, 64, 64), is_feat=True).features
        assert features[-1].shape == (1, 24)


def test_pretrained_weights_are_kept_in_a_file_that_identifies_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = []

    def pretrained(name):
        asked.append(name)
        return create_model(name, 10).state_dict()

    monkeypatch.setattr("helper.teacher.pretrained_weights", pretrained)
    line = "--model_t timm:resnet10t --model_s resnet8 --epochs 1"
    one = distil(line)
    two = distil(f"{line} --seed 2")
    assert asked == ["timm:resnet10t"]
    file = tmp_path / "save/models/timm_resnet10t_pretrained/timm_resnet10t.pth"
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert read_config(one)["teacher_sha256"] == read_config(two)["teacher_sha256"] == sha256


def test_weights_that_cannot_be_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fail(*_, **__):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more: fail() if pretrained else None)
    monkeypatch.setattr("options.parse.create_outside", lambda *_: None)
    with pytest.raises(UserError, match=r"timm:resnet10t cannot be downloaded \(no network\): give a file of them"):
        distil("--model_t timm:resnet10t --model_s resnet8 --epochs 1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("--model_s timm:resnet1O", "timm has no network 'resnet1O'; the nearest are: resnet"),
        ("--model_s timm:dla34", "does not end in one linear layer"),
        ("--model_s hf:some/net", "networks of Hugging Face can only teach, with --model_t hf:some/net"),
        ("--model_s tim:resnet18", "unknown model 'tim:resnet18'"),
        (
            "--model_t resnet8 --model_s timm:resnet10t --distill cat_kd --dry_run",
            "the network timm:resnet10t gives no class maps, which",
        ),
        (
            "--model_t timm:resnet10t --distill reviewkd --dry_run",
            "the network timm:resnet10t gives no maps before the ReLU",
        ),
        (
            "--teacher_weights hub --model_t resnet56",
            "--teacher_weights hub downloads weights of --model_t for cifar100",
        ),
    ],
)
def test_names_that_cannot_be_used(line, why):
    with pytest.raises(UserError, match=why):
        distil(line)


def test_a_network_for_images_of_another_size(tmp_path):
    with pytest.raises(UserError, match="fails on images of 32 pixels a side .*choose another --image_size"):
        train(f"--model timm:vit_tiny_patch16_224 --epochs 1 --run_dir {tmp_path / 'run'}")


def test_a_library_that_is_missing_is_named(monkeypatch):
    def missing(library):
        raise ImportError(library)

    monkeypatch.setattr(outside, "import_module", missing)
    command = f"{re.escape(this_python())} -m pip install -r requirements-net"
    with pytest.raises(UserError, match=f"needs the package timm: install it with `{command}"):
        parse_teacher(["--model", "timm:resnet10t"])


@pytest.fixture
def hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
    )
    net = transformers.ResNetForImageClassification(config)
    net.save_pretrained(tmp_path / "net")
    return f"hf:{tmp_path / 'net'}", net


def test_a_hugging_face_teacher(hugging_face, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, theirs = hugging_face
    model = outside.create_outside(name, pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        output, expected = model(x, is_feat=True), theirs.eval()(pixel_values=x).logits
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(model.classifier(output.features[-1]), expected, rtol=0, atol=0)
    for distill in ("kd", "srrl"):
        assert len(read_log(distil(f"--model_t {name} --model_s resnet8 --epochs 1 --distill {distill}"))) == 1
    with pytest.raises(UserError, match="has no maps of a stem and one stage or more"):
        distil(f"--model_t {name} --model_s resnet8 --epochs 1 --distill vid")


def test_it_serves_the_table(hugging_face, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = f"--model_t {hugging_face[0]} --model_s resnet8 --epochs 2"
    online, cached = distil(line), distil(f"{line} --teacher_table --experiments_name table")
    for one, other in zip(read_log(online), read_log(cached), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_the_hubs_weights_are_checked_by_their_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    checkpoint.save(create_model("resnet20", 100).state_dict(), tmp_path / "weights")
    content = (tmp_path / "weights").read_bytes()
    right = hashlib.sha256(content).hexdigest()[:8]
    for digits in (right, "00000000"):
        (tmp_path / f"cifar100_resnet20-{digits}.pt").write_bytes(content)
        monkeypatch.setitem(download.HUB, "resnet20", (tmp_path / f"cifar100_resnet20-{digits}.pt").as_uri())
        if digits == right:
            assert download.fetch_hub("resnet20").read_bytes() == content
        else:
            with pytest.raises(RuntimeError, match="invalid hash"):
                download.fetch_hub("resnet20")
    assert [file.name for file in (tmp_path / "cache/checkpoints").iterdir()] == [f"cifar100_resnet20-{right}.pt"]
    with pytest.raises(UserError, match="the hub has no CIFAR-100 weights of resnet110, only of resnet20, "):
        download.fetch_hub("resnet110")


def test_the_hubs_files_are_named_by_network_and_hash():
    for name, url in download.HUB.items():
        assert url.rpartition("/")[2].startswith(f"cifar100_{name}-") and len(url.rpartition("-")[2]) == len(
            "0" * 8 + ".pt"
        )


def test_outside_networks_survive_a_copy():
    model = copy.deepcopy(create_model("timm:resnet10t", 3))
    assert model.classifier is model.net.fc
