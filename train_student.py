"""Distil a teacher into a student: any temperature with any distiller and any pair of networks.

    python train_student.py --path-t save/models/resnet56_vanilla --model_s resnet20 --temperature ctkd-global
"""

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dataset import Dataset, create_dataset, identify_data
from distiller_zoo import create_distiller, distiller_dict
from helper import processes
from helper.answers import Live, TeacherTable, check_table_dir
from helper.device import device_of, place, seed_everything, start_together
from helper.errors import run_main
from helper.loops import Distillation, Training, evaluate, make_optimizer
from helper.options import parse, proportions_in_words, resolve_pair, run_folder, student_parser, taken_by
from helper.run_folder import RunFolder
from helper.runs import OPTIONS_OF, TEMPERATURE_OPTIONS_OF
from helper.teacher import FoundTeacher, find_teacher, load_teacher
from helper.trials import Turn, fit_trials, make_stepper, trials_of
from models import Model, create_model, feature_widths
from temperature import create_temperature, temperature_dict
from temperature.standardised import Standardised


def distil(options: dict[str, Any]) -> list[Path]:
    """Run the distillations that the options describe, one a seed, or go on with them; returns their folders."""
    with device_of(options) as device:
        return _distil(options, device)


def _distil(options: dict[str, Any], device: torch.device) -> list[Path]:
    # 1. the teacher's weights, and the runs: what they are, and what there is of them already
    found = find_teacher(options)
    options = resolve_pair(options, found.name)
    data_sha256 = processes.one_a_machine(lambda: identify_data(options["dataset"], options["data_dir"]))
    runs = [(open_run(trial, found, data_sha256), trial) for trial in trials_of(options)]
    folders = [run.folder for run, _ in runs]
    tell(options)
    runs = [(run, trial) for run, trial in runs if not options["dry_run"] and not run.told_finished()]
    if not runs:
        return folders
    for run, _ in runs:
        run.check_writable()
    if options["teacher_table"]:
        processes.first(lambda: check_table_dir(table_dir(options, found)))
    # 2. data
    known = taken_by(create_dataset, options | {"device": device})
    data = processes.one_a_machine_first(lambda: create_dataset(options["dataset"], **known))
    # 3. teacher: frozen, and measured before anything is learned from it
    model = load_teacher(found, data.num_classes, device, options["dataset"], options["plain"])
    top1 = None if options["skip_validation"] else evaluate(model, data.val, "teacher")["top1"]
    if top1 is not None:
        print(f"the teacher {found.name} has top-1 {top1:.2f} on this test set")
    teacher = asked(options, found, model, data)
    # 4. the loop, from where each run stopped
    found_out = {"device": str(device), "num_classes": data.num_classes}
    found_out |= {} if top1 is None else {"teacher_top1": top1}
    fit_trials(runs, device, found_out, lambda run, trial, turn: prepared(run, trial, model, teacher, data, turn))
    return folders


def open_run(options: dict[str, Any], found: FoundTeacher, data_sha256: str | None) -> RunFolder:
    """The run of one seed, as a folder that is not written yet; `data_sha256` is what tells its data from other."""
    config = {
        "kind": "student",
        "dataset": options["dataset"],
        "data_sha256": data_sha256,
        "model": options["model_s"],
        "teacher": found.name,
        "teacher_sha256": found.sha256,
        "distill": options["distill"],
        "temperature": options["temperature"],
        "seed": options["seed"],
        "epochs": options["epochs"],
        "options": options,
    }
    group = f"{options['dataset']}_{found.name}_{options['model_s']}/{options['distill']}_{options['temperature']}"
    group += "_logit_stand" * options["logit_stand"]
    folder = run_folder(options, "student_model", group, f"seed-{options['seed']}")
    run = RunFolder(folder, options["model_s"], config, options["overwrite"])
    print(f"distil {run.title}, into {folder}")
    return run


def tell(options: dict[str, Any]) -> None:
    """Say what the loss is made of, and the options of distiller and temperature."""
    print(loss_in_words(options))
    if told := proportions_in_words(options):
        print(told)
    for name, table in ((options["distill"], OPTIONS_OF), (options["temperature"], TEMPERATURE_OPTIONS_OF)):
        if own := table.get(name):
            print(f"{name}: " + ", ".join(f"{key} {options[key]}" for key in own if options[key] is not None))


def table_dir(options: dict[str, Any], found: FoundTeacher) -> Path:
    """Where tables of the teacher's answers are."""
    return Path(options["table_dir"] or found.path.parent / "teacher_table")


def asked(options: dict[str, Any], found: FoundTeacher, model: Model, data: Dataset) -> Live | TeacherTable:
    """What is asked instead of the teacher: itself, or with --teacher_table the table of its answers."""
    if not options["teacher_table"]:
        return Live(model, options["teacher_precision"])
    content = distiller_dict[options["distill"]].needs
    table = TeacherTable(model, data.train, table_dir(options, found), found.sha256, content, options["table_dtype"])
    if options["fill_teacher_table"]:
        table.fill(data.train)
    return table


def prepared(
    run: RunFolder, options: dict[str, Any], model: Model, teacher: Live | TeacherTable, data: Dataset, turn: Turn
) -> Training:
    """The run of one seed, from where it stopped."""
    # what learns: student, temperature and distiller, in one module under one optimizer; the student is first to draw
    # random numbers, so that it starts from the same weights under every method
    seed_everything(options["seed"])
    device = data.train.target.device
    student = create_model(options["model_s"], data.num_classes, options["dataset"])
    student = nn.SyncBatchNorm.convert_sync_batchnorm(student) if options["sync_bn"] else student
    module = place(distillation(options, student, model, data.train.target), device, options["plain"])
    optimizer = make_optimizer(module, **taken_by(make_optimizer, options))
    if extra := sum(parameter.numel() for parameter in module.distiller.parameters()):
        own = sum(parameter.numel() for parameter in student.parameters())
        print(f"{options['distill']} learns {extra:,} parameters for training only, beside the student's {own:,}")
    run.resume(module, optimizer, len(data.train))
    data = data._replace(train=data.train.with_seed(options["seed"]))
    return Training(run, make_stepper(module, teacher, optimizer, data.train, options), data, options, turn)


def loss_in_words(options: dict[str, Any]) -> str:
    """The weights of the loss, as they were given or looked up."""
    terms = {"gamma": "CE", "alpha": "KD(tau)", "fixed_alpha": f"KD({options['kd_T']:g})", "beta": options["distill"]}
    told = " + ".join(f"{options[key]:g} {term}" for key, term in terms.items() if options[key])
    return f"loss = {told}" + f", KD growing over {options['kd_warmup']} epochs" * bool(options["kd_warmup"])


def distillation(options: dict[str, Any], student: Model, teacher: Model, train_target: Tensor) -> Distillation:
    """All that learns, on the student's device; `train_target` [N] holds the class of each training image."""
    maps = distiller_dict[options["distill"]].needs == "maps"
    known = options | {
        "student_widths": feature_widths(student, options["image_size"], maps),
        "teacher_widths": feature_widths(teacher, options["image_size"], maps),
        "num_classes": student.classifier.out_features,
        "teacher_classifier": teacher.classifier,
        "train_target": train_target,
    }
    temperature, distill = options["temperature"], options["distill"]
    tau = create_temperature(temperature, **taken_by(temperature_dict[temperature], known))
    weights = ("gamma", "alpha", "beta", "fixed_alpha", "kd_T", "kd_warmup")
    return Distillation(
        student,
        Standardised(inner=tau) if options["logit_stand"] else tau,
        create_distiller(distill, **taken_by(distiller_dict[distill], known)),
        **{key: options[key] for key in (*weights, "precision")},
    )


def main() -> None:
    options = parse(student_parser())
    start_together(options)
    distil(options)


if __name__ == "__main__":
    run_main(main)
