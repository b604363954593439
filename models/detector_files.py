"""Load detectors and their backbones from files of weights: our own and torchvision's."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.ops import FrozenBatchNorm2d

from inputs import UserError, open_regular
from models.detection import Detector, backbone_of, create_detector
from models.download import fetch
from models.imagenet import fetch_weights
from models.state_dict import find_weights

# torchvision's names of the detectors for which it has COCO weights. These have 91 outputs: background (0) and COCO's
# category ids from 1 to 90, ten of them unused.
COCO_WEIGHTS = {
    "faster_rcnn_ResNet50": "fasterrcnn_resnet50_fpn",
    "faster_rcnn_ResNet50_v2": "fasterrcnn_resnet50_fpn_v2",
    "retinanet_ResNet50": "retinanet_resnet50_fpn",
}
COCO_OUTPUTS = 91
FASTER_CLASS, FASTER_BOX = "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"
RETINA_CLASS, RETINA_BOX = "head.classification_head.cls_logits", "head.regression_head.bbox_reg"


def fetch_coco_weights(name: str) -> Path:
    """Return the file with torchvision's COCO weights of a detector, downloaded once.

    Raises:
        UserError: torchvision has none for this detector.
        OSError, RuntimeError, HTTPException: as `fetch`.
    """
    if name not in COCO_WEIGHTS:
        raise UserError(f"torchvision has no COCO weights of {name}, only of {', '.join(COCO_WEIGHTS)}: give a file")
    return fetch(get_model_weights(COCO_WEIGHTS[name]).DEFAULT.url)


def coco_categories() -> list[int]:
    """Return the ids of COCO's 80 categories, ascending."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return [number for number, name in enumerate(names) if number and name != "N/A"]


def coco_names() -> list[str]:
    """Return the names of COCO's 80 categories, by ascending id."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return [names[number] for number in coco_categories()]


def load_detector(path: Path, name: str | None = None, **settings: Any) -> Detector:
    """Return the detector in a file: one of ours, or one of torchvision's with weights for COCO.

    Of torchvision's 91 outputs, only background and the 80 categories are kept. Batch norm is frozen unless the file
    has its `num_batches_tracked`; `settings` can override this.

    Args:
        path: a file saved by torch.save; code in it is never run.
        name: one of DETECTORS; None: the one that the file names.
        settings: arguments of `create_detector`.

    Raises:
        UserError: the file cannot be read, or does not hold this detector.
    """
    weights, info = _read(path)
    name = name or info.get("network")
    if not name:
        raise UserError(f"{path} does not say which detector its weights belong to: give the detector's name")
    outputs = _count_outputs(path, weights)
    is_public = outputs == COCO_OUTPUTS and name in COCO_WEIGHTS and not info
    if is_public:
        weights, outputs = _for_categories(weights, coco_categories()), 1 + len(coco_categories())
    counts_batches = any(key.endswith("num_batches_tracked") for key in weights)
    model = create_detector(name, outputs - 1, **({"frozen_norm": not counts_batches} | settings))
    fit(model, weights, path, name)
    model.class_names = coco_names() if is_public else info.get("class_names")
    if is_public and not name.endswith("_v2"):  # torchvision trained these before its frozen batch norm had an epsilon
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d):
                module.eps = 0.0
    return model


def fetch_backbone(name: str) -> Path:
    """Return the file with torchvision's first ImageNet weights (V1) of a detector's backbone, downloaded once.

    Raises:
        OSError, RuntimeError, HTTPException: as `fetch`.
    """
    return fetch_weights(_classifier_of(name))


def _classifier_of(name: str) -> str:
    """Return the name of the ImageNet classifier that a detector's backbone is part of."""
    backbone = backbone_of(name)
    return "MobileNetV2_Imagenet" if backbone == "MobileNetV2" else backbone


def load_backbone(model: Detector, path: Path) -> None:
    """Initialise a detector's backbone, without the pyramid, from an ImageNet classifier without its last layers.

    Args:
        model: the detector, which is changed.
        path: a file saved by torch.save, with torchvision's names.

    Raises:
        UserError: the file cannot be read, or holds another network.
    """
    weights = {key.removeprefix("features."): each for key, each in _read(path)[0].items()}
    after = ("fc.", "classifier.", "18.")  # ResNet's last layer; MobileNetV2's, and the block before it
    weights = {key: each for key, each in weights.items() if not key.startswith(after)}
    fit(model.backbone.body, weights, path, _classifier_of(model.name))


def fit(module: nn.Module, weights: dict[str, Tensor], path: Path, name: str) -> None:
    """Load weights into a module that has exactly these; `num_batches_tracked` may be absent.

    Args:
        module: the module; it may be partly changed if an error is raised.
        weights: tensors by their names in the module.
        path: the file of the weights, for the error message.
        name: name of the module, for the error message.

    Raises:
        UserError: names or shapes differ; the message names the first three.
    """
    own = module.state_dict()
    check_names(path, name, "has other shapes of",
                [key for key, each in weights.items() if key in own and each.shape != own[key].shape])  # fmt: skip
    missing, unknown = module.load_state_dict(weights, strict=False)
    check_names(path, name, "lacks", missing)
    check_names(path, name, "has unknown", unknown)


def check_names(path: Path, name: str, problem: str, keys: Iterable[str]) -> None:
    """Raise UserError if there are keys; the message has the first three, and the number of the others.

    Args:
        path: file of the weights.
        name: name of the network that the file should hold.
        problem: the phrase before the keys, such as "has other shapes of".
        keys: names of weights.
    """
    keys = list(keys)
    if keys:
        more = f" and {len(keys) - 3} more" if keys[3:] else ""
        raise UserError(f"{path} holds no {name}: it {problem} {', '.join(keys[:3])}{more}; give another file")


def _count_outputs(path: Path, weights: dict[str, Tensor]) -> int:
    """Return the number of a detector's classes with background, C + 1."""
    if f"{FASTER_CLASS}.bias" in weights:
        return len(weights[f"{FASTER_CLASS}.bias"])
    check_names(path, "detector", "lacks", [f"{each}.bias" for each in (RETINA_CLASS, RETINA_BOX)
                                            if f"{each}.bias" not in weights])  # fmt: skip
    return len(weights[f"{RETINA_CLASS}.bias"]) * 4 // len(weights[f"{RETINA_BOX}.bias"])  # each anchor has 4 offsets


def _for_categories(weights: dict[str, Tensor], ids: list[int]) -> dict[str, Tensor]:
    """Return weights of 91 outputs, reduced to background and the categories with the given ids."""
    rows, kept = [0, *ids], dict(weights)
    for end in ("weight", "bias"):
        for key, groups in ((f"{FASTER_CLASS}.{end}", (-1, 1)), (f"{FASTER_BOX}.{end}", (-1, 4))):
            if key in weights:
                kept[key] = weights[key].unflatten(0, groups)[rows].flatten(0, 1)
        if (key := f"{RETINA_CLASS}.{end}") in weights:  # anchors x outputs
            kept[key] = weights[key].unflatten(0, (-1, COCO_OUTPUTS))[:, rows].flatten(0, 1)
    return kept


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights in a file saved by torch.save, and its `network_info`, such as `network`, or an empty dict.

    Code in the file is never run.
    """
    try:
        with open_regular(path) as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give another file") from error
    except UserError:
        raise
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise UserError(f"{path} is damaged or holds more than tensors and plain values: get it again") from error
    try:
        weights = find_weights(content).weights
    except UserError as error:
        raise UserError(f"{path} holds {error}") from error
    info = content.get("network_info")
    return weights, info if isinstance(info, dict) else {}
