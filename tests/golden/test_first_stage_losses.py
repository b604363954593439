"""The losses of RepDistiller's methods with a first stage equal the published implementations' to the digit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.reference import cases, check_golden, check_gradient, close, fill, positive

from distiller_zoo import ab_loss, create_distiller, distiller_dict, fsp_loss, fsp_matrix, ft_loss
from distiller_zoo.ft import Paraphraser, Translator
from distiller_zoo.hint import Regressor
from models import create_model
from options.parse import kwargs_for

GOLDEN = json.loads((Path(__file__).parent / "two_stage.json").read_text())


def drawn(seed, *shape):
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape))


def inputs(batch, classes, seed):
    """Return the golden entries, and the maps of README.md by name."""
    return GOLDEN[f"B{batch}_C{classes}_seed{seed}"], {
        "g_s": positive(seed + 6, batch, 16, 8, 8),
        "g_t": positive(seed + 7, batch, 32, 8, 8),
        "g_t2": positive(seed + 8, batch, 32, 4, 4),
        "p_s": drawn(seed + 10, batch, 16, 8, 8),
        "p_t": drawn(seed + 11, batch, 32, 8, 8),
        "h_s": positive(seed + 12, batch, 32, 4, 4),
        "k_t": positive(seed + 13, batch, 16, 8, 8),
        "q_s": drawn(seed + 19, batch, 32, 8, 8),
    }


def filled(module, prefix):
    """Return a module filled by its names after a prefix, in float64."""
    fill({f"{prefix}.{name}": tensor for name, tensor in module.double().state_dict().items()})
    return module


@cases
def test_ab_is_the_published_loss(batch, classes, seed):
    expected, maps = inputs(batch, classes, seed)
    q_s = maps["q_s"].requires_grad_()
    check_golden(ab_loss(q_s, maps["p_t"]), q_s, expected["ab_loss"])
    q_s.grad = None
    stages = [weight * ab_loss(p_s, maps["p_t"]) for weight, p_s in ((0.25, q_s), (0.5, 2 * q_s), (1, q_s - 1))]
    check_golden(sum(stages), q_s, expected["ab_three_stages"])


@cases
def test_ab_through_a_connector_is_the_published_loss(batch, classes, seed):
    expected, maps = inputs(batch, classes, seed)
    p_s, p_t = maps["p_s"].requires_grad_(), maps["p_t"]
    connector = filled(Regressor(list(p_s.shape[1:]), list(p_t.shape[1:]), rectified=False), "connectors.0")
    check_golden(ab_loss(connector(p_s), p_t), p_s, expected["ab_connected"])


@cases
def test_ft_is_the_published_loss(batch, classes, seed):
    expected, maps = inputs(batch, classes, seed)
    g_s, g_t = maps["g_s"].requires_grad_(), maps["g_t"]
    check_golden(ft_loss(g_s, maps["k_t"]), g_s, expected["ft_factors"])
    g_s.grad = None
    paraphraser, translator = filled(Paraphraser(32, 16), "paraphraser"), filled(Translator(16, 16), "translator")
    check_golden(ft_loss(translator(g_s), paraphraser.encoder(g_t)), g_s, expected["ft"])
    reconstruction = torch.nn.functional.mse_loss(paraphraser(g_t), g_t)
    paraphraser.zero_grad()
    reconstruction.backward()
    assert reconstruction.item() == close(expected["ft_paraphraser"]["loss"])
    own = expected["ft_paraphraser"]["grad_paraphraser.encoder.0.weight"]
    check_gradient(paraphraser.encoder[0].weight.grad, own)


@cases
def test_fsp_is_the_published_loss(batch, classes, seed):
    expected, maps = inputs(batch, classes, seed)
    g_s, h_s = maps["g_s"].requires_grad_(), maps["h_s"].requires_grad_()
    matrix = fsp_matrix(g_s, h_s).detach()
    assert matrix.shape == (batch, 16, 32)
    check_gradient(matrix.mT, expected["fsp_matrix"])  # the published one is transposed
    loss = fsp_loss(g_s, h_s, maps["k_t"], maps["g_t2"])
    loss.backward()
    assert loss.item() == close(expected["fsp"]["loss"])
    check_gradient(g_s.grad, expected["fsp"]["grad_g_s"])
    check_gradient(h_s.grad, expected["fsp"]["grad_h_s"])


@pytest.mark.parametrize(
    ("key", "entry"), [(key, entry) for key, entries in GOLDEN["networks"].items() for entry in entries]
)
def test_whole_networks_have_the_published_loss(key, entry):
    teacher, student, seed, batch, classes = key.replace("wrn_16_2", "wrn-16-2").split("_")
    x = np.random.default_rng(int(seed[4:])).standard_normal((int(batch[1:]), 3, 32, 32))
    networks = [create_model(name.replace("-", "_"), int(classes[1:])).double() for name in (student, teacher)]
    for network in networks:
        fill(network.state_dict())
    ours, theirs = (
        network.train(i == 0)(torch.tensor(x), is_feat=True, also=("preact",)) for i, network in enumerate(networks)
    )
    shapes = [[list(feature.shape[1:]) for feature in output.features] for output in (ours, theirs)]
    known = {"student_shapes": shapes[0], "teacher_shapes": shapes[1]}
    known |= {"student_widths": [s[0] for s in shapes[0]], "teacher_widths": [s[0] for s in shapes[1]]}
    name, _, is_first = entry.partition("_")
    distiller = filled_distiller(name, kwargs_for(distiller_dict[name], known))
    losses = distiller.first_loss(ours, theirs) if is_first else distiller(ours, theirs, None, None, None)
    (loss,) = losses.values()
    loss.backward()
    expected = GOLDEN["networks"][key][entry]
    assert loss.item() == close(expected["loss"])
    first = next(p for p in networks[0].parameters() if p.dim() == 4)
    check_gradient(first.grad, expected["grad_first_conv"])


def filled_distiller(name, known):
    distiller = create_distiller(name, **known).double()
    fill(distiller.state_dict())
    return distiller
