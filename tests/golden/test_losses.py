"""The losses equal the published implementations' to the digit."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden.reference import cases, check_golden, check_gradient, close, draw, fill, golden, positive

from distiller_zoo import create_distiller, dkd_loss, kd_loss, pkt_loss, sp_loss
from distiller_zoo.vid import Regressor
from models import Output
from temperature import create_temperature

pytestmark = pytest.mark.filterwarnings("ignore:.*was never told its epoch")  # single steps, without epochs


@cases
@pytest.mark.parametrize("tau", [1.0, 4.0, 11.5])
def test_kd_is_the_published_loss(batch, classes, seed, tau):
    student, teacher = draw(batch, classes, seed).requires_grad_(), draw(batch, classes, seed + 1)
    loss = kd_loss(student, teacher, tau)
    check_golden(loss, student, golden(batch, classes, seed, f"kd_T{tau}"))


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


@cases
@pytest.mark.parametrize("lambda_", [0.0, -0.25, -1.0])
def test_ctkd_global_has_the_published_gradient(batch, classes, seed, lambda_):
    student, teacher = draw(batch, classes, seed), draw(batch, classes, seed + 1)
    temperature = create_temperature("ctkd-global").double()
    temperature.lambda_.fill_(-lambda_)  # the published lambda is negative
    tau = temperature(student, teacher, None, None)
    loss = kd_loss(student, teacher, tau)
    loss.backward()
    expected = golden(batch, classes, seed, f"ctkd_global_lambda{lambda_}")
    assert tau.student.item() == pytest.approx(expected["tau"], rel=1e-8)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    assert temperature.prediction.grad.item() == pytest.approx(expected["grad_param"], rel=1e-6)


@cases
@pytest.mark.parametrize("tau", [1.0, 4.0, 11.5])
@pytest.mark.parametrize("beta", [2, 8])
def test_dkd_is_the_published_loss(batch, classes, seed, tau, beta):
    student, teacher = draw(batch, classes, seed).requires_grad_(), draw(batch, classes, seed + 1)
    target = torch.tensor(np.random.default_rng(seed + 2).integers(0, classes, batch))
    loss = dkd_loss(student, teacher, target, tau, 1, beta)
    check_golden(loss, student, golden(batch, classes, seed, f"dkd_a1_b{beta}_T{tau}"))


@cases
def test_pkt_is_the_published_loss(batch, classes, seed):
    f_s, f_t = positive(seed + 4, batch, 64).requires_grad_(), positive(seed + 5, batch, 128)
    loss = pkt_loss(f_s, f_t)
    check_golden(loss, f_s, golden(batch, classes, seed, "pkt"))


@cases
def test_sp_is_the_published_loss(batch, classes, seed):
    g_s, g_t = positive(seed + 6, batch, 16, 8, 8).requires_grad_(), positive(seed + 7, batch, 32, 8, 8)
    loss = sp_loss(g_s, g_t)
    check_golden(loss, g_s, golden(batch, classes, seed, "sp"))


@cases
@pytest.mark.parametrize(("entry", "offset", "side"), [("vid", 7, 8), ("vid_pooled", 8, 4)])
def test_vid_is_the_published_loss(batch, classes, seed, entry, offset, side):
    g_s, g_t = positive(seed + 6, batch, 16, 8, 8).requires_grad_(), positive(seed + offset, batch, 32, side, side)
    head = Regressor(16, 32).double()
    fill(head.state_dict())
    loss = head(g_s, g_t)
    check_golden(loss, g_s, golden(batch, classes, seed, entry))


@cases
def test_srrl_is_the_published_loss(batch, classes, seed):
    f_s, f_t = positive(seed + 4, batch, 64).requires_grad_(), positive(seed + 5, batch, 128)
    classifier = torch.nn.Linear(128, classes).double()
    fill(classifier.state_dict())
    srrl = create_distiller("srrl", student_widths=[64], teacher_widths=[128], teacher_classifier=classifier).double()
    fill(srrl.connector.state_dict())
    teacher = Output([f_t], draw(batch, classes, seed + 1))
    loss = sum(srrl(Output([f_s], None), teacher, None, None, None).values())
    check_golden(loss, f_s, golden(batch, classes, seed, "srrl"))


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
