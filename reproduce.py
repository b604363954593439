"""Reproduce the published tables: train every run behind them, one by one or several at a time.

Finished runs are skipped and interrupted ones resume, so the same command can be repeated.

    python reproduce.py --list                       # the tables, their runs and their progress
    python reproduce.py ctkd --jobs 4                # one table
    python reproduce.py short -- --teacher_table     # arguments after -- are forwarded to every run
"""

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
import argparse
import io
import os
import shlex
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

import published
from estimate import estimate
from helper import signals
from helper.errors import InUse, RunError, run_main
from helper.files import PATIENCE, TRIES, is_locked, open_to_append
from helper.logger import in_hours
from helper.run_files import read_config, read_log, read_whole_log
from inputs import Option, UserError, this_python
from options.flags import CommonOptions, as_dict, first_epochs, student_parser, teacher_parser
from options.identity import added_options, decisive, differing, neutral_options
from options.parse import given, parse_student, parse_teacher, resolve_pair
from options.parser import Parser, underscored
from report.comparison import REPORTS
from report.rows import SHORT, TABLES, Row, assumptions, left_out, rows
from report.runs import warn
from report.statistics import mean_and_spread
from report.tables import Table

HEADING = ["table", "pair", "method", "state", "n", "last", "published", "left"]
OUTPUT = Path("save/reproduce")  # folder for the output of each run if several run at a time
OURS = {  # flags that the tables set, besides those in their rows
    "dataset", "seed", "trials", "run_dir", "experiments_dir", "experiments_name", "model", "model_s", "model_t",
    "path_t", "lr", "gamma", "alpha", "beta", "fixed_alpha", "kd_T", "kd_warmup", "logit_stand", "have_mlp", "mlp_name",
    "tau_control", "dry_run", "overwrite",
}  # fmt: skip
MADE = {"done", "given"}  # states of finished runs
POLLING = 0.2  # seconds between checks of the running processes
FAILURES = 3  # failures in a row after which no further run starts


class Job(NamedTuple):
    """A command that trains a row with one seed, or with several side by side."""

    row: Row
    seed: int
    trials: int = 1

    @property
    def name(self) -> str:
        """Return the job's name, for the screen and the file with its output."""
        folder = self.row.folder(self.seed)
        name = f"{folder.parent.name}_{folder.name}" if self.row.teacher else folder.name
        return name + f"-{self.seed + self.trials - 1}" * (self.trials > 1)

    def states(self) -> list[str]:
        """Return the state of each seed's run; see `state`."""
        return [state(self.row.folder(self.seed + i), self.row.model)[0] for i in range(self.trials)]


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """Return the flags of this script, and the arguments for the training scripts."""
    names = [*TABLES, SHORT]
    usage = "%(prog)s [flags] [table ...] [-- flags of train_student.py]"
    parser = Parser(usage=usage, description=__doc__.split(":")[0] + ".", allow_abbrev=False)
    add = parser.add_argument
    add("tables", nargs="*", metavar="table", help=f"one or more of: {', '.join(names)} (default: all but {SHORT})")
    add("--list", action="store_true", help="show the runs, their progress and the published numbers, then stop")
    add("--dry_run", action="store_true", help="show the commands that are left to run, then stop")
    add("--estimate", action="store_true", help="with --list or --dry_run, measure some steps of each run to tell how"
        " long it takes; without, only runs with a log tell")  # fmt: skip
    add("--pairs", nargs="+", metavar="TEACHER:STUDENT", help="only these pairs, and their networks trained alone")
    add("--seeds", type=int, default=1, metavar="N", help="seeds 1 to N of all runs except the teachers")
    add("--jobs", type=int, metavar="N", help="runs at a time (default: one per GPU, or one)")
    add("--trials", action="store_true", help="train all --seeds of a student in one process, for GPUs")
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    args, unknown = parser.parse_known_intermixed_args(words[:at])
    more = words[at + 1 :]
    if unknown:
        parser.error(f"there is no {unknown[0]} here: flags of train_student.py go after --")
    if unknown := [name for name in args.tables if name not in names]:
        parser.error(f"there is no table '{unknown[0]}'; the known ones are: {', '.join(names)}")
    Option(least=1, most=1000).check("seeds", args.seeds)
    Option(least=1, most=1024).check("jobs", args.jobs)
    if args.estimate and not (args.list or args.dry_run):
        parser.error("--estimate belongs to --list or --dry_run: add one of them")
    if args.trials and args.seeds == 1:
        parser.error("--trials trains several --seeds side by side: give --seeds 3, say")
    args.tables = args.tables or list(TABLES)
    here = [row for name in args.tables for row in rows(name)]
    if not (here or args.list):
        parser.error(f"no row of {', '.join(args.tables)} can be made here: --list says why")
    known = {f"{row.teacher}:{row.model}" for row in here if row.teacher}
    if unknown := [pair for pair in args.pairs or () if pair not in known]:
        parser.error(f"these tables have no pair {unknown[0]}; they have: {', '.join(sorted(known))}; and tables go"
                     " before --pairs")  # fmt: skip
    parse_student(more)  # reports its errors now
    if ours := sorted(
        given(student_parser(), more) & OURS.union(*(row.options.keys() - neutral_options() for row in here))
    ):
        parser.error(f"--{ours[0]} is set by the tables: leave it out, or call the training script itself")
    return args, more


def chosen(table: str, pairs: Sequence[str] | None) -> list[Row]:
    """Return the rows of a table; given pairs like `resnet56:resnet20`, only those of the pairs and their networks."""
    here = rows(table)
    if not pairs:
        return here
    taught = [row for row in here if f"{row.teacher}:{row.model}" in pairs]
    networks = {name for row in taught for name in (row.teacher, row.model)}
    return [row for row in here if row.teacher is None and row.model in networks] + taught


def seeds_of(row: Row, among: Sequence[Row], seeds: int) -> range:
    """Return the seeds to train for a row: only the first for a network that is only a teacher."""
    taught = row.teacher is not None or any(row.model == other.model for other in among if other.teacher)
    return range(1, seeds + 1 if taught else 2)


def state(folder: Path, model: str) -> tuple[str, float | None]:
    """Return a run's state, and its top-1 in percent if it is done.

    The state is `missing`, `running`, `done`, `17 epochs`, `damaged` (an invalid log) or `given` (a checkpoint from
    elsewhere). Epochs of a first stage are not counted.
    """
    if not os.path.exists(folder / "config.json") and any(folder.glob("ckpt_epoch_*.pth")):
        return "given", None
    if is_locked(folder / ".lock"):
        return "running", None
    whole, records, log = read_whole_log(folder), read_log(folder), folder / "log.jsonl"
    if records and os.path.exists(folder / f"{model}_last.pth"):  # written last
        return "done", records[-1]["top1"]
    with suppress(OSError):
        about = log.stat()
        if not whole and (about.st_size or not stat.S_ISREG(about.st_mode)):
            return "damaged", None
    return (f"{len(records)} epochs" if records or os.path.exists(folder / "last.pth") else "missing"), None


def otherwise(row: Row, seed: int, more: list[str]) -> str:
    """Return a message if the folder holds a run with other options than those of the row, else an empty string."""
    folder = row.folder(seed)
    try:
        there = read_config(folder)["options"]
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:
        warn(f"{folder} may be another run: {error}")
        return ""
    here = as_dict(options_of(Job(row, seed), more))
    told = differing(added_options() | there, decisive(here, here.get("distill"), here.get("temperature")))
    return f"{folder} is another run ({told})" if told else ""


def options_of(job: Job, more: list[str]) -> CommonOptions:
    """Return a job's options as its script resolves them, without printing the notes."""
    with redirect_stdout(io.StringIO()):
        if job.row.teacher is None:
            return parse_teacher(command(job, more)[2:])
        options = parse_student(command(job, more)[2:])
    return resolve_pair(replace(options, model_t=job.row.teacher), job.row.teacher)


def seconds_left(job: Job, more: list[str], measure: bool) -> float | None:
    """Return the estimated remaining seconds of a job; None if unknown.

    The duration of an epoch is taken from the same stage in the job's own log, else from the log of another seed. If
    there is no log and `measure` is set, some steps are measured.
    """
    logs = [read_whole_log(job.row.folder(seed)) for seed in range(1, 4)]
    if not any(logs) and not measure:
        return None
    options, left = options_of(job, more), 0.0
    lengths = {True: first_epochs(options), False: options.epochs}  # of the first stage, and of the run itself
    for seed in range(job.seed, job.seed + job.trials):
        if state(job.row.folder(seed), job.row.model)[0] in MADE:
            continue
        own = read_whole_log(job.row.folder(seed))
        for is_first, length in lengths.items():
            done, *others = ([record for record in log if ("stage" in record) == is_first] for log in (own, *logs))
            if len(done) == length:
                continue
            seconds = [record["seconds"] for record in done or next(filter(None, others), []) if "seconds" in record]
            if not seconds and not measure:
                return None
            epoch = fmean(seconds) if seconds else estimate(options).epoch(is_first)
            left += epoch * (length - len(done))
    return left


def total(seconds: Sequence[float | None], at_a_time: int = 1) -> str:
    """Return a sentence with the sum of the known times."""
    known = [each for each in seconds if each is not None]
    unknown = len(seconds) - len(known)
    if unknown and not known:
        return "how long the runs take is unknown (--estimate measures it)"
    return (
        f"{in_hours(sum(known) / at_a_time)} are left"
        + f", {at_a_time} runs at a time" * (at_a_time > 1)
        + f", without {unknown} of {len(seconds)} runs whose time is unknown (--estimate measures it)" * bool(unknown)
    )


def listed(args: argparse.Namespace, more: list[str]) -> Iterator[str]:
    """Yield the lines of --list."""
    cells, notes = [], []
    times: dict[Path, float | None] = {}  # of each unfinished run, which may be in several tables
    for name in args.tables:
        here = chosen(name, args.pairs)
        for row in here:
            words, last, left = [], [], []
            for seed in seeds_of(row, here, args.seeds):
                word, top1 = state(row.folder(seed), row.model)
                other = otherwise(row, seed, more)
                notes += [other] if other else []
                words.append("other options" if other else word)
                last += [top1] if word == "done" and top1 is not None and not other else []
                if word not in MADE and not other:
                    left.append(seconds_left(Job(row, seed), more, args.estimate))
                    times[row.folder(seed)] = left[-1]
            counts = Counter(words).items()
            told = ", ".join(f"{count} {word}" if len(words) > 1 else word for word, count in counts)
            top1 = "–" if row.top1 is None else f"{row.top1:.2f}"
            hours = "–" if None in left or not left else in_hours(sum(left))
            cells.append([name, row.pair, row.method, told, str(len(last)), mean_and_spread(last), top1, hours])
        notes += [f"{name}: {line}" for line in left_out(name)]
        if here:
            notes += [f"{name}: assumed: {text}" for text in assumptions(name)]
            notes += [f"{name}: published is {reported(name)}"]
    yield Table(HEADING, cells).text()
    yield ""
    yield total(list(times.values()))
    yield from dict.fromkeys(notes)
    yield "these are the runs in save/; results/README.md has those that came with the code"


def reported(table: str) -> str:
    """Return as text which epoch the published numbers of a table belong to: the last, the best, ..."""
    if table == SHORT:
        return "of 240 epochs, for resnet8 read off a chart"
    dataset, *sources = TABLES[table]
    reports = {REPORTS[published.tables()["sources"][source]["reports"]] for source in sources}
    records = [record for record in published.tables()["records"] if record["source_id"] in sources]
    told = {record["certainty"] for record in records if record["dataset"] == dataset}
    return "; ".join([*sorted(reports), *sorted(word for word in told if word.startswith("approximate"))])


def jobs_of(args: argparse.Namespace, more: list[str]) -> list[Job]:
    """Return the jobs that are not done, including those running elsewhere; networks trained alone come first.

    Raises:
        UserError: an unfinished run has other options than those of its row.
    """
    jobs: dict[Path, Job] = {}
    notes: dict[str, None] = {}
    for name in args.tables:
        here = chosen(name, args.pairs)
        for row in here:
            wanted = seeds_of(row, here, args.seeds)
            left = [seed for seed in wanted if state(row.folder(seed), row.model)[0] not in MADE]
            for seed in wanted:
                if (other := otherwise(row, seed, more)) and seed in left:
                    raise UserError(f"{other}: move it, or give the same flags")
                notes |= {f"note: {other}, and is left as it is": None} if other else {}
            if left and args.trials and row.teacher:
                jobs[row.folder(1)] = Job(row, 1, args.seeds)
            else:
                jobs |= {row.folder(seed): Job(row, seed) for seed in left}
    for note in notes:
        print(note, file=sys.stderr)
    return sorted(jobs.values(), key=lambda job: job.row.teacher is not None)


def command(job: Job, more: list[str]) -> list[str]:
    """Return the command line of a job, with the flags in `more` that its script knows."""
    if job.row.teacher is None:
        more = underscored(more)
        _, foreign = teacher_parser().parse_known_args(more)
        more = [word for word in more if not (foreign and word == foreign[0] and foreign.pop(0))]
    return [sys.executable, *job.row.command(job.seed, job.trials), *more]


class Runner:
    """Runs jobs, several at a time, each once its teacher is done; waits for those running elsewhere."""

    def __init__(self, jobs: Sequence[Job], at_a_time: int, more: list[str]) -> None:
        self.left, self.at_a_time, self.more = list(jobs), at_a_time, more
        self.count, self.ended, self.in_a_row = len(jobs), 0, 0
        self.in_use: Counter[str] = Counter()  # number of attempts to start a run that was in use
        self.failed: list[str] = []
        self.orphans: list[str] = []  # runs whose teacher failed
        self.running: dict[int, tuple[Job, subprocess.Popen, float]] = {}  # with the start time, by place: 0, 1, ...
        self.stopped = False  # no further run starts

    def __call__(self) -> None:
        """Run all jobs.

        Raises:
            KeyboardInterrupt: the process was asked to end, and its runs have ended too; a repeated request is passed
                on to them. (After any other error, they are asked to end too: all can be resumed.)
            RunError: some jobs failed or could not start.
        """
        try:
            while self.running or self.left and not self.stopped:
                for place in range(self.at_a_time):
                    if place not in self.running and not self.stopped and (job := self._next()):
                        self._begin(job, place)
                is_idle = self.left and not self.stopped and len(self.running) < self.at_a_time
                time.sleep(PATIENCE if is_idle else POLLING)  # longer if idle, since `_next` reads many files
                self._collect()
        except BaseException:  # also an error in this loop: nobody would look after the runs
            try:
                self._end()
            except KeyboardInterrupt:
                signals.ignore()
                self._end()
            raise
        if self.failed:
            count = len(self.failed)
            text = f"{count} run{'s' * (count > 1)} failed ({', '.join(self.failed)})"
            text += f", {len(self.orphans)} not begun without a teacher" * bool(self.orphans)
            text += f", and nothing else was begun after {FAILURES} in a row" * bool(self.left)
            raise RunError(f"{text}: see {OUTPUT if self.at_a_time > 1 else 'above'}; the same command tries again")

    def _end(self) -> None:
        """Ask the current runs to end, and wait for them."""
        for _, process, _ in self.running.values():
            process.terminate()
        for _, process, _ in self.running.values():
            process.wait()

    def _collect(self) -> None:
        """Record the jobs that have ended."""
        put_off = []
        for place, (job, process, start) in list(self.running.items()):
            if (status := process.poll()) is None:
                continue
            del self.running[place]
            if status == InUse.status and self._put_off(job):
                put_off.append(job)
                continue
            failed = bool(status) and not MADE.issuperset(job.states())
            word = f"failed with status {status}" if failed else "done"
            self._tried(job, f"{word} after {(time.monotonic() - start) / 60:.0f} min", failed)
        if put_off:
            time.sleep(PATIENCE)
            self.left[:0] = put_off

    def _put_off(self, job: Job) -> bool:
        """Print that another process uses a run; return whether to try it again, False at the TRIES-th time."""
        self.in_use[job.name] += 1
        if self.in_use[job.name] == TRIES:
            print(f"{job.name}: in use elsewhere at each of {TRIES} tries: giving up", flush=True)
            return False
        print(f"{job.name}: under way elsewhere, waiting for it", flush=True)
        return True

    def _next(self) -> Job | None:
        """Return the first job that can start now and is not running or done elsewhere."""
        for job in list(self.left):
            words, teacher = job.states(), job.row.teacher_folder
            if MADE.issuperset(words):
                self.left.remove(job)
                self._over(job, "done elsewhere")
            elif "running" in words:
                continue
            elif teacher is None or state(teacher, job.row.teacher)[0] in MADE:
                self.left.remove(job)
                return job
            elif teacher.name in self.failed:
                self.left.remove(job)
                self.orphans.append(job.name)
                self._over(job, "not begun because its teacher failed")
        return None

    def _begin(self, job: Job, place: int) -> None:
        """Start the training process of a job."""
        environment, output = os.environ.copy(), None
        try:
            if self.at_a_time > 1:
                environment |= self._part(place)
                OUTPUT.mkdir(parents=True, exist_ok=True)
                output = open_to_append(OUTPUT / f"{job.name}.txt")
                print(f"{job.name}: started, see {output.name}", flush=True)
            with signals.deferred():  # or else a run that has just begun would be forgotten
                process = subprocess.Popen(command(job, self.more), env=environment, stdout=output, stderr=output)
                self.running[place] = job, process, time.monotonic()
            if signals.asked():
                signals.stop()
        except (OSError, UserError) as error:
            self._tried(job, f"could not begin ({error})", failed=True)
        finally:
            if output:
                output.close()

    def _tried(self, job: Job, word: str, failed: bool) -> None:
        """Record how a job ended, and stop after FAILURES in a row."""
        self.in_a_row = self.in_a_row + 1 if failed else 0
        if failed:
            self.failed.append(job.name)
        self._over(job, word)
        self.stopped = self.stopped or self.in_a_row == FAILURES

    def _over(self, job: Job, word: str) -> None:
        """Count a job as ended, and print it."""
        self.ended += 1
        print(f"[{self.ended}/{self.count}] {job.name}: {word}", flush=True)

    def _part(self, place: int) -> dict[str, str]:
        """Return the environment variables that assign a GPU and a share of the cores to a run."""
        gpus = [str(gpu) for gpu in range(torch.cuda.device_count())]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(gpus)).split(",")
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.at_a_time)))
        return {"OMP_NUM_THREADS": threads} | ({"CUDA_VISIBLE_DEVICES": visible[place % len(gpus)]} if gpus else {})


def main() -> None:
    """List the runs, or run those that are left."""
    args, more = parse_args()
    if args.list:
        print(*listed(args, more), sep="\n")
        return
    jobs = jobs_of(args, more)
    at_a_time = args.jobs or max(1, torch.cuda.device_count())
    if args.dry_run:
        times = [seconds_left(job, more, args.estimate) for job in jobs]
        for job, hours in zip(jobs, times, strict=True):
            told = "" if hours is None else f"  # {in_hours(hours)}"
            print(this_python() + " " + shlex.join(command(job, more)[1:]) + told)
        print(total(times, at_a_time), file=sys.stderr)
        return
    print(f"{len(jobs)} runs left to do, {at_a_time} at a time", flush=True)
    Runner(jobs, at_a_time, more)()


if __name__ == "__main__":
    run_main(main)
