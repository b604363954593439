"""ImageNet's networks equal torchvision's; the images' order depends only on seed and epoch."""

from urllib.error import URLError

import pytest
import torch
import torchvision
from common import error_of
from torch import nn

from helper import checkpoint
from helper.teacher import find_teacher, fold_batch_norm
from inputs import UserError
from models import Model, create_model, feature_widths, imagenet_dict
from models.imagenet import WEIGHTS
from options.parse import parse_student

SHAPES = {  # for 64x64 images: the stem's and the last map's
    "ResNet18": ([64, 32, 32], [512, 2, 2], 512),
    "ResNet34": ([64, 32, 32], [512, 2, 2], 512),
    "ResNet50": ([64, 32, 32], [2048, 2, 2], 2048),
    "ResNet101": ([64, 32, 32], [2048, 2, 2], 2048),
    "ResNet152": ([64, 32, 32], [2048, 2, 2], 2048),
    "wrn_50_2": ([64, 32, 32], [2048, 2, 2], 2048),
    "resnext50_32x4d": ([64, 32, 32], [2048, 2, 2], 2048),
    "MobileNetV1_Imagenet": ([32, 32, 32], [1024, 2, 2], 1024),
    "MobileNetV2_Imagenet": ([32, 32, 32], [1280, 2, 2], 1280),
    "ShuffleV2_Imagenet": ([24, 32, 32], [1024, 2, 2], 1024),
    "vgg11_imagenet": ([64, 64, 64], [512, 4, 4], 4096),
    "vgg13_imagenet": ([64, 64, 64], [512, 4, 4], 4096),
}


@pytest.fixture(scope="module", params=imagenet_dict)
def network(request):
    torch.manual_seed(0)
    model = create_model(request.param, 10, "imagenet").eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return request.param, model


@torch.no_grad()
def test_the_networks_are_torchvisions(network):
    name, model = network
    images = torch.randn(2, 3, 64, 64)
    features, logits = model(images, is_feat=True)
    if name in WEIGHTS:
        with torch.device("meta"):
            theirs = torchvision.models.get_model(WEIGHTS[name], num_classes=10).eval()
        assert list(model.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(model.state_dict(), assign=True)
        torch.testing.assert_close(theirs(images), logits, rtol=1e-4, atol=1e-5)
    else:
        assert list(model.state_dict())[:2] == ["model.0.0.weight", "model.0.1.weight"]
        assert list(model.state_dict())[-2:] == ["fc.weight", "fc.bias"]
        assert sum(p.numel() for p in create_model(name, 1000).parameters()) == 4_231_976  # as published
    stem, last, pooled = SHAPES[name]
    assert [list(features[i].shape[1:]) for i in (0, -2, -1)] == [stem, last, [pooled]]
    assert torch.equal(model(images), logits)
    torch.testing.assert_close(model.classifier(features[-1]), logits)
    assert isinstance(model, Model) and model.classifier.out_features == 10
    assert feature_widths(model, 64) == [feature.shape[1] for feature in features]


@torch.no_grad()
def test_maps_before_the_relu(network):
    name, model = network
    images = torch.randn(2, 3, 64, 64)
    plain, more = model(images, is_feat=True), model(images, is_feat=True, also=["preact"])
    assert all(torch.equal(*pair) for pair in zip(plain.features, more.features, strict=True))
    stages = list(zip(more.preact, plain.features[1:-1], strict=True))
    assert all(preact.shape == feature.shape for preact, feature in stages)
    if name not in ("MobileNetV2_Imagenet", "ShuffleV2_Imagenet"):  # which end without ReLU, or in a shuffle
        assert all(preact.min() < 0 and torch.equal(preact.relu(), feature) for preact, feature in stages)
    norms = [model.get_submodule(norm).num_features for norm in model.bn_before_relu]
    assert norms in ([], [feature.shape[1] for _, feature in stages])
    if "vgg" in name:
        assert "takes no average of a map" in error_of(model, images, also=["class_maps"])
    else:
        averages = model(images, also=["class_maps"]).class_maps.mean((2, 3))
        torch.testing.assert_close(averages + model.classifier.bias, plain.logits, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_networks_can_be_folded(network):
    _, model = network
    images = torch.randn(2, 3, 64, 64)
    before = model(images)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    folded = fold_batch_norm(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) or not norms
    torch.testing.assert_close(folded(images), before, rtol=1e-3, atol=1e-3 * before.abs().max().item())


def test_dropout_is_before_the_last_layer_only():
    for name in ("MobileNetV2_Imagenet", "vgg11_imagenet"):
        model = create_model(name, 10).train()
        pooled = torch.ones(4, model.classifier.in_features)
        assert not torch.equal(model.head(pooled)[0], model.head(pooled)[1])


def test_weights_are_known_by_their_names_with_and_without_a_prefix(tmp_path):
    theirs = torchvision.models.resnet18(num_classes=10).state_dict()
    old = {key: value for key, value in theirs.items() if not key.endswith("num_batches_tracked")}
    for weights in (theirs, {f"module.{key}": value for key, value in theirs.items()}, old):
        checkpoint.save(weights, tmp_path / "weights.pth")
        options = parse_student(f"--dataset imagenet --path-t {tmp_path / 'weights.pth'}".split())
        found = find_teacher(options)
        assert found.name == "ResNet18"
        model = checkpoint.network(found.path, found.weights, found.name, 10, "imagenet")
        assert model.fc.weight.equal(theirs["fc.weight"])


def test_the_name_resnet50_depends_on_the_data(tmp_path):
    for dataset, key in (("cifar100", "linear.weight"), ("imagenet", "fc.weight")):
        model = create_model("ResNet50", 10, dataset)
        assert key in model.state_dict()
        checkpoint.save(model.state_dict(), tmp_path / "weights.pth")
        weights = checkpoint.load_weights(tmp_path / "weights.pth")
        assert checkpoint.identify(tmp_path / "weights.pth", weights, "ResNet50", dataset) == "ResNet50"


def test_weights_that_cannot_be_downloaded_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked = []

    def fail(url, *_, **__):
        asked.append(url)
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    line = "--dataset imagenet --teacher_weights torchvision --model_t ResNet34"
    with pytest.raises(UserError, match="could not be downloaded.*--path-t FILE"):
        find_teacher(parse_student(line.split()))
    assert asked[0].endswith(".pth") and "resnet34" in asked[0]
    with pytest.raises(UserError, match="torchvision has no weights of MobileNetV1_Imagenet"):
        find_teacher(parse_student(line.replace("ResNet34", "MobileNetV1_Imagenet").split()))
    file = tmp_path / "checkpoints" / asked[0].rpartition("/")[2]
    checkpoint.save(create_model("ResNet34", 5).state_dict(), file)  # as if already downloaded
    assert find_teacher(parse_student(line.split())).name == "ResNet34"


# ---------------------------------------------------------------- images
