"""Resolve the command line of train_detector.py; see parse.py for the other scripts."""

import os
import sys
from dataclasses import replace
from typing import Any

from dataset import check_dataset
from distiller_zoo.detection import detector_distillers
from inputs import UserError, options_of, unknown
from models.detector_names import DETECTORS
from options.detector import (
    BATCH,
    ELSEWHERE,
    IN_PROPORTION,
    PAIR_BETA,
    PROTOCOLS,
    DetectorOptions,
    detector_parser,
)
from options.flags import all_options, as_options
from options.parse import (
    check_declared,
    check_temperature,
    data_dir_of,
    given,
    known_name,
    print_foreign,
    resolve_processes,
    resolve_speed,
    scaled_epochs,
)
from options.parser import underscored
from options.plugins import load_plugins
from temperature import temperature_dict

CURRICULUM = 10  # of 240 epochs: CTKD's lambda_epochs


def parse_detector(argv: list[str] | None = None) -> DetectorOptions:
    """Return the checked options of train_detector.py's command line, with dependent defaults filled in.

    Args:
        argv: the words of the command line; None: those of this process.

    Raises:
        UserError: an unknown flag or name, a number that makes no sense, or an unsupported combination.
    """
    argv = sys.argv[1:] if argv is None else argv
    load_plugins(argv)
    for name in (word.partition("=")[0].removeprefix("--") for word in underscored(argv) if word.startswith("--")):
        if name in ELSEWHERE:
            raise UserError(f"--{name} is not supported for detectors ({ELSEWHERE[name]}): leave it out")
    parser = detector_parser()
    options, names = vars(parser.parse_args(argv)), given(parser, argv)
    check_dataset(options["dataset"], for_detectors=True)
    options["data_dir"] = data_dir_of(options["dataset"], options["data_dir"])
    _resolve_networks(options)
    _resolve_schedule(options)
    _resolve_loss(options)
    check_declared(options, all_options() | options_of(DetectorOptions))
    _resolve_methods(options, names)
    _check_together(options)
    resolved = as_options(DetectorOptions, options)
    known = options | {"epochs": resolved.epochs}
    check_temperature(known)
    if resolved.distill != "none":
        detector_distillers[resolved.distill].check(known)
    return resolved


def _resolve_networks(options: dict[str, Any]) -> None:
    for key in ("model_s", "model_t"):
        if options[key] is not None:
            options[key] = known_name("detector", options[key], DETECTORS)
    has_backbone = options["backbone"] is not None
    options["norm"] = options["norm"] or ("frozen" if has_backbone else "trained")
    if options["norm"] == "frozen" and not has_backbone:
        raise UserError("--norm frozen needs weights that batch norm was trained with: add --backbone")
    if options["trainable_layers"] is None:  # mdistiller trains all stages of MobileNetV2
        options["trainable_layers"] = 3 if has_backbone and "MobileNet" not in options["model_s"] else 5
    if options["path_t"] == "torchvision" and not options["model_t"]:
        raise UserError("--path-t torchvision needs the teacher's name: add --model_t, like faster_rcnn_ResNet50_v2")
    if options["rois"] is not None and options["model_s"].startswith("retinanet"):
        raise UserError(f"--rois has no effect on {options['model_s']}, which samples no proposals: leave it out")


def _resolve_schedule(options: dict[str, Any]) -> None:
    """Fill in the data set's protocol, in proportion to --iterations and --batch_size."""
    protocol = PROTOCOLS[options["dataset"]]
    length = options["iterations"] or protocol["iterations"]
    for key, value in protocol.items():
        if options[key] is not None:
            continue
        if key in IN_PROPORTION:
            value = _scaled(value, length / protocol["iterations"])
        if key == "eval_every":
            value = min(max(1, value), length)
        options[key] = value * options["batch_size"] / BATCH if key == "learning_rate" else value
    options["eval_every"] = min(options["eval_every"], length)


def _scaled(value: int | list[int], share: float) -> int | list[int]:
    return [round(each * share) for each in value] if isinstance(value, list) else round(value * share)


def _resolve_loss(options: dict[str, Any]) -> None:
    has_teacher = bool(options["path_t"] or options["model_t"])
    options["distill"] = (options["distill"] or ("kd" if has_teacher else "none")).lower()
    distill = options["distill"]
    if distill == "crd":
        raise UserError(
            "--distill crd keeps a memory with a place for each image, and a detector compares proposals: choose one"
            f" of {', '.join(detector_distillers)}"
        )
    if distill not in ("none", *detector_distillers):
        raise unknown("distiller of detectors", distill, ("none", *detector_distillers))
    if distill == "none" and has_teacher:
        raise UserError("--distill none trains without a teacher: leave --path-t and --model_t out, or --distill")
    if distill != "none" and not options["path_t"]:
        raise UserError(f"--distill {distill} needs a teacher: give --path-t FILE, or leave --distill out")
    options["temperature"] = options["temperature"] or "fixed"
    if options["temperature"] not in temperature_dict:
        raise unknown("temperature", options["temperature"], temperature_dict)
    if distill == "none":
        _check_alone(options)
        return
    distiller = detector_distillers[distill]
    has_policy = options["temperature"] != "fixed" or options["logit_stand"]
    if options["alpha"] is None:
        options["alpha"] = 1.0 if distill == "kd" or has_policy and not distiller.uses_tau else 0.0
    if options["alpha"] == 0 and has_policy and not distiller.uses_tau:
        raise UserError(f"--alpha 0 leaves the temperature nothing to act on under --distill {distill}: leave it out")
    if distill == "kd" and options["beta"]:
        raise UserError("--beta does nothing in --distill kd: leave it out")
    if distill != "kd" and options["beta"] == 0:
        raise UserError(f"--beta 0 leaves nothing of --distill {distill}: leave it out, or give --distill kd")
    if options["alpha"] == 0:
        if distill == "kd":
            raise UserError("--alpha 0 leaves nothing to distil: leave it out")
        if options["kd_warmup_iters"]:
            raise UserError("--kd_warmup_iters has no KD term to act on: leave it out, or add --alpha")
        options["kd_warmup_iters"] = 0
    elif options["kd_warmup_iters"] is None:
        options["kd_warmup_iters"] = options["warmup_iters"]
    if options["model_s"].startswith("retinanet"):
        _check_without_proposals(options, distiller)


def _check_alone(options: dict[str, Any]) -> None:
    defaults = {"temperature": "fixed", "alpha": None, "beta": None, "tau_control": "none", "logit_stand": False,
                "kd_T": DetectorOptions.kd_T, "kd_warmup_iters": None}  # fmt: skip
    for key, default in defaults.items():
        if options[key] != default:
            raise UserError(f"--{key} is for distillation: add a teacher with --path-t, or leave it out")
    options["alpha"] = options["beta"] = 0.0
    options["kd_warmup_iters"] = 0


def _check_without_proposals(options: dict[str, Any], distiller: Any) -> None:
    """Raise UserError for options that compare proposals, since a RetinaNet has none."""
    if distiller.needs != "maps" or options["alpha"]:
        usable = [name for name, each in detector_distillers.items() if each.needs == "maps"]
        raise UserError(
            f"{options['model_s']} has no proposals whose predictions could be softened and compared: distil its maps,"
            f" with --distill {', '.join(usable)}, no --temperature and no --alpha"
        )


def _resolve_methods(options: dict[str, Any], names: set[str]) -> None:
    """Fill in the defaults that scale with the number of parts, and remove the options of other methods."""
    parts = -(-options["iterations"] // options["eval_every"])
    taken = [temperature_dict[options["temperature"]], detector_distillers.get(options["distill"])]
    own = {key: declared for taker in taken if taker for key, declared in options_of(taker).items()}
    common = options_of(DetectorOptions).keys()
    print_foreign(names - own.keys() - common, options["distill"], options["temperature"])
    if "lambda_epochs" not in names:
        options["lambda_epochs"] = max(0.001, CURRICULUM / 240 * parts)
    for key, declared in own.items():
        if declared.option.in_proportion and options[key] is None:
            options[key] = scaled_epochs(declared, parts)
        elif options[key] is None and key not in common:
            options[key] = declared.default
    for key in [key for key in options if key not in own and key not in common]:
        del options[key]


def _check_together(options: dict[str, Any]) -> None:
    if options["trials"] > 1:
        raise UserError("--trials is not supported for detectors (a step of one uses the whole device): leave it out")
    if options.get("aug_epoch"):
        raise UserError("--aug_epoch is not supported for detectors (boxes cannot be blended): leave it out")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if options["batch_size"] % processes:
        raise UserError(
            f"--batch_size {options['batch_size']} cannot be shared evenly by {processes} processes: choose a multiple"
        )
    if options["distill"] == "sp" and options["batch_size"] < 2 * processes:
        raise UserError(
            f"--distill sp compares images of one process, and --batch_size {options['batch_size']} gives it one:"
            f" choose {2 * processes} or more"
        )
    if processes > 1 and options["temperature"] == "rlkd":
        raise UserError(
            "--temperature rlkd does not work with several processes (its agent learns from the whole batch, and each"
            " process has other proposals): use one process, or another temperature"
        )
    if options["max_size"] < (longest := max(*options["min_sizes"], options["test_size"])):
        raise UserError(f"--max_size {options['max_size']} is below the short side {longest}: choose a larger one")
    resolve_speed(options)
    resolve_processes(options)


def resolve_pair(options: DetectorOptions, teacher: str) -> DetectorOptions:
    """Return the options with the default weight of the distiller filled in, which may depend on the teacher."""
    if options.beta is not None:
        return options
    published = PAIR_BETA.get((teacher, options.model_s)) if options.distill == "reviewkd" else None
    default = detector_distillers[options.distill].weights[2]
    return replace(options, beta=default if published is None else published)
