"""What is only for speed changes no step: channels-last, lower precision, steps that are recorded and replayed."""


import pytest
import torch
from common import Normed, Tiny, fixed_batch, loader_of, make
from torch.utils._python_dispatch import TorchDispatchMode

import train_student
from dataset import create_dataset
from distiller_zoo import distiller_dict
from helper.answers import Live
from helper.device import place
from helper.errors import UserError
from helper.graph import RecordedStepper
from helper.loops import Stepper, evaluate, make_optimizer, set_learning_rate, train_epoch, train_step
from helper.options import parse, resolve_pair, student_parser
from helper.teacher import fold_batch_norm
from temperature import temperature_dict


def test_the_distillers_see_no_more_than_they_say():
    """Logits, or the pooled feature too: the rest of the teacher's features may be missing."""
    for distill, cls in distiller_dict.items():
        expert, batch = Tiny(width=12), fixed_batch()
        said = Live(expert.eval())(batch)
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
    with pytest.raises(UserError, match=message):
        parse(student_parser(), flags.split())


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
        told = []
        for step in range(50):
            batch = fixed_batch()
            batch = batch._replace(images=torch.randn(batch.images.shape).double())
            torch.manual_seed(step)
            told.append(train_step(module.train(), Live(expert), batch, optimizer).loss.item())
        return told

    assert losses(plain=False) == pytest.approx(losses(plain=True), rel=1e-6)


@pytest.mark.parametrize("distill", distiller_dict)
def test_in_bf16_losses_and_temperatures_are_float32(distill):
    module, expert, batch = make("ctkd-instance", distill), Tiny(width=12).eval(), fixed_batch()
    module.precision = "bf16"
    seen = []
    module.student.stage.register_forward_hook(lambda *_: seen.append(_[-1].dtype))
    step = module(batch, Live(expert, "bf16")(batch))
    assert seen == [torch.bfloat16]
    told = (step.loss, step.logits, step.tau.student, *step.parts.values())
    assert {value.dtype for value in told} == {torch.float32}
    step.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters() if p.grad is not None)


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


class Emulated(RecordedStepper):
    """Records on the CPU. Only what `capture` and `warm_up` do on a GPU is missing."""

    def warm_up(self, given):
        self._computed(given)

    def capture(self, given):
        graph = Recording()
        with self.undone(), graph:
            step = self._computed(given)
        return graph, step


def small_run(distill, temperature, recorded, extra=()):
    own = ["--nce_k", "20", "--epochs", "4", "--rl_warmup", "2", "--rl_epoch", "3", "--aug_epoch", "4"]
    own += ["--rl_rollout", "2", "--batch_size", "8", *extra]
    options = parse(student_parser(), ["--temperature", temperature, "--distill", distill, *own])
    torch.manual_seed(0)
    loader = loader_of(subset=28, batch_size=8)
    expert = Tiny(width=12).eval().requires_grad_(False)
    module = train_student.distillation(resolve_pair(options, "resnet56"), Tiny(), expert, loader.target)
    optimizer = make_optimizer(module, 0.01, 0.9, 5e-4)
    stepper = Emulated(module, Live(expert), optimizer, loader, 8) if recorded else Stepper(
        module, Live(expert), optimizer
    )
    logs = []
    for epoch in (1, 2, 3, 4):
        set_learning_rate(optimizer, 0.01 / epoch)
        logs.append(train_epoch(stepper, loader, epoch, 1))
    return stepper, logs


@pytest.mark.parametrize("distill", distiller_dict)
@pytest.mark.parametrize("temperature", temperature_dict)
def test_a_replayed_step_is_the_step(temperature, distill):
    computed, logs = small_run(distill, temperature, recorded=False)
    replayed, same = small_run(distill, temperature, recorded=True)
    assert len(replayed.recordings) == (2 if temperature in ("rlkd", "random") else 1)
    for ours, theirs in zip(same, logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    for ours, theirs in zip(replayed.module.parameters(), computed.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_replayed_step_of_standardised_logits_is_the_step():
    _, logs = small_run("kd", "rlkd", recorded=False, extra=["--logit_stand"])
    _, same = small_run("kd", "rlkd", recorded=True, extra=["--logit_stand"])
    for ours, theirs in zip(same, logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)


def test_steps_in_python_would_be_noticed():
    """The emulation tells a step that counts in Python from one that counts in tensors."""

    class Forgetful(Stepper):
        count = 0

        def __call__(self, batch):
            self.count += 1
            self.optimizer.param_groups[0]["lr"].fill_(0.1 * self.count)
            return super().__call__(batch)

    class Replayed(Emulated, Forgetful):
        pass

    def losses(cls):
        torch.manual_seed(0)
        loader = loader_of(subset=32, batch_size=8)
        module, expert = make(), Tiny(width=12).eval().requires_grad_(False)
        optimizer = make_optimizer(module, 0.01, 0.9, 5e-4)
        more = (loader, 8) if cls is Replayed else ()
        return train_epoch(cls(module, Live(expert), optimizer, *more), loader, 1, 1)["loss"]

    assert losses(Replayed) != pytest.approx(losses(Forgetful), rel=1e-5)


def test_the_learning_rate_stays_the_tensor_that_it_is():
    optimizer = make_optimizer(Tiny(), 0.05, 0.9, 0)
    rate = optimizer.param_groups[0]["lr"]
    set_learning_rate(optimizer, 0.005)
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.005)
    plain = make_optimizer(Tiny(), 0.05, 0.9, 0, plain=True)
    set_learning_rate(plain, 0.2)
    assert plain.param_groups[0]["lr"] == 0.2


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
