"""Checkpoints as other programs write them: places, prefixes, counters, NumPy values and safetensors."""

import numpy as np
import pytest
import torch
from common import Tiny, error_of

from helper import checkpoint
from inputs import this_python
from models import create_model, imagenet_dict, model_dict, networks
from models.state_dict import OWNERS, PLACES, WRAPPERS


@pytest.fixture
def weights():
    return dict(create_model("resnet8", 10).state_dict())


def prefixed(weights, prefix):
    return {prefix + name: value for name, value in weights.items()}


def stored(content, path):
    torch.save(content, path)
    return path


def notes(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]


def check_loads(path, weights):
    loaded = checkpoint.load_weights(path)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    assert checkpoint.identify(path, loaded) == "resnet8"


PREFIXES = ("module.", "_orig_mod.", "student.", "model.", "backbone.", "module._orig_mod.student.",
            "student.module.", "module.model.backbone.", "_orig_mod._orig_mod.")  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_is_removed_and_that_is_said_once(prefix, weights, tmp_path, capsys):
    path = stored({"model": prefixed(weights, prefix)}, tmp_path / "x.pth")
    check_loads(path, weights)
    assert notes(capsys) == [f"note: {path}: the prefix {prefix} is removed from the names"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("outer", [None, "ema", "model", "state_dict"])
def test_weights_are_found_in_every_place_also_in_one_another(place, outer, weights, tmp_path, capsys):
    content = {place: weights, "epoch": 3}
    content = content if outer is None else {outer: content, "optimizer": {"state": {}, "param_groups": []}}
    check_loads(stored(content, tmp_path / "x.pth"), weights)
    assert notes(capsys) == []  # nothing was changed, and what is no network is no news


def test_counters_of_thop_are_left_out_at_any_depth(weights, tmp_path, capsys):
    counted = prefixed(weights, "module.")
    for module in ("", "module.", "module.layer1.", "module.layer1.0.conv1."):
        counted |= {f"{module}total_ops": torch.zeros(1, dtype=torch.float64), f"{module}total_params": torch.ones(1)}
    path = stored(counted, tmp_path / "x.pth")
    check_loads(path, weights)
    (note,) = notes(capsys)
    assert "the prefix module. is removed" in note and "left out: 4 x total_ops, 4 x total_params" in note


def test_the_students_weights_are_taken_and_the_others_named(weights, tmp_path, capsys):
    both = prefixed(weights, "student.") | prefixed(weights, "teacher.") | {"temperature.mlp": torch.ones(2)}
    path = stored({"state_dict": prefixed(both, "module.")}, tmp_path / "x.pth")
    check_loads(path, weights)
    (note,) = notes(capsys)
    assert "the prefix module.student. is removed" in note
    assert f"left out: {len(weights)} x teacher.*, temperature.*" in note


def test_a_place_beside_another_state_dict_is_taken_and_that_named(weights, tmp_path, capsys):
    path = stored(
        {"student": weights, "teacher": {"fc.bias": torch.ones(3)}, "head": torch.ones(1)}, tmp_path / "x.pth"
    )
    check_loads(path, weights)
    assert notes(capsys) == [f"note: {path}: left out: teacher"]


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "module.", "model.module."])
def test_of_names_with_and_without_a_prefix_those_of_a_network_are_taken(prefix, weights, tmp_path, capsys):
    path = stored(prefixed(weights, prefix) | {"criterion.weight": torch.ones(10)}, tmp_path / "x.pth")
    check_loads(path, weights)
    assert notes(capsys) == [f"note: {path}: the prefix {prefix} is removed from the names; left out: criterion.*"]


def test_what_could_mean_two_networks_is_refused(weights, tmp_path):
    other = dict(create_model("resnet14", 10).state_dict())
    for content, says in (
        ({"model": weights, "ema": other}, "holds weights under 'model' and 'ema': save those"),
        ({"state_dict": {"net": weights, "ema": other}}, "holds weights under 'net' and 'ema'"),
        (
            prefixed(weights, "model.") | prefixed(other, "backbone."),
            "networks under the prefixes model. and backbone.",
        ),
    ):
        assert says in error_of(checkpoint.load_weights, stored(content, tmp_path / "x.pth"))


def test_what_holds_no_network_stays_as_it_is_and_is_refused(tmp_path, capsys):
    path = stored({"model.a": torch.ones(2), "backbone.b": torch.ones(2), "c": torch.ones(1)}, tmp_path / "x.pth")
    assert checkpoint.load_weights(path).keys() == {"model.a", "backbone.b", "c"}
    assert notes(capsys) == []
    content = {}
    content["model"] = content  # endless
    assert "holds no network's weights" in error_of(checkpoint.load_weights, stored(content, path))


class Wrapped(Tiny):
    """A network whose own names all begin with a prefix that others add."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.backbone = torch.nn.ModuleDict({"stem": self.stem, "stage": self.stage, "head": self.classifier})
        del self.stem, self.stage, self.classifier

    @property
    def classifier(self):
        return self.backbone["head"]


def test_a_networks_own_names_are_left_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(model_dict, "wrapped", Wrapped)
    checkpoint._expected_shapes.cache_clear()
    own = Wrapped(10).state_dict()
    assert all(name.startswith("backbone.") for name in own)
    assert checkpoint.load_weights(stored(own, tmp_path / "x.pth")).keys() == own.keys()
    assert checkpoint.load_weights(stored(prefixed(own, "model."), tmp_path / "x.pth")).keys() == own.keys()
    (note,) = notes(capsys)
    assert "the prefix model. is" in note
    checkpoint._expected_shapes.cache_clear()


@pytest.mark.parametrize("name", [n for n in (*model_dict, *imagenet_dict) if n not in ("resnet110", "vgg19")])
def test_no_network_of_the_zoo_has_names_that_are_mistaken_for_prefixed_ones(name, tmp_path):
    with torch.device("meta"):
        names = create_model(name, 2, "imagenet" if name in imagenet_dict else None).state_dict()
    assert not any(all(each.startswith(prefix) for each in names) for prefix in (*WRAPPERS, *OWNERS))
    assert not any(each.startswith(prefix) for each in names for prefix in (*WRAPPERS, "student."))


def test_mobilenet_v1_whose_names_partly_begin_with_model_keeps_them(tmp_path, capsys):
    own = networks("imagenet")["MobileNetV1_Imagenet"](2).state_dict()
    assert checkpoint.load_weights(stored(own, tmp_path / "x.pth")).keys() == own.keys()
    assert notes(capsys) == []


# ---------------------------------------------------------------- values beside the weights


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "int64", "bool"])
def test_numpy_numbers_and_arrays_beside_the_weights_are_read_over(dtype, weights, tmp_path):
    number = np.dtype(dtype).type(1)
    content = {"model": weights, "best_acc": number, "zero_d": np.array(number), "curve": np.ones(5, dtype)}
    path = stored(content, tmp_path / "x.pth")
    check_loads(path, weights)
    assert checkpoint.load(path)["best_acc"] == 1
    assert not isinstance(checkpoint.load(path)["curve"], np.ndarray)  # its content is not even read


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_objects_in_an_array_are_still_refused(weights, tmp_path, capsys):
    path = stored({"model": weights, "odd": np.array([Evil()], dtype=object)}, tmp_path / "x.pth")
    assert "could run code" in error_of(checkpoint.load_weights, path)
    assert capsys.readouterr().out == ""


def test_plain_values_among_the_weights_are_left_out_and_named(weights, tmp_path, capsys):
    path = stored(weights | {"epoch": 3, "name": "mine"}, tmp_path / "x.pth")
    check_loads(path, weights)
    assert notes(capsys) == [f"note: {path}: left out: epoch, name"]


# ---------------------------------------------------------------- safetensors


def test_safetensors_are_read_and_their_prefixes_removed(weights, tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch", reason="the package safetensors is not installed")
    path = tmp_path / "x.safetensors"
    safetensors.save_file(prefixed(weights, "module."), path)
    check_loads(path, weights)
    assert notes(capsys) == [f"note: {path}: the prefix module. is removed from the names"]
    safetensors.save_file({name: value.half() for name, value in weights.items()}, path)
    assert {value.dtype for value in checkpoint.load_weights(path).values()} == {torch.float32}


def test_damaged_missing_and_misnamed_safetensors_are_refused(weights, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="the package safetensors is not installed")
    path = tmp_path / "x.safetensors"
    assert "there is no file" in error_of(checkpoint.load_weights, path)
    whole = safetensors.save(weights)
    for content in (b"", whole[:100], whole[:-1], b"\xff" * 100, torch.zeros(3).numpy().tobytes()):
        path.write_bytes(content)
        assert "is damaged or is no safetensors file" in error_of(checkpoint.load_weights, path)
    path.write_bytes(safetensors.save(weights | {"fc.bias": torch.full((10,), torch.nan)}))
    assert "fc.bias is not finite" in error_of(checkpoint.load_weights, path)


def test_without_the_package_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    (tmp_path / "x.safetensors").touch()
    assert f"{this_python()} -m pip install safetensors" in error_of(
        checkpoint.load_weights, tmp_path / "x.safetensors"
    )


# ---------------------------------------------------------------- what a file says about its weights

INFO = {"network": "resnet8", "dataset": "digits", "image_size": 32, "class_names": list("abcdefghij"),
        "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}  # fmt: skip


def test_a_network_is_built_from_a_file_alone(weights, tmp_path):
    path = stored({"model": weights, "network_info": INFO}, tmp_path / "x.pth")
    model, name, info = checkpoint.load_network(path)
    assert (name, info._asdict()) == ("resnet8", INFO)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    model, name, info = checkpoint.load_network(stored(weights, path))
    assert (name, info, model.classifier.out_features) == ("resnet8", None, 10)
    assert "holds a resnet8, not a resnet14: leave --model out" in error_of(checkpoint.load_network, path, "resnet14")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_size": 4}, "image_size is not from 8 to 8192"), ({"image_size": "32"}, "image_size is not a whole"),
        ({"class_names": ["a"] * 9}, "names 9 classes and has weights for 10"), ({"mean": [0.5]}, "mean is not a list"),
        ({"class_names": [1] * 10}, "class_names.0 is not a text"), ({"std": [0.0, 1, 1]}, "std is not above 0"),
        ({"class_names": ["\x1b[2J"] * 10}, "characters that cannot be printed"), ({"more": 1}, "holds more"),
        ({"mean": [torch.nan, 0.1, 0.1]}, "mean is not finite"), ({"network": None}, "network is not a text"),
    ],
)  # fmt: skip
def test_what_a_damaged_file_says_is_refused(change, says, weights, tmp_path):
    path = stored({"model": weights, "network_info": INFO | change}, tmp_path / "x.pth")
    assert says in error_of(checkpoint.load_network, path)


def test_a_network_starts_from_weights_and_its_classifier_anew_for_other_classes(weights, tmp_path, capsys):
    path = tmp_path / "x.pth"
    model = create_model("resnet8", 10)
    checkpoint.initialise(model, path, weights, "resnet8", "digits")
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert notes(capsys) == []
    model = create_model("resnet8", 3)
    own = model.classifier.weight.clone()
    checkpoint.initialise(model, path, weights, "resnet8", "digits")
    assert torch.equal(model.classifier.weight, own) and torch.equal(model.conv1.weight, weights["conv1.weight"])
    (note,) = notes(capsys)
    assert "the classifier starts anew" in note and "10 classes, and this data set has 3" in note
    says = error_of(checkpoint.initialise, create_model("resnet14", 10), path, weights, "resnet14", "digits")
    assert "holds a resnet8, not a resnet14" in says and "--init_weights" in says
