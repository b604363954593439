"""Load the Faster R-CNNs of detectron2's model zoo (Wu et al. 2019); some layers differ from torchvision's."""

import hashlib
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

from inputs import UserError, open_regular
from models.detection import FasterRCNN, Maps
from models.detector_files import FASTER_BOX, FASTER_CLASS, check_names, coco_names, fit

CLASSES = 80  # of COCO
NETWORKS = ("faster_rcnn_ResNet50", "faster_rcnn_ResNet101")

# Parts of torchvision's names and their counterparts in detectron2's.
_PARTS = {
    "backbone.body.conv1.": "backbone.bottom_up.stem.conv1.",
    "backbone.body.bn1.": "backbone.bottom_up.stem.conv1.norm.",
    **{f"backbone.body.layer{i}.": f"backbone.bottom_up.res{i + 1}." for i in range(1, 5)},
    **{f".bn{i}.": f".conv{i}.norm." for i in range(1, 4)},
    ".downsample.0.": ".shortcut.",
    ".downsample.1.": ".shortcut.norm.",
    **{f"backbone.fpn.inner_blocks.{i}.0.": f"backbone.fpn_lateral{i + 2}." for i in range(4)},
    **{f"backbone.fpn.layer_blocks.{i}.0.": f"backbone.fpn_output{i + 2}." for i in range(4)},
    "rpn.head.conv.0.0.": "proposal_generator.rpn_head.conv.",
    "rpn.head.cls_logits.": "proposal_generator.rpn_head.objectness_logits.",
    "rpn.head.bbox_pred.": "proposal_generator.rpn_head.anchor_deltas.",
    "roi_heads.box_head.fc6.": "roi_heads.box_head.fc1.",
    "roi_heads.box_head.fc7.": "roi_heads.box_head.fc2.",
}
_CONSTANTS = ("pixel_mean", "pixel_std", "proposal_generator.anchor_generator.cell_anchors.")  # in older files

# All names in a pickle of a dict of NumPy arrays; NumPy 1 and 2 have different modules.
_ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("collections", "OrderedDict")}
_ALLOWED |= {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")}
_ALLOWED |= {(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}


class AlignedPool(MultiScaleRoIAlign):
    """ROI align with sampling points shifted by half a pixel of the map, as in detectron2, unlike torchvision."""

    def forward(self, x: Maps, boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Return the pooled boxes [N, channels, *output_size].

        Args:
            x: the maps; those in `featmap_names` are used.
            boxes: [N_i, 4] for each image, in pixels.
            image_shapes: (height, width) of the images without padding.
        """
        maps = [x[name] for name in self.featmap_names]
        height = max(height for height, _ in image_shapes)
        levels = [round(np.log2(height / each.shape[-2])) for each in maps]  # a map's stride is 2^level
        mapper = LevelMapper(levels[0], levels[-1], self.canonical_scale, self.canonical_level)
        numbered = torch.cat([F.pad(each, (1, 0), value=number) for number, each in enumerate(boxes)])
        level_of = mapper(boxes) + levels[0]
        pooled = maps[0].new_zeros(len(numbered), maps[0].shape[1], *self.output_size)
        for level, each in zip(levels, maps, strict=True):
            chosen = level_of == level
            pooled[chosen] = roi_align(
                each, numbered[chosen], self.output_size, 2.0**-level, self.sampling_ratio, aligned=True
            )
        return pooled


def load_detectron2(path: Path, sha256: str | None, model: FasterRCNN) -> None:
    """Load a file of detectron2's model zoo, and change the network to compute what detectron2's does.

    The changes are not part of a state dict: a stage's stride is in its first 1x1 convolution, the ROI align is
    `AlignedPool`, anchors are not rounded, and at most 1000 proposals remain in training as well.

    Args:
        path: a pickle of NumPy arrays, such as those of faster_rcnn_R_50_FPN_3x and faster_rcnn_R_101_FPN_3x.
        sha256: the expected hash in hexadecimal; a file with another hash is not read.
        model: faster_rcnn_ResNet50 or faster_rcnn_ResNet101 for 80 classes, which are COCO's by ascending id.

    Raises:
        UserError: the file cannot be read, has another hash, or holds another network; or `model` is another.
    """
    if model.name not in NETWORKS or model.num_classes != CLASSES:
        raise UserError(
            f"detectron2's weights are for {' and '.join(NETWORKS)} with {CLASSES} classes, not for {model.name} with"
            f" {model.num_classes}: choose one of them"
        )
    arrays = _read(path, sha256)
    given = {name: torch.tensor(each) for name, each in arrays.items() if not name.startswith(_CONSTANTS)}
    own = {_detectron2_name(name): name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    check_names(path, model.name, "lacks", [name for name in own if name not in given])
    check_names(path, model.name, "has unknown", [name for name in given if name not in own])
    fit(model, _converted({own[name]: each for name, each in given.items()}), path, model.name)
    model.class_names = coco_names()
    _lay_out(model)


def _detectron2_name(name: str) -> str:
    """Return detectron2's name for a parameter of torchvision's network."""
    for ours, theirs in _PARTS.items():
        name = name.replace(ours, theirs)
    return name


def _converted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return detectron2's weights under torchvision's names, for RGB images from 0 to 1 and with background first.

    detectron2 takes BGR from 0 to 255 minus ImageNet's mean; torchvision also divides by the standard deviation.
    """
    scale = 255 * torch.tensor([0.229, 0.224, 0.225])
    stem = "backbone.body.conv1.weight"
    weights = weights | {stem: weights[stem].flip(1) * scale[:, None, None]}
    for end in ("weight", "bias"):
        scores, boxes = f"{FASTER_CLASS}.{end}", f"{FASTER_BOX}.{end}"
        weights[scores] = weights[scores].roll(1, 0)
        weights[boxes] = torch.cat([torch.zeros_like(weights[boxes][:4]), weights[boxes]])  # zero for background
    return weights


def _lay_out(model: FasterRCNN) -> None:
    """Change a network's layers to those of detectron2, which the weights were trained with."""
    for stage in ("layer2", "layer3", "layer4"):
        block = model.backbone.body[stage][0]
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    pool = model.roi_heads.box_roi_pool
    model.roi_heads.box_roi_pool = AlignedPool(pool.featmap_names, pool.output_size, sampling_ratio=0)
    anchors = model.rpn.anchor_generator
    anchors.cell_anchors = [_anchors(*each) for each in zip(anchors.sizes, anchors.aspect_ratios, strict=True)]
    model.rpn._post_nms_top_n["training"] = 1000


def _anchors(sizes: tuple[int, ...], ratios: tuple[float, ...]) -> Tensor:
    """Return the anchors [ratios * sizes, 4] of a position, centred at 0; a ratio is height by width."""
    root = torch.tensor(ratios).sqrt()[:, None]
    half = torch.stack([torch.tensor(sizes) / root, torch.tensor(sizes) * root], -1).flatten(0, 1) / 2
    return torch.cat([-half, half], 1)


class _ArraysOnly(pickle.Unpickler):
    """Refuses whatever is not part of a NumPy array."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _read(path: Path, sha256: str | None) -> dict[str, np.ndarray]:
    """Return the arrays in a pickle. Raises UserError unless its hash is the expected one."""
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give another file") from error
    actual = hashlib.sha256(content).hexdigest()
    if actual != (sha256 or "").lower():
        none = "and none was given: compare it, and give it as --pickle_sha256"
        advice = f"not {sha256}: get the file again" if sha256 else none
        raise UserError(f"{path} is a pickle, which is read only with the sha256 expected; its is {actual}, {advice}")
    try:
        arrays = _ArraysOnly(BytesIO(content), encoding="latin1").load()["model"]
        return {str(name): np.asarray(each, np.float32) for name, each in arrays.items()}
    except Exception as error:  # a damaged pickle makes the reader raise almost anything
        raise UserError(f"{path} is damaged or holds more than arrays ({error}): get it again") from error
