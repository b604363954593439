"""Several seeds of one configuration in one process, each as if it ran alone: threads that work one at a time."""

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
from helper.flags import CommonOptions
from helper.logger import EpochTable
from helper.run_folder import RunFolder
from helper.trainer import Trainer

O = TypeVar("O", bound=CommonOptions)  # noqa: E741


def trials_of(options: O) -> list[O]:
    """Return the options of each of --trials runs: consecutive seeds, and names of their own where one is given."""
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
    """Raised in a run whose neighbour has failed in a way that ends all of them."""


class Turns:
    """Lets runs take turns, each in a thread of its own, in a fixed order.

    Each has random numbers of its own and, on a GPU, a stream, so that it computes what it would compute alone.

    Args:
        device: of the runs.
        count: how many there are.
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
        """Call all works, each with a function that passes its turn on to the next one, until they return.

        Raises:
            RunError: one of those that works raised, an Interrupted if there is one; the others were done to their end.
            BaseException: any other error, which ends all works.
        """
        threads = [threading.Thread(target=self._work, args=each, daemon=True) for each in enumerate(works)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.5)  # between which this thread hears of signals, whichever thread they woke
        except KeyboardInterrupt as interrupt:
            with self.changed:
                self.failure = self.failure or interrupt
                self.changed.notify_all()
            for thread in threads:  # which end at their next turn: the interpreter must not end before them
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
                stream.wait_stream(torch.cuda.current_stream(self.device))  # for what all of them share
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
        """Give a run random numbers of its own; the function exchanges them for the others' and back."""
        default = None
        if self.cuda_random:
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            default = torch.cuda.default_generators[index]

        def swap() -> None:
            own, self.random[number] = self.random[number], torch.get_rng_state()
            torch.set_rng_state(own)
            if default is not None:  # exchanged and not copied: recordings keep to the one that they began with
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
    """Train runs to their ends, and print their results.

    Args:
        runs: folders and options.
        device: of all of them.
        found_out: what their `config.json` should say beside their options.
        build: makes the trainer of a run, in its turn, from its folder, its options, a function that passes the turn on
            (None for one run), and the table on the screen.
    """
    table = EpochTable()
    with ExitStack() as stack:
        for run, _ in runs:
            run.config |= found_out
            stack.enter_context(run.open())
        try:
            if len(runs) == 1:
                trainer = build(*runs[0], None, table)
                with signals.looked_at():
                    trainer.fit()
            else:

                def work(run: RunFolder, options: O, pass_turn: Callable[[], None]) -> None:
                    trainer = build(run, options, pass_turn, table)
                    pass_turn()  # all are built before one of them trains
                    trainer.fit()

                with signals.looked_at():
                    Turns(device, len(runs)).run([partial(work, *each) for each in runs])
        except (Interrupted, KeyboardInterrupt) as stop:
            kept = "; ".join(run.kept() for run, _ in runs)
            same = "the same command without --overwrite" if runs[0][0].overwrite else "the same command"
            print(f"\nstopped; {kept}: {same} goes on from there", flush=True)
            if isinstance(stop, KeyboardInterrupt):
                raise
            signals.stop()
    for run, _ in runs:
        print(run.summary())
