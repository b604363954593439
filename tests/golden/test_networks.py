"""The networks equal the published ones to the digit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.reference import fill

from models import create_model, model_dict

GOLDEN, ZOO = (json.loads((Path(__file__).parent / name).read_text()) for name in ("models.json", "zoo.json"))


@pytest.fixture(scope="module", params=model_dict)
def network(request):
    """Return a name, and the filled network of 100 classes in eval mode."""
    model = create_model(request.param, 100).eval()
    fill(model.state_dict())
    return request.param, model


def test_registry_is_complete():
    assert set(model_dict) == set(GOLDEN)


def test_state_dict_is_the_published_one(network):
    name, model = network
    golden = GOLDEN[name]
    assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == golden["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == golden["params"]


@torch.no_grad()
def test_outputs_are_the_published_ones(network):
    name, model = network
    images = torch.as_tensor(np.random.default_rng(2023).standard_normal((2, 3, 32, 32)), dtype=torch.float32)
    golden = GOLDEN[name]
    output = model(images, is_feat=True, also=("preact",))
    features, logits = output
    assert [list(f.shape) for f in features] == golden["features"]
    assert logits.shape == (2, 100)
    if "logits" in golden:  # atol: the golden numbers are rounded to 6 and 7 decimals
        means = [f.mean().item() for f in features]
        np.testing.assert_allclose(means, golden["feature_mean"], rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(logits[:, :10], golden["logits"], rtol=1e-3, atol=1e-6)
    if name in ZOO["preact"]:
        golden = ZOO["preact"][name]
        for key, kind in (("mean", torch.Tensor.mean), ("abs_mean", lambda x: x.abs().mean())):
            np.testing.assert_allclose([kind(x).item() for x in output.preact], golden[key], rtol=1e-3, atol=1e-6)
        same = [torch.equal(x.relu(), feature) for x, feature in zip(output.preact, features[1:-1], strict=True)]
        assert same == golden["relu_is_feature"]
        assert list(model.bn_before_relu) == golden["bn_before_relu"]
