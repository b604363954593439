"""SKD: compare the directions of both networks' logits within the batch (Jeong, Lee and Choi, CVPR 2026).

"Streamlined Knowledge Distillation".
"""

import torch
from torch import Tensor

from distiller_zoo.base import Distiller, at_least_float32, length, unit
from models import Output
from temperature import Tau

REGULARISATION = 0.1  # added to the variances, as in the released code


def skd_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the mean length of the rows of the difference of both networks' cosine matrices, a scalar.

    The cosine matrix [B, B] has the cosines between the logits of all pairs of images. The length of a row d is its
    Mahalanobis length sqrt(d^T S^-1 d), where S is the covariance of the rows plus 0.1 times the identity. Gradient
    also flows through S.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C']; only the batch must be the same.
    """
    s, t = unit(at_least_float32(student_logits)), unit(at_least_float32(teacher_logits))
    difference = s @ s.T - t @ t.T  # symmetric, so its columns are its rows
    count = len(difference)
    centred = difference - difference.mean(0)
    covariance = centred.T @ centred / max(count - 1, 1)  # torch.cov would synchronise the device
    root, _ = torch.linalg.cholesky_ex(covariance + REGULARISATION * torch.eye(count).to(difference))
    return length(torch.linalg.solve_triangular(root, difference, upper=False), 0).mean()


class SKD(Distiller):
    """Applies `skd_loss` in addition to the KD term, which is SKD's other part.

    OURS: the weights, and KD over all images. The released code omits images with confident teacher predictions, and
    scales `skd_loss` differently from the paper; this is the paper's form.
    """

    weights = (0.1, 0.9, 1.0)
    needs = "logits"
    is_recordable = False  # the factorisation has not been tried in a CUDA graph

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        return {"skd": skd_loss(student.logits, teacher.logits)}
