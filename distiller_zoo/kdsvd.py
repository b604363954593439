"""KDSVD: compare the relations between the main singular vectors of consecutive maps (Lee et al., ECCV 2018).

"Self-supervised Knowledge Distillation Using Singular Value Decomposition".
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from distiller_zoo.base import Distiller, at_least_float32
from distiller_zoo.maps import pair_stages, same_size
from inputs import Option, UserError
from models import Output
from temperature import Tau

CANDIDATES = 4  # vectors of the student; the one nearest to the teacher's is compared
EPS = 1e-6  # relative to the largest eigenvalue: eigenvalues that differ by less have no gradient between them
FORMS = ("rows", "channels")


class _Eigenvectors(torch.autograd.Function):
    """The eigenvectors of symmetric matrices [B, N, N], with finite gradients where eigenvalues are equal.

    The eigenvectors of a matrix that is not finite are NaN.
    """

    @staticmethod
    def forward(ctx: Any, matrices: Tensor) -> Tensor:
        is_finite = matrices.isfinite().all(2, keepdim=True).all(1, keepdim=True)
        values, vectors = torch.linalg.eigh(torch.where(is_finite, matrices, 0))  # it raises for infinities and NaN
        ctx.save_for_backward(values, vectors)
        return torch.where(is_finite, vectors, torch.nan)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        gap = values[:, None] - values[:, :, None]  # of column and row
        smallest = EPS * values.abs().amax(1)[:, None, None]
        inverse = gap / (gap.square() + smallest.square()).clamp(min=torch.finfo(gap.dtype).tiny)
        inner = vectors @ (inverse * (vectors.mT @ slope)) @ vectors.mT
        return (inner + inner.mT) / 2


def singular_vectors(maps: Tensor, form: str) -> Tensor:
    """Return the right singular vectors of the largest singular values, [B, N, CANDIDATES], the largest first.

    Args:
        maps: [B, C, H, W].
        form: "rows", of the matrices [C * H, W] as in mdistiller, so N is W; or "channels", of the matrices [H * W, C]
            as in RepDistiller, so N is C.
    """
    maps = at_least_float32(maps)
    matrices = maps.flatten(1, 2) if form == "rows" else maps.flatten(2).mT
    return _Eigenvectors.apply(matrices.mT @ matrices).flip(2)[..., :CANDIDATES]


def kdsvd_loss(maps_s: Sequence[Tensor], maps_t: Sequence[Tensor], form: str = "rows") -> Tensor:
    """Return the squared difference of both networks' relations between consecutive maps, a scalar.

    The relation of two maps with main singular vectors v and w is exp(-(v_i - w_j)^2 / 8) for all pairs of elements.
    The squares are summed over pairs of elements and of maps, and averaged over the batch.

    A singular vector's sign is arbitrary, and the published loss depends on it. Here the sign of the teacher's vector
    makes its sum positive; that of the student's makes it point towards the teacher's, as published.

    Args:
        maps_s: the student's maps [B, C, H, W] of each stage.
        maps_t: the teacher's maps, of the same number and sizes; with the form "channels" also of the same widths.
        form: see `singular_vectors`.
    """
    relations = []
    with torch.no_grad():
        theirs = [singular_vectors(each, form)[..., 0] for each in maps_t]
        theirs = [each * torch.where(each.sum(1, keepdim=True) < 0, -1, 1) for each in theirs]
    ours = [_nearest(singular_vectors(each, form), vector) for each, vector in zip(maps_s, theirs, strict=True)]
    for vectors in (ours, theirs):
        pairs = zip(vectors, vectors[1:], strict=False)
        relations.append([(-(high[:, :, None] - low[:, None]).square() / 8).exp() for low, high in pairs])
    terms = [(s - t).square().sum((1, 2)).mean() for s, t in zip(*relations, strict=True)]
    return torch.stack(terms).sum()


def _nearest(candidates: Tensor, vector: Tensor) -> Tensor:
    """Return the candidate [B, N], one of K in [B, N, K], that is nearest in direction to the vector [B, N].

    Its sign is chosen so that it points towards the vector.
    """
    cosine = (candidates.mT @ vector[:, :, None])[..., 0]
    best = cosine.abs().argmax(1, keepdim=True)
    sign = torch.where(cosine.gather(1, best) < 0, -1, 1)
    return candidates.gather(2, best[:, None].expand(-1, candidates.shape[1], -1))[..., 0] * sign


class KDSVD(Distiller):
    """Applies `kdsvd_loss` to the stages, paired by `pair_stages`; larger maps are average-pooled to the smaller size.

    OURS: for a student with only one stage, the stem and that stage are compared.

    Args:
        kdsvd_form: see `singular_vectors`.

    Raises:
        UserError: "channels" for networks of different widths, or an unknown form.
    """

    weights = (0.1, 0.9, 1.0)
    is_recordable = False  # computing eigenvectors synchronises the device

    def __init__(
        self,
        student_widths: list[int],
        teacher_widths: list[int],
        kdsvd_form: Annotated[
            str, Option("vectors over columns, as in mdistiller, or over channels, as in RepDistiller", choices=FORMS)
        ] = "rows",
    ) -> None:
        super().__init__()
        stages = pair_stages(len(student_widths) - 2, len(teacher_widths) - 2)
        self.pairs = [(i, stage + 1) for i, stage in enumerate(stages, 1)]  # indices into the features
        if len(stages) == 1:
            self.pairs.insert(0, (0, 0))
        self.form = kdsvd_form
        if kdsvd_form == "channels" and any(student_widths[i] != teacher_widths[j] for i, j in self.pairs):
            raise UserError("--kdsvd_form channels needs stages of equal widths: leave it out for this pair")

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        pairs = [same_size(student.features[i], teacher.features[j]) for i, j in self.pairs]
        return {"kdsvd": kdsvd_loss(*zip(*pairs, strict=True), self.form)}
