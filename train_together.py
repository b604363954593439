"""Train runs of several configurations side by side in one process, to use a GPU that one of them leaves mostly idle.

python train_together.py RUNS

RUNS is a file with a command line for each run: train_student.py ... or train_teacher.py ...
"""

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import train_student
import train_teacher
from dataset import tell_unreadable
from distiller_zoo import distiller_dict
from helper import distributed
from helper.device import device_of
from helper.errors import run_main
from helper.files import reason
from helper.run_folder import RunFolder
from helper.teacher import FoundTeacher, find_teacher
from helper.trainer import Trainer
from helper.trials import train_runs
from inputs import UserError, options_of
from options.flags import CommonOptions, DataOptions, PairOptions, StudentOptions
from options.parse import SCRIPTS, resolve_pair
from options.parser import Parser

# Options that runs must have in common, since they determine data, device and teacher.
SHARED = (*options_of(DataOptions), "batch_size", "mixup", "cutmix", "device", "gpu_id", "deterministic", "plain",
          "precision", "dry_run")  # fmt: skip
SHARED_BY_STUDENTS = tuple(name for name in options_of(PairOptions) if name != "model_s")


def read_runs(path: Path) -> list[CommonOptions]:
    """Return the options of each command line in a file, skipping blank lines and comments.

    Raises:
        UserError: the file cannot be read, a line calls no training script, or the runs cannot train together.
    """
    try:
        lines = [shlex.split(line, comments=True) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({reason(error)}): give a file of command lines") from error
    runs: dict[int, CommonOptions] = {}
    for number, (script, *argv) in ((number, line) for number, line in enumerate(lines, 1) if line):
        if script not in SCRIPTS:
            raise UserError(f"line {number} of {path} begins with {script}: give {' or '.join(SCRIPTS)}")
        try:
            runs[number] = SCRIPTS[script](argv)
        except UserError as error:
            raise UserError(f"line {number} of {path}: {error}") from error
    if not runs:
        raise UserError(f"{path} has no command line: give one for each run")
    if any(run.trials > 1 or run.multiprocessing_distributed for run in runs.values()):
        raise UserError("--trials and --multiprocessing_distributed start runs themselves: give a line for each run")
    check_shared(path, runs, SHARED)
    students = {number: run for number, run in runs.items() if isinstance(run, StudentOptions)}
    check_shared(path, students, SHARED_BY_STUDENTS)
    return [*runs.values()]


def check_shared(path: Path, runs: Mapping[int, CommonOptions], keys: tuple[str, ...]) -> None:
    """Raise UserError if runs, by their lines in a file, differ in an option among `keys`."""
    for (line, run), (later, other) in pairwise(runs.items()):
        for key in keys:
            if getattr(run, key) != getattr(other, key):
                raise UserError(
                    f"lines {line} and {later} of {path} differ in --{key}, which runs that train together must have in"
                    " common"
                )


def train_together(runs: Sequence[CommonOptions]) -> list[Path]:
    """Train all runs, or resume them; return their folders."""
    students = [run for run in runs if isinstance(run, StudentOptions)]
    with device_of(runs[0]) as device:
        # 1. the teacher's weights, and the runs
        found = find_teacher(students[0], train_teacher.train) if students else None
        data_sha256 = train_teacher.hash_of_data(runs[0])
        opened = [open_run(run, found, data_sha256) for run in runs]
        folders = [run.folder for run, _ in opened]
        if len(set(folders)) < len(folders):
            raise UserError("two runs have the same folder: give each a --run_dir of its own")
        if unfinished := train_teacher.unfinished(opened):
            _train(unfinished, found, device)
        return folders


def open_run(
    options: CommonOptions, found: FoundTeacher | None, data_sha256: str | None
) -> tuple[RunFolder, CommonOptions]:
    """Return a run's folder and its options, with those that depend on the teacher filled in."""
    if found is None or not isinstance(options, StudentOptions):
        return train_teacher.open_run(options, data_sha256), options
    options = resolve_pair(options, found.name)
    run = train_student.open_run(options, found, data_sha256)
    train_student.print_settings(options)
    return run, options


def _train(runs: list[tuple[RunFolder, CommonOptions]], found: FoundTeacher | None, device: torch.device) -> None:
    students = [options for _, options in runs if isinstance(options, StudentOptions)]
    # 2. data, and 3. the teacher
    if found and students:
        needs = {distiller_dict[student.distill].needs for student in students}
        content = next(content for content in ("maps", "pooled", "logits") if content in needs)  # enough for all
        data, model, teacher, found_out = train_student.load(students[0], found, device, content)
    else:
        data = train_teacher.load_data(runs[0][1], device)
        found_out = {"num_classes": data.num_classes}

    # 4. the loops
    def build(run: RunFolder, options: CommonOptions, *more: Any) -> Trainer:
        if isinstance(options, StudentOptions):
            return train_student.build_trainer(run, options, *more, model, teacher, data)
        return train_teacher.build_trainer(run, options, *more, data)

    train_runs(runs, device, found_out, build)
    tell_unreadable(data)


def main() -> None:
    parser = Parser(description=" ".join(__doc__.split("\n\n")[0].split()), allow_abbrev=False)
    parser.add_argument("runs", type=Path, metavar="RUNS", help="a file with a command line for each run")
    if distributed.env_world_size() > 1:
        raise UserError("runs that train together do so in one process: start this without torchrun")
    train_together(read_runs(parser.parse_args().runs))


if __name__ == "__main__":
    run_main(main)
