"""A run's folder: check it, write it, and resume the run from it."""

import fcntl
import inspect
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from distiller_zoo import distiller_dict
from helper import checkpoint, distributed
from helper.device import cpu_info
from helper.errors import InUse
from helper.files import open_to_append, reason, remove_leftovers, try_writing, write_atomically
from helper.logger import RunLog
from helper.metrics import METRICS_PATTERN, Metrics
from helper.run_files import SCORES, Record, read_config, read_log
from helper.structure import Checked, Misfit, expect, fitted, load_optimizer, module_pattern, optimizer_pattern
from helper.task import Task
from inputs import UserError
from models.outside import file_name
from options.detector import DetectorOptions, detector_parser
from options.flags import CommonOptions, student_parser, teacher_parser
from options.identity import added_options, decisive, differing, differing_keys, hash_version, own_dict
from options.parse import flags_of
from options.plugins import plugin_files
from temperature import temperature_dict

PARSERS = {"teacher": teacher_parser, "student": student_parser, "detector": detector_parser}  # by the run's kind
# What identifies a run, besides its options
IDENTITY = ("kind", "model", "teacher", "teacher_sha256", "data_sha256", "init_sha256")

VERSION = 3  # of the format of last.pth; version 2 had no first stage
# Buffers that version 1 of last.pth did not store with the weights, because each epoch resets them.
SUMS_OF_AN_EPOCH = ("warmup", "count", "total", "squares", "ratio", "epoch_hsic", "epoch_ratio", "epoch_steps")
OLD_PART = {  # the pattern of the state within an epoch in version 1, see helper/structure.py
    "step?": Any, "seconds": Any, "trained?": Any, "meter?": Any, "within?": {"buffers?": {str: Any}, "probe?": Any},
}  # fmt: skip

ANEW = "add --overwrite to start anew"
OTHER_PLACE = "give another place with --run_dir"

# Further options that must be equal in all processes.
ALIKE = ("skip_validation", "teacher_table", "fill_teacher_table", "dry_run", "overwrite")


def config_of(
    kind: str,
    options: CommonOptions | DetectorOptions,
    model: str,
    data_sha256: str | None,
    init_sha256: str | None,
    teacher: str | None = None,
    teacher_sha256: str | None = None,
) -> dict[str, Any]:
    """Return the content of a run's `config.json`, to which `RunFolder` and `train_runs` add entries.

    Args:
        kind: one of PARSERS.
        options: the run's options.
        model: the trained network's name.
        data_sha256: identifies the data.
        init_sha256: identifies the initial weights; None: they are random.
        teacher: the teacher's name; None: the network is trained alone.
        teacher_sha256: identifies the teacher's weights.
    """
    return {
        "kind": kind,
        "dataset": options.dataset,
        "data_sha256": data_sha256,
        "model": model,
        "teacher": teacher,
        "teacher_sha256": teacher_sha256,
        "init_sha256": init_sha256,
        "distill": options.distill if teacher else None,
        "temperature": options.temperature if teacher else None,
        "seed": options.seed,
        "epochs": options.epochs,
        "options": own_dict(options),
    } | ({"plugins_sha256": _plugin_hashes(options.plugins)} if options.plugins else {})


def _plugin_hashes(plugins: str) -> dict[str, str]:
    """Return the sha256 of each of the files of --plugins."""
    return {file: checkpoint.file_hash(Path(file)) for file in plugin_files(plugins)}


class FirstStage(NamedTuple):
    """The state of a first stage, see helper/first_stage.py."""

    epochs: int  # length of the stage
    optimizer: torch.optim.Optimizer
    metrics: Metrics


class RunFolder:
    """The folder of one run. Only rank 0 reads and writes it.

    Args:
        folder: its path.
        model: the trained network's name; files are named after it.
        config: the content of `config.json`; its options and IDENTITY decide whether a run already there is the same.
        overwrite: start from scratch, replacing any run already there.
        draw: draws the curves of a history, with a title, into a PNG file.
        score: key of the headline metric in the records, in percent.
    """

    def __init__(
        self,
        folder: Path,
        model: str,
        config: dict[str, Any],
        overwrite: bool,
        draw: Callable[[list[Record], str, Path], None] | None = None,
        score: str = "top1",
    ) -> None:
        self.draw, self.score = draw, score
        self.folder, self.model = folder, file_name(model)
        self.config = config | {"processes": distributed.world_size()}
        self.overwrite = overwrite
        self.info: checkpoint.Info | None = None  # saved with the weights, so that they can be used alone
        self.first: list[Record] = []  # epochs of the first stage, if it has one
        self.history: list[Record] = []  # the run's own epochs
        self.step, self.seconds = 0, 0.0  # of the next epoch: steps already made, and their duration
        self.trained: Record | None = None  # training means of the next epoch if only its test is left
        self.path = folder / "config.json"

    def check(self) -> "RunFolder":
        """Compare the run with those of the other processes and with the content of the folder; return it.

        After a restart by torchrun or Slurm nothing is overwritten.

        Raises:
            UserError: the folder holds a run with other options, or another process was given another run.
        """
        self.overwrite = self.overwrite and not distributed.any_rank(distributed.restarts() > 0)
        alike = {key: self.config["options"].get(key) for key in ALIKE}
        distributed.check_same(self._decisive() | alike)
        distributed.on_rank0(lambda: self._tell_changed_plugins(self._check()))
        return self

    def _tell_changed_plugins(self, config: dict[str, Any] | None) -> None:
        """Print which files of --plugins have changed since the run with this `config.json` began."""
        there = (config or {}).get("plugins_sha256")
        for file, here in self.config.get("plugins_sha256", {}).items():
            if isinstance(there, dict) and there.get(file, here) != here:
                print(f"note: {file} has changed since the run in {self.folder} began: {ANEW}")

    @distributed.by_rank0
    def is_finished(self) -> bool:
        """Return whether the run in the folder is finished: its last weights, which are written last, exist.

        It is not finished if `last.pth` can rebuild a damaged log, or if the run is to be extended.
        """
        if self.overwrite or not (self.folder / f"{self.model}_last.pth").exists():
            return False
        log = read_log(self.folder)
        is_complete = bool(log) and log[-1]["epoch"] >= self.config.get("epochs", 0)
        return is_complete or not (self.folder / "last.pth").exists()

    def print_if_finished(self) -> bool:
        """Return whether the run is finished; if so, print that and its result."""
        if not self.is_finished():
            return False
        print(f"already finished (--overwrite trains it again): {self.summary()}")
        return True

    def _files(self) -> list[Path]:
        """Return the existing files whose names are those of files that this run writes."""
        weights = ("last.pth", f"{self.model}_last.pth", f"{self.model}_best.pth", "ckpt_epoch_*.pth")
        patterns = ("config.json", "log.jsonl", "events.out.tfevents.*", "curve.png", *weights)
        return [file for pattern in patterns for file in self.folder.glob(pattern)]

    def _check(self) -> dict[str, Any] | None:
        """Return the content of `config.json` of the run to resume; None for a new run.

        Raises:
            UserError: the folder holds other files, or a run with other options.
        """
        if self.overwrite:
            return None
        with self._place():
            files = self._files()  # before config.json, which a run starting elsewhere writes first
            if self.path.exists():
                self._check_state()
                return self._read_same_run()
            if files:
                raise UserError(
                    f"{self.folder} holds {files[0].name}, which is not from a run of this program: give another"
                    " --run_dir, or add --overwrite to replace it"
                )
            return None

    def _check_state(self) -> None:
        """Raise UserError if an unfinished run has epochs but lost the state to resume from."""
        log, last = self.folder / "log.jsonl", self.folder / "last.pth"
        has_epochs = log.is_file() and log.stat().st_size > 0  # checked before last.pth, which is written first
        if last.exists() or (self.folder / f"{self.model}_last.pth").exists():
            return
        if last.is_symlink():
            raise UserError(f"{last} is a symbolic link that leads nowhere: repair it, or {ANEW}")
        if has_epochs:
            raise UserError(f"{log} has epochs, but there is no last.pth to resume from: put it back, or {ANEW}")

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Turn errors of an impossible path or an unwritable folder into a UserError."""
        try:
            yield
        except UserError:  # already explains what is wrong
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder} cannot be written ({reason(error)}): {OTHER_PLACE}") from error

    @distributed.by_rank0
    def check_writable(self) -> None:
        """Raise UserError early if the folder cannot be created or written; nothing is left in it."""
        try_writing(self.folder, OTHER_PLACE)

    def _read_same_run(self) -> dict[str, Any]:
        """Return the content of `config.json`. Raises UserError if it describes another run."""
        try:
            config = read_config(self.folder)
            if not config["options"]:
                raise ValueError("it has no options")
        except UserError:  # for example, it is a FIFO
            raise
        except ValueError as error:
            raise UserError(f"{self.path} is damaged: add --overwrite to start that run anew") from error
        there = {"init_sha256": None} | added_options() | config["options"]
        there |= {key: config[key] for key in IDENTITY if key in config}
        ours = json.loads(json.dumps(self._decisive()))
        changed_keys = differing_keys(there, ours)
        longer = "epochs" in changed_keys and ours["epochs"] > there["epochs"]
        if longer and changed_keys == ["epochs"]:
            self._check_extension(there["epochs"])
        elif changed := differing(there, ours):
            advice = "give another --run_dir or --experiments_name, or add --overwrite to replace it"
            if flags := self._flags({key: there[key] for key in changed_keys}):
                advice = f"add {flags} to resume it, {advice}"
            if longer and (flags := self._flags({key: there[key] for key in changed_keys if key != "epochs"})):
                advice = f"add {flags} to extend it, {advice}"
            raise UserError(f"{self.folder} holds a run with other options ({changed}): {advice}")
        return config

    def _check_extension(self, epochs: int) -> None:
        """Raise UserError unless the run's `epochs` epochs are those that a longer run would begin with."""
        options = self.config["options"]
        methods = {"distill": distiller_dict, "temperature": temperature_dict}
        for key, registry in methods.items():
            method = registry.get(options.get(key))
            if method and "epochs" in inspect.signature(method).parameters:
                raise UserError(
                    f"{self.folder} holds a run of {epochs} epochs, which cannot be extended: what --{key}"
                    f" {options[key]} does depends on the number of epochs; give another --run_dir"
                )
        if not (self.folder / "last.pth").exists():
            raise UserError(f"{self.folder} has no last.pth to extend the run from: give another --run_dir")

    def _flags(self, options: dict[str, Any]) -> str:
        """Return `<flags> to <script>`, where the flags set options to these values; empty if no flags can."""
        kind = self.config.get("kind", "student")
        flags = flags_of(PARSERS[kind](), options)
        return flags and f"{shlex.join(flags)} to train_{kind}.py"

    def _decisive(self) -> dict[str, Any]:
        """Return the options that identify this run."""
        options = self.config["options"] | {key: self.config.get(key) for key in IDENTITY}
        return decisive(options, options.get("distill"), options.get("temperature"))

    @contextmanager
    def open(self) -> Iterator[None]:
        """Create the folder, lock it until the context ends, and write `config.json`.

        Raises:
            UserError: it cannot be written.
            InUse: another process is training in it.
        """
        with ExitStack() as stack:
            distributed.on_rank0(lambda: self._claim(stack))
            yield

    def _claim(self, stack: ExitStack) -> None:
        with self._place():
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open_to_append(self.folder / ".lock"))
            try:
                _lock(lock)
            except BlockingIOError as error:
                raise InUse(f"another process is training in {self.folder}: wait for it, or stop it") from error
            remove_leftovers(self.folder)
            config = self._check()  # again: another process may have started here in the meantime
            if self.overwrite:
                for file in self._files():
                    file.unlink()
        if config is None:
            text = json.dumps(self.config | _provenance(), indent=2) + "\n"
            write_atomically(self.path, text.encode())
            return
        if (epochs := config["options"].get("epochs")) != self.config["options"].get("epochs"):
            self._extend(config, epochs)
        there, here = config.get("data_sha256"), self.config.get("data_sha256")
        if there and here and hash_version(there) != hash_version(here):
            print("note: the hash of this run's data is of an older version: whether the data changed is not checked")

    def _extend(self, config: dict[str, Any], epochs: int) -> None:
        """Extend a run of `epochs` epochs; its last weights are kept."""
        more = self.config["epochs"]
        last = self.folder / f"{self.model}_last.pth"
        if last.exists():
            last.rename(self.folder / f"{self.model}_epoch_{epochs}.pth")
        config["options"]["epochs"] = config["epochs"] = more
        config["extended_from"] = [*config.get("extended_from", []), epochs]
        write_atomically(self.path, (json.dumps(config, indent=2) + "\n").encode())
        drops = ", ".join(map(str, config["options"]["lr_decay_epochs"]))
        print(f"extending the run from {epochs} to {more} epochs; the learning rate still drops after {drops}")

    def resume(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer,
        metrics: Metrics,
        steps: float = math.inf,
        first: FirstStage | None = None,
    ) -> None:
        """Restore the run's state, random numbers and log from `last.pth`, if there is one.

        Args:
            task: the modules that are trained.
            optimizer: the task's optimizer.
            metrics: sums of an epoch.
            steps: number of steps in an epoch.
            first: the first stage, if the run has one.

        Raises:
            UserError: something in `last.pth` does not fit the run; nothing is changed then.
        """
        state = self._read_state(task, optimizer, steps, first)
        if state is not None:
            if stage := _unfinished(first, state):
                optimizer, metrics = stage.optimizer, stage.metrics
            elif state["step"]:
                task.start_epoch(len(state["history"]) + 1)
            self._restore(state, task, optimizer, metrics)
            done = f"{len(self.history)} of {self.config['epochs']}"
            if stage:
                done = f"{len(self.first)} of the first stage's {stage.epochs}"
            part = f" and {self.step} steps of the next" if self.step else ""
            print(f"resuming after epoch {done}{part}")
            if (before := state.get("processes") or 1) != distributed.world_size():
                now = "one process" if distributed.world_size() == 1 else f"{distributed.world_size()} processes"
                print(f"note: {now} instead of {before}: batch norm uses other shares from here on")
        self.log = RunLog(self.folder, [*self.first, *self.history]) if distributed.is_rank0() else None

    @distributed.by_rank0
    def _read_state(
        self, task: Task, optimizer: torch.optim.Optimizer, steps: float, first: FirstStage | None
    ) -> dict[str, Any] | None:
        path = self.folder / "last.pth"
        if not path.exists():
            return None
        state = checkpoint.load(path, ANEW)
        try:
            state = upgraded(state, task)
            if isinstance(state, dict) and isinstance(newer := state.get("version"), int) and newer > VERSION:
                raise Misfit(f"it is of version {newer}, which is newer than this code")
            stage = _unfinished(first, state)
            state = fitted(state, self._state_pattern(task, stage.optimizer if stage else optimizer, steps), "state")
            self._check_epochs(state, first.epochs if first else 0, stage is not None)
            return state
        except Misfit as misfit:
            raise UserError(f"{path} does not fit this run ({misfit}): {ANEW}") from misfit

    def _state_pattern(self, task: Task, optimizer: torch.optim.Optimizer, steps: float) -> dict[str, Any]:
        """Return the pattern of `last.pth`, see helper/structure.py and `save`."""
        device, record = next(task.parameters()).device, {str: float}
        random_state = Checked(torch.get_rng_state(), lambda state: _is_random_state(state, "cpu"), "is no such state")
        gpu_states = Checked(
            [torch.empty(0, dtype=torch.uint8)],
            lambda states: device.type == "cpu" or all(_is_random_state(state, device) for state in states[:1]),
            "is no such state",
        )
        return {
            "version": int,
            "module": module_pattern(task),
            "optimizer": optimizer_pattern(optimizer),
            "first?": Checked([record], _is_numbered, "are no epochs from 1 on"),
            "history": Checked([record], self._is_history, "are no epochs from 1 on"),
            "step": Checked(int, lambda step: 0 <= step <= steps, f"is not from 0 to {steps}"),
            "seconds": float,
            "trained?": record,
            "metrics?": METRICS_PATTERN,
            "rng_cpu": random_state,
            "rng_cuda": gpu_states,
            "processes?": int,
        }

    def _check_epochs(self, state: dict[str, Any], length: int, is_first: bool) -> None:
        """Raise Misfit if the epochs in a state contradict each other or the run.

        Args:
            state: the content of `last.pth`.
            length: epochs of the run's first stage.
            is_first: whether the state is within the first stage.
        """
        epochs, first, history = self.config.get("epochs", math.inf), state.get("first", []), state["history"]
        expect(_is_whole(state), "it holds no whole state within an epoch")
        is_staged = not (history or "trained" in state) if is_first else len(first) == length
        expect(is_staged, f"it has other epochs of a first stage than the {length} of this run")
        expect(len(history) + bool(state["step"]) <= epochs, f"it has more epochs than the {epochs} of this run")
        goes_on = _sums_go_on(state.get("metrics"), first if is_first else history)
        expect(goes_on, "it sums other losses in its unfinished epoch than in those before")

    def _is_history(self, history: list[Record]) -> bool:
        return _is_numbered(history) and all(0 <= record.get(self.score, -1) <= 100 for record in history)

    def _restore(self, state: dict[str, Any], task: Task, optimizer: torch.optim.Optimizer, metrics: Metrics) -> None:
        device = next(task.parameters()).device
        try:
            task.load_state_dict(state["module"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:  # from an extra state without a pattern
            raise UserError(f"{self.folder / 'last.pth'} does not fit this run: {ANEW}") from error
        moved = state["optimizer"]["state"]
        if any(moved.values()):  # a fused step needs momentum for all parameters or for none
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            for number, parameter in enumerate(parameters):
                moved.setdefault(number, {}).setdefault("momentum_buffer", torch.zeros_like(parameter))
        load_optimizer(optimizer, state["optimizer"])
        if "metrics" in state:
            metrics.load_state(state["metrics"], device)
        self.first, self.history = state.get("first", []), state["history"]
        self.step, self.seconds, self.trained = state["step"], state["seconds"], state.get("trained")
        torch.set_rng_state(state["rng_cpu"])
        if state["rng_cuda"] and device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"][0], device)

    def save_first(self, record: Record, task: Task, optimizer: torch.optim.Optimizer) -> None:
        """Save a finished epoch of the first stage: `last.pth`, then the log. `optimizer` is the next epoch's."""
        self.save(task, optimizer, first=[*self.first, record])
        if distributed.is_rank0():
            self.log.append(record)

    def save_epoch(self, record: Record, task: Task, optimizer: torch.optim.Optimizer) -> None:
        """Save a finished epoch: the best weights, then `last.pth`, then the log, which is derived from it."""
        is_best = record[self.score] > max((earlier[self.score] for earlier in self.history), default=-1.0)
        if is_best and distributed.is_rank0():
            self._save_weights(f"{self.model}_best.pth", task.student, record)
        self.save(task, optimizer, [*self.history, record])
        if distributed.is_rank0():
            self.log.append(record)
            every = self.config["options"].get("save_freq")
            if every and record["epoch"] % every == 0:
                self._save_weights(f"ckpt_epoch_{record['epoch']}.pth", task.student, record)

    def save(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer,
        history: list[Record] | None = None,
        step: int = 0,
        seconds: float = 0.0,
        metrics: dict[str, Any] | None = None,
        trained: Record | None = None,
        first: list[Record] | None = None,
    ) -> None:
        """Write `last.pth`, for `resume`.

        Args:
            task: the modules that are trained.
            optimizer: the task's optimizer.
            history: the run's own epochs; None: unchanged.
            step: steps of the next epoch already made.
            seconds: duration of these steps.
            metrics: sums over these steps.
            trained: the means of the epoch, in place of the sums, if only its test is left.
            first: epochs of the first stage; None: unchanged.
        """
        device, history = next(task.parameters()).device, self.history if history is None else history
        first = self.first if first is None else first
        state = {
            "version": VERSION,
            "module": task.state_dict(),
            "optimizer": optimizer.state_dict(),
            "first": first,
            "history": history,
            "step": step,
            "seconds": seconds,
            "metrics": metrics,
            "trained": trained,
            "rng_cpu": torch.get_rng_state(),
            "rng_cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
            "processes": distributed.world_size(),
        }
        if distributed.is_rank0():
            checkpoint.save(state, self.folder / "last.pth")
        self.first, self.history = first, history
        self.step, self.seconds, self.trained = step, seconds, trained

    def kept(self) -> str:
        """Return a text that names the saved epochs and steps of the run."""
        if not self.first and not self.history and not self.step:
            return "no epoch was finished yet"
        done = f"{len(self.history)}" if self.history else f"{len(self.first)} of the first stage"
        kept = [f"the state after epoch {done}"] if self.first or self.history else []
        kept += [f"{self.step} steps of {'the next' if kept else 'the first'}"] if self.step else []
        return f"{self.folder} keeps {' and '.join(kept)}"

    def _save_weights(self, name: str, student: nn.Module, record: Record) -> None:
        """Write weights under the key `model`, the format of published teachers, with a description of them."""
        content = {"epoch": record["epoch"], "model": student.state_dict(), self.score: record[self.score]}
        content |= {checkpoint.INFO: self.info._asdict()} if self.info else {}
        checkpoint.save(content, self.folder / name)

    @property
    def title(self) -> str:
        """Return a line with networks, method, data set and seed."""
        c = self.config
        z = " on z-scored logits" if c["options"].get("logit_stand") else ""
        z += f", {control}" if (control := c["options"].get("tau_control", "none")) != "none" else ""
        how = f"{c['teacher']} → {c['model']}, {c['distill']}, {c['temperature']}{z}" if c["teacher"] else c["model"]
        return f"{how}, {c['dataset']}, seed {c['seed']}"

    def finish(self, student: nn.Module) -> None:
        """Draw the curves and write the weights; `<name>_last.pth` comes last and marks the run as finished."""
        if not distributed.is_rank0():
            return
        if self.draw:
            self.draw(self.history, self.title, self.folder / "curve.png")
        if self.config["kind"] == "teacher":
            self._save_weights(f"ckpt_epoch_{self.history[-1]['epoch']}.pth", student, self.history[-1])
        self._save_weights(f"{self.model}_last.pth", student, self.history[-1])

    @distributed.by_rank0
    def summary(self) -> str:
        """Return the result in one sentence, from the log."""
        history = read_log(self.folder)
        if not history:
            raise UserError(f"{self.folder / 'log.jsonl'} is lost or damaged, with no last.pth to rebuild it from: add"
                            " --overwrite to train that run again")  # fmt: skip
        score, last, best = self.score, history[-1], max(history, key=lambda record: record[self.score])
        return (
            f"{self.title}: {SCORES[score]} last {last[score]:.2f} (epoch {last['epoch']}),"
            f" best {best[score]:.2f} (epoch {best['epoch']}, selected on the test set); {self.folder}"
        )


@distributed.by_rank0
def init_hash(init_weights: str | None, folder: Path) -> str | None:
    """Return the sha256 of the file of --init_weights; if the file is gone, the one recorded by the run in `folder`."""
    if not init_weights:
        return None
    path = Path(init_weights)
    with suppress(OSError, ValueError):  # among them UserError
        config = {} if path.exists() else read_config(folder)
        if config.get("init_sha256") and config["options"].get("init_weights") == str(path):
            return config["init_sha256"]
    return checkpoint.file_hash(path)


def _lock(file: IO) -> None:
    """Lock a file or raise BlockingIOError, after waiting out brief locks such as those of `is_locked`."""
    for _ in range(5):
        with suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.1)
    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _unfinished(first: FirstStage | None, state: Any) -> FirstStage | None:
    """Return the first stage if `state`, a value of any type, was saved within it."""
    done = state.get("first") if isinstance(state, dict) else None
    return first if first and len(done if isinstance(done, list) else []) < first.epochs else None


def _is_numbered(records: list[Record]) -> bool:
    return [record.get("epoch") for record in records] == list(range(1, len(records) + 1))


def _is_whole(state: dict[str, Any]) -> bool:
    """Return whether a state within an epoch has the sums of its steps or, before the test, their means."""
    step, trained, metrics = state["step"], state.get("trained"), state.get("metrics")
    if not step or trained is not None:
        fits = bool(step) == (trained is not None) and (trained or {}).keys().isdisjoint(("epoch", "learning_rate"))
        return fits and metrics is None
    if metrics is None:
        return False
    tensors = metrics["tensors"]
    return len(metrics["names"]) == len(tensors["sums"]) and bool(tensors["steps"] == step)


def upgraded(state: Any, task: Task) -> Any:
    """Return the content of a `last.pth` in the format of VERSION.

    Version 1 had no version number, kept the state within an epoch in `part`, and stored buffers with sums of an epoch
    there instead of with the weights.

    Raises:
        Misfit: it has neither format.
    """
    if not isinstance(state, dict) or "version" in state or not isinstance(state.get("module"), dict):
        return state
    state = dict(state)
    part = fitted(state.pop("part", None) or {"seconds": 0.0}, OLD_PART, "part")
    within = part.pop("within", {})
    fresh = {key: value for key, value in task.state_dict().items() if key.rpartition(".")[2] in SUMS_OF_AN_EPOCH}
    module = fresh | {key: value for key, value in within.get("buffers", {}).items() if key in fresh} | state["module"]
    if hasattr(task, "probe"):
        module["_extra_state"] = {"probe": within["probe"]} if "probe" in within else {}
    if "meter" in part:
        part["metrics"] = part.pop("meter")
    return {"version": VERSION, "step": 0} | state | part | {"module": module}


def _sums_go_on(metrics: dict[str, Any] | None, records: list[Record]) -> bool:
    """Return whether a resumed epoch sums the losses of the epoch before it; in the first, `Metrics` checks this."""
    if metrics is None or not records:
        return True
    before = records[-1]
    losses = [name for name in before if name == "loss" or name.startswith("loss_")]
    return losses == metrics["names"] and ("tau_mean" in before) == ("tau" in metrics["tensors"])


def _is_random_state(state: Tensor, device: torch.device | str) -> bool:
    try:
        torch.Generator(device).set_state(state)
    except RuntimeError:
        return False
    return True


def _provenance() -> dict[str, Any]:
    """Return the origin of a run's numbers: command line, commit, versions and machine."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "command": shlex.join(sys.argv),
        "git_commit": commit,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version("torchvision"),  # read without importing it, which is slow
            "numpy": numpy.__version__,
        },
        "machine": {
            "processor": cpu_info()["model name"],
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }
