"""MLKD: match predictions at several temperatures, by image, by class and by batch, in two views of each image.

Jin, Wang and Lin, CVPR 2023, "Multi-Level Logit Distillation".
"""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import Distiller, at_least_float32
from distiller_zoo.kd import kd_loss, softened
from inputs import CPU, Option, UserError
from models import Output
from temperature import Tau

FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5)  # of tau: 2, 3, 4, 5 and 6 at the published temperature of 4
FORMS = ("paper", "released")


def class_correlation_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float | Tensor | Tau) -> Tensor:
    """Return the squared difference of both networks' correlations between classes, a scalar.

    With softened probabilities q and p, [B, C]: |qT q - pT p|^2 / C, without a factor tau^2.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        tau: as in `kd_loss`.
    """
    q, p = softened(student_logits, teacher_logits, tau)
    return (q.T @ q - p.T @ p).square().sum() / q.shape[1]


def batch_correlation_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float | Tensor | Tau) -> Tensor:
    """Return the squared difference of both networks' correlations between images, |q qT - p pT|^2 / B, a scalar.

    The arguments are those of `class_correlation_loss`.
    """
    q, p = softened(student_logits, teacher_logits, tau)
    return (q @ q.T - p @ p.T).square().sum() / len(q)


def temperatures(tau: Tau) -> list[Tau]:
    """Return tau times each of FACTORS; a given `scale` is multiplied by the squared factor."""
    return [
        Tau(tau.student * factor, tau.teacher * factor, None if tau.scale is None else tau.scale * factor**2)
        for factor in FACTORS
    ]


def chosen(confidence: Tensor) -> Tensor:
    """Return the share of values [N] at or below their median, a scalar."""
    return (confidence <= confidence.median()).to(confidence.dtype).mean()


def mlkd_losses(
    student: Tensor, teacher: Tensor, tau: Tau, second: tuple[Tensor, Tensor] | None, form: str = "paper"
) -> dict[str, Tensor]:
    """Return MLKD's three terms, scalars: by image (KD), by class and by batch.

    The form "paper" sums each term over the five temperatures and both views.

    The form "released" computes what the published code does. Its masks of the images (classes) with a confidence at or
    below the median do not select anything; they multiply a whole term by their mean, about one half. KD of the second
    view uses the first view's logits at the lowest and at the highest temperature. The other terms of the second view
    are missing.

    Args:
        student: the student's logits [B, C] of the first view.
        teacher: the teacher's logits [B, C] of the first view.
        tau: the middle temperature.
        second: both networks' logits [B, C] of the second view; None if there is none.
        form: one of FORMS.
    """
    taus, views = temperatures(tau), [(student, teacher)] + ([second] if second else [])
    if form == "paper":
        return {
            name: torch.stack([loss(*view, each) for view in views for each in taus]).sum()
            for name, loss in (("mlkd", kd_loss), ("class", class_correlation_loss), ("batch", batch_correlation_loss))
        }
    probabilities = F.softmax(at_least_float32(teacher), dim=1)
    images, classes = chosen(probabilities.amax(1)), chosen(probabilities.sum(0))
    by_image = images * torch.stack([kd_loss(student, teacher, each) for each in taus]).sum()
    if second:
        ends = [kd_loss(student, teacher, each) for each in (taus[0], taus[-1])]
        by_image = by_image + torch.stack([*ends, *(kd_loss(*second, each) for each in taus[1:-1])]).sum()
    by_class = torch.stack([class_correlation_loss(student, teacher, each) for each in taus]).sum()
    by_batch = torch.stack([batch_correlation_loss(student, teacher, each) for each in taus]).sum()
    return {"mlkd": by_image, "class": classes * by_class, "batch": images * by_batch}


class MLKD(Distiller):
    """Applies `mlkd_losses` to two views of each image, or to one; the cross entropy uses the same views.

    The second view is another crop and flip with strong augmentation, see dataset/strong.py.

    Args:
        mlkd_form: "paper" or "released", see `mlkd_losses`.
        mlkd_views: 2, or 1 for a control without strong augmentation.

    Raises:
        UserError: an unknown form, or a number outside its bounds.
    """

    weights = (0.1, 0.0, 0.9)
    needs = "logits"
    uses_tau = True

    def __init__(
        self,
        mlkd_form: Annotated[
            str, Option("all terms of all views, as in the paper, or what the released code computes", choices=FORMS)
        ] = "paper",
        mlkd_views: Annotated[int, Option("views of each image, the second strongly augmented", 1, 2)] = 2,
    ) -> None:
        super().__init__()
        self.form, self.second_view = mlkd_form, mlkd_views == 2

    @classmethod
    def check(cls, options: dict[str, Any], device: torch.device = CPU) -> None:
        """Raise UserError for data whose images have no second view."""
        if options["mlkd_views"] == 1:
            return
        if options["dataset"] == "imagenet":
            raise UserError("--distill mlkd has a second view of small images only: give --mlkd_views 1 for imagenet")
        for key in ("mixup", "cutmix"):
            if options[key]:
                raise UserError(
                    f"--distill mlkd has no second view of mixed images: give --mlkd_views 1, or no --{key}"
                )

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        second = None
        if student.second and teacher.second:
            second = student.second.logits, teacher.second.logits
        return mlkd_losses(student.logits, teacher.logits, tau, second, self.form)
