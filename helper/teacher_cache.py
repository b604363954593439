"""A teacher's output for a batch: computed anew (`OnlineTeacher`), or looked up in a table (`CachedTeacher`)."""

import json
import random
import shutil
import time
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
from helper.device import autocast
from helper.errors import Interrupted, RunError, UserError
from helper.files import reason, try_writing
from helper.row_store import MOST, RowStore
from inputs import InputError, open_regular
from models import Model, Output

ASKED_PIXELS = {"cpu": 128 * 32**2, "cuda": 4096 * 32**2}  # at once
WRITTEN_AT_ONCE, WRITTEN_EVERY = 8192, 2.0  # answers are written after so many rows or seconds
DTYPES = {"float32": torch.float32, "float16": torch.float16}


class OnlineTeacher:
    """The teacher itself, asked anew for each batch.

    Args:
        model: on the device, in evaluation mode. precision: what it computes in, one of helper.flags.PRECISIONS.
    """

    def __init__(self, model: Model, precision: str = "fp32") -> None:
        self.model, self.precision = model, precision

    def prepare(self, batches: Epoch) -> None:
        """Do nothing: the teacher is asked in each step."""

    def __call__(self, batch: Batch) -> Output:
        """Features and logits [B, C] of the images; logits in float32."""
        with autocast(batch.images.device, self.precision):
            said = self.model(batch.images, is_feat=True)
        return Output(said.features, at_least_float32(said.logits))


def check_table_dir(folder: Path) -> None:
    """Raise UserError where no table can be written into a folder, before anything takes time."""
    try:
        try_writing(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the teacher's table cannot be written into {folder} ({reason(error)}): name another folder with"
            " --table_dir"
        ) from error


class CachedTeacher:
    """A frozen teacher's answers to all that it can be asked: a row for each image and each of its views.

    Augmentations that can be counted (see dataset/memory.py) make what a teacher says of a data set a finite table.
    It is kept in files that later runs with the same teacher and data go on with. At the start of an epoch the teacher
    is asked for the rows that are missing, in batches larger than the student's; the steps only
    look up. On a GPU the table is held in device memory too, all of it.

    Args:
        model: the teacher, on the device, in evaluation mode.
        loader: of the training images.
        folder: where tables of this teacher are; each in a folder of its own, named after a hash of weights, images,
            normalisation and views. Made if it is not there.
        weights_sha256: which weights the model has.
        content: "logits" for [B, C], or "pooled" for the pooled features, from which the teacher's last layer makes the
            logits again.
        dtype: "float32" or "float16".
        precision: what the answers are computed in, "fp32" or, with the device set up for it, "tf32".

    Raises:
        UserError: the folder cannot be written, the table would have more rows than can be numbered, or what is in it
            is not what the teacher says.
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
        text = json.dumps(identity, indent=2) + "\n"
        self.folder = folder / f"{content}_{dtype}_{sha256(text.encode()).hexdigest()[:16]}"
        try:
            self.file = RowStore(self.folder, num_rows, width, DTYPES[dtype], text)
        except InputError as error:
            raise UserError(f"{error}, or name another folder for the teacher's table with --table_dir") from error
        side = loader.view_of(*torch.zeros(2, 1, dtype=torch.int64, device=self.device)).shape[-1]
        self.at_once = max(1, ASKED_PIXELS[self.device.type] // side**2)
        self.on_device: Tensor | None = None
        if self.device.type != "cpu":
            self.on_device = torch.empty(num_rows, width, dtype=DTYPES[dtype], device=self.device)
        self._hold(self.file.refresh())
        self._check()
        self.asked_for = num_rows if loader.flip else num_rows // 2  # of the others no view is ever drawn
        self._tell(identity)

    def prepare(self, batches: Epoch) -> None:
        """Ask the teacher for the rows of an epoch that are missing.

        Raises:
            Interrupted: the process was asked to end before they were complete.
        """
        drawn = batches.drawn()
        is_done = drawn is None or self._ask(drawn[0] * self.views + drawn[1])
        if distributed.any_rank(not is_done):
            raise Interrupted("stopped before the teacher had answered")

    def fill(self) -> None:
        """Ask the teacher for all that is not in the table yet."""
        rows = torch.arange(len(self.file.position))
        rows = distributed.shard(rows if self.loader.flip else rows[::2])
        print(f"asking the teacher for {len(self.file.missing(rows)):,} answers", flush=True)
        try:
            with signals.looked_at():
                is_done = self._ask(rows)
            if distributed.any_rank(not is_done):
                signals.stop()
        except KeyboardInterrupt:
            print(f"\nstopped; the table keeps {self.file.read:,} answers: the same command goes on from there")
            raise

    def __call__(self, batch: Batch) -> Output:
        """Logits [B, C] of the batch, and as features the pooled ones [B, D] where the table holds them, in float32.

        The teacher itself is asked where images are blended: a blend is no view of any one image.
        """
        if batch.view is None:
            return self.online(batch)
        rows = batch.index * self.views + batch.view
        if self.on_device is None:
            said = self.file.values.index_select(0, self.file.position.index_select(0, rows))
        else:
            said = self.on_device.index_select(0, rows)
        said = said.float()
        if self.content == "logits":
            return Output([], said)
        return Output([said], self.online.model.classifier(said))

    @torch.no_grad()
    def _ask(self, rows: Tensor) -> bool:
        """Ask the teacher for those of the rows that are missing; returns False if the process was asked to end.

        Runs that fill one table at the same time share the work: each goes through the rows in a random order of its
        own, and leaves out what others have written since.
        """
        self._hold(self.file.refresh())
        rows = self.file.missing(rows)
        if not len(rows):
            return True
        batches = list(rows.split(self.at_once))
        random.SystemRandom().shuffle(batches)
        answers: list[tuple[Tensor, Tensor]] = []
        since, quiet = time.monotonic(), distributed.hide_progress()
        with tqdm(total=len(rows), desc="asking the teacher", unit="image", leave=False, disable=quiet) as bar:
            for number, batch in enumerate(batches, 1):
                if len(missing := self.file.missing(batch)):
                    answers.append((missing, self._asked(missing)))
                bar.update(len(batch))
                is_last = signals.asked() or number == len(batches)
                many = len(answers) * self.at_once >= WRITTEN_AT_ONCE
                if is_last or many or time.monotonic() - since >= WRITTEN_EVERY:
                    self._keep(answers)
                    answers, since = [], time.monotonic()
                if is_last:
                    return number == len(batches)
        return True

    def _keep(self, answers: list[tuple[Tensor, Tensor]]) -> None:
        """Write rows with the teacher's answers to the table, and read what others have written."""
        if not answers:
            return self._hold(self.file.refresh())
        rows, said = map(torch.cat, zip(*answers, strict=True))
        if not said.to(self.file.dtype).isfinite().all():
            raise RunError(
                "the teacher says something that is not finite, or too large for --table_dtype float16: check"
                " its weights, or leave --teacher_table or --table_dtype out"
            )
        return self._hold(self.file.append(rows, said.cpu()))

    def _asked(self, rows: Tensor) -> Tensor:
        """The teacher's answers [M, width] to rows [M]. Always in batches of one size: so an answer does not depend on
        what else happened to be missing."""
        size = len(rows)
        rows = torch.cat([rows, rows[:1].expand(self.at_once - size)]).to(self.device)
        images = self.loader.view_of(rows // self.views, rows % self.views)
        features, logits = self.online.model(images, is_feat=True)
        return (logits if self.content == "logits" else features[-1])[:size]

    @torch.no_grad()
    def _check(self) -> None:
        """Ask the teacher again for a few rows: files may be damaged in ways that their lengths do not show."""
        known = (self.file.position >= 0).nonzero()[:, 0]
        if not len(known):
            return
        rows = known[torch.linspace(0, len(known) - 1, min(self.at_once, len(known))).long()]
        said, kept = self._asked(rows).cpu(), self.file.values[self.file.position[rows].long()].float()
        if not (kept - said).abs().max() <= 1e-2 * said.abs().max():  # NaN is no fit either
            raise UserError(
                f"the table {self.folder} is damaged, for it does not hold what the teacher says: remove that folder,"
                " and its answers are asked for anew"
            )

    def _hold(self, rows: Tensor) -> None:
        """Copy the rows [M] that were read last from the file to the device."""
        if self.on_device is None or not len(rows):
            return
        for chunk, values in zip(rows.split(2**20), self.file.values[-len(rows) :].split(2**20), strict=True):
            self.on_device[chunk.to(self.device)] = values.to(self.device)
        torch.cuda.synchronize(self.device)  # other runs look up in streams of their own

    def _tell(self, identity: dict[str, Any]) -> None:
        known, full = self.file.read, self.asked_for
        size = full * self.file.width * self.file.dtype.itemsize
        print(
            f"teacher table {self.folder}: {known:,} of {full:,} answers ({known / full:.0%});"
            f" {size / 1e6:,.0f} MB when full"
        )
        if size * (1 - known / full) > shutil.disk_usage(self.folder).free:
            print("note: the disk has not as much room; where it gets full the run stops, and goes on with more")
        tables = (path for path in self.folder.parent.glob("*/table.json") if path.parent != self.folder)
        if others := [path.parent.name for path in tables if _of_others(path, identity)]:
            print(f"note: of other weights, images or subsets, and not used here: {', '.join(sorted(others))}")


def _of_others(path: Path, identity: dict[str, Any]) -> bool:
    try:
        with open_regular(path) as file:
            other = json.load(file)
        return any(other[key] != identity[key] for key in ("teacher_sha256", "data"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return True
