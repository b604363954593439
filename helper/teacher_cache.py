"""A teacher's output for a batch: computed (`OnlineTeacher`), or looked up in a table (`CachedTeacher`)."""

import json
import random
import shutil
import time
from collections.abc import Collection
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dataset.base import Batch, Epoch
from dataset.memory import MemoryLoader
from distiller_zoo import at_least_float32
from helper import distributed, signals
from helper.device import all_cores, autocast
from helper.errors import Interrupted, RunError
from helper.row_store import MOST, RowStore
from inputs import UserError, open_regular
from models import Model, Output
from models.renormalised import Renormalised

ASKED_PIXELS = {"cpu": 128 * 32**2, "cuda": 4096 * 32**2}  # per batch of the teacher
WRITTEN_AT_ONCE, WRITTEN_EVERY = 2**26, 2.0  # bytes or seconds between writes, since each write waits for the disk


class OnlineTeacher:
    """Runs the teacher on each batch.

    Args:
        model: the teacher, on the device and in evaluation mode.
        precision: one of options.flags.PRECISIONS.
    """

    def __init__(self, model: Model, precision: str = "fp32") -> None:
        self.model, self.precision = model, precision

    def prepare(self, batches: Epoch) -> None:
        """Do nothing: the teacher runs in each step."""

    def __call__(self, batch: Batch, also: Collection[str] = ()) -> Output:
        """Return features and logits [B, C] of the images, and the parts in `also`; logits in float32."""
        second = self.second(batch) if "second" in also else None
        with autocast(batch.images.device, self.precision):
            output = self.model(batch.images, is_feat=True, also=[name for name in also if name != "second"])
        return replace(output, logits=at_least_float32(output.logits), second=second)

    def second(self, batch: Batch) -> Output:
        """Return the logits [B, C] of the second view of the images."""
        with autocast(batch.images.device, self.precision):
            return Output([], at_least_float32(self.model(batch.second)))


class CachedTeacher:
    """A table of a frozen teacher's outputs, with one row per image and view.

    Since views are numbered (see dataset/memory.py), the teacher's outputs for a data set are a finite table. Later
    runs with the same teacher and data reuse and extend its files. At the start of an epoch the missing rows are
    computed, in batches larger than the student's, so that every lookup in the steps hits. On a GPU the whole table is
    also held in device memory.

    Args:
        model: the teacher, on the device, in evaluation mode.
        loader: loads the training images.
        folder: folder of this teacher's tables, each in a subfolder named after a hash of weights, images,
            normalisation and views. Created if it is missing.
        weights_sha256: identifies the model's weights.
        content: "logits" [B, C], or "pooled" for the pooled features, from which the teacher's last layer recomputes
            the logits.
        dtype: "float32" or "float16".
        precision: precision of the computation, "fp32", or "tf32" if `prepare_device` has set it up.

    Raises:
        UserError: the folder cannot be written, the table would have too many rows, or its content does not match the
            teacher's output.
    """

    def __init__(
        self,
        model: Model,
        loader: MemoryLoader,
        folder: Path,
        weights_sha256: str,
        content: str = "logits",
        dtype: str = "float32",
        precision: str = "fp32",
    ) -> None:
        self.online, self.loader, self.content, self.views = OnlineTeacher(model), loader, content, loader.num_views
        self.device = loader.target.device
        num_rows = loader.num_samples * self.views
        if num_rows > MOST:
            raise UserError(f"a table of {num_rows} views is too large: leave --teacher_table out, or use fewer images")
        width = model.classifier.out_features if content == "logits" else model.classifier.in_features
        identity = {
            "teacher_sha256": weights_sha256,
            "data": loader.fingerprint(),
            "images": loader.num_samples,
            "views": self.views,
            "content": content,
            "width": width,
            "dtype": dtype,
        }
        if precision != "fp32":
            identity["precision"] = precision
        if isinstance(model, Renormalised):
            identity["normalisation"] = [*model.scale.flatten().tolist(), *model.shift.flatten().tolist()]
        text = json.dumps(identity, indent=2) + "\n"
        self.folder = folder / f"{content}_{dtype}_{sha256(text.encode()).hexdigest()[:16]}"
        try:
            self.file = RowStore(self.folder, num_rows, width, getattr(torch, dtype), text)
        except UserError as error:
            raise UserError(f"{error}, or name another folder for the teacher's table with --table_dir") from error
        side = loader.view_of(*torch.zeros(2, 1, dtype=torch.int64, device=self.device)).shape[-1]
        self.at_once = max(1, ASKED_PIXELS[self.device.type] // side**2)
        self.on_device: Tensor | None = None
        if self.device.type != "cpu":
            self.on_device = torch.empty(num_rows, width, dtype=self.file.dtype, device=self.device)
        self._hold(self.file.refresh())
        self._check()
        self.asked_for = num_rows if loader.flip else num_rows // 2  # without flips, every other view is never drawn
        self._print_progress(identity)

    def prepare(self, batches: Epoch) -> None:
        """Compute an epoch's missing rows.

        Raises:
            Interrupted: a signal arrived before they were complete.
        """
        drawn = batches.drawn()
        is_done = drawn is None or self._compute_missing(drawn[0] * self.views + drawn[1])
        if distributed.any_rank(not is_done):
            raise Interrupted("stopped before the teacher had answered")

    def fill(self) -> None:
        """Compute all rows that are not in the table yet; on a CPU, use all its cores."""
        rows = torch.arange(len(self.file.position))
        rows = distributed.shard(rows if self.loader.flip else rows[::2])
        print(f"asking the teacher for {len(self.file.missing(rows)):,} answers", flush=True)
        try:
            with signals.deferred(), all_cores(self.device):
                is_done = self._compute_missing(rows)
            if distributed.any_rank(not is_done):
                signals.stop()
        except KeyboardInterrupt:
            print(f"\nstopped; the table keeps {self.file.read:,} answers: the same command goes on from there")
            raise

    def __call__(self, batch: Batch, also: Collection[str] = ()) -> Output:
        """Return logits [B, C] and, if the table holds them, the pooled features [B, D], in float32.

        For blended images the teacher runs instead: a blend is not a view of one image.
        """
        if batch.view is None:
            return self.online(batch, also)
        second = self.online.second(batch) if "second" in also else None  # second views are too many for a table
        rows = batch.index * self.views + batch.view
        if self.on_device is None:
            values = self.file.values.index_select(0, self.file.position.index_select(0, rows))
        else:
            values = self.on_device.index_select(0, rows)
        values = values.float()
        if self.content == "logits":
            return Output([], values, second=second)
        return Output([values], self.online.model.classifier(values), second=second)

    @torch.no_grad()
    def _compute_missing(self, rows: Tensor) -> bool:
        """Compute those of the rows that are missing; return False if a signal arrived first.

        Runs that fill one table at the same time share the work: each visits the rows in its own random order, and
        skips those that others have written meanwhile.
        """
        self._hold(self.file.refresh())
        rows = self.file.missing(rows)
        if not len(rows):
            return True
        batches = list(rows.split(self.at_once))
        random.SystemRandom().shuffle(batches)
        answers: list[tuple[Tensor, Tensor]] = []
        size = self.at_once * self.file.width * 4  # bytes of a batch of answers
        since, quiet = time.monotonic(), distributed.hide_progress()
        with tqdm(total=len(rows), desc="asking the teacher", unit="image", leave=False, disable=quiet) as bar:
            for number, batch in enumerate(batches, 1):
                if len(missing := self.file.missing(batch)):
                    answers.append((missing, self._compute(missing)))
                bar.update(len(batch))
                is_last = signals.asked() or number == len(batches)
                many = len(answers) * size >= WRITTEN_AT_ONCE
                if is_last or many or time.monotonic() - since >= WRITTEN_EVERY:
                    self._keep(answers)
                    answers, since = [], time.monotonic()
                if is_last:
                    return number == len(batches)
        return True

    def _keep(self, answers: list[tuple[Tensor, Tensor]]) -> None:
        """Write rows and their values to the table, and read the rows that other processes have written."""
        if not answers:
            return self._hold(self.file.refresh())
        rows, values = map(torch.cat, zip(*answers, strict=True))
        if not values.to(self.file.dtype).isfinite().all():
            raise RunError(
                "the teacher's output is not finite, or too large for --table_dtype float16: check its weights, or"
                " leave --teacher_table or --table_dtype out"
            )
        return self._hold(self.file.append(rows, values.cpu()))

    def _compute(self, rows: Tensor) -> Tensor:
        """Return the teacher's outputs [M, width] for rows [M]; the batch size is fixed, so they are reproducible."""
        size = len(rows)
        rows = torch.cat([rows, rows[:1].expand(self.at_once - size)]).to(self.device)
        images = self.loader.view_of(rows // self.views, rows % self.views)
        features, logits = self.online.model(images, is_feat=True)
        return (logits if self.content == "logits" else features[-1])[:size]

    @torch.no_grad()
    def _check(self) -> None:
        """Recompute a few rows and compare them, since damage need not change the files' lengths."""
        known = (self.file.position >= 0).nonzero()[:, 0]
        if not len(known):
            return
        rows = known[torch.linspace(0, len(known) - 1, min(self.at_once, len(known))).long()]
        computed, kept = self._compute(rows).cpu(), self.file.values[self.file.position[rows].long()].float()
        if not (kept - computed).abs().max() <= 1e-2 * computed.abs().max():  # also true for NaN
            raise UserError(
                f"the table {self.folder} is damaged, since it differs from the teacher's output: remove that folder,"
                " and its rows are computed again"
            )

    def _hold(self, rows: Tensor) -> None:
        """Copy the rows [M], the last ones read from the file, to the device."""
        if self.on_device is None or not len(rows):
            return
        for chunk, values in zip(rows.split(2**20), self.file.values[-len(rows) :].split(2**20), strict=True):
            self.on_device[chunk.to(self.device)] = values.to(self.device)
        torch.cuda.synchronize(self.device)  # other runs look up rows in their own streams

    def _print_progress(self, identity: dict[str, Any]) -> None:
        known, full = self.file.read, self.asked_for
        size = full * self.file.width * self.file.dtype.itemsize
        print(
            f"teacher table {self.folder}: {known:,} of {full:,} answers ({known / full:.0%});"
            f" {size / 1e6:,.0f} MB when full"
        )
        if size * (1 - known / full) > shutil.disk_usage(self.folder).free:
            print("note: the disk has too little space; when it is full the run stops, and can resume with more space")
        tables = (path for path in self.folder.parent.glob("*/table.json") if path.parent != self.folder)
        if others := [path.parent.name for path in tables if _of_others(path, identity)]:
            print(f"note: tables of other weights, images or subsets, not used here: {', '.join(sorted(others))}")


def _of_others(path: Path, identity: dict[str, Any]) -> bool:
    try:
        with open_regular(path) as file:
            other = json.load(file)
        return any(other[key] != identity[key] for key in ("teacher_sha256", "data"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return True
