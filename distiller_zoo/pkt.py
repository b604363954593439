"""PKT: match similarities between images, as probabilities (Passalis and Tefas, ECCV 2018, arXiv 1803.10837)."""

from torch import Tensor

from distiller_zoo.base import Distiller, at_least_float32
from models import Output
from temperature import Tau

EPS = 1e-7


def pkt_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Return the mean over all pairs of images of p_t log(p_t / p_s), a scalar.

    p[i, j] is the cosine similarity of images i and j, mapped from [-1, 1] to [0, 1] and divided by its row's sum: the
    paper's conditional probabilities with the cosine kernel. The mean over B^2 pairs, as in the published code, makes
    the loss small; hence its weight of 30000. A zero feature has cosine similarity 0 with all others, not NaN.

    Args:
        f_s: the student's pooled features [B, D].
        f_t: the teacher's pooled features [B, E].
    """
    p_s, p_t = _similarities(f_s), _similarities(f_t)
    return (p_t * ((p_t + EPS) / (p_s + EPS)).log()).mean()


def _similarities(features: Tensor) -> Tensor:
    features = at_least_float32(features)
    unit = features / (features.norm(dim=1, keepdim=True) + EPS)  # as published; the weight of 30000 makes it matter
    similarity = (unit @ unit.T + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)


class PKT(Distiller):
    """Applies `pkt_loss` to the pooled features."""

    weights = (0.1, 0.9, 30000.0)
    needs = "pooled"

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        return {"pkt": pkt_loss(student.features[-1], teacher.features[-1])}
