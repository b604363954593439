"""Train a network alone, by the vanilla recipe: a teacher for train_student.py, or a student to compare with.

python train_teacher.py --model resnet56
python train_teacher.py --model resnet20 --dataset digits --epochs 10
"""

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dataset import Dataset, create_dataset, identify_data, tell_unreadable
from helper import checkpoint, distributed
from helper.device import device_of, place, seed_everything, start_together
from helper.errors import run_main
from helper.first_stage import FirstTrainer
from helper.logger import EpochTable
from helper.loops import Teacher
from helper.metrics import Metrics
from helper.run_folder import RunFolder, config_of, init_hash
from helper.task import Task, Vanilla
from helper.teacher import folder_name
from helper.trainer import Trainer, make_optimizer, make_step
from helper.trials import O, train_runs, trials_of
from models import Model, create_model, feature_widths
from options.flags import CommonOptions, TeacherOptions, as_dict
from options.parse import kwargs_for, parse_teacher, proportions_in_words, run_folder
from report import draw_curve


def train(options: TeacherOptions) -> list[Path]:
    """Train or resume the networks of the options, one per seed; return their folders."""
    with device_of(options) as device:
        # 1. the runs with their state
        data_sha256 = hash_of_data(options)
        runs = [(open_run(trial, data_sha256), trial) for trial in trials_of(options)]
        if told := proportions_in_words(options):
            print(told)
        if left := unfinished(runs):
            # 2. data
            data = load_data(options, device)
            # 3. the loop, from where each run stopped
            found_out = {"num_classes": data.num_classes}
            train_runs(left, device, found_out, lambda *run: build_trainer(*run, data))
            tell_unreadable(data)
        return [run.folder for run, _ in runs]


def hash_of_data(options: CommonOptions) -> str | None:
    """Return a hash that distinguishes the data from other data of the same name; see `identify_data`."""
    return distributed.one_a_machine(lambda: identify_data(options.dataset, options.data_dir))


def unfinished(runs: list[tuple[RunFolder, O]]) -> list[tuple[RunFolder, O]]:
    """Return the runs still to be trained, and print the results of the others.

    Dry runs are left out too. Raises UserError if a folder cannot be written.
    """
    left = [(run, options) for run, options in runs if not options.dry_run and not run.print_if_finished()]
    for run, _ in left:
        run.check_writable()
    return left


def load_data(options: CommonOptions, device: torch.device) -> Dataset:
    """Return this process's share of the data set, on a device."""
    own = {"device": device, "rank": distributed.rank(), "world_size": distributed.world_size()}
    known = kwargs_for(create_dataset, as_dict(options) | own)
    return distributed.local_rank0_first(lambda: create_dataset(options.dataset, **known))


def open_run(options: TeacherOptions, data_sha256: str | None) -> RunFolder:
    """Return the folder of one seed's run, without writing it yet; `data_sha256` identifies its data."""
    name = folder_name(options.model, options.dataset) + f"_seed-{options.seed}" * (options.trials > 1)
    folder = run_folder(options, "models", "", name)
    config = config_of("teacher", options, options.model, data_sha256, init_hash(options.init_weights, folder))
    run = RunFolder(folder, options.model, config, options.overwrite, draw_curve).check()
    print(f"train {run.title}, into {folder}")
    return run


def build_trainer(
    run: RunFolder,
    options: TeacherOptions,
    pass_turn: Callable[[], None] | None,
    table: EpochTable,
    data: Dataset,
) -> Trainer:
    """Return the trainer of one seed, resumed."""
    seed_everything(options.seed)
    device = data.train.target.device
    model = create_model(options.model, data.num_classes, options.dataset)
    feature_widths(model, options.image_size)  # raises errors before the first step
    initialise(run, model, options)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if options.sync_bn else model
    task = place(Vanilla(model, options.precision, options.label_smoothing), device, options.plain)
    return resumed_trainer(run, task, None, data, options, pass_turn, table)


def initialise(run: RunFolder, model: Model, options: CommonOptions) -> None:
    """Initialise a new run's network from --init_weights, if given; a resumed run does not need them."""
    if options.init_weights and not distributed.on_rank0((run.folder / "last.pth").exists):
        path = Path(options.init_weights)
        weights = distributed.on_rank0(lambda: checkpoint.load_weights_once(path, run.config["init_sha256"]))
        checkpoint.initialise(model, path, weights, run.model, options.dataset)


def resumed_trainer(
    run: RunFolder,
    task: Task,
    teacher: Teacher | None,
    data: Dataset,
    options: CommonOptions,
    pass_turn: Callable[[], None] | None,
    table: EpochTable,
    make_first: Callable[[torch.optim.Optimizer], FirstTrainer] | None = None,
) -> Trainer:
    """Return the trainer of a run, resumed; the arguments are those of `Trainer`, on the device.

    `make_first` makes the trainer of the run's first stage, if it has one, from the optimizer of its own epochs.

    Raises:
        UserError: the run's `last.pth` does not fit its options.
    """
    name = task.student.known_as(run.config["model"])
    run.info = checkpoint.Info.of(name, options.dataset, options.image_size, data)
    optimizer, metrics = make_optimizer(task, **kwargs_for(make_optimizer, as_dict(options))), Metrics()
    first = make_first(optimizer) if make_first else None
    run.resume(task, optimizer, metrics, len(data.train), first.state() if first else None)
    step = make_step(task, data.train.target.device, options)
    data = data._replace(train=data.train.with_seed(options.seed))
    return Trainer(run, task, teacher, optimizer, metrics, data, options, step, pass_turn, table, first)


def main() -> None:
    options = parse_teacher()
    start_together(options)
    train(options)


if __name__ == "__main__":
    run_main(main)
