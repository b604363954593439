"""What is compared between teacher and student. Add one: a file like `kd.py`, and a line here."""

from collections.abc import Callable
from typing import Any

from distiller_zoo.base import Distiller
from distiller_zoo.kd import KD, kd_loss
from helper.errors import unknown

__all__ = ["Distiller", "create_distiller", "distiller_dict", "kd_loss"]

distiller_dict: dict[str, Callable[..., Distiller]] = {
    "kd": KD,
}


def create_distiller(name: str, **options: Any) -> Distiller:
    """The distiller called `name`; `options` are its constructor's. Raises UserError for an unknown name."""
    if name not in distiller_dict:
        raise unknown("distiller", name, distiller_dict)
    return distiller_dict[name](**options)
