"""Test, use or export a trained detector, for evaluate.py."""

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import resize, to_pil_image

from dataset import DETECTION, shapes
from dataset.coco import create_validation_data
from dataset.folder import read_pixels
from helper.checkpoint import Info, file_hash
from helper.detection import evaluate_detector
from helper.detector_teacher import read_detector
from helper.device import fitting_batch
from helper.errors import RunError
from helper.files import check_free, write_atomically
from inputs import UserError
from models.detection import Detector
from models.detector_files import coco_names
from models.export import SUFFIXES
from models.export_detector import check_form, compare_detections, export_detector, load_exported_detector
from report.detector_rows import AP_NAMES
from report.style import PALETTE
from report.tables import Table

BATCH = 8  # images per batch in a test
PICTURE = 400  # pixels; images with a smaller short side are enlarged by an integer factor, so that names are legible
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}  # of pictures, by suffix
CORNERS = ("left", "top", "right", "bottom")


class Subject(NamedTuple):
    """A detector from a file."""

    file: Path
    model: Detector
    class_names: Sequence[str]  # of the labels from 1


def load(file: Path, info: Info | None, name: str | None, pickle_sha256: str | None, **settings: Any) -> Subject:
    """Return the detector in a file.

    Args:
        file: the file of weights, from this program, torchvision or detectron2.
        info: the file's description of its weights.
        name: name of the detector; None: the one that the file names.
        pickle_sha256: expected hash of a .pkl file.
        settings: arguments of `create_detector`.

    Raises:
        UserError: as `read_detector`, or the file names more or fewer classes than its weights have.
    """
    model = read_detector(file, name, pickle_sha256, **settings)
    names = info.class_names if info else coco_names()
    if info and len(names) != model.num_classes:
        raise UserError(f"{file} names {len(names)} classes and has weights for {model.num_classes}: get it again")
    if len(names) != model.num_classes:  # trained on another data set, whose class names are unknown
        names = [f"class {number}" for number in range(1, model.num_classes + 1)]
    return Subject(file, model.eval(), names)


# ---------------------------------------------------------------- test


def test(
    subject: Subject, dataset: str | None, data_dir: str | None, batch_size: int, num_workers: int, device: torch.device
) -> tuple[str, dict[str, Any]]:
    """Return a detector's average precisions on the validation images, as text and as plain values.

    Raises:
        UserError: the data set is unknown or missing, or has another number of classes than the detector.
    """
    file, model = subject.file, subject.model
    if dataset is None:
        raise UserError(
            f"neither {file} nor a config.json beside it says which data set the weights belong to: add --dataset, one"
            f" of {', '.join(DETECTION)}"
        )
    data = create_validation_data(
        dataset, batch_size=batch_size, device=device, data_dir=data_dir, num_workers=num_workers
    )
    if model.num_classes != len(data.class_names):
        raise UserError(
            f"the detector in {file} was trained for {model.num_classes} classes, and {dataset} has"
            f" {len(data.class_names)}: give the data set that it was trained on"
        )
    if list(subject.class_names) != list(data.class_names):
        print("note: the classes of this data set have other names than those that the detector was trained for")
    with fitting_batch(batch_size):
        found = evaluate_detector(model, data)
    samples = data.val.num_samples
    rows = [[f"{name}, %", f"{found[key]:.2f}" if key in found else "–"] for key, name in AP_NAMES.items()]
    heading = f"{model.name} in {file}, on {samples:,} validation images of {dataset}"
    known = {"weights": str(file), "sha256": file_hash(file), "network": model.name, "dataset": dataset}
    return f"{heading}\n\n{Table(['measure', 'value'], rows).text()}\n", known | {"samples": samples} | found


# ---------------------------------------------------------------- predict


@torch.no_grad()
def predict(
    subject: Subject, files: Sequence[str], output: str | None, min_score: float, overwrite: bool, device: torch.device
) -> tuple[str, list[dict[str, Any]]]:
    """Return the boxes in images, as text and as plain values, and write a picture of each with its boxes.

    Args:
        subject: the detector.
        files: the images, of any size.
        output: the picture to write; None: `<image>_boxes.png` beside each image.
        min_score: least score of the boxes that are returned and drawn, from 0 to 1.
        overwrite: replace existing pictures.
        device: the device of the detector.

    Raises:
        UserError: a picture exists already, or its name is invalid; or an image cannot be read.
    """
    images, rows = [], []
    for file, picture in zip(files, _pictures(files, output, overwrite), strict=True):
        pixels = read_pixels(Path(file))
        (found,) = subject.model([pixels.to(device) / 255])
        kept = found["scores"] >= min_score
        boxes, labels, scores = (found[name][kept].cpu() for name in ("boxes", "labels", "scores"))
        names = [subject.class_names[label - 1] for label in labels.tolist()]
        texts = [f"{name} {score:.2f}" for name, score in zip(names, scores.tolist(), strict=True)]
        content = io.BytesIO()
        _drawn(pixels, boxes, labels.tolist(), texts).save(content, FORMATS[picture.suffix.lower()])
        write_atomically(picture, content.getvalue())
        listed = list(zip(names, scores.tolist(), boxes.tolist(), strict=True))
        plain = [{"class": name, "score": score, "box": corners} for name, score, corners in listed]
        images.append({"file": file, "picture": str(picture), "boxes": plain})
        cells = [[name, f"{score:.2f}", *(f"{side:.1f}" for side in corners)] for name, score, corners in listed]
        rows += [[file if not place else "", *row] for place, row in enumerate(cells or [["none", *["–"] * 5]])]
    table = Table(["image", "class", "score", *CORNERS], rows).text()
    pictures = "".join(f"picture: {each['picture']}\n" for each in images)
    return f"{table}\n\n{pictures}", images


def _pictures(files: Sequence[str], output: str | None, overwrite: bool) -> list[Path]:
    """Return the paths of the pictures to write. Raises UserError if one exists and `overwrite` is not set."""
    if output and len(files) > 1:
        raise UserError(f"--output is one picture, and there are {len(files)} images: leave it out, or give one image")
    named = [Path(file) for file in files]
    pictures = [Path(output)] if output else [path.with_name(f"{path.stem}_boxes.png") for path in named]
    if len(set(pictures)) < len(pictures):
        raise UserError("two images would have the same picture, <name>_boxes.png: give one at a time, with --output")
    for picture in pictures:
        if picture.suffix.lower() not in FORMATS:
            raise UserError(f"a picture ends in {', '.join(FORMATS)}, unlike {picture}: give another --output")
        check_free(picture, overwrite)
    return pictures


def _drawn(pixels: Tensor, boxes: Tensor, labels: Sequence[int], texts: Sequence[str]) -> Image.Image:
    """Return an image [3, H, W] uint8 with boxes [D, 4] in pixels, one colour per class; small images are enlarged.

    A box's text is above it, or inside it at the top of the image. The first box is drawn last.
    """
    scale = max(1, -(-PICTURE // min(pixels.shape[1:])))
    image = to_pil_image(pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2))
    height = max(14, min(image.size) // 35)
    draw, font = ImageDraw.Draw(image), ImageFont.truetype(findfont("DejaVu Sans"), height)
    for corners, label, text in reversed(list(zip((scale * boxes).tolist(), labels, texts, strict=True))):
        colour, place = PALETTE[label % len(PALETTE)], (corners[0], max(0, corners[1] - 1.4 * height))
        draw.rectangle(corners, outline=colour, width=max(2, height // 6))
        left, top, right, bottom = draw.textbbox(place, text, font)
        draw.rectangle((left - 2, top - 2, right + 2, bottom + 2), fill=colour)
        draw.text(place, text, "white", font)
    return image


# ---------------------------------------------------------------- export


def export(
    subject: Subject, form: str, output: str | None, overwrite: bool, tolerance: float
) -> tuple[str, dict[str, Any]]:
    """Export a detector, and write the file if its reloaded copy finds the same boxes in two test images.

    Args:
        subject: the detector, on the CPU.
        form: one of `models.export.SUFFIXES`.
        output: the file; None: beside the weights.
        overwrite: replace an existing file.
        tolerance: largest difference of scores, and of boxes relative to the largest coordinate.

    Raises:
        UserError: the file exists already; or as `export_detector`.
        RunError: the boxes differ.
    """
    path = Path(output) if output else subject.file.with_suffix(SUFFIXES[form])
    check_form(form)
    check_free(path, overwrite)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"detector{SUFFIXES[form]}"
        export_detector(subject.model, form, file)
        found = compare_detections(subject.model, load_exported_detector(form, file), _test_images(subject.model))
        if not found.is_alike or max(found.box_difference / max(1, found.largest), found.score_difference) > tolerance:
            raise RunError("the exported detector finds other boxes, so nothing is written: try another format")
        write_atomically(path, file.read_bytes())
    result = {"file": str(path), "format": form, "boxes_compared": found.boxes, "classes": list(subject.class_names)}
    result |= {"largest_box_difference": found.box_difference, "largest_score_difference": found.score_difference}
    given = "an image" if form == "onnx" else "a list of images, each"
    same = (
        f"loaded again, it finds the same {found.boxes} boxes in two test images; their corners differ by at most"
        f" {found.box_difference:.2g} pixels, their scores by {found.score_difference:.2g}"
        if found.boxes
        else "loaded again, it finds no box in two test images, as the detector does: nothing else was compared"
    )
    return f"written: {path} ({form})\ntakes {given} [3, height, width], float32, RGB from 0 to 1\n{same}\n", result


def _test_images(model: Detector) -> list[Tensor]:
    """Return two test images [3, H, W], one square and one higher than wide, that resize without rounding error."""
    (side,), longest = model.transform.min_size, model.transform.max_size
    short = side if side % 2 else side // 2
    pixels, _ = shapes.make(2, seed=0)
    sizes = (short, short), (min(short * 3 // 2, short * longest // side), short)
    return [resize(image / 255, list(size)) for image, size in zip(pixels, sizes, strict=True)]
