"""Find or train the teacher, and load it."""

import stat
import time
from collections import Counter
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dataset.base import Dataset
from helper import checkpoint, distributed
from helper.device import place
from helper.errors import InUse
from helper.files import PATIENCE, TRIES, is_locked, reason
from inputs import UserError, this_python
from models import Model
from models.download import fetch_hub
from models.outside import file_name, is_outside, pretrained_weights
from models.renormalised import Renormalised
from options.flags import StudentOptions, TeacherOptions
from options.parse import parse_teacher, resolve_pair

SHARED_OPTIONS = (  # passed from a student's run to the training of its teacher
    "dataset", "data_dir", "image_size", "train_subset", "num_workers", "batch_size", "seed", "device", "gpu_id",
    "print_freq", "dist_timeout",
)  # fmt: skip


SAVED = Path("save/models")  # folder of the teachers' folders
ANOTHER = "give another --path-t"
UNNAMED = "unknown"  # name of a missing teacher in a dry run, if nothing tells which network it is
Train = Callable[[TeacherOptions], list[Path]]  # train_teacher.train


class FoundTeacher(NamedTuple):
    """A teacher's weights and where they came from."""

    path: Path
    name: str  # in the model zoo
    sha256: str | None  # of the file; None in a dry run without one
    weights: dict[str, Tensor]
    scale: tuple[list[float], list[float]] | None = None  # mean and std of its training images, if its file has them


def folder_name(model: str, dataset: str) -> str:
    """Return the name of a teacher's folder: as published for CIFAR-100, else with the data set's name."""
    return f"{file_name(model)}_vanilla" + f"_{dataset}" * (dataset != "cifar100")


def find_teacher(options: StudentOptions, train: Train | None = None) -> FoundTeacher:
    """Return the teacher that --path-t or --model_t names; with --train_teacher, train it first if it is missing.

    Args:
        options: options of the student's run.
        train: trains the networks of the given options, and returns their folders.

    Raises:
        UserError: there is no teacher, its file is damaged, or it is not the network of --model_t.
    """
    name = options.model_t
    if options.teacher_weights:
        if options.dry_run:
            return FoundTeacher(Path(f"{options.teacher_weights}'s weights"), name, None, {})
        return _read(_downloaded(name, options.teacher_weights), name, options.dataset)
    if not options.path_t and name is None:
        raise UserError("a student needs a teacher: give --path-t FILE, or --model_t NAME for save/models/NAME_vanilla")
    path = Path(options.path_t or SAVED / folder_name(name, options.dataset))
    file = _newest(path, ANOTHER)
    if file is None and options.path_t is None and is_outside(name):
        file = SAVED / f"{file_name(name)}_pretrained" / f"{file_name(name)}.pth"
        if options.dry_run and not file.exists():
            return FoundTeacher(file, name, None, {})
        _keep_pretrained(name, file)
    if file is None:
        folder = path.parent if path.suffix in (".pth", ".safetensors") else path
        name = name or checkpoint.model_of_folder(folder)
        if options.dry_run:
            lacks, would = ("not finished", "finished") if _is_unfinished(folder) else ("missing", "trained")
            first = f" and would be {would} first" if options.train_teacher and name else ""
            print(f"the teacher {path} is {lacks}{first}")
            return FoundTeacher(path, name or UNNAMED, None, {})
        file = _newest(_train_missing(path, folder, name, options, train), ANOTHER)
    return _read(file, options.model_t, options.dataset)


@distributed.by_rank0
def _read(file: Path, expected: str | None, dataset: str) -> FoundTeacher:
    weights, info = checkpoint.load_file(file)
    name = checkpoint.identify(file, weights, expected, dataset, info.network if info else None)
    scale = (list(info.mean), list(info.std)) if info else None
    return FoundTeacher(file, name, checkpoint.file_hash(file), weights, scale)


@distributed.by_rank0
def _keep_pretrained(name: str, file: Path) -> None:
    """Save the pretrained weights of the network `timm:NAME` or `hf:NAME` to a file, whose hash identifies them."""
    if file.exists():
        return
    weights = pretrained_weights(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save({"model": weights}, file)
    print(f"the weights of {name} are in {file}")


def _downloaded(name: str, source: str) -> Path:
    """Return the file with public weights of a network, downloading it if necessary."""
    from models import imagenet  # imports torchvision, which takes seconds

    fetch = imagenet.fetch_weights if source == "torchvision" else fetch_hub
    return fetched(fetch, name, source, "--path-t FILE instead of --teacher_weights")


@distributed.by_rank0
def fetched(fetch: Callable[[str], Path], name: str, source: str, instead: str) -> Path:
    """Return the file of public weights that `fetch` downloads for a network.

    Args:
        fetch: downloads a file, given the network's name.
        name: name of the network.
        source: the source of the weights, for the error message.
        instead: the flag that takes a file instead, for the error message.

    Raises:
        UserError: there are no such weights, or they could not be downloaded.
    """
    try:
        return fetch(name)
    except (OSError, RuntimeError, HTTPException) as error:
        raise UserError(
            f"{source}'s weights for {name} could not be downloaded ({error}): get the file elsewhere and give it as"
            f" {instead}"
        ) from error


def load_teacher(found: FoundTeacher, data: Dataset, options: StudentOptions) -> Model:
    """Return the teacher's network on the device of the data, in evaluation mode and frozen.

    Unless --plain is given, its batch norms are folded and its memory format is channels-last. If its training images
    were normalised differently, its input is renormalised.

    Raises:
        UserError: it was trained for another number of classes.
    """
    plain = options.plain
    model = checkpoint.network(found.path, found.weights, found.name, data.num_classes, options.dataset).eval()
    model = model if plain else fold_batch_norm(model)
    given, own = (list(data.mean), list(data.std)), scale_of(found, data, options)
    if own != given:
        print(f"the teacher's images are normalised by mean {own[0]} and standard deviation {own[1]}")
        model = Renormalised(model, given, own).eval()
    return place(model, data.val.target.device, plain).requires_grad_(False)


def scale_of(found: FoundTeacher, data: Dataset, options: StudentOptions) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of the teacher's images, from the flags, its file or else the data set."""
    mean, std = found.scale or (list(data.mean), list(data.std))
    return options.teacher_mean or mean, options.teacher_std or std


class Folded(nn.Identity):
    """A batch norm that was folded into the convolution before it; keeps its weight and bias, which OFD needs."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias


def fold_batch_norm(model: Model) -> Model:
    """Fold each batch norm into the convolution before it, and return the network; it must be in evaluation mode.

    Features and logits do not change, up to rounding. A network that cannot be traced is left unchanged.
    """
    also = ("preact",) if model.defines_trace() else ()  # the maps before the ReLU must not change either
    try:
        graph = torch.fx.Tracer().trace(model, concrete_args={"is_feat": True, "also": also})
    except Exception:  # the tracer can raise nearly anything if control flow depends on the input
        return model
    calls, named = [node for node in graph.nodes if node.op == "call_module"], dict(model.named_modules())
    # modules whose parameters the graph reads directly
    read = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    once = {target for target, count in Counter(node.target for node in calls).items() if count == 1} - read
    for norm in calls:
        conv = norm.args[0]
        if not (isinstance(conv, torch.fx.Node) and {conv.target, norm.target} <= once and len(conv.users) == 1):
            continue
        modules = named[conv.target], named[norm.target]
        if isinstance(modules[0], nn.Conv2d) and isinstance(modules[1], nn.BatchNorm2d):
            model.set_submodule(conv.target, fuse_conv_bn_eval(*modules))
            model.set_submodule(norm.target, Folded(modules[1]))
    return model


def find_weights(path: Path) -> Path:
    """Return the file of weights at a path, which may be a run's folder. Raises UserError if there is none."""
    if file := newest_weights(path):
        return file
    if not path.is_dir():
        raise UserError(f"there is no file or folder {path}: give another")
    if _is_unfinished(path):
        raise UserError(f"{path} holds a run that is not finished: finish it, or give a file, such as its *_best.pth")
    raise UserError(f"{path} holds no weights: give the folder of one run, or a file")


def newest_weights(path: Path, advice: str = "give another path") -> Path | None:
    """Return the path of a file, or the `ckpt_epoch_<n>.pth` with the highest n in a folder without an unfinished run.

    In a folder without such files, such as a student's, return `<name>_last.pth`, or None if it is missing too.

    Raises:
        UserError: the path cannot be read; `advice` ends the message.
    """
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            return path
        if _is_unfinished(path):
            return None
        return max(path.glob("ckpt_epoch_*.pth"), key=_epoch, default=min(path.glob("*_last.pth"), default=None))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a path that is too long, holds a NUL, or leads through a closed folder
        raise UserError(f"{str(path)!r} cannot be read ({reason(error)}): {advice}") from error


_newest = distributed.by_rank0(newest_weights)


def _is_unfinished(folder: Path) -> bool:
    """Return whether a folder holds a run that has not written its last weights."""
    return (folder / "config.json").exists() and not any(folder.glob("*_last.pth"))


def _epoch(path: Path) -> int:
    number = path.stem.removeprefix("ckpt_epoch_")
    return int(number) if number.isdecimal() else 0


def _train_missing(path: Path, folder: Path, name: str | None, options: StudentOptions, train: Train | None) -> Path:
    """Train or resume a teacher in its folder, for the epochs in its file's name, or else as many as the student."""
    if distributed.on_rank0(lambda: _is_unfinished(folder)) and not (options.train_teacher and name):
        raise UserError(
            f"the teacher in {folder} is not finished: repeat the command that began it, or wait if it is running"
            + (", or add --train_teacher to this command" if name else "")
        )
    recipe = f"{this_python()} train_teacher.py --model {name or 'NAME'} --dataset {options.dataset} --run_dir {folder}"
    if name is None:
        raise UserError(f"there is no teacher {path}: give another --path-t, or train one with `{recipe}`")
    if not options.train_teacher:
        raise UserError(f"there is no teacher {path}: train it with `{recipe}`, or add --train_teacher to this command")
    resolve_pair(options, name)  # report errors before hours of training, not after
    argv = ["--model", name, "--run_dir", str(folder), "--epochs", str(_epoch(path) or options.epochs)]
    argv += [f"--{key}" for key in ("deterministic", "plain", "sync_bn") if getattr(options, key)]
    for key in SHARED_OPTIONS:
        if (value := getattr(options, key)) is not None:
            argv += [f"--{key}", str(value)]
    return _train_or_wait(parse_teacher(argv), train)


def _train_or_wait(options: TeacherOptions, train: Train) -> Path:
    """Train a teacher; if another process is training it, wait for that process and then resume."""
    tries = 0
    while True:
        try:
            (folder,) = train(options)
            return folder
        except InUse:
            tries += 1
            if tries == TRIES:
                raise
        if tries == 1:
            print(f"the teacher in {options.run_dir} is being trained elsewhere, waiting for it", flush=True)
        time.sleep(PATIENCE)
        while distributed.on_rank0(lambda: is_locked(Path(options.run_dir) / ".lock")):
            time.sleep(PATIENCE)
