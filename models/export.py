"""Export a network for programs without this code: to ONNX, torch.export or TorchScript."""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim

from inputs import UserError, this_python
from models.base import Model

SUFFIXES = {"onnx": ".onnx", "torch.export": ".pt2", "torchscript": ".pt"}  # of the files, by format
ONNX = ("onnx", "onnxruntime", "onnxscript")  # packages, which only the format onnx needs


def check_packages(form: str) -> None:
    """Raise UserError if a format needs packages that are not installed."""
    if form == "onnx" and (missing := [name for name in ONNX if importlib.util.find_spec(name) is None]):
        raise UserError(
            f"--export onnx needs {' and '.join(missing)}: {this_python()} -m pip install -r requirements-export.txt"
        )


def export(model: Model, form: str, path: Path, image_size: int, batch: int | None = None) -> None:
    """Write a network to a file, as a function from images [B, 3, H, W] to logits [B, classes].

    Args:
        model: the network, in evaluation mode on the CPU.
        form: one of SUFFIXES.
        path: path of the file, with the format's suffix.
        image_size: side of the square images in pixels.
        batch: number of images in a batch; None: any number.
    """
    check_packages(form)
    images = torch.zeros(batch or 2, 3, image_size, image_size)
    shapes = None if batch else ({0: Dim("batch")},)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and the exporters warn about their own code
        if form == "torchscript":
            torch.jit.save(torch.jit.trace(model, images), path)
        elif form == "torch.export":
            torch.export.save(torch.export.export(model, (images,), dynamic_shapes=shapes), path)
        else:
            names = {"input_names": ["images"], "output_names": ["logits"]}
            torch.onnx.export(
                model, (images,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False, **names
            )


def load_exported(form: str, path: Path) -> Callable[[Tensor], Tensor]:
    """Return the function in an exported file, from images [B, 3, H, W] to logits [B, classes]."""
    if form == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.load(path)
    if form == "torch.export":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def compare_logits(
    model: Model, exported: Callable[[Tensor], Tensor], image_size: int, batch: int | None = None
) -> tuple[float, float]:
    """Return the largest absolute difference between a network's logits and its export's, and the largest |logit|.

    The inputs are random normal images: one batch of size `batch`; if it is None, two batches of sizes 1 and 3.
    """
    generator, differences, logits = torch.Generator().manual_seed(0), [], []
    for size in [batch] if batch else [1, 3]:
        images = torch.randn(size, 3, image_size, image_size, generator=generator)
        logits.append(model(images).abs().max().item())
        differences.append((exported(images) - model(images)).abs().max().item())
    return max(differences), max(logits)
