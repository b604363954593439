"""The teacher prepared for inference, and the table of its outputs."""

import copy
import itertools
import math
import os
import shutil
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from common import FAMILIES, Tiny, holds, loader_of, make, rows_of, table_file
from torch import nn

from dataset import Dataset
from helper import signals, teacher_cache
from helper.errors import Interrupted, RunError
from helper.metrics import Metrics
from helper.row_store import RowStore
from helper.run_folder import RunFolder
from helper.teacher import fold_batch_norm
from helper.teacher_cache import CachedTeacher, OnlineTeacher
from helper.trainer import Trainer, make_optimizer
from inputs import UserError
from models import Model, create_model


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_folded_teacher_says_the_same(name):
    torch.manual_seed(0)
    model = create_model(name, 10).train()
    model(torch.randn(8, 3, 32, 32))  # makes running statistics other than 0 and 1
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.eval().modules())
    images = torch.randn(4, 3, 32, 32)
    plain = model(images, is_feat=True, also=("preact", "class_maps"))
    folded = fold_batch_norm(copy.deepcopy(model))
    left = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert left == (norms // 2 + 1 if name.startswith("wrn") else 0)  # no convolution before pre-activation norms
    said = folded(images, is_feat=True, also=("preact", "class_maps"))
    compared = [[*each.features, each.logits, *each.preact, each.class_maps] for each in (said, plain)]
    for ours, theirs in zip(*compared, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


class Shared(Model):
    """A convolution that is used twice, whose weights are used elsewhere, or whose use depends on the input."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.bn, self.classifier = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 2)
        self.how = how

    def extract(self, x):
        if self.how == "input" and x.sum() > 0:
            x = -x
        if self.how == "twice":
            x = self.conv(x)
        if self.how == "weights":
            x = x * self.conv.weight.mean()
        x = self.bn(self.conv(x))
        return [x, x.mean((2, 3))]


@pytest.mark.parametrize("how", ["twice", "weights", "input"])
def test_what_cannot_be_folded_stays_as_it_is(how):
    model = Shared(how).eval()
    model.bn.running_mean.fill_(0.5)
    images = torch.randn(2, 3, 4, 4)
    before = model(images)
    after = fold_batch_norm(model)(images)
    assert torch.equal(before, after) and isinstance(model.bn, nn.BatchNorm2d)


def test_a_table_is_read_by_those_who_come_later_and_at_the_same_time(tmp_path):
    first, second = table_file(tmp_path), table_file(tmp_path)
    first.append(*rows_of(7, 0, 49))
    assert holds(first, 7, 0, 49) and holds(second, 7, 0, 49)
    second.append(*rows_of(3, 7))  # 7 exists already
    assert second.read == 4
    assert holds(first, 7, 0, 49, 3) and holds(table_file(tmp_path), 7, 0, 49, 3)
    assert first.missing(torch.tensor([1, 3, 2])).tolist() == [1, 2]


@pytest.mark.parametrize("rows_end", [0, 3, 4, 6, 8])
@pytest.mark.parametrize("values_end", [0, 11, 12, 20, 24])
def test_a_writer_that_was_killed_leaves_whole_rows_only(tmp_path, rows_end, values_end):
    table_file(tmp_path).append(*rows_of(9))
    whole = {name: (tmp_path / name).read_bytes() for name in ("rows", "values")}
    table_file(tmp_path).append(*rows_of(4, 5))
    added = {name: (tmp_path / name).read_bytes()[len(whole[name]) :] for name in whole}
    for name, end in (("rows", rows_end), ("values", values_end)):
        (tmp_path / name).write_bytes(whole[name] + added[name][:end])
    expected = [9, 4, 5][: 1 + min(rows_end // 4, values_end // 12)]
    assert holds(table_file(tmp_path), *expected)
    table_file(tmp_path).append(*rows_of(8, 4, 5))
    assert holds(table_file(tmp_path), 8, 9, 4, 5)


def test_a_file_whose_end_was_never_written_is_gone_on_with(tmp_path):
    table_file(tmp_path).append(*rows_of(9))
    for name, size in (("rows", 8), ("values", 24)):
        with open(tmp_path / name, "ab") as file:
            file.write(bytes(size))
    assert holds(table_file(tmp_path), 9)
    table_file(tmp_path).append(*rows_of(4))
    assert holds(table_file(tmp_path), 9, 4)


@pytest.mark.parametrize("writes", [0, 1])
def test_a_writer_killed_between_its_writes_loses_its_own_rows_only(tmp_path, monkeypatch, writes):
    table = table_file(tmp_path)
    table.append(*rows_of(1))
    real, written = os.fsync, []

    def killed(number):
        if len(written) == writes:
            raise KeyboardInterrupt
        written.append(number)
        real(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            table.append(*rows_of(2, 3, 4))
    for name, size in (("rows", 4), ("values", 12)):
        content = (tmp_path / name).read_bytes()
        if (name == "values") == (writes == 0):  # this had not reached the disk
            (tmp_path / name).write_bytes(content[:size])
    assert holds(table_file(tmp_path), 1)
    table_file(tmp_path).append(*rows_of(7))
    assert holds(table_file(tmp_path), 1, 7)


def test_a_full_disk_is_said_and_loses_nothing(tmp_path, monkeypatch):
    table = table_file(tmp_path)
    table.append(*rows_of(1))

    def full(number):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="values cannot be written .No space left on device."):
            table.append(*rows_of(2, 3))
    assert holds(table_file(tmp_path), 1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        RowStore(tmp_path / "file" / "table", 3, 3, torch.float32)


def tiny_teacher(seed=0):
    torch.manual_seed(seed)
    return Tiny(width=12).eval().requires_grad_(False)


def asked_of(model):
    """Return a list of the batch sizes that the model gets from now on."""
    seen = []
    model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize("content", ["logits", "pooled"])
@torch.no_grad()
def test_a_table_says_what_the_teacher_says(tmp_path, content):
    model, loader = tiny_teacher(), loader_of()
    table = CachedTeacher(model, loader, tmp_path, "sha", content)
    for epoch in (1, 2):
        batches = loader.epoch(epoch)
        table.prepare(batches)
        for batch in batches:
            said, live = table(batch), OnlineTeacher(model)(batch)
            torch.testing.assert_close(said.logits, live.logits, rtol=1e-5, atol=1e-6)
            assert len(said.features) == (content == "pooled")
            if content == "pooled":
                torch.testing.assert_close(said.features[-1], live.features[-1], rtol=1e-5, atol=1e-6)


def test_each_view_is_asked_for_once_by_all_runs_together(tmp_path):
    model, loader = tiny_teacher(), loader_of()
    seen = asked_of(model)
    table = CachedTeacher(model, loader, tmp_path, "sha")
    for _ in range(2):
        table.prepare(loader.epoch(1))
        assert table.file.read == 96
    assert seen == [128]  # 96, in batches of one fixed size
    later = CachedTeacher(model, loader_of(), tmp_path, "sha")
    seen.clear()  # from its check that the files match the teacher
    later.prepare(loader.epoch(1))
    assert not seen
    later.prepare(loader.epoch(2))
    assert len(seen) == 1 and 96 < later.file.read <= 192
    table.prepare(loader.epoch(2))  # it reads what the other one computed
    assert len(seen) == 1


@pytest.mark.parametrize("damage", [0.0, math.nan, 3.0])
def test_a_table_with_other_values_is_noticed(damage, tmp_path):
    model, loader = tiny_teacher(), loader_of()
    table = CachedTeacher(model, loader, tmp_path, "sha")
    table.prepare(loader.epoch(1))
    values = torch.from_file(str(table.folder / "values"), shared=True, size=960)
    values[480:] = damage
    with pytest.raises(UserError, match="is damaged, since it differs from the teacher's output: remove that folder"):
        CachedTeacher(model, loader, tmp_path, "sha")
    shutil.rmtree(table.folder)
    CachedTeacher(model, loader, tmp_path, "sha").prepare(loader.epoch(1))


def test_a_filling_that_is_stopped_says_what_it_keeps(tmp_path, monkeypatch, capsys):
    model, loader = tiny_teacher(), loader_of()
    table, real = CachedTeacher(model, loader, tmp_path, "sha"), RowStore.append

    def append(self, *given):
        real(self, *given)
        raise KeyboardInterrupt

    monkeypatch.setattr(RowStore, "append", append)
    monkeypatch.setattr(teacher_cache, "WRITTEN_EVERY", math.inf)
    with pytest.raises(KeyboardInterrupt):
        table.fill()
    told = capsys.readouterr().out
    assert "asking the teacher for 7,776 answers" in told and "the table keeps 7,776 answers: the same command" in told


def asked_to_end_after(batches, table, monkeypatch):
    """Send SIGTERM to this process when the teacher runs on the given batch, counted from 1, of 16 rows each."""
    monkeypatch.setattr(signals._Asked, "number", None)
    real, numbers = table._compute, itertools.count(1)

    def signalled(*given):
        if next(numbers) == batches:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr(table, "_compute", signalled)
    table.at_once = 16
    signals.listen()


def test_a_filling_that_gets_sigterm_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    model, loader = tiny_teacher(), loader_of()
    table = CachedTeacher(model, loader, tmp_path, "sha")
    asked_to_end_after(3, table, monkeypatch)
    with pytest.raises(signals.Terminated):
        table.fill()
    assert "the table keeps 48 answers: the same command goes on from there" in capsys.readouterr().out
    assert CachedTeacher(model, loader, tmp_path, "sha").file.read == 48


def test_a_run_that_gets_sigterm_while_it_asks_keeps_the_answers_and_its_state(tmp_path, monkeypatch):
    """It makes no step, whose outputs would be missing, and so has nothing to save."""
    loader, module = loader_of(), make()
    table = CachedTeacher(tiny_teacher(), loader, tmp_path / "tables", "sha")
    asked_to_end_after(2, table, monkeypatch)
    run = RunFolder(tmp_path, "tiny", {"options": {}, "epochs": 3}, overwrite=True)
    optimizer, data = make_optimizer(module, 0.05, 0.9, 0), Dataset(loader, loader, 10)
    options = {"epochs": 3, "learning_rate": 0.05, "lr_decay_epochs": [], "lr_decay_rate": 0.1, "print_freq": 1}
    with pytest.raises(Interrupted, match="before the teacher had answered"), signals.deferred():
        Trainer(run, module, table, optimizer, Metrics(), data, SimpleNamespace(**options)).fit()
    assert table.file.read == 32
    assert run.step == 0 and run.trained is None and not run.history and not (tmp_path / "last.pth").exists()
    monkeypatch.setattr(signals._Asked, "number", None)
    table.prepare(loader.epoch(1))
    assert table.file.read == 96


def test_answers_are_written_every_few_seconds(tmp_path, monkeypatch):
    table, written, real = CachedTeacher(tiny_teacher(), loader_of(), tmp_path, "sha"), [], RowStore.append
    table.at_once = 16

    def append(self, rows, values):
        written.append(len(rows))
        return real(self, rows, values)

    monkeypatch.setattr(RowStore, "append", append)
    monkeypatch.setattr(teacher_cache.time, "monotonic", itertools.count(0, teacher_cache.WRITTEN_EVERY / 2).__next__)
    table.prepare(loader_of().epoch(1))
    assert sum(written) == 96 and max(written) <= 48


def test_a_fast_teachers_answers_are_written_by_the_megabyte(tmp_path, monkeypatch):
    """On a GPU every write would wait for the disk and the device."""
    table, written, real = CachedTeacher(tiny_teacher(), loader_of(), tmp_path, "sha"), [], RowStore.append
    table.at_once = 16
    monkeypatch.setattr(teacher_cache, "WRITTEN_EVERY", math.inf)
    monkeypatch.setattr(teacher_cache, "WRITTEN_AT_ONCE", 2 * 16 * 10 * 4)  # two batches of 16 rows of 10 float32
    monkeypatch.setattr(
        RowStore, "append", lambda self, rows, said: written.append(len(rows)) or real(self, rows, said)
    )
    table.prepare(loader_of().epoch(1))
    assert written == [32, 32, 32]


def test_runs_that_fill_a_table_at_the_same_time_share_the_work(tmp_path, monkeypatch):
    """Each uses its own order, and does not recompute what the other one has written."""
    loader, orders = loader_of(), []
    first, second = (CachedTeacher(tiny_teacher(), loader, tmp_path, "sha") for _ in range(2))
    monkeypatch.setattr(teacher_cache, "WRITTEN_EVERY", 0.0)
    for table in (first, second):
        table.at_once = 2
        orders.append([])

        def asked(rows, order=orders[-1], real=table._compute):
            order.append(rows[0].item())
            if order is orders[0] and len(order) == 11:
                second.prepare(loader.epoch(1))
            return real(rows)

        monkeypatch.setattr(table, "_compute", asked)
    first.prepare(loader.epoch(1))
    assert len(orders[0]) == 11 and len(orders[1]) == 38  # of 48, one of which was in progress
    index, view = loader.epoch(1).drawn()
    in_order = [row for row in (index * 162 + view).tolist() if row in orders[1]]
    assert orders[1] != in_order
    assert first.file.read == second.file.read == 96


def test_a_table_in_device_memory_holds_what_it_has_just_asked_for(tmp_path, monkeypatch):
    """Emulated: in the memory of the CPU."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    model, loader = tiny_teacher(), loader_of()
    first, second = (CachedTeacher(model, loader, tmp_path, "sha") for _ in range(2))
    first.on_device = torch.full((len(first.file.position), 10), math.nan)
    second.prepare(loader.epoch(1))
    for epoch in (1, 2):  # computed by the other one, and by itself
        batches = loader.epoch(epoch)
        first.prepare(batches)
        for batch in batches:
            torch.testing.assert_close(first(batch).logits, OnlineTeacher(model)(batch).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["rows", "values", "table.json", ".lock"])
def test_a_file_of_a_table_that_is_none_is_said_so(name, tmp_path):
    model, loader = tiny_teacher(), loader_of()
    folder = CachedTeacher(model, loader, tmp_path, "sha").folder
    for odd in ("fifo", "device"):
        (folder / name).unlink()
        os.mkfifo(folder / name) if odd == "fifo" else (folder / name).symlink_to("/dev/zero")
        with pytest.raises(UserError, match=f"{name} is no regular file"):
            CachedTeacher(model, loader, tmp_path, "sha")
        CachedTeacher(model, loader, tmp_path, "another sha")  # this only reads it


def test_an_answer_does_not_depend_on_what_else_is_missing(tmp_path):
    model = place_channels_last(fold_batch_norm(create_model("resnet8", 10).eval()))
    whole, parts = (CachedTeacher(model, loader_of(), tmp_path / name, "sha") for name in ("whole", "parts"))
    index, view = loader_of().epoch(1).drawn()
    rows = index * 162 + view
    assert whole._compute_missing(rows)
    for some in rows.split([1, 5, 90]):
        assert parts._compute_missing(some)
    assert torch.equal(*(table.file.values[table.file.position[rows].long()] for table in (whole, parts)))


def place_channels_last(model):
    return model.to(memory_format=torch.channels_last).requires_grad_(False)


def test_a_table_can_be_filled_ahead(tmp_path, monkeypatch):
    model, loader = tiny_teacher(), loader_of(subset=12)
    table, devices = CachedTeacher(model, loader, tmp_path, "sha"), []
    monkeypatch.setattr(teacher_cache, "all_cores", lambda device: devices.append(device) or nullcontext())
    table.fill()
    assert devices == [torch.device("cpu")]
    assert table.file.read == 12 * 81  # digits are not flipped
    seen = asked_of(model)
    for epoch in (1, 5, 9):
        table.prepare(loader.epoch(epoch))
    assert not seen


def test_a_table_belongs_to_weights_images_and_content(tmp_path, capsys):
    model = tiny_teacher()
    folders = [CachedTeacher(model, loader_of(), tmp_path, "sha").folder]
    assert "not used here" not in capsys.readouterr().out
    folders += [
        CachedTeacher(model, loader_of(), tmp_path, "another sha").folder,
        CachedTeacher(model, loader_of(subset=95), tmp_path, "sha").folder,
        CachedTeacher(model, loader_of(), tmp_path, "sha", "pooled").folder,
        CachedTeacher(model, loader_of(), tmp_path, "sha", dtype="float16").folder,
    ]
    assert len(set(folders)) == 5
    assert "note: tables of other weights, images or subsets, not used here: logits_float32_" in capsys.readouterr().out
    assert CachedTeacher(model, loader_of(seed=9, batch_size=7), tmp_path, "sha").folder == folders[0]


def test_blended_images_are_shown_to_the_teacher_itself(tmp_path):
    model, loader = tiny_teacher(), loader_of()
    table = CachedTeacher(model, loader, tmp_path, "sha")
    batches = loader.epoch(1, partner=torch.arange(96).flip(0), weight=0.7)
    table.prepare(batches)
    assert table.file.read == 0
    batch = next(iter(batches))
    assert torch.equal(table(batch).logits, model(batch.images))


def test_what_the_table_cannot_hold_is_said(tmp_path):
    model, loader = tiny_teacher(), loader_of()
    with torch.no_grad():
        model.classifier.bias.fill_(1e5)
    CachedTeacher(model, loader, tmp_path, "sha").prepare(loader.epoch(1))
    with pytest.raises(RunError, match="too large for --table_dtype float16"):
        CachedTeacher(model, loader, tmp_path, "sha", dtype="float16").prepare(loader.epoch(1))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        CachedTeacher(model, loader, tmp_path / "file", "sha")
