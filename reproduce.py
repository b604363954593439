"""Make the published tables: every run behind them, one after the other or several at a time. What is finished is
skipped, and what was stopped goes on; so the same command may be given again and again.

    python reproduce.py --list                       # the tables, their runs, what there is of them
    python reproduce.py ctkd --jobs 4                # one table
    python reproduce.py short -- --teacher_table     # what stands behind -- goes to every run
"""

import argparse
import fcntl
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from helper.comparison import mean_and_spread
from helper.errors import Parser, RunError, UserError, run_main
from helper.options import parse, resolve_pair, student_parser, teacher_parser
from helper.runs import ADDED_OPTIONS, decisive, differing, number
from helper.tables import Table
from published.rows import SHORT, TABLES, Row, left_out, rows

HEADING = ["table", "pair", "method", "state", "n", "last", "published"]
OUTPUT = Path("save/reproduce")  # what each run prints, where several are at work
OURS = {  # flags that the list says
    "dataset", "seed", "trials", "run_dir", "experiments_dir", "experiments_name", "model", "model_s", "model_t",
    "path_t", "epochs", "distill", "temperature", "dry_run", "overwrite",
}  # fmt: skip
MADE = {"done", "given"}  # states in which nothing is left to do
PATIENCE = 5.0  # seconds between two looks at runs that are under way elsewhere
FAILURES = 3  # one after the other that end it all


class Job(NamedTuple):
    """A command that trains a row with one seed, or with several side by side."""

    row: Row
    seed: int
    trials: int = 1

    @property
    def name(self) -> str:
        """For people, and for the file with what it prints."""
        folder = self.row.folder(self.seed)
        name = f"{folder.parent.name}_{folder.name}" if self.row.teacher else folder.name
        return name + f"-{self.seed + self.trials - 1}" * (self.trials > 1)


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """The command line: our own flags, and those of the training scripts."""
    names = [*TABLES, SHORT]
    usage = "%(prog)s [flags] [table ...] [-- flags of train_student.py]"
    parser = Parser(usage=usage, description=__doc__.split(":")[0] + ".", allow_abbrev=False)
    add = parser.add_argument
    add("tables", nargs="*", metavar="table", help=f"one or more of: {', '.join(names)} (default: all but {SHORT})")
    add("--list", action="store_true", help="show the runs, how far they are, and what is published; then stop")
    add("--dry_run", action="store_true", help="show the commands that are left to do, and stop")
    add("--pairs", nargs="+", metavar="TEACHER:STUDENT", help="only these pairs, and their networks alone")
    add("--seeds", type=int, default=1, metavar="N", help="seeds 1 to N of all runs but the teachers")
    add("--jobs", type=int, metavar="N", help="runs at a time (default: one a GPU, or one)")
    add("--trials", action="store_true", help="all --seeds of a student in one process, for GPUs")
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    args, more = parser.parse_args(words[:at]), words[at + 1 :]
    if unknown := [name for name in args.tables if name not in names]:
        parser.error(f"there is no table '{unknown[0]}'; the known ones are: {', '.join(names)}")
    for flag in ("seeds", "jobs"):
        if (value := getattr(args, flag)) is not None and value < 1:
            parser.error(f"--{flag} must be 1 or more, not {value}")
    if args.trials and args.seeds == 1:
        parser.error("--trials trains several --seeds side by side: give --seeds 3, say")
    args.tables = args.tables or list(TABLES)
    known = {f"{row.teacher}:{row.model}" for name in args.tables for row in rows(name) if row.teacher}
    if unknown := [pair for pair in args.pairs or () if pair not in known]:
        parser.error(f"these tables have no pair {unknown[0]}; they have: {', '.join(sorted(known))}")
    parse(student_parser(), more)  # so that what is wrong with it is said now
    for flag in (word[2:].partition("=")[0].replace("-", "_") for word in more if word.startswith("--")):
        if flag in OURS:
            parser.error(f"--{flag} is the list's to say: leave it out, or call the training script itself")
    return args, more


def chosen(table: str, pairs: Sequence[str] | None) -> list[Row]:
    """The rows of a table; with pairs like `resnet56:resnet20` only theirs, and those of their networks alone."""
    if not pairs:
        return rows(table)
    networks = {name for pair in pairs for name in pair.split(":")}
    here = [row for row in rows(table) if row.teacher is None or f"{row.teacher}:{row.model}" in pairs]
    return [row for row in here if row.teacher or row.model in networks]


def seeds_of(row: Row, among: Sequence[Row], seeds: int) -> range:
    """Which seeds of a row are wanted: of a network that only teaches, the first."""
    taught = row.teacher is not None or any(row.model == other.model for other in among if other.teacher)
    return range(1, seeds + 1 if taught else 2)


def state(folder: Path, model: str) -> tuple[str, float | None]:
    """How far a run is, and top-1 in percent of one that is done.

    It is `missing`, `running`, `done`, after `17 epochs`, or `given`: a checkpoint from elsewhere.
    """
    if not (folder / "config.json").exists() and any(folder.glob("ckpt_epoch_*.pth")):
        return "given", None
    try:
        with (folder / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "running", None
    except OSError:
        pass
    try:
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        if records and (folder / f"{model}_last.pth").exists():  # what a run writes last
            return "done", number(records[-1]["top1"])
    except (OSError, ValueError, KeyError):
        return "missing", None
    return f"{len(records)} epochs", None


def otherwise(job: Job, more: list[str]) -> str:
    """What the run that is there was told otherwise than it would be now; empty if nothing, or if there is none."""
    try:
        there = json.loads((job.row.folder(job.seed) / "config.json").read_text())["options"]
    except (OSError, ValueError, KeyError):
        return ""
    here = options_of(job, more)
    return differing(ADDED_OPTIONS | there, decisive(here, here.get("distill"), here.get("temperature")))


def options_of(job: Job, more: list[str]) -> dict[str, Any]:
    """The options of a job, resolved as its script does it."""
    if job.row.teacher is None:
        return parse(teacher_parser(), command(job, more)[2:])
    return resolve_pair(parse(student_parser(), command(job, more)[2:]), job.row.teacher)


def listed(args: argparse.Namespace, more: list[str]) -> Iterator[str]:
    """The lines of --list."""
    cells, notes = [], []
    for name in args.tables:
        here = chosen(name, args.pairs)
        for row in here:
            words, last = [], []
            for seed in seeds_of(row, here, args.seeds):
                word, top1 = state(row.folder(seed), row.model)
                other = otherwise(Job(row, seed), more)
                notes += [f"{row.folder(seed)} is another run: {other}"] if other else []
                words.append("other options" if other else word)
                last += [top1] if word == "done" and top1 is not None and not other else []
            counts = Counter(words).items()
            told = ", ".join(f"{count} {word}" if len(words) > 1 else word for word, count in counts)
            top1 = "–" if row.top1 is None else f"{row.top1:.2f}"
            cells.append([name, row.pair, row.method, told, str(len(last)), mean_and_spread(last), top1])
        notes += [f"{name}: {', '.join(methods)} are not here" for methods in [left_out(name)] if methods]
    yield Table(HEADING, cells).text()
    yield ""
    yield from notes
    if SHORT in args.tables:
        yield f"{SHORT}: published numbers are those of 240 epochs"


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """What is left to do, or under way elsewhere; teachers first."""
    jobs: dict[Path, Job] = {}
    for name in args.tables:
        here = chosen(name, args.pairs)
        for row in here:
            wanted = seeds_of(row, here, args.seeds)
            left = [seed for seed in wanted if state(row.folder(seed), row.model)[0] not in MADE]
            if left and args.trials and row.teacher:
                jobs[row.folder(1)] = Job(row, 1, args.seeds)
            else:
                jobs |= {row.folder(seed): Job(row, seed) for seed in left}
    return sorted(jobs.values(), key=lambda job: job.row.teacher is not None)


def command(job: Job, more: list[str]) -> list[str]:
    """The command line of a job, with further flags as far as its script knows them."""
    if job.row.teacher is None:
        _, foreign = teacher_parser().parse_known_args(more)
        more = [word for word in more if not (foreign and word == foreign[0] and foreign.pop(0))]
    return [sys.executable, *job.row.command(job.seed, job.trials), *more]


class Runner:
    """Does jobs, so many at a time, and waits for what others are doing. A job begins when its teacher is done."""

    def __init__(self, jobs: Sequence[Job], at_a_time: int, more: list[str]) -> None:
        self.left, self.at_a_time, self.more = list(jobs), at_a_time, more
        self.count, self.ended, self.in_a_row = len(jobs), 0, 0
        self.failed: list[str] = []
        self.running: set[subprocess.Popen] = set()
        self.stopped = False
        self.lock = threading.Lock()  # of all of these

    def __call__(self) -> list[str]:
        """Do them all; returns the names of those that failed or could not begin.

        Raises:
            KeyboardInterrupt: the process was asked to end; what was under way has been stopped, and saved.
        """
        threads = [threading.Thread(target=self._work, args=[place]) for place in range(self.at_a_time)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            with self.lock:
                self.stopped = True
                for process in self.running:
                    process.terminate()
            for thread in threads:
                thread.join()
            raise
        return self.failed

    def _work(self, place: int) -> None:
        while not self.stopped and self.left:
            with self.lock:
                job = self._next()
            if job is None:
                time.sleep(PATIENCE)
                continue
            start = time.monotonic()
            try:
                status = self._do(job, place)
                word = f"failed with status {status}" if status else "done"
            except OSError as error:
                status, word = 1, f"could not begin ({error})"
            with self.lock:
                self._ended(job, f"{word} after {(time.monotonic() - start) / 60:.0f} min", bool(status))

    def _next(self) -> Job | None:
        """The first job that can begin now, and is not under way or done elsewhere."""
        for job in list(self.left):
            words = [state(job.row.folder(job.seed + i), job.row.model)[0] for i in range(job.trials)]
            teacher = job.row.teacher_folder
            if MADE.issuperset(words):
                self.left.remove(job)
                self._ended(job, "done elsewhere", False)
            elif "running" in words:
                continue
            elif teacher is None or state(teacher, job.row.teacher)[0] in MADE:
                self.left.remove(job)
                return job
            elif teacher.name in self.failed:
                self.left.remove(job)
                self._ended(job, "not begun, since its teacher failed", True)
        return None

    def _ended(self, job: Job, word: str, failed: bool) -> None:
        self.ended += 1
        self.in_a_row = self.in_a_row + 1 if failed else 0
        if failed:
            self.failed.append(job.name)
        if not self.stopped:
            print(f"[{self.ended}/{self.count}] {job.name}: {word}", flush=True)
        if self.in_a_row == FAILURES:
            self.stopped = True

    def _do(self, job: Job, place: int) -> int:
        """Train, and return the exit status."""
        with ExitStack() as stack:
            environment, output = os.environ.copy(), None
            if self.at_a_time > 1:
                environment |= self._part(place)
                OUTPUT.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context((OUTPUT / f"{job.name}.txt").open("a"))
                print(f"{job.name}: started, see {output.name}", flush=True)
            with self.lock:
                if self.stopped:
                    return 1
                process = subprocess.Popen(command(job, self.more), env=environment, stdout=output, stderr=output)
                self.running.add(process)
            status = process.wait()
            with self.lock:
                self.running.remove(process)
            return status

    def _part(self, place: int) -> dict[str, str]:
        """The part of the machine that is one run's of several: a GPU, and a share of the cores."""
        gpus = [str(gpu) for gpu in range(torch.cuda.device_count())]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(gpus)).split(",")
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.at_a_time)))
        return {"OMP_NUM_THREADS": threads} | ({"CUDA_VISIBLE_DEVICES": visible[place % len(gpus)]} if gpus else {})


def main() -> None:
    """List the runs, or make those that are left."""
    args, more = parse_args()
    if args.list:
        print(*listed(args, more), sep="\n")
        return
    jobs = jobs_of(args)
    if args.dry_run:
        for job in jobs:
            print(shlex.join(["python", *command(job, more)[1:]]))
        return
    for job in jobs:
        if other := otherwise(job, more):
            raise UserError(f"{job.row.folder(job.seed)} is another run ({other}): move it, or give the same flags")
    at_a_time = args.jobs or max(1, torch.cuda.device_count())
    print(f"{len(jobs)} runs left to make, {at_a_time} at a time", flush=True)
    runner = Runner(jobs, at_a_time, more)
    if failed := runner():
        many = f", and nothing else was begun after {FAILURES} in a row" if runner.left else ""
        raise RunError(
            f"{len(failed)} runs failed ({', '.join(failed)}){many}: see above or in {OUTPUT}; the same command tries"
            " them again"
        )


if __name__ == "__main__":
    run_main(main)
