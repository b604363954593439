"""Channels-last steps, and recorded and replayed steps, equal the plain ones over whole small runs."""

import itertools
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from common import OWN_LOSS, Normed, Tiny, fixed_batch, in_turn, loader_of, make, product_of
from torch.utils._python_dispatch import TorchDispatchMode

import train_student
from dataset.base import Batch
from distiller_zoo import distiller_dict
from helper.cuda_graph import CUDAGraphStep, undone
from helper.device import place
from helper.errors import RunError
from helper.first_stage import FirstTask
from helper.loops import train_one_epoch, train_step
from helper.metrics import Metrics
from helper.teacher import fold_batch_norm
from helper.teacher_cache import OnlineTeacher
from helper.trainer import make_optimizer, set_learning_rate
from options.parse import parse_student, resolve_pair
from temperature import temperature_dict


@pytest.mark.parametrize("distill", OWN_LOSS)
def test_the_fast_path_computes_what_the_plain_one_does(distill):
    """In float64, where rounding errors stay small over many steps."""

    lr = 0.01 if distill == "dist" else 0.05  # at CTKD's first tau, tau^2 makes DIST's gradient large

    def losses(plain):
        torch.manual_seed(0)
        expert = Normed(width=12)
        expert.train()(torch.randn(64, 3, 32, 32))
        module = make("ctkd-instance", distill, Normed(), expert.eval()).double()
        expert.double()  # before the folding, which would round: FT's gradient jumps where a difference changes sign
        expert = place(expert if plain else fold_batch_norm(expert), torch.device("cpu"), plain)
        module = place(module, torch.device("cpu"), plain)
        module.start_epoch(1)
        optimizer = make_optimizer(module, lr, 0.9, 5e-4)
        if plain:
            rounded = torch.tensor(lr).item()  # to float32, as it is in the other
            optimizer = torch.optim.SGD(module.parameters(), rounded, 0.9, weight_decay=5e-4)
        told, metrics = [], Metrics()
        for step in range(20):
            batch = fixed_batch()
            images = torch.randn(batch.images.shape).double()
            batch = Batch(images, batch.target, batch.index, second=partial(images.flip, 3))
            torch.manual_seed(step)
            told.append(train_step(module.train(), OnlineTeacher(expert), batch, optimizer, metrics).loss.item())
        return told

    assert losses(plain=False) == pytest.approx(losses(plain=True), rel=1e-6)


class Recording(TorchDispatchMode):
    """A CUDA graph on the CPU: records a step's operations to replay them on the same tensors."""

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
                continue  # a view of a persistent tensor, or the tensor itself
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                old.copy_(new)


def _tensors(out):
    return [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]


class Emulated(CUDAGraphStep):
    """Records on the CPU; only the GPU parts of `capture` and `warm_up` are replaced."""

    def __call__(self, task, teacher, batch, optimizer, metrics):
        self.changed = task, optimizer, metrics
        return super().__call__(task, teacher, batch, optimizer, metrics)

    def warm_up(self, step, device):
        step()

    def capture(self, step):
        graph = Recording()
        with undone(*self.changed), graph:
            output = step()
        return graph, output


def test_a_failed_recording_names_its_cause_and_leaves_its_stream(monkeypatch):
    """Ending it raises another error, before PyTorch leaves the recording's stream."""
    streams = ["outer"]

    @contextmanager
    def graph(_, stream):
        streams.append(stream)  # never left
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    @contextmanager
    def restored(name):
        before = list(streams)
        try:
            yield
        finally:
            streams[:] = before

    def step():
        raise RuntimeError("a value is read back\nand more")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", restored)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(RunError, match=r"cannot be recorded as a CUDA graph \(a value is read back\): add --plain"):
        CUDAGraphStep(8).capture(step)
    assert streams == ["outer"]


def small_run(distill, temperature, recorded, extra=()):
    own = ["--nce_k", "20", "--epochs", "4", "--rl_warmup", "2", "--rl_epoch", "3", "--aug_epoch", "4"]
    own += ["--rl_rollout", "2", "--batch_size", "8", "--hint_layer", "1", *extra]
    options = parse_student(["--temperature", temperature, "--distill", distill, *own])
    torch.manual_seed(0)
    loader = loader_of(subset=28, batch_size=8)
    expert = Normed(width=12).eval().requires_grad_(False)
    task = train_student.distillation(resolve_pair(options, "resnet56"), Tiny(), expert, loader.target)
    optimizer, metrics = make_optimizer(task, 0.01, 0.9, 5e-4), Metrics()
    step, logs = Emulated(8) if recorded else train_step, []
    for epoch in (1, 2, 3, 4):
        set_learning_rate(optimizer, 0.01 / epoch)
        logs.append(train_one_epoch(task, OnlineTeacher(expert), loader, optimizer, metrics, epoch, step=step))
    return task, step, logs


@pytest.mark.parametrize(("temperature", "distill"), product_of(temperature_dict, OWN_LOSS, few=in_turn))
def test_a_replayed_step_is_the_step(temperature, distill):
    computed, _, logs = small_run(distill, temperature, recorded=False)
    replayed, step, same = small_run(distill, temperature, recorded=True)
    phases = 2 if temperature in ("rlkd", "random") else 1
    assert len(step.recordings) == (0 if distill in ("mlkd", "kdsvd", "skd") else phases)  # which cannot be recorded
    for ours, theirs in zip(same, logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    for ours, theirs in zip(replayed.parameters(), computed.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("distill", [name for name, distiller in distiller_dict.items() if distiller.has_first_stage])
def test_a_replayed_step_of_a_first_stage_is_the_step(distill):
    ends = []
    for step in (train_step, Emulated(8)):
        torch.manual_seed(0)
        expert, loader = Tiny(width=8 if distill == "fsp" else 12), loader_of(subset=28, batch_size=8)
        main = make("fixed", distill, Tiny(), expert)
        task, teacher, metrics = FirstTask(main, 32), OnlineTeacher(expert.requires_grad_(False)), Metrics()
        with task.learning():
            optimizer = make_optimizer(task, 0.01, 0.9, 5e-4)
            logs = [train_one_epoch(task, teacher, loader, optimizer, metrics, e, step=step)["loss"] for e in (1, 2)]
        ends.append((logs, main.state_dict()))
    assert len(step.recordings) == 1
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


def test_a_replayed_step_of_standardised_logits_is_the_step():
    *_, logs = small_run("kd", "rlkd", recorded=False, extra=["--logit_stand"])
    *_, same = small_run("kd", "rlkd", recorded=True, extra=["--logit_stand"])
    for ours, theirs in zip(same, logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)


def test_steps_in_python_would_be_noticed():
    """The emulation distinguishes a step that counts in Python from one that counts in tensors."""

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


def counted(loader, monkeypatch):
    """Return a list of the sizes of all batches of images that the loader makes from now on."""
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
    assert not torch.equal(given.images, images)  # they had been made before
    assert torch.equal(given.unmade().images, images)
    assert torch.equal(first.images, first.unmade().images)


def test_a_recorded_step_makes_the_images(monkeypatch):
    """Only the batch's numbers reach it; the images of a batch of another size are made by a plain step."""
    loader = loader_of(subset=28, batch_size=8)
    sizes, module, step = counted(loader, monkeypatch), make(), Emulated(8)
    teacher = OnlineTeacher(Tiny(width=12).eval().requires_grad_(False))
    optimizer, metrics = make_optimizer(module, 0.01, 0.9, 5e-4), Metrics()
    for epoch in (1, 2):
        train_one_epoch(module, teacher, loader, optimizer, metrics, epoch, step=step)
        assert sizes == [8, 8] + epoch * [4]  # for the warm-up and the recording
    ((given, graph, _),) = step.recordings.values()
    assert any(func is torch.ops.aten.gather.default and args[0].dtype == torch.uint8 for func, args, *_ in graph.calls)
    last = [batch for batch in loader.epoch(2) if len(batch) == 8][-1]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(given.numbers, last.numbers, strict=True))
