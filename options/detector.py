"""Declare the flags of train_detector.py; see flags.py. They are resolved in parse_detector.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from dataset import DETECTION, BatchSize, KeepEmpty, NumWorkers
from distiller_zoo.detection import detector_distillers
from inputs import Option
from models.detector_names import DETECTORS
from options.flags import (
    DecayRate,
    DeviceOptions,
    Momentum,
    ProcessOptions,
    RunOptions,
    TemperatureOptions,
    WeightDecay,
    make_parser,
    name_of,
    neutral,
    own_weight,
    whole_numbers,
)
from options.parser import Parser
from temperature import temperature_dict
from temperature.base import KdT

NORMS = ("frozen", "trained")
MOST = 10**9  # iterations
BATCH = 8  # the batch size that the learning rates below assume
# Defaults by data set: mdistiller's protocol for COCO, a short one for the synthetic shapes that tests use. The values
# named in IN_PROPORTION are for a run of `iterations` steps and scale with --iterations.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "coco": {
        "iterations": 180_000, "eval_every": 10_000, "learning_rate": 0.01, "lr_steps": [120_000, 160_000],
        "warmup_iters": 1000, "min_sizes": [640, 672, 704, 736, 768, 800], "max_size": 1333, "test_size": 800,
        "rois": 512,
    },
    "shapes": {
        "iterations": 120, "eval_every": 40, "learning_rate": 0.02, "lr_steps": [96], "warmup_iters": 20,
        "min_sizes": [96], "max_size": 96, "test_size": 96, "rois": 32,
    },
}  # fmt: skip
IN_PROPORTION = ("eval_every", "lr_steps", "warmup_iters")
# Weight of ReviewKD's loss by teacher and student, from mdistiller's configurations.
PAIR_BETA = {
    ("faster_rcnn_ResNet101", "faster_rcnn_ResNet18"): 1.2,
    ("faster_rcnn_ResNet101", "faster_rcnn_ResNet50"): 1.0,
    ("faster_rcnn_ResNet50", "faster_rcnn_MobileNetV2"): 2.0,
}
# Method options whose defaults differ from those of classification: DKD's weights are mdistiller's for detectors;
# tau's range is narrow, since a temperature far above 1 makes a detector diverge (see docs/detection.md); images are
# not blended; DPK uses all stages.
METHODS = {"dkd_alpha": 1.0, "dkd_beta": 0.25, "tau_range": 3.0, "aug_epoch": 0, "dpk_stages": 0}
# Flags of the other scripts that are not supported here, and why.
ELSEWHERE = {
    "teacher_table": "the teacher sees each image in many sizes, and answers for the student's proposals",
    "fill_teacher_table": "the teacher sees each image in many sizes, and answers for the student's proposals",
    "mixup": "boxes cannot be mixed",
    "cutmix": "boxes cannot be mixed",
    "label_smoothing": "a detector's loss has no such term",
    "train_subset": "it is for classification",
    "epochs": "a detector's run is counted in --iterations",
    "lr_decay_epochs": "a detector's run is counted in iterations, so give --lr_steps",
    "gamma": "a detector's own losses have the weight 1",
    "kd_warmup": "a detector's run is counted in iterations, so give --kd_warmup_iters",
}


def by_dataset(help: str, *bounds: float, **more: Any) -> Option:
    """Return an option whose default depends on the data set; see PROTOCOLS."""
    return Option(help, *bounds, later=True, **more)


@dataclass(frozen=True, kw_only=True)
class DetectionData:
    """data"""

    dataset: Annotated[str, Option("coco: its folder; shapes: made anew, for tests", choices=DETECTION)] = "coco"
    data_dir: Annotated[
        str | None, neutral("COCO's folder, with annotations/ (default: the variable COCO_DIR)", shown="DIR")
    ] = None
    num_workers: NumWorkers = 2
    min_sizes: Annotated[
        list[int],
        by_dataset("short sides of training images in pixels; one is drawn per image (default: 640 to 800)",
                   32, 8192, shown="N,N", normal=whole_numbers),
    ]  # fmt: skip
    max_size: Annotated[int, by_dataset("largest long side of images in pixels (default: 1333)", 32, 8192)]
    test_size: Annotated[int, by_dataset("short side of test images (default: 800)", 32, 8192)]
    keep_empty: KeepEmpty = False


@dataclass(frozen=True, kw_only=True)
class DetectionOptimization:
    """optimization: by default mdistiller's protocol, in proportion to --iterations"""

    iterations: Annotated[int, by_dataset("steps of the run (default: 180000)", 1, MOST)]
    eval_every: Annotated[int, by_dataset("steps per part of the run; each ends with a test (default: 10000)", 1, MOST)]
    batch_size: BatchSize = BATCH
    learning_rate: Annotated[
        float,
        by_dataset("(default: 0.01 for 8 images per step, in proportion to --batch_size)", 1e-9, 100.0, shown="LR"),
    ]
    lr_steps: Annotated[
        list[int],
        by_dataset("steps at which the learning rate drops (default: 120000,160000)", 0, MOST, shown="N,N",
                   normal=whole_numbers),
    ]  # fmt: skip
    lr_decay_rate: DecayRate = 0.1
    warmup_iters: Annotated[
        int, by_dataset("steps over which the learning rate rises from a thousandth (default: 1000)", 0, MOST)
    ]
    momentum: Momentum = 0.9
    weight_decay: WeightDecay = 1e-4
    clip_grad: Annotated[
        float, Option("clip the gradient to this norm; 0: never, as in detectron2 and mdistiller", 1e-6, 1e9,
                      or_zero=True)
    ] = 10.0  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DetectorPair:
    """networks"""

    model_s: Annotated[str, name_of("the detector to train: ", lambda: DETECTORS)] = "faster_rcnn_ResNet18"
    model_t: Annotated[
        str | None, neutral("the teacher, if its file does not say which network it is", shown="NAME")
    ] = None
    path_t: Annotated[
        str | None,
        neutral("the teacher: a run's folder or a file of weights, also torchvision's or detectron2's (.pkl); or"
                " torchvision, which downloads its weights of --model_t for COCO", shown="FILE"),
    ] = None  # fmt: skip
    pickle_sha256: Annotated[
        str | None, neutral("expected hash of a .pkl file, required since a pickle may hold code", shown="HASH")
    ] = None
    skip_validation: Annotated[bool, neutral("do not evaluate the teacher before distilling")] = False
    backbone: Annotated[
        str | None,
        neutral("ImageNet weights to start from: a file of torchvision's format, or torchvision to download them"
                " (default: none); other weights make another run", shown="FILE"),
    ] = None  # the path is neutral; the file's hash in config.json is not  # fmt: skip
    norm: Annotated[
        str, Option("the backbone's batch norm (default: frozen with --backbone, else trained)", choices=NORMS,
                    later=True)
    ]  # fmt: skip
    trainable_layers: Annotated[
        int, Option("number of trained stages of the backbone, counted from the last (default: 3 with --backbone, but 5"
                    " for MobileNetV2; else 5)",
                    0, 5, later=True)
    ]  # fmt: skip
    rois: Annotated[int, by_dataset("proposals sampled from an image (default: 512)", 1, 100_000)]


@dataclass(frozen=True, kw_only=True)
class DetectionLoss:
    """distillation: loss = detector's losses + warm-up * alpha * KD + beta * distiller's loss"""

    distill: Annotated[str, name_of("none: train alone; ", lambda: ("none", *detector_distillers), later=True)]
    alpha: Annotated[
        float | None,
        Option.of_weight("weight of the KD term (default: 1 with kd, or where a temperature has nothing else to act"
                         " on; else 0)", names=("-a",), later=True),
    ]  # fmt: skip
    beta: Annotated[float | None, own_weight("weight of the distiller's term", "-b")]
    kd_warmup_iters: Annotated[
        int, Option("steps over which the KD term grows to its full weight (default: --warmup_iters)", 0, MOST,
                    later=True)
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DetectorOptions(
    ProcessOptions, DeviceOptions, RunOptions, TemperatureOptions, DetectionLoss, DetectorPair, DetectionOptimization,
    DetectionData,
):  # fmt: skip
    """The options of train_detector.py."""

    kd_T: KdT = 1.0
    method: Mapping[str, Any]  # the options of the run's distiller and temperature, by name

    @property
    def epochs(self) -> int:
        """Return the number of parts of `eval_every` steps in the run; a trainer treats them as epochs."""
        return -(-self.iterations // self.eval_every)


def detector_parser() -> Parser:
    """Return the parser of train_detector.py."""
    parser = make_parser(
        "train_detector.py",
        "Train a detector on COCO, alone or distilled from another.",
        DetectorOptions,
        *detector_distillers.values(),
        *temperature_dict.values(),
    )
    parser.set_defaults(**METHODS)
    return parser
