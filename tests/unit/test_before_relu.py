"""Distillers of maps before the ReLU: OFD and ReviewKD."""

import copy

import pytest
import torch
from common import ALSO, Normed, Tiny, error_of, fixed_batch, make

from distiller_zoo import create_distiller, distiller_dict, hcl_loss, ofd_loss, ofd_margin
from helper.teacher import fold_batch_norm
from helper.teacher_cache import OnlineTeacher
from models import Model, Output, create_model

WIDTHS = {"student_widths": [2, 3, 4, 5], "teacher_widths": [2, 6, 7, 8]}
NORMS = [(torch.rand(width) + 0.1, torch.randn(width)) for width in (6, 7)]


def outputs(batch=3, sizes=(8, 4), dtype=torch.float32, fill=None):
    """Return the outputs of a student, which requires gradients, and of a teacher."""
    result = []
    for key, widths in WIDTHS.items():
        shapes = [(batch, width, size, size) for width, size in zip(widths[1:3], sizes, strict=True)]
        shapes = [*shapes, (batch, widths[-1])]
        first, second = (
            [torch.randn(s).to(dtype) if fill is None else torch.full(s, fill, dtype=dtype) for s in shapes]
            for _ in range(2)
        )
        leaves = [x.requires_grad_(key.startswith("student")) for x in (*first, *second)]
        result.append(Output([None, *leaves[:3]], None, leaves[3:5]))
    return result


def created(name, **options):
    torch.manual_seed(0)
    return create_distiller(name, **WIDTHS, **({"teacher_norms": NORMS} if name == "ofd" else {}), **options)


def test_who_asks_for_more_needs_maps():
    """So no table of the teacher's outputs serves."""
    asking = {name: cls for name, cls in distiller_dict.items() if cls.also or cls.teacher_also}
    assert {"ofd", "reviewkd"} <= asking.keys()
    assert all(cls.needs == "maps" and {*cls.also, *cls.teacher_also} <= {*ALSO} for cls in asking.values())


@pytest.mark.parametrize("name", ["ofd", "reviewkd"])
@pytest.mark.parametrize("case", ["one", "zeros", "equal", "bf16"])
def test_extreme_maps_have_finite_losses_and_gradients(name, case):
    sizes = (1, 1) if case == "one" else (8, 4)  # of one value per channel
    fill = {"zeros": 0.0, "equal": 2.0}.get(case)
    dtype = torch.bfloat16 if case == "bf16" else torch.float32
    student, teacher = outputs(1 if case == "one" else 3, sizes, dtype, fill)
    (loss,) = created(name)(student, teacher, None, None, None).values()
    loss.backward()
    leaves = [x for x in (*student.features[1:], *student.preact) if x.grad is not None]
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert len(leaves) == {"ofd": 2, "reviewkd": 3}[name] and all(x.grad.isfinite().all() for x in leaves)


def test_ofd_weighs_each_stage_twice_as_much_as_the_one_before():
    student, teacher = outputs()
    ofd = created("ofd")
    (loss,) = ofd(student, teacher, None, None, None).values()
    margins = [ofd_margin(*norm) for norm in NORMS]
    made = [torch.nn.Sequential(*connector)(p) for connector, p in zip(ofd.connectors, student.preact, strict=True)]
    first, last = (ofd_loss(*three) for three in zip(made, teacher.preact, margins, strict=True))
    assert loss.item() == pytest.approx((first / 2 + last).item(), rel=1e-5)


def test_ofds_margins_are_those_before_batch_norm_is_folded():
    torch.manual_seed(0)
    teacher = create_model("resnet8", 10).eval()
    for norm in teacher.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.weight.data.normal_()
            norm.bias.data.normal_()
    folded = fold_batch_norm(copy.deepcopy(teacher))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    ours, theirs = (make(distill="ofd", expert=expert).distiller for expert in (folded, teacher))
    assert torch.equal(ours.connectors[0].margin, theirs.connectors[0].margin)
    assert torch.equal(ours.connectors[0].margin, ofd_margin(teacher.layer3[0].bn2.weight, teacher.layer3[0].bn2.bias))


def test_a_teacher_without_batch_norm_before_its_relu_is_refused_by_ofd():
    for expert in (Tiny(width=12), create_model("ShuffleV1", 10)):
        assert "--distill ofd needs a batch norm before the ReLU" in error_of(make, distill="ofd", expert=expert)


class Own(Model):
    """A network that defines only `extract`."""

    def __init__(self):
        super().__init__()
        self.net, self.classifier = Normed(), torch.nn.Linear(16, 10)

    def extract(self, x):
        return self.net.extract(x)


def test_a_network_without_maps_before_its_relu_can_only_be_reviewkds_student():
    says = "the network Own gives no maps before the ReLU"
    for distill, role in (("ofd", "student"), ("ofd", "expert"), ("reviewkd", "expert")):
        assert says in error_of(make, distill=distill, **{role: Own()})
    expert, batch = Normed(width=12).eval(), fixed_batch()
    task = make(distill="reviewkd", student=Own(), expert=expert)
    assert task(batch, OnlineTeacher(expert)(batch, task.teacher_also)).loss.isfinite()


def test_reviewkd_warms_up_linearly():
    student, teacher = outputs()
    reviewkd, losses = created("reviewkd"), {}
    for epoch in (1, 5, 20, 30):
        reviewkd.start_epoch(epoch)
        (losses[epoch],) = (loss.item() for loss in reviewkd(student, teacher, None, None, None).values())
    assert losses == pytest.approx({1: losses[20] / 20, 5: losses[20] / 4, 20: losses[20], 30: losses[20]})


def test_reviewkd_takes_the_students_maps_before_the_relu_where_asked():
    student, teacher = outputs()
    reviewkd = created("reviewkd", reviewkd_preact=True)
    assert reviewkd.also == ("preact",)
    (loss,) = reviewkd(student, teacher, None, None, None).values()
    loss.backward()
    assert [x.grad is None for x in (*student.features[1:], *student.preact)] == [True, True, False, False, False]


def test_reviewkds_fusion_by_hand():
    """A level is blended with the one below, position by position, and predicted by a 3x3 convolution."""
    student, teacher = outputs(sizes=(8, 2))
    reviewkd = created("reviewkd")
    (loss,) = reviewkd(student, teacher, None, None, None).values()
    theirs, fused, expected = [teacher.features[-1][:, :, None, None], *teacher.preact[::-1]], None, 0
    for abf, g_s, g_t in zip(reviewkd.abfs, student.features[:0:-1], theirs, strict=True):
        own = abf.conv1(g_s if g_s.ndim == 4 else g_s[:, :, None, None])
        if fused is not None:
            factor = own.shape[2] // fused.shape[2]
            below = fused.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
            shares = abf.att_conv(torch.cat([own, below], 1))
            own = own * shares[:, 0, None] + below * shares[:, 1, None]
        fused = own
        expected += hcl_loss(abf.conv2(fused), g_t).item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["ofd", "reviewkd"])
@pytest.mark.parametrize("stages", [(1, 3), (3, 1), (2, 4)])
def test_networks_with_other_numbers_of_stages_are_paired(name, stages):
    ours, theirs = (
        Output(
            [None, *(torch.rand(2, 3, 16 >> i, 16 >> i) for i in range(n)), torch.rand(2, 3)],
            None,
            [torch.randn(2, 3, 16 >> i, 16 >> i) for i in range(n)],
        )
        for n in stages
    )
    known = {f"{role}_widths": [3] * (n + 2) for role, n in zip(("student", "teacher"), stages, strict=True)}
    if name == "ofd":
        known["teacher_norms"] = [(torch.ones(3), torch.zeros(3))] * stages[1]
    distiller = create_distiller(name, **known)
    (loss,) = distiller(ours, theirs, None, None, None).values()
    assert loss.isfinite() and loss > 0
    assert len(distiller.connectors if name == "ofd" else distiller.abfs) == stages[0] + (name == "reviewkd")
