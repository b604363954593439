"""Find and load a detector, as a teacher or for evaluation."""

from pathlib import Path
from typing import NamedTuple

from helper import distributed
from helper.checkpoint import file_hash
from helper.teacher import UNNAMED, fetched, find_weights
from inputs import UserError
from models.detection import Detector, create_detector
from models.detector_files import fetch_coco_weights, load_detector
from models.detectron2 import load_detectron2
from options.detector import DetectorOptions


class FoundDetector(NamedTuple):
    """A detector's weights and where they came from."""

    path: Path
    name: str  # one of `models.detector_names.DETECTORS`
    sha256: str | None  # of the file; None in a dry run without one
    model: Detector | None  # None in a dry run without a file


def find_teacher(options: DetectorOptions) -> FoundDetector:
    """Return the teacher that --path-t names, set to resize images as given by the run's options.

    Raises:
        UserError: there is no teacher, or its file cannot be used.
    """
    if options.path_t == "torchvision" and not options.dry_run:
        path = fetched(fetch_coco_weights, options.model_t or "", "torchvision", "--path-t FILE")
    else:
        path = Path(options.path_t or "")
    file = distributed.on_rank0(lambda: find_weights(path) if path.exists() or not options.dry_run else None)
    if file is None:
        print("torchvision's weights are downloaded" if options.path_t == "torchvision" else f"{path} is missing")
        return FoundDetector(path, options.model_t or UNNAMED, None, None)
    settings = {"min_sizes": options.min_sizes, "max_size": options.max_size, "test_size": options.test_size}
    model = read_detector(file, options.model_t, options.pickle_sha256, **settings)
    return FoundDetector(file, model.name, distributed.on_rank0(lambda: file_hash(file)), model)


def read_detector(file: Path, name: str | None, pickle_sha256: str | None, **settings: object) -> Detector:
    """Return the detector in a file of weights: from this program, torchvision or detectron2 (.pkl).

    Args:
        file: the file of weights.
        name: name of the detector; None: the one that the file names.
        pickle_sha256: expected hash of a .pkl file.
        settings: arguments of `create_detector`.

    Raises:
        UserError: the file cannot be used, or does not say which detector it holds.
    """
    if file.suffix != ".pkl":
        return load_detector(file, name, **settings)
    if name is None:
        raise UserError(f"{file} does not say which detector it holds: give its name, as --model_t or --model")
    model = create_detector(name, 80, **settings)
    load_detectron2(file, pickle_sha256, model)
    return model
