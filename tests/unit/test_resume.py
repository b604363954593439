"""`last.pth` is checked against the run that resumes from it, and then loaded completely or not at all."""

import copy
import math

import pytest
import torch
from common import Tiny, make
from small_runs import CPU, a_run, a_training, an_epoch, loaders, snapshot, stopped_run

from helper import checkpoint
from helper.loops import train_step
from helper.metrics import Metrics
from helper.structure import Any, Checked, Misfit, fitted
from helper.teacher_cache import OnlineTeacher
from helper.trainer import Trainer
from inputs import UserError


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    return stopped_run(folder)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Return task and optimizer of a run that has not begun."""
    trainer = a_training(tmp_path_factory.mktemp("runs") / "fresh")
    return trainer.task, trainer.optimizer


def check_refused(state, fresh, folder, says):
    """Check that resuming from the state is refused in one sentence with a remedy, and changes nothing."""
    torch.save(state, folder / "last.pth")
    run = a_run(folder)
    before = snapshot(*fresh, folder)
    with pytest.raises(UserError, match=says) as error:
        run.resume(*fresh, Metrics(), steps=3)
    assert str(error.value).endswith("add --overwrite to start anew") and "\n" not in str(error.value)
    after = snapshot(*fresh, folder)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1] == before[1]


MOMENTUM = [
    ("another shape", lambda m: torch.zeros(5), r"momentum_buffer is \[5\] instead of \[8, 3, 3, 3\]"),
    ("larger", lambda m: torch.cat([m, m]), r"is \[16, 3, 3, 3\] instead of"),
    ("transposed", lambda m: m.transpose(0, 1), r"is \[3, 8, 3, 3\] instead of"),
    ("expanded", lambda m: torch.zeros(1).expand(8, 3, 3, 3), "has 216 numbers of which 1 are stored"),
    ("int64", lambda m: m.long(), "is int64 instead of float32"),
    ("half", lambda m: m.half(), "is float16 instead of float32"),
    ("complex", lambda m: m.to(torch.complex64), "complex64, which no network has"),
    ("infinite", lambda m: m / 0, "is not finite"),
    ("sparse", lambda m: m.to_sparse(), "is a sparse_coo tensor"),
    ("meta", lambda m: m.to("meta"), "is a meta tensor"),
    ("quantized", lambda m: torch.quantize_per_tensor(m, 0.1, 0, torch.qint8), "is a quantized tensor"),
    ("a text", lambda m: "x", "is not a tensor"),
]


@pytest.mark.filterwarnings("ignore")  # about quantized tensors
@pytest.mark.parametrize(("change", "says"), [each[1:] for each in MOMENTUM], ids=[each[0] for each in MOMENTUM])
def test_momentum_that_is_none_of_this_run_is_refused(change, says, stopped, fresh, tmp_path):
    state = copy.deepcopy(stopped)
    own = state["optimizer"]["state"][0]
    own["momentum_buffer"] = change(own["momentum_buffer"])
    check_refused(state, fresh, tmp_path, says)


ODD = [  # path to a value, its new value, the error
    ((), torch.zeros(3), "state is not a dictionary"),
    ((), {}, "holds no version"),
    ((), None, "state is not a dictionary"),
    (("else",), 1, "holds else, which is unknown here"),
    (("module", "student.stem.weight"), torch.zeros(8, 3, 3), "instead of"),
    (("module", "student.stem.weight"), torch.full((8, 3, 3, 3), math.nan), "stem.weight is not finite"),
    (("module", "more"), torch.zeros(1), "holds more, which is unknown here"),
    (("module",), {}, "module holds no warmup"),
    (("module",), "x", "module is not a dictionary"),
    (("optimizer",), "x", "optimizer is not a dictionary"),
    (("optimizer", "state"), "x", "state is not a dictionary"),
    (("optimizer", "state", 99), {}, "holds 99, which is unknown here"),
    (("history",), 5, "history is not a list"),
    (("history",), ["x"], "history.0 is not a dictionary"),
    (("history",), [{}], "history are no epochs from 1 on"),
    (("history", 0, "epoch"), 2, "history are no epochs from 1 on"),
    (("history", 0, "top1"), "90", "top1 is not a number"),
    (("history", 0, "top1"), math.nan, "history are no epochs from 1 on"),
    (("history", 0, "seconds"), 10**400, "seconds is not a number"),
    (("history",), [{"epoch": i + 1, "top1": 5.0} for i in range(100)], "more epochs than the 3 of this run"),
    (("step",), 0, "no whole state within an epoch"),
    (("step",), -1, "is not from 0 to 3"),
    (("step",), 4, "is not from 0 to 3"),
    (("step",), 1, "no whole state within an epoch"),  # the sums are of two steps
    (("step",), True, "step is not a whole number"),
    (("seconds",), "x", "seconds is not a number"),
    (("version",), "x", "version is not a whole number"),
    (("version",), 4, "it is of version 4, which is newer than this code"),
    (("trained",), {"loss": 1.0}, "no whole state within an epoch"),
    (("metrics",), None, "no whole state within an epoch"),
    (("metrics", "names"), ["loss"], "no whole state within an epoch"),
    (("metrics", "names"), ["loss", "loss_ce", "loss_pkt"], "it sums other losses in its unfinished epoch"),
    (("metrics", "tensors", "tau"), None, "tensors are not all sums of an epoch"),
    (("metrics", "tensors", "sums"), torch.zeros(3), "sums is float32 instead of float64"),
    (("module", "warmup"), torch.zeros(2), "warmup is "),
    (("module", "_extra_state", "probe", 1, 0), torch.tensor(10), "_extra_state is inconsistent"),
    (("module", "_extra_state", "probe", 0, 0, 0, 0, 0), torch.tensor(math.inf), "probe.0 is not finite"),
    (("rng_cpu",), torch.zeros(5, dtype=torch.uint8), "rng_cpu is "),
    (("rng_cpu",), torch.zeros(5056, dtype=torch.int64), "rng_cpu is int64"),
    (("rng_cpu",), torch.full((5056,), 255, dtype=torch.uint8), "rng_cpu is no such state"),
    (("rng_cuda",), "x", "rng_cuda is not a list"),
    (("processes",), "two", "processes is not a whole number"),
]


def changed(state, way, value):
    """Return a copy of the state with another value at the path."""
    state = copy.deepcopy(state)
    if not way:
        return value
    *path, last = way
    where = state
    for key in path:
        where = where[key]
    where[last] = value
    return state


@pytest.mark.parametrize(("way", "value", "says"), ODD, ids=[".".join(map(str, way)) or "all" for way, *_ in ODD])
def test_what_is_none_of_this_run_is_refused(way, value, says, stopped, fresh, tmp_path):
    check_refused(changed(stopped, way, value), fresh, tmp_path, says)


AGENT = [
    (("actor", "state", 0, "exp_avg"), torch.zeros(2), "exp_avg is "),
    (("actor", "state", 0, "exp_avg_sq"), torch.full((256, 3), -1.0), "exp_avg_sq is negative"),
    (("critic", "state", 0), {}, "state.0 holds no step"),
    (("critic", "state", 0, "step"), torch.tensor(-1.0), "step is negative"),
    (("critic", "state"), "x", "critic.state is not a dictionary"),
    (("rollout", 0), (torch.zeros(8, 4), torch.zeros(8), torch.zeros(8)), r"rollout.0.0 is \[8, 4\]"),
    (("rollout", 0), (torch.zeros(8, 3), torch.zeros(7), torch.zeros(8)), "_extra_state is inconsistent"),
    (("rewards",), [], "_extra_state is inconsistent"),
    (("probe",), None, "_extra_state is inconsistent"),
    (("probe",), "x", "probe is not a tensor"),
]


@pytest.mark.parametrize(("way", "value", "says"), AGENT, ids=[".".join(map(str, way)) for way, *_ in AGENT])
def test_an_agent_that_is_none_of_this_run_is_refused(way, value, says, stopped, fresh, tmp_path):
    check_refused(changed(stopped, ("module", "temperature._extra_state", *way), value), fresh, tmp_path, says)


def test_a_damaged_file_is_refused_and_says_what_helps(stopped, fresh, tmp_path):
    torch.save(Trainer, tmp_path / "last.pth")
    code = (tmp_path / "last.pth").read_bytes()
    torch.save(stopped, tmp_path / "last.pth")
    for content in (b"", b"x" * 99, code, (tmp_path / "last.pth").read_bytes()[:-99]):
        (tmp_path / "last.pth").write_bytes(content)
        run = a_run(tmp_path)
        with pytest.raises(UserError, match="last.pth is (damaged|refused).* add --overwrite"):
            run.resume(*fresh, Metrics(), steps=3)


SUMS = ("warmup", "count", "total", "squares")  # buffers that the first format of last.pth had besides the weights


def first_form(state):
    """Return the state in the format of `last.pth` before it had a version."""
    state = copy.deepcopy(state)
    module = state["module"]
    sums = {key: module.pop(key) for key in list(module) if key.rpartition(".")[2] in SUMS}
    probe = module.pop("_extra_state").get("probe")
    part = {
        "step": state.pop("step"),
        "seconds": state.pop("seconds"),
        "within": {"buffers": sums, "probe": probe},
        "meter": state.pop("metrics"),
    }
    for key in ("version", "trained", "first"):
        del state[key]
    return state | {"part": part}


def second_form(state):
    """Return the state in the format of `last.pth` before there were first stages."""
    return {key: value for key, value in state.items() if key != "first"} | {"version": 2}


@pytest.mark.parametrize("form", [first_form, second_form])
def test_a_state_of_an_earlier_form_goes_on_as_one_of_this_form(form, stopped, tmp_path):
    ends = []
    for state in (stopped, form(stopped)):
        folder = tmp_path / str(len(ends))
        folder.mkdir()
        torch.save(state, folder / "last.pth")
        trainer = a_training(folder)
        assert trainer.run.step == 2
        record = an_epoch(trainer)
        del record["seconds"], record["images_per_second"]
        ends.append((record, trainer.task.state_dict()))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("way", "value", "says"),
    [
        (("part",), 5, "part is not a dictionary"),
        (("part", "within"), 5, "part.within is not a dictionary"),
        (("part",), {"step": 1}, "part holds no seconds"),
        (("part", "more"), 5, "part holds more, which"),
        (("part", "step"), 1, "no whole state within an epoch"),
        (("part", "within", "buffers", "warmup"), torch.zeros(2), "warmup is "),
    ],
)
def test_a_damaged_state_of_the_first_form_is_refused(way, value, says, stopped, fresh, tmp_path):
    check_refused(changed(first_form(stopped), way, value), fresh, tmp_path, says)


def test_states_from_before_still_load(stopped, tmp_path):
    """States at the end of an epoch, of agents without a rollout, and of optimizers that lack some momenta."""
    state = changed(first_form(stopped), ("optimizer", "param_groups", 0, "lr"), 7.0)
    for way in ((), ("module", "temperature._extra_state")):
        where = state
        for key in way:
            where = where[key]
        for key in ("part", "processes", "rollout", "rewards", "probe"):
            where.pop(key, None)
    state["optimizer"]["state"][1]["momentum_buffer"] = None
    del state["optimizer"]["state"][2]
    torch.save(state, tmp_path / "last.pth")
    trainer = a_training(tmp_path)
    assert len(trainer.run.history) == 1 and trainer.run.step == 0
    assert [an_epoch(trainer)["epoch"] for _ in range(2)] == [2, 3]
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_momenta_that_share_memory_are_parted(stopped, tmp_path):
    state = copy.deepcopy(stopped)
    shared = torch.zeros(10_000)
    for own in state["optimizer"]["state"].values():
        momentum = own["momentum_buffer"]
        own["momentum_buffer"] = shared[: momentum.numel()].view(momentum.shape)
    torch.save(state, tmp_path / "last.pth")
    momenta = [kept["momentum_buffer"] for kept in a_training(tmp_path).optimizer.state.values()]
    assert len({momentum.untyped_storage().data_ptr() for momentum in momenta}) == len(momenta) > 1
    assert all(momentum.untyped_storage().nbytes() == 4 * momentum.numel() for momentum in momenta)


@pytest.mark.parametrize("begun_plain", [True, False])
def test_plain_and_fast_steps_take_turns_in_one_run(begun_plain, tmp_path):
    """Momentum in one memory format of a convolution's weights continues in the other."""
    training = a_training(tmp_path, "fixed", plain=begun_plain)
    an_epoch(training)
    losses, weights = [], []
    for plain in (begun_plain, not begun_plain):
        trainer = a_training(tmp_path, "fixed", plain)
        for parameter, kept in trainer.optimizer.state.items():
            assert kept["momentum_buffer"].stride() == parameter.stride()
        batches = [batch for batch, _ in zip(loaders()[0], range(2), strict=False)]
        steps = [
            train_step(trainer.task, trainer.teacher, batch, trainer.optimizer, trainer.metrics) for batch in batches
        ]
        losses.append([step.loss.item() for step in steps])
        weights.append(dict(trainer.task.named_parameters()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_steps_of_another_loss_are_not_added_up(stopped, fresh):
    metrics = Metrics()
    metrics.load_state(stopped["metrics"], CPU)
    other = make("rlkd", "pkt")
    other.start_epoch(1)
    batch = next(iter(loaders()[0]))
    with pytest.raises(UserError, match="sums in last.pth are not those of loss, loss_ce, loss_kd, loss_pkt:"):
        metrics.update(other(batch, OnlineTeacher(Tiny(width=12).eval())(batch)))


# ---------------------------------------------------------------- what is restored


def test_random_numbers_go_on(tmp_path):
    training = a_training(tmp_path)
    an_epoch(training)
    drawn = torch.rand(4)
    a_training(tmp_path)  # it draws initial weights
    assert torch.equal(torch.rand(4), drawn)


def test_the_best_and_the_last_weights_are_those_of_the_best_and_the_last_epoch(tmp_path):
    training = a_training(tmp_path, "fixed")
    run, task, optimizer = training.run, training.task, training.optimizer
    student, kept = task.student, tmp_path / "tiny_best.pth"
    seen = []
    for epoch, top1 in enumerate((40.0, 60.0, 60.0), 1):
        with torch.no_grad():
            student.classifier.bias.fill_(epoch)
        run.save_epoch({"epoch": epoch, "top1": top1}, task, optimizer)
        seen.append(checkpoint.load(kept)["model"]["classifier.bias"][0].item())
        run = a_run(tmp_path)
        run.resume(task, optimizer, Metrics())
    assert seen == [1, 2, 2]  # the first of equal ones
    run.config |= {"kind": "student", "teacher": None, "model": "tiny", "dataset": "noise", "seed": 1}
    run.finish(student)
    assert checkpoint.load(tmp_path / "tiny_last.pth")["model"]["classifier.bias"][0] == 3
    assert checkpoint.load(kept)["model"]["classifier.bias"][0] == 2


# ---------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        (3, int), (3, float), (3.5, float), ("a", str), (True, bool), ([1, 2], [int]), ([], [int]),
        ((1, "a"), (int, str)), ({"a": 1}, {"a": int, "b?": int}), ({"a": None}, {"a": Any}), ({}, {0: int}),
        ({"x": 1}, {str: int}),
        (torch.zeros(3, 2), torch.empty(0, 2)), (torch.tensor(math.nan), torch.tensor(math.inf)),
        (4, Checked(int, lambda x: x > 3, "")),
    ],
)  # fmt: skip
def test_what_fits(value, pattern):
    assert str(fitted(value, pattern)) == str(value)


def test_none_is_left_out_where_nothing_is_needed():
    assert fitted({"a": 1, "b": None}, {"a": int, "b?": int}) == {"a": 1}


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        (True, int), (2**70, int), (3.5, int), ("3", float), (None, int), ("ab", [str]), ([1, "a"], [int]),
        ((1,), (int, int)), ({"a": 1, "c": 1}, {"a": int}), ({}, {"a": int}), ({1: 1}, {str: int}), ([], {}),
        (torch.zeros(3), torch.empty(0, 2)), (torch.tensor(math.nan), torch.tensor(1.0)),
        (3, Checked(int, lambda x: x > 3, "")),
    ],
)  # fmt: skip
def test_what_does_not_fit(value, pattern):
    with pytest.raises(Misfit):
        fitted(value, pattern)


def test_a_fitted_value_is_a_copy_in_the_layout_of_the_pattern():
    value, pattern = torch.rand(4, 3, 2, 2), torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)
    copied = fitted({"a": value}, {"a": pattern})
    assert torch.equal(copied["a"], value) and copied["a"].stride() == pattern.stride()
    assert copied["a"].untyped_storage().data_ptr() not in (value.data_ptr(), pattern.data_ptr())


def test_a_state_at_the_end_of_an_epoch_holds_no_images(tmp_path):
    an_epoch(a_training(tmp_path))
    assert checkpoint.load(tmp_path / "last.pth")["module"]["_extra_state"] == {}


def test_images_of_the_probe_are_stored_alone(stopped):
    images, _ = stopped["module"]["_extra_state"]["probe"]
    assert images.untyped_storage().nbytes() == 4 * images.numel()
