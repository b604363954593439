"""Temperatures: how soft the targets are. To add one, write a class like `Fixed` in its own file and a line here."""

from collections.abc import Callable
from typing import Any

from inputs import unknown
from temperature.annealing import Annealing
from temperature.base import Mixing, Tau, Temperature, as_tau
from temperature.ctkd import CTKDGlobal, CTKDInstance
from temperature.dtkd import DTKD
from temperature.fixed import Fixed
from temperature.policy import Random
from temperature.rlkd import RLKD
from temperature.standardised import Standardised

__all__ = ["Mixing", "Tau", "Temperature", "as_tau", "create_temperature", "temperature_dict"]

temperature_dict: dict[str, Callable[..., Temperature]] = {
    "fixed": Fixed,
    "ctkd-global": CTKDGlobal,
    "ctkd-instance": CTKDInstance,
    "dtkd": DTKD,
    "rlkd": RLKD,
    "random": Random,
    "annealing": Annealing,
    "standardised": Standardised,
}


def create_temperature(name: str, **options: Any) -> Temperature:
    """Return the temperature `name`, constructed with `options`. Raises UserError for a name or option it refuses."""
    if name not in temperature_dict:
        raise unknown("temperature", name, temperature_dict)
    return temperature_dict[name](**options)
