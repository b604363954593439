"""Object detectors: torchvision's Faster R-CNN and RetinaNet, whose training step also returns its proposals.

Faster R-CNN: Ren et al. 2015 (1506.01497) with the feature pyramid of Lin et al. 2017 (1612.03144). RetinaNet: Lin et
al. 2017 (1708.02002). Names of parameters, losses and defaults are torchvision's, so that its weights load. Boxes are
(left, top, right, bottom) in pixels; class 0 is the background, a data set's classes are 1 to C.

Under autocast, backbone and heads compute in half precision; their outputs become float32 again, so that anchors,
boxes, losses and non-maximum suppression are in float32.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import faster_rcnn, retinanet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.mobilenetv2 import mobilenet_v2
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from inputs import UserError, unknown
from models.detector_names import DETECTORS

Maps = OrderedDict[str, Tensor]  # [B, channels, H, W] each, from the finest to the coarsest


class Prepared(NamedTuple):
    """A batch in the form that a detector's backbone takes."""

    images: ImageList  # resized and normalised: `tensors` [B, 3, H, W], padded to one size; `image_sizes` unpadded
    targets: list[dict[str, Tensor]]  # per image: boxes [G, 4] in pixels of the resized image, labels [G]


class Found(NamedTuple):
    """The result of a training step. A detector without proposals has only losses."""

    losses: dict[str, Tensor]  # objectness, rpn_box, class and box; without proposals class and box
    proposals: list[Tensor] | None = None  # per image: the sampled boxes [N_i, 4], in pixels of the resized image
    pooled: Tensor | None = None  # [N, D], the box head's vectors of all proposals
    logits: Tensor | None = None  # [N, C + 1]
    target: Tensor | None = None  # [N] int64, the class of the matched box, 0 for background
    image: Tensor | None = None  # [N] int64, the index of each proposal's image in the batch


class Detector(nn.Module):
    """A detector of torchvision with its training step split into methods; its evaluation mode is unchanged.

    Args:
        name: one of DETECTORS.
        num_classes: C, without background.
        test_size: short side in pixels to which images are resized in evaluation mode.
        settings: arguments of torchvision's class.
    """

    has_proposals: bool
    heads: tuple[str, ...]  # names of the modules, besides the backbone, whose outputs become float32
    class_names: list[str] | None = None  # without background, if the file of its weights names them
    classifier: nn.Linear | None = None  # from a proposal's vector [D] to its logits [C + 1]; None without proposals
    transform: Any  # torchvision's modules, whose attributes have no types
    backbone: Any

    def __init__(self, name: str, num_classes: int, test_size: int, /, **settings: Any) -> None:
        super().__init__(**settings)
        self.name, self.num_classes = name, num_classes
        self._short_sides = {True: self.transform.min_size, False: (test_size,)}  # by training mode
        for module in ("backbone", *self.heads):
            self.get_submodule(module).register_forward_hook(_in_float32)

    @property
    def widths(self) -> list[int]:
        """Return the channels of each map, and last the length D of a proposal's vector, if there are proposals."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "Detector":
        """Set the training mode, and with it the short sides that `transform` draws from."""
        self.transform.min_size = self._short_sides[mode]
        return super().train(mode)

    def prepare(self, images: list[Tensor], boxes: list[Tensor], labels: list[Tensor]) -> Prepared:
        """Resize images and boxes, and normalise the images and pad them to one size.

        In training mode each image's short side is drawn by torch's global generator.

        Args:
            images: [3, H, W] each, RGB in 0 to 1.
            boxes: [G, 4] each, float32 in pixels of the image; G may be 0.
            labels: [G] each, int64 from 1 to C.

        Raises:
            UserError: a box has no width or no height.
        """
        targets = [{"boxes": each, "labels": label} for each, label in zip(boxes, labels, strict=True)]
        batch, targets = self.transform(images, targets)
        resized = torch.cat([target["boxes"] for target in targets])
        is_flat = ~(resized[:, 2:] > resized[:, :2]).all(1)
        if is_flat.any():
            box = [round(side, 2) for side in torch.cat(boxes)[is_flat][0].tolist()]
            raise UserError(
                f"the box {box} (left, top, right, bottom in pixels) has no width or no height: remove it from the"
                " annotations"
            )
        return Prepared(batch, targets)

    def maps(self, images: Tensor) -> Maps:
        """Return the pyramid's maps of images [B, 3, H, W], which `prepare` returned as `images.tensors`."""
        return self.backbone(images)

    def train_losses(self, prepared: Prepared, maps: Maps) -> Found:
        """Return the losses of a batch in training mode, with the proposals that they were computed from.

        The losses are those of torchvision's `detector(images, targets)`, and so is the sampling of anchors and
        proposals by torch's global generator.
        """
        raise NotImplementedError

    def on_proposals(self, maps: Maps, proposals: list[Tensor], sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Return vectors [N, D] and logits [N, C + 1] of given proposals.

        Args:
            maps: the maps of this detector.
            proposals: [N_i, 4] for each image, in pixels of the resized image.
            sizes: (height, width) of the resized images, without padding.

        Raises:
            UserError: the detector has no proposals.
        """
        raise UserError(f"{self.name} has no proposals, which this needs: choose a Faster R-CNN")


class FasterRCNN(Detector, faster_rcnn.FasterRCNN):
    """Classifies and refines boxes that its region proposal network (RPN) proposes."""

    has_proposals = True
    heads = ("rpn.head", "roi_heads.box_head", "roi_heads.box_predictor")
    classifier = property(lambda self: self.roi_heads.box_predictor.cls_score)
    rpn: Any
    roi_heads: Any

    @property
    def widths(self) -> list[int]:
        return [self.backbone.out_channels] * len(self.rpn.anchor_generator.sizes) + [self.classifier.in_features]

    def train_losses(self, prepared: Prepared, maps: Maps) -> Found:
        """Return the losses of a batch, and its sampled proposals with their vectors, logits and classes.

        No gradient passes through the proposals.
        """
        images, targets = prepared
        proposals, rpn_losses = self.rpn(images, maps, targets)
        proposals, _, labels, offsets = self.roi_heads.select_training_samples(proposals, targets)
        pooled, logits, predicted = self._box_head(maps, proposals, images.image_sizes)
        class_loss, box_loss = fastrcnn_loss(logits, predicted, labels, offsets)
        losses = {
            "objectness": rpn_losses["loss_objectness"],
            "rpn_box": rpn_losses["loss_rpn_box_reg"],
            "class": class_loss,
            "box": box_loss,
        }
        image = torch.cat([torch.full_like(each, number) for number, each in enumerate(labels)])
        return Found(losses, proposals, pooled, logits, torch.cat(labels), image)

    def on_proposals(self, maps: Maps, proposals: list[Tensor], sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        return self._box_head(maps, proposals, sizes)[:2]

    def _box_head(
        self, maps: Maps, proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return vectors [N, D], logits [N, C + 1] and box offsets [N, 4 (C + 1)] of proposals."""
        pooled = self.roi_heads.box_head(self.roi_heads.box_roi_pool(maps, proposals, sizes))
        return pooled, *self.roi_heads.box_predictor(pooled)


class RetinaNet(Detector, retinanet.RetinaNet):
    """Classifies and refines all anchors, without proposals."""

    has_proposals = False
    heads = ("head",)
    head: Any
    anchor_generator: Any

    @property
    def widths(self) -> list[int]:
        return [self.backbone.out_channels] * len(self.anchor_generator.sizes)

    def train_losses(self, prepared: Prepared, maps: Maps) -> Found:
        """Return the losses of a batch: class (focal loss) and box."""
        images, targets = prepared
        features = list(maps.values())
        losses = self.compute_loss(targets, self.head(features), self.anchor_generator(images, features))
        return Found({"class": losses["classification"], "box": losses["bbox_regression"]})


def _in_float32(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """Return a module's output, a tensor or nested containers of them, with half precision turned into float32."""
    if isinstance(output, Tensor):
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
    if isinstance(output, dict):
        return type(output)((name, _in_float32(_module, _inputs, each)) for name, each in output.items())
    return type(output)(_in_float32(_module, _inputs, each) for each in output)


TINY = {"tiny": 4, "tiny_wide": 16}  # channels of the first block


def backbone_of(name: str) -> str:
    """Return the backbone in a detector's name, such as ResNet50."""
    return name.removeprefix("faster_rcnn_").removeprefix("retinanet_").removesuffix("_v2")


def create_detector(
    name: str,
    num_classes: int,
    *,
    frozen_norm: bool = False,
    trainable_layers: int = 5,
    min_sizes: Sequence[int] | None = None,
    max_size: int = 1333,
    test_size: int | None = None,
    rois: int | None = None,
) -> Detector:
    """Return a freshly initialised detector.

    Args:
        name: one of DETECTORS.
        num_classes: C, without background.
        frozen_norm: whether batch norm is fixed (FrozenBatchNorm2d), which needs pretrained statistics.
        trainable_layers: number of trained parts of the backbone, counted from the last. There are five, stem and
            stages, so 3 freezes stem and first stage; a tiny detector has four, its blocks.
        min_sizes: short sides in pixels; training draws one per image. None for 800, or 96 for tiny detectors.
        max_size: the largest long side in pixels, which takes precedence over the short side.
        test_size: short side in pixels in evaluation mode; None for the largest of `min_sizes`.
        rois: proposals sampled per image; None for 512, or 32 for tiny detectors. No effect without proposals.

    Raises:
        UserError: the name is unknown, or `trainable_layers` is not from 0 to 5.
    """
    if name not in DETECTORS:
        raise unknown("detector", name, DETECTORS)
    if not 0 <= trainable_layers <= 5:
        raise UserError(f"a backbone's trainable layers must be from 0 to 5, not {trainable_layers}")
    norm = FrozenBatchNorm2d if frozen_norm else nn.BatchNorm2d
    body, is_dense = backbone_of(name), name.startswith("retinanet_")
    min_sizes = tuple(min_sizes or ((96,) if body in TINY else (800,)))
    settings = {"min_size": min_sizes, "max_size": max_size, "num_classes": num_classes + 1}
    if body in TINY:
        backbone = _tiny_backbone(TINY[body], norm, trainable_layers)
        settings |= {"anchor_generator": _tiny_anchors()} if is_dense else _tiny_heads(num_classes)
    elif body == "MobileNetV2":
        backbone = _mobilenet_backbone(norm, trainable_layers)
    else:
        backbone = resnet_fpn_backbone(
            backbone_name=body.lower(),
            weights=None,
            norm_layer=norm,
            trainable_layers=trainable_layers,
            returned_layers=[2, 3, 4] if is_dense else None,
            extra_blocks=LastLevelP6P7(256, 256) if is_dense else None,
        )
    if name == "faster_rcnn_ResNet50_v2":
        widths = [256, 512, 1024, 2048]
        backbone.fpn = FeaturePyramidNetwork(widths, 256, LastLevelMaxPool(), norm_layer=norm)
        settings["rpn_head"] = RPNHead(256, 3, conv_depth=2)
        settings["box_head"] = faster_rcnn.FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=norm)
    if not is_dense:
        settings["box_batch_size_per_image"] = rois or (32 if body in TINY else 512)
    maker = RetinaNet if is_dense else FasterRCNN
    return maker(name, num_classes, test_size or max(min_sizes), backbone=backbone, **settings)


def _freeze(parts: Sequence[nn.Module], trainable: int) -> None:
    """Fix the parameters of all but the last `trainable` parts."""
    for part in parts[: max(0, len(parts) - trainable)]:
        part.requires_grad_(False)


def _mobilenet_backbone(norm: type[nn.Module], trainable_layers: int) -> BackboneWithFPN:
    """Return all but the last of MobileNetV2's blocks, with a pyramid on the four maps of strides 4 to 32."""
    blocks = mobilenet_v2(norm_layer=norm).features[:18]
    _freeze([blocks[:2], blocks[2:4], blocks[4:7], blocks[7:14], blocks[14:]], trainable_layers)
    return BackboneWithFPN(blocks, {"3": "0", "6": "1", "13": "2", "17": "3"}, [24, 32, 96, 320], 256)


def _tiny_backbone(width: int, norm: type[nn.Module], trainable_layers: int) -> BackboneWithFPN:
    """Return four blocks of stride 2, with a pyramid of 32 channels on the last three."""
    widths = [3, width, 2 * width, 4 * width, 4 * width]
    blocks = [Conv2dNormActivation(*pair, 3, 2, norm_layer=norm) for pair in pairwise(widths)]
    _freeze(blocks, trainable_layers)
    backbone = BackboneWithFPN(nn.Sequential(*blocks), {"1": "0", "2": "1", "3": "2"}, widths[2:], 32)
    backbone.fpn.extra_blocks = None  # no fourth map
    return backbone


def _tiny_anchors() -> AnchorGenerator:
    return AnchorGenerator(((12,), (24,), (48,)), ((0.5, 1.0, 2.0),) * 3)


def _tiny_heads(num_classes: int) -> dict[str, Any]:
    """Return torchvision's settings for a tiny Faster R-CNN; `num_classes` is None since the predictor is given."""
    return {
        "num_classes": None,
        "rpn_anchor_generator": _tiny_anchors(),
        "rpn_batch_size_per_image": 64,
        "rpn_pre_nms_top_n_train": 200,
        "rpn_pre_nms_top_n_test": 100,
        "rpn_post_nms_top_n_train": 200,
        "rpn_post_nms_top_n_test": 100,
        "box_roi_pool": MultiScaleRoIAlign(["0", "1", "2"], 5, 2, canonical_scale=32, canonical_level=3),
        "box_head": faster_rcnn.TwoMLPHead(32 * 5 * 5, 64),
        "box_predictor": faster_rcnn.FastRCNNPredictor(64, num_classes + 1),
    }
