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
import queue
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from helper.comparison import mean_and_spread
from helper.errors import Parser, RunError, run_main
from helper.options import teacher_parser
from helper.runs import number
from helper.tables import Table
from published.rows import SHORT, TABLES, Row, left_out, rows

HEADING = ["table", "pair", "method", "state", "n", "last", "published"]
OUTPUT = Path("save/reproduce")  # what each run prints, where several are at work


class Job(NamedTuple):
    """A command that trains a row with one seed, or with several side by side."""

    row: Row
    seed: int
    trials: int = 1

    @property
    def name(self) -> str:
        """For people, and for the file with what it prints."""
        name = f"{self.row.pair.replace(' → ', '_')}_{self.row.method}_seed-{self.seed}"
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
    add("--seeds", type=int, default=1, metavar="N", help="seeds 1 to N of all runs but the teachers")
    add("--jobs", type=int, metavar="N", help="runs at a time (default: one a GPU, or one)")
    add("--trials", action="store_true", help="all seeds of a student in one process, for GPUs")
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:at])
    if unknown := [name for name in args.tables if name not in names]:
        parser.error(f"there is no table '{unknown[0]}'; the known ones are: {', '.join(names)}")
    for flag in ("seeds", "jobs"):
        if (value := getattr(args, flag)) is not None and value < 1:
            parser.error(f"--{flag} must be 1 or more, not {value}")
    args.tables = args.tables or list(TABLES)
    return args, words[at + 1 :]


def seeds_of(row: Row, among: Sequence[Row], seeds: int) -> range:
    """Which seeds of a row are wanted: of a network that only teaches, the first."""
    taught = row.teacher is not None or any(row.model == other.model for other in among if other.teacher)
    return range(1, seeds + 1 if taught else 2)


def state(row: Row, seed: int) -> tuple[str, float | None]:
    """How far a run is (`missing`, `running`, `done` or `17 of 240`), and top-1 in percent of one that is done."""
    folder = row.folder(seed)
    try:
        lines = (folder / "log.jsonl").read_text().splitlines()
        with (folder / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "running", None
    except OSError:
        return "missing", None
    if (folder / f"{row.model}_last.pth").exists():  # what a run writes last
        return "done", number(json.loads(lines[-1])["top1"])
    return f"{len(lines)} of {row.options['epochs']}", None


def listed(tables: Sequence[str], seeds: int) -> Iterator[str]:
    """The lines of --list."""
    cells, missing = [], []
    for name in tables:
        here = rows(name)
        for row in here:
            states = [state(row, seed) for seed in seeds_of(row, here, seeds)]
            counts = Counter(word for word, _ in states)
            words = ", ".join(f"{count} {word}" if len(states) > 1 else word for word, count in counts.items())
            last = [top1 for _, top1 in states if top1 is not None]
            top1 = "–" if row.top1 is None else f"{row.top1:.2f}"
            cells.append([name, row.pair, row.method, words, str(len(last)), mean_and_spread(last), top1])
        missing += [f"{name}: {', '.join(methods)} are not here" for methods in [left_out(name)] if methods]
    yield Table(HEADING, cells).text()
    yield ""
    yield from missing
    if SHORT in tables:
        yield f"{SHORT}: published numbers are those of 240 epochs"


def jobs_of(tables: Sequence[str], seeds: int, together: bool) -> tuple[list[Job], list[Job]]:
    """What is left to do: networks that learn alone, and then, when there are teachers, those that learn from them."""
    jobs: dict[Path, Job] = {}
    for here in map(rows, tables):
        for row in here:
            wanted = seeds_of(row, here, seeds)
            left = [seed for seed in wanted if state(row, seed)[0] != "done"]
            if left and together and row.teacher and len(wanted) > 1:
                jobs[row.folder(1)] = Job(row, 1, len(wanted))
            else:
                jobs |= {row.folder(seed): Job(row, seed) for seed in left}
    alone = [job for job in jobs.values() if job.row.teacher is None]
    return alone, [job for job in jobs.values() if job.row.teacher]


def command(job: Job, more: list[str]) -> list[str]:
    """The command line of a job, with further flags as far as its script knows them."""
    if job.row.teacher is None:
        _, foreign = teacher_parser().parse_known_args(more)
        more = [word for word in more if not (foreign and word == foreign[0] and foreign.pop(0))]
    return [sys.executable, *job.row.command(job.seed, job.trials), *more]


class Runner:
    """Does jobs, so many at a time."""

    def __init__(self, at_a_time: int, more: list[str]) -> None:
        self.at_a_time, self.more = at_a_time, more
        self.running: set[subprocess.Popen] = set()
        self.places: queue.SimpleQueue[int] = queue.SimpleQueue()
        for place in range(at_a_time):
            self.places.put(place)

    def __call__(self, jobs: Sequence[Job]) -> list[str]:
        """Do them all; returns the names of those that failed.

        Raises:
            KeyboardInterrupt: the process was asked to end; what was under way has been stopped, and saved.
        """
        failed = []
        with ThreadPoolExecutor(self.at_a_time) as pool:
            futures = {pool.submit(self._do, job): job for job in jobs}
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    name, (status, minutes) = futures[future].name, future.result()
                    word = f"failed with status {status}" if status else "done"
                    print(f"[{done}/{len(jobs)}] {name}: {word} after {minutes:.0f} min", flush=True)
                    failed += [name] if status else []
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.running):
                    process.terminate()
                raise
        return failed

    def _do(self, job: Job) -> tuple[int, float]:
        start, place = time.monotonic(), self.places.get()
        with ExitStack() as stack:
            stack.callback(self.places.put, place)
            environment, output = os.environ.copy(), None
            if self.at_a_time > 1:
                environment |= self._part(place)
                OUTPUT.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context((OUTPUT / f"{job.name}.txt").open("a"))
                print(f"{job.name}: started, see {output.name}", flush=True)
            process = subprocess.Popen(command(job, self.more), env=environment, stdout=output, stderr=output)
            self.running.add(process)
            status = process.wait()
            self.running.remove(process)
        return status, (time.monotonic() - start) / 60

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
        print(*listed(args.tables, args.seeds), sep="\n")
        return
    alone, distilled = jobs_of(args.tables, args.seeds, args.trials)
    if args.dry_run:
        for job in (*alone, *distilled):
            print(shlex.join(["python", *command(job, more)[1:]]))
        return
    at_a_time = args.jobs or max(1, torch.cuda.device_count())
    print(f"{len(alone)} networks alone, {len(distilled)} students left to train, {at_a_time} at a time", flush=True)
    run = Runner(at_a_time, more)
    failed = run(alone) + run(distilled)
    if failed:
        raise RunError(f"{len(failed)} runs failed ({', '.join(failed)}): see above or in {OUTPUT}; the same command"
                       " tries them again")  # fmt: skip


if __name__ == "__main__":
    run_main(main)
