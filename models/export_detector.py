"""Export a detector for programs without this code: to TorchScript or ONNX, with resizing and non-maximum suppression.

torch.export is not supported: later computations depend on how many boxes a network finds, which a recorded graph does
not allow ("data-dependent guards" of PyTorch 2.6 to 2.14). For the same reason ONNX files are written by the older of
PyTorch's two exporters, which torchvision supports.
"""

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import faster_rcnn, retinanet
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from inputs import UserError
from models.detection import Detector
from models.detectron2 import AlignedPool
from models.export import SUFFIXES, check_packages, load_exported

OUTPUTS = ("boxes", "labels", "scores")  # [D, 4] in pixels of the image, [D] int64 from 1, [D] from 0 to 1
OPSET = 17  # version of ONNX's operators: the latest that the older exporter writes
FAR = 1e6  # pixels
SIDE = 96  # pixels of the image that a graph is recorded with; the graph takes other sizes too

Exported = Callable[[Tensor], dict[str, Tensor]]  # from an image [3, H, W], RGB in 0 to 1, to OUTPUTS


class Comparison(NamedTuple):
    """Differences between the detections of an exported detector and the detector's own."""

    boxes: int  # number of boxes that the detector finds in all images
    is_alike: bool  # whether the export finds the same number, with the same classes
    box_difference: float  # largest difference of a coordinate, in pixels
    largest: float  # largest magnitude of a coordinate, in pixels
    score_difference: float  # largest difference of a score


class _OfOneImage(nn.Module):
    """A detector that takes one image [3, H, W] and returns OUTPUTS as a tuple."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        (found,) = self.detector([image])
        return tuple(found[name] for name in OUTPUTS)


class _ExactResize(GeneralizedRCNNTransform):
    """Computes sizes in double precision in TorchScript too, where torchvision's are often one pixel too short."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        height, width = image.shape[-2:]
        scale = min(self.min_size[-1] / min(height, width), self.max_size / max(height, width))
        resized = F.interpolate(
            image[None], scale_factor=scale, mode="bilinear", recompute_scale_factor=True, align_corners=False
        )
        return resized[0], target


def check_form(form: str) -> None:
    """Raise UserError if a format does not support detectors, or needs packages that are not installed."""
    if form == "torch.export":
        raise UserError(
            "--export torch.export is not supported for detectors (what they compute depends on how many boxes they"
            f" find): choose one of {', '.join(each for each in SUFFIXES if each != form)}"
        )
    check_packages(form)


def export_detector(model: Detector, form: str, path: Path) -> None:
    """Write a detector to a file; the exported detector takes images of any size.

    An ONNX graph computes sizes in float32: for about a tenth of all sizes, a side becomes one pixel shorter.

    Args:
        model: the detector, in evaluation mode on the CPU.
        form: "torchscript", a function from a list of images to losses, which are empty, and a list of dicts of
            OUTPUTS; or "onnx", a graph from one image to OUTPUTS.
        path: path of the file, with the format's suffix.

    Raises:
        UserError: see `check_form`; or the detector is detectron2's.
    """
    check_form(form)
    if any(isinstance(module, AlignedPool) for module in model.modules()):
        raise UserError("--export is not supported for detectron2's networks (their pooling differs): train"
                        " a detector with this one as its teacher, and export that")  # fmt: skip
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript and the older exporter are deprecated
        if form == "torchscript":
            stock = _stock(model)
            stock.transform.__class__ = _ExactResize
            torch.jit.save(torch.jit.script(stock), path)
            return
        sizes = {"image": {1: "height", 2: "width"}} | {name: {0: "detections"} for name in OUTPUTS}
        torch.onnx.export(
            _OfOneImage(_stock(model)).eval(), (torch.zeros(3, SIDE, SIDE),), path, dynamo=False, opset_version=OPSET,
            input_names=["image"], output_names=list(OUTPUTS), dynamic_axes=sizes,
        )  # fmt: skip


def _stock(model: Detector) -> nn.Module:
    """Return a copy with torchvision's class and without the hooks to float32, so that TorchScript can compile it."""
    stock = copy.deepcopy(model)
    for module in stock.modules():
        module._forward_hooks.clear()
    stock.__class__ = faster_rcnn.FasterRCNN if model.has_proposals else retinanet.RetinaNet
    return stock


def load_exported_detector(form: str, path: Path) -> Exported:
    """Return the function in an exported file."""
    if form == "torchscript":
        script = load_exported(form, path)

        def run_script(image: Tensor) -> dict[str, Tensor]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a warning that it returns losses too
                return script([image])[1][0]

        return run_script
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> dict[str, Tensor]:
        found = map(torch.from_numpy, session.run(list(OUTPUTS), {"image": image.numpy()}))
        return dict(zip(OUTPUTS, found, strict=True))

    return run


@torch.no_grad()
def compare_detections(model: Detector, exported: Exported, images: list[Tensor]) -> Comparison:
    """Compare the detections of a detector and its export; the order of detections with equal scores does not matter.

    Args:
        model: the detector, in evaluation mode on the CPU.
        exported: the result of `load_exported_detector`.
        images: [3, H, W] each, RGB in 0 to 1.
    """
    boxes, largest, box_difference, score_difference = 0, 0.0, 0.0, 0.0
    for image in images:
        (own,), other = model([image]), exported(image)
        boxes += (count := len(own["labels"]))
        nearest = torch.cdist(_points(own), _points(other)).argmin(1) if len(other["labels"]) else torch.arange(0)
        matched = {name: other[name][nearest] for name in OUTPUTS}
        is_matched = len(other["labels"]) == len(nearest.unique()) == count
        if not is_matched or not torch.equal(own["labels"], matched["labels"]):
            return Comparison(boxes, False, math.nan, math.nan, math.nan)
        if count:
            largest = max(largest, own["boxes"].abs().max().item())
            box_difference = max(box_difference, (own["boxes"] - matched["boxes"]).abs().max().item())
            score_difference = max(score_difference, (own["scores"] - matched["scores"]).abs().max().item())
    return Comparison(boxes, True, box_difference, largest, score_difference)


def _points(found: dict[str, Tensor]) -> Tensor:
    """Return the boxes and classes of detections as points [D, 5], far apart if their classes differ."""
    return torch.cat([found["boxes"], FAR * found["labels"][:, None]], 1).double()
