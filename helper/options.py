"""The command lines: every flag of the published scripts, with a clear name beside each confusing one.

Where a flag has several names the first is ours. A hyphen may stand for each underscore.
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

from dataset import check_dataset, dataset_names
from distiller_zoo import distiller_dict, dkd, dpk
from distiller_zoo.cka import SMALLEST
from helper import distributed
from helper.bounds import check_sizes
from helper.device import PRECISIONS
from helper.errors import Parser, UserError
from inputs import BOUNDS, check_numbers, unknown
from models import networks
from temperature import annealing, dtkd, policy, rlkd, temperature_dict
from temperature.ctkd import CURRICULA, curriculum_lambda

# The published scripts give these networks a learning rate of their own, whatever --learning_rate says.
LEARNING_RATES = {"MobileNetV2": 0.01, "ShuffleV1": 0.01, "ShuffleV2": 0.01}
LEARNING_RATE = 0.05
DECAYS = (150 / 240, 180 / 240, 210 / 240)  # where the published schedule of 240 epochs lowers the learning rate
MOST_GIVEN = 0.99  # of DPK's patches, where the share is fixed
PUBLISHED_TEMPERATURES = {"global": "ctkd-global", "instance": "ctkd-instance"}  # --mlp_name
# What other codes call what is here: RepDistiller and CTKD a distiller, mdistiller a network for ImageNet. (mdistiller
# writes its distillers in capitals, which are taken too.)
PUBLISHED_NAMES = {"similarity": "sp", "mobilenetv1": "MobileNetV1_Imagenet"}
NOT_HERE = {  # distillers by the names that RepDistiller and mdistiller give them
    "hint": "FitNet", "fitnet": "FitNet", "attention": "AT", "at": "AT", "correlation": "CC", "rkd": "RKD",
    "abound": "AB", "factor": "FT", "fsp": "FSP", "nst": "NST", "kdsvd": "KDSVD", "ofd": "OFD",
    "reviewkd": "ReviewKD", "mlkd": "MLKD",
}  # fmt: skip
DECIDE_DEFAULTS = {"dataset", "model", "model_s", "distill", "temperature", "epochs"}  # of other options


class _Help(argparse.HelpFormatter):
    """Shows a flag's type, and its default where that says something."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return action.type.__name__ if action.type else "TEXT"

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default in (None, False, "", argparse.SUPPRESS) or "(default" in action.help
        return action.help if silent else f"{action.help} (default: {action.default})"


def _parser(description: str) -> Parser:
    usage = "%(prog)s [flags]; a hyphen may stand for each underscore"
    return Parser(usage=usage, description=description, allow_abbrev=False, formatter_class=_Help)


def _add_common(parser: Parser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="cifar100", metavar="NAME",
        help=f"one of: {', '.join(dataset_names)}; folder is any train/ and val/ tree, held in memory; imagenet is"
        " one too, read from its files in every epoch")  # fmt: skip
    add("--data_dir", metavar="DIR", help="where the data is; for cifar100 and imagenet the variables"
        " CIFAR100_DIR and IMAGENET_DIR say it too")  # fmt: skip
    add("--image_size", type=int, help="side of the square images, in pixels (default: 224 of imagenet, else 32;"
        " cifar100 and digits have no other)")  # fmt: skip
    add("--train_subset", type=int, default=0, metavar="N", help="train on N images only; 0 is all of them")
    add("--num_workers", type=int, default=2, help="processes that decode the images of folder and"
        " imagenet, for each process that trains")  # fmt: skip

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=int, default=240, help="length of the schedule")
    add("--batch_size", type=int, default=64, help="images a step")
    add("--lr", type=float, metavar="LR", help="learning rate, exactly as given; wins over --learning_rate")
    add("--learning_rate", type=float, metavar="LR",
        help=f"the same, but as published {', '.join(LEARNING_RATES)} get 0.01 (default: {LEARNING_RATE})")  # fmt: skip
    add("--lr_decay_epochs", metavar="E,E", help="the epochs after which the learning rate drops"
        " (default: 150,180,210 of 240, in proportion to --epochs; those that coincide are one)")  # fmt: skip
    add("--lr_decay_rate", type=float, default=0.1, help="what it is multiplied with there")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--weight_decay", type=float, default=5e-4, help="of SGD, for all that learns")

    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=1, help="of weights, order and augmentation; logged")
    add("--trials", type=int, default=1, metavar="N", help="train N seeds, from --seed on, side by side in one process;"
        " each is a run as if alone")  # fmt: skip
    add("--trial", "-t", default="", help="a label of your own, kept in config.json")
    add("--experiments_dir", metavar="DIR", help="folder of related runs, below save/")
    add("--experiments_name", metavar="NAME", help="name of this run in it")
    add("--run_dir", metavar="DIR", help="the run's folder itself, instead of the two above")
    add("--overwrite", action="store_true", help="replace the run that is in this folder")
    add("--dry_run", action="store_true", help="say what would be done, and stop")
    add("--print_freq", type=int, default=50, help="steps between two updates of the progress bar")
    add("--save_model", action="store_true", help="accepted; weights are always saved")

    add = parser.add_argument_group("device").add_argument
    add("--precision", choices=PRECISIONS, default="fp32", help="what the networks compute in; losses, temperatures"
        " and weights are in fp32; tf32: the convolutions of a GPU as PyTorch's default has them")  # fmt: skip
    add("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    add("--gpu_id", help="the GPU, or one for each of several processes, like 0,1 (default: the first, or all of them)")
    add("--deterministic", action="store_true", help="use only algorithms that repeat bit by bit on a GPU too")
    add("--plain", action="store_true", help="do without all that is only for speed (see README), to check it")
    add("--dali", choices=("cpu", "gpu"), help="accepted; small sets are held on the device, DALI is not needed")
    add = parser.add_argument_group("several processes", "also started by torchrun, on one machine or many; each has a"
        " share of every batch").add_argument  # fmt: skip
    add("--multiprocessing_distributed", action="store_true", help="start a process for each GPU of --gpu_id, or for"
        " each there is; with --device cpu for each number of --gpu_id")  # fmt: skip
    add("--dist_url", help="where these meet, like tcp://127.0.0.1:23451 (default: at a free port)")
    add("--dist_timeout", type=float, default=600.0, help="seconds after which a process gives up on another")
    add("--sync_bn", action="store_true", help="batch norms of the network that learns see the whole batch, not a"
        " process's share; on GPUs")  # fmt: skip


def teacher_parser() -> Parser:
    """The parser of train_teacher.py."""
    parser = _parser("Train a network alone, by the vanilla recipe: a teacher, or a student to compare with.")
    add = parser.add_argument_group("network").add_argument
    add("--model", default="resnet110", metavar="NAME", help=f"one of: {', '.join(networks())}")
    add("--save_freq", type=int, default=0, help="also keep ckpt_epoch_<n>.pth every so many epochs; 0: only the last")
    _add_common(parser)
    return parser


def student_parser() -> Parser:
    """The parser of train_student.py."""
    parser = _parser("Distil a teacher into a student: any temperature with any distiller and any pair of networks.")
    add = parser.add_argument_group("networks").add_argument
    add("--model_s", default="resnet8", metavar="NAME", help=f"the student, one of: {', '.join(networks())}")
    add("--model_t", metavar="NAME", help="the teacher; needless where its weights or its folder's name tell")
    add("--path_t", metavar="FILE", help="the teacher's weights, or its folder (default: that of --model_t)")
    add("--teacher_weights", choices=("torchvision",), help="download torchvision's weights for --model_t, where there"
        " is a network; elsewhere give their file as --path-t")  # fmt: skip
    add("--train_teacher", action="store_true", help="train the teacher by the vanilla recipe if it is missing")
    add("--skip_validation", action="store_true", help="do not measure the teacher before distilling")
    add("--teacher_table", action="store_true", help="keep the teacher's answers to every view of every image, for"
        " later epochs and runs; for distillers that need no maps")  # fmt: skip
    add("--fill_teacher_table", action="store_true", help="the same, and ask for all of them before the first epoch")
    add("--table_dtype", choices=("float32", "float16"), default="float32", help="of the answers in the table")
    add("--table_dir", metavar="DIR", help="where tables are (default: teacher_table/ beside the teacher's weights)")
    _add_distillation(parser)
    _add_dpk(parser)
    _add_temperature(parser)
    _add_common(parser)
    return parser


def _add_distillation(parser: Parser) -> None:
    add = parser.add_argument_group(
        "distillation",
        "loss = gamma * cross entropy + warm-up * (alpha * KD + fixed_alpha * KD at kd_T)"
        " + beta * what the distiller compares",
    ).add_argument
    add("--distill", default="kd", metavar="NAME", help=f"one of: {', '.join(distiller_dict)}")
    add("--gamma", "-r", type=float, help="weight of the cross entropy (default: the distiller's own)")
    add("--alpha", "-a", type=float, help="weight of the KD term (default: the distiller's own)")
    add("--fixed_alpha", type=float, help="weight of a further KD term, at the fixed temperature kd_T (default: 0; with"
        " --temperature dtkd and --distill kd DTKD's beta)")  # fmt: skip
    add("--kd_warmup", type=int, help="epochs over which both KD terms grow to their full weight (default: 0; with"
        f" --temperature dtkd and --distill kd {dtkd.WARMUP} of 240)")  # fmt: skip
    add("--beta", "-b", type=float, help="weight of the distiller's term (default: the distiller's own)")
    add("--dkd_alpha", type=float, default=1.0, help="DKD: weight of the target class's part")
    add("--dkd_beta", type=float, help="DKD: weight of the other classes' part (default: 2)")
    add("--dkd_warmup", type=int, help="DKD: epochs over which the loss grows to its full weight (default: 0)")
    add("--dkd_weights", choices=("ctkd", "mdistiller"), default="ctkd",
        help=f"DKD: mdistiller's are a beta for each pair, and a warm-up of {dkd.WARMUP} in 240 epochs")  # fmt: skip
    add("--feat_dim", type=int, default=128, help="CRD: length of an embedding")
    add("--nce_k", type=int, default=16384, help="CRD: negatives an image")
    add("--nce_t", type=float, default=0.07, help="CRD: temperature of the contrast")
    add("--nce_m", type=float, default=0.5, help="CRD: how much of itself a memory keeps when it is renewed")
    add("--mode", choices=("exact", "relax"), default="exact", help="CRD: the positive is the image itself,"
        " or any of its class")  # fmt: skip
    add("--hint_layer", type=int, default=2, help="of --distill hint, which is not available yet")


def _add_dpk(parser: Parser) -> None:
    add = parser.add_argument_group("DPK", "its settings were never published: see distiller_zoo/dpk.py").add_argument
    add("--dpk_stages", type=int, default=2, help="how many of the student's last stages; 0, or more than it has: all")
    add("--dpk_patch", type=int, default=1, help="side of a patch, in positions of the map")
    add("--dpk_width", type=int, help=f"channels of encodings (default: the narrower map's, {dpk.MAX_WIDTH} at most)")
    add("--dpk_encoder_depth", type=int, default=1, help="residual blocks of each encoder")
    add("--dpk_decoder_depth", type=int, default=2, help="residual blocks of the decoder")
    add("--dpk_mask", choices=dpk.MASKS, default="sample", help="a mask for each sample, or one for a batch")
    add("--dpk_schedule", default="dynamic", metavar="NAME", help="the teacher's share of the patches: dynamic"
        " (1 - CKA), fixed:<ratio> like fixed:0.5, or linear (from 1 to 0 over the epochs)")  # fmt: skip
    add("--dpk_momentum", type=float, default=0.9, help="how much of the smoothed HSIC, which CKA is made of, is kept")


def _add_temperature(parser: Parser) -> None:
    add = parser.add_argument_group("temperature").add_argument
    add("--temperature", metavar="NAME", help=f"one of: {', '.join(temperature_dict)} (default: fixed)")
    add("--kd_T", type=float, default=4.0, help="the temperature if fixed, DTKD's reference, and RLKD's before its"
        " agent acts")  # fmt: skip
    add("--logit_stand", action="store_true", help="show the temperature z-scored logits, and let its tau act on them"
        " (a KD term at kd_T stays on plain ones)")  # fmt: skip
    add("--tau_init", "--t_start", type=float, default=1.0, help="CTKD: lower bound of tau")
    add("--tau_range", "--t_end", type=float, default=20.0, help="CTKD: tau stays below tau_init + tau_range")
    add("--curriculum", metavar="NAME", default="cosine", help=f"CTKD: how lambda rises: {', '.join(CURRICULA)}")
    add("--lambda_min", type=float, default=0.0, help="CTKD: lambda at epoch 0")
    add("--lambda_max", type=float, default=1.0, help="CTKD: lambda from epoch lambda_epochs on")
    add("--lambda_epochs", "--decay_loops", type=float, default=10.0, help="CTKD: when lambda has risen")
    add("--instance_width", type=int, default=128, help="CTKD instance-wise: hidden units (our choice)")
    add("--dtkd_detach", action="store_true", help="DTKD: no gradient through the student's largest logit")
    scaled = f"(default: {policy.PHASE} of 240, in proportion to --epochs)"
    add("--rl_warmup", type=int, help=f"RLKD, random: the epoch in which they begin to set tau {scaled}")
    add("--rl_epoch", type=int, help=f"RLKD: it learns in every so many-th epoch {scaled}")
    add("--aug_epoch", type=int, help=f"RLKD, random: every so many-th epoch mixes images; 0 for none {scaled}")
    add("--rl_rollout", type=int, default=16, help="RLKD: batches an update of the agent (our choice)")
    add("--rl_calibration", choices=rlkd.CALIBRATIONS, default="even", help="RLKD: how a batch's reward is spread over"
        " its samples; learned drifts to a bound of tau (see temperature/rlkd.py)")  # fmt: skip
    add("--rl_max_kl", type=float, default=rlkd.MAX_KL, help="RLKD: how far an update may move the policy, as a KL"
        " divergence; 0 for no limit (our choice)")  # fmt: skip
    add("--rl_tau_min", type=float, default=1.0, help="RLKD, random: lower bound of tau")
    add("--rl_tau_max", type=float, default=10.0, help="RLKD, random: upper bound of tau")
    add("--random_mean", type=float, default=0.0, help="random: mean of the actions; tau is their sigmoid, from"
        " rl_tau_min to rl_tau_max")  # fmt: skip
    add("--random_std", type=float, default=policy.ACTION_STD, help="random: standard deviation of the actions")
    add("--anneal_from", type=float, default=7.0, help="annealing: tau in the first epoch")
    add("--anneal_to", type=float, default=1.0, help="annealing: tau in the last epoch")
    add("--anneal_shape", metavar="NAME", default="linear", help=f"annealing: {' or '.join(annealing.SHAPES)}")
    add("--base_tau", type=float, default=2.0, help="standardised: the temperature on z-scored logits")
    _add_published_temperature(parser)


def _add_published_temperature(parser: Parser) -> None:
    add = parser.add_argument_group("temperature, as published").add_argument
    none = argparse.SUPPRESS  # no default of their own: they set the options above
    add("--have_mlp", type=int, choices=(0, 1), default=none, help="1: --temperature ctkd-<mlp_name>, if not given")
    add("--mlp_name", choices=tuple(PUBLISHED_TEMPERATURES), default=none, help="see --have_mlp")
    add(
        "--cosine_decay",
        type=_curriculum,
        dest="curriculum",
        metavar="{0,1}",
        default=none,
        help="1: --curriculum cosine, 0: linear",
    )
    add(
        "--decay_max",
        type=_negated,
        dest="lambda_min",
        metavar="float",
        default=none,
        help="--lambda_min, with a minus",
    )
    add(
        "--decay_min",
        type=_negated,
        dest="lambda_max",
        metavar="float",
        default=none,
        help="--lambda_max, with a minus",
    )


def _negated(text: str) -> float:
    return 0.0 - float(text)  # the published lambda runs from 0 to -1; ours is positive, and 0 has no sign


def _curriculum(text: str) -> str:
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError("give 1 for the cosine curriculum, 0 for the linear one")
    return "cosine" if text == "1" else "linear"


def given(parser: Parser, argv: list[str]) -> set[str]:
    """The names of the options that a command line sets. Raises UserError for an unknown flag."""
    unset, names = object(), vars(parser.parse_args([]))
    told = parser.parse_args([_underscored(word) for word in argv], argparse.Namespace(**dict.fromkeys(names, unset)))
    return {name for name, value in vars(told).items() if value is not unset}


def flags_of(parser: Parser, options: dict[str, Any]) -> list[str]:
    """The flags of a command line that give options these values; none where one is no flag, is left out to have its
    value, or decides what others are by default."""
    known = vars(parser.parse_args([])).keys() - DECIDE_DEFAULTS
    if not options.keys() <= known or any(value is None or value is False for value in options.values()):
        return []
    flags = []
    for key, value in options.items():
        flags.append("--lr" if key == "learning_rate" else f"--{key}")  # which is taken exactly as given
        if isinstance(value, list):
            flags.append(",".join(map(str, value)))
        elif value is not True:
            flags.append(str(value).removesuffix(".0"))
    return flags


def parse(parser: Parser, argv: list[str] | None = None) -> dict[str, Any]:
    """The resolved options of a command line: checked, and with every default that depends on another filled in.

    Raises:
        UserError: an unknown flag or name, or a number without sense.
    """
    argv = sys.argv[1:] if argv is None else argv
    options = vars(parser.parse_args([_underscored(word) for word in argv]))
    check_dataset(options["dataset"])
    if options["dataset"] == "imagenet" and options["data_dir"] is None:
        options["data_dir"] = os.environ.get("IMAGENET_DIR")
    if options["image_size"] is None:
        options["image_size"] = 224 if options["dataset"] == "imagenet" else 32
    check_numbers(options, [key for key in BOUNDS if key != "lr_decay_epochs"])
    check_numbers({"learning_rate": options["lr"]})
    known = networks(options["dataset"])
    for key in ("model", "model_s", "model_t"):
        if options.get(key) is not None:
            options[key] = _known("model", options[key], known)
    if "model_s" in options:
        _resolve_student(options)
    _resolve_schedule(options)
    _check_together(options)
    check_sizes(options)
    _resolve_speed(options)
    _resolve_processes(options)
    if "temperature" in options:  # their own checks, before any work is done
        factory = temperature_dict[options["temperature"]]
        factory(**kwargs_for(factory, options | {"num_classes": 1, "train_target": torch.zeros(1)}))
        _resolve_dpk(options)
        _check_teacher_weights(options)
    return options


def _check_teacher_weights(options: dict[str, Any]) -> None:
    if options["teacher_weights"] and (options["dataset"] != "imagenet" or not options["model_t"] or options["path_t"]):
        raise UserError(
            "--teacher_weights torchvision downloads ImageNet's weights of --model_t: give that and --dataset imagenet,"
            " and leave --path-t out"
        )


def _resolve_processes(options: dict[str, Any]) -> None:
    if distributed.env_world_size() == 1:
        return
    if options["trials"] > 1:
        raise UserError("--trials trains side by side in one process: leave it out where several train together")
    if options["sync_bn"] and (options["device"] == "cpu" or not torch.cuda.is_available()):
        raise UserError("--sync_bn works on GPUs only: leave it out")


def _resolve_speed(options: dict[str, Any]) -> None:
    if "teacher_table" in options:
        _resolve_table(options)
    if options["plain"]:
        for key, value in (("teacher_table", False), ("precision", "fp32"), ("trials", 1)):
            if options.get(key, value) != value:
                raise UserError(f"--plain does without all that is for speed: leave it out, or --{key}")


def _resolve_table(options: dict[str, Any]) -> None:
    options["teacher_table"] = options["teacher_table"] or options["fill_teacher_table"]
    if options["teacher_table"] and distiller_dict[options["distill"]].needs == "maps":
        usable = ", ".join(name for name, distiller in distiller_dict.items() if distiller.needs != "maps")
        raise UserError(
            f"--distill {options['distill']} needs the teacher's maps, which no table holds: leave --teacher_table out"
            f" (it goes with {usable})"
        )
    if options["teacher_table"] and options["dataset"] == "imagenet":
        raise UserError("--dataset imagenet cuts an image in too many ways for a table: leave --teacher_table out")
    for key, default in (("table_dtype", "float32"), ("table_dir", None)):
        if not options["teacher_table"] and options[key] != default:
            raise UserError(f"--{key} belongs to --teacher_table: add that, or leave it out")
    in_table = "fp32" if options["precision"] == "bf16" else options["precision"]
    options["teacher_precision"] = in_table if options["teacher_table"] else options["precision"]


def _underscored(word: str) -> str:
    """`--path-t` as `--path_t`; values keep their hyphens."""
    flag, equals, value = word.partition("=")
    if flag.startswith("--") and value == "--":  # argparse would drop it
        raise UserError(f"{flag} needs a value, and {value} is none")
    return flag[:2] + flag[2:].replace("-", "_") + equals + value if flag.startswith("--") else word


def _known(kind: str, name: str, known: Iterable[str]) -> str:
    """The name that a network or distiller has here, from that or a published one. Raises UserError for any other."""
    named = {other.lower(): other for other in known}
    found = name if name in known else named.get(PUBLISHED_NAMES.get(name.lower(), name).lower())
    if found is not None:
        return found
    if kind == "distiller" and name.lower() == "dtkd":
        raise UserError(f"--distill {name} is a temperature here: give --temperature dtkd instead")
    if kind == "distiller" and name.lower() in NOT_HERE:
        raise UserError(f"--distill {name}, {NOT_HERE[name.lower()]}, is not here yet; there are: {', '.join(known)}")
    raise unknown(kind, name, known)


def _resolve_student(options: dict[str, Any]) -> None:
    options["distill"] = _known("distiller", options["distill"], distiller_dict)
    published = PUBLISHED_TEMPERATURES[options.pop("mlp_name", "global")] if options.pop("have_mlp", 0) else None
    options.pop("mlp_name", None)
    options["temperature"] = options["temperature"] or published or "fixed"
    if options["temperature"] not in temperature_dict:
        raise unknown("temperature", options["temperature"], temperature_dict)
    distiller = distiller_dict[options["distill"]]
    if options["gamma"] is None and options["alpha"] == 0 and options["distill"] not in ("kd", "dkd"):
        print(f"note: the cross entropy's weight is {distiller.weights[0]:g}, as in CTKD; RepDistiller's commands leave"
              " -r out and mean -r 1")  # fmt: skip
    own = temperature_dict[options["temperature"]].weights if options["distill"] == "kd" else None
    weights = (*own, 0.0) if own else distiller.weights
    for key, default in zip(("gamma", "alpha", "beta"), weights, strict=True):
        options[key] = default if options[key] is None else options[key]
    if options["logit_stand"] and options["temperature"] == "standardised":
        raise UserError("--temperature standardised is on z-scored logits already: leave --logit_stand out")
    if options["dkd_weights"] != "ctkd" and options["distill"] != "dkd":
        raise UserError("--dkd_weights belongs to --distill dkd: leave it out, or add --distill dkd")
    if options["beta"] > 0 == distiller.weights[2]:
        raise UserError(f"--beta {options['beta']:g} does nothing in --distill {options['distill']}: give -b 0")
    if options["beta"] == 0 < distiller.weights[2]:
        raise UserError(
            f"--beta 0 leaves nothing of --distill {options['distill']}: leave -b out for {distiller.weights[2]:g},"
            " its default, or give --distill kd"
        )
    if options["alpha"] == 0 and options["temperature"] != "fixed" and not distiller.uses_tau:
        raise UserError(
            f"--alpha 0 leaves --temperature {options['temperature']} nothing to act on, since --distill"
            f" {options['distill']} has no temperature of its own: give --alpha 0.9, or --temperature fixed"
        )


def resolve_pair(options: dict[str, Any], teacher: str) -> dict[str, Any]:
    """The options with all that depends on the teacher filled in: the weights and the warm-up of DKD and DTKD.

    Raises:
        UserError: --dkd_weights mdistiller for a pair without published weights, or a warm-up of nothing.
    """
    if options["distill"] == "dkd":
        options = _resolve_dkd(options, teacher)
    published = options["temperature"] == "dtkd" and options["distill"] == "kd"
    alpha, fixed_alpha = dtkd.PAIR_WEIGHTS.get((teacher, options["model_s"]), dtkd.DEFAULT_WEIGHTS)
    defaults = {
        "alpha": alpha,  # of DTKD with kd only: elsewhere it is known already
        "fixed_alpha": fixed_alpha if published else 0.0,
        "kd_warmup": _in_proportion(dtkd.WARMUP, options) if published else 0,
    }
    options = options | {key: value for key, value in defaults.items() if options[key] is None}
    if options["kd_warmup"] and options["alpha"] == options["fixed_alpha"] == 0:
        raise UserError(
            f"--kd_warmup {options['kd_warmup']} has no KD term to act on: leave it out"
            + (", --dkd_warmup is DKD's" if options["distill"] == "dkd" else "")
        )
    return options


def _in_proportion(epochs: int, options: dict[str, Any]) -> int:
    """So many of the published 240 epochs, in a run of this length."""
    return round(epochs / 240 * options["epochs"])


def _phase(options: dict[str, Any]) -> int:
    return max(1, _in_proportion(policy.PHASE, options))


def _resolve_dkd(options: dict[str, Any], teacher: str) -> dict[str, Any]:
    pair, published = (teacher, options["model_s"]), options["dkd_weights"] == "mdistiller"
    beta, warmup = options["dkd_beta"], options["dkd_warmup"]
    if published and beta is None and pair not in dkd.PAIR_BETA:
        known = ", ".join(f"{t} → {s}" for t, s in dkd.PAIR_BETA)
        raise UserError(
            f"mdistiller has no weight for {' → '.join(pair)}: leave --dkd_weights out for CTKD's, or choose a"
            f" --dkd_beta (mdistiller has those of {known})"
        )
    if beta is None:
        beta = dkd.PAIR_BETA[pair] if published else 2.0
    if warmup is None:
        warmup = _in_proportion(dkd.WARMUP, options) if published else 0
    return options | {"dkd_beta": beta, "dkd_warmup": warmup}


def _resolve_dpk(options: dict[str, Any]) -> None:
    share = dpk.share_schedule(options["dpk_schedule"])
    options["dpk_schedule"] = share if isinstance(share, str) else f"fixed:{share:g}"  # however it was written
    if options["distill"] != "dpk":
        return
    if share == 1 or share == "linear" and options["epochs"] == 1:
        raise UserError(
            "with all of its patches the teacher's, the student would learn nothing from DPK: give a share below 1"
            + ", or more --epochs than 1" * (share == "linear")
        )
    if isinstance(share, float) and share > MOST_GIVEN:
        raise UserError(
            f"--dpk_schedule fixed:{share:g} leaves the student one patch of {1 / (1 - share):,.0f} to learn from: give"
            f" a share of {MOST_GIVEN} or less"
        )
    for key in ("batch_size", "train_subset"):
        if 0 < options[key] < SMALLEST:
            raise UserError(
                f"--distill dpk measures how alike features are, which takes a --{key} of {SMALLEST} or more, not"
                f" {options[key]}"
            )
    if options["dpk_patch"] > options["image_size"]:
        raise UserError(f"--dpk_patch {options['dpk_patch']} is larger than the images, which have a side of"
                        f" {options['image_size']}")  # fmt: skip


def _resolve_schedule(options: dict[str, Any]) -> None:
    model = options.get("model_s") or options["model"]
    exact, asked = options.pop("lr"), options["learning_rate"]
    options["learning_rate"] = (
        exact if exact is not None else LEARNING_RATES.get(model, LEARNING_RATE if asked is None else asked)
    )
    if exact is None and asked is not None and options["learning_rate"] != asked:
        print(f"note: learning rate {options['learning_rate']} instead of {asked}, the published rule for {model};"
              f" --lr {asked} insists")  # fmt: skip
    for phase in ("rl_warmup", "rl_epoch", "aug_epoch"):
        if phase in options and options[phase] is None:
            options[phase] = _phase(options)
    if options["lr_decay_epochs"] is None:
        options["lr_decay_epochs"] = _decays(options["epochs"])
        return
    try:
        options["lr_decay_epochs"] = [int(epoch) for epoch in options["lr_decay_epochs"].split(",")]
    except ValueError as error:
        asked = options["lr_decay_epochs"]
        raise UserError(f"--lr_decay_epochs takes epochs and commas, like 150,180,210; not {asked}") from error
    check_numbers(options, ["lr_decay_epochs"])
    if repeated := [epoch for epoch, count in Counter(options["lr_decay_epochs"]).items() if count > 1]:
        print(f"note: --lr_decay_epochs names epoch {repeated[0]} more than once, so the rate drops as often there")


def _decays(epochs: int) -> list[int]:
    """The published milestones in a run of this length, in which some may coincide: then the rate drops once there."""
    return sorted({round(share * epochs) for share in DECAYS})


def proportions_in_words(options: dict[str, Any]) -> str | None:
    """What of a run that is shorter than the published 240 epochs is scaled in proportion and what is not, with the
    flags that change it; None if there is nothing to say."""
    epochs, temperature = options["epochs"], options.get("temperature")
    scaled, kept = [], []
    if options["lr_decay_epochs"] == _decays(epochs):
        scaled.append(f"the learning rate's drops, after {_listed(options['lr_decay_epochs'])} (--lr_decay_epochs)")
    for key, name, published in (("kd_warmup", "KD", dtkd.WARMUP), ("dkd_warmup", "DKD", dkd.WARMUP)):
        if (warmup := options.get(key)) and (key == "kd_warmup" or options["distill"] == "dkd"):
            reached = f", which reaches {epochs / warmup:.0%} of the weight" if warmup > epochs else ""
            is_scaled = warmup == _in_proportion(published, options)
            (scaled if is_scaled else kept).append(f"{name}'s warm-up over {warmup} epochs{reached} (--{key})")
    left = _in_proportion(dtkd.WARMUP, options)  # of the warm-up; one of 0 that is given is no proportion of it
    if temperature == "dtkd" and options["distill"] == "kd" and options["kd_warmup"] == left == 0:
        scaled.append("KD's warm-up, of which nothing is left (--kd_warmup)")
    phases = {"random": ("rl_warmup", "aug_epoch"), "rlkd": ("rl_warmup", "rl_epoch", "aug_epoch")}.get(temperature, ())
    if phases and all(options[phase] == _phase(options) for phase in phases):
        flags = ", ".join(f"--{phase}" for phase in phases)
        scaled.append(f"the phases' lengths in epochs, {_phase(options)} ({flags})")
    if temperature in ("ctkd-global", "ctkd-instance"):
        curriculum = (options[key] for key in ("curriculum", "lambda_min", "lambda_max", "lambda_epochs"))
        reached = curriculum_lambda(epochs, *curriculum)
        rise = f"over {options['lambda_epochs']:g} epochs, here to {reached:.2g}"
        kept.append(f"lambda's rise {rise} (--lambda_epochs)")
    told = [f"{how}: {'; '.join(what)}" for how, what in (("in proportion", scaled), ("not", kept)) if what]
    return f"{epochs} epochs instead of 240; {'; '.join(told)}" if told and epochs < 240 else None


def _listed(numbers: list[int]) -> str:
    return " and ".join(", ".join(map(str, numbers)).rsplit(", ", 1))


def _check_together(options: dict[str, Any]) -> None:
    """Raise UserError for numbers that make no sense together."""
    if options["seed"] + options["trials"] > 2**63:
        raise UserError(f"the seeds of --trials must be below 2^63 as well, not from {options['seed']} on")
    curriculum = ("lambda_epochs",) if str(options.get("temperature")).startswith("ctkd") else ()
    for key in ("kd_warmup", "dkd_warmup", *curriculum):
        if (options.get(key) or 0) > 100 * options["epochs"]:
            raise UserError(
                f"--{key} {options[key]:g} is more than a hundred times --epochs {options['epochs']}, so what grows"
                " over it would come to practically nothing: choose less, or more epochs"
            )
    if options.get("distill") == "dkd" and options["dkd_alpha"] == options["dkd_beta"] == 0:
        raise UserError("--dkd_alpha and --dkd_beta are both 0, so nothing would be left of DKD: give one of them")
    if "alpha" in options and options["alpha"] == options["beta"] == (options["fixed_alpha"] or 0) == 0:
        raise UserError("--alpha and --beta are both 0, so nothing would be distilled: train_teacher.py trains alone")


def kwargs_for(factory: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that a function, or the constructor of a class or of its parents, has arguments for."""
    functions = [cls.__init__ for cls in inspect.getmro(factory)] if inspect.isclass(factory) else [factory]
    names = {name for function in functions for name in inspect.signature(function).parameters}
    return {key: value for key, value in options.items() if key in names}


def run_folder(options: dict[str, Any], kind: str, group: str, name: str) -> Path:
    """Where a run lives: --run_dir, or save/<kind>/<experiments_dir>/<experiments_name> with defaults for both."""
    if options["run_dir"]:
        return Path(options["run_dir"])
    return Path("save") / kind / (options["experiments_dir"] or group) / (options["experiments_name"] or name)
