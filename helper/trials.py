"""Several seeds of one configuration in one process, each as if it ran alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from dataset.base import Loader
from helper import distributed
from helper.cuda_graph import CUDAGraphStep
from helper.loops import Stepper, Task, Teacher, Training, fit
from helper.run_folder import RunFolder


def trials_of(options: dict[str, Any]) -> list[dict[str, Any]]:
    """The options of each of --trials runs: seeds one after the other, and names of their own where one is given."""
    if options["trials"] == 1:
        return [options]
    trials = []
    for seed in range(options["seed"], options["seed"] + options["trials"]):
        names = {key: f"{options[key]}_seed-{seed}" for key in ("run_dir", "experiments_name") if options[key]}
        trials.append(options | names | {"seed": seed})
    return trials


class Turn:
    """A context for the work of one of several runs: with random numbers and, on a GPU, a stream of its own, so that
    the runs do not wait for one another."""

    def __init__(self, device: torch.device) -> None:
        self.random = torch.get_rng_state()
        self.device, self.on_gpu = device, device.type == "cuda"
        if self.on_gpu:
            self.stream, self.cuda_random = torch.cuda.Stream(device), torch.Generator(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))  # for what all of them share

    @contextmanager
    def __call__(self) -> Iterator[None]:
        before = torch.get_rng_state()
        torch.set_rng_state(self.random)
        try:
            with self._on_gpu() if self.on_gpu else nullcontext():
                yield
        finally:
            self.random = torch.get_rng_state()
            torch.set_rng_state(before)

    @contextmanager
    def _on_gpu(self) -> Iterator[None]:
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        default = torch.cuda.default_generators[index]
        before = default.graphsafe_get_state()  # exchanged and not copied: recordings keep to the one they began with
        default.graphsafe_set_state(self.cuda_random)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            default.graphsafe_set_state(before)


def fit_trials(
    runs: Sequence[tuple[RunFolder, dict[str, Any]]],
    device: torch.device,
    found_out: dict[str, Any],
    prepare: Callable[[RunFolder, dict[str, Any], Turn], Training],
) -> None:
    """Train runs, each with its options, to their ends, and say what came of them.

    Args:
        found_out: what their `config.json` should say beside their options.
        prepare: makes a run ready, in a turn of its own.
    """
    with ExitStack() as stack:
        trainings = []
        for run, options in runs:
            run.config |= found_out
            stack.enter_context(run.open())
            turn = Turn(device)
            with turn():
                trainings.append(prepare(run, options, turn))
        fit(trainings)
    for run, _ in runs:
        print(run.summary())


def make_step(
    module: Task, teacher: Teacher | None, optimizer: torch.optim.Optimizer, loader: Loader, options: dict[str, Any]
) -> Stepper:
    """What learns from a batch: on a GPU by replaying a recorded step, unless the options say --plain or several
    processes train together."""
    if loader.target.is_cuda and not options["plain"] and distributed.world_size() == 1:
        return CUDAGraphStep(module, teacher, optimizer, loader, options["batch_size"])
    return Stepper(module, teacher, optimizer)
