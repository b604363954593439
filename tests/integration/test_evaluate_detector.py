"""evaluate.py with detectors: average precision, boxes on images, exports."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from common import error_of
from PIL import Image
from torchvision.transforms.functional import to_pil_image

import evaluate
from dataset import shapes
from dataset.coco import create_validation_data
from helper import checkpoint
from helper.detection import evaluate_detector
from helper.errors import RunError
from models import create_model
from models.detection import create_detector
from models.detector_files import coco_names
from models.detectron2 import AlignedPool
from models.export import ONNX, SUFFIXES
from models.export_detector import compare_detections, load_exported_detector
from report import detector

FORMS = [
    "torchscript",
    pytest.param(
        "onnx",
        marks=pytest.mark.skipif(
            not all(map(importlib.util.find_spec, ONNX)),
            reason="no ONNX here: pip install -r requirements-export.txt",
        ),
    ),
]
NEEDS_EVAL = pytest.mark.skipif(
    not importlib.util.find_spec("faster_coco_eval"), reason="pip install -r requirements-detection.txt"
)


def call(*argv):
    """Return the text and the values of a command."""
    return evaluate.run(evaluate.parse_args(["--device", "cpu", *map(str, argv)]))


def fails(*argv):
    return error_of(call, *argv)


def lively(name="faster_rcnn_tiny", classes=3):
    """Return an untrained detector that finds many boxes."""
    torch.manual_seed(0)
    model = create_detector(name, classes)
    last = model.classifier if model.has_proposals else model.head.classification_head.cls_logits
    torch.nn.init.normal_(last.weight, std=3.0 if model.has_proposals else 3000.0)
    return model.eval()


def stored(model, path, **more):
    info = {"network": model.name, "dataset": "shapes", "image_size": 96, "class_names": list(shapes.KINDS)}
    info |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]} | more
    torch.save({"model": model.state_dict(), "epoch": 1, "network_info": info}, path)
    return path


def pixels_of(path):
    return np.array(Image.open(path).convert("RGB"))


@pytest.fixture(autouse=True)
def no_coco(monkeypatch):
    monkeypatch.delenv("COCO_DIR", raising=False)


@pytest.fixture
def weights(tmp_path):
    return stored(lively(), tmp_path / "faster_rcnn_tiny_last.pth")


@pytest.fixture
def picture(tmp_path):
    to_pil_image(shapes.make(1, seed=1)[0][0]).resize((120, 90)).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


# ---------------------------------------------------------------- test


@NEEDS_EVAL
def test_the_average_precision_is_that_of_training(weights):
    data = create_validation_data("shapes", batch_size=8, device="cpu")
    expected = evaluate_detector(lively(), data)
    text, values = call(weights, "--batch_size", 7)
    assert {key: values[key] for key in expected} == pytest.approx(expected) and expected["ap"] >= 0
    assert (values["network"], values["dataset"], values["samples"]) == ("faster_rcnn_tiny", "shapes", 60)
    assert values["sha256"] == checkpoint.file_hash(weights)
    assert f"AP50, %  {values['ap50']:5.2f}" in text and "APl, %       –" in text  # shapes has no large objects


@NEEDS_EVAL
def test_annotations_for_training_are_not_needed(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    pixels, content = shapes.make(4, seed=1)
    for number, image in enumerate(pixels):
        to_pil_image(image).save(tmp_path / f"val2017/{number}.png")
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(content))
    file = stored(lively(), tmp_path / "w.pth", dataset="coco")
    values = call(file, "--data_dir", tmp_path, "--num_workers", 0)[1]
    assert (values["samples"], values["dataset"]) == (4, "coco") and 0 <= values["ap"] < 100
    assert "--data_dir is missing" in fails(file)
    content["annotations"] = [content["annotations"][0] | {"iscrowd": 1}]
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(content))
    assert "have no boxes to be found" in fails(file, "--data_dir", tmp_path)


def test_a_runs_folder_says_what_its_weights_need(weights, picture, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.move(weights, folder)
    options = {"dataset": "shapes", "max_size": 100}
    (folder / "config.json").write_text(json.dumps({"kind": "detector", "dataset": "shapes", "options": options}))
    (limited,) = call(folder, "--predict", picture)[1]
    file = shutil.copy(folder / "faster_rcnn_tiny_last.pth", tmp_path / "alone.pth")
    (free,) = call(file, "--predict", picture, "--overwrite")[1]
    assert limited["boxes"] != free["boxes"]  # 120 x 90 pixels become 100 x 75 instead of 128 x 96


def test_weights_of_others_need_a_name_and_a_data_set(tmp_path):
    bare = tmp_path / "bare.pth"
    torch.save(lively(classes=80).state_dict(), bare)
    assert "says which data set the weights belong to: add --dataset, one of coco, shapes" in fails(
        bare, "--model", "faster_rcnn_tiny"
    )
    told = fails(bare, "--model", "faster_rcnn_tiny", "--dataset", "shapes")
    assert "was trained for 80 classes, and shapes has 3" in told
    assert "--data_dir is missing" in fails(bare, "--model", "faster_rcnn_tiny", "--dataset", "coco")
    pickled = tmp_path / "model.pkl"
    pickled.write_bytes(b"no pickle")
    assert "does not say which detector it holds" in fails(pickled)
    assert "read only with the sha256 expected" in fails(pickled, "--model", "faster_rcnn_ResNet50")


def test_class_names_are_the_files_or_cocos_or_numbers(tmp_path):
    path = tmp_path / "bare.pth"
    names = {}
    for classes in (80, 2):
        torch.save(lively(classes=classes).state_dict(), path)
        names[classes] = detector.load(path, None, "faster_rcnn_tiny", None).class_names
    assert names[80] == coco_names() and names[80][0] == "person" and len(set(names[80])) == 80
    assert names[2] == ["class 1", "class 2"]
    wrong = stored(lively(), path, class_names=["one"])
    assert "names 1 classes and has weights for 3" in fails(wrong)


# ---------------------------------------------------------------- predict


def test_boxes_are_printed_and_drawn(weights, picture):
    text, (found,) = call(weights, "--predict", picture, "--min_score", 0.4)
    with torch.no_grad():
        (expected,) = lively()([torch.from_numpy(pixels_of(picture)).permute(2, 0, 1) / 255])
    kept = expected["scores"] >= 0.4
    assert 0 < kept.sum() == len(found["boxes"])
    assert [each["box"] for each in found["boxes"]] == pytest.approx(expected["boxes"][kept].numpy(), abs=1e-3)
    assert [each["score"] for each in found["boxes"]] == pytest.approx(expected["scores"][kept].tolist(), abs=1e-5)
    first = found["boxes"][0]
    assert first["class"] == shapes.KINDS[expected["labels"][0] - 1] and f"{first['box'][0]:.1f}" in text
    drawn = Image.open(found["picture"])
    assert Path(found["picture"]) == picture.with_name("photo_boxes.png") and found["picture"] in text
    assert drawn.size == (600, 450)  # enlarged five times
    plain = call(weights, "--predict", picture, "--min_score", 1, "--overwrite")
    assert plain[1][0]["boxes"] == [] and "none" in plain[0]
    assert (pixels_of(found["picture"]) == pixels_of(picture).repeat(5, 0).repeat(5, 1)).all()  # the picture is new


def test_a_large_image_keeps_its_size_and_its_otherpixels_of():
    pixels = torch.full((3, 500, 700), 100, dtype=torch.uint8)
    image = detector._drawn(pixels, torch.tensor([[100.0, 200, 300, 400]]), [1], ["disc 0.50"])
    assert image.size == (700, 500)
    changed = torch.from_numpy(np.array(image)) != 100
    rows, columns = (changed.any(2).any(side).nonzero().flatten() for side in (1, 0))
    assert (columns.min(), columns.max(), rows.max()) == (98, 300, 400)
    assert 170 < rows.min() < 200  # the text above the box
    assert not changed[210:390, 110:290].any()


def test_no_picture_is_overwritten_unless_asked(weights, picture, tmp_path):
    out = tmp_path / "out.png"
    out.write_bytes(b"old")
    assert "is there already" in fails(weights, "--predict", picture, "--output", out)
    assert out.read_bytes() == b"old" and not picture.with_name("photo_boxes.png").exists()
    call(weights, "--predict", picture, "--output", out, "--overwrite")
    assert Image.open(out).format == "PNG"


def test_pictures_without_a_possible_name_are_refused(weights, picture, tmp_path):
    assert "--output is one picture, and there are 2" in fails(
        weights, "--predict", picture, picture, "--output", tmp_path / "x.png"
    )
    other = shutil.copy(picture, picture.with_suffix(".png"))
    assert "would have the same picture" in fails(weights, "--predict", picture, other)
    assert "a picture ends in .png" in fails(weights, "--predict", picture, "--output", tmp_path / "x.tiff")
    assert "cannot be read" in fails(weights, "--predict", tmp_path / "none.png")


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["faster_rcnn_tiny", "retinanet_tiny"])
def test_an_exported_detector_finds_the_same_boxes(form, name, tmp_path):
    model = lively(name)
    file = stored(model, tmp_path / "w.pth")
    text, values = call(file, "--export", form)
    output = file.with_suffix(SUFFIXES[form])
    assert values["file"] == str(output) and values["boxes_compared"] > 20
    assert f"the same {values['boxes_compared']} boxes" in text and values["classes"] == list(shapes.KINDS)
    image = torch.rand(3, 70, 50, generator=torch.Generator().manual_seed(3))  # of another size
    found = compare_detections(model, load_exported_detector(form, output), [image])
    assert found.is_alike and found.boxes > 0 and found.box_difference < 1e-2 and found.score_difference < 1e-4
    before = output.read_bytes()
    assert "is there already" in fails(file, "--export", form)
    assert output.read_bytes() == before


def test_detections_are_compared_whatever_their_order():
    model = lively()
    image = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))

    def changed(change):
        return compare_detections(model, lambda image: change(model([image])[0]), [image])

    backwards = changed(lambda found: {name: each.flip(0) for name, each in found.items()})
    assert backwards.is_alike and backwards.boxes > 3 and backwards.box_difference == backwards.score_difference == 0
    moved = changed(lambda found: found | {"boxes": found["boxes"] + 0.25})
    assert moved.is_alike and moved.box_difference == pytest.approx(0.25, abs=1e-4)
    assert not changed(lambda found: {name: each[1:] for name, each in found.items()}).is_alike
    assert not changed(lambda found: found | {"labels": found["labels"] % 3 + 1}).is_alike


def test_what_differs_or_cannot_be_exported_is_not_written(weights, monkeypatch, tmp_path):
    told = fails(weights, "--export", "torch.export")
    assert "is not supported for detectors" in told and "onnx, torchscript" in told
    assert "--export_batch is for networks that classify" in fails(
        weights, "--export", "torchscript", "--export_batch", 2
    )
    other = lively()
    with torch.no_grad():
        other.classifier.bias[1] += 5
    monkeypatch.setattr(detector, "load_exported_detector", lambda form, path: lambda image: other([image])[0])
    monkeypatch.setattr(detector, "export_detector", lambda model, form, path: path.write_bytes(b"x"))
    with pytest.raises(RunError, match="finds other boxes, so nothing is written"):
        call(weights, "--export", "torchscript")
    assert list(tmp_path.iterdir()) == [weights]


def test_detectron2s_pooling_is_refused(tmp_path):
    model = lively()
    pool = model.roi_heads.box_roi_pool
    model.roi_heads.box_roi_pool = AlignedPool(pool.featmap_names, pool.output_size, 0)
    subject = detector.Subject(tmp_path / "model.pkl", model, shapes.KINDS)
    told = error_of(detector.export, subject, "torchscript", None, False, 1e-4)
    assert "is not supported for detectron2's networks" in told and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--output", "x.png"], "belong to --export, or to a detector's --predict"),
        (["--overwrite"], "belong to --export, or to a detector's --predict"),
        (["--min_score", "0.5"], "--min_score belongs to a detector's --predict"),
        (["--predict", "x.png", "--min_score", "2"], "--min_score must be from 0 to 1"),
    ],
)  # fmt: skip
def test_flags_that_do_nothing_are_refused(argv, says, weights):
    assert says in fails(weights, *argv)


@pytest.mark.parametrize("flag", ["--overwrite", "--output x.png", "--min_score 0.5", "--pickle_sha256 abc"])
def test_flags_of_detectors_are_refused_for_other_networks(flag, tmp_path):
    torch.save(create_model("resnet8", 10).state_dict(), tmp_path / "resnet8.pth")
    said = fails(tmp_path / "resnet8.pth", "--predict", "a.png", *flag.split())
    assert f"holds no detector, for which {flag.split()[0]} is: leave that out" in said


def test_what_is_no_checkpoint_says_nothing_of_a_detector(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(b"text")
    assert checkpoint.read_info(path) is None
    torch.save([1, 2], path)
    assert checkpoint.read_info(path) is None
    assert checkpoint.read_info(stored(lively(), path)).network == "faster_rcnn_tiny"
    assert "is no regular file" in error_of(checkpoint.read_info, tmp_path)
