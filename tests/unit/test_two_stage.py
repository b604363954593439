"""The first stage of a run: what learns in it, its log, its batches, and that it resumes exactly."""

import itertools
import json

import pytest
import torch
from common import Normed, error_of, fixed_batch, make, timeless
from small_runs import a_run, loaders
from torch import nn

import train_student
from dataset.base import Batch, Dataset
from distiller_zoo import TwoStage, ab_loss, create_distiller, distiller_dict
from distiller_zoo.ft import FT
from helper import checkpoint, signals
from helper.errors import Diverged, Interrupted
from helper.first_stage import FirstTask
from helper.logger import EpochTable
from helper.loops import train_step
from helper.metrics import Metrics
from helper.run_files import read_log
from helper.teacher_cache import OnlineTeacher
from helper.trainer import make_optimizer
from helper.trials import Turns
from models import Output, create_model, map_parameters
from options.parse import parse_student, resolve_pair
from report.rows import rows
from report.runs import find_runs
from reproduce import Job, seconds_left, state

STAGED = [name for name, distiller in distiller_dict.items() if distiller.has_first_stage]
LINE = "--init_epochs 2 --epochs 2 --batch_size 16 --print_freq 1 --lr_decay_epochs 1 "  # three steps an epoch


def network(distill):
    """Return a teacher, with the student's widths only if it must have them."""
    torch.manual_seed(5)
    return Normed(width=8 if distill == "fsp" else 12).eval().requires_grad_(False)


def staged_run(folder, distill="ft", more="", pass_turn=None, kind=OnlineTeacher):
    """Return the trainer of a run of small networks on 40 images, resumed from the folder's `last.pth`."""
    options = resolve_pair(parse_student(f"{LINE} --distill {distill} {more}".split()), "resnet56")
    folder.mkdir(exist_ok=True)
    run = a_run(folder)
    run.config |= {"model": "resnet8", "dataset": "noise", "options": {"image_size": 32}, "epochs": options.epochs}
    run.finish = lambda student: None
    expert = network(distill)
    teacher, data = kind(expert), Dataset(*loaders(), 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_student, "create_model", lambda *_: Normed())
        return train_student.build_trainer(run, options, pass_turn, EpochTable(), expert, teacher, data)


def trained(folder, distill="ft", more=""):
    trainer = staged_run(folder, distill, more)
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the trainer of each distiller's uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    return {distill: trained(folder / distill, distill) for distill in STAGED}


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("distill", "stop", "kept"),  # finished epochs of both stages, and steps of the next
    [("ft", 1, (0, 0, 1)), ("ft", 4, (1, 0, 0)), ("ft", 10, (2, 0, 2)),
     *((distill, *case) for distill in STAGED for case in ((6, (1, 0, 2)), (8, (2, 0, 0))))],
)  # fmt: skip
def test_a_run_stopped_in_either_stage_or_between_them_ends_bit_identical(distill, stop, kept, whole, tmp_path):
    """Whether to stop is asked before an epoch and after each step."""
    stopped, calls = staged_run(tmp_path, distill), itertools.count()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(signals, "asked", lambda: next(calls) >= stop)
        stopped.fit()
    saved = checkpoint.load(tmp_path / "last.pth")
    assert (len(saved["first"]), len(saved["history"]), saved["step"]) == kept
    again = trained(tmp_path, distill)
    assert timeless(tmp_path) == timeless(whole[distill].run.folder)
    torch.testing.assert_close(again.task.state_dict(), whole[distill].task.state_dict(), rtol=0, atol=0)
    momenta = [[own["momentum_buffer"] for own in each.optimizer.state.values()] for each in (again, whole[distill])]
    torch.testing.assert_close(*momenta, rtol=0, atol=0)


def test_what_is_kept_of_a_first_stage_is_said(tmp_path, capsys):
    trainer, calls = staged_run(tmp_path), itertools.count()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(signals, "asked", lambda: next(calls) >= 6)
        trainer.fit()
    assert trainer.run.kept() == f"{tmp_path} keeps the state after epoch 1 of the first stage and 2 steps of the next"
    capsys.readouterr()
    staged_run(tmp_path)
    assert "resuming after epoch 1 of the first stage's 2 and 2 steps of the next" in capsys.readouterr().out
    assert "last.pth does not fit this run (" in error_of(staged_run, tmp_path, more="--init_epochs 0")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("first", 5, "first is not a list"),
        ("first", [{"epoch": 2}], "first are no epochs from 1 on"),
        ("history", [{"epoch": 1, "top1": 5.0}], "has other epochs of a first stage"),
        ("trained", {"loss": 1.0}, "no whole state within an epoch"),
        ("optimizer", {"state": {99: {}}, "param_groups": []}, "holds 99, which is unknown here"),
    ],
)
def test_a_state_of_no_first_stage_is_refused(key, value, says, tmp_path):
    trainer, calls = staged_run(tmp_path), itertools.count()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(signals, "asked", lambda: next(calls) >= 6)
        trainer.fit()
    torch.save(checkpoint.load(tmp_path / "last.pth") | {key: value}, tmp_path / "last.pth")
    assert says in error_of(staged_run, tmp_path)


def test_runs_that_take_turns_are_runs_as_if_alone(whole, tmp_path):
    ends = []

    def work(folder, more, pass_turn):
        trainer = staged_run(folder, "ft", more, pass_turn)
        trainer.fit()
        ends.append(trainer.task.state_dict())

    folders = [(tmp_path / "1", ""), (tmp_path / "2", "--seed 2")]
    Turns(torch.device("cpu"), 2).run([lambda turn, each=each: work(*each, turn) for each in folders])
    assert timeless(tmp_path / "1") == timeless(whole["ft"].run.folder)
    torch.testing.assert_close(ends[0], whole["ft"].task.state_dict(), rtol=0, atol=0)
    assert timeless(tmp_path / "2") != timeless(tmp_path / "1")


# ---------------------------------------------------------------- the log


def test_the_log_has_the_epochs_of_both_stages(whole):
    run = whole["ft"].run
    first, main = timeless(run.folder)[:2], timeless(run.folder)[2:]
    assert [list(record) for record in first] == 2 * [
        ["stage", "epoch", "learning_rate", "loss", "loss_ft_reconstruction"]
    ]
    assert [(record["stage"], record["epoch"], record["learning_rate"]) for record in first] == [
        (1, 1, 0.01),
        (1, 2, 0.01),
    ]
    assert [(record["epoch"], record["learning_rate"]) for record in main] == [(1, 0.05), (2, pytest.approx(0.005))]
    assert all("stage" not in record and "top1" in record and "loss_ft" in record for record in main)
    assert read_log(run.folder) == run.history and len(run.history) == 2


def test_reports_take_the_runs_own_epochs(whole, tmp_path):
    run = whole["ft"].run
    lines = (run.folder / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "config.json").write_text('{"kind": "student", "options": {}, "epochs": 2}')
    (tmp_path / "last.pth").touch()
    for count, finished in ((1, False), (4, True)):
        (tmp_path / "log.jsonl").write_text("".join(lines[:count]))
        (found,) = find_runs([tmp_path])
        assert (len(found.first), len(found.history)) == (min(count, 2), max(0, count - 2))
        assert found.finished == finished and found.damaged == 0
        assert state(tmp_path, "resnet8") == (f"{len(found.history)} epochs", None)


def test_the_time_left_counts_the_epochs_of_each_stage_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = next(row for row in rows("repdistiller") if row.options.get("distill") == "ft")
    first = [{"stage": 1, "epoch": epoch, "seconds": 2.0} for epoch in range(1, 31)]
    for seed, records in ((1, first[:10]), (2, [*first, {"epoch": 1, "top1": 5.0, "seconds": 7.0}])):
        row.folder(seed).mkdir(parents=True)
        (row.folder(seed) / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert seconds_left(Job(row, 1), [], measure=False) == 20 * 2 + 240 * 7
    assert seconds_left(Job(row, 2), [], measure=False) == 239 * 7
    (row.folder(2) / "log.jsonl").unlink()
    assert seconds_left(Job(row, 1), [], measure=False) is None


def test_the_table_has_new_headings_for_each_stage(capsys):
    table = EpochTable()
    for record in (
        {"stage": 1, "epoch": 1, "loss": 2.0},
        {"stage": 1, "epoch": 2, "loss": 1.0},
        {"epoch": 1, "top1": 50.0},
    ):
        table.add(record)
    lines = capsys.readouterr().out.split("\n")
    assert [line.split() for line in lines] == [
        ["stage", "epoch", "loss"], ["1", "1", "2.0000"], ["1", "2", "1.0000"], ["epoch", "top-1"], ["1", "50.00"], []
    ]  # fmt: skip


def test_a_loss_that_is_not_finite_names_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(FT, "first_loss", lambda ft, *_: {"x": next(ft.paraphraser.parameters()).sum() / 0})
    says = r"^the loss is not finite: loss_x failed first, in step 1 of first-stage epoch 1; .* with a lower --init_lr$"
    with pytest.raises(Diverged, match=says):
        trained(tmp_path)


# ---------------------------------------------------------------- what learns, from what


LEARNS = {  # in each stage, by the beginnings of names
    "ft": (("distiller.paraphraser",), ("student", "distiller.translator")),
    "fsp": (("student.stem", "student.stage", "student.bn"), ("student",)),
    "ab": (("student.stem", "student.stage", "student.bn", "distiller.connectors"), ("student",)),
}


def tensors(module):
    """Return copies of a module's parameters and buffers by name."""
    return {name: tensor.detach().clone() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


@pytest.mark.parametrize("distill", STAGED)
def test_what_learns_in_each_stage(distill, tmp_path):
    """All of it, and batch norm's statistics with it; nothing else changes."""
    trainer = staged_run(tmp_path, distill)
    task, sizes = trainer.task, {}
    for stage, learns in enumerate(LEARNS[distill]):
        before = tensors(task)
        if stage == 0:
            trainer.first.fit()
        else:
            trainer.fit()
        after = tensors(task)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name in before if name.startswith(learns)}
        sizes[stage] = len(moved)
    assert min(sizes.values()) > 5
    task.train()
    kept = task.distiller.first_modules()
    assert task.student.training and not any(module.training for part in kept for module in part.modules())


def test_gradients_are_needed_as_before_after_a_stage():
    main = make("fixed", "ft", Normed(), Normed())
    before = {name: p.requires_grad for name, p in main.named_parameters()}
    first = FirstTask(main, 32)
    with pytest.raises(KeyError), first.learning():
        assert {p for p in main.parameters() if p.requires_grad} == set(main.distiller.paraphraser.parameters())
        raise KeyError
    assert {name: p.requires_grad for name, p in main.named_parameters()} == before
    assert not any(p.requires_grad for p in main.distiller.paraphraser.parameters())


@pytest.mark.parametrize(("temperature", "alpha", "is_asked"), [("fixed", 0, 0), ("fixed", 0.9, 1), ("dtkd", 0, 1)])
def test_a_student_that_learns_alone_after_the_first_stage_asks_no_teacher(temperature, alpha, is_asked):
    """As published for AB and FSP."""
    task, asked = make(temperature, "ab", Normed(), Normed()), []
    task.alpha, expert = alpha, OnlineTeacher(Normed().eval())
    optimizer = make_optimizer(task, 0.01, 0.9, 0.0)
    step = train_step(task, lambda *given: asked.append(1) or expert(*given), fixed_batch(), optimizer, Metrics())
    assert len(asked) == is_asked and step.losses.keys() == {"ce"} | ({"kd"} if alpha else set())


@pytest.mark.parametrize("distill", STAGED)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_the_first_stage_lowers_its_loss_and_reads_no_value(distill, precision):
    expert, batch = network(distill), fixed_batch()
    main = make("fixed", distill, Normed(), expert)
    main.precision = precision
    task, teacher = FirstTask(main, 32).train(), OnlineTeacher(expert, precision)
    with task.learning():
        losses = []
        optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], 1e-3)
        for _ in range(4):
            optimizer.zero_grad()
            step = task(batch, teacher(batch, task.teacher_also))
            step.loss.backward()
            optimizer.step()
            losses.append(step.loss.item())
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
        assert {value.dtype for value in step.losses.values()} == {torch.float32} and step.logits is None
        assert all((p.grad is not None) == p.requires_grad for p in task.parameters())
        task.precision = "fp32"  # autocast knows no meta tensors
        images, target, index = (tensor.to("meta") for tensor in (batch.images, batch.target, batch.index))
        loss = task.to("meta")(
            Batch(images, target, index), expert.to("meta")(images, is_feat=True, also=task.teacher_also)
        ).loss
    assert loss.is_meta  # a meta tensor has no values, so reading one back fails


def seen_by(trainer):
    """Return the numbers of the images in each batch of the run's own epochs, and of the first stage's."""
    seen = {"main": [], "first": []}
    trainer.task.register_forward_hook(lambda _, inputs, __: seen["main"].append(inputs[0].index.tolist()))
    if trainer.first:
        trainer.first.task.register_forward_hook(lambda _, inputs, __: seen["first"].append(inputs[0].index.tolist()))
    trainer.fit()
    return seen


def test_the_runs_epochs_have_the_batches_of_every_method(tmp_path):
    ft, kd = (seen_by(staged_run(tmp_path / name, name)) for name in ("ft", "kd"))
    assert ft["main"] == kd["main"] and kd["first"] == []
    assert [sorted(sum(ft["first"][start : start + 3], [])) for start in (0, 3)] == 2 * [[*range(40)]]
    orders = [str(ft[stage][start : start + 3]) for stage in ("first", "main") for start in (0, 3)]
    assert len(set(orders)) == 4


class OnlyLogits(OnlineTeacher):
    """What a table answers."""

    def __call__(self, batch, also=()):
        return Output([], super().__call__(batch).logits)


def test_a_first_stage_asks_the_live_teacher_if_the_run_has_a_table(whole, tmp_path):
    trainer = staged_run(tmp_path, "fsp", kind=OnlyLogits)
    trainer.fit()
    assert timeless(tmp_path) == timeless(whole["fsp"].run.folder)


class Mine(TwoStage):
    """As a plug-in would define it."""

    weights = (0.1, 0.9, 1.0)
    trains_student = False

    def __init__(self, teacher_widths, **first_stage):
        super().__init__(**first_stage)
        self.encoder = nn.Linear(teacher_widths[-1], 4).requires_grad_(False)

    def first_modules(self):
        return [self.encoder]

    def first_loss(self, student, teacher):
        assert student is None
        return {"mine": self.encoder(teacher.features[-1]).square().mean()}

    def forward(self, student, teacher, target, tau, index):
        return {"mine": self.encoder(teacher.features[-1]).square().mean() * student.logits.square().mean()}


def test_a_distiller_from_elsewhere_can_have_a_first_stage(tmp_path, monkeypatch):
    monkeypatch.setitem(distiller_dict, "mine", Mine)
    encoder = trained(tmp_path, "mine", "--init_lr 0.1").task.distiller.encoder
    first, main = timeless(tmp_path)[:2], timeless(tmp_path)[2:]
    assert first[1]["loss_mine"] < first[0]["loss_mine"] and first[0]["learning_rate"] == 0.1
    assert len(main) == 2 and "loss_mine" in main[0] and not encoder.weight.requires_grad


def test_without_epochs_there_is_no_first_stage(tmp_path):
    assert staged_run(tmp_path, "ft", "--init_epochs 0").first is None
    assert staged_run(tmp_path, "kd").first is None


@pytest.mark.parametrize(
    ("name", "head"),
    [("resnet8", {"fc"}), ("wrn_16_1", {"bn1", "fc"}), ("vgg8", {"classifier"}),
     ("MobileNetV2", {"conv2", "classifier"}), ("ShuffleV2", {"conv2", "bn2", "linear"})],
)  # fmt: skip
def test_the_maps_depend_on_all_but_the_head(name, head):
    with torch.device("meta"):
        model = create_model(name, 10)
    found = set(map_parameters(model))
    assert {key.split(".")[0] for key, p in model.named_parameters() if p not in found} == head
    assert model.training
    first = next(model.parameters()).requires_grad_(False)
    assert set(map_parameters(model)) == found - {first}


# ---------------------------------------------------------------- options


def staged_options(line, teacher="resnet56"):
    return resolve_pair(parse_student(line.split()), teacher)


@pytest.mark.parametrize(
    ("line", "epochs", "rate"),
    [
        ("ft", 30, 0.01),
        ("ft --model_s wrn_16_1", 30, 0.01),
        ("ft --model_s vgg8", 30, 0.05),
        ("ft --model_s ShuffleV1", 30, 0.01),  # the run's
        ("ft --init_lr 0.3 --init_epochs 7", 7, 0.3),
        ("fsp --epochs 24", 3, 0.05),
        ("ab --lr 0.2 --epochs 2", 1, 0.2),
    ],
)
def test_length_and_rate_of_the_first_stage(line, epochs, rate):
    method = staged_options(f"--distill {line}").method
    assert (method["init_epochs"], method["init_lr"]) == (epochs, rate)


@pytest.mark.parametrize("distill", [name for name in STAGED if distiller_dict[name].weights[2] == 0])
def test_the_weight_that_has_no_effect_is_said(distill, capsys):
    options = parse_student(f"--distill {distill} -r 1 -a 0 -b 50".split())
    assert (options.gamma, options.alpha, options.beta) == (1, 0, 0)
    assert f"note: --beta 50 has no effect, as in RepDistiller: the loss of --distill {distill} belongs to" in (
        capsys.readouterr().out
    )
    assert "--init_epochs 0 leaves nothing of --distill" in error_of(
        parse_student, f"--distill {distill} --init_epochs 0".split()
    )


def test_fsp_needs_equal_widths():
    message = error_of(create_distiller, "fsp", student_widths=[8, 16, 16], teacher_widths=[8, 24, 24])
    assert message == (
        "--distill fsp needs two networks with the same widths of stem and stages, not [8, 16] (the student's) and"
        " [8, 24] (the teacher's): choose another pair or --distill"
    )


# ---------------------------------------------------------------- AB's loss


def test_ab_pushes_every_unit_over_the_margin_on_the_teachers_side():
    p_t = torch.tensor([3.0, 0.1, 0.0, -2.0]).view(1, 4, 1, 1)
    p_s = torch.tensor([0.5, 2.0, 0.5, -1.5]).view(1, 4, 1, 1)  # lacks 0.5, nothing, 1.5, nothing
    assert ab_loss(p_s, p_t).item() == pytest.approx(0.003 * (0.25 + 2.25))
    assert ab_loss(p_s.expand(3, -1, 5, 7), p_t.expand(3, -1, 5, 7)).item() == pytest.approx(0.003 * 35 * 2.5)
    assert ab_loss(p_t.sign() + (p_t > 0) - 1.0, p_t).item() == 0
    assert ab_loss(p_s.bfloat16(), p_t.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("scale", [0.0, 1e-15, 1e5])
@pytest.mark.parametrize("sizes", [(4, 4), (4, 2), (2, 4)])
def test_ab_has_finite_gradients(scale, sizes):
    generator = torch.Generator().manual_seed(0)
    p_s, p_t = (scale * torch.randn(1, 3, size, size, generator=generator) for size in sizes)
    loss = ab_loss(p_s.requires_grad_(), p_t)
    loss.backward()
    assert loss > 0 and loss.isfinite() and p_s.grad.isfinite().all() and p_s.grad.abs().sum() > 0
