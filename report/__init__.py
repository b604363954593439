"""Read runs and show their results; nothing here trains."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_curve(history: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw a run's curves with `report.plot.plot_run`, which is slow to import and so imported only here."""
    from report.plot import plot_run

    plot_run(history, title, path)
