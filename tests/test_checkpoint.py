"""Reading and writing weights: nothing is lost, no code is run, and every mistake gets a sentence."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helper import checkpoint
from helper.errors import UserError
from models import create_model

ROOT = Path(__file__).resolve().parents[1]


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def weights():
    return create_model("resnet8", 10).state_dict()


def refused(path, says, name=None, num_classes=10):
    with pytest.raises(UserError, match=says) as error:
        loaded = checkpoint.load_weights(path)
        checkpoint.network(path, loaded, checkpoint.identify(path, loaded, name), num_classes)
    assert error.value.status == 2
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"model": w}, lambda w: {"state_dict": w, "epoch": 3}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_found_bare_wrapped_and_behind_ddp(tmp_path, weights, wrap, prefix):
    path = tmp_path / "teacher.pth"
    torch.save(wrap({prefix + key: value for key, value in weights.items()}), path)
    loaded = checkpoint.load_weights(path)
    model = checkpoint.network(path, loaded, checkpoint.identify(path, loaded), 10)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key])


def test_a_published_checkpoint_with_a_numpy_accuracy_loads(tmp_path, weights):
    path = tmp_path / "ckpt_epoch_240.pth"
    torch.save({"epoch": 240, "model": weights, "best_acc": np.float64(72.34), "acc": np.float32(1)}, path)
    assert checkpoint.load(path)["best_acc"] == 72.34
    assert checkpoint.load_weights(path).keys() == weights.keys()


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    evil, touched = tmp_path / "evil.pth", tmp_path / "touched"
    torch.save({"model": Malicious(touched)}, evil)
    refused(evil, "could run code")
    evil.write_bytes(pickle.dumps(Malicious(touched)))
    refused(evil, "could run code|damaged")
    assert not touched.exists()
    pickle.loads(evil.read_bytes())
    assert touched.exists()  # the trap is a real one


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_damaged(tmp_path, weights, keep):
    path = tmp_path / "teacher.pth"
    torch.save(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused(path, "damaged")


def test_missing_files_and_files_without_weights(tmp_path):
    refused(tmp_path / "none.pth", "there is no file .*none.pth")
    refused(tmp_path, "there is no file")
    for text in ("error", "text", "a", "epoch,loss", "\x80\x02"):
        (tmp_path / "odd.pth").write_text(text)
        refused(tmp_path / "odd.pth", "damaged")
    for content in ({"epoch": 3}, [1, 2], {}, {"model": {"a": 1}}, {1: torch.zeros(1)}):
        torch.save(content, tmp_path / "odd.pth")
        refused(tmp_path / "odd.pth", "holds no network's weights")


def test_the_architecture_is_recognised_whatever_the_file_is_called(tmp_path):
    for name in ("resnet14", "wrn_16_2", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"):
        weights = create_model(name, 7).state_dict()
        assert checkpoint.identify(tmp_path / "resnet20_vanilla/x.pth", weights) == name


def test_wrong_architecture_says_which_it_is(tmp_path, weights):
    path = tmp_path / "teacher.pth"
    torch.save(weights, path)
    refused(path, "holds a resnet8, not a resnet20", name="resnet20")


def test_an_unknown_architecture_says_what_differs(tmp_path, weights):
    folder = tmp_path / "resnet8_vanilla"
    folder.mkdir()
    weights["conv1.weight"] = torch.zeros(8, 3, 3, 3)
    torch.save(weights, folder / "x.pth")
    refused(folder / "x.pth", r"holds no resnet8 \(its conv1.weight is \[8, 3, 3, 3\] instead of \[16, 3, 3, 3\]\)")
    torch.save({"odd": torch.zeros(1)}, tmp_path / "odd.pth")
    refused(tmp_path / "odd.pth", "holds no network that is known here; .* resnet8")


def test_wrong_number_of_classes(tmp_path, weights):
    path = tmp_path / "teacher.pth"
    torch.save(weights, path)
    refused(path, "trained for 10 classes and this data set has 100", num_classes=100)


def test_a_folder_names_its_network():
    assert checkpoint.model_of_folder(Path("save/models/wrn_40_2_vanilla")) == "wrn_40_2"
    assert checkpoint.model_of_folder(Path("save/models/resnet8x4_vanilla_digits")) == "resnet8x4"
    assert checkpoint.model_of_folder(Path("save/models/mine")) is None


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pth"
    checkpoint.save({"epoch": 1}, path)
    program = f"""
import resource, signal, sys, torch
from pathlib import Path
from helper import checkpoint
from helper.errors import RunError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # what a full disk does to a write
try:
    checkpoint.save({{"epoch": 2, "weights": torch.zeros(1_000_000)}}, Path({str(path)!r}))
except RunError as error:
    print(error, error.status)
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "cannot be written (File too large)" in ran.stdout, ran.stderr
    assert ran.stdout.strip().endswith(" 1")
    assert checkpoint.load(path) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]
