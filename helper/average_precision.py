"""Average precision of detections as COCO measures it, by faster-coco-eval (optional: requirements-detection.txt)."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchvision.ops import box_convert

from inputs import UserError, this_python

KEYS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # in the order of the library's numbers


def check_installed() -> None:
    """Raise UserError if faster-coco-eval is not installed; called early, long before the package is needed."""
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise UserError(
            "detectors are evaluated by the package faster-coco-eval: install it with"
            f" `{this_python()} -m pip install -r requirements-detection.txt`"
        )


def average_precision(ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return COCO's average precisions of boxes, in percent.

    "ap" is the mean over the IoU thresholds .5, .55, ..., .95; "ap50" and "ap75" use one threshold; "ap_small",
    "ap_medium" and "ap_large" are for objects below 32^2, from 32^2 to 96^2, and above 96^2 pixels. At most 100
    detections per image count (Lin et al. 2014, https://arxiv.org/abs/1405.0312; cocodataset.org/#detection-eval).

    Args:
        ground_truth: in the form of COCO's JSON files; see `dataset.coco.AnnotatedImages`.
        detections: dicts of image_id, category_id, bbox (left, top, width, height in pixels) and score; may be empty.

    Returns:
        The numbers of KEYS, without those for sizes that no object has.

    Raises:
        UserError: faster-coco-eval is not installed.
    """
    check_installed()
    from faster_coco_eval import COCO, COCOeval_faster

    def silent(*_: object) -> None: ...

    truth = COCO(ground_truth, print_function=silent)
    found = truth.loadRes([dict(each) for each in detections])  # copies, since it adds keys
    evaluation = COCOeval_faster(truth, found, "bbox", print_function=silent)
    evaluation.run()
    values = dict(zip(KEYS, evaluation.stats[: len(KEYS)].tolist(), strict=True))
    return {key: 100 * value for key, value in values.items() if value >= 0}  # -1: there are no such objects


def as_coco(
    outputs: Sequence[dict[str, Tensor]], index: Tensor, image_ids: Sequence[int], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Return torchvision's detections in the form of COCO's results.

    Args:
        outputs: per image, boxes [D, 4] (left, top, right, bottom in pixels), scores [D] and labels [D] from 1.
        index: [B] int64, the images' numbers in the split.
        image_ids: ids of the split's images.
        category_ids: ids of the categories: label k is category_ids[k - 1].
    """
    results = []
    for image, output in zip(index.tolist(), outputs, strict=True):
        boxes = box_convert(output["boxes"], "xyxy", "xywh").tolist()
        for box, score, label in zip(boxes, output["scores"].tolist(), output["labels"].tolist(), strict=True):
            category = category_ids[label - 1]
            results.append({"image_id": image_ids[image], "category_id": category, "bbox": box, "score": score})
    return results
