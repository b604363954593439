"""The losses of RepDistiller's other methods equal the published implementations' to the digit."""

import json
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.reference import cases, check_golden, check_gradient, close, draw, fill, positive

from distiller_zoo import (
    at_loss,
    cc_loss,
    create_distiller,
    dist_loss,
    distiller_dict,
    hcl_loss,
    hint_loss,
    ickd_loss,
    itrd_correlation_loss,
    itrd_mutual_loss,
    kd_loss,
    nkd_loss,
    nst_loss,
    ofd_loss,
    ofd_margin,
    rkd_loss,
    rld_loss,
    skd_loss,
    srd_loss,
    swap_target,
    wsld_loss,
)
from distiller_zoo.hint import Regressor
from distiller_zoo.ofd import Connector
from models import Output, create_model
from options.parse import kwargs_for

GOLDEN = json.loads((Path(__file__).parent / "zoo.json").read_text())


def golden(batch, classes, seed, entry):
    return GOLDEN[f"B{batch}_C{classes}_seed{seed}"][entry]


def maps(batch, seed):
    """Return the maps of README.md by name."""
    return {
        "g_s": positive(seed + 6, batch, 16, 8, 8),
        "g_t": positive(seed + 7, batch, 32, 8, 8),
        "g_t2": positive(seed + 8, batch, 32, 4, 4),
        "h_s": positive(seed + 12, batch, 32, 4, 4),
    }


def vectors(batch, seed):
    return positive(seed + 4, batch, 64).requires_grad_(), positive(seed + 5, batch, 128)


@cases
@pytest.mark.parametrize(
    ("entry", "student", "teacher"), [("hint", "g_s", "g_t"), ("hint_down", "g_s", "g_t2"), ("hint_up", "h_s", "g_t")]
)
def test_hint_is_the_published_loss(batch, classes, seed, entry, student, teacher):
    g_s, g_t = (maps(batch, seed)[name] for name in (student, teacher))
    regressor = Regressor(list(g_s.shape[1:]), list(g_t.shape[1:])).double()
    fill(regressor.state_dict())
    check_golden(hint_loss(regressor(g_s.requires_grad_()), g_t), g_s, golden(batch, classes, seed, entry))


@cases
@pytest.mark.parametrize(
    ("entry", "student", "teacher", "form"),
    [("at", "g_s", "g_t", "mean"), ("at_pooled", "g_s", "g_t2", "mean"), ("at_pooled_teacher", "h_s", "g_t", "mean"),
     ("at_paper", "g_s", "g_t", "paper")],
)  # fmt: skip
def test_at_is_the_published_loss(batch, classes, seed, entry, student, teacher, form):
    g_s, g_t = (maps(batch, seed)[name] for name in (student, teacher))
    check_golden(at_loss(g_s.requires_grad_(), g_t, form), g_s, golden(batch, classes, seed, entry))


@cases
@pytest.mark.parametrize(("entry", "teacher"), [("nst", "g_t"), ("nst_pooled", "g_t2")])
def test_nst_is_the_published_loss(batch, classes, seed, entry, teacher):
    known = maps(batch, seed)
    g_s = known["g_s"].requires_grad_()
    check_golden(nst_loss(g_s, known[teacher]), g_s, golden(batch, classes, seed, entry))


@cases
@pytest.mark.parametrize(("entry", "weights"), [("rkd", ()), ("rkd_distance", (1, 0)), ("rkd_angle", (0, 1))])
def test_rkd_is_the_published_loss(batch, classes, seed, entry, weights):
    f_s, f_t = vectors(batch, seed)
    check_golden(rkd_loss(f_s, f_t, *weights), f_s, golden(batch, classes, seed, entry))


@cases
def test_rkd_of_two_equal_images_is_the_published_loss_with_a_small_gradient(batch, classes, seed):
    f_s, f_t = vectors(batch, seed)
    with torch.no_grad():
        f_s[1] = f_s[0]
    loss = rkd_loss(f_s, f_t)
    loss.backward()
    assert loss.item() == close(golden(batch, classes, seed, "rkd_two_equal_images")["loss"])
    assert 0 < f_s.grad.abs().max() < 1


@cases
@pytest.mark.parametrize(
    ("entry", "kernel"), [("cc", "neighbours"), ("cckd_bilinear", "bilinear"), ("cckd_gaussian", "gaussian")]
)
def test_cc_is_the_published_loss(batch, classes, seed, entry, kernel):
    f_s, f_t = vectors(batch, seed)
    cc = create_distiller("cc", student_widths=[64], teacher_widths=[128], feat_dim=32).double()
    fill(cc.state_dict())
    loss = cc_loss(cc.embed_s(f_s), cc.embed_t(f_t), kernel)
    check_golden(loss, f_s, golden(batch, classes, seed, entry))


@cases
def test_ickd_is_the_published_loss(batch, classes, seed):
    known = maps(batch, seed)
    ickd = create_distiller("ickd", student_widths=[16, 64], teacher_widths=[32, 128]).double()
    fill(ickd.state_dict())
    loss = ickd_loss(ickd.embed_s(known["g_s"].requires_grad_()), known["g_t"])
    check_golden(loss, known["g_s"], golden(batch, classes, seed, "ickd"))


@cases
def test_srd_is_the_published_loss(batch, classes, seed):
    f_s, f_t = vectors(batch, seed)
    srd = create_distiller("srd", student_widths=[64], teacher_widths=[128]).double()
    fill(srd.state_dict())
    check_golden(srd_loss(srd.linear(f_s), f_t), f_s, golden(batch, classes, seed, "srd_feature_e4"))


@cases
@pytest.mark.parametrize(
    ("entry", "call"), [("itrd_correlation_a1.5", itrd_correlation_loss), ("itrd_mutual", itrd_mutual_loss)]
)
def test_itrd_is_the_published_loss(batch, classes, seed, entry, call):
    f_s, f_t = vectors(batch, seed)
    itrd = create_distiller("itrd", student_widths=[64], teacher_widths=[128]).double()
    fill(itrd.state_dict())
    expected = golden(batch, classes, seed, entry)
    loss = call(itrd.embed(f_s), f_t)
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-4)
    check_gradient(f_s.grad, expected["grad"], rel=1e-4)


@lru_cache(maxsize=1)  # a pair is slow to fill
def outputs(key):
    """Return the outputs of a pair of networks, the student's first convolution, and what distillers are told."""
    teacher, student, seed, batch, classes = re.fullmatch(r"(.+)_([^_]+)_seed(\d+)_B(\d+)_C(\d+)", key).groups()
    x = torch.tensor(np.random.default_rng(int(seed)).standard_normal((int(batch), 3, 32, 32)))
    networks = [create_model(name, int(classes)).double() for name in (student, teacher)]
    for network in networks:
        fill(network.state_dict())
    ours, theirs = (network.train(i == 0)(x, is_feat=True, also=["preact"]) for i, network in enumerate(networks))
    shapes = [[list(feature.shape[1:]) for feature in output.features] for output in (ours, theirs)]
    known = {"student_shapes": shapes[0], "teacher_shapes": shapes[1]}
    known |= {"student_widths": [s[0] for s in shapes[0]], "teacher_widths": [s[0] for s in shapes[1]]}
    known |= {"teacher_norms": networks[1].norms_before_relu()}
    return ours, theirs, next(p for p in networks[0].parameters() if p.dim() == 4), known


def check_networks(key, distill, expected, prefix=""):
    """Check a distiller's term and its gradient for the student's first convolution; `prefix` is that of the names."""
    ours, theirs, first, known = outputs(key)
    distiller = create_distiller(distill, **kwargs_for(distiller_dict[distill], known)).double()
    state = {name.removeprefix("regressor."): value for name, value in distiller.state_dict().items()}
    fill({prefix + name: value for name, value in state.items() if name != "warmup"})
    (loss,) = distiller(ours, theirs, None, None, None).values()
    assert loss.item() == close(expected["loss"])
    check_gradient(*torch.autograd.grad(loss, first, retain_graph=True), expected["grad_first_conv"])
    return distiller


@pytest.mark.parametrize("distill", ["hint", "at", "nst", "rkd", "cc", "ickd", "ofd"])
@pytest.mark.parametrize("key", GOLDEN["networks"])
def test_whole_networks_have_the_published_loss(key, distill):
    check_networks(key, distill, GOLDEN["networks"][key][distill])


@pytest.mark.parametrize("key", GOLDEN["networks_mdistiller"])
def test_whole_networks_have_mdistillers_loss(key):
    expected = GOLDEN["networks_mdistiller"][key]
    reviewkd = check_networks(key, "reviewkd", expected["reviewkd"])
    reviewkd.start_epoch(5)
    fifth = expected["reviewkd_epoch5_of_20"]["loss"]
    assert (reviewkd.warmup * expected["reviewkd"]["loss"]).item() == close(fifth)
    if "ofd" in expected:  # of the other pairs the published code cannot make it
        check_networks(key, "ofd", expected["ofd"], "connectors.")


def logits(batch, classes, seed):
    student, teacher = draw(batch, classes, seed).requires_grad_(), draw(batch, classes, seed + 1)
    return student, teacher, torch.tensor(np.random.default_rng(seed + 2).integers(0, classes, batch))


@cases
@pytest.mark.parametrize(
    ("entry", "tau", "weights"),
    [("dist_T1", 1.0, ()), ("dist_T4", 4.0, ()), ("dist_T4_inter", 4.0, (1, 0)), ("dist_T4_intra", 4.0, (0, 1))],
)
def test_dist_is_the_published_loss(batch, classes, seed, entry, tau, weights):
    student, teacher, _ = logits(batch, classes, seed)
    expected = golden(batch, classes, seed, entry)
    loss = dist_loss(student, teacher, tau, *weights)
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    check_gradient(student.grad, expected["grad"], rel=1e-4)


@cases
def test_skd_is_the_published_loss(batch, classes, seed):
    student, teacher, _ = logits(batch, classes, seed)
    check_golden(skd_loss(student, teacher), student, golden(batch, classes, seed, "skd_direction"))


@cases
def test_kd_from_a_swapped_teacher_is_the_published_loss(batch, classes, seed):
    student, teacher, target = logits(batch, classes, seed)
    loss = kd_loss(student, swap_target(teacher, target), 4.0)
    check_golden(loss, student, golden(batch, classes, seed, "swap_kd_T4"))


@cases
@pytest.mark.parametrize("tau", [1, 4])
def test_nkd_is_the_published_loss(batch, classes, seed, tau):
    student, teacher, target = logits(batch, classes, seed)
    loss = nkd_loss(student, teacher, target, tau, 1.5)
    check_golden(loss, student, golden(batch, classes, seed, f"nkd_T{tau}_g1.5"))


@cases
@pytest.mark.parametrize("tau", [2, 4])
def test_wsld_is_the_published_loss(batch, classes, seed, tau):
    student, teacher, target = logits(batch, classes, seed)
    loss = wsld_loss(student, teacher, target, tau)
    check_golden(loss, student, golden(batch, classes, seed, f"wsld_T{tau}"))


@cases
@pytest.mark.parametrize(
    ("entry", "options"),
    [("rld_a1_b8_T4_C1", {}), ("rld_a1_b8_T4_C4", {"tau_confidence": 4.0}),
     ("rld_confidence_T4", {"tau_confidence": 4.0, "alpha": 1.0, "beta": 0.0}),
     ("rld_masked_T4", {"alpha": 0.0, "beta": 1.0}), ("rld_a1_b8_T4_C1_target_last", {})],
)  # fmt: skip
def test_rld_is_the_published_loss(batch, classes, seed, entry, options):
    student, teacher, target = logits(batch, classes, seed)
    if "last" in entry:
        teacher[0, target[0]] = teacher[0].min() - 1
    check_golden(rld_loss(student, teacher, target, 4.0, **options), student, golden(batch, classes, seed, entry))


def drawn(batch, seed, *shape):
    return torch.tensor(np.random.default_rng(seed).standard_normal((batch, *shape)))


@cases
def test_ofds_margin_and_loss_are_the_published_ones(batch, classes, seed):
    weight, bias = 0.5 + 0.2 * drawn(32, seed + 17), drawn(32, seed + 18)
    margin = ofd_margin(weight, bias)
    assert margin.tolist() == close(golden(batch, classes, seed, "ofd_margin")["all"])
    q_s, p_t = drawn(batch, seed + 19, 32, 8, 8).requires_grad_(), drawn(batch, seed + 11, 32, 8, 8)
    check_golden(ofd_loss(q_s, p_t, margin), q_s, golden(batch, classes, seed, "ofd_loss"))


@cases
@pytest.mark.parametrize("entry", ["hcl", "hcl_small"])
def test_hcl_is_the_published_loss(batch, classes, seed, entry):
    known = maps(batch, seed)
    g_s, g_t = (known["h_s"], known["g_t2"]) if entry == "hcl_small" else (
        known["g_s"], positive(seed + 13, batch, 16, 8, 8))  # fmt: skip
    check_golden(hcl_loss(g_s.requires_grad_(), g_t), g_s, golden(batch, classes, seed, entry))


@cases
def test_ofds_connector_gives_the_published_loss(batch, classes, seed):
    margin = ofd_margin(0.5 + 0.2 * drawn(32, seed + 17), drawn(32, seed + 18))
    connector = Connector(16, margin).double()
    fill({f"connectors.0.{name}": value for name, value in connector.state_dict().items()})
    p_s, p_t = drawn(batch, seed + 10, 16, 8, 8).requires_grad_(), drawn(batch, seed + 11, 32, 8, 8)
    check_golden(connector(p_s, p_t), p_s, golden(batch, classes, seed, "ofd_connected"))


@cases
@pytest.mark.parametrize("entry", ["reviewkd", "reviewkd_other_shapes"])
def test_reviewkd_is_the_published_loss(batch, classes, seed, entry):
    known, (f_s, f_t) = maps(batch, seed), vectors(batch, seed)
    g_s, h_s = (known[name].requires_grad_() for name in ("g_s", "h_s"))
    deeper = positive(seed + 16, batch, 24, 8, 8) if "other" in entry else known["g_t2"]
    student, teacher = Output([None, g_s, h_s, f_s], None), Output([f_t], None, [known["g_t"], deeper])
    widths = {"student_widths": [0, 16, 32, 64], "teacher_widths": [0, 32, deeper.shape[1], 128]}
    distiller = create_distiller("reviewkd", **widths).double()
    fill(distiller.abfs.state_dict(prefix="abfs."))
    (loss,) = distiller(student, teacher, None, None, None).values()
    loss.backward()
    expected = golden(batch, classes, seed, entry)
    assert loss.item() == close(expected["loss"])
    for name, leaf in (("g_s", g_s), ("h_s", h_s), ("f_s", f_s)):
        check_gradient(leaf.grad, expected[f"grad_{name}"])
