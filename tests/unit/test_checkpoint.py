"""Reading and writing weights: nothing is lost, no code is run, and every mistake gets one sentence."""

import os
import pickle
import resource
import secrets
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import no_hang
from small_runs import TEACHER

from helper import checkpoint
from helper.errors import RunError
from helper.files import open_to_append, remove_leftovers, try_writing, write_atomically
from helper.teacher import find_teacher
from inputs import NotRegularError, UserError, open_regular
from models import create_model, networks
from options.parse import parse_student


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
    assert touched.exists()  # the file really is malicious


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_damaged(tmp_path, weights, keep):
    path = tmp_path / "teacher.pth"
    torch.save(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused(path, "damaged")


def test_missing_files_and_files_without_weights(tmp_path):
    refused(tmp_path / "none.pth", "there is no file .*none.pth: give another$")
    refused(tmp_path, "is no regular file: give another, or remove it$")
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


def test_refusing_weights_initialises_no_network_in_vain(tmp_path, weights, monkeypatch):
    """Initialising all takes a minute, and the meta device a slow import, so matching weights use neither."""
    devices, real = [], checkpoint.expected_weights

    def noted(name, dataset, device="cpu"):
        expected = real(name, dataset, device)
        devices.append({tensor.device.type for tensor in expected.weights.values()})
        return expected

    monkeypatch.setattr(checkpoint, "expected_weights", noted)
    checkpoint._expected_shapes.cache_clear()
    checkpoint.identify(tmp_path / "resnet8_vanilla/x.pth", weights)
    assert devices == [{"cpu"}]
    weights["conv1.weight"] = torch.zeros(1)
    for _ in range(2):
        with pytest.raises(UserError, match="holds no network"):
            checkpoint.identify(tmp_path / "x.pth", weights)
    assert devices == [{"cpu"}] + [{"meta"}] * len(networks())  # each once


def test_weights_that_fit_no_network_say_which_is_nearest_and_what_differs(tmp_path, weights):
    weights["fc.bias"] = torch.tensor(0.5)
    torch.save(weights, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", r"the nearest is resnet8, but its fc.bias is \[\] instead of \[classes\]; the known")
    (tmp_path / "resnet20_vanilla").mkdir()
    torch.save(weights, tmp_path / "resnet20_vanilla/x.pth")
    refused(tmp_path / "resnet20_vanilla/x.pth", r"no resnet20 \(it has no layer1.1.conv1.weight\) and .*nearest")


TENSORS = [
    ("conv1.weight", lambda w: w / 0, "conv1.weight is not finite"),
    ("fc.bias", lambda w: torch.full_like(w, float("nan")), "fc.bias is not finite"),
    ("bn1.running_var", lambda w: w - 2, "bn1.running_var is negative"),
    ("conv1.weight", lambda w: w.long(), "its conv1.weight is int64 instead of float32"),
    ("conv1.weight", lambda w: w > 0, "its conv1.weight is bool instead of float32"),
    ("conv1.weight", lambda w: w.to(torch.complex64), "conv1.weight is of the type complex64"),
    ("conv1.weight", lambda w: w.to_sparse(), "conv1.weight is a sparse_coo tensor"),
    ("fc.weight", lambda w: w.to_sparse_csr(), "fc.weight is a sparse_csr tensor"),
    ("conv1.weight", lambda w: w.to("meta"), "conv1.weight is a meta tensor"),
    ("conv1.weight", lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "conv1.weight is a quantized tensor"),
    ("fc.bias", lambda w: torch.nested.nested_tensor([w, w]), "fc.bias is a nested tensor"),
    ("fc.weight", lambda w: torch.zeros(1).expand(10**9, 64), "has 64000000000 numbers of which 1 are stored"),
    ("fc.bias", lambda w: {"nested": w}, "holds no network's weights"),
]


@pytest.mark.filterwarnings("ignore")  # about unusual kinds of tensors
@pytest.mark.parametrize(("name", "change", "says"), TENSORS, ids=[says for *_, says in TENSORS])
def test_what_nothing_can_be_learned_from_is_refused_by_its_name(name, change, says, tmp_path, weights):
    weights[name] = change(weights[name])
    torch.save({"model": weights}, tmp_path / "teacher.pth")
    refused(tmp_path / "teacher.pth", says)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_float32(dtype, tmp_path, weights):
    stored = {name: value.to(dtype) for name, value in weights.items()}  # including the number of batches
    torch.save(stored, tmp_path / "teacher.pth")
    loaded = checkpoint.load_weights(tmp_path / "teacher.pth")
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    model = checkpoint.network(tmp_path / "x.pth", loaded, checkpoint.identify(tmp_path / "x.pth", loaded), 10)
    assert torch.equal(model.conv1.weight, stored["conv1.weight"].float())
    stored["fc.bias"] = torch.full((10,), 1e300, dtype=torch.float64)  # beyond float32
    torch.save(stored, tmp_path / "teacher.pth")
    refused(tmp_path / "teacher.pth", "fc.bias is not finite")


def test_a_last_layer_that_is_for_two_numbers_of_classes(tmp_path, weights):
    path = tmp_path / "teacher.pth"
    torch.save(weights | {"fc.weight": torch.zeros(20, 64)}, path)
    refused(path, "its fc.weight and fc.bias are for different numbers of classes")


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    for name in ("last.pth", "last.pth.tmp", "last.pth.0123abcd.tmp", "own.tmp"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pth", "own.tmp"]


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
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # acts like a full disk
    try:
        with pytest.raises(RunError, match="cannot be written .File too large.") as error:
            checkpoint.save({"epoch": 2, "weights": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.status == 1
    assert checkpoint.load(path) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]


# ---------------------------------------------------------------- not regular files, and impossible places


def odd_files(folder):
    """Create and return paths that are not regular files: a FIFO, a link to one, a device, a socket and a folder."""
    os.mkfifo(folder / "fifo")
    (folder / "link").symlink_to(folder / "fifo")
    (folder / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(folder / "socket"))
    return [folder / name for name in ("fifo", "link", "socket", "folder")] + [Path("/dev/zero"), Path("/dev/tty")]


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    for path in (tmp_path / "file", tmp_path / "to_file"):
        if not path.exists():
            path.symlink_to(tmp_path / "file")
        with open_regular(path) as file:
            assert file.read() == b"content"
    with no_hang():
        for path in odd_files(tmp_path):
            for way in (open_regular, open_to_append):
                with pytest.raises(UserError, match=f"{path} is no regular file"):
                    way(path)
    with pytest.raises(UserError, match="is no possible file name"):
        open_regular(Path("a\0b"))
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    with open_to_append(tmp_path / "none") as lock:
        assert lock.writable()


def find(path, **more):
    return find_teacher(SimpleNamespace(**TEACHER | {"path_t": str(path)} | more))


def test_a_teacher_that_is_no_file_is_refused_at_once(tmp_path):
    with no_hang():
        for path in odd_files(tmp_path)[:3]:
            with pytest.raises(UserError, match="is no regular file: give another"):
                find(path)
        (tmp_path / "folder/ckpt_epoch_9.pth").symlink_to("/dev/zero")
        with pytest.raises(UserError, match="ckpt_epoch_9.pth is no regular file"):
            find(tmp_path / "folder")


@pytest.mark.parametrize("path", ["x" * 300, "x" * 300 + "/ckpt_epoch_1.pth", "x/" * 3000, "a\0b"])
def test_a_teacher_on_an_impossible_path_is_said_so(path):
    for more in ({}, {"dry_run": True}):
        with pytest.raises(UserError, match="cannot be read .*: give another --path-t") as error:
            find(path, **more)
        assert "\n" not in str(error.value)


def test_a_teacher_that_may_not_be_read_is_said_so(tmp_path, monkeypatch):
    def closed(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "teacher.pth").write_bytes(b"")
    with monkeypatch.context() as patch:  # since root may read everything
        patch.setattr(os, "open", closed)
        with pytest.raises(UserError, match="teacher.pth cannot be read .Permission denied."):
            find(tmp_path / "teacher.pth")
    monkeypatch.setattr(Path, "stat", closed)
    with pytest.raises(UserError, match="teacher.pth' cannot be read .Permission denied."):
        find(tmp_path / "teacher.pth")


def test_a_file_is_never_written_through_a_link(tmp_path, monkeypatch):
    precious, path = tmp_path / "precious", tmp_path / "last.pth"
    precious.write_bytes(b"mine")
    monkeypatch.setattr(secrets, "token_hex", lambda _: "01234567")
    for beside in (tmp_path / "last.pth.tmp", tmp_path / "last.pth.01234567.tmp"):
        beside.symlink_to(precious)
    with pytest.raises(RunError, match="last.pth cannot be written .File exists."):
        write_atomically(path, b"new")
    monkeypatch.undo()
    path.symlink_to(precious)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and precious.read_bytes() == b"mine"


def test_what_killed_writers_left_does_not_pile_up(tmp_path, monkeypatch):
    kept = [tmp_path / name for name in ("last.pth", "notes.tmp", "my.tmp.txt")]
    for path in (*kept, tmp_path / "last.pth.0123abcd.tmp", tmp_path / "x.pth.ffffffff.tmp"):
        path.write_bytes(b"")
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "last.pth", b"new")
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_trying_to_write_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    try_writing(tmp_path, "go elsewhere")
    try_writing(tmp_path / "a/b/c", "go elsewhere")
    for bad in ("file", "file/x", "nowhere", "nowhere/x", "x" * 300, "a\0b"):
        with pytest.raises(UserError, match="cannot be written .*: go elsewhere"):
            try_writing(tmp_path / bad, "go elsewhere")
    with pytest.raises(UserError, match="/proc/x/y cannot be written .*: go elsewhere"):
        try_writing(Path("/proc/x/y"), "go elsewhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nowhere"]


def test_the_error_of_what_is_no_file_stays_the_same_in_another_process(tmp_path):
    with pytest.raises(NotRegularError) as error:
        open_regular(tmp_path)
    copied = pickle.loads(pickle.dumps(error.value))
    assert type(copied) is NotRegularError
    assert str(copied) == str(error.value) == f"{tmp_path} is no regular file: give another, or remove it"


@pytest.mark.parametrize("more", ["", " --dry_run"])
def test_an_empty_path_is_no_teacher(more):
    with pytest.raises(UserError, match="a student needs a teacher"):
        find_teacher(parse_student(["--path-t", "", *more.split()]))
