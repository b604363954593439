"""The distillers' losses: against the published implementations' numbers, and against what must be true of them."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distiller_zoo import create_distiller, dkd_loss, kd_loss, pkt_loss, sp_loss
from distiller_zoo.vid import Regressor
from helper.errors import UserError
from models import Output
from temperature import Tau, create_temperature

GOLDEN = Path(__file__).resolve().parents[2] / "shared/parity/losses.json"
CASES = [(8, 10, 100), (16, 100, 200)]  # batch, classes, seed

needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason="the golden numbers (../shared/parity) are not here")
cases = pytest.mark.parametrize(("batch", "classes", "seed"), CASES)


def golden(batch, classes, seed, entry):
    return json.loads(GOLDEN.read_text())[f"B{batch}_C{classes}_seed{seed}"][entry]


def draw(batch, classes, seed):
    return torch.tensor(np.random.default_rng(seed).standard_normal((batch, classes)) * 3)


def positive(seed, *shape):
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape)).clamp(min=0)


def fill(tensors):
    """Fill named tensors by the rule of the golden numbers."""
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue
        n = torch.tensor(np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tensor.shape))
        if tensor.dim() > 1:
            n = n * math.sqrt(2 / math.prod(tensor.shape[1:]))
        elif name.endswith("running_var"):
            n = 1 + 0.2 * n.abs()
        else:
            n = 0.5 + 0.05 * n if name.endswith("weight") else 0.1 * n
        tensor.data.copy_(n)


def close(x):
    return pytest.approx(x, rel=1e-6)


def check_gradient(gradient, expected, rel=1e-6):
    size = expected["abs"] / gradient.numel()
    assert gradient.abs().sum().item() == pytest.approx(expected["abs"], rel=rel)
    assert gradient.sum().item() == pytest.approx(expected["sum"], rel=rel, abs=rel * expected["abs"])
    assert gradient.flatten()[:4].tolist() == pytest.approx(expected["first"], rel=rel, abs=rel * size)


@needs_golden
@cases
@pytest.mark.parametrize("tau", [1.0, 4.0, 11.5])
def test_kd_is_the_published_loss(batch, classes, seed, tau):
    student, teacher = draw(batch, classes, seed).requires_grad_(), draw(batch, classes, seed + 1)
    loss = kd_loss(student, teacher, tau)
    loss.backward()
    expected = golden(batch, classes, seed, f"kd_T{tau}")
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    check_gradient(student.grad, expected["grad"])


@needs_golden
@cases
def test_kd_with_a_temperature_an_instance_is_the_published_loss(batch, classes, seed):
    student, teacher = draw(batch, classes, seed).requires_grad_(), draw(batch, classes, seed + 1)
    expected = golden(batch, classes, seed, "kd_instance")
    prediction = torch.tensor(np.random.default_rng(seed + 3).standard_normal(batch))
    tau = (1 + 20 * torch.sigmoid(prediction)).requires_grad_()
    assert tau.tolist() == pytest.approx(expected["tau"], rel=1e-8)
    loss = kd_loss(student, teacher, tau)
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-3)  # the reference adds 1e-7 to probabilities
    check_gradient(student.grad, expected["grad_s"], rel=1e-3)
    check_gradient(tau.grad, expected["grad_tau"], rel=1e-2)


@needs_golden
@cases
@pytest.mark.parametrize("lambda_", [0.0, -0.25, -1.0])
def test_ctkd_global_has_the_published_gradient(batch, classes, seed, lambda_):
    student, teacher = draw(batch, classes, seed), draw(batch, classes, seed + 1)
    temperature = create_temperature("ctkd-global").double()
    temperature.lambda_.fill_(-lambda_)  # the published lambda is negative
    tau = temperature(student, teacher, None)
    loss = kd_loss(student, teacher, tau)
    loss.backward()
    expected = golden(batch, classes, seed, f"ctkd_global_lambda{lambda_}")
    assert tau.student.item() == pytest.approx(expected["tau"], rel=1e-8)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    assert temperature.prediction.grad.item() == pytest.approx(expected["grad_param"], rel=1e-6)


@needs_golden
@cases
@pytest.mark.parametrize("tau", [1.0, 4.0, 11.5])
@pytest.mark.parametrize("beta", [2, 8])
def test_dkd_is_the_published_loss(batch, classes, seed, tau, beta):
    student, teacher = draw(batch, classes, seed).requires_grad_(), draw(batch, classes, seed + 1)
    target = torch.tensor(np.random.default_rng(seed + 2).integers(0, classes, batch))
    loss = dkd_loss(student, teacher, target, tau, 1, beta)
    loss.backward()
    expected = golden(batch, classes, seed, f"dkd_a1_b{beta}_T{tau}")
    assert loss.item() == close(expected["loss"])
    check_gradient(student.grad, expected["grad"])


@needs_golden
@cases
def test_pkt_is_the_published_loss(batch, classes, seed):
    f_s, f_t = positive(seed + 4, batch, 64).requires_grad_(), positive(seed + 5, batch, 128)
    loss = pkt_loss(f_s, f_t)
    loss.backward()
    expected = golden(batch, classes, seed, "pkt")
    assert loss.item() == close(expected["loss"])
    check_gradient(f_s.grad, expected["grad"])


@needs_golden
@cases
def test_sp_is_the_published_loss(batch, classes, seed):
    g_s, g_t = positive(seed + 6, batch, 16, 8, 8).requires_grad_(), positive(seed + 7, batch, 32, 8, 8)
    loss = sp_loss(g_s, g_t)
    loss.backward()
    expected = golden(batch, classes, seed, "sp")
    assert loss.item() == close(expected["loss"])
    check_gradient(g_s.grad, expected["grad"])


@needs_golden
@cases
@pytest.mark.parametrize(("entry", "offset", "side"), [("vid", 7, 8), ("vid_pooled", 8, 4)])
def test_vid_is_the_published_loss(batch, classes, seed, entry, offset, side):
    g_s, g_t = positive(seed + 6, batch, 16, 8, 8).requires_grad_(), positive(seed + offset, batch, 32, side, side)
    head = Regressor(16, 32).double()
    fill(head.state_dict())
    loss = head(g_s, g_t)
    loss.backward()
    expected = golden(batch, classes, seed, entry)
    assert loss.item() == close(expected["loss"])
    check_gradient(g_s.grad, expected["grad"])


@needs_golden
@cases
def test_srrl_is_the_published_loss(batch, classes, seed):
    f_s, f_t = positive(seed + 4, batch, 64).requires_grad_(), positive(seed + 5, batch, 128)
    classifier = torch.nn.Linear(128, classes).double()
    fill(classifier.state_dict())
    srrl = create_distiller("srrl", student_widths=[64], teacher_widths=[128], teacher_classifier=classifier).double()
    fill(srrl.connector.state_dict())
    teacher = Output([f_t], draw(batch, classes, seed + 1))
    loss = sum(srrl(Output([f_s], None), teacher, None, None, None).values())
    loss.backward()
    expected = golden(batch, classes, seed, "srrl")
    assert loss.item() == close(expected["loss"])
    check_gradient(f_s.grad, expected["grad"])


@needs_golden
@cases
def test_crd_is_the_published_loss_in_two_steps(batch, classes, seed):
    f_s, f_t = positive(seed + 4, batch, 64).requires_grad_(), positive(seed + 5, batch, 128)
    generator = np.random.default_rng(seed + 9)
    index = torch.tensor(generator.permutation(200)[:batch])
    candidates = torch.cat([index[:, None], torch.tensor(generator.integers(0, 200, (batch, 50)))], dim=1)
    crd = create_distiller(
        "crd", student_widths=[64], teacher_widths=[128], train_target=torch.arange(200) % 10, feat_dim=32, nce_k=50
    ).double()
    fill({name: tensor for name, tensor in crd.state_dict().items() if "log_z" not in name})
    for memory in (crd.contrast.memory_v1, crd.contrast.memory_v2):
        memory.copy_(F.normalize(memory, dim=1))
    for step in ("crd_step1", "crd_step2"):
        f_s.grad = None
        loss = crd.contrast(crd.embed_s(f_s), crd.embed_t(f_t), index, candidates)
        loss.backward()
        expected = golden(batch, classes, seed, step)
        assert loss.item() == close(expected["loss"])
        check_gradient(f_s.grad, expected["grad"])
        crd.after_step()
        for name in {"memory_v1", "memory_v2"} & expected.keys():
            check_gradient(getattr(crd.contrast, name), expected[name])


def test_a_constant_temperature_an_instance_is_the_scalar_one():
    student, teacher = draw(5, 10, 0), draw(5, 10, 1)
    constant = kd_loss(student, teacher, torch.full((5, 1), 4.0))
    assert constant.item() == pytest.approx(kd_loss(student, teacher, 4).item())


def test_different_temperatures_by_hand():
    student, teacher = draw(3, 4, 0), draw(3, 4, 1)
    tau = Tau(torch.tensor([[2.0], [3.0], [4.0]]), torch.tensor([[5.0], [1.0], [2.0]]))
    by_hand = 0
    for i in range(3):
        t, s = tau.teacher[i].item(), tau.student[i].item()
        p, q = F.softmax(teacher[i] / t, 0), F.softmax(student[i] / s, 0)
        by_hand += t * s * (p * (p / q).log()).sum().item() / 3
    assert kd_loss(student, teacher, tau).item() == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("tau", [0.05, 1.0, 100.0])
def test_kd_stays_finite_at_huge_logits(tau):
    student, teacher = (1000 * draw(4, 10, 0).float()).requires_grad_(), 1000 * draw(4, 10, 1).float()
    loss = kd_loss(student, teacher, tau)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert loss > 0


def test_kd_of_equal_logits_is_zero():
    assert kd_loss(draw(4, 10, 0), draw(4, 10, 0), 4.0).item() == pytest.approx(0, abs=1e-12)


def test_kd_computes_in_float32_whatever_the_networks_do():
    student, teacher = draw(4, 10, 0).bfloat16(), draw(4, 10, 1).bfloat16()
    loss = kd_loss(student, teacher, 4.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(kd_loss(student.double(), teacher.double(), 4.0).item(), rel=1e-5)


def test_an_unknown_distiller_lists_the_known():
    with pytest.raises(UserError, match="unknown distiller 'kdd'; the known ones are: kd"):
        create_distiller("kdd")
