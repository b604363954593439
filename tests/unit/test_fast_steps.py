"""Speed features change no step: lower precision, their combinations, the batches of validation."""

from dataclasses import replace

import pytest
import torch
from common import OWN_LOSS, Tiny, fixed_batch, make

from dataset import create_dataset
from distiller_zoo import distiller_dict
from helper.device import all_cores
from helper.loops import evaluate
from helper.teacher_cache import OnlineTeacher
from helper.trainer import make_optimizer, set_learning_rate
from inputs import UserError
from options.parse import parse_student


def test_the_distillers_see_no_more_than_they_say():
    """They need logits, or also the pooled feature; the teacher's other features may be missing."""
    for distill in OWN_LOSS:
        expert, batch = Tiny(width=12), fixed_batch()
        cls = distiller_dict[distill]
        said = OnlineTeacher(expert.eval())(batch, cls.also + cls.teacher_also)
        kept = {"logits": [], "pooled": said.features[-1:], "maps": said.features}[cls.needs]
        losses = []
        for features in (said.features, kept):
            torch.manual_seed(0)
            losses.append(make(distill=distill)(batch, replace(said, features=features)).loss.item())
        assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--plain --teacher_table", "--plain turns off everything that is for speed: leave it out, or --teacher_table"),
        ("--plain --precision bf16", "leave it out, or --precision"),
        ("--plain --trials 2", "leave it out, or --trials"),
        ("--table_dtype float16", "--table_dtype belongs to --teacher_table"),
        ("--table_dir somewhere", "--table_dir belongs to --teacher_table"),
        ("--trials 0", "--trials must be 1 or more"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        parse_student(flags.split())


@pytest.mark.parametrize("distill", OWN_LOSS)
def test_in_bf16_losses_and_temperatures_are_float32(distill):
    module, expert, batch = make("ctkd-instance", distill), Tiny(width=12).eval(), fixed_batch()
    module.precision = "bf16"
    module.start_epoch(1)
    seen = []
    convolution = next(layer for layer in module.student.modules() if isinstance(layer, torch.nn.Conv2d))
    convolution.register_forward_hook(lambda *_: seen.append(_[-1].dtype))
    step = module(batch, OnlineTeacher(expert, "bf16")(batch, module.teacher_also))
    assert set(seen) == {torch.bfloat16}
    told = (step.loss, step.logits, step.tau.student, *step.losses.values())
    assert {value.dtype for value in told} == {torch.float32}
    step.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters() if p.grad is not None)


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


def test_a_validation_tries_no_convolutions_out(monkeypatch):
    """Each run of --trials would try all of cuDNN's anew, with the largest batches of all; training does."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen = []

    class Watched(Tiny):
        def forward(self, x, is_feat=False):
            seen.append(torch.backends.cudnn.benchmark)
            return super().forward(x, is_feat)

    def on_batch():
        seen.append(torch.backends.cudnn.benchmark)  # where other runs may take their turn

    loader = create_dataset("digits", batch_size=200, seed=0, device="cpu").val
    evaluate(Watched(), loader, on_batch=on_batch)
    assert seen[:4] == [True, False, True, False] and torch.backends.cudnn.benchmark


@pytest.mark.parametrize(("device", "processes", "expected"), [("cpu", "1", 8), ("cpu", "4", 2), ("cuda", "1", 1)])
def test_a_table_is_filled_by_all_cores(device, processes, expected, monkeypatch):
    """Whatever number of threads the run has, which it gets back."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with all_cores(torch.device(device)):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
