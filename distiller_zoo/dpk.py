"""DPK: dynamic prior knowledge (Qiu et al., ICLR 2023, arXiv 2206.06067).

Part of the teacher's features is given to the student as prior knowledge, and the teacher's whole features must be
reconstructed from that part and the student's own. The larger the gap between the features, the larger the part.

The authors never released code, so this is re-implemented from their description; their exact settings are unknown.
From the description: each network's map of a stage goes through its own encoder; a random set of the student's patches
is replaced by the teacher's; a decoder reconstructs the teacher's map from this mixture; the teacher's share follows
the gap between the features, measured by minibatch linear CKA.
From the only unofficial code we know of (TST): the share is 1 - CKA, smoothed with a momentum of 0.9; using the last
two stages is one of its modes; maps are projected to a common width; the loss is the mean squared error.

OURS, where the sources are silent or differ:

- CKA compares the two maps themselves, not their encodings, which are trained to fit each other; HSIC is smoothed,
  before the division, from the first batch on. Batches of fewer than 4 images are not measured. The share is clamped to
  0 to 1. Each patch is drawn independently for each image (TST: one mask per batch), so one-patch maps work too.
- A patch is one position by default. Encoders and decoder are convolutions, as wide as the narrower of the two maps,
  but at most 128. An encoder's receptive field is its patch, so the encoding of a teacher's patch contains no
  information on the patches left to the student.
- The target is the teacher's map itself, each channel standardised over the batch. It does not depend on trainable
  parameters: if it were the teacher's encoding, encoders and decoder could collapse to a constant. The mean squared
  error is over all patches; predicting the channels' means gives 1.
- The stages' errors are summed. Next to KD's weights of 0.1 and 0.9 they have a weight of 10: at 1 their gradient in
  the student's stages (teacher resnet20, student resnet8, the first 200 steps on CIFAR-100) is a tenth of the KD
  term's, at 10 about as large. It was not tuned for accuracy. The student learns only from the patches left to it: the
  larger the teacher's share, the weaker its gradient, and at a share of 1 there is none. So schedules also differ in
  their effective weight.
- The larger of two maps is average-pooled to the size of the smaller. Both are zero-padded if patches do not divide
  them. Networks with different numbers of stages are paired by relative depth (`pair_stages`).
"""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.base import Distiller, at_least_float32
from distiller_zoo.cka import SMALLEST, cka_of_hsic, hsic_terms
from distiller_zoo.maps import pair_stages, same_size
from inputs import CPU, TRAINED, Option, UserError, check_fits, in_words
from models import Output
from temperature import Tau
from temperature.annealing import annealed

MASKS = ("sample", "batch")
MAX_WIDTH = 128
MOST_GIVEN = 0.99  # the largest fixed share of the teacher's patches
STAGES = Option("number of the student's stages, counted from the last; 0, or more than it has: all", 0, 1000)
WIDTH = Option(f"channels of encodings (default: those of the narrower map, at most {MAX_WIDTH})", 1, 65_536)
EPS = 1e-5


def share_schedule(text: str) -> float | str:
    """Parse a schedule of DPK: return "dynamic", "linear", or the number after "fixed:".

    Raises:
        UserError: the text is none of these, or the number is outside 0 to 1.
    """
    if text in ("dynamic", "linear"):
        return text
    try:
        share = float(f"{float(text.removeprefix('fixed:')):g}")  # six digits, as it is stored
    except ValueError:
        share = -1.0
    if not text.startswith("fixed:") or not 0 <= share <= 1:
        raise UserError(f"--dpk_schedule is dynamic, linear, or a share from 0 to 1 like fixed:0.5; not {text}")
    return share


def _written(text: str) -> str:
    share = share_schedule(text)
    return share if isinstance(share, str) else f"fixed:{share:g}"


SCHEDULE = Option(
    "the teacher's share of the patches: dynamic (1 - CKA), fixed:<ratio> like fixed:0.5, or linear (from 1 to 0 over"
    " the epochs)",
    shown="NAME",
    normal=_written,
)


def standardised(maps: Tensor) -> Tensor:
    """Return maps [B, C, H, W] with mean 0 and variance 1 in each channel; a constant channel becomes 0."""
    variance, mean = torch.var_mean(maps, dim=(0, 2, 3), correction=0, keepdim=True)
    return (maps - mean) * (variance + EPS).rsqrt()


class Residual(nn.Module):
    """x + convolution(ReLU(x)), with `width` channels and a square kernel of `side`."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, width, side, padding=side // 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolution(x.relu())


class Stitching(nn.Module):
    """Reconstructs the teacher's map from the student's, with some patches replaced by the teacher's.

    Args:
        student_width: channels of the student's map.
        teacher_width: channels of the teacher's map.
        patch: side of a patch in positions; a map that it does not divide is zero-padded.
        width: channels of the encodings.
        encoder_depth: residual blocks in each encoder.
        decoder_depth: residual blocks in the decoder.
    """

    def __init__(
        self, student_width: int, teacher_width: int, patch: int, width: int, encoder_depth: int, decoder_depth: int
    ) -> None:
        super().__init__()
        self.patch = patch

        def encoder(channels: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels, width, patch, stride=patch), *(Residual(width, 1) for _ in range(encoder_depth))
            )

        self.student_encoder, self.teacher_encoder = encoder(student_width), encoder(teacher_width)
        self.decoder = nn.Sequential(
            *(Residual(width, 3) for _ in range(decoder_depth)), nn.Conv2d(width, teacher_width * patch**2, 1)
        )

    def forward(self, x_s: Tensor, x_t: Tensor, share: Tensor, mask: str) -> Tensor:
        """Return the reconstruction of the teacher's map, [B, D, H, W].

        Args:
            x_s: the student's standardised map [B, C, H, W].
            x_t: the teacher's standardised map [B, D, H, W].
            share: the probability that a patch is the teacher's, a scalar.
            mask: one of MASKS.
        """
        height, width = x_t.shape[2:]
        padding = (0, -width % self.patch, 0, -height % self.patch)
        f_s, f_t = self.student_encoder(F.pad(x_s, padding)), self.teacher_encoder(F.pad(x_t, padding))
        masks = len(f_s) if mask == "sample" else 1
        given = torch.rand(masks, 1, *f_s.shape[2:], device=f_s.device) < share
        return F.pixel_shuffle(self.decoder(torch.where(given, f_t, f_s)), self.patch)[..., :height, :width]


def _check_size(stages: list[tuple[int, ...]]) -> None:
    """Print the size of `Stitching` for these arguments. Raises UserError if it would not fit into memory."""
    with torch.device("meta"):  # allocates nothing
        parameters = [parameter for stage in stages for parameter in Stitching(*stage).parameters()]
    size = TRAINED * sum(parameter.numel() for parameter in parameters)
    print(f"DPK: encoders and decoders take {in_words(size)} to train")
    check_fits("DPK's encoders and decoders", size, "--dpk_width, --dpk_encoder_depth or --dpk_decoder_depth")


class DPK(Distiller):
    """The mean squared error of the reconstructions of the teacher's maps, one term per stage.

    For each of the student's stages, numbered from 1, the log has `dpk_ratio_stage<n>`, the mean of the teacher's share
    over the epoch, and `dpk_cka_stage<n>`, the minibatch CKA of the epoch's batches.

    Args:
        epochs: length of the run, for the schedule "linear".
        dpk_stages: number of the student's stages, counted from the last; 0, or more than it has, for all.
        dpk_patch: side of a patch in positions of the map.
        dpk_width: channels of the encodings; None for those of the narrower map, at most 128.
        dpk_encoder_depth: residual blocks, of one convolution each, in each encoder.
        dpk_decoder_depth: residual blocks in the decoder.
        dpk_mask: one mask per "sample", or one per "batch".
        dpk_schedule: the teacher's share: "dynamic" for 1 - CKA, "fixed:<ratio>", or "linear" from 1 in the first epoch
            to 0 in the last.
        dpk_momentum: momentum of the smoothed HSIC.

    Raises:
        UserError: an unknown mask or schedule, or a number outside its bounds.
    """

    weights = (0.1, 0.9, 10.0)

    def __init__(
        self,
        student_widths: list[int],
        teacher_widths: list[int],
        epochs: int,
        dpk_stages: Annotated[int, STAGES] = 2,
        dpk_patch: Annotated[int, Option("side of a patch, in positions of the map", 1, 8192)] = 1,
        dpk_width: Annotated[int | None, WIDTH] = None,
        dpk_encoder_depth: Annotated[int, Option("residual blocks of each encoder", 0, 1000)] = 1,
        dpk_decoder_depth: Annotated[int, Option("residual blocks of the decoder", 0, 1000)] = 2,
        dpk_mask: Annotated[str, Option("one mask per sample, or one per batch", choices=MASKS)] = "sample",
        dpk_schedule: Annotated[str, SCHEDULE] = "dynamic",
        dpk_momentum: Annotated[
            float, Option.of_share("momentum of the smoothed HSIC, from which CKA is computed")
        ] = 0.9,
    ) -> None:
        super().__init__()
        self.mask, self.schedule = dpk_mask, share_schedule(dpk_schedule)
        self.epochs, self.momentum = epochs, dpk_momentum
        pairs = list(enumerate(pair_stages(len(student_widths) - 2, len(teacher_widths) - 2)))
        self.pairs = [(s + 1, t + 1) for s, t in pairs[-dpk_stages:]]  # indices into the features; [-0:] takes all
        stages = []
        for s, t in self.pairs:
            widths = student_widths[s], teacher_widths[t]
            between = dpk_width or min(*widths, MAX_WIDTH)
            patch = self.patch_of(s, dpk_patch)
            stages.append((*widths, patch, between, dpk_encoder_depth, dpk_decoder_depth))
        _check_size(stages)
        self.stages = nn.ModuleList(Stitching(*stage) for stage in stages)
        chosen = ", ".join(f"{s} from {t}" for s, t in self.pairs)
        print(f"DPK: stages of the student, and of the teacher that they learn from: {chosen}")
        count = len(self.pairs)
        self.register_buffer("hsic", torch.zeros(count, 3))  # smoothed
        share = self.schedule if isinstance(self.schedule, float) else 1.0  # until the first step or epoch
        self.register_buffer("ratio", torch.full((count,), share))
        self.register_buffer("epoch_hsic", torch.zeros(count, 3))  # sums over the epoch's steps
        self.register_buffer("epoch_ratio", torch.zeros(count))
        self.register_buffer("epoch_steps", torch.zeros(()))

    @classmethod
    def check(cls, options: dict[str, Any], device: torch.device = CPU) -> None:
        share = share_schedule(options["dpk_schedule"])
        if share == 1 or share == "linear" and options["epochs"] == 1:
            raise UserError(
                "with all of its patches the teacher's, the student would learn nothing from DPK: give a share below 1"
                + ", or more --epochs than 1" * (share == "linear")
            )
        if isinstance(share, float) and share > MOST_GIVEN:
            raise UserError(
                f"--dpk_schedule fixed:{share:g} leaves the student one patch of {1 / (1 - share):,.0f} to learn from:"
                f" give a share of {MOST_GIVEN} or less"
            )
        for key in ("batch_size", "train_subset"):
            if 0 < options[key] < SMALLEST:
                raise UserError(
                    f"--distill dpk measures how alike features are, which takes a --{key} of {SMALLEST} or more, not"
                    f" {options[key]}"
                )
        if options["dpk_patch"] > (side := options["image_size"]):
            raise UserError(
                f"--dpk_patch {options['dpk_patch']} is larger than the images, which have a side of {side}"
            )

    def patch_of(self, stage: int, patch: int) -> int:
        """Return the side of a patch in positions, given --dpk_patch, for a student's stage counted from 1."""
        return patch

    def start_epoch(self, epoch: int) -> None:
        if self.schedule == "linear":
            self.ratio.fill_(annealed(epoch, self.epochs, 1.0, 0.0))
        for sums in (self.epoch_hsic, self.epoch_ratio, self.epoch_steps):
            sums.zero_()

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        losses = {}
        self.epoch_steps += 1
        for i, (s, t) in enumerate(self.pairs):
            g_s, g_t = same_size(at_least_float32(student.features[s]), at_least_float32(teacher.features[t].detach()))
            self._follow(i, g_s, g_t)
            x_t = standardised(g_t)
            made = self.stages[i](standardised(g_s), x_t, self.ratio[i], self.mask)
            losses[f"dpk_stage{s}"] = F.mse_loss(made, x_t)
        return losses

    @torch.no_grad()
    def _follow(self, i: int, g_s: Tensor, g_t: Tensor) -> None:
        """Measure the CKA of a pair of stages' maps, and update the teacher's share."""
        if len(g_s) >= SMALLEST:
            terms = hsic_terms(g_s, g_t)
            self.hsic[i].lerp_(terms.to(self.hsic), 1 - self.momentum)
            self.epoch_hsic[i] += terms
        if self.schedule == "dynamic":
            self.ratio[i] = (1 - cka_of_hsic(self.hsic[i])).clamp(0, 1)
        self.epoch_ratio[i] += self.ratio[i]

    def describe(self) -> dict[str, float]:
        result = {}
        ratios, alike = self.epoch_ratio / self.epoch_steps, cka_of_hsic(self.epoch_hsic)
        for (stage, _), ratio, cka in zip(self.pairs, ratios.tolist(), alike.tolist(), strict=True):
            result |= {f"dpk_ratio_stage{stage}": ratio, f"dpk_cka_stage{stage}": cka}
        return result
