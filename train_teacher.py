"""Train a network alone, by the vanilla recipe: a teacher for train_student.py, or a student to compare with.

    python train_teacher.py --model resnet56
    python train_teacher.py --model resnet20 --dataset digits --epochs 10
"""

from pathlib import Path
from typing import Any

from dataset import create_dataset, identify_data
from helper.device import place, prepare_device, seed_everything
from helper.errors import run_main
from helper.loops import Alone, fit, make_optimizer
from helper.options import parse, run_folder, taken_by, teacher_parser
from helper.run_folder import RunFolder
from models import create_model


def folder_name(model: str, dataset: str) -> str:
    """The name of a teacher's folder: the published one for CIFAR-100, with the data set's name for others."""
    return f"{model}_vanilla" if dataset == "cifar100" else f"{model}_vanilla_{dataset}"


def train(options: dict[str, Any]) -> Path:
    """Train the network that the options describe, or go on with it; returns the run's folder."""
    # 1. the run: what it is, and what there is of it already
    config = {
        "kind": "teacher",
        "dataset": options["dataset"],
        "data_sha256": identify_data(options["dataset"], options["data_dir"]),
        "model": options["model"],
        "teacher": None,
        "distill": None,
        "temperature": None,
        "seed": options["seed"],
        "epochs": options["epochs"],
        "options": options,
    }
    folder = run_folder(options, "models", "", folder_name(options["model"], options["dataset"]))
    run = RunFolder(folder, options["model"], config, options["overwrite"])
    print(f"train {run.title}, into {folder}")
    if options["dry_run"]:
        return folder
    if run.finished:
        print(f"already finished (--overwrite trains it anew): {run.summary()}")
        return folder
    # 2. data and network
    device = prepare_device(options["device"], options["gpu_id"], options["deterministic"])
    config["device"] = str(device)
    seed_everything(options["seed"])
    data = create_dataset(options["dataset"], **taken_by(create_dataset, options | {"device": device}))
    module = place(Alone(create_model(options["model"], data.num_classes)), device)
    optimizer = make_optimizer(module, **taken_by(make_optimizer, options))
    # 3. the loop, from where it stopped
    with run.open():
        run.resume(module, optimizer)
        fit(run, module, None, data, optimizer, options)
    print(run.summary())
    return folder


def main() -> None:
    train(parse(teacher_parser()))


if __name__ == "__main__":
    run_main(main)
