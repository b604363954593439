"""SimKD's composite, and the class maps of CAT-KD and SDD."""

import pytest
import torch
import torch.nn.functional as F
from common import Tiny, error_of, fixed_batch, make
from golden.reference import close, draw, positive
from torch import nn

from distiller_zoo import create_distiller, distiller_dict, kd_loss, sdd_kd_loss, sdd_logits
from distiller_zoo.cat_kd import PAIRS
from helper.checkpoint import expected_weights
from helper.loops import train_step
from helper.metrics import Metrics
from helper.teacher_cache import OnlineTeacher
from helper.trainer import make_optimizer
from models import Output, create_model
from models.projected import Projected
from options.parse import parse_student, resolve_pair


def composite(student, teacher_shape=(24, 4, 4), factor=2):
    return Projected(create_model(student, 10), list(teacher_shape), factor, 32, nn.Linear(teacher_shape[0], 10))


@pytest.mark.parametrize(
    ("student", "left_out"),
    [("resnet8", {"fc"}), ("wrn_16_1", {"fc", "bn1"}), ("vgg8", {"classifier"}),
     ("MobileNetV2", {"classifier", "conv2"}), ("ShuffleV2", {"linear", "conv2", "bn2"})],
)  # fmt: skip
def test_layers_behind_the_last_map_are_left_out_and_all_others_learn(student, left_out):
    model = composite(student)
    own, kept = create_model(student, 10).state_dict(), model.net.state_dict()
    assert {name.split(".")[0] for name in own.keys() - kept.keys()} == left_out
    features, logits = model(torch.randn(3, 3, 32, 32), is_feat=True)
    assert torch.equal(logits, model.classifier(features[-2].mean((2, 3))))
    logits.square().sum().backward()
    frozen = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert frozen == {"classifier.weight", "classifier.bias"}


def test_the_projector_has_the_published_number_of_parameters():
    model = composite("resnet8x4", (256, 8, 8))
    assert sum(parameter.numel() for parameter in model.transfer.parameters()) == 214_016


@pytest.mark.parametrize(("side", "projected"), [(8, 8), (4, 4), (3, 3), (16, 8)])
def test_the_larger_map_is_averaged(side, projected):
    model = composite("resnet8", (6, side, side))
    assert model(torch.rand(2, 3, 32, 32), is_feat=True).features[-2].shape == (2, 6, projected, projected)


def test_a_composite_is_made_again_from_its_name_for_other_classes_too():
    model = composite("resnet8", (24, 4, 4), 3)
    name = model.known_as("resnet8")
    assert name == "simkd:resnet8:24x4x4:3:32"
    again, x = create_model(name, 10), torch.rand(2, 3, 32, 32)
    again.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), again.eval()(x))
    expected = expected_weights(name)
    assert expected.head == "classifier" and expected.weights.keys() == model.state_dict().keys()


@torch.no_grad()
def test_a_composite_gives_maps_before_the_relu_of_its_projector():
    model, x = composite("resnet8").eval(), torch.rand(2, 3, 32, 32)
    output = model(x, is_feat=True, also=("preact", "class_maps"))
    assert torch.equal(output.preact[-1].relu(), output.features[-2])
    torch.testing.assert_close(output.class_maps.mean((2, 3)) + model.classifier.bias, output.logits)
    assert model.bn_before_relu[-1] == "transfer.7" and model.get_submodule(model.bn_before_relu[0])


def test_simkd_trains_the_student_and_its_projector_and_not_the_teachers_layer():
    torch.manual_seed(0)
    student, teacher = Tiny(), Tiny(width=12).eval().requires_grad_(False)
    module = make(distill="simkd", student=student, expert=teacher)
    before = {name: each.clone() for name, each in module.student.state_dict().items()}
    optimizer = make_optimizer(module, 0.1, 0.9, 0.0)
    losses = [
        train_step(module, OnlineTeacher(teacher), fixed_batch(), optimizer, Metrics()).loss.item() for _ in range(5)
    ]
    assert losses[-1] < losses[0]
    same = {name for name, each in module.student.state_dict().items() if torch.equal(each, before[name])}
    assert same == {"classifier.weight", "classifier.bias"}
    assert torch.equal(module.student.classifier.weight, teacher.classifier.weight)
    assert module.student.classifier is not teacher.classifier
    assert set(student.state_dict()) == set(Tiny().state_dict())  # a copy was changed


@torch.no_grad()
def test_simkds_target_is_the_map_that_the_teachers_last_layer_averages():
    """The last feature of a wide residual network is not, and its layer would not classify its projection."""
    teacher = create_model("wrn_16_1", 10).eval()
    output = teacher(torch.rand(2, 3, 32, 32), is_feat=True, also=distiller_dict["simkd"].teacher_also)
    torch.testing.assert_close(teacher.classifier(output.last_map.mean((2, 3))), output.logits)
    assert not torch.allclose(output.last_map, output.features[-2])
    prediction = torch.rand_like(output.last_map)
    loss = create_distiller("simkd")(Output([prediction] * 2, None), output, None, None, None)["simkd"]
    assert loss == F.mse_loss(prediction, output.last_map)


class Flat(Tiny):
    """A network whose last layer takes no average."""

    def trace(self, x, preact=None):
        features, _ = super().trace(x, preact)
        return features, None


@pytest.mark.parametrize("distill", ["simkd", "cat_kd", "sdd"])
def test_a_teacher_without_class_maps_is_refused(distill):
    says = error_of(make, distill=distill, expert=Flat())
    assert says == (
        "the last layer of the network Flat takes no average of a map, which this distiller needs: choose another"
        " network or distiller"
    )


class Pooled(Tiny):
    """A network that returns its pooled vector only."""

    def extract(self, x):
        return super().extract(x)[-1:]


def test_simkd_refuses_a_student_without_maps():
    assert "the network Pooled has no maps of a stem and one stage or more" in error_of(
        make, distill="simkd", student=Pooled()
    )


def test_the_logits_of_a_region_are_those_of_the_last_layer_on_its_average():
    g, layer = positive(0, 3, 6, 8, 8), nn.Linear(6, 10).double()
    class_maps = F.conv2d(g, layer.weight[:, :, None, None])
    found = sdd_logits(class_maps, layer(g.mean((2, 3))), (1, 2, 4))
    places = [(scale, i, j) for scale in (1, 2, 4) for i in range(scale) for j in range(scale)]
    assert len(found) == len(places) == 21
    for region, (scale, i, j) in zip(found, places, strict=True):
        size = 8 // scale
        cell = g[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size]
        torch.testing.assert_close(region, layer(cell.mean((2, 3))))


def test_on_a_map_smaller_than_a_grid_the_cells_repeat():
    found = sdd_logits(positive(0, 3, 10, 2, 2), draw(3, 10, 1), (1, 2, 4))
    two, four = found[1:5].view(2, 2, 3, 10), found[5:].view(4, 4, 3, 10)
    torch.testing.assert_close(four, two.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_a_region_counts_twice_if_the_teacher_is_right_about_it_or_the_whole_and_not_about_both():
    target = torch.tensor([3, 3])
    student, teacher = draw(6, 10, 0).view(3, 2, 10), draw(6, 10, 1).view(3, 2, 10)
    is_right = [[True, False], [True, True], [False, False]]  # the whole image first
    for region, row in enumerate(is_right):
        for image, right in enumerate(row):
            teacher[region, image, 3] = 20.0 if right else -20.0
    each = [[kd_loss(s[i : i + 1], t[i : i + 1], 4.0) for i in (0, 1)] for s, t in zip(student, teacher, strict=True)]
    expected = (each[0][0] + each[0][1] + each[1][0] + 2 * each[1][1] + 2 * each[2][0] + each[2][1]) / 6
    assert sdd_kd_loss(student, teacher, target, 4.0).item() == close(expected.item())


@pytest.mark.parametrize(
    ("line", "teacher", "expected"),
    [
        ("cat_kd --model_s resnet8x4", "resnet32x4", {"beta": 15, "cat_resolution": 2, "cat_normalise": "no"}),
        ("cat_kd --model_s ShuffleV1", "wrn_40_2", {"beta": 80, "cat_resolution": 4, "cat_normalise": "yes"}),
        ("cat_kd --model_s resnet8", "resnet14", {"beta": 1, "cat_resolution": 2, "cat_normalise": "no"}),
        ("cat_kd --model_s ShuffleV1 -b 3 --cat_resolution 2 --cat_normalise no", "wrn_40_2",
         {"beta": 3, "cat_resolution": 2, "cat_normalise": "no"}),
        ("sdd --model_s resnet8x4", "resnet32x4", {"gamma": 0.1, "beta": 0.9, "sdd_scales": "1,2"}),
        ("sdd --model_s ShuffleV1", "resnet32x4", {"sdd_scales": "1,2,4", "sdd_warmup": 20}),
        ("sdd --model_s resnet8x4 --sdd_loss dkd", "resnet32x4", {"gamma": 1, "beta": 1, "sdd_beta": 8}),
        ("sdd --sdd_loss dkd -r 0.5 --sdd_beta 3 --sdd_scales 1,2,4", "resnet14",
         {"gamma": 0.5, "beta": 1, "sdd_beta": 3, "sdd_scales": "1,2,4"}),
        ("simkd", "resnet14", {"gamma": 0, "alpha": 0, "beta": 1, "simkd_factor": 2}),
        ("simkd --temperature dtkd", "resnet14", {"gamma": 0, "alpha": 0.9, "beta": 1}),
        ("cat_kd --temperature random", "resnet14", {"gamma": 1, "alpha": 0.9, "beta": 1}),
        ("sdd --temperature dtkd", "resnet14", {"gamma": 0.1, "alpha": 0, "beta": 0.9}),
    ],
)  # fmt: skip
def test_defaults_depend_on_the_pair(line, teacher, expected):
    options = resolve_pair(parse_student(["--distill", *line.split()]), teacher)
    found = {key: getattr(options, key, None) for key in expected} | dict(options.method)
    assert {key: found[key] for key in expected} == expected


def test_every_pair_of_cat_kd_is_one_of_networks_that_are_here():
    for pair in PAIRS:
        is_imagenet = pair[1] in ("ResNet18", "MobileNetV2_Imagenet")
        parse_student(["--model_t", pair[0], "--model_s", pair[1], *["--dataset", "imagenet"] * is_imagenet])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("simkd --temperature ctkd-global -a 0", "--alpha 0 leaves --temperature ctkd-global nothing to act on"),
        ("simkd -b 0", "--beta 0 leaves nothing of --distill simkd: leave -b out for 1, its default, or"),
        ("cat_kd -b 0", "--beta 0 leaves nothing of --distill cat_kd: leave -b out, or give --distill kd"),
        ("sdd -b 0", "--beta 0 leaves nothing of --distill sdd: leave -b out, or give --distill kd"),
        ("sdd --mixup 0.2", "--distill sdd needs one class for each image: leave --mixup out"),
        ("sdd --epochs 1 --sdd_warmup 101", "--sdd_warmup 101 is more than a hundred times --epochs 1"),
        ("sdd --sdd_scales 1,3", "unknown --sdd_scales '1,3'; the known ones are: 1,2; 1,2,4"),
        ("simkd --teacher_table", "--distill simkd needs the teacher's maps, which no table holds"),
    ],
)
def test_what_makes_no_sense_is_refused(line, says):
    assert says in error_of(parse_student, ["--distill", *line.split()])


def test_the_inner_dkd_needs_three_classes():
    assert "needs three classes or more, not 2" in error_of(distiller_dict["sdd"], num_classes=2, sdd_loss="dkd")
