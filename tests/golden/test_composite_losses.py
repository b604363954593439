"""SimKD with its composite, CAT-KD and SDD equal the published implementations to the digit."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden.reference import cases, check_golden, check_gradient, close, fill
from golden.test_zoo_losses import GOLDEN, golden, maps
from torch import nn

from distiller_zoo import cat_loss, sdd_dkd_loss, sdd_kd_loss, sdd_logits, simkd_loss
from models import Model, create_model
from models.projected import Projected


class Given(Model):
    """A network whose maps are its images."""

    def __init__(self, width):
        super().__init__()
        self.classifier = nn.Linear(width, 1)

    def extract(self, x):
        return [x, x, x.mean((2, 3))]


@cases
@pytest.mark.parametrize(("entry", "teacher"), [("simkd", "g_t"), ("simkd_pooled", "g_t2")])
def test_simkd_is_the_published_loss_of_the_published_composite(batch, classes, seed, entry, teacher, monkeypatch):
    monkeypatch.setattr("models.projected._keep_last_map", lambda net, size: [16, 8, 8])
    g_s, g_t = maps(batch, seed)["g_s"].requires_grad_(), maps(batch, seed)[teacher]
    composite = Projected(Given(16), list(g_t.shape[1:]), 2, 8, nn.Linear(32, classes)).double()
    fill({name.removeprefix("classifier."): tensor for name, tensor in composite.state_dict().items()})
    features, logits = composite(g_s, is_feat=True)
    expected = golden(batch, classes, seed, entry)
    check_golden(simkd_loss(features[-2], g_t), g_s, expected)
    check_gradient(logits, expected["logits"])  # the same numbers of it


@pytest.mark.parametrize("key", GOLDEN["networks"])
def test_simkd_of_whole_networks_is_the_published_loss(key):
    """There the last feature of a wide residual network is before its ReLU, and is the target nevertheless."""
    teacher, student, seed, batch, classes = key.replace("wrn_16_2", "wrn-16-2").split("_")
    x = torch.tensor(np.random.default_rng(int(seed[4:])).standard_normal((int(batch[1:]), 3, 32, 32)))
    student, teacher = (create_model(name.replace("-", "_"), int(classes[1:])).double() for name in (student, teacher))
    for network in (student, teacher):
        fill(network.state_dict())
    g_t = teacher.eval()(x, is_feat=True).features[-2]
    composite = Projected(student, list(g_t.shape[1:]), 2, 32, teacher.classifier).double()
    fill({f"transfer.{name}": tensor for name, tensor in composite.transfer.state_dict().items()})
    loss = simkd_loss(composite(x, is_feat=True).features[-2], g_t)
    loss.backward()
    expected = GOLDEN["networks"][key]["simkd"]
    assert loss.item() == close(expected["loss"])
    check_gradient(next(p for p in composite.net.parameters() if p.dim() == 4).grad, expected["grad_first_conv"])


def classified(batch, classes, seed, teacher="g_t"):
    """Return the student's map, and of both networks the class maps and logits."""
    known, outputs = maps(batch, seed), []
    known["g_s"].requires_grad_()
    for role, name in (("s", "g_s"), ("t", teacher)):
        layer = nn.Linear(known[name].shape[1], classes).double().requires_grad_(False)
        fill({f"classifier_{role}.{key}": tensor for key, tensor in layer.state_dict().items()})
        class_maps = F.conv2d(known[name], layer.weight[:, :, None, None])
        outputs.append((class_maps, layer(known[name].mean((2, 3)))))
    return known["g_s"], *outputs


@cases
@pytest.mark.parametrize(
    ("entry", "teacher", "resolution", "normalise"),
    [("cat_r2", "g_t", 2, False), ("cat_r4", "g_t", 4, False), ("cat_r2_normalised", "g_t", 2, True),
     ("cat_r4_normalised", "g_t", 4, True), ("cat_r2_normalised_pooled", "g_t2", 2, True)],
)  # fmt: skip
def test_cat_is_the_published_loss(batch, classes, seed, entry, teacher, resolution, normalise):
    g_s, (ours, _), (theirs, _) = classified(batch, classes, seed, teacher)
    check_golden(cat_loss(ours, theirs, resolution, normalise), g_s, golden(batch, classes, seed, entry))


@cases
@pytest.mark.parametrize(("suffix", "scales"), [("M12", (1, 2)), ("M124", (1, 2, 4))])
@pytest.mark.parametrize("inner", ["kd", "dkd_a1_b8"])
def test_sdd_is_the_published_loss(batch, classes, seed, inner, suffix, scales):
    g_s, *outputs = classified(batch, classes, seed)
    target = torch.tensor(np.random.default_rng(seed + 2).integers(0, classes, batch))
    logits = [sdd_logits(*output, scales) for output in outputs]
    loss = sdd_kd_loss(*logits, target, 4) if inner == "kd" else sdd_dkd_loss(*logits, target, 4, 1, 8)
    check_golden(loss, g_s, golden(batch, classes, seed, f"sdd_{inner}_T4_{suffix}"))
