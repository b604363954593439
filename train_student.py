"""Distil a teacher into a student: any temperature with any distiller and any pair of networks.

python train_student.py --path-t save/models/resnet56_vanilla --model_s resnet20 --temperature ctkd-global
"""

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import train_teacher
from dataset import Dataset, tell_unreadable
from distiller_zoo import TwoStage, create_distiller, distiller_dict
from helper import distributed
from helper.device import device_of, place, seed_everything, start_together
from helper.errors import run_main
from helper.files import try_writing
from helper.first_stage import FirstTrainer
from helper.logger import EpochTable
from helper.loops import evaluate
from helper.run_folder import RunFolder, config_of, init_hash
from helper.task import Distillation, build_temperature
from helper.teacher import FoundTeacher, find_teacher, load_teacher
from helper.teacher_cache import CachedTeacher, OnlineTeacher
from helper.trainer import Trainer
from helper.trials import train_runs, trials_of
from models import Model, create_model, feature_shapes
from models.outside import file_name
from options.flags import StudentOptions, as_dict, own_options
from options.parse import kwargs_for, parse_student, proportions_in_words, resolve_pair, run_folder
from report import draw_curve


def distil(options: StudentOptions) -> list[Path]:
    """Train or resume the distillations of the options, one per seed; return their folders."""
    with device_of(options) as device:
        # 1. the teacher's weights, and the runs with their state
        found = find_teacher(options, train_teacher.train)
        options = resolve_pair(options, found.name)
        data_sha256 = train_teacher.hash_of_data(options)
        runs = [(open_run(trial, found, data_sha256), trial) for trial in trials_of(options)]
        print_settings(options)
        if unfinished := train_teacher.unfinished(runs):
            # 2. data, and 3. the teacher: frozen, and evaluated before the distillation
            data, model, teacher, found_out = load(options, found, device, distiller_dict[options.distill].needs)
            # 4. the loop, from where each run stopped
            train_runs(unfinished, device, found_out, lambda *run: build_trainer(*run, model, teacher, data))
            tell_unreadable(data)
        return [run.folder for run, _ in runs]


def load(
    options: StudentOptions, found: FoundTeacher, device: torch.device, content: str
) -> tuple[Dataset, Model, OnlineTeacher | CachedTeacher, dict[str, Any]]:
    """Load data and teacher.

    Args:
        options: the run's options.
        found: the teacher's weights.
        device: the device of the data and the teacher.
        content: content of a table of the teacher's outputs, see `CachedTeacher`.

    Returns:
        The data, the teacher's network, its online or cached form, and the entries of `config.json` about them.
    """
    if options.teacher_table:
        folder = table_dir(options, found)
        distributed.on_rank0(
            lambda: try_writing(folder, "name another folder for the teacher's table with --table_dir")
        )
    data = train_teacher.load_data(options, device)
    model = load_teacher(found, data, options)
    found_out = {"num_classes": data.num_classes}
    if not options.skip_validation:
        found_out["teacher_top1"] = evaluate(model, data.val, "teacher")["top1"]
        print(f"the teacher {found.name} has top-1 {found_out['teacher_top1']:.2f} on this test set")
    return data, model, build_teacher(options, found, model, data, content), found_out


def open_run(options: StudentOptions, found: FoundTeacher, data_sha256: str | None) -> RunFolder:
    """Return the folder of one seed's run, without writing it yet; `data_sha256` identifies its data."""
    pair = f"{file_name(found.name)}_{file_name(options.model_s)}"
    group = f"{options.dataset}_{pair}/{options.distill}_{options.temperature}"
    group += "_logit_stand" * options.logit_stand
    group += f"_{options.tau_control}" * (options.tau_control != "none")
    folder = run_folder(options, "student_model", group, f"seed-{options.seed}")
    init_sha256 = init_hash(options.init_weights, folder)
    config = config_of("student", options, options.model_s, data_sha256, init_sha256, found.name, found.sha256)
    run = RunFolder(folder, options.model_s, config, options.overwrite, draw_curve).check()
    print(f"distil {run.title}, into {folder}")
    return run


def print_settings(options: StudentOptions) -> None:
    """Print the loss, and the options of distiller and temperature."""
    print(loss_in_words(options))
    if told := proportions_in_words(options):
        print(told)
    for name, own in (
        (options.distill, own_options(options.distill, None)),
        (options.temperature, own_options(None, options.temperature)),
    ):
        values = [f"{key} {value}" for key in own if (value := options.method[key]) is not None]
        if own:
            print(f"{name}: {', '.join(values)}")


def table_dir(options: StudentOptions, found: FoundTeacher) -> Path:
    """Return the folder of tables with the teacher's outputs."""
    return Path(options.table_dir or found.path.parent / "teacher_table")


def build_teacher(
    options: StudentOptions, found: FoundTeacher, model: Model, data: Dataset, content: str
) -> OnlineTeacher | CachedTeacher:
    """Return the teacher, or with --teacher_table a table of its outputs, of kind `content` (see `CachedTeacher`)."""
    if not options.teacher_table:
        return OnlineTeacher(model, options.teacher_precision)
    folder, precision = table_dir(options, found), options.teacher_precision
    table = CachedTeacher(model, data.train, folder, found.sha256, content, options.table_dtype, precision)
    if options.fill_teacher_table:
        table.fill()
    return table


def build_trainer(
    run: RunFolder,
    options: StudentOptions,
    pass_turn: Callable[[], None] | None,
    table: EpochTable,
    model: Model,
    teacher: OnlineTeacher | CachedTeacher,
    data: Dataset,
) -> Trainer:
    """Return the trainer of one seed, resumed; `model` is the teacher's network."""
    # Student, temperature and distiller are trained as one module by one optimizer. The student is created first, so
    # that its initial weights are the same for every method.
    seed_everything(options.seed)
    device = data.train.target.device
    student = create_model(options.model_s, data.num_classes, options.dataset)
    train_teacher.initialise(run, student, options)
    own = num_parameters(student)
    task = place(distillation(options, student, model, data.train.target), device, options.plain)
    if options.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(task.student)
    if (trained := num_parameters(task.student)) != own:
        print(f"with {options.distill} the student has {trained:,} parameters instead of {own:,}, also at test time")
    if extra := num_parameters(task.distiller):
        print(f"{options.distill} adds {extra:,} parameters, for training only, to the student's {trained:,}")
    make_first = None
    if isinstance(task.distiller, TwoStage) and task.distiller.init_epochs:
        live = OnlineTeacher(model, options.teacher_precision)  # a table has no maps
        make_first = partial(FirstTrainer, run, task, live, data, options, pass_turn, table)
    return train_teacher.resumed_trainer(run, task, teacher, data, options, pass_turn, table, make_first)


def num_parameters(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def loss_in_words(options: StudentOptions) -> str:
    """Return the loss with its weights as text."""
    terms = {"gamma": "CE", "alpha": "KD(tau)", "fixed_alpha": f"KD({options.kd_T:g})", "beta": options.distill}
    told = " + ".join(f"{weight:g} {term}" for key, term in terms.items() if (weight := getattr(options, key)))
    return f"loss = {told}" + f", KD growing over {options.kd_warmup} epochs" * bool(options.kd_warmup)


def distillation(options: StudentOptions, student: Model, teacher: Model, train_target: Tensor) -> Distillation:
    """Return student, temperature and distiller as a task; `train_target` [N] has the class of each training image."""
    method = distiller_dict[options.distill]
    student = method.wrap_student(student, teacher, as_dict(options))
    maps = method.needs == "maps" or method.has_first_stage
    shapes = partial(feature_shapes, image_size=options.image_size, maps=maps)
    also = method.also + method.first_also
    ours, theirs = shapes(student, also=also), shapes(teacher, also=also + method.teacher_also)
    known = as_dict(options) | {
        "student_shapes": ours,
        "teacher_shapes": theirs,
        "student_widths": [shape[0] for shape in ours],
        "teacher_widths": [shape[0] for shape in theirs],
        "num_classes": student.classifier.out_features,
        "teacher_classifier": teacher.classifier,
        "teacher_norms": teacher.norms_before_relu(),
        "train_target": train_target,
    }
    weights = ("gamma", "alpha", "beta", "fixed_alpha", "kd_T", "kd_warmup")
    return Distillation(
        student,
        build_temperature(options, known),
        create_distiller(options.distill, **kwargs_for(method, known)),
        **{key: getattr(options, key) for key in (*weights, "precision", "label_smoothing")},
    )


def main() -> None:
    options = parse_student()
    start_together(options)
    distil(options)


if __name__ == "__main__":
    run_main(main)
