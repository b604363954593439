"""A step and an epoch: every distiller with every temperature, what is trained, what is measured."""

import math

import pytest
import torch
from common import OWN_LOSS, Normed, Tiny, check_gradients, fixed_batch, in_turn, make, product_of
from torch import nn

import train_student
from dataset import create_dataset
from dataset.base import Batch
from distiller_zoo import kd_loss
from helper.errors import RunError
from helper.loops import evaluate, train_one_epoch, train_step
from helper.metrics import Metrics
from helper.task import StepOutput, kept_statistics
from helper.teacher_cache import OnlineTeacher
from helper.trainer import make_optimizer, step_lr
from inputs import UserError
from options.parse import parse_student, resolve_pair
from temperature import temperature_dict


@pytest.mark.parametrize(
    ("temperature", "distill", "classes"), product_of(temperature_dict, OWN_LOSS, (10, 100), few=in_turn)
)
def test_every_temperature_with_every_distiller_learns(temperature, distill, classes):
    torch.manual_seed(1)
    student, expert = Tiny(classes), Normed(classes, width=12).eval().requires_grad_(False)
    before = {key: value.clone() for key, value in expert.state_dict().items()}
    module, batch = make(temperature, distill, student, expert, classes), fixed_batch(classes)
    heads = {name: p.detach().clone() for name, p in module.distiller.named_parameters()}
    module.start_epoch(3)
    # SP averages over the pairs of a batch; at a batch size of 16 its published weight is very large
    optimizer = make_optimizer(module, 2e-4 if distill == "sp" else 0.01, 0.0, 0.0)
    losses, metrics = [], Metrics()
    for _ in range(8):
        torch.manual_seed(2)  # the same negatives in every step
        step = train_step(module, OnlineTeacher(expert), batch, optimizer, metrics)
        # NKD and WSLD contain tau^2 times the teacher's entropy, which changes with tau
        losses.append((step.losses["ce"] if distill in ("nkd", "wsld") else step.loss).item())
        assert step.loss.isfinite()
    assert losses[-1] < losses[1]  # the first step may have set images aside as a probe
    check_gradients(module)
    for name, parameter in module.distiller.named_parameters():
        # row 10 of RLKD's bugs: heads that are never trained
        assert torch.equal(parameter, heads[name]) != parameter.requires_grad
    assert all(p.grad is None for p in expert.parameters())
    assert all(torch.equal(value, before[key]) for key, value in expert.state_dict().items())


@pytest.mark.parametrize(("temperature", "distill"), product_of(temperature_dict, OWN_LOSS, few=in_turn))
def test_no_distiller_waits_for_the_device(temperature, distill):
    """A meta tensor has no values, so reading one back fails."""
    module = make(temperature, distill).to("meta")
    batch = fixed_batch()
    images = batch.images.to("meta")
    batch = Batch(images, batch.target.to("meta"), batch.index.to("meta"), second=lambda: images)
    module.start_epoch(1)
    module.before_step(batch)
    expert = Tiny(width=12).to("meta").requires_grad_(False)
    step = module(batch, expert(batch.images, is_feat=True, also=module.teacher_also))
    step.loss.backward()
    module.after_step()
    assert step.loss.is_meta
    assert all(p.grad.is_meta for p in module.parameters() if p.requires_grad)


def test_a_network_keeps_its_own_statistics_even_after_an_error():
    network = Normed()
    own = {name: (buffer, buffer.clone()) for name, buffer in network.named_buffers()}
    with pytest.raises(RuntimeError), kept_statistics(network):
        network(torch.randn(4, 3, 8, 8))
        assert not torch.equal(network.bn1.running_mean, own["bn1.running_mean"][0])
        raise RuntimeError
    assert all(buffer is own[name][0] and torch.equal(buffer, own[name][1]) for name, buffer in network.named_buffers())


def test_losses_that_change_from_step_to_step_are_refused():
    metrics, loss, logits, target = Metrics(), torch.tensor(1.0), torch.zeros(2, 3), torch.tensor([0, 1])
    metrics.update(StepOutput(loss, {"ce": loss}, logits, target, None))
    with pytest.raises(UserError, match="a step has the losses loss, loss_b, and the one before loss, loss_ce"):
        metrics.update(StepOutput(loss, {"b": loss}, logits, target, None))


def test_the_flags_reach_the_distiller():
    def built(line):
        options = resolve_pair(parse_student(line.split()), "vgg13")
        return train_student.distillation(options, Tiny(), Tiny(width=12), torch.arange(64) % 10).distiller

    crd = built("--distill crd --feat_dim 16 --nce_k 7 --nce_t 0.1 --nce_m 0.2 --mode relax")
    assert crd.contrast.memory_v1.shape == (64, 16)
    assert (crd.contrast.nce_t, crd.contrast.nce_m) == (0.1, 0.2)
    assert (crd.candidates.nce_k, crd.candidates.mode) == (7, "relax")
    dkd = built("--distill dkd --dkd_alpha 0.5 --dkd_beta 3 --dkd_warmup 4")
    assert (dkd.alpha, dkd.beta, dkd.warmup_epochs) == (0.5, 3, 4)
    dpk = built(
        "--distill dpk --epochs 7 --dpk_stages 0 --dpk_patch 2 --dpk_width 9 --dpk_encoder_depth 3"
        " --dpk_decoder_depth 4 --dpk_mask batch --dpk_schedule fixed:0.3 --dpk_momentum 0.5"
    )
    assert (dpk.epochs, dpk.mask, dpk.schedule, dpk.momentum) == (7, "batch", 0.3, 0.5)
    (stage,) = dpk.stages
    assert (stage.patch, len(stage.student_encoder), len(stage.decoder)) == (2, 1 + 3, 4 + 1)
    assert stage.teacher_encoder[0].weight.shape == (9, 24, 2, 2)
    dkd = built("--distill dkd --dkd_weights mdistiller --model_s vgg8")
    assert (dkd.alpha, dkd.beta, dkd.warmup_epochs) == (1, 6, 20)


@pytest.mark.parametrize("distill", OWN_LOSS)
def test_the_loss_is_its_weighted_parts(distill):
    """Row 8 of RLKD's bugs: PKT's weight is multiplied, not added."""
    module, batch = make(distill=distill), fixed_batch()
    module.gamma, module.alpha, module.beta = 0.3, 0.6, 20.0 if distill != "kd" else 0.0  # KD has no loss of its own
    step = module(batch, Tiny(width=12)(batch.images, is_feat=True, also=module.teacher_also))
    weights = {"ce": 0.3, "ce_second": 0.3, "kd": 0.6}
    expected = sum(weights.get(name, 20.0) * term.item() for name, term in step.losses.items())
    assert step.loss.item() == pytest.approx(expected, rel=1e-5)
    assert {"ce", "kd"} < step.losses.keys() or distill == "kd"


def test_kd_at_the_fixed_temperature_stands_beside_kd_at_tau_and_both_warm_up():
    line = "--temperature dtkd -a 0.6 --fixed_alpha 0.2 --kd_T 3 --kd_warmup 4"
    options = parse_student(line.split())
    teacher, batch = Tiny(width=12), fixed_batch()
    module = train_student.distillation(resolve_pair(options, "resnet56"), Tiny(), teacher, torch.zeros(64))
    said = teacher(batch.images, is_feat=True)
    for epoch, warmup in ((1, 0.25), (3, 0.75), (4, 1), (9, 1)):
        module.start_epoch(epoch)
        step = module(batch, said)
        kd = 0.6 * step.losses["kd"] + 0.2 * step.losses["kd_fixed"]
        assert step.loss.item() == pytest.approx((step.losses["ce"] + warmup * kd).item(), rel=1e-6)
    assert step.losses["kd_fixed"].item() == pytest.approx(kd_loss(step.logits, said.logits, 3.0).item(), rel=1e-6)
    assert step.losses["kd_fixed"] != step.losses["kd"]


def test_standardisation_goes_with_other_temperatures():
    def built(line):
        options = resolve_pair(parse_student(line.split()), "resnet56")
        return train_student.distillation(options, Tiny(), Tiny(), torch.zeros(64)).temperature

    assert isinstance(built("--temperature ctkd-global --logit_stand").inner, temperature_dict["ctkd-global"])
    assert isinstance(built("--temperature standardised --base_tau 3").inner, temperature_dict["fixed"])
    assert built("--temperature standardised --base_tau 3").inner.tau == 3


def test_images_are_mixed_in_the_epochs_that_the_temperature_says():
    loader = create_dataset("digits", batch_size=32, seed=0, device="cpu", train_subset=100).train
    module = make("random", student=Tiny())
    module.temperature = temperature_dict["random"](loader.target, epochs=3, rl_warmup=1, aug_epoch=2)
    seen = []
    module.register_forward_hook(lambda _, inputs, step: seen.append(inputs[0].view is None))
    teacher, optimizer = OnlineTeacher(Tiny().requires_grad_(False)), make_optimizer(module, 0.05, 0.9, 0)
    for epoch in (1, 2, 3):
        train_one_epoch(module, teacher, loader, optimizer, Metrics(), epoch)
    assert seen == 4 * [False] + 4 * [True] + 4 * [False]


def test_one_group_learns_student_and_temperature_together():
    module = make("ctkd-global")
    optimizer = make_optimizer(module, 0.05, 0.9, 5e-4)
    (group,) = optimizer.param_groups
    assert any(p is module.temperature.prediction for p in group["params"])
    assert len(group["params"]) == len(list(module.student.parameters())) + 1
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.05, 0.9, 5e-4, False)


def test_the_rate_drops_after_its_milestones():
    rates = [step_lr(0.05, epoch, [150, 180, 210], 0.1) for epoch in (1, 150, 151, 180, 181, 210, 211, 240)]
    assert rates == pytest.approx([0.05, 0.05, 5e-3, 5e-3, 5e-4, 5e-4, 5e-5, 5e-5])


def test_evaluate_counts_every_sample_once():
    loader = create_dataset("digits", batch_size=50, seed=0, device="cpu").val
    torch.manual_seed(0)
    model = Tiny().eval()
    logits = torch.cat([model(batch.images) for batch in loader])
    target = torch.cat([batch.target for batch in loader])
    result = evaluate(model, loader)
    assert result["top1"] == pytest.approx(100 * (logits.argmax(1) == target).double().mean().item())
    rank = (logits > logits.gather(1, target[:, None])).sum(1)
    assert result["top5"] == pytest.approx(100 * (rank < 5).double().mean().item())
    assert result["test_loss"] == pytest.approx(nn.functional.cross_entropy(logits, target).item(), rel=1e-5)


def test_the_epoch_of_an_epoch_is_the_mean_over_its_samples():
    loader = create_dataset("digits", batch_size=50, seed=0, device="cpu", train_subset=120).train
    module = make("ctkd-instance")
    seen = []
    expert = Tiny().requires_grad_(False)
    hook = module.register_forward_hook(lambda _, inputs, step: seen.append((step, inputs[0].target)))
    optimizer = make_optimizer(module, 0.05, 0.9, 0)
    result = train_one_epoch(module, OnlineTeacher(expert), loader, optimizer, Metrics(), 4)
    hook.remove()
    sizes = [len(target) for _, target in seen]
    tau = torch.cat([step.tau.student for step, _ in seen])
    assert sizes == [50, 50, 20]
    total = sum(step.loss.item() * len(target) for step, target in seen)
    assert result["loss"] == pytest.approx(total / 120, rel=1e-6)
    assert result["tau_mean"] == pytest.approx(tau.mean().item(), rel=1e-6)
    assert (result["tau_min"], result["tau_max"]) == (tau.min().item(), tau.max().item())
    hits = sum((step.logits.argmax(1) == target).sum().item() for step, target in seen)
    assert result["train_top1"] == pytest.approx(100 * hits / 120)
    assert result["lambda"] == pytest.approx(0.3455, abs=1e-4)


def test_the_metrics_name_the_term_that_failed_first():
    metrics = Metrics()
    good, bad = torch.tensor(1.0), torch.tensor(math.nan)
    logits, target = torch.zeros(4, 10), torch.zeros(4, dtype=torch.long)
    for ce, kd in ((good, good), (good, bad), (bad, bad)):
        metrics.update(StepOutput(ce + kd, {"ce": ce, "kd": kd}, logits, target, None))
    with pytest.raises(RunError, match="not finite: loss_kd failed first, in step 2"):
        metrics.result()
    metrics = Metrics()
    metrics.update(StepOutput(torch.tensor(math.inf), {"ce": good, "kd": good}, logits, target, None))
    with pytest.raises(RunError, match="not finite: loss failed first, in step 1"):
        metrics.result()
