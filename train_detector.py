"""Train a detector: alone, also to serve as a teacher, or distilled from another.

python train_detector.py --dataset shapes --model_s faster_rcnn_tiny_wide
python train_detector.py --path-t save/detectors/coco_faster_rcnn_ResNet50_alone --model_s faster_rcnn_ResNet18
"""

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataset.coco import DetectionData, create_detection_data, identify_detection_data
from distiller_zoo.detection import detector_distillers
from helper import distributed
from helper.average_precision import check_installed
from helper.checkpoint import Info, file_hash
from helper.detection import (
    DetectorDistillation,
    DetectorTask,
    DetectorTeacher,
    DetectorTrainer,
    detector_step,
    evaluate_detector,
)
from helper.detector_teacher import FoundDetector, find_teacher
from helper.device import device_of, place, seed_everything, start_together
from helper.errors import run_main
from helper.logger import EpochTable
from helper.metrics import Metrics
from helper.run_folder import RunFolder, config_of
from helper.task import build_temperature
from helper.teacher import fetched
from helper.trainer import make_optimizer
from helper.trials import train_runs
from inputs import UserError
from models.detection import Detector, create_detector
from models.detector_files import fetch_backbone, load_backbone
from models.detector_names import pyramid_of
from options.detector import DetectorOptions
from options.flags import as_dict
from options.parse import kwargs_for, run_folder
from options.parse_detector import parse_detector, resolve_pair
from report import draw_curve


def train(options: DetectorOptions) -> Path:
    """Train or resume the detector of the options; return its folder."""
    with device_of(options) as device:
        torch.backends.cudnn.benchmark = False  # images differ in size, and cuDNN would time its algorithms for each
        # 1. the teacher's weights, if there is one, and the run with its state
        found = find_teacher(options) if options.distill != "none" else None
        options = resolve_pair(options, found.name) if found else options
        check_pair(options, found)
        run = open_run(options, found)
        print_settings(options)
        if options.dry_run or run.print_if_finished():
            return run.folder
        run.check_writable()
        check_installed()
        # 2. data, and 3. the teacher: frozen, and evaluated before the distillation
        data = load_data(options, device)
        teacher, found_out = load_teacher(options, found, data, device)
        # 4. the loop, from where the run stopped
        train_runs([(run, options)], device, found_out, partial(build_trainer, data=data, teacher=teacher))
        return run.folder


def check_pair(options: DetectorOptions, found: FoundDetector | None) -> None:
    """Raise UserError if the teacher lacks the proposals or the map levels that student and distiller compare."""
    if found is None or found.model is None:
        return
    if not found.model.has_proposals and options.model_s.startswith("faster_rcnn"):
        raise UserError(f"{found.name} has no proposals, which {options.model_s} compares: give a Faster R-CNN")
    compares_maps = detector_distillers[options.distill].needs == "maps"
    if compares_maps and pyramid_of(found.name) != pyramid_of(options.model_s):
        advice = ", or --distill kd" if options.model_s.startswith("faster_rcnn") else ""
        raise UserError(
            f"--distill {options.distill} compares maps, and those of {found.name} are of other levels than those of"
            f" {options.model_s}: give a teacher of the same family{advice}"
        )


def load_data(options: DetectorOptions, device: torch.device) -> DetectionData:
    """Return this process's share of the data set, on a device."""
    own: dict[str, Any] = {"device": device, "rank": distributed.rank(), "world_size": distributed.world_size()}
    own |= {"name": options.dataset, "period": options.eval_every}
    return create_detection_data(**kwargs_for(create_detection_data, as_dict(options) | own))


def open_run(options: DetectorOptions, found: FoundDetector | None) -> RunFolder:
    """Return the run's folder, without writing it yet."""
    how = f"{options.distill}_{options.temperature}" if found else "alone"
    pair = f"{found.name}_{options.model_s}/{how}/seed-{options.seed}" if found else f"{options.model_s}_{how}"
    group, _, name = f"{options.dataset}_{pair}".rpartition("/")
    folder = run_folder(options, "detectors", group, name)
    data_sha256 = distributed.one_a_machine(lambda: identify_detection_data(options.dataset, options.data_dir))
    backbone = backbone_file(options)
    init_sha256 = distributed.on_rank0(lambda: file_hash(backbone)) if backbone else None
    teacher = (found.name, found.sha256) if found else ()
    config = config_of("detector", options, options.model_s, data_sha256, init_sha256, *teacher)
    run = RunFolder(folder, options.model_s, config, options.overwrite, draw_curve, "ap").check()
    print(f"train {run.title}, into {folder}")
    return run


def print_settings(options: DetectorOptions) -> None:
    """Print the protocol, the loss, and the options of distiller and temperature."""
    sizes = ", ".join(map(str, options.min_sizes))
    drops = ", ".join(map(str, options.lr_steps))
    clip = f"clipped at a norm of {options.clip_grad:g}" if options.clip_grad else "not clipped"
    print(
        f"{options.iterations:,} steps of {options.batch_size} images, tested every {options.eval_every:,}\n"
        f"SGD: learning rate {options.learning_rate:g}, rising over {options.warmup_iters:,} steps, times"
        f" {options.lr_decay_rate:g} after {drops}; momentum {options.momentum:g}, weight decay"
        f" {options.weight_decay:g}; gradient {clip}\n"
        f"images: short side {sizes}, long side at most {options.max_size}; tested at {options.test_size};"
        f" {options.rois} proposals an image\n"
        f"{options.model_s}: batch norm {options.norm}, {options.trainable_layers} of 5 stages trained,"
        f" {f'from {options.backbone}' if options.backbone else 'from scratch'}"
    )
    if options.distill == "none":
        return
    terms = {f"warm-up * {options.alpha:g} KD(tau)": options.alpha, f"{options.beta:g} {options.distill}": options.beta}
    told = " + ".join(term for term, weight in terms.items() if weight)
    warmup = f"; the warm-up takes {options.kd_warmup_iters:,} steps" if options.alpha else ""
    print(f"loss = the detector's losses + {told}{warmup}")
    own = {"kd_T": options.kd_T} if options.temperature == "fixed" else {}
    own |= {name: value for name, value in options.method.items() if value is not None}
    print(f"{options.distill}, {options.temperature}: " + ", ".join(f"{key} {value}" for key, value in own.items()))
    if "lambda_epochs" in options.method:
        reached = options.method["lambda_epochs"] * options.eval_every
        print(f"lambda rises over {reached:,.0f} steps (--lambda_epochs counts parts)")


def load_teacher(
    options: DetectorOptions, found: FoundDetector | None, data: DetectionData, device: torch.device
) -> tuple[Detector | None, dict[str, Any]]:
    """Return the teacher on the device, frozen, and the entries of `config.json` about it and the data."""
    found_out: dict[str, Any] = {"num_classes": data.num_classes}
    if found is None:
        return None, found_out
    teacher = found.model
    assert teacher is not None  # None only in a dry run, which has ended before
    if teacher.num_classes != data.num_classes or teacher.class_names not in (None, data.class_names):
        raise UserError(
            f"the {found.name} in {found.path} was trained for {teacher.num_classes} classes, which are not the"
            f" {data.num_classes} of this data set: give a teacher that was trained on the same data"
        )
    place(teacher.eval().requires_grad_(False), device, options.plain)
    if not options.skip_validation:
        found_out["teacher_ap"] = evaluate_detector(teacher, data, description="teacher")["ap"]
        print(f"the teacher {found.name} has AP {found_out['teacher_ap']:.2f} on these validation images")
    return teacher, found_out


def build_trainer(
    run: RunFolder,
    options: DetectorOptions,
    pass_turn: Callable[[], None] | None,
    table: EpochTable,
    data: DetectionData,
    teacher: Detector | None,
) -> DetectorTrainer:
    """Return the run's trainer, resumed."""
    seed_everything(options.seed)
    device = data.train.target.device
    student = create_student(options, data.num_classes)
    if teacher is None:
        task: DetectorTask | DetectorDistillation = DetectorTask(student, options.precision, options.seed)
    else:
        task = distillation(options, student, teacher, data)
    place(task, device, options.plain)
    if options.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(task.student)
    run.info = Info.of(student.name, options.dataset, options.test_size, data)
    optimizer, metrics = make_optimizer(task, **kwargs_for(make_optimizer, as_dict(options))), Metrics()
    run.resume(task, optimizer, metrics, len(data.train))
    answers = DetectorTeacher(teacher, options.precision) if teacher else None
    step = partial(detector_step, forward=distributed.ddp(task), options=options)
    return DetectorTrainer(run, task, answers, optimizer, metrics, data, options, step, pass_turn, table)


def create_student(options: DetectorOptions, num_classes: int) -> Detector:
    """Return the detector with its initial weights."""
    known = as_dict(options) | {"frozen_norm": options.norm == "frozen"}
    student = create_detector(options.model_s, num_classes, **kwargs_for(create_detector, known))
    if path := backbone_file(options):
        load_backbone(student, path)
    return student


def backbone_file(options: DetectorOptions) -> Path | None:
    """Return the file of the backbone's weights, downloaded if necessary; None without one, and in a dry run."""
    if options.backbone is None or options.dry_run:
        return None
    if options.backbone == "torchvision":
        return fetched(fetch_backbone, options.model_s, "torchvision", "--backbone FILE")
    return Path(options.backbone)


def distillation(
    options: DetectorOptions, student: Detector, teacher: Detector, data: DetectionData
) -> DetectorDistillation:
    """Return student, temperature and distiller as a task."""
    known = as_dict(options) | {
        "student_widths": widths_of(student),
        "teacher_widths": widths_of(teacher),
        "teacher_classifier": teacher.classifier,
        "num_classes": data.num_classes + 1,  # with the background
        "train_target": data.train.target,
        "epochs": options.epochs,
    }
    tau, method = build_temperature(options, known), detector_distillers[options.distill]
    return DetectorDistillation(
        student, tau, method(**kwargs_for(method, known)), options.alpha, options.beta or 0.0, options.eval_every,
        options.kd_warmup_iters, options.precision, options.seed,
    )  # fmt: skip


def widths_of(detector: Detector) -> list[int]:
    """Return the channels of a detector's features (see `output_of`): its maps but the coarsest, and its vectors."""
    widths = detector.widths if detector.has_proposals else [*detector.widths, detector.widths[-1]]
    return [*widths[:-2], widths[-1]]


def main() -> None:
    options = parse_detector()
    start_together(options)
    train(options)


if __name__ == "__main__":
    run_main(main)
