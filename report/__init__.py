"""What runs left behind, read and shown: it trains nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_curve(history: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw a run's curves, see `report.plot.plot_run`, which takes long to import: no training waits for it."""
    from report.plot import plot_run

    plot_run(history, title, path)
