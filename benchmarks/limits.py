"""Limits of the benchmarks' numeric arguments."""

from typing import Any

from inputs import Option
from options.flags import all_options

LIMITS = {
    "rounds": Option(least=1, most=10_000),
    "images": Option(least=1, most=10**7),
    "classes": Option(least=5, most=100_000),
    "workers": Option(least=0, most=512),
    "steps": Option(least=1, most=10_000),
    "batches": Option(least=2, most=10**7),
    "threads": Option(least=1, most=1024),
    "seconds": Option(least=1, most=1e6),
    "minutes": Option(least=0.1, most=1e5),
    "at_once": Option(least=1, most=1000),
    "seeds": Option(least=1, most=1000),
    "images_per_second": Option(least=0.001, most=1e9),
}


def check_numbers(args: dict[str, Any]) -> None:
    """Raise UserError if an argument is outside its limits, in LIMITS or in the training scripts' options."""
    known = LIMITS | {name: declared.option for name, declared in all_options().items() if name not in LIMITS}
    for name, value in args.items():
        if name in known:
            known[name].check(name, value)
