"""Declare the flags, and build the parsers from them.

The options of a distiller or temperature are in its constructor; all others are fields here. See `inputs.Option`.
"""

import argparse
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeVar

from dataset import BatchSize, ImageSize, NumWorkers, TrainSubset, dataset_names
from distiller_zoo import distiller_dict
from distiller_zoo.dkd import WARMUP as DKD_WARMUP
from inputs import EPOCHS, LARGEST_SEED, Declared, Option, UserError, options_of
from models import networks
from options.parser import Parser
from temperature import temperature_dict
from temperature.base import KD_T, KdT
from temperature.control import CONTROLS
from temperature.dtkd import WARMUP as DTKD_WARMUP

T = TypeVar("T")

# The published scripts use these learning rates, whatever --learning_rate is.
LEARNING_RATES = {"MobileNetV2": 0.01, "ShuffleV1": 0.01, "ShuffleV2": 0.01}
LEARNING_RATE = 0.05
PUBLISHED_TEMPERATURES = {"global": "ctkd-global", "instance": "ctkd-instance"}  # --mlp_name


def name_of(help: str, known: Callable[[], Iterable[str]], **more: Any) -> Option:
    """Return the option for a name in a registry; parsing does not check the name, since plug-ins may add names."""
    return Option(help, known=known, shown="NAME", **more)


def neutral(help: str, *bounds: float, **more: Any) -> Option:
    """Return an option that does not change a run's result."""
    return Option(help, *bounds, is_neutral=True, **more)


DATASET = name_of(
    "folder: any train/ and val/ tree, held in memory; imagenet: such a tree, read from its files in every epoch; ",
    dataset_names,
)


def whole_numbers(text: str | list[int]) -> list[int]:
    """Return the integers in a comma-separated list. Raises UserError for anything else."""
    if isinstance(text, list):
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise UserError(f"give whole numbers separated by commas, not {text}") from error


def channels_of(text: str) -> list[float]:
    """Return the three numbers in a comma-separated list, one per channel. Raises UserError for anything else."""
    try:
        red, green, blue = map(float, text.split(","))
    except ValueError as error:
        raise UserError(f"give three numbers separated by commas, like 0.5,0.5,0.5, not {text}") from error
    return [red, green, blue]


def scale_of(what: str, least: float, default: str) -> Option:
    """Return the option for the mean or standard deviation of each channel."""
    help = f"{what} of the channels, like 0.5,0.5,0.5, with white as 1 (default: {default})"
    return Option(help, least, 10.0, shown="R,G,B", later=True, normal=channels_of, before=None)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """data"""

    dataset: Annotated[str, DATASET] = "cifar100"
    data_dir: Annotated[
        str | None,
        neutral(
            "folder of the data; without it the variables CIFAR10_DIR, CIFAR100_DIR, TINYIMAGENET_DIR and IMAGENET_DIR"
            " are used",
            shown="DIR",
        ),
    ] = None
    image_size: ImageSize
    train_subset: TrainSubset = 0
    num_workers: NumWorkers = 2
    mean: Annotated[list[float] | None, scale_of("mean", -10.0, "the data set's own")]
    std: Annotated[list[float] | None, scale_of("standard deviation", 1e-3, "the data set's own")]
    exif: Annotated[bool, Option("turn image files as their EXIF orientation says", before=False)] = False
    skip_unreadable: Annotated[
        bool, Option("leave out image files that cannot be read, and list them", before=False)
    ] = False


DecayRate = Annotated[float, Option("factor of the learning rate at each drop", 1e-9, 1.0)]
Momentum = Annotated[float, Option("of SGD", 1e-6, 0.9999, or_zero=True)]
WeightDecay = Annotated[float, Option("of SGD, for all trained parameters", 1e-9, 10.0, or_zero=True)]
LEARNING_RATE_HELP = f"as published, {', '.join(LEARNING_RATES)} always get 0.01 (default: {LEARNING_RATE})"


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions:
    """optimization"""

    epochs: Annotated[int, Option("length of the schedule", 1, EPOCHS)] = 240
    batch_size: BatchSize = 64
    learning_rate: Annotated[float, Option(LEARNING_RATE_HELP, 1e-9, 100.0, shown="LR", later=True)]
    lr_decay_epochs: Annotated[
        list[int],
        Option(
            "epochs after which the learning rate drops (default: 150,180,210 of 240, in proportion to --epochs; those"
            " that coincide count once)",
            0,
            10**9,
            shown="E,E",
            later=True,
            normal=whole_numbers,
        ),
    ]
    lr_decay_rate: DecayRate = 0.1
    momentum: Momentum = 0.9
    weight_decay: WeightDecay = 5e-4
    init_weights: Annotated[
        str | None,
        neutral("start the trained network from the weights in this file; runs from other weights are other runs",
                shown="FILE"),
    ] = None  # the path, which is neutral; config.json has the file's hash, which is not  # fmt: skip


def mixed_by(name: str) -> Option:
    """Return the option for the parameter of MixUp's or CutMix's Beta distribution."""
    return Option(
        f"parameter of {name}'s Beta distribution, such as 0.2 or 1; 0: none", 1e-3, 1e3, or_zero=True, before=0.0
    )


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """targets of the cross entropy: all off in the published recipes"""

    label_smoothing: Annotated[
        float, Option("share of the targets that all classes get equally", 1e-6, 0.999, or_zero=True, before=0.0)
    ] = 0.0
    mixup: Annotated[float, mixed_by("MixUp")] = 0.0
    cutmix: Annotated[float, mixed_by("CutMix")] = 0.0


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """run"""

    seed: Annotated[int, Option("of initial weights, order and augmentation; logged", 0, LARGEST_SEED)] = 1
    trials: Annotated[
        int,
        neutral("train N seeds, from --seed on, side by side in one process, each as if alone", 1, 1000,
                shown="N"),
    ] = 1  # fmt: skip
    trial: Annotated[str, neutral("a label of your own, kept in config.json", names=("-t",))] = ""
    experiments_dir: Annotated[str | None, neutral("folder of related runs, below save/", shown="DIR")] = None
    experiments_name: Annotated[str | None, neutral("name of this run in that folder", shown="NAME")] = None
    run_dir: Annotated[str | None, neutral("the run's folder itself, instead of the two above", shown="DIR")] = None
    overwrite: Annotated[bool, neutral("replace the run that is in this folder")] = False
    dry_run: Annotated[bool, neutral("print what would be done, and stop")] = False
    print_freq: Annotated[int, neutral("steps between two updates of the progress bar", 1, 10**9)] = 50
    plugins: Annotated[
        str | None, neutral("Python files of your own, like mine.py,yours.py, that register networks, data sets,"
                            " temperatures or distillers", shown="FILE,FILE")
    ] = None  # fmt: skip
    save_model: Annotated[bool, neutral("accepted; weights are always saved")] = False


PRECISIONS = ("fp32", "tf32", "bf16")
PRECISION = Option(
    "of the networks' computations; losses, temperatures and weights are always fp32; tf32: convolutions on a GPU use"
    " TensorFloat-32, PyTorch's default",
    choices=PRECISIONS,
    before="fp32",
)


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """device"""

    precision: Annotated[str, PRECISION] = "fp32"
    device: Annotated[str | None, neutral("cpu, cuda or cuda:1 (default: a GPU if there is one)", shown="NAME")] = None
    gpu_id: Annotated[
        str | None,
        neutral("the GPU, or one per process, like 0,1 (default: the first, or all of them)"),
    ] = None
    deterministic: Annotated[bool, Option("use only algorithms that are bitwise reproducible on a GPU too")] = False
    plain: Annotated[bool, neutral("turn off everything that is only for speed (see docs/speed.md), to check it")] = (
        False
    )
    dali: Annotated[
        str | None,
        neutral("accepted; DALI is not needed, since small data sets are held on the device", choices=("cpu", "gpu")),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """several processes: on one machine or many, also started by torchrun; each trains on a share of every batch"""

    multiprocessing_distributed: Annotated[
        bool,
        neutral("start one process per GPU: of --gpu_id, or of the machine; with --device cpu one per number of"
                " --gpu_id"),
    ] = False  # fmt: skip
    dist_url: Annotated[
        str | None, neutral("where the processes meet, like tcp://127.0.0.1:23451 (default: at a free port)")
    ] = None
    dist_timeout: Annotated[float, neutral("seconds to wait for another process before giving up", 0.1, 1e7)] = 600.0
    sync_bn: Annotated[
        bool,
        Option("batch norm of the trained network uses the whole batch, not one process's share; on GPUs",
               before=False),
    ] = False  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AloneOptions:
    """network"""

    model: Annotated[str, name_of("timm:NAME or ", networks)] = "resnet110"
    save_freq: Annotated[
        int, neutral("also keep ckpt_epoch_<n>.pth every so many epochs; 0: only the last", 0, EPOCHS)
    ] = 0


TEACHERS_OWN = "what its file says, else as for the student"


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """networks"""

    model_s: Annotated[str, name_of("the student, timm:NAME, or ", networks)] = "resnet8"
    model_t: Annotated[
        str | None,
        neutral(
            "the teacher, also timm:NAME or hf:NAME, whose weights are downloaded without --path-t; not needed if"
            " its weights or its folder's name identify it",
            shown="NAME",
        ),
    ] = None
    path_t: Annotated[
        str | None, neutral("the teacher's weights, or its folder (default: that of --model_t)", shown="FILE")
    ] = None
    teacher_weights: Annotated[
        str | None,
        Option("download public weights of --model_t: torchvision's for ImageNet, or the hub's for CIFAR-100 (resnet20,"
               " resnet32, resnet44, resnet56); without internet access, give their file as --path-t instead",
               choices=("torchvision", "hub")),
    ] = None  # fmt: skip
    teacher_mean: Annotated[list[float] | None, scale_of("of the teacher's images: mean", -10.0, TEACHERS_OWN)]
    teacher_std: Annotated[list[float] | None, scale_of("of the teacher's images: std", 1e-3, TEACHERS_OWN)]
    train_teacher: Annotated[bool, neutral("train the teacher by the vanilla recipe if it is missing")] = False
    skip_validation: Annotated[bool, neutral("do not evaluate the teacher before distilling")] = False
    teacher_table: Annotated[
        bool,
        neutral("cache the teacher's output for every view of every image, for later epochs and runs; for distillers"
                " that need no feature maps"),
    ] = False  # fmt: skip
    fill_teacher_table: Annotated[bool, neutral("the same, and compute all of it before the first epoch")] = False
    table_dtype: Annotated[
        str, Option("of the outputs in the table", choices=("float32", "float16"), before="float32")
    ] = "float32"
    table_dir: Annotated[
        str | None, neutral("folder of the tables (default: teacher_table/ next to the teacher's weights)", shown="DIR")
    ] = None
    teacher_precision: Annotated[str, Option(is_flag=False, before="fp32")] = "fp32"


def own_weight(help: str, flag: str) -> Option:
    """Return the option for a loss weight whose default depends on the distiller."""
    return Option.of_weight(f"{help} (default: the distiller's own)", names=(flag,), later=True)


KD_WARMUP = Option(
    "epochs over which both KD terms grow to their full weight (default: 0; with --temperature dtkd and --distill kd"
    f" {DTKD_WARMUP} of 240)",
    0,
    EPOCHS,
    later=True,
    before=0,
)


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """distillation: loss = gamma * CE + warm-up * (alpha * KD + fixed_alpha * KD at kd_T) + beta * distiller's loss"""

    distill: Annotated[str, name_of("", lambda: distiller_dict)] = "kd"
    gamma: Annotated[float | None, own_weight("weight of the cross entropy", "-r")]
    alpha: Annotated[float | None, own_weight("weight of the KD term", "-a")]
    fixed_alpha: Annotated[
        float | None,
        Option.of_weight("weight of a second KD term, at the fixed temperature kd_T (default: 0; with --temperature"
                         " dtkd and --distill kd DTKD's beta)", later=True, before=0.0),
    ]  # fmt: skip
    kd_warmup: Annotated[int | None, KD_WARMUP]
    beta: Annotated[float | None, own_weight("weight of the distiller's term", "-b")]
    dkd_weights: Annotated[
        str,
        neutral(f"of DKD; mdistiller's are a beta for each pair, and a warm-up of {DKD_WARMUP} of 240 epochs",
                choices=("ctkd", "mdistiller")),
    ] = "ctkd"  # fmt: skip


CONTROL = Option(
    "a control: the batch's temperatures shuffled; their mean for all samples; or kd_T for all, with the weights"
    " that the temperature gives to samples",
    choices=CONTROLS,
    before="none",
)


@dataclass(frozen=True, kw_only=True)
class TemperatureOptions:
    """temperature"""

    temperature: Annotated[str, name_of("(default: fixed) ", lambda: temperature_dict, later=True)]
    kd_T: KdT = KD_T
    logit_stand: Annotated[
        bool,
        Option("compute tau from z-scored logits, and apply it to them (a KD term at kd_T uses plain logits)",
               before=False),
    ] = False  # fmt: skip
    tau_control: Annotated[str, CONTROL] = "none"


@dataclass(frozen=True, kw_only=True)
class CommonOptions(ProcessOptions, DeviceOptions, RunOptions, TargetOptions, OptimizationOptions, DataOptions):
    """The options of both training scripts."""


@dataclass(frozen=True, kw_only=True)
class TeacherOptions(CommonOptions, AloneOptions):
    """The options of train_teacher.py."""


@dataclass(frozen=True, kw_only=True)
class StudentOptions(CommonOptions, TemperatureOptions, LossOptions, PairOptions):
    """The options of train_student.py."""

    method: Mapping[str, Any]  # the options of all distillers and temperatures, by name


def as_dict(options: CommonOptions) -> dict[str, Any]:
    """Return all options by name, including those of every method."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return values | values.pop("method", {})


def as_options(kind: type[T], values: dict[str, Any]) -> T:
    """Return the options of a script from values by option name; `kind` is their class."""
    names = {field.name for field in fields(kind)}
    if "method" not in names:
        return kind(**values)
    method = {name: value for name, value in values.items() if name not in names}
    return kind(**{name: value for name, value in values.items() if name in names}, method=method)


def first_epochs(options: CommonOptions) -> int:
    """Return the length of a run's first stage in epochs, see `TwoStage`; 0 if it has none."""
    if not isinstance(options, StudentOptions) or not distiller_dict[options.distill].has_first_stage:
        return 0
    return options.method["init_epochs"]


class _Help(argparse.HelpFormatter):
    """Shows a flag's type, and its default if that is informative."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return action.type.__name__ if action.type else "TEXT"

    def _get_help_string(self, action: argparse.Action) -> str:
        is_silent = action.default is None or action.default is False or action.default in ("", argparse.SUPPRESS)
        is_silent |= "(default" in action.help
        return action.help if is_silent else f"{action.help} (default: {action.default})"


def make_parser(program: str, description: str, *takers: Any) -> Parser:
    """Return a script's parser with a flag for each option of these classes, grouped by the declaring class."""
    usage = "%(prog)s [flags]; a hyphen may stand for each underscore"
    parser = Parser(program, usage=usage, description=description, allow_abbrev=False, formatter_class=_Help)
    groups: dict[Any, Any] = {}
    added = set()
    for taker in takers:
        for name, declared in options_of(taker).items():
            if name in added or not declared.option.is_flag:
                continue
            added.add(name)
            if declared.owner not in groups:
                groups[declared.owner] = parser.add_argument_group(*_title(declared.owner))
            group = groups[declared.owner]
            _add(group, name, declared)
            if name == "learning_rate":
                group.add_argument("--lr", type=float, metavar="LR", help="the same, used as given; has priority")
    return parser


def _title(owner: Any) -> tuple[str, str | None]:
    """Return title and description of a flag group; a method's group is titled by its names in the registry."""
    names = [name for registry in (distiller_dict, temperature_dict) for name, taker in registry.items()
             if owner in inspect.getmro(taker)]  # fmt: skip
    if names:
        return f"only for {', '.join(names)}", None
    title, _, description = " ".join(owner.__doc__.split()).partition(": ")
    return title, description or None


def _add(group: Any, name: str, declared: Declared) -> None:
    kind, default, option, _ = declared
    flags = (f"--{name}", *option.names)
    if kind is bool:
        if default:
            raise ValueError(f"--{name} is a flag without a value, so its default must be False")
        group.add_argument(*flags, action="store_true", help=option.help)
        return
    given = None if option.later or option.in_proportion else default
    names = f"one of: {', '.join(option.known())}" if option.known else ""
    choices = f"{{{','.join(option.choices)}}}" if option.choices else None
    scaled = f" (default: {default} of 240, in proportion to --epochs)" * option.in_proportion
    group.add_argument(
        *flags,
        type=kind if kind in (int, float) else None,
        default=given,
        metavar=option.shown or choices,
        help=option.help + names + scaled,
    )


def teacher_parser() -> Parser:
    """Return the parser of train_teacher.py."""
    return make_parser(
        "train_teacher.py",
        "Train a network alone, by the vanilla recipe: a teacher, or a student to compare with.",
        TeacherOptions,
    )


def student_parser() -> Parser:
    """Return the parser of train_student.py."""
    parser = make_parser(
        "train_student.py",
        "Distil a teacher into a student: any temperature with any distiller and any pair of networks.",
        StudentOptions,
        *distiller_dict.values(),
        *temperature_dict.values(),
    )
    _add_published_temperature(parser)
    return parser


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
    for flag, key in (("--decay_max", "lambda_min"), ("--decay_min", "lambda_max")):
        add(flag, type=_negated, dest=key, metavar="float", default=none, help=f"--{key}, negated, as published")


def _negated(text: str) -> float:
    return 0.0 - float(text)  # the published lambda runs from 0 to -1, ours from 0 to 1; subtracting avoids -0.0


def _curriculum(text: str) -> str:
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError("give 1 for the cosine curriculum, 0 for the linear one")
    return "cosine" if text == "1" else "linear"


def own_options(distill: str | None, temperature: str | None) -> dict[str, Declared]:
    """Return the options declared by a distiller and a temperature, without those that every run has."""
    takers = (distiller_dict.get(distill or ""), temperature_dict.get(temperature or ""))
    own = {name: declared for taker in takers if taker for name, declared in options_of(taker).items()}
    return {name: declared for name, declared in own.items() if name not in options_of(StudentOptions)}


def all_options() -> dict[str, Declared]:
    """Return all options by name. Raises ValueError if two declarations of an option differ."""
    known: dict[str, Declared] = {}
    for taker in (*distiller_dict.values(), *temperature_dict.values(), TeacherOptions, StudentOptions):
        for name, declared in options_of(taker).items():
            if declared[:3] != known.setdefault(name, declared)[:3]:
                raise ValueError(f"{known[name].owner} and {declared.owner} declare --{name} differently")
            known[name] = declared
    return known
