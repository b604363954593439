"""CRD: contrastive representation distillation (Tian et al., ICLR 2020, arXiv 1910.10699).

The student's embedding of an image should be close to the teacher's embedding of the same image and far from its
embeddings of other classes. Two memory banks hold both networks' embeddings of every training image, so that thousands
of negatives per image cost no forward pass.
"""

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.base import Distiller
from distiller_zoo.cc import Embed, EmbeddingSize
from inputs import CPU, Option, UserError, check_fits
from models import Output
from temperature import Tau

MODES = ("exact", "relax")
EPS = 1e-7


def nce_loss(score: Tensor, log_z: Tensor, num_samples: int) -> Tensor:
    """Return the loss of noise-contrastive estimation, a scalar: distinguish the positive from K noise samples.

    It is minus the log likelihood of the correct decisions with h = p / (p + K / N), as in the published code: summed
    over the K + 1 candidates, averaged over the batch.

    Args:
        score: [B, 1 + K], inner products of embeddings divided by the temperature; the positive is the first column.
        log_z: the logarithm of the normalising constant, so that p = exp(score - log_z).
        num_samples: N, the size of the training set.
    """
    noise = (score.shape[1] - 1) / num_samples
    log_p = score - log_z
    log_sum = torch.logaddexp(log_p, torch.full_like(log_z, math.log(noise + EPS)))
    log_positive, log_negative = (log_p - log_sum)[:, 0], math.log(noise) - log_sum[:, 1:]
    return -(log_positive.sum() + log_negative.sum()) / len(score)


class UnitEmbed(Embed):
    """Maps pooled features [B, D] to embeddings of length 1 [B, feat_dim]."""

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(super().forward(features), dim=1)


class Contrast(nn.Module):
    """The two memory banks, and the contrastive loss against them.

    Args:
        num_samples: N, the size of the training set.
        feat_dim: size of an embedding.
        nce_t: the temperature of the contrast.
        nce_m: the momentum of the memory banks.
    """

    def __init__(self, num_samples: int, feat_dim: int, nce_t: float = 0.07, nce_m: float = 0.5) -> None:
        super().__init__()
        self.nce_t, self.nce_m = nce_t, nce_m
        self.seen: tuple[Tensor, Tensor, Tensor] | None = None
        banks, size = f"two memory banks of {num_samples} x {feat_dim} float32", 2 * num_samples * feat_dim * 4
        print(f"CRD: {banks}, {size / 1e6:.1f} MB together", flush=True)
        check_fits(f"CRD's {banks}", size, "--feat_dim")
        bound = math.sqrt(3 / feat_dim)  # for vectors of about unit length
        for name in ("memory_v1", "memory_v2"):  # student's, teacher's
            self.register_buffer(name, torch.empty(num_samples, feat_dim).uniform_(-bound, bound))
        for name in ("log_z_v1", "log_z_v2"):  # estimated in the first step, then kept, as published
            self.register_buffer(name, torch.tensor(math.nan))

    def forward(self, v_s: Tensor, v_t: Tensor, index: Tensor, candidates: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar: each network's embeddings against the other's memory bank.

        Args:
            v_s: the student's embeddings [B, feat_dim].
            v_t: the teacher's embeddings [B, feat_dim].
            index: the images' numbers [B].
            candidates: image numbers [B, 1 + K], the positive first.
        """
        self.seen = index, v_s.detach(), v_t.detach()
        student = self._loss(v_s, self.memory_v2, self.log_z_v1, candidates)
        return student + self._loss(v_t, self.memory_v1, self.log_z_v2, candidates)

    def _loss(self, v: Tensor, memory: Tensor, log_z: Tensor, candidates: Tensor) -> Tensor:
        # computing all N products and selecting moves far fewer bytes than gathering K + 1 memories per image
        score = (v / self.nce_t @ memory.T).gather(1, candidates)
        estimate = score.detach().logsumexp((0, 1)) + math.log(len(memory) / score.numel())
        log_z.copy_(torch.where(log_z.isnan(), estimate, log_z))
        return nce_loss(score, log_z, len(memory))

    @torch.no_grad()
    def renew(self) -> None:
        """Move the memories of the last batch's images towards their new embeddings."""
        if self.seen is None:
            return
        index, *embeddings = self.seen
        # if an image occurs twice (see MemoryLoader.epoch), the last one counts, on GPUs too
        last = ((index == index[:, None]) * torch.arange(len(index), device=index.device)).amax(1)
        for v, memory in zip(embeddings, (self.memory_v1, self.memory_v2), strict=True):
            memory[index] = F.normalize(self.nce_m * memory[index] + (1 - self.nce_m) * v[last], dim=1)
        self.seen = None


class Candidates(nn.Module):
    """Draws each image's positive and negatives on the device, for the whole batch at once.

    The positive is the image itself (`exact`) or any image of its class (`relax`). The K negatives are of other
    classes, drawn without replacement where possible; if there are fewer than K, with replacement, as published.

    OURS: if all classes have the same size, the images of a batch share one random permutation of the negatives. Each
    image takes every s-th element, cyclically, from a random start and with a random stride s. Any K negatives of an
    image are equally likely, as published, but those of two images in a batch are not independent. Independent draws
    are slower: they select K of N random numbers per image.

    Args:
        train_target: the class of each training image [N].
        nce_k: K, the number of negatives per image.
        mode: `exact` or `relax`.

    Raises:
        UserError: all images are of one class.
    """

    def __init__(self, train_target: Tensor, nce_k: int, mode: str = "exact") -> None:
        super().__init__()
        self.nce_k, self.mode = nce_k, mode
        counts = train_target.bincount()
        negatives = len(train_target) - counts[counts > 0]
        fewest, self.most = negatives.min().item(), negatives.max().item()
        if fewest == 0:
            raise UserError("--distill crd needs images of two classes or more, and all training images are of one")
        self.all_enough, self.none_enough, self.even = fewest >= nce_k, self.most < nce_k, fewest == self.most
        # all images sorted by class: a class is one contiguous range, and its negatives are all the rest
        self.register_buffer("by_class", train_target.argsort(stable=True), persistent=False)
        self.register_buffer("start", counts.cumsum(0) - counts, persistent=False)
        self.register_buffer("counts", counts, persistent=False)
        strides = torch.arange(1, self.most + 1 if self.even else 1, device=train_target.device)
        strides = strides[strides.gcd(strides.new_tensor(self.most)) == 1]  # these visit every negative once
        self.register_buffer("strides", strides, persistent=False)

    def forward(self, index: Tensor, target: Tensor) -> Tensor:
        """Return candidates [B, 1 + K], the positive first, for image numbers `index` [B] and classes `target` [B]."""
        start, count = self.start[target][:, None], self.counts[target][:, None]
        positive = index[:, None] if self.mode == "exact" else self.by_class[start + _below(count, 1)]
        place = self._places(len(self.by_class) - count)
        negative = self.by_class[place + count * (place >= start)]  # skip the image's own class
        return torch.cat([positive, negative], dim=1)

    def _places(self, negatives: Tensor) -> Tensor:
        """Return K of each image's negatives [B, K], numbered from 0; `negatives` [B, 1] is their number."""
        if self.none_enough:
            return _below(negatives, self.nce_k)
        if self.even:
            # a random permutation; torch.randperm may draw on the CPU, which a recorded step cannot
            shuffled = torch.randint(2**62, (self.most,), device=negatives.device).argsort()
            stride = self.strides[_below(torch.full_like(negatives, len(self.strides)), 1)]
            steps = torch.arange(self.nce_k, device=negatives.device)
            return shuffled[(_below(negatives, 1) + stride * steps) % self.most]
        keys = torch.rand(len(negatives), self.most, device=negatives.device)  # the K smallest are chosen
        keys += torch.arange(self.most, device=negatives.device) >= negatives
        distinct = keys.topk(self.nce_k, dim=1, largest=False, sorted=False).indices
        if self.all_enough:
            return distinct
        return torch.where(negatives >= self.nce_k, distinct, _below(negatives, self.nce_k))


def _below(limit: Tensor, columns: int) -> Tensor:
    """Return random integers [B, columns], at least 0 and below each row's limit [B, 1]."""
    share = torch.rand(len(limit), columns, dtype=torch.float64, device=limit.device)
    return (share * limit).long()


class CRD(Distiller):
    """Applies the contrastive loss to embeddings of both networks' pooled features.

    For the arguments see `Contrast` and `Candidates`.

    Raises:
        UserError: all images are of one class, or a number is outside its bounds.
    """

    weights = (0.1, 0.9, 0.8)
    needs = "pooled"
    uses_target = True

    def __init__(
        self,
        student_widths: list[int],
        teacher_widths: list[int],
        train_target: Tensor,
        feat_dim: EmbeddingSize = 128,
        nce_k: Annotated[int, Option("negatives per image", 1, 10**9)] = 16384,
        nce_t: Annotated[float, Option("temperature of the contrast", 0.001, 1000.0)] = 0.07,
        nce_m: Annotated[float, Option.of_share("momentum of the memory banks")] = 0.5,
        mode: Annotated[str, Option("the positive is the image itself, or any of its class", choices=MODES)] = "exact",
    ) -> None:
        super().__init__()
        self.candidates = Candidates(train_target, nce_k, mode)
        self.embed_s, self.embed_t = UnitEmbed(student_widths[-1], feat_dim), UnitEmbed(teacher_widths[-1], feat_dim)
        self.contrast = Contrast(len(train_target), feat_dim, nce_t, nce_m)

    @classmethod
    def check(cls, options: dict[str, Any], device: torch.device = CPU) -> None:
        # per negative: its place, a random number, its score, and gradients
        size = 40 * options["batch_size"] * options["nce_k"]
        check_fits("CRD's negatives of a batch", size, "--nce_k or --batch_size", device)

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        v_s, v_t = self.embed_s(student.features[-1]), self.embed_t(teacher.features[-1])
        return {"crd": self.contrast(v_s, v_t, index, self.candidates(index, target))}

    def after_step(self) -> None:
        self.contrast.renew()
