"""What is only for speed changes no result: the folded teacher, the table of its answers, recorded steps, trials."""

import copy
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import (
    Tiny,
    check_same_end,
    distil,
    fixed_batch,
    interrupt_after_an_epoch,
    make,
    read_log,
    timeless,
    train,
)  # fmt: skip
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import train_student
import train_teacher
from dataset import Batch, Dataset, create_dataset
from distiller_zoo import distiller_dict
from helper import checkpoint, signals, teacher_cache, trainer
from helper.cuda_graph import CUDAGraphStep, undone
from helper.device import place
from helper.errors import Interrupted, RunError, UserError
from helper.loops import evaluate, train_one_epoch, train_step
from helper.metrics import Metrics
from helper.options import parse, resolve_pair, student_parser, teacher_parser
from helper.row_store import RowStore
from helper.run_folder import RunFolder
from helper.teacher import fold_batch_norm
from helper.teacher_cache import CachedTeacher, OnlineTeacher, check_table_dir
from helper.trainer import Trainer, make_optimizer, set_learning_rate
from inputs import InputError
from models import Model, create_model, model_dict
from temperature import temperature_dict
from temperature.base import as_tau

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------- the teacher, prepared for inference


@pytest.mark.parametrize("name", model_dict)
@torch.no_grad()
def test_a_folded_teacher_says_the_same(name):
    torch.manual_seed(0)
    model = create_model(name, 10).train()
    model(torch.randn(8, 3, 32, 32))  # running statistics that are not 0 and 1
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.eval().modules())
    images = torch.randn(4, 3, 32, 32)
    plain = model(images, is_feat=True)
    folded = fold_batch_norm(copy.deepcopy(model))
    left = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert left == (norms // 2 + 1 if name.startswith("wrn") else 0)  # those before a convolution have none to go into
    said = folded(images, is_feat=True)
    for ours, theirs in zip([*said.features, said.logits], [*plain.features, plain.logits], strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


class Shared(Model):
    """A convolution that is used twice, or its weights elsewhere, or on a way that depends on the input."""

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


# ---------------------------------------------------------------- the table in files


def table_file(folder, rows=50, width=3, dtype=torch.float32):
    folder.mkdir(exist_ok=True)
    return RowStore(folder, rows, width, dtype)


def rows_of(*numbers):
    rows = torch.tensor(numbers)
    return rows, torch.stack([rows, rows + 0.5, -rows], 1).float()


def holds(table, *numbers):
    table.refresh()
    rows, values = rows_of(*numbers)
    known = (table.position >= 0).nonzero().flatten()
    return known.tolist() == sorted(numbers) and torch.equal(table.values[table.position[rows].long()], values)


def test_a_table_is_read_by_those_who_come_later_and_at_the_same_time(tmp_path):
    first, second = table_file(tmp_path), table_file(tmp_path)
    first.append(*rows_of(7, 0, 49))
    assert holds(first, 7, 0, 49) and holds(second, 7, 0, 49)
    second.append(*rows_of(3, 7))  # 7 is there already
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


def _append_many(folder, start, rows):
    table = table_file(folder, rows)
    for begin in range(start, rows, 10):
        table.append(*rows_of(*range(begin, min(begin + 10, rows))))


def test_two_processes_fill_one_table(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_append_many, args=(tmp_path, start, 500)) for start in (0, 5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert holds(table_file(tmp_path, 500), *range(500))


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
        if (name == "values") == (writes == 0):  # what had not reached the disk
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


def _open_together(folder, barrier):
    barrier.wait()
    for number in range(20):
        table_file(folder / str(number))


def test_two_processes_make_one_table(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_open_together, args=(tmp_path, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


# ---------------------------------------------------------------- the table of a teacher


def loader_of(seed=1, subset=96, batch_size=32):
    return create_dataset("digits", batch_size=batch_size, seed=seed, device="cpu", train_subset=subset).train


def tiny_teacher(seed=0):
    torch.manual_seed(seed)
    return Tiny(width=12).eval().requires_grad_(False)


def asked_of(model):
    """The images that the model is asked from now on."""
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
    assert seen == [128]  # 96, always asked in batches of one size
    later = CachedTeacher(model, loader_of(), tmp_path, "sha")
    seen.clear()  # of its look whether the files fit the teacher
    later.prepare(loader.epoch(1))
    assert not seen
    later.prepare(loader.epoch(2))
    assert len(seen) == 1 and 96 < later.file.read <= 192
    table.prepare(loader.epoch(2))  # it takes in what the other one asked
    assert len(seen) == 1


@pytest.mark.parametrize("damage", [0.0, math.nan, 3.0])
def test_a_table_with_other_values_is_noticed(damage, tmp_path):
    model, loader = tiny_teacher(), loader_of()
    table = CachedTeacher(model, loader, tmp_path, "sha")
    table.prepare(loader.epoch(1))
    values = torch.from_file(str(table.folder / "values"), shared=True, size=960)
    values[480:] = damage
    with pytest.raises(UserError, match="is damaged, for it does not hold what the teacher says: remove that folder"):
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
    """The process gets SIGTERM while the teacher is asked for so many batches of 16 from now on."""
    monkeypatch.setattr(signals._Asked, "number", None)
    real, numbers = table._asked, itertools.count(1)

    def signalled(*given):
        if next(numbers) == batches:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr(table, "_asked", signalled)
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
    """It makes no step, for which answers would be missing, and so has nothing to save."""
    loader, module = loader_of(), make()
    table = CachedTeacher(tiny_teacher(), loader, tmp_path / "tables", "sha")
    asked_to_end_after(2, table, monkeypatch)
    run = RunFolder(tmp_path, "tiny", {"options": {}, "epochs": 3}, overwrite=True)
    optimizer, data = make_optimizer(module, 0.05, 0.9, 0), Dataset(loader, loader, 10)
    options = {"epochs": 3, "learning_rate": 0.05, "lr_decay_epochs": [], "lr_decay_rate": 0.1, "print_freq": 1}
    with pytest.raises(Interrupted, match="before the teacher had answered"), signals.looked_at():
        Trainer(run, module, table, optimizer, Metrics(), data, options).fit()
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


def test_runs_that_fill_a_table_at_the_same_time_share_the_work(tmp_path, monkeypatch):
    """Each in an order of its own, and what the other one has written is not asked for again."""
    loader, orders = loader_of(), []
    first, second = (CachedTeacher(tiny_teacher(), loader, tmp_path, "sha") for _ in range(2))
    monkeypatch.setattr(teacher_cache, "WRITTEN_EVERY", 0.0)
    for table in (first, second):
        table.at_once = 2
        orders.append([])

        def asked(rows, order=orders[-1], real=table._asked):
            order.append(rows[0].item())
            if order is orders[0] and len(order) == 11:
                second.prepare(loader.epoch(1))
            return real(rows)

        monkeypatch.setattr(table, "_asked", asked)
    first.prepare(loader.epoch(1))
    assert len(orders[0]) == 11 and len(orders[1]) == 38  # of 48, and one of them was under way
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
    for epoch in (1, 2):  # what another one has asked for, and what it asks for itself
        batches = loader.epoch(epoch)
        first.prepare(batches)
        for batch in batches:
            torch.testing.assert_close(first(batch).logits, OnlineTeacher(model)(batch).logits, rtol=1e-5, atol=1e-6)


def test_an_unusable_folder_of_tables_is_said_so(tmp_path):
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file", tmp_path / "file/x", tmp_path / ("x" * 300), Path("/proc/x")):
        with pytest.raises(UserError, match="the teacher's table cannot be written into .*--table_dir"):
            check_table_dir(bad)
    check_table_dir(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["rows", "values", "table.json", ".lock"])
def test_a_file_of_a_table_that_is_none_is_said_so(name, tmp_path):
    model, loader = tiny_teacher(), loader_of()
    folder = CachedTeacher(model, loader, tmp_path, "sha").folder
    for odd in ("fifo", "device"):
        (folder / name).unlink()
        os.mkfifo(folder / name) if odd == "fifo" else (folder / name).symlink_to("/dev/zero")
        with pytest.raises(UserError, match=f"{name} is no regular file"):
            CachedTeacher(model, loader, tmp_path, "sha")
        CachedTeacher(model, loader, tmp_path, "another sha")  # which only looks at it


def test_an_answer_does_not_depend_on_what_else_is_missing(tmp_path):
    model = place_channels_last(fold_batch_norm(create_model("resnet8", 10).eval()))
    whole, parts = (CachedTeacher(model, loader_of(), tmp_path / name, "sha") for name in ("whole", "parts"))
    index, view = loader_of().epoch(1).drawn()
    rows = index * 162 + view
    assert whole._ask(rows)
    for some in rows.split([1, 5, 90]):
        assert parts._ask(some)
    assert torch.equal(*(table.file.values[table.file.position[rows].long()] for table in (whole, parts)))


def place_channels_last(model):
    return model.to(memory_format=torch.channels_last).requires_grad_(False)


def test_a_table_can_be_filled_ahead(tmp_path):
    model, loader = tiny_teacher(), loader_of(subset=12)
    table = CachedTeacher(model, loader, tmp_path, "sha")
    table.fill()
    assert table.file.read == 12 * 81  # digits are not mirrored
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
    assert "note: of other weights, images or subsets, and not used here: logits_float32_" in capsys.readouterr().out
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


# ---------------------------------------------------------------- runs with a table


def check_logs_agree(ours, theirs, rel):
    for one, other in zip(timeless(ours), timeless(theirs), strict=True):
        assert {key: one[key] for key in one if "loss" in key} == pytest.approx(
            {key: other[key] for key in one if "loss" in key}, rel=rel
        )


@pytest.mark.parametrize("distill", [name for name, cls in distiller_dict.items() if cls.needs != "maps"])
def test_a_run_with_a_table_is_the_run_without_it(distill, teacher, tmp_path):
    line = f"--path-t {teacher} --distill {distill} --nce_k 50 --temperature ctkd-global --epochs 2 --run_dir "
    live = distil(line + str(tmp_path / "live"))
    table = f" --teacher_table --table_dir {tmp_path / 'tables'}"
    cold = distil(line + str(tmp_path / "cold") + table)
    check_logs_agree(cold, live, 1e-5)
    warm = distil(line + str(tmp_path / "warm") + table)
    check_same_end(warm, cold)


def test_an_interrupted_run_with_a_table_ends_bit_identical(teacher, tmp_path, monkeypatch):
    line = f"--path-t {teacher} --epochs 2 --teacher_table --table_dir {tmp_path}/tables_"
    distil(line + f"whole --run_dir {tmp_path / 'whole'}")
    interrupt_after_an_epoch(monkeypatch, line + f"stopped --run_dir {tmp_path / 'stopped'}")
    distil(line + f"stopped --run_dir {tmp_path / 'stopped'}")
    check_same_end(tmp_path / "stopped", tmp_path / "whole")


def test_float16_rows_change_the_losses_by_little(teacher, tmp_path):
    line = f"--path-t {teacher} --epochs 2 --teacher_table --table_dir {tmp_path / 'tables'} --run_dir {tmp_path}/"
    exact, halved = distil(line + "exact"), distil(line + "halved --table_dtype float16")
    check_logs_agree(halved, exact, 1e-3)
    assert timeless(halved) != timeless(exact)
    with pytest.raises(UserError, match="table_dtype float16 instead of float32"):
        distil(line + "halved")


def test_the_table_lies_beside_the_teacher_and_a_changed_teacher_is_noticed(tmp_path, capsys):
    path = train(f"--model resnet8 --epochs 1 --run_dir {tmp_path / 'teacher'}")
    line = f"--path-t {path} --epochs 1 --fill_teacher_table --train_subset 4 --run_dir {tmp_path}/"
    distil(line + "first")
    (folder,) = (path / "teacher_table").iterdir()
    assert json.loads((folder / "table.json").read_text())["images"] == 4
    assert (folder / "rows").stat().st_size == 4 * 4 * 81
    capsys.readouterr()
    distil(line + "second --seed 2")
    assert "324 of 324 answers (100%)" in capsys.readouterr().out
    train(f"--model resnet8 --epochs 1 --seed 5 --overwrite --run_dir {path}")
    distil(line + "third")
    assert capsys.readouterr().out.count("not used here: logits_float32_") == 1
    assert len(list((path / "teacher_table").iterdir())) == 2


@pytest.mark.parametrize("distill", [name for name, cls in distiller_dict.items() if cls.needs == "maps"])
def test_who_needs_maps_says_so(distill, teacher):
    with pytest.raises(UserError, match=f"--distill {distill} needs the teacher's maps, which no table holds"):
        distil(f"--path-t {teacher} --distill {distill} --teacher_table")


def test_the_distillers_see_no_more_than_they_say():
    """Logits, or the pooled feature too: the rest of the teacher's features may be missing."""
    for distill, cls in distiller_dict.items():
        expert, batch = Tiny(width=12), fixed_batch()
        said = OnlineTeacher(expert.eval())(batch)
        kept = {"logits": [], "pooled": said.features[-1:], "maps": said.features}[cls.needs]
        losses = []
        for features in (said.features, kept):
            torch.manual_seed(0)
            losses.append(make(distill=distill)(batch, said._replace(features=features)).loss.item())
        assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--plain --teacher_table", "--plain does without all that is for speed: leave it out, or --teacher_table"),
        ("--plain --precision bf16", "leave it out, or --precision"),
        ("--plain --trials 2", "leave it out, or --trials"),
        ("--table_dtype float16", "--table_dtype belongs to --teacher_table"),
        ("--table_dir somewhere", "--table_dir belongs to --teacher_table"),
        ("--trials 0", "--trials must be 1 or more"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, message):
    with pytest.raises(InputError, match=message):
        parse(student_parser(), flags.split())


# ---------------------------------------------------------------- plain, and lower precision


class Normed(Tiny):
    """A small network with batch norm behind its convolutions, after the published order."""

    def __init__(self, num_classes=10, width=8):
        super().__init__(num_classes, width)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(2 * width)

    def extract(self, x):
        stem = self.bn1(self.stem(x)).relu()
        stage = self.bn2(self.stage(stem)).relu()
        return [stem, stage, stage.mean((2, 3))]


@pytest.mark.parametrize("distill", distiller_dict)
def test_the_fast_path_computes_what_the_plain_one_does(distill):
    """In float64, where rounding does not grow into something else within 50 steps."""

    def losses(plain):
        torch.manual_seed(0)
        expert = Normed(width=12)
        expert.train()(torch.randn(64, 3, 32, 32))
        module = make("ctkd-instance", distill, Normed(), expert.eval()).double()
        expert = place(expert if plain else fold_batch_norm(expert), torch.device("cpu"), plain).double()
        module = place(module, torch.device("cpu"), plain)
        optimizer = make_optimizer(module, 0.05, 0.9, 5e-4)
        if plain:
            optimizer = torch.optim.SGD(module.parameters(), 0.05, 0.9, weight_decay=5e-4)
        told, metrics = [], Metrics()
        for step in range(50):
            batch = fixed_batch()
            batch = Batch(torch.randn(batch.images.shape).double(), batch.target, batch.index)
            torch.manual_seed(step)
            told.append(train_step(module.train(), OnlineTeacher(expert), batch, optimizer, metrics).loss.item())
        return told

    assert losses(plain=False) == pytest.approx(losses(plain=True), rel=1e-6)


def after_each_step(monkeypatch, look):
    """From now on `look` is called after each step that train_student.py makes: with the task, the optimizer, the
    metrics and what the step computed."""
    real = train_student.make_step

    def make_step(*given):
        step = real(*given)

        def looked_at(task, teacher, batch, optimizer, metrics):
            output = step(task, teacher, batch, optimizer, metrics)
            look(task, optimizer, metrics, output)
            return output

        return looked_at

    monkeypatch.setattr(train_student, "make_step", make_step)


def test_the_first_50_losses_on_cifar100_are_those_of_the_plain_path(cifar100_dir, tmp_path, monkeypatch):
    """In float32 a rounding error grows with the learning rate: at 0.05, two threads instead of one change as much."""
    data = f"--data_dir {cifar100_dir} --dataset cifar100 --train_subset 3200 --batch_size 64 --epochs 1 "
    torch.manual_seed(0)
    teacher = tmp_path / "resnet8_vanilla.pth"
    torch.save(create_model("resnet8", 100).state_dict(), teacher)
    told = {}
    after_each_step(monkeypatch, lambda *_: told[name].append(_[-1].loss.item()))
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: {"test_loss": 0.0, "top1": 0.0, "top5": 0.0})
    for name in ("fast", "plain"):
        told[name] = []
        line = data + f"--lr 0.01 --path-t {teacher} --skip_validation --temperature ctkd-global"
        line += f" --run_dir {tmp_path / name}"
        train_student.distil(parse(student_parser(), (line + " --plain" * (name == "plain")).split()))
    assert len(told["fast"]) == 50
    assert told["fast"] == pytest.approx(told["plain"], rel=1e-4)


def test_bf16_learns_as_well_as_float32(teacher, tmp_path):
    line = f"--path-t {teacher} -r 1 -a 0.1 --temperature ctkd-global --train_subset 240 --epochs 4 --trials 3"
    top1 = {}
    for precision in ("fp32", "bf16"):
        own = f"--dataset digits --batch_size 16 --run_dir {tmp_path / precision} --precision {precision} "
        folders = train_student.distil(parse(student_parser(), (own + line).split()))
        top1[precision] = [read_log(folder)[-1]["top1"] for folder in folders]
    difference = abs(statistics.mean(top1["fp32"]) - statistics.mean(top1["bf16"]))
    noise = (sum(statistics.variance(values) for values in top1.values()) / 3) ** 0.5
    assert difference <= 2.78 * noise, top1  # Student's t, 95 %, 4 degrees of freedom
    assert min(top1["bf16"]) > 30  # chance is 10


@pytest.mark.parametrize("distill", distiller_dict)
def test_in_bf16_losses_and_temperatures_are_float32(distill):
    module, expert, batch = make("ctkd-instance", distill), Tiny(width=12).eval(), fixed_batch()
    module.precision = "bf16"
    seen = []
    module.student.stage.register_forward_hook(lambda *_: seen.append(_[-1].dtype))
    step = module(batch, OnlineTeacher(expert, "bf16")(batch))
    assert seen == [torch.bfloat16]
    told = (step.loss, step.logits, step.tau.student, *step.losses.values())
    assert {value.dtype for value in told} == {torch.float32}
    step.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters() if p.grad is not None)


# ---------------------------------------------------------------- recorded steps


class Recording(TorchDispatchMode):
    """A CUDA graph on the CPU: the operations of a step, to be replayed on the tensors that they were recorded with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), "a host read"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            aliases = [given.alias_info is not None for given in func._schema.returns]
            if any(aliases):
                continue  # a view of a tensor that stays, or the tensor itself
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                old.copy_(new)


def _tensors(out):
    return [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]


class Emulated(CUDAGraphStep):
    """Records on the CPU. Only what `capture` and `warm_up` do on a GPU is missing."""

    def _record(self, task, teacher, batch, optimizer, metrics):
        self.changed = task, optimizer, metrics
        return super()._record(task, teacher, batch, optimizer, metrics)

    def warm_up(self, step, device):
        step()

    def capture(self, step):
        graph = Recording()
        with undone(*self.changed), graph:
            output = step()
        return graph, output


def small_run(distill, temperature, recorded, extra=()):
    own = ["--nce_k", "20", "--epochs", "4", "--rl_warmup", "2", "--rl_epoch", "3", "--aug_epoch", "4"]
    own += ["--rl_rollout", "2", "--batch_size", "8", *extra]
    options = parse(student_parser(), ["--temperature", temperature, "--distill", distill, *own])
    torch.manual_seed(0)
    loader = loader_of(subset=28, batch_size=8)
    expert = Tiny(width=12).eval().requires_grad_(False)
    task = train_student.distillation(resolve_pair(options, "resnet56"), Tiny(), expert, loader.target)
    optimizer, metrics = make_optimizer(task, 0.01, 0.9, 5e-4), Metrics()
    step, logs = Emulated(8) if recorded else train_step, []
    for epoch in (1, 2, 3, 4):
        set_learning_rate(optimizer, 0.01 / epoch)
        logs.append(train_one_epoch(task, OnlineTeacher(expert), loader, optimizer, metrics, epoch, step=step))
    return task, step, logs


@pytest.mark.parametrize("distill", distiller_dict)
@pytest.mark.parametrize("temperature", temperature_dict)
def test_a_replayed_step_is_the_step(temperature, distill):
    computed, _, logs = small_run(distill, temperature, recorded=False)
    replayed, step, same = small_run(distill, temperature, recorded=True)
    assert len(step.recordings) == (2 if temperature in ("rlkd", "random") else 1)
    for ours, theirs in zip(same, logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    for ours, theirs in zip(replayed.parameters(), computed.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_replayed_step_of_standardised_logits_is_the_step():
    *_, logs = small_run("kd", "rlkd", recorded=False, extra=["--logit_stand"])
    *_, same = small_run("kd", "rlkd", recorded=True, extra=["--logit_stand"])
    for ours, theirs in zip(same, logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)


def counted(loader, monkeypatch):
    """The sizes of the batches of images that the loader makes from now on."""
    sizes, real = [], loader.view_of

    def view_of(index, view):
        sizes.append(len(index))
        return real(index, view)

    monkeypatch.setattr(loader, "view_of", view_of)
    return sizes


def test_images_are_made_when_they_are_first_asked_for(monkeypatch):
    loader = loader_of(subset=20, batch_size=8)
    expected = [loader.view_of(batch.index, batch.view) for batch in loader.epoch(1)]
    sizes = counted(loader, monkeypatch)
    batches = list(loader.epoch(1))
    assert sizes == [] and [len(batch) for batch in batches] == [8, 8, 4]
    for _ in range(2):
        assert all(torch.equal(batch.images, images) for batch, images in zip(batches, expected, strict=True))
    assert sizes == [8, 8, 4]  # once each


def test_a_copied_batch_has_the_same_images_in_tensors_of_its_own():
    first, second, _ = loader_of(subset=20, batch_size=8).epoch(1)
    given, images = first.copy(), second.images
    assert torch.equal(given.images, first.images)
    for ours, theirs in zip(given.numbers, second.numbers, strict=True):
        assert ours.data_ptr() != theirs.data_ptr()
        ours.copy_(theirs)
    assert not torch.equal(given.images, images)  # they were made before
    assert torch.equal(given.unmade().images, images)
    assert torch.equal(first.images, first.unmade().images)


def test_a_recorded_step_makes_the_images(monkeypatch):
    """The batch's numbers are all that reaches it; only a batch of another size is made outside, by the step itself."""
    loader = loader_of(subset=28, batch_size=8)
    sizes, module, step = counted(loader, monkeypatch), make(), Emulated(8)
    teacher = OnlineTeacher(Tiny(width=12).eval().requires_grad_(False))
    optimizer, metrics = make_optimizer(module, 0.01, 0.9, 5e-4), Metrics()
    for epoch in (1, 2):
        train_one_epoch(module, teacher, loader, optimizer, metrics, epoch, step=step)
        assert sizes == [8, 8] + epoch * [4]  # to warm up and to record
    ((given, graph, _),) = step.recordings.values()
    assert any(func is torch.ops.aten.gather.default and args[0].dtype == torch.uint8 for func, args, *_ in graph.calls)
    last = [batch for batch in loader.epoch(2) if len(batch) == 8][-1]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(given.numbers, last.numbers, strict=True))


def test_steps_in_python_would_be_noticed():
    """The emulation tells a step that counts in Python from one that counts in tensors."""

    def losses(step):
        torch.manual_seed(0)
        loader = loader_of(subset=32, batch_size=8)
        module, expert = make(), Tiny(width=12).eval().requires_grad_(False)
        optimizer, numbers = make_optimizer(module, 0.01, 0.9, 5e-4), itertools.count(1)

        def forgetful(batch):
            optimizer.param_groups[0]["lr"].fill_(0.1 * next(numbers))
            return batch

        module.before_step = forgetful
        return train_one_epoch(module, OnlineTeacher(expert), loader, optimizer, Metrics(), 1, step=step)["loss"]

    assert losses(Emulated(8)) != pytest.approx(losses(train_step), rel=1e-5)


def test_the_learning_rate_stays_the_tensor_that_it_is():
    optimizer = make_optimizer(Tiny(), 0.05, 0.9, 0)
    rate = optimizer.param_groups[0]["lr"]
    set_learning_rate(optimizer, 0.005)
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.005)
    plain = make_optimizer(Tiny(), 0.05, 0.9, 0, plain=True)
    set_learning_rate(plain, 0.2)
    assert plain.param_groups[0]["lr"] == 0.2


def test_a_run_from_before_goes_on_in_steps_that_can_be_recorded(teacher, tmp_path, monkeypatch):
    line = f"--path-t {teacher} --epochs 2 --run_dir {tmp_path / 'run'}"
    interrupt_after_an_epoch(monkeypatch, line)
    state = checkpoint.load(tmp_path / "run/last.pth")
    state["optimizer"]["param_groups"][0] |= {"lr": 0.05, "fused": None}  # as they were
    checkpoint.save(state, tmp_path / "run/last.pth")
    seen = []
    after_each_step(monkeypatch, lambda task, optimizer, *_: seen.append(optimizer.param_groups[0]))
    distil(line)
    assert seen[0]["fused"] and isinstance(seen[0]["lr"], torch.Tensor)
    assert len(read_log(tmp_path / "run")) == 2


def test_a_run_in_bf16_is_another_one_with_a_table(teacher, tmp_path):
    line = f"--path-t {teacher} --epochs 1 --run_dir {tmp_path / 'run'} --precision bf16"
    distil(line)
    with pytest.raises(UserError, match="teacher_precision bf16 instead of fp32"):
        distil(line + " --teacher_table")


def on_gpu(line):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return f"{line} --device cuda --epochs 3 --nce_k 50 --lr 0.01 "


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("distill", "temperature"),
    [*((distill, "ctkd-global") for distill in distiller_dict), *(("kd", name) for name in temperature_dict)],
)
def test_a_recorded_run_on_a_gpu_is_the_plain_one(distill, temperature, teacher, tmp_path):
    line = on_gpu(f"--path-t {teacher} --distill {distill} --temperature {temperature}") + "--run_dir "
    recorded, plain = distil(line + str(tmp_path / "recorded")), distil(line + str(tmp_path / "plain --plain"))
    chance = distill in ("crd", "dpk") or temperature in ("rlkd", "random")
    check_logs_agree(recorded, plain, 0.2 if chance else 5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("distill", ["kd", "crd"])
def test_trials_on_a_gpu_are_runs_as_if_alone(distill, teacher, tmp_path):
    line = on_gpu(f"--path-t {teacher} --distill {distill} --temperature ctkd-global --seed 4")
    argv = ("--dataset digits --train_subset 96 --batch_size 32 " + line).split()
    together = train_student.distil(parse(student_parser(), [*argv, "--trials", "3", "--run_dir", f"{tmp_path}/all"]))
    for seed, folder in zip((4, 5, 6), together, strict=True):
        check_logs_agree(folder, distil(f"{line} --seed {seed} --run_dir {tmp_path / f'alone-{seed}'}"), 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("distill", ["kd", "pkt"])
def test_a_table_in_the_memory_of_a_gpu_says_what_the_teacher_says(distill, teacher, tmp_path):
    line = on_gpu(f"--path-t {teacher} --distill {distill}")
    live = distil(line + f"--run_dir {tmp_path / 'live'}")
    for name in ("cold", "warm"):
        table = distil(line + f"--teacher_table --table_dir {tmp_path / 'tables'} --run_dir {tmp_path / name}")
        check_logs_agree(table, live, 1e-3)


@pytest.mark.gpu
def test_a_step_that_reads_a_value_back_is_said_not_to_be_recordable(teacher, tmp_path, monkeypatch):
    line = on_gpu(f"--path-t {teacher}")
    monkeypatch.setattr(temperature_dict["fixed"], "forward", lambda self, *_: as_tau(self.tau.item()), raising=True)
    with pytest.raises(RunError, match="cannot be recorded as a CUDA graph .* add --plain"):
        distil(line + f"--run_dir {tmp_path / 'run'}")


# ---------------------------------------------------------------- several runs in one process


@pytest.mark.parametrize(("distill", "temperature"), [("crd", "ctkd-global"), ("dpk", "random"), ("kd", "rlkd")])
def test_trials_are_runs_as_if_alone(distill, temperature, teacher, tmp_path, capsys):
    line = f"--path-t {teacher} --distill {distill} --temperature {temperature} --nce_k 50 --epochs 2 --seed 4"
    argv = ("--dataset digits --train_subset 96 --batch_size 32 --print_freq 1 " + line).split()
    together = train_student.distil(parse(student_parser(), [*argv, "--trials", "2", "--run_dir", f"{tmp_path}/both"]))
    assert [folder.name for folder in together] == ["both_seed-4", "both_seed-5"]
    assert "seed 5 " in capsys.readouterr().out
    for seed, folder in zip((4, 5), together, strict=True):
        alone = distil(f"{line} --seed {seed} --run_dir {tmp_path / f'alone-{seed}'}")
        check_same_end(folder, alone)
        assert json.loads((folder / "config.json").read_text())["seed"] == seed


def test_trials_of_a_teacher_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--dataset", "digits", "--train_subset", "96", "--model", "resnet8", "--epochs", "1", "--trials", "2"]
    folders = train_teacher.train(parse(teacher_parser(), argv))
    assert [folder.name for folder in folders] == ["resnet8_vanilla_digits_seed-1", "resnet8_vanilla_digits_seed-2"]
    assert timeless(folders[0]) != timeless(folders[1])
    again = train_teacher.train(parse(teacher_parser(), [*argv, "--trials", "3"]))  # goes on with the third alone
    assert len(again) == 3 and len(read_log(again[2])) == 1


def test_a_trial_that_fails_does_not_stop_the_others(teacher, tmp_path, monkeypatch):
    ended = itertools.count(1)

    def spoil(task, optimizer, metrics, _):
        if metrics.tensors["samples"] == 96 and next(ended) == 2:
            with torch.no_grad():
                task.student.classifier.weight.fill_(torch.nan)

    after_each_step(monkeypatch, spoil)
    with pytest.raises(RunError, match="the weights are not finite after the last step of epoch 1"):
        distil(f"--path-t {teacher} --epochs 3 --trials 2 --run_dir {tmp_path / 'both'}")
    assert len(read_log(tmp_path / "both_seed-1")) == 3
    assert not (tmp_path / "both_seed-2" / "resnet8_last.pth").exists()


# ---------------------------------------------------------------- validation, and the start


def test_a_validation_pass_takes_the_largest_batch_that_fits():
    loader = create_dataset("digits", batch_size=7, seed=0, device="cpu").val
    assert loader.batch_size == 64
    loader.batch_size = 256
    sizes = []

    class Cramped(Tiny):
        def forward(self, x, is_feat=False):
            sizes.append(len(x))
            if len(x) > 130:
                raise torch.OutOfMemoryError("no room")
            return super().forward(x, is_feat)

    torch.manual_seed(0)
    plain, cramped = Tiny(), Cramped()
    cramped.load_state_dict(plain.state_dict())
    expected = evaluate(plain, loader)
    assert evaluate(cramped, loader) == pytest.approx(expected, rel=1e-5)
    assert sizes[:3] == [256, 128, 128] and loader.batch_size == 128
    large = create_dataset("digits", batch_size=600, seed=0, device="cpu").val
    assert large.batch_size == 600


def test_no_import_that_takes_long_stands_before_the_first_step():
    slow = "torchvision", "matplotlib", "sklearn", "torch._dynamo"
    code = f"import sys, train_student, train_teacher; print([name for name in {slow} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
