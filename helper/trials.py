"""Train several runs in one process, each as if it ran alone, in threads that take turns."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from helper import signals
from helper.device import share_freed_memory
from helper.errors import Interrupted, RunError
from helper.logger import EpochTable
from helper.run_folder import RunFolder
from helper.trainer import Trainer
from options.flags import CommonOptions

O = TypeVar("O", bound=CommonOptions)  # noqa: E741


def trials_of(options: O) -> list[O]:
    """Return the options of each run of --trials, with consecutive seeds, which are appended to the given names."""
    if options.trials == 1:
        return [options]
    trials = []
    for seed in range(options.seed, options.seed + options.trials):
        names: dict[str, Any] = {
            key: f"{name}_seed-{seed}" for key in ("run_dir", "experiments_name") if (name := getattr(options, key))
        }
        trials.append(replace(options, seed=seed, **names))
    return trials


class Aborted(BaseException):
    """Raised in a run after an error of another run that ends all of them."""


class Turns:
    """Interleaves runs in a fixed order, each in its own thread.

    Each has its own random state and, on a GPU, its own stream, so it computes what it would compute alone.

    Args:
        device: the device of the runs.
        count: number of runs.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        share_freed_memory()
        self.device, self.count = device, count
        self.current, self.over = 0, [False] * count
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self.errors: dict[int, RunError] = {}
        self.random = [torch.get_rng_state() for _ in range(count)]
        self.cuda_random = [torch.Generator(device) for _ in range(count)] if device.type == "cuda" else []

    def run(self, works: Sequence[Callable[[Callable[[], None]], None]]) -> None:
        """Call each function in its own thread, with a function that passes the turn to the next one; wait for all.

        Raises:
            RunError: raised by one of them (preferably an Interrupted); the others have run to their end.
            BaseException: any other error of one of them, which ends all.
        """
        threads = [threading.Thread(target=self._work, args=each, daemon=True) for each in enumerate(works)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.5)  # the timeout lets this thread handle signals
        except KeyboardInterrupt as interrupt:
            with self.changed:
                self.failure = self.failure or interrupt
                self.changed.notify_all()
            for thread in threads:  # they end at their next turn, and the interpreter must not end before them
                thread.join()
            raise
        if self.failure:
            raise self.failure
        if self.errors:
            raise self.errors[min(self.errors, key=lambda i: (not isinstance(self.errors[i], Interrupted), i))]

    def _work(self, number: int, work: Callable[[Callable[[], None]], None]) -> None:
        try:
            self._wait(number)
            stream = torch.cuda.Stream(self.device) if self.cuda_random else None
            if stream:
                stream.wait_stream(torch.cuda.current_stream(self.device))  # it made the data that all runs share
            with torch.cuda.stream(stream) if stream else nullcontext(), self._random_numbers(number) as swap:

                def pass_turn() -> None:
                    swap()
                    self._pass(number)
                    self._wait(number)
                    swap()

                work(pass_turn)
        except RunError as error:
            self.errors[number] = error
        except Aborted:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        finally:
            self.over[number] = True
            self._pass(number)

    def _wait(self, number: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.current == number or self.failure)
        if self.failure:
            raise Aborted

    def _pass(self, number: int) -> None:
        with self.changed:
            later = [*range(number + 1, self.count), *range(number + 1)]
            self.current = next((other for other in later if not self.over[other]), number)
            self.changed.notify_all()

    @contextmanager
    def _random_numbers(self, number: int) -> Iterator[Callable[[], None]]:
        """Give a run its own random state; yield a function that swaps it with the global one."""
        default = None
        if self.cuda_random:
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            default = torch.cuda.default_generators[index]

        def swap() -> None:
            own, self.random[number] = self.random[number], torch.get_rng_state()
            torch.set_rng_state(own)
            if default is not None:  # swapped, not copied: a CUDA graph stays bound to the state it was recorded with
                own_cuda, self.cuda_random[number] = self.cuda_random[number], default.graphsafe_get_state()
                default.graphsafe_set_state(own_cuda)

        swap()
        try:
            yield swap
        finally:
            swap()


def train_runs(
    runs: Sequence[tuple[RunFolder, O]],
    device: torch.device,
    found_out: dict[str, Any],
    build: Callable[..., Trainer],
) -> None:
    """Train all runs to their last epoch, and print their results.

    Args:
        runs: folders and options.
        device: the device of all runs.
        found_out: entries to add to their `config.json`.
        build: returns a run's trainer, given its folder, its options, a function that passes the turn (None for a
            single run), and the table on the screen; called in the run's turn.
    """
    table = EpochTable()
    with ExitStack() as stack:
        for run, _ in runs:
            run.config |= {"device": str(device)} | found_out
            stack.enter_context(run.open())
        try:
            if len(runs) == 1:
                trainer = build(*runs[0], None, table)
                with signals.deferred():
                    trainer.fit()
            else:
                seeds = {options.seed for _, options in runs}

                def work(run: RunFolder, options: O, number: int, pass_turn: Callable[[], None]) -> None:
                    trainer = build(run, options, pass_turn, table)
                    trainer.label = f"seed {options.seed:<4}" if len(seeds) == len(runs) else f"run {number:<5}"
                    pass_turn()  # all trainers are built before any of them trains
                    trainer.fit()

                with signals.deferred():
                    Turns(device, len(runs)).run([partial(work, *run, n) for n, run in enumerate(runs, 1)])
        except (Interrupted, KeyboardInterrupt) as stop:
            kept = "; ".join(run.kept() for run, _ in runs)
            without = " without --overwrite" if any(run.overwrite for run, _ in runs) else ""
            print(f"\nstopped; {kept}: the same command{without} goes on from there", flush=True)
            if isinstance(stop, KeyboardInterrupt):
                raise
            signals.stop()
    for run, _ in runs:
        print(run.summary())
