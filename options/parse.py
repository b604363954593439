"""Resolve a command line: fill in defaults that depend on other options, and refuse combinations that make no sense.

The flags are declared in flags.py and in the zoo. Hyphens may replace their underscores.
"""

import argparse
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from dataset import FILES, check_dataset, default_image_size
from distiller_zoo import distiller_dict, dkd
from inputs import Declared, UserError, in_proportion, unknown
from models import networks
from models.base import gives_no_more
from models.outside import create_outside, is_outside
from options.flags import (
    LEARNING_RATE,
    LEARNING_RATES,
    PUBLISHED_TEMPERATURES,
    CommonOptions,
    StudentOptions,
    TeacherOptions,
    all_options,
    as_dict,
    as_options,
    own_options,
    student_parser,
    teacher_parser,
)
from options.identity import foreign_options
from options.parser import Parser
from options.plugins import PREFIX, load_plugins
from options.sizes import check_sizes
from temperature import dtkd, temperature_dict
from temperature.ctkd import curriculum_lambda

DECAYS = (150 / 240, 180 / 240, 210 / 240)  # where the published schedule of 240 epochs lowers the learning rate
# Names that other code uses: RepDistiller and CTKD for distillers, mdistiller for ImageNet networks. (mdistiller's
# capitalised names of distillers need no entry, since case is ignored.)
PUBLISHED_NAMES = {
    "similarity": "sp", "attention": "at", "correlation": "cc", "fitnet": "hint", "factor": "ft", "abound": "ab",
    "cat-kd": "cat_kd", "mobilenetv1": "MobileNetV1_Imagenet",
}  # fmt: skip
VARIABLES = {"imagenet": "IMAGENET_DIR", "coco": "COCO_DIR"}  # of data folders; dataset/ reads those of other data sets
DECIDE_DEFAULTS = {"dataset", "model", "model_s", "distill", "temperature", "epochs"}  # on which other defaults depend


def given(parser: Parser, argv: list[str]) -> set[str]:
    """Return the names of the options that a command line sets. Raises UserError for an unknown flag."""
    unset, names = object(), vars(parser.parse_args([]))
    told = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    return {name for name, value in vars(told).items() if value is not unset}


def flags_of(parser: Parser, options: dict[str, Any]) -> list[str]:
    """Return the flags that set options to these values; an empty list if flags cannot.

    They cannot if an option has no flag, has a value that no flag can express, or changes the defaults of others.
    """
    known = vars(parser.parse_args([])).keys() - DECIDE_DEFAULTS
    if not options.keys() <= known or any(value is None or value is False for value in options.values()):
        return []
    flags = []
    for key, value in options.items():
        flags.append("--lr" if key == "learning_rate" else f"--{key}")  # --lr is always used as given
        if isinstance(value, list):
            flags.append(",".join(map(str, value)))
        elif value is not True:
            flags.append(str(value).removesuffix(".0"))
    return flags


def parse_teacher(argv: list[str] | None = None) -> TeacherOptions:
    """Return the checked options of train_teacher.py's command line; see `parse_student`."""
    return _parse(teacher_parser, TeacherOptions, argv)


def parse_student(argv: list[str] | None = None) -> StudentOptions:
    """Return the checked options of train_student.py's command line, with dependent defaults filled in.

    The files of --plugins are loaded first.

    Args:
        argv: the words of the command line; None: those of this process.

    Raises:
        UserError: an unknown flag or name, a number that makes no sense, or a plug-in that cannot be loaded.
    """
    return _parse(student_parser, StudentOptions, argv)


SCRIPTS = {"train_student.py": parse_student, "train_teacher.py": parse_teacher}  # each with the parser of its flags


def _parse(make_parser: Callable[[], Parser], kind: type, argv: list[str] | None) -> Any:
    argv = sys.argv[1:] if argv is None else argv
    load_plugins(argv)
    parser = make_parser()
    options = vars(parser.parse_args(argv))
    check_dataset(options["dataset"])
    options["data_dir"] = data_dir_of(options["dataset"], options["data_dir"])
    if options["image_size"] is None:
        options["image_size"] = default_image_size(options["dataset"])
    check_declared(options, all_options())
    all_options()["learning_rate"].option.check("lr", options["lr"])
    known = networks(options["dataset"])
    for key in ("model", "model_s", "model_t"):
        if options.get(key) is not None:
            options[key] = _network(key, options[key], known)
    if "model_s" in options:
        _resolve_student(options)
        foreign = foreign_options(options["distill"], options["temperature"])
        print_foreign(given(parser, argv) & foreign, options["distill"], options["temperature"])
    _resolve_schedule(options)
    _check_together(options)
    resolve_speed(options)
    resolve_processes(options)
    resolved = as_options(kind, options)
    check_sizes(resolved)
    if "temperature" in options:
        check_temperature(options)
        _check_teacher_weights(options)
    return resolved


def data_dir_of(dataset: str | None, data_dir: str | None) -> str | None:
    """Return the folder of a data set: the given one, or that of its environment variable in VARIABLES."""
    return data_dir or os.environ.get(VARIABLES.get(dataset, ""))


def _check_teacher_weights(options: dict[str, Any]) -> None:
    source = options["teacher_weights"]
    dataset = {"torchvision": "imagenet", "hub": "cifar100"}.get(source)
    if source and (options["dataset"] != dataset or not options["model_t"] or options["path_t"]):
        raise UserError(
            f"--teacher_weights {source} downloads weights of --model_t for {dataset}: give that and --dataset"
            f" {dataset}, and leave --path-t out"
        )


def resolve_processes(options: dict[str, Any]) -> None:
    """Raise UserError for options that do not work with several processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if options["trials"] > 1:
        raise UserError("--trials trains side by side in one process: leave it out if several processes train together")
    if options["sync_bn"] and (options["device"] == "cpu" or not torch.cuda.is_available()):
        raise UserError("--sync_bn works on GPUs only: leave it out")


def resolve_speed(options: dict[str, Any]) -> None:
    """Fill in the options of the teacher's cache (--teacher_table); raise UserError for those that --plain forbids."""
    if "teacher_table" in options:
        _resolve_table(options)
    if options["plain"]:
        for key, value in (("teacher_table", False), ("precision", "fp32"), ("trials", 1)):
            if options.get(key, value) != value:
                raise UserError(f"--plain turns off everything that is for speed: leave it out, or --{key}")


def _resolve_table(options: dict[str, Any]) -> None:
    options["teacher_table"] = options["teacher_table"] or options["fill_teacher_table"]
    if options["teacher_table"] and distiller_dict[options["distill"]].needs == "maps":
        usable = ", ".join(name for name, distiller in distiller_dict.items() if distiller.needs != "maps")
        raise UserError(
            f"--distill {options['distill']} needs the teacher's maps, which no table holds: leave --teacher_table out"
            f" (it goes with {usable})"
        )
    if options["teacher_table"] and options["dataset"] == "imagenet":
        raise UserError("--dataset imagenet crops an image in too many ways for a table: leave --teacher_table out")
    for key, default in (("table_dtype", "float32"), ("table_dir", None)):
        if not options["teacher_table"] and options[key] != default:
            raise UserError(f"--{key} belongs to --teacher_table: add that, or leave it out")
    in_table = "fp32" if options["precision"] == "bf16" else options["precision"]
    options["teacher_precision"] = in_table if options["teacher_table"] else options["precision"]


def _network(key: str, name: str, known: Iterable[str]) -> str:
    """Return the canonical name of a network of the zoo or of another library. Raises UserError if it is unknown."""
    if not is_outside(name):
        return known_name("model", name, known)
    if name.startswith("hf:") and key != "model_t":
        raise UserError(f"--{key} {name}: networks of Hugging Face can only teach, with --model_t {name}; a network of"
                        " timm, timm:NAME, can be trained")  # fmt: skip
    with torch.device("meta"):
        if name.startswith("timm:"):
            create_outside(name, 1)  # raises its errors before any work
    return name


def known_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return this project's name for a network or distiller, given that or a published name. Raises UserError."""
    named = {other.lower(): other for other in known}
    found = name if name in known else named.get(PUBLISHED_NAMES.get(name.lower(), name).lower())
    if found is not None:
        return found
    if kind == "distiller" and name.lower() == "dtkd":
        raise UserError(f"--distill {name} is a temperature here: give --temperature dtkd instead")
    raise unknown(kind, name, known)


def print_foreign(names: set[str], distill: str, temperature: str) -> None:
    """Print that given options belong to methods that the run does not use; published scripts set some of these."""
    if names:
        flags = ", ".join(f"--{name}" for name in sorted(names))
        print(f"note: without effect under --distill {distill} and --temperature {temperature}: {flags}")


def _resolve_student(options: dict[str, Any]) -> None:
    options["distill"] = known_name("distiller", options["distill"], distiller_dict)
    published = PUBLISHED_TEMPERATURES[options.pop("mlp_name", "global")] if options.pop("have_mlp", 0) else None
    options.pop("mlp_name", None)
    options["temperature"] = options["temperature"] or published or "fixed"
    if options["temperature"] not in temperature_dict:
        raise unknown("temperature", options["temperature"], temperature_dict)
    distiller = distiller_dict[options["distill"]]
    gamma = distiller.weights[0]
    is_own = distiller.__module__.startswith(PREFIX)
    is_published = options["distill"] != "kd" and not is_own
    if options["gamma"] is None and options["alpha"] == 0 and gamma and gamma < 1 and is_published:
        print(f"note: the cross entropy's weight is {gamma:g}, as in CTKD; RepDistiller's commands leave"
              " -r out and mean -r 1")  # fmt: skip
    own = temperature_dict[options["temperature"]].weights if options["distill"] == "kd" else None
    weights = (*own, 0.0) if own else distiller.weights
    has_policy = options["temperature"] != "fixed" or options["logit_stand"]
    if weights[1] == 0 and has_policy and not distiller.uses_tau:
        weights = (weights[0], distiller_dict["kd"].weights[1], weights[2])  # so that tau acts on something
    for key, default in zip(("gamma", "alpha", "beta"), weights, strict=True):
        if options[key] is None and not (key == "beta" and distiller.pair_beta):  # which `resolve_pair` fills in
            options[key] = default
    if options["dkd_weights"] != "ctkd" and options["distill"] != "dkd":
        raise UserError("--dkd_weights belongs to --distill dkd: leave it out, or add --distill dkd")
    if options["beta"] and distiller.weights[2] == 0 and distiller.has_first_stage:
        print(f"note: --beta {options['beta']:g} has no effect, as in RepDistiller: the loss of --distill"
              f" {options['distill']} belongs to the first stage only")  # fmt: skip
        options["beta"] = 0.0
    elif options["beta"] and distiller.weights[2] == 0:
        raise UserError(f"--beta {options['beta']:g} does nothing in --distill {options['distill']}: give -b 0")
    if options["beta"] == 0 and distiller.weights[2] != 0:
        is_fixed = distiller.weights[2] is not None and not distiller.pair_beta
        default = f" for {distiller.weights[2]:g}, its default" if is_fixed else ""
        raise UserError(
            f"--beta 0 leaves nothing of --distill {options['distill']}: leave -b out{default}, or give --distill kd"
        )
    if options["alpha"] == 0 and has_policy and not distiller.uses_tau:
        if options["temperature"] == "fixed":
            policy, instead = "--logit_stand", "leave --logit_stand out"
        else:
            policy, instead = f"--temperature {options['temperature']}", "--temperature fixed"
        declares = " (a plug-in whose loss uses tau declares uses_tau = True)" if is_own else ""
        raise UserError(
            f"--alpha 0 leaves {policy} nothing to act on, since --distill {options['distill']} does not use"
            f" tau{declares}: give --alpha 0.9, or {instead}"
        )


def resolve_pair(given: StudentOptions, teacher: str) -> StudentOptions:
    """Return the options with those that depend on the teacher filled in, such as loss weights and warm-ups.

    Raises:
        UserError: the distiller does not support the pair or a network of another library, --dkd_weights mdistiller for
            a pair without published weights, or a KD warm-up without a KD term.
    """
    pair, options = (teacher, given.model_s), as_dict(given)
    distiller, temperature = distiller_dict[given.distill], temperature_dict[given.temperature]
    _check_parts(given.distill, pair, given.dataset)
    common = {"beta": distiller.pair_beta.get(pair, distiller.weights[2]), "fixed_alpha": 0.0, "kd_warmup": 0}
    for defaults in (distiller.complete(options, pair), temperature.complete(options, pair), common):
        options |= {key: value for key, value in defaults.items() if options[key] is None}
    if options["kd_warmup"] and options["alpha"] == options["fixed_alpha"] == 0:
        raise UserError(
            f"--kd_warmup {options['kd_warmup']} has no KD term to act on: leave it out"
            + (", --dkd_warmup is DKD's" if options["distill"] == "dkd" else "")
        )
    return as_options(StudentOptions, options)


def _check_parts(distill: str, pair: tuple[str, str], dataset: str) -> None:
    """Raise UserError if a distiller needs parts of the networks' outputs that one of them cannot give."""
    distiller = distiller_dict[distill]
    of_both = {*distiller.also, *distiller.first_also}
    for name, parts in zip(pair, (of_both | {*distiller.teacher_also}, of_both), strict=True):
        if not parts:
            continue
        if is_outside(name):
            raise gives_no_more(name, parts, advice="")
        maker = networks(dataset).get(name)
        network = getattr(maker, "func", maker)  # the class in a partial; for other functions this is found out later
        if inspect.isclass(network) and not network.defines_trace():
            raise gives_no_more(name, parts)


def check_declared(options: dict[str, Any], known: dict[str, Declared]) -> None:
    """Bring each option to its canonical form. Raises UserError for a value that its declaration does not accept."""
    for key, declared in known.items():
        if key in options:
            if declared.option.normal and options[key] is not None:
                try:
                    options[key] = declared.option.normal(options[key])
                except UserError as error:
                    raise UserError(f"--{key}: {error}") from error
            declared.option.check(key, options[key])


def check_temperature(options: dict[str, Any]) -> None:
    """Raise UserError for options that the run's temperature refuses, or that have no meaning with it."""
    if options["logit_stand"] and options["temperature"] == "standardised":
        raise UserError("--temperature standardised is on z-scored logits already: leave --logit_stand out")
    if options["tau_control"] != "none" and options["temperature"] == "fixed" and not options["logit_stand"]:
        raise UserError("--tau_control is for a --temperature that differs from sample to sample: leave it out")
    factory = temperature_dict[options["temperature"]]
    known = {key: value for key, value in options.items() if value is not None}
    factory(**kwargs_for(factory, known | {"num_classes": 1, "train_target": torch.zeros(1)}))


def scaled_epochs(declared: Declared, epochs: int) -> int:
    """Return the default of an option that counts epochs, published for 240, scaled to a run of `epochs` epochs."""
    return max(1, in_proportion(declared.default, epochs))


def _resolve_schedule(options: dict[str, Any]) -> None:
    model = options.get("model_s") or options["model"]
    exact, asked = options.pop("lr"), options["learning_rate"]
    options["learning_rate"] = (
        exact if exact is not None else LEARNING_RATES.get(model, LEARNING_RATE if asked is None else asked)
    )
    if exact is None and asked is not None and options["learning_rate"] != asked:
        print(f"note: learning rate {options['learning_rate']} instead of {asked}, the published rule for {model};"
              f" --lr {asked} is always used as given")  # fmt: skip
    for key, declared in all_options().items():
        if declared.option.in_proportion and key in options and options[key] is None:
            options[key] = scaled_epochs(declared, options["epochs"])
    if options["lr_decay_epochs"] is None:
        options["lr_decay_epochs"] = _decays(options["epochs"])
    elif repeated := [epoch for epoch, count in Counter(options["lr_decay_epochs"]).items() if count > 1]:
        print(f"note: --lr_decay_epochs names epoch {repeated[0]} more than once, so the rate drops as often there")


def _decays(epochs: int) -> list[int]:
    """Return the published milestones scaled to a run's length; those that coincide count once."""
    return sorted({round(share * epochs) for share in DECAYS})


def proportions_in_words(given: CommonOptions) -> str | None:
    """Return a text on the settings that a run of fewer than 240 epochs scales or keeps; None if there is none."""
    options = as_dict(given)
    epochs, temperature = options["epochs"], options.get("temperature")
    scaled, kept = [], []
    if options["lr_decay_epochs"] == _decays(epochs):
        scaled.append(f"the learning rate's drops, after {_listed(options['lr_decay_epochs'])} (--lr_decay_epochs)")
    for key, name, published in (("kd_warmup", "KD", dtkd.WARMUP), ("dkd_warmup", "DKD", dkd.WARMUP)):
        if (warmup := options.get(key)) and (key == "kd_warmup" or options["distill"] == "dkd"):
            reached = f", which reaches {epochs / warmup:.0%} of the weight" if warmup > epochs else ""
            is_scaled = warmup == in_proportion(published, epochs)
            (scaled if is_scaled else kept).append(f"{name}'s warm-up over {warmup} epochs{reached} (--{key})")
    left = in_proportion(dtkd.WARMUP, epochs)  # epochs of warm-up; a given 0 is in proportion only if this is 0
    if temperature == "dtkd" and options["distill"] == "kd" and options["kd_warmup"] == left == 0:
        scaled.append("KD's warm-up, of which nothing is left (--kd_warmup)")
    own = own_options(options.get("distill"), temperature)
    phases = {
        key: scaled_epochs(declared, options["epochs"])
        for key, declared in own.items()
        if declared.option.in_proportion
    }
    if phases and all(options[key] == length for key, length in phases.items()):
        lengths = _listed(sorted(set(phases.values())))
        scaled.append(f"the phases' lengths in epochs, {lengths} ({', '.join(f'--{key}' for key in phases)})")
    if temperature in ("ctkd-global", "ctkd-instance"):
        curriculum = (options[key] for key in ("curriculum", "lambda_min", "lambda_max", "lambda_epochs"))
        reached = curriculum_lambda(epochs, *curriculum)
        rise = f"over {options['lambda_epochs']:g} epochs, here to {reached:.2g}"
        kept.append(f"lambda's rise {rise} (--lambda_epochs)")
    told = [f"{how}: {'; '.join(what)}" for how, what in (("in proportion", scaled), ("not", kept)) if what]
    return f"{epochs} epoch{'s' * (epochs > 1)} instead of 240; {'; '.join(told)}" if told and epochs < 240 else None


def _listed(numbers: list[int]) -> str:
    return " and ".join(", ".join(map(str, numbers)).rsplit(", ", 1))


def _check_files(options: dict[str, Any]) -> None:
    """Raise UserError for flags that only apply to data sets of image files."""
    for key in ("exif", "skip_unreadable"):
        if options[key] and options["dataset"] not in FILES:
            raise UserError(f"--{key} is for sets of image files ({', '.join(FILES)}): leave it out")


def _check_mixing(options: dict[str, Any]) -> None:
    """Raise UserError for methods that do not work with mixed images."""
    mixes = [key for key in ("mixup", "cutmix") if options[key]]
    if not mixes or "distill" not in options:
        return
    if options["teacher_table"]:
        raise UserError(f"--{mixes[0]} mixes images in too many ways for a table: leave --teacher_table out")
    for key, registry in (("distill", distiller_dict), ("temperature", temperature_dict)):
        if registry[options[key]].uses_target:
            raise UserError(f"--{key} {options[key]} needs one class for each image: leave --{mixes[0]} out")


def _check_together(options: dict[str, Any]) -> None:
    """Raise UserError for combinations of options that make no sense."""
    _check_files(options)
    _check_mixing(options)
    if options["seed"] + options["trials"] > 2**63:
        raise UserError(f"the seeds of --trials must be below 2^63 as well, not from {options['seed']} on")
    curriculum = ("lambda_epochs",) if str(options.get("temperature")).startswith("ctkd") else ()
    for key in ("kd_warmup", "dkd_warmup", f"{options.get('distill')}_warmup", *curriculum):
        if (options.get(key) or 0) > 100 * options["epochs"]:
            raise UserError(
                f"--{key} {options[key]:g} is more than a hundred times --epochs {options['epochs']}, so what grows"
                " over it would stay practically zero: choose less, or more epochs"
            )
    if options.get("distill") == "dkd" and options["dkd_alpha"] == options["dkd_beta"] == 0:
        raise UserError("--dkd_alpha and --dkd_beta are both 0, so nothing would be left of DKD: give one of them")
    is_plain = "alpha" in options and options["alpha"] == options["beta"] == (options["fixed_alpha"] or 0) == 0
    if is_plain and not distiller_dict[options["distill"]].has_first_stage:
        raise UserError("--alpha and --beta are both 0, so nothing would be distilled: train_teacher.py trains alone")


def kwargs_for(factory: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are arguments of a function, or of the constructor of a class or of its parents."""
    functions = [cls.__init__ for cls in inspect.getmro(factory)] if inspect.isclass(factory) else [factory]
    names = {name for function in functions for name in inspect.signature(function).parameters}
    return {key: value for key, value in options.items() if key in names}


def run_folder(options: CommonOptions, kind: str, group: str, name: str) -> Path:
    """Return a run's folder: --run_dir, or save/<kind>/<experiments_dir>/<experiments_name> with defaults for both."""
    if options.run_dir:
        return Path(options.run_dir)
    return Path("save") / kind / (options.experiments_dir or group) / (options.experiments_name or name)
