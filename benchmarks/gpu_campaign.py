"""Train rows of the published tables in slices of a few minutes; each slice resumes the runs of earlier ones.

    python benchmarks/gpu_campaign.py --dry_run
    python benchmarks/gpu_campaign.py --earlier slices -- --precision tf32 --skip_validation
    python benchmarks/gpu_campaign.py dtkd --pairs resnet56:resnet8 --seeds 1

Tables are trained in order, CTKD's first. In a table, each pair's teacher is trained before the pair's rows and seeds;
students without a teacher come last. Runs that can share a process train side by side in train_together.py. A slice
packs its runs into an archive in --out (default: $OUT, else results/gpu), which a later slice unpacks with --earlier.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
from benchmarks.limits import check_numbers
from helper.errors import RunError, run_main
from inputs import UserError, in_words
from options.parse import parse_student
from options.parser import Parser
from report.rows import TABLES
from reproduce import MADE, Job, chosen, command, options_of, seeds_of, state
from train_together import SHARED, SHARED_BY_STUDENTS

ON_CIFAR100 = [name for name, (dataset, *_) in TABLES.items() if dataset == "CIFAR-100"]
RESERVE = 40.0  # seconds at the end of a slice, reserved for saving and packing
ENDING = 25.0  # seconds after which a training that was asked to end is killed
LEAST = 30.0  # no training starts if fewer seconds are left


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Return the jobs of all tables, one for each run, in the order of training."""
    wanted = []
    for table in args.tables:
        here = chosen(table, args.pairs)
        alone = {row.model: row for row in here if row.teacher is None}
        taught = [row for row in here if row.teacher]
        for pair in dict.fromkeys(row.pair for row in taught):
            of_pair = [row for row in taught if row.pair == pair]
            wanted += [Job(alone[row.teacher], 1) for row in of_pair[:1] if row.teacher in alone]
            wanted += [Job(row, seed) for row in of_pair for seed in seeds_of(row, here, args.seeds)]
        wanted += [Job(row, seed) for row in alone.values() for seed in seeds_of(row, here, args.seeds)]
    jobs: dict[Path, Job] = {}
    for job in wanted:  # some runs are in several tables
        jobs.setdefault(job.row.folder(job.seed), job)
    return list(jobs.values())


def state_of(job: Job) -> str:
    """Return the state of a job's run, or `waiting` if it is not finished and lacks its teacher."""
    own, teacher = job.states()[0], job.row.teacher_folder
    waits = own not in MADE and teacher is not None and state(teacher, job.row.teacher)[0] not in MADE
    return "waiting" if waits else own


def next_group(jobs: Sequence[Job], more: list[str], at_once: int) -> list[Job]:
    """Return the first job that can be trained now, and the following ones that can share its process."""
    group: list[Job] = []
    for job in jobs:
        if len(group) == at_once:
            break
        if state_of(job) not in MADE | {"waiting", "running"} and (
            not group or shared(job, more) == shared(group[0], more)
        ):
            group.append(job)
    return group


def shared(job: Job, more: list[str]) -> list[Any]:
    """Return the values of the options that jobs in one process must share."""
    options = options_of(job, more)
    return [getattr(options, name, None) for name in (*SHARED, *SHARED_BY_STUDENTS)]


def train(group: Sequence[Job], more: list[str], seconds: float) -> int | None:
    """Train a group for at most `seconds`; return the exit status, or None if the time ran out."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as runs:
        runs.writelines(shlex.join(command(job, more)[1:]) + "\n" for job in group)
        runs.flush()
        process = subprocess.Popen([sys.executable, "train_together.py", runs.name])
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also if this process is asked to end
            process.terminate()
            try:
                process.wait(ENDING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def unpack(earlier: Sequence[Path]) -> None:
    """Unpack the runs of earlier slices into save/, from archives, or folders with archives or with a save/.

    Raises:
        UserError: a folder has neither archives nor a save/, or an archive is missing or cannot be unpacked.
    """
    for path in earlier:
        if (path / "save").is_dir():
            shutil.copytree(path / "save", "save", dirs_exist_ok=True)
            continue
        archives = sorted(path.glob("*.tar")) if path.is_dir() else [path]  # sorted by the time in their names
        if not archives:
            raise UserError(f"{path} holds neither archives of slices nor a folder save: give another --earlier")
        for archive in archives:
            try:
                with tarfile.open(archive) as packed:
                    packed.extractall(filter="data")
            except (OSError, tarfile.TarError) as error:
                raise UserError(f"{archive} cannot be unpacked ({error}): give another --earlier") from error


def pack(jobs: Sequence[Job], out: Path) -> Path:
    """Write an archive of the jobs' folders into `out` and return its path.

    Files that no later slice needs are left out: `last.pth` and the best weights of finished runs, and teacher tables.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"campaign_{time.strftime('%Y-%m-%d_%H-%M-%S', time.gmtime())}.tar"
    with tarfile.open(path, "w") as archive:
        for job in jobs:
            folder, is_done = job.row.folder(job.seed), job.states()[0] in MADE
            for file in sorted(folder.glob("[!.]*")):
                if file.is_file() and not (is_done and (file.name == "last.pth" or file.name.endswith("_best.pth"))):
                    archive.add(file)
    return path


def listed(jobs: Sequence[Job], more: list[str], at_once: int) -> Iterator[str]:
    """Yield a line per job, with its state and `next` if the next slice begins with it, and a line with the counts."""
    first, done = next_group(jobs, more, at_once), 0
    for job in jobs:
        own = state_of(job)
        done += own in MADE
        yield f"{own:12}{'next' if job in first else '':6}{job.row.folder(job.seed)}"
    yield f"{done} of {len(jobs)} runs are finished, {len(first)} are next, side by side"


def run_slice(args: argparse.Namespace, more: list[str]) -> None:
    """Train groups of jobs until the slice is over, then pack them.

    Raises:
        RunError: a training failed; all runs of the slice are packed nevertheless.
    """
    end = time.monotonic() + 60 * args.minutes - RESERVE
    jobs, begun, failed = jobs_of(args), [], []
    try:
        while (left := end - time.monotonic()) > LEAST:
            if not (group := next_group([job for job in jobs if job not in failed], more, args.at_once)):
                break
            print(f"training {', '.join(job.name for job in group)}", flush=True)
            begun += [job for job in group if job not in begun]
            if train(group, more, left):
                failed += [job for job in group if job.states()[0] not in MADE]
    finally:
        if begun:
            path = pack(begun, args.out)
            print(f"packed {len(begun)} runs: {path}, {in_words(path.stat().st_size)}", flush=True)
        print(*listed(jobs, more, args.at_once), sep="\n", flush=True)
    if failed:
        raise RunError(f"{len(failed)} runs failed, or shared a process with one that did: the next slice tries again")


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """Return the flags of this script, and the arguments for the training scripts."""
    usage = "%(prog)s [flags] [table ...] [-- flags of train_student.py]"
    parser = Parser(usage=usage, description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("tables", nargs="*", metavar="table", help=f"of: {', '.join(TABLES)} (default: those on CIFAR-100)")
    add("--pairs", nargs="+", metavar="TEACHER:STUDENT", help="only these pairs, and their networks trained alone")
    add("--seeds", type=int, default=3, metavar="N", help="seeds 1 to N of all runs except the teachers (default: 3)")
    add("--at_once", type=int, default=6, metavar="N", help="runs side by side in a process (default: 6)")
    add("--minutes", type=float, default=9.0, help="of the slice, with saving and packing (default: 9)")
    add("--earlier", type=Path, nargs="+", default=[], metavar="PATH", help="archives of earlier slices, or folders of"
        " them; unpacked into save/, also with --dry_run")  # fmt: skip
    add("--out", type=Path, default=Path(os.environ.get("OUT") or "results/gpu"), help="folder of the archive")
    add("--dry_run", action="store_true", help="list the runs: what is finished, and what would be trained first")
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    args, more = parser.parse_intermixed_args(words[:at]), words[at + 1 :]
    check_numbers(vars(args))
    if missing := [name for name in args.tables if name not in TABLES]:
        raise UserError(f"there is no table '{missing[0]}'; the known ones are: {', '.join(TABLES)}")
    args.tables = args.tables or ON_CIFAR100
    parse_student(more)  # reports its errors now
    return args, more


def main() -> None:
    """Resume, train and pack a slice, or list the runs."""
    args, more = parse_args()
    unpack(args.earlier)
    if args.dry_run:
        print(*listed(jobs_of(args), more, args.at_once), sep="\n")
    else:
        run_slice(args, more)


if __name__ == "__main__":
    run_main(main)
