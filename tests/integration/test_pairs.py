"""Every distiller with every temperature on networks of the zoo: steps, gradients and shapes."""

import functools
import itertools

import pytest
import torch
from common import ALSO, FAMILIES, ONE_OF_EACH_FAMILY, OWN_LOSS, check_gradients, fixed_batch, make, product_of

from distiller_zoo import create_distiller, distiller_dict
from helper.trainer import make_optimizer
from models import create_model, model_dict
from options.parse import kwargs_for
from temperature import temperature_dict

PAIRS = [  # the same family, different families, more stages and fewer
    ("resnet14", "resnet8"), ("wrn_16_2", "wrn_16_1"), ("vgg11", "vgg8"), ("ResNet50", "MobileNetV2"),
    ("resnet8x4", "ShuffleV1"), ("vgg11", "ShuffleV2"), ("resnet14", "vgg8"),
]  # fmt: skip


@functools.lru_cache
def network(name, classes):
    torch.manual_seed(0)
    return create_model(name, classes)


@functools.lru_cache
def said(name, classes):
    expert = network(name, classes).eval().requires_grad_(False)
    with torch.no_grad():
        return expert, expert(fixed_batch(classes, 4).images, is_feat=True, also=ALSO)


def covering(temperatures, distillers, pairs):
    """Return cases with every two values of two factors, as few as possible with an expensive pair of networks."""
    cases = []
    for shift, distill in enumerate(distillers):
        turned = temperatures[shift % len(temperatures) :] + temperatures[: shift % len(temperatures)]
        cases += [(turned[i], distill, pairs[i] if i < len(pairs) else pairs[0]) for i in range(len(temperatures))]
    return cases


def test_the_cases_have_every_two_values():
    cases = covering(list(temperature_dict), list(OWN_LOSS), PAIRS)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        values = [{case[place] for case in cases} for place in (one, other)]
        assert {(case[one], case[other]) for case in cases} == set(itertools.product(*values))
    assert [len({case[place] for case in cases}) for place in range(3)] == [
        len(temperature_dict), len(OWN_LOSS), len(PAIRS)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("temperature", "distill", "pair"),
    product_of(temperature_dict, OWN_LOSS, PAIRS, few=covering),
    ids=lambda value: "→".join(value) if isinstance(value, tuple) else None,
)
def test_every_temperature_with_every_distiller_fits_every_pair(temperature, distill, pair):
    classes = 10 if PAIRS.index(pair) % 2 else 100
    expert, output = said(pair[0], classes)
    student = network(pair[1], classes).train().requires_grad_(True)
    module = make(temperature, distill, student, expert, classes)
    module.zero_grad()
    module.start_epoch(3)
    step = module(fixed_batch(classes, 4), output)
    step.loss.backward()
    assert step.loss.isfinite()
    check_gradients(module)
    assert all(p.grad is None for p in expert.parameters())


@pytest.mark.parametrize(("teacher", "student"), [("resnet14", "resnet8"), ("vgg11", "ShuffleV2")])
@pytest.mark.parametrize("distill", OWN_LOSS)
def test_real_pairs_learn_under_every_distiller(distill, teacher, student):
    expert, output = said(teacher, 10)
    before = {key: value.clone() for key, value in expert.state_dict().items()}
    torch.manual_seed(1)
    module, batch = make("fixed", distill, create_model(student, 10), expert), fixed_batch(size=4)
    optimizer = make_optimizer(module, 1e-5 if distill in ("sp", "rkd") else 1e-3, 0.0, 0.0)
    losses = []
    for _ in range(4):
        torch.manual_seed(2)
        step = module(batch, output)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        losses.append(step.loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[key]) for key, value in expert.state_dict().items())


@functools.lru_cache
def shapes(name):
    """Return a network's outputs for four images, and the network, all as meta tensors."""
    with torch.device("meta"):
        model = create_model(name, 10).eval()
        return model(torch.empty(4, 3, 32, 32), is_feat=True, also=ALSO), model


@pytest.mark.parametrize("student", ["resnet8", "vgg8", "ShuffleV2", "MobileNetV2"])
@pytest.mark.parametrize("teacher", FAMILIES)
def test_every_teacher_can_be_learned_from_by_every_head(teacher, student):
    """Only shapes are checked."""
    (ours, _), (theirs, network) = shapes(student), shapes(teacher)
    norms = network.norms_before_relu()
    known = {"teacher_classifier": network.classifier, "teacher_norms": norms}
    for role, output in (("student", ours), ("teacher", theirs)):
        known[f"{role}_shapes"] = [list(feature.shape[1:]) for feature in output.features]
        known[f"{role}_widths"] = [feature.shape[1] for feature in output.features]
    known |= {"nce_k": 5, "epochs": 1, "train_target": torch.arange(20) % 10}
    patches = {"dpk_patch": 3, "dpk_stages": 0}
    simple = [(name, {}) for name in ("vid", "srrl", "crd", "dpk", "at", "rkd", "nst", "cc", "ickd", "srd", "ft")]
    simple += [(name, {}) for name in ("itrd", "reviewkd", "ofd") if norms or name != "ofd"]
    for name, own in (*simple, ("dpk", patches), *(("hint", {"hint_layer": layer}) for layer in range(4))):
        with torch.device("meta"):
            head = create_distiller(name, **kwargs_for(distiller_dict[name], known | own)).to("meta")
            losses = head(ours, theirs, torch.zeros(4, dtype=torch.long), None, torch.arange(4))
            assert all(loss.shape == () for loss in losses.values())


def test_a_family_has_a_network_of_each_shape():
    """So other networks add nothing to test_every_teacher_can_be_learned_from_by_every_head."""
    known = {tuple(feature.shape for feature in shapes(name)[0].features) for name in ONE_OF_EACH_FAMILY}
    assert len(known) == len(ONE_OF_EACH_FAMILY)
    others = {tuple(feature.shape for feature in shapes(name)[0].features) for name in model_dict}
    assert others == known
