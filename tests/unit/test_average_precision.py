"""Average precision is COCO's, in percent."""

import sys

import pytest
import torch
from common import error_of

from helper.average_precision import KEYS, as_coco, average_precision

pytest.importorskip("faster_coco_eval", reason="not installed: pip install -r requirements-detection.txt")


def truth_of(boxes):
    """Return the ground truth of (image, category, box) with one crowd."""
    annotations = [
        {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for i, (image, category, box) in enumerate(boxes, 1)
    ]
    crowd = {"id": 99, "image_id": 1, "category_id": 1, "bbox": [200, 200, 50, 50], "area": 2500, "iscrowd": 1}
    images = [{"id": i, "height": 300, "width": 300} for i in (1, 2)]
    return {"images": images, "annotations": [*annotations, crowd], "categories": [{"id": 1}, {"id": 7}]}


BOXES = [(1, 1, [10.0, 10, 20, 20]), (1, 7, [50.0, 20, 40, 60]), (2, 1, [0.0, 0, 50, 50]), (2, 1, [99.0, 80, 30, 30])]


def found_of(boxes, shift=0.0):
    """Return detections that are the given boxes, shifted to the right by a share of their width."""
    return [
        {"image_id": i, "category_id": c, "bbox": [x + shift * w, y, w, h], "score": 0.9}
        for i, c, (x, y, w, h) in boxes
    ]


def test_perfect_detections_have_100_and_none_0(capsys):
    truth = truth_of(BOXES)
    sizes = {"ap", "ap50", "ap75", "ap_small", "ap_medium"}  # no object is large
    in_crowd = {"image_id": 1, "category_id": 1, "bbox": [205.0, 205, 20, 20], "score": 0.95}
    assert average_precision(truth, [*found_of(BOXES), in_crowd]) == dict.fromkeys(sizes, pytest.approx(100))
    assert average_precision(truth, []) == dict.fromkeys(sizes, 0)
    assert "".join(capsys.readouterr()) == ""


def test_shifted_detections_count_at_small_thresholds_only():
    found = found_of(BOXES, 0.26)
    before = [dict(each) for each in found]
    result = average_precision(truth_of(BOXES), found)  # IoU .74 / 1.26 = .587
    assert result["ap50"] == pytest.approx(100) and result["ap75"] == 0
    assert result["ap"] == pytest.approx(20)  # .5 and .55 of ten thresholds
    assert found == before


def test_it_equals_pycocotools():
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        size = torch.rand(count, 2, generator=generator) * 120 + 5
        boxes = torch.cat([torch.rand(count, 2, generator=generator) * 170, size], 1)
        image, category = (torch.randint(2, (count,), generator=generator).tolist() for _ in range(2))
        return [(1 + i, (1, 7)[c], box) for i, c, box in zip(image, category, boxes.tolist(), strict=True)]

    boxes = draw(40)
    found = found_of(boxes, 0.1) + found_of(draw(20))
    for each, score in zip(found, torch.rand(len(found), generator=generator).tolist(), strict=True):
        each["score"] = score
    ours = average_precision(truth_of(boxes), found)
    truth = coco.COCO()
    truth.dataset = truth_of(boxes)
    truth.createIndex()
    evaluation = cocoeval.COCOeval(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert [ours[key] for key in KEYS] == pytest.approx((100 * evaluation.stats[:6]).tolist())
    assert 5 < ours["ap"] < 95


def test_outputs_of_a_detector_become_results():
    output = {
        "boxes": torch.tensor([[1.0, 2, 4, 6], [0, 0, 8, 6]]),
        "scores": torch.tensor([0.5, 0.25]),
        "labels": torch.tensor([2, 1]),
    }
    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    results = as_coco([empty, output], torch.tensor([0, 2]), [10, 11, 12], [2, 9])
    assert results == [
        {"image_id": 12, "category_id": 9, "bbox": [1, 2, 3, 4], "score": 0.5},
        {"image_id": 12, "category_id": 2, "bbox": [0, 0, 8, 6], "score": 0.25},
    ]


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert "pip install -r requirements-detection.txt" in error_of(average_precision, truth_of(BOXES), [])
