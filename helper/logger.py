"""Log a run: one JSON line per epoch, TensorBoard events, and a table on the screen."""

import json
import os
from contextlib import suppress
from pathlib import Path

# tensorboard_logger predates protobuf 4 and works only with its Python implementation, so the user's choice is ignored.
os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"
import tensorboard_logger

from helper.files import write_atomically, writing
from helper.run_files import Record


class RunLog:
    """`log.jsonl` and the TensorBoard events of a run's folder.

    Both are rewritten from the history in the checkpoint when a run resumes, so that even after a process was killed
    they have each epoch of the checkpoint exactly once.
    """

    def __init__(self, folder: Path, history: list[Record]) -> None:
        self.path = folder / "log.jsonl"
        with writing(self.path):
            if history:
                write_atomically(self.path, "".join(map(_json_line, history)).encode())
            else:
                self.path.unlink(missing_ok=True)
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
            self.events = _Events(str(folder), flush_secs=10)
            for record in history:
                self._add_events(record)

    def append(self, record: Record) -> None:
        """Add an epoch. Raises RunError if it cannot be written."""
        with writing(self.path):
            with open(self.path, "a") as file:
                file.write(_json_line(record))
            self._add_events(record)

    def _add_events(self, record: Record) -> None:
        stage = "first_stage/" if "stage" in record else ""
        for name, value in record.items():
            if name not in ("epoch", "stage"):
                self.events.log_value(stage + name, value, int(record["epoch"]))


class _Events(tensorboard_logger.Logger):
    def __del__(self) -> None:
        with suppress(OSError):  # the disk is full, which was reported when the epoch was written
            super().__del__()


def _json_line(record: Record) -> str:
    return json.dumps(record) + "\n"


# heading, key in the record, width, decimals
_COLUMNS = [
    ("stage", "stage", 5, 0),
    ("epoch", "epoch", 5, 0),
    ("step", "iteration", 7, 0),
    ("lr", "learning_rate", 8, 5),
    ("loss", "loss", 8, 4),
    ("train top-1", "train_top1", 11, 2),
    ("top-1", "top1", 6, 2),
    ("top-5", "top5", 6, 2),
    ("AP", "ap", 6, 2),
    ("AP50", "ap50", 6, 2),
    ("tau", "tau_mean", 6, 2),
    ("tau min-max", "tau_min", 13, 2),
    ("lambda", "lambda", 6, 3),
    ("images/s", "images_per_second", 8, 0),
    ("left", "seconds_left", 7, 0),
]


class EpochTable:
    """The table on the screen, one line per epoch."""

    def __init__(self) -> None:
        self.stage: float | None = None  # stage of the last line; 0 for the run's own epochs

    def add(self, record: Record, label: str = "") -> None:
        """Print an epoch, after the headings if it is the first one of its stage."""
        if self.stage != (stage := record.get("stage", 0)):
            headings = (f"{heading:>{width}}" for heading, key, width, _ in _COLUMNS if key in record)
            print(" " * len(label) + "  ".join(headings))
            self.stage = stage
        print(label + _line(record), flush=True)


def in_hours(seconds: float) -> str:
    """Return a duration as text, such as `2.4 h`, `12 min` or `5 s`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _line(record: Record) -> str:
    cells = []
    for _, key, width, decimals in _COLUMNS:
        if key == "tau_min" and "tau_max" in record:
            cells.append(f"{record['tau_min']:.2f}-{record['tau_max']:.2f}".rjust(width))
        elif key == "seconds_left" and key in record:
            cells.append(in_hours(record[key]).rjust(width))
        elif key in record:
            cells.append(f"{record[key]:{width}.{decimals}f}")
    return "  ".join(cells)
