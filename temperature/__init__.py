"""Temperatures: how soft the targets are. To add one, write a class like `Fixed` in its own file and a line here."""

from collections.abc import Callable
from typing import Any

from inputs import unknown
from temperature.annealing import Annealing
from temperature.base import Mixing, Tau, Temperature, as_tau
from temperature.cswt import CSWT, cswt_tau
from temperature.ctkd import CTKDGlobal, CTKDInstance
from temperature.dtkd import DTKD, dtkd_tau
from temperature.fixed import Fixed
from temperature.idts import IDTS, idts_tau
from temperature.normkd import NormKD, normkd_tau
from temperature.policy import Random
from temperature.rlkd import RLKD
from temperature.standardised import Standardised
from temperature.ttm import TTM, WTTM, ttm_tau

__all__ = [
    "Mixing", "Tau", "Temperature", "as_tau", "create_temperature", "cswt_tau", "dtkd_tau", "idts_tau", "normkd_tau",
    "temperature_dict", "ttm_tau",
]  # fmt: skip

temperature_dict: dict[str, Callable[..., Temperature]] = {
    "fixed": Fixed,
    "ctkd-global": CTKDGlobal,
    "ctkd-instance": CTKDInstance,
    "dtkd": DTKD,
    "rlkd": RLKD,
    "random": Random,
    "annealing": Annealing,
    "standardised": Standardised,
    "normkd": NormKD,
    "ttm": TTM,
    "wttm": WTTM,
    "cswt": CSWT,
    "idts": IDTS,
}


def create_temperature(name: str, **options: Any) -> Temperature:
    """Return the temperature `name`, constructed with `options`. Raises UserError for a wrong name or value."""
    if name not in temperature_dict:
        raise unknown("temperature", name, temperature_dict)
    return temperature_dict[name](**options)
