"""A growing table of numbered vectors on disk, shared by successive and concurrent runs."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from helper.files import open_to_append, remove_leftovers, write_atomically, writing
from inputs import open_regular

MOST = 2**31 - 2  # row numbers fit into int32


class RowStore:
    """Rows of a fixed width, each written once, in the order of writing.

    The file `values` holds the rows one after another, and the file `rows` the number of each, from 1 (0 marks a place
    that was allocated but never written). Under a lock, values reach the disk before the numbers that make them valid.
    So a reader never sees half a row, even if a writer is killed, and concurrent writers append one after the other.

    Args:
        folder: folder of the files; created if it is missing.
        num_rows: the largest possible number of rows.
        width: values per row.
        dtype: float32 or float16.
        about: the content of `table.json`, which describes the table.

    Attributes:
        position: [num_rows] int32, where in `values` each row is; -1 if it is missing.
        values: [known, width], mapped from the file.
    """

    def __init__(self, folder: Path, num_rows: int, width: int, dtype: torch.dtype, about: str = "") -> None:
        self.rows_path, self.values_path, self.lock_path = (folder / name for name in ("rows", "values", ".lock"))
        self.width, self.dtype = width, dtype
        self.position = torch.full((num_rows,), -1, dtype=torch.int32)
        self.read = 0  # number of rows read from the files, which are in `position`
        self.values = torch.empty(0, width, dtype=dtype)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            remove_leftovers(folder)
            for path, content in ((folder / "table.json", about), (self.rows_path, ""), (self.values_path, "")):
                if path.exists():
                    open_regular(path).close()
                else:
                    write_atomically(path, content.encode())

    def refresh(self) -> Tensor:
        """Read rows appended by any process; return their numbers [M] int64."""
        with self._locked():
            return self._take_in()

    def missing(self, rows: Tensor) -> Tensor:
        """Return those of the rows [M] int64 that are not in the table."""
        return rows[self.position[rows] < 0]

    def append(self, rows: Tensor, values: Tensor) -> Tensor:
        """Append rows [M] int64 with values [M, width], except those that another process has already added.

        Returns:
            The numbers of all rows that are new to this process, as `refresh`.

        Raises:
            RunError: they cannot be written; the table keeps its earlier rows.
        """
        with self._locked():
            others = self._take_in()
            new = self.position[rows] < 0
            start = self.read
            self._write(self.values_path, start * self.width * self.dtype.itemsize, values[new].to(self.dtype))
            self._write(self.rows_path, start * 4, (rows[new] + 1).to(torch.int32))
            return torch.cat([others, self._take_in()])

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with writing(self.lock_path.parent), open_to_append(self.lock_path) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _take_in(self) -> Tensor:
        size = self.dtype.itemsize * self.width
        count = min(self.rows_path.stat().st_size // 4, self.values_path.stat().st_size // size)
        with open_regular(self.rows_path) as file:
            file.seek(4 * self.read)
            raw = bytearray(file.read(4 * (count - self.read)))
        rows = torch.frombuffer(raw, dtype=torch.int32).long() - 1 if raw else torch.empty(0, dtype=torch.int64)
        bad = ((rows < 0) | (rows >= len(self.position))).nonzero()
        if len(bad):  # the rest is invalid, and the next writer overwrites it
            rows = rows[: bad[0]]
        self.position[rows] = torch.arange(self.read, self.read + len(rows), dtype=torch.int32)
        self.read += len(rows)
        if len(rows):
            count = self.read * self.width
            self.values = torch.from_file(str(self.values_path), shared=False, size=count, dtype=self.dtype)
            self.values = self.values.view(self.read, self.width)
        return rows

    def _write(self, path: Path, offset: int, values: Tensor) -> None:
        with writing(path), open(path, "r+b") as file:
            file.truncate(offset)  # drop a killed writer's partial row
            file.seek(offset)
            file.write(values.contiguous().numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
