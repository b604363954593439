"""Train runs of several configurations side by side in one process, to use a GPU that one of them leaves mostly idle.

python train_together.py RUNS

RUNS is a file with a command line for each run: train_student.py ... or train_teacher.py ...
"""

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
import shlex
from pathlib import Path
from typing import Any

import train_student
import train_teacher
from helper import distributed
from helper.device import device_of
from helper.errors import Parser, UserError, run_main
from helper.files import reason
from helper.flags import CommonOptions, StudentOptions, student_parser, teacher_parser
from helper.options import parse, resolve_pair
from helper.teacher import FoundTeacher, find_teacher, load_teacher
from helper.trials import train_runs

# The options of data, device and teacher, which the runs share.
SHARED = ("dataset", "data_dir", "image_size", "train_subset", "num_workers", "batch_size", "device", "gpu_id",
          "deterministic", "plain", "precision")  # fmt: skip
SHARED_BY_STUDENTS = ("path_t", "model_t", "teacher_weights", "teacher_table", "fill_teacher_table", "table_dir",
                      "table_dtype", "teacher_precision")  # fmt: skip


def read_runs(path: Path) -> list[CommonOptions]:
    """Return the options of the command lines in a file.

    Raises:
        UserError: the file cannot be read, a line calls no training script, or the runs cannot share what they must.
    """
    try:
        lines = [shlex.split(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({reason(error)}): give a file with a command line for each run"
        ) from error
    parsers = {"train_student.py": student_parser, "train_teacher.py": teacher_parser}
    runs = []
    for script, *argv in filter(None, lines):
        if script not in parsers:
            raise UserError(f"{path} has a line that begins with {script}: give {' or '.join(parsers)}")
        runs.append(parse(parsers[script](), argv))
    if not runs:
        raise UserError(f"{path} has no line: give a command line for each run")
    check_shared(runs, SHARED)
    check_shared([run for run in runs if isinstance(run, StudentOptions)], SHARED_BY_STUDENTS)
    return runs


def check_shared(runs: list[Any], keys: tuple[str, ...]) -> None:
    """Raise UserError if runs differ in an option that they must share, or if one has several --trials."""
    for run in runs:
        for key in keys:
            if getattr(run, key) != getattr(runs[0], key):
                raise UserError(f"the runs differ in --{key}, which runs that train together share: start them apart")
        if run.trials > 1:
            raise UserError("--trials is for one configuration: give a line for each seed instead")


def train_together(runs: list[CommonOptions]) -> list[Path]:
    """Train or resume all runs; return their folders."""
    students = [run for run in runs if isinstance(run, StudentOptions)]
    with device_of(runs[0]) as device:
        # 1. the teacher's weights, and the runs
        found = find_teacher(students[0], train_teacher.train) if students else None
        data_sha256 = train_teacher.hash_of_data(runs[0])
        opened = [open_run(run, found, data_sha256) for run in runs]
        folders = [run.folder for run, _ in opened]
        opened = train_teacher.unfinished(opened)
        if not opened:
            return folders
        # 2. data
        data = train_teacher.load_data(runs[0], device)
        # 3. teacher
        model = teacher = None
        if found:
            model = load_teacher(found, data.num_classes, device, runs[0].dataset, runs[0].plain)
            teacher = train_student.build_teacher(students[0], found, model, data)
        # 4. the loops

        def build(run: Any, options: CommonOptions, *more: Any) -> Any:
            if isinstance(options, StudentOptions):
                return train_student.build_trainer(run, options, *more, model, teacher, data)
            return train_teacher.build_trainer(run, options, *more, data)

        train_runs(opened, device, {"device": str(device), "num_classes": data.num_classes}, build)
        return folders


def open_run(options: CommonOptions, found: FoundTeacher | None, data_sha256: str | None) -> tuple[Any, CommonOptions]:
    """Return a run's folder, not written yet, and its options with those that depend on the teacher filled in."""
    if found is None or not isinstance(options, StudentOptions):
        return train_teacher.open_run(options, data_sha256), options
    options = resolve_pair(options, found.name)
    return train_student.open_run(options, found, data_sha256), options


def main() -> None:
    parser = Parser(description=" ".join(__doc__.split("\n\n")[0].split()), allow_abbrev=False)
    parser.add_argument("runs", type=Path, metavar="RUNS", help="a file with a command line for each run")
    if distributed.env_world_size() > 1:
        raise UserError("runs that train together do so in one process: start this without torchrun")
    train_together(read_runs(parser.parse_args().runs))


if __name__ == "__main__":
    run_main(main)
