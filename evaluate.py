"""Test, use or export a trained network or detector: the weights in a file, or those of a run's folder.

python evaluate.py save/models/resnet20_vanilla_digits
python evaluate.py save/models/resnet56_vanilla/ckpt_epoch_240.pth --dataset cifar100 --json
python evaluate.py save/models/resnet20_vanilla_digits --predict photo.png
python evaluate.py save/models/resnet20_vanilla_digits --export onnx
python evaluate.py save/detectors/shapes_faster_rcnn_tiny_alone --predict photo.png
"""

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
import argparse
import json
import shlex
import sys
import tempfile
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dataset import Dataset, check_dataset, create_dataset, dataset_names, default_image_size, read_image
from dataset.base import Loader
from helper.checkpoint import Info, file_hash, load_network, read_info
from helper.device import fitting_batch, place, prepare_device
from helper.distributed import hide_progress
from helper.errors import RunError, run_main
from helper.files import check_free, write_atomically
from helper.run_files import read_config
from helper.teacher import find_weights
from inputs import UserError, unknown
from models import Model, networks
from models.detector_names import DETECTORS
from models.export import SUFFIXES, check_packages, compare_logits, export, load_exported
from models.outside import is_outside
from options.parse import data_dir_of
from options.parser import Parser
from options.plugins import load_plugins
from report.scores import score
from report.tables import Table

TOP = 5  # classes shown for an image
TOLERANCE = 1e-4  # difference of an exported network's logits, relative to the largest one or to 1
MIN_SCORE = 0.5  # default of --min_score


class Subject(NamedTuple):
    """The network to evaluate, and its data set."""

    file: Path  # of the weights
    model: Model
    name: str  # name of the network
    info: Info | None  # the file's description of its weights
    dataset: str | None
    data_dir: str | None
    image_size: int


def run(args: argparse.Namespace) -> tuple[str, Any]:
    """Test, use or export the network as the flags say; return the result as text and as plain values."""
    # 1. the weights, and their description in the file or its run
    file = find_weights(Path(args.path))
    info = None if file.suffix == ".pkl" else read_info(file)
    if file.suffix == ".pkl" or (args.model or (info and info.network)) in DETECTORS:
        return run_detector(file, info, args)
    check_network_args(args)
    subject = load(file, args)
    # 2. export, predict or test
    if args.export:
        return export_checked(subject, args)
    device = prepare_device(args.device, None, deterministic=False)
    place(subject.model, device)
    if args.predict:
        return predict(subject, args, device)
    return test(subject, args, device)


def check_plugins(folder: Path, config: dict[str, Any], args: argparse.Namespace) -> None:
    """Raise UserError if the network or data set of a run is from a plug-in that is not loaded."""
    network = args.model or config.get("model_s") or config.get("model")
    is_known = network in networks() or is_outside(network or "")
    has_data = args.dataset or config.get("dataset") in dataset_names()
    if config.get("plugins") and not args.plugins and not (is_known and has_data):
        raise UserError(f"the run in {folder} used --plugins {shlex.quote(config['plugins'])}: add that")


def load(file: Path, args: argparse.Namespace) -> Subject:
    """Return the network in a file, with its data set; see `dataset_of`."""
    config = config_beside(file)
    check_plugins(file.parent, config, args)
    model, name, info = load_network(file, args.model, config.get("dataset") or args.dataset)
    dataset, data_dir = dataset_of(info, config, args)
    if dataset is not None:
        check_dataset(dataset)
    size = info.image_size if info else config.get("image_size") if dataset == config.get("dataset") else None
    if dataset not in (None, "folder", "imagenet"):
        size = None  # the other data sets have a fixed size
    image_size = args.image_size or size or default_image_size(dataset or "")
    return Subject(file, model, name, info, dataset, data_dir, image_size)


def dataset_of(info: Info | None, config: dict[str, Any], args: argparse.Namespace) -> tuple[str | None, str | None]:
    """Return name and folder of the data set, from the flags, the file or the run, in this order of priority."""
    dataset = args.dataset or (info.dataset if info else config.get("dataset"))
    from_run = config.get("data_dir") if dataset == config.get("dataset") else None
    return dataset, data_dir_of(dataset, args.data_dir or from_run)


def config_beside(file: Path) -> dict[str, Any]:
    """Return the options, with the data set, of the run whose folder holds a file; empty for other folders."""
    try:
        config = read_config(file.parent)
    except (OSError, ValueError):
        return {}
    return config["options"] | {"dataset": config.get("dataset")} if "kind" in config else {}


def run_detector(file: Path, info: Info | None, args: argparse.Namespace) -> tuple[str, Any]:
    """Test, use or export a detector as the flags say; see `run`."""
    from report import detector  # imports torchvision's detectors, which takes seconds

    if args.export_batch is not None:
        raise UserError("--export_batch is for networks that classify (a detector takes any number): leave it out")
    config = config_beside(file)
    dataset, data_dir = dataset_of(info, config, args)
    settings: dict[str, Any] = {"max_size": config["max_size"]} if config.get("max_size") else {}
    if size := args.image_size or (info and info.image_size):
        settings["test_size"] = size
    subject = detector.load(file, info, args.model, args.pickle_sha256, **settings)
    if args.export:
        return detector.export(subject, args.export, args.output, args.overwrite, TOLERANCE)
    device = prepare_device(args.device, None, deterministic=False)
    torch.backends.cudnn.benchmark = False  # images differ in size, and cuDNN would time its algorithms for each
    place(subject.model, device)
    if args.predict:
        score = MIN_SCORE if args.min_score is None else args.min_score
        return detector.predict(subject, args.predict, args.output, score, args.overwrite, device)
    return detector.test(subject, dataset, data_dir, args.batch_size or detector.BATCH, args.num_workers, device)


# ---------------------------------------------------------------- test


def test(subject: Subject, args: argparse.Namespace, device: torch.device) -> tuple[str, Any]:
    """Return accuracy, loss and calibration on the validation images of the data set."""
    data = load_data(subject, args, device)
    scores = score(*logits_of(subject.model, data.val), data.class_names)
    told = f"{subject.name} in {subject.file}, on {scores.samples:,} validation images of {subject.dataset}"
    known = {"weights": str(subject.file), "sha256": file_hash(subject.file), "network": subject.name}
    known |= {"dataset": subject.dataset}
    return f"{told}\n\n{scores.text()}", known | scores.as_dict()


def load_data(subject: Subject, args: argparse.Namespace, device: torch.device) -> Dataset:
    """Return the data set, its images normalised as the network's training images were.

    Raises:
        UserError: the data set is unknown or missing, or has another number of classes than the network.
    """
    if subject.dataset is None:
        raise UserError(
            f"neither {subject.file} nor a config.json beside it says which data set the weights belong to: add"
            f" --dataset, one of {', '.join(dataset_names())}"
        )
    data = create_dataset(
        subject.dataset,
        batch_size=args.batch_size or 64,
        seed=0,
        device=device,
        data_dir=subject.data_dir,
        image_size=subject.image_size,
        num_workers=args.num_workers,
    )
    data.val.batch_size = args.batch_size or data.val.batch_size
    if (classes := subject.model.classifier.out_features) != data.num_classes:
        raise UserError(
            f"the network in {subject.file} was trained for {classes} classes, and {subject.dataset} has"
            f" {data.num_classes}: give the data set that it was trained on"
        )
    if (info := subject.info) is None:
        return data
    if list(info.class_names) != list(data.class_names):
        print("note: the classes of this data set have other names than those that the network was trained for")
    if (list(info.mean), list(info.std)) != (list(data.mean), list(data.std)):
        print("note: images are normalised as in the network's training, not as usual for this data set")
        data.val.mean, data.val.std = (255 * scale.to(device) for scale in _scales(info.mean, info.std))
    return data


@torch.no_grad()
def logits_of(model: Model, loader: Loader) -> tuple[Tensor, Tensor]:
    """Return a network's logits [N, C] for the images of a loader, and their classes [N]; both on the CPU."""
    model.eval()
    with fitting_batch(loader.batch_size):
        bar = tqdm(loader, "test", unit="batch", leave=False, disable=hide_progress())
        batches = [(model(batch.images).cpu(), batch.target.cpu()) for batch in bar]
    logits, target = (torch.cat(each) for each in zip(*batches, strict=True))
    return logits, target


# ---------------------------------------------------------------- predict


@torch.no_grad()
def predict(subject: Subject, args: argparse.Namespace, device: torch.device) -> tuple[str, Any]:
    """Return the most probable classes of each image; the data set is needed only if the file does not describe it."""
    info = subject.info
    if info is None:
        info = Info.of(subject.name, subject.dataset, subject.image_size, load_data(subject, args, device))
    size = args.image_size or info.image_size
    mean, std = _scales(info.mean, info.std)
    images, rows = [], []
    for file in args.predict:
        pixels = read_image(info.dataset, Path(file), size).float()
        image = pixels.sub_(255 * mean).div_(255 * std).to(device)
        found = subject.model.eval()(image[None]).double().softmax(1)[0].topk(min(TOP, len(info.class_names)))
        names = [info.class_names[number] for number in found.indices.tolist()]
        images.append({"file": file, "classes": [
            {"name": name, "probability": share} for name, share in zip(names, found.values.tolist(), strict=True)
        ]})  # fmt: skip
        rows += [[file if not place else "", each["name"], f"{100 * each['probability']:.2f}"]
                 for place, each in enumerate(images[-1]["classes"])]  # fmt: skip
    return Table(["image", "class", "probability, %"], rows).text() + "\n", images


def _scales(mean: list[float], std: list[float]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the channels [3, 1, 1], with white as 1."""
    return torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)


# ---------------------------------------------------------------- export


def export_checked(subject: Subject, args: argparse.Namespace) -> tuple[str, Any]:
    """Export the network, and write the file if its reloaded copy computes the same logits.

    Raises:
        UserError: the file exists already, or a package is missing.
        RunError: the logits differ.
    """
    form, batch, model = args.export, args.export_batch, subject.model.eval()
    output = Path(args.output) if args.output else subject.file.with_suffix(SUFFIXES[form])
    check_packages(form)
    check_free(output, args.overwrite)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"network{SUFFIXES[form]}"
        export(model, form, file, subject.image_size, batch)
        difference, largest = compare_logits(model, load_exported(form, file), subject.image_size, batch)
        if not difference <= TOLERANCE * max(1.0, largest):
            raise RunError(
                f"the logits of the exported network differ by up to {difference:.2g}, and the largest is"
                f" {largest:.2g}, so nothing is written: try another format"
            )
        write_atomically(output, file.read_bytes())
    told = {"file": str(output), "format": form, "batch": batch, "image_size": subject.image_size}
    told |= {"largest_difference": difference, "largest_logit": largest}
    if subject.info:
        told |= {"mean": list(subject.info.mean), "std": list(subject.info.std), "classes": subject.info.class_names}
    return _export_text(told), told


def _export_text(told: dict[str, Any]) -> str:
    shape = f"[{told['batch'] or 'any number'}, 3, {told['image_size']}, {told['image_size']}]"
    scale = f" minus mean {told['mean']}, divided by std {told['std']}, with white as 1" if "mean" in told else ""
    return (
        f"written: {told['file']} ({told['format']})\n"
        f"takes images {shape}, float32, RGB{scale}\n"
        f"loaded again, its logits differ by at most {told['largest_difference']:.2g} from the network's, the largest"
        f" of which is {told['largest_logit']:.2g}\n"
    )


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse the command line. Raises UserError for an unknown flag or name."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("path", metavar="PATH", help="a file of weights, or the folder of a run or teacher")
    group = parser.add_argument_group("what to do", "default: test it on the validation images")
    group.add_argument("--predict", nargs="+", metavar="FILE", help="print the most probable classes of images; with a"
                       " detector their boxes, and draw these")  # fmt: skip
    group.add_argument("--export", metavar="FORMAT", help=f"write the network as one of {', '.join(SUFFIXES)}")
    group.add_argument("--json", action="store_true", help="print the result as JSON, and everything else on stderr")
    group = parser.add_argument_group("data", "default: what the weights, or their run's config.json, say")
    group.add_argument("--dataset", metavar="NAME", help=f"one of {', '.join(dataset_names())}; for a"
                       " detector coco or shapes")  # fmt: skip
    group.add_argument("--data_dir", metavar="DIR", help="folder of the data, as in training")
    group.add_argument("--image_size", type=int, metavar="N", help="side of the square images, as in training; of a"
                       " detector the short side")  # fmt: skip
    group.add_argument("--num_workers", type=int, default=2, help="processes that decode images (default: 2)")
    group = parser.add_argument_group("network and device")
    group.add_argument("--model", metavar="NAME", help="the network, if the weights do not show which it is")
    group.add_argument("--pickle_sha256", metavar="HASH", help="of a .pkl file with a detector of detectron2")
    group.add_argument("--plugins", metavar="FILE,FILE", help="Python files that register networks or data sets")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    group.add_argument("--batch_size", type=int, metavar="N", help="images at a time; the scores do not depend on it")
    group = parser.add_argument_group("export, and a detector's pictures")
    group.add_argument("--output", metavar="FILE", help="the file to write (default: beside the weights or the image)")
    group.add_argument("--min_score", type=float, metavar="S", help="least score of the boxes to show, from 0 to 1"
                       f" (default: {MIN_SCORE:g})")  # fmt: skip
    group.add_argument("--export_batch", type=int, metavar="N", help="images in a batch (default: any number)")
    group.add_argument("--overwrite", action="store_true", help="replace the file to write, if it is there")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser: Parser, args: argparse.Namespace) -> None:
    """Raise UserError for incompatible flags, and for invalid names and numbers."""
    if args.predict and args.export:
        parser.error("--predict and --export are two things to do: give one of them")
    if not args.export and args.export_batch is not None:
        parser.error("--export_batch belongs to --export: add that, or leave it out")
    if not (args.export or args.predict) and (args.output or args.overwrite):
        parser.error("--output and --overwrite belong to --export, or to a detector's --predict: add that")
    if not args.predict and args.min_score is not None:
        parser.error("--min_score belongs to a detector's --predict: add that, or leave it out")
    if args.export and args.export not in SUFFIXES:
        raise unknown("format", args.export, SUFFIXES)
    known = [*networks(args.dataset), *DETECTORS]
    if args.model and not is_outside(args.model) and args.model not in known:
        raise unknown("model", args.model, known)
    bounds = {"export_batch": (1, 100_000), "batch_size": (1, 100_000), "image_size": (8, 8192), "min_score": (0, 1)}
    for name, (least, most) in bounds.items():
        if (value := getattr(args, name)) is not None and not least <= value <= most:
            raise UserError(f"--{name} must be from {least:,} to {most:,}, not {value}")


def check_network_args(args: argparse.Namespace) -> None:
    """Raise UserError for detectors' flags, given the weights of a classifier."""
    for_detectors = ["pickle_sha256", "min_score"] + ["output", "overwrite"] * bool(args.predict)
    if given := [f"--{name}" for name in for_detectors if getattr(args, name) not in (None, False)]:
        raise UserError(f"{args.path} holds no detector, for which {given[0]} is: leave that out")


def main() -> None:
    words = sys.argv[1:]
    with redirect_stdout(sys.stderr) if "--json" in words else nullcontext():  # notes must not be part of the JSON
        load_plugins(words)
        args = parse_args(words)
        text, values = run(args)
    print(json.dumps(values, indent=2) + "\n" if args.json else text, end="")


if __name__ == "__main__":
    run_main(main)
