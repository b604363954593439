"""The detectors: the training step is torchvision's, and weights of other codes load."""

import copy
import hashlib
import pickle

import pytest
import torch
from common import error_of
from torch import nn
from torchvision.models import detection as torchvision_detection
from torchvision.models import resnet
from torchvision.models.detection import faster_rcnn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d, roi_align

from models import detector_files, detectron2
from models.detection import DETECTORS, FasterRCNN, create_detector

TINY = [name for name in DETECTORS if "tiny" in name]


def count(model):
    return sum(each.numel() for each in model.parameters())


def on_meta(name, num_classes, **settings):
    with torch.device("meta"):
        return create_detector(name, num_classes, **settings)


def tiny(name="faster_rcnn_tiny", seed=0, **settings):
    torch.manual_seed(seed)
    return create_detector(name, 3, **settings)


def scene(*sizes, boxes=2, seed=0):
    """Return images of the given (height, width), with boxes of 20 pixels a side and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, *size, generator=generator) for size in sizes]
    corners = [torch.randint(0, min(size) - 20, (boxes, 2), generator=generator).float() for size in sizes]
    found = [torch.cat([each, each + 20], 1) for each in corners]
    return images, found, [torch.randint(1, 4, (boxes,), generator=generator) for _ in sizes]


SQUARES = scene((96, 96), (96, 96))


def keeping_all(model):
    """Make a detector, which is not trained, return boxes of any score."""
    (model.roi_heads if model.has_proposals else model).score_thresh = 0.0
    return model


def step(model, batch, seed=7):
    torch.manual_seed(seed)
    prepared = model.prepare(*batch)
    maps = model.maps(prepared.images.tensors)
    return prepared, maps, model.train_losses(prepared, maps)


def of_torchvision(model, batch, seed=7):
    """Return the losses of torchvision's own forward pass under our names."""
    targets = [{"boxes": boxes, "labels": labels} for boxes, labels in zip(*batch[1:], strict=True)]
    torch.manual_seed(seed)
    names = {"loss_objectness": "objectness", "loss_rpn_box_reg": "rpn_box", "loss_classifier": "class",
             "loss_box_reg": "box", "classification": "class", "bbox_regression": "box"}  # fmt: skip
    return {names[name]: loss for name, loss in model(batch[0], targets).items()}


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("faster_rcnn_ResNet18", 90, 28.74e6), ("faster_rcnn_ResNet34", 90, 38.85e6),
        ("faster_rcnn_ResNet50", 90, 41.81e6), ("faster_rcnn_tiny", 3, 99_527), ("faster_rcnn_tiny_wide", 3, 160_115),
    ],
)  # fmt: skip
def test_parameters_are_as_many_as_published(name, classes, parameters):
    assert count(on_meta(name, classes)) == pytest.approx(parameters, abs=5e3 if parameters > 1e6 else 0)


@pytest.mark.parametrize("name", DETECTORS)
def test_each_name_makes_a_detector_with_its_widths(name):
    model = on_meta(name, 3)
    assert (model.name, model.num_classes, model.has_proposals) == (name, 3, name.startswith("faster"))
    width, levels = (32, 3) if name in TINY else (256, 5)
    pooled = [64 if name in TINY else 1024] if model.has_proposals else []
    assert model.widths == [width] * levels + pooled
    assert model.has_proposals == (model.classifier is not None)
    if model.has_proposals:
        assert (model.classifier.in_features, model.classifier.out_features) == (pooled[0], 4)


@pytest.mark.parametrize(("name", "maker"), detector_files.COCO_WEIGHTS.items())
def test_names_and_shapes_are_torchvisions(name, maker):
    with torch.device("meta"):
        theirs = getattr(torchvision_detection, maker)(weights=None, weights_backbone=None, num_classes=91)
    shapes = {key: each.shape for key, each in on_meta(name, 90).state_dict().items()}
    assert shapes == {key: each.shape for key, each in theirs.state_dict().items()}


def test_mobilenet_gives_maps_of_strides_4_to_32_and_a_pooled_one():
    model = on_meta("faster_rcnn_MobileNetV2", 3)
    maps = model.maps(torch.empty(1, 3, 128, 128, device="meta"))
    assert [each.shape[-1] for each in maps.values()] == [32, 16, 8, 4, 2]


def test_unknown_names_and_impossible_numbers_of_layers_are_refused():
    assert "unknown detector 'yolo'; the known ones are: faster_rcnn_ResNet18" in error_of(create_detector, "yolo", 3)
    says = error_of(create_detector, "faster_rcnn_tiny", 3, trainable_layers=6)
    assert "trainable layers must be from 0 to 5, not 6" in says


@pytest.mark.parametrize("name", ["faster_rcnn_ResNet18", "faster_rcnn_MobileNetV2", "faster_rcnn_tiny"])
def test_the_first_layers_are_frozen_and_the_pyramid_is_not(name):
    def trained(layers):
        backbone = on_meta(name, 3, trainable_layers=layers).backbone
        assert all(each.requires_grad for each in backbone.fpn.parameters())
        return [each.requires_grad for each in backbone.body.parameters()]

    none, stem_and_first, every = trained(0), trained(3), trained(5)
    assert not any(none) and all(every)
    assert not stem_and_first[0] and stem_and_first == sorted(stem_and_first) and stem_and_first[-1]


def test_batch_norm_is_frozen_everywhere_or_nowhere():
    for name in ("faster_rcnn_ResNet50_v2", "faster_rcnn_MobileNetV2", "retinanet_ResNet18"):
        for frozen, kind in ((True, FrozenBatchNorm2d), (False, nn.BatchNorm2d)):
            norms = [each for each in on_meta(name, 3, frozen_norm=frozen).modules() if "Norm2d" in type(each).__name__]
            assert norms and {type(each) for each in norms} == {kind}


# ---------------------------------------------------------------- the training step


@pytest.mark.parametrize("batch", [SQUARES, scene((64, 120), (120, 64)), scene((96, 96))],
                         ids=["two", "landscape and portrait", "one"])  # fmt: skip
@pytest.mark.parametrize("name", TINY)
def test_the_step_is_torchvisions_bit_by_bit(name, batch):
    model = tiny(name, min_sizes=(80, 96))
    _, _, found = step(copy.deepcopy(model), batch)
    wanted = of_torchvision(model, batch)
    assert found.losses.keys() == wanted.keys()
    assert all(torch.equal(found.losses[key], wanted[key]) for key in wanted)


def test_a_stock_network_of_torchvision_has_the_same_losses():
    model = tiny()
    rpn, heads = model.rpn, model.roi_heads
    stock = faster_rcnn.FasterRCNN(
        model.backbone, min_size=96, rpn_anchor_generator=rpn.anchor_generator, rpn_head=rpn.head,
        rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=200, rpn_batch_size_per_image=64,
        box_roi_pool=heads.box_roi_pool, box_head=heads.box_head, box_predictor=heads.box_predictor,
        box_batch_size_per_image=32,
    )  # fmt: skip
    wanted = of_torchvision(stock, SQUARES)
    assert all(torch.equal(loss, wanted[key]) for key, loss in step(model, SQUARES)[2].losses.items())


def test_what_is_found_belongs_together():
    model = tiny()
    prepared, _, found = step(model, SQUARES)
    counts = [len(each) for each in found.proposals]
    assert max(counts) <= 32 and sum(counts) == len(found.logits) == len(found.pooled) == len(found.target)
    assert found.image.tolist() == [0] * counts[0] + [1] * counts[1]
    assert found.logits.shape[1] == 4 and found.pooled.shape[1] == model.widths[-1]
    assert torch.equal(model.classifier(found.pooled), found.logits)
    assert torch.equal(nn.functional.cross_entropy(found.logits, found.target), found.losses["class"])
    truth = prepared.targets[0]  # ground truth is among the proposals, with its class
    where = [(found.proposals[0] == box).all(1).nonzero()[:, 0] for box in truth["boxes"]]
    labels = [found.target[: counts[0]][each].tolist() for each in where]
    assert any(labels) and all(set(each) <= {int(label)} for each, label in zip(labels, truth["labels"], strict=True))


def test_a_teacher_that_is_the_student_gives_the_same_logits():
    model = tiny()
    prepared, maps, found = step(model, SQUARES)
    pooled, logits = model.on_proposals(maps, found.proposals, prepared.images.image_sizes)
    assert torch.equal(logits, found.logits) and torch.equal(pooled, found.pooled)
    other = tiny("faster_rcnn_tiny_wide", seed=1).eval()
    with torch.no_grad():
        maps = other.maps(prepared.images.tensors)
        _, logits = other.on_proposals(maps, found.proposals, prepared.images.image_sizes)
    assert logits.shape == found.logits.shape and not torch.equal(logits, found.logits)


def test_gradient_reaches_all_parts_but_not_the_proposals():
    model = tiny()
    _, _, found = step(model, SQUARES)
    assert not any(each.requires_grad for each in found.proposals)
    found.logits.logsumexp(1).sum().backward(retain_graph=True)
    assert model.rpn.head.bbox_pred.weight.grad is None  # the logits' loss knows the RPN by its proposals alone
    sum(found.losses.values()).backward()
    predictor = model.roi_heads.box_predictor
    reached = [model.backbone.body["0"][0], model.rpn.head.conv[0][0], model.rpn.head.cls_logits,
               model.rpn.head.bbox_pred, predictor.cls_score, predictor.bbox_pred]  # fmt: skip
    assert all(layer.weight.grad.abs().sum() > 0 for layer in reached)


@pytest.mark.parametrize("name", TINY)
def test_images_without_boxes_are_background(name):
    images, boxes, labels = scene((96, 96), (96, 96))
    boxes[1], labels[1] = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    _, _, found = step(tiny(name), (images, boxes, labels))
    assert all(loss.isfinite() for loss in found.losses.values())
    if found.proposals:
        assert not found.target[found.image == 1].any() and found.target[found.image == 0].any()
    nothing = ([each[:0] for each in boxes], [each[:0] for each in labels])
    _, _, found = step(tiny(name), (images, *nothing))
    assert all(loss.isfinite() for loss in found.losses.values()) and found.losses["box"] == 0


@pytest.mark.parametrize("box", [[10, 10, 10, 30], [10, 30, 20, 30], [20, 10, 10, 30], [10, 10, torch.nan, 30]])
@pytest.mark.parametrize("name", TINY[::2])
def test_a_box_without_area_is_refused_in_a_sentence(name, box):
    images, boxes, labels = scene((48, 48), (96, 96))
    boxes[0][1] = torch.tensor(box)
    says = error_of(tiny(name).prepare, images, boxes, labels)
    assert f"the box {[float(side) for side in box]}" in says and "no width or no height" in says


def test_without_proposals_nothing_is_computed_on_them():
    model = tiny("retinanet_tiny")
    prepared, maps, found = step(model, SQUARES)
    assert found[1:] == (None,) * 5
    says = error_of(model.on_proposals, maps, [torch.zeros(0, 4)] * 2, prepared.images.image_sizes)
    assert "retinanet_tiny has no proposals" in says


def test_short_sides_are_drawn_in_training_and_fixed_otherwise():
    model = tiny(min_sizes=(64, 80), test_size=96)
    torch.manual_seed(0)
    assert {min(model.prepare(*SQUARES).images.image_sizes[0]) for _ in range(16)} == {64, 80}
    assert model.eval().prepare(*SQUARES).images.image_sizes == [(96, 96)] * 2
    assert min(model.train().prepare(*SQUARES).images.image_sizes[0]) < 96
    assert tiny(min_sizes=(80, 64)).eval().prepare(*SQUARES).images.image_sizes == [(80, 80)] * 2


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_detections_are_in_pixels_of_the_given_image(name):
    images, model = scene((48, 96), (80, 40))[0], keeping_all(tiny(name)).eval()
    outputs = model(images)
    for image, output in zip(images, outputs, strict=True):
        assert output.keys() == {"boxes", "labels", "scores"} and 0 < len(output["labels"]) <= 300
        height, width = image.shape[1:]
        assert (output["boxes"] >= 0).all() and (output["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all()


@pytest.mark.parametrize("name", TINY)
def test_under_autocast_boxes_and_losses_are_in_float32(name):
    model, seen = keeping_all(tiny(name)), []
    model.backbone.fpn.layer_blocks[0][0].register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        _, maps, found = step(model, SQUARES)
        detections = model.eval()(SQUARES[0])
        model.train()
    assert seen == [torch.bfloat16] * 2  # the network itself computes in half precision
    assert {each.dtype for each in [*maps.values(), *found.losses.values()]} == {torch.float32}
    assert {each[key].dtype for each in detections for key in ("boxes", "scores")} == {torch.float32}
    precise = step(model, SQUARES)[2].losses
    assert all(loss.isclose(precise[key], rtol=0.1) and loss != precise[key] for key, loss in found.losses.items())
    if found.proposals:
        assert {each.dtype for each in (*found.proposals, found.pooled, found.logits)} == {torch.float32}
        assert (found.proposals[0] != found.proposals[0].bfloat16()).any()  # not rounded
    sum(found.losses.values()).backward()
    assert model.backbone.body["0"][0].weight.grad.abs().sum() > 0


# ---------------------------------------------------------------- files: ours and torchvision's


def stored(content, path):
    torch.save(content, path)
    return path


def test_a_detector_of_ours_comes_back_from_its_file(tmp_path):
    for name in TINY:
        model = tiny(name).eval()
        path = stored({"model": model.state_dict(), "network_info": {"network": name}}, tmp_path / "x.pth")
        loaded = detector_files.load_detector(path, min_sizes=(64,))
        assert (loaded.name, loaded.num_classes, loaded.transform.min_size) == (name, 3, (64,))
        own = model.state_dict()
        assert all(torch.equal(each, own[key]) for key, each in loaded.state_dict().items())
        assert isinstance(loaded.backbone.body["0"][1], nn.BatchNorm2d)
    frozen = tiny(frozen_norm=True).state_dict()
    loaded = detector_files.load_detector(stored(frozen, path), "faster_rcnn_tiny")
    assert isinstance(loaded.backbone.body["0"][1], FrozenBatchNorm2d) and loaded.backbone.body["0"][1].eps > 0


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_files_that_hold_no_such_detector_are_refused(tmp_path, capsys):
    load, path = detector_files.load_detector, tmp_path / "x.pth"
    weights = tiny().state_dict()
    assert "cannot be read" in error_of(load, path)
    assert "does not say which detector" in error_of(load, stored(weights, path))
    says = error_of(load, path, "faster_rcnn_tiny_wide")
    first = "backbone.body.0.0.weight, backbone.body.0.1.weight, backbone.body.0.1.bias and "
    assert f"holds no faster_rcnn_tiny_wide: it has other shapes of {first}" in says
    assert "it lacks head.classification_head.cls_logits.bias" in error_of(
        load, stored({"a": torch.ones(1)}, path), "faster_rcnn_tiny"
    )
    few = {key: each for key, each in weights.items() if "fpn" not in key}
    says = error_of(load, stored(few, path), "faster_rcnn_tiny")
    assert says.count("backbone.fpn.") == 3 and "it lacks" in says and "and 9 more" in says
    assert "it has unknown more; give" in error_of(
        load, stored(weights | {"more": torch.ones(1)}, path), "faster_rcnn_tiny"
    )
    assert "no network's weights" in error_of(load, stored({"model": 1}, path), "faster_rcnn_tiny")
    assert "unknown detector 'a'" in error_of(load, stored({"model": weights, "network_info": {"network": "a"}}, path))
    assert "is damaged" in error_of(load, stored({"model": weights, "odd": Evil()}, path), "faster_rcnn_tiny")
    assert capsys.readouterr().out == ""


@pytest.fixture
def with_90_classes(monkeypatch):
    """Make the tiny detectors those of which torchvision has weights, and return them with their weights, numbered."""
    monkeypatch.setattr(detector_files, "COCO_WEIGHTS", dict.fromkeys(TINY, ""))

    def make(name):
        weights = create_detector(name, 90, frozen_norm=True).state_dict()
        if "retinanet" in name:
            weights["head.classification_head.cls_logits.bias"] = torch.arange(3 * 91.0)
        else:
            predictor = "roi_heads.box_predictor."
            weights[predictor + "cls_score.bias"] = torch.arange(91.0)
            weights[predictor + "cls_score.weight"][:] = torch.arange(91.0)[:, None]
            weights[predictor + "bbox_pred.bias"] = torch.arange(4 * 91.0)
        return weights

    return make


def test_of_torchvisions_91_outputs_the_categories_are_kept(with_90_classes, tmp_path):
    ids = detector_files.coco_categories()
    assert len(ids) == 80 and (ids[0], ids[11], ids[-1]) == (1, 13, 90)  # 12 is unused
    for name in TINY[:1]:
        path = stored(with_90_classes(name), tmp_path / "x.pth")
        model = detector_files.load_detector(path, name)
        outputs = torch.tensor([0, *ids])
        assert model.num_classes == 80 and model.class_names == detector_files.coco_names()
        assert torch.equal(model.classifier.bias, outputs.float())
        assert torch.equal(model.classifier.weight[:, 5], outputs.float())
        boxes = model.roi_heads.box_predictor.bbox_pred.bias.unflatten(0, (-1, 4))
        assert torch.equal(boxes, outputs[:, None] * 4 + torch.arange(4.0))
        assert {each.eps for each in model.modules() if isinstance(each, FrozenBatchNorm2d)} == {0.0}
    path = stored(with_90_classes("retinanet_tiny"), path)
    model = detector_files.load_detector(path, "retinanet_tiny")
    bias = model.head.classification_head.cls_logits.bias.view(3, 81)
    assert bias[:, -1].tolist() == [90, 181, 272] and bias[:, 0].tolist() == [0, 91, 182]
    assert {each.eps for each in model.modules() if isinstance(each, FrozenBatchNorm2d)} == {0.0}


def test_only_torchvisions_detectors_have_coco_weights(monkeypatch):
    asked = []
    monkeypatch.setattr(detector_files, "fetch", asked.append)
    for name in detector_files.COCO_WEIGHTS:
        detector_files.fetch_coco_weights(name)
    files = [url.rpartition("/")[2].rpartition("-")[0] for url in asked]
    assert files == [
        "fasterrcnn_resnet50_fpn_coco", "fasterrcnn_resnet50_fpn_v2_coco", "retinanet_resnet50_fpn_coco"
    ]  # fmt: skip
    says = error_of(detector_files.fetch_coco_weights, "faster_rcnn_ResNet18")
    assert "no COCO weights of faster_rcnn_ResNet18, only of faster_rcnn_ResNet50" in says


@pytest.mark.parametrize("frozen", [True, False])
def test_the_backbone_starts_from_an_imagenet_classifier(frozen, tmp_path, monkeypatch):
    model = create_detector("faster_rcnn_ResNet18", 3, frozen_norm=frozen)
    classifier = resnet.resnet18()
    path = stored(classifier.state_dict(), tmp_path / "x.pth")
    monkeypatch.setattr(detector_files, "fetch_weights", {"ResNet18": path}.get)
    pyramid = model.backbone.fpn.inner_blocks[0][0].weight.clone()
    for source in (path, detector_files.fetch_backbone("faster_rcnn_ResNet18")):
        nn.init.zeros_(model.backbone.body.conv1.weight)
        detector_files.load_backbone(model, source)
        assert torch.equal(model.backbone.body.conv1.weight, classifier.conv1.weight)
        assert torch.equal(model.backbone.body.layer4[1].bn2.running_var, classifier.layer4[1].bn2.running_var)
    assert torch.equal(model.backbone.fpn.inner_blocks[0][0].weight, pyramid)
    other = resnet._resnet(resnet.BasicBlock, [2, 2, 2, 1], None, False).state_dict()
    says = error_of(detector_files.load_backbone, model, stored(other, path))
    assert "holds no ResNet18: it lacks layer4.1.conv1.weight" in says


def test_the_backbone_of_mobilenet_leaves_out_the_last_block(tmp_path):
    model = on_meta("faster_rcnn_MobileNetV2", 3).to_empty(device="cpu")
    weights = {f"features.{key}": torch.ones_like(each) for key, each in model.backbone.body.state_dict().items()}
    more = {"features.18.0.weight": torch.ones(2), "classifier.1.weight": torch.ones(2)}
    detector_files.load_backbone(model, stored(weights | more, tmp_path / "x.pth"))
    assert all(each.float().eq(1).all() for each in model.backbone.body.state_dict().values())


# ---------------------------------------------------------------- files of detectron2


def small_bottleneck():
    """Return a network with detectron2's names for a ResNet of four bottleneck blocks, and few weights."""
    body = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], width_per_group=1, norm_layer=FrozenBatchNorm2d)
    backbone = BackboneWithFPN(body, {f"layer{i}": str(i - 1) for i in range(1, 5)}, [256, 512, 1024, 2048], 8)
    return FasterRCNN(
        "faster_rcnn_ResNet50", 80, 64, backbone=backbone, min_size=64,
        box_head=faster_rcnn.TwoMLPHead(8 * 7 * 7, 8), box_predictor=faster_rcnn.FastRCNNPredictor(8, 81),
    )  # fmt: skip


@pytest.fixture(scope="module")
def arrays():
    """Return a state dict of `small_bottleneck` with detectron2's names, written out by its documented scheme."""
    norm = ("weight", "bias", "running_mean", "running_var")
    shapes = {"backbone.bottom_up.stem.conv1.weight": (64, 3, 7, 7)}
    shapes |= {f"backbone.bottom_up.stem.conv1.norm.{each}": (64,) for each in norm}
    before = 64
    for stage, (inner, outer) in enumerate([(1, 256), (2, 512), (4, 1024), (8, 2048)], 2):
        layers = {"conv1": (inner, before, 1, 1), "conv2": (inner, inner, 3, 3), "conv3": (outer, inner, 1, 1),
                  "shortcut": (outer, before, 1, 1)}  # fmt: skip
        for layer, shape in layers.items():
            shapes[f"backbone.bottom_up.res{stage}.0.{layer}.weight"] = shape
            shapes |= {f"backbone.bottom_up.res{stage}.0.{layer}.norm.{each}": shape[:1] for each in norm}
        linear = {f"backbone.fpn_lateral{stage}": (8, outer, 1, 1), f"backbone.fpn_output{stage}": (8, 8, 3, 3)}
        shapes |= {f"{layer}.weight": shape for layer, shape in linear.items()}
        shapes |= {f"{layer}.bias": shape[:1] for layer, shape in linear.items()}
        before = outer
    linear = {"proposal_generator.rpn_head.conv": (8, 8, 3, 3),
              "proposal_generator.rpn_head.objectness_logits": (3, 8, 1, 1),
              "proposal_generator.rpn_head.anchor_deltas": (12, 8, 1, 1), "roi_heads.box_head.fc1": (8, 392),
              "roi_heads.box_head.fc2": (8, 8), "roi_heads.box_predictor.cls_score": (81, 8),
              "roi_heads.box_predictor.bbox_pred": (320, 8)}  # fmt: skip
    shapes |= {f"{layer}.weight": shape for layer, shape in linear.items()}
    shapes |= {f"{layer}.bias": shape[:1] for layer, shape in linear.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(shape, generator=generator).numpy() for name, shape in shapes.items()}


def pickled(content, path):
    """Write a pickle and return it with its hash."""
    path.write_bytes(pickle.dumps(content))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_detectron2s_weights_load_completely(arrays, tmp_path):
    model = small_bottleneck()
    for each in model.state_dict().values():
        each.fill_(-1)  # none of the arrays has this value
    constants = {"pixel_mean": torch.ones(3).numpy(), "proposal_generator.anchor_generator.cell_anchors.0": torch.ones(
        3, 4).numpy()}  # fmt: skip
    path, sha256 = pickled({"model": arrays | constants, "__author__": "x"}, tmp_path / "x.pkl")
    detectron2.load_detectron2(path, sha256.upper(), model)
    assert all((each >= 0).all() for each in model.state_dict().values())
    given = {name: torch.from_numpy(each) for name, each in arrays.items()}

    block, prefix = model.backbone.body.layer3[0], "backbone.bottom_up.res4.0."
    assert torch.equal(block.conv2.weight, given[prefix + "conv2.weight"])
    assert torch.equal(block.bn3.running_var, given[prefix + "conv3.norm.running_var"])
    assert torch.equal(block.downsample[0].weight, given[prefix + "shortcut.weight"])
    assert torch.equal(block.downsample[1].bias, given[prefix + "shortcut.norm.bias"])
    assert torch.equal(model.backbone.fpn.inner_blocks[3][0].bias, given["backbone.fpn_lateral5.bias"])
    assert torch.equal(model.backbone.fpn.layer_blocks[0][0].weight, given["backbone.fpn_output2.weight"])
    assert torch.equal(model.rpn.head.bbox_pred.bias, given["proposal_generator.rpn_head.anchor_deltas.bias"])
    assert torch.equal(model.roi_heads.box_head.fc7.weight, given["roi_heads.box_head.fc2.weight"])

    scores = given["roi_heads.box_predictor.cls_score.bias"]  # background last there, first here
    assert torch.equal(model.classifier.bias, torch.cat([scores[80:], scores[:80]]))
    offsets = model.roi_heads.box_predictor.bbox_pred.weight
    assert not offsets[:4].any() and torch.equal(offsets[4:], given["roi_heads.box_predictor.bbox_pred.weight"])


def test_detectron2s_stem_takes_our_images(arrays, tmp_path):
    model = small_bottleneck()
    detectron2.load_detectron2(*pickled({"model": arrays}, tmp_path / "x.pkl"), model)
    image = torch.rand(1, 3, 16, 16)
    bgr = 255 * image.flip(1) - torch.tensor([103.530, 116.280, 123.675])[:, None, None]  # as detectron2 prepares it
    ours = model.transform.normalize(image[0])[None]
    theirs = nn.functional.conv2d(bgr, torch.from_numpy(arrays["backbone.bottom_up.stem.conv1.weight"]), stride=2,
                                  padding=3)  # fmt: skip
    # Padding is zero after normalisation in both.
    torch.testing.assert_close(model.backbone.body.conv1(ours), theirs, rtol=1e-5, atol=1e-2)


def test_detectron2s_layers_replace_torchvisions(arrays, tmp_path):
    model = small_bottleneck()
    file = pickled({"model": arrays}, tmp_path / "x.pkl")
    for _ in range(2):  # a second time changes nothing
        detectron2.load_detectron2(*file, model)
        for stage in ("layer2", "layer3", "layer4"):
            block = model.backbone.body[stage][0]
            assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
        first = model.backbone.body.layer1[0]
        assert (first.conv1.stride, first.conv2.stride) == ((1, 1), (1, 1))
    pool = model.roi_heads.box_roi_pool
    assert isinstance(pool, detectron2.AlignedPool) and (pool.output_size, pool.sampling_ratio) == ((7, 7), 0)
    assert model.train().rpn.post_nms_top_n() == model.eval().rpn.post_nms_top_n() == 1000
    anchors = model.rpn.anchor_generator.cell_anchors
    assert [each.shape for each in anchors] == [(3, 4)] * 5
    for size, each in zip((32, 64, 128, 256, 512), anchors, strict=True):
        width, height = (each[:, 2:] - each[:, :2]).unbind(1)
        torch.testing.assert_close(width * height, torch.full((3,), size**2.0))
        torch.testing.assert_close(height / width, torch.tensor([0.5, 1.0, 2.0]))
        assert torch.equal(each[:, :2], -each[:, 2:])
        assert (each - model.rpn.anchor_generator.generate_anchors([size], [0.5, 1.0, 2.0])).abs().max() <= 0.5
    with torch.no_grad():
        outputs = model([torch.rand(3, 64, 64)])
    assert outputs[0]["boxes"].shape[1] == 4


def test_the_pool_is_aligned_and_takes_each_box_from_its_map():
    sizes, strides = [(128, 160)] * 2, (4, 8, 16, 32)
    maps = {str(i): torch.rand(2, 2, 128 // stride, 160 // stride) for i, stride in enumerate(strides)}
    boxes = [torch.tensor([[8.0, 16, 40, 48], [0, 0, 127, 127]]), torch.tensor([[3.0, 5, 50, 47]])]
    pool = detectron2.AlignedPool(["0", "1", "2", "3"], 7, 0, canonical_scale=64, canonical_level=4)
    pooled = pool(maps, boxes, sizes)
    # Areas of 32^2, 127^2 and 44^2 are of levels 3, 4 and 3 (Lin et al., equation 1).
    for row, (image, box, level) in enumerate([(0, boxes[0][0], 1), (0, boxes[0][1], 2), (1, boxes[1][0], 1)]):
        alone = [box[None] if number == image else box[None][:0] for number in range(2)]
        wanted = roi_align(maps[str(level)], alone, 7, 1 / strides[level], 0, aligned=True)
        torch.testing.assert_close(pooled[row : row + 1], wanted)
    ramp = {"0": torch.arange(40.0).expand(1, 1, 32, 40)}  # its value at x is x: the box's centre, in pixels of the map
    centre = detectron2.AlignedPool(["0"], 1, 0)(ramp, boxes[:1], sizes[:1])
    torch.testing.assert_close(centre.flatten(), torch.tensor([24 / 4 - 0.5, 63.5 / 4 - 0.5]), rtol=1e-4, atol=0)


def test_names_that_do_not_fit_are_named(arrays, tmp_path):
    def error(content):
        return error_of(
            detectron2.load_detectron2, *pickled({"model": content}, tmp_path / "x.pkl"), small_bottleneck()
        )

    extra = dict.fromkeys(["a", "b", "c", "d"], torch.ones(1).numpy())
    assert "it has unknown a, b, c and 1 more; give another file" in error(arrays | extra)
    few = {name: each for name, each in arrays.items() if "res2" not in name}
    says = error(few)
    prefix = "backbone.bottom_up.res2.0.conv1."
    assert f"holds no faster_rcnn_ResNet50: it lacks {prefix}weight, {prefix}norm.weight, {prefix}norm.bias " in says
    assert "and 17 more" in says
    fc1 = "roi_heads.box_head.fc1.bias"
    assert "it has other shapes of roi_heads.box_head.fc6.bias;" in error(arrays | {fc1: torch.ones(3).numpy()})


def test_a_pickle_of_unknown_hash_is_refused_unread(arrays, tmp_path, capsys):
    path, sha256 = pickled({"model": {"a": Evil()}}, tmp_path / "x.pkl")
    load, model = detectron2.load_detectron2, small_bottleneck()
    says = error_of(load, path, None, model)
    assert "read only with the sha256 expected" in says and sha256 in says and "none was given" in says
    says = error_of(load, path, "0" * 64, model)
    assert f"its is {sha256}, not {'0' * 64}: get the file again" in says
    assert "holds more than arrays (builtins.print)" in error_of(load, path, sha256, model)  # even with its hash
    assert capsys.readouterr().out == ""
    assert "cannot be read" in error_of(load, tmp_path / "none.pkl", sha256, model)
    assert "is damaged" in error_of(load, *pickled(["no dict"], path), model)


def test_detectron2s_weights_are_for_its_networks_alone(tmp_path):
    for model in (tiny(), on_meta("faster_rcnn_ResNet50", 3), on_meta("faster_rcnn_ResNet50_v2", 80)):
        says = error_of(detectron2.load_detectron2, tmp_path / "x.pkl", None, model)
        assert f"not for {model.name} with {model.num_classes}" in says
