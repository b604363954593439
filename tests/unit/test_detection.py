"""Distilling detectors: a step, its gradients, the command line, and what is not supported."""

import pytest
import torch
from common import error_of

import train_detector
from dataset.coco import create_detection_data
from distiller_zoo.detection import PyramidDPK, detector_distillers, standardised_within, without_padding
from distiller_zoo.dpk import standardised
from helper.detection import DetectorTask, DetectorTeacher, rate_at, seed_step
from helper.loops import train_step
from helper.metrics import Metrics
from models import Output
from models.detection import create_detector
from options.parse_detector import parse_detector, resolve_pair
from temperature import create_temperature, temperature_dict

SHAPES = "--dataset shapes --model_s faster_rcnn_tiny --path-t none.pth --batch_size 2 --eval_every 4 --rl_rollout 2 "


def options_of(line=""):
    return resolve_pair(parse_detector((SHAPES + line).split()), "faster_rcnn_tiny_wide")


@pytest.fixture(scope="module")
def data():
    return create_detection_data("shapes", batch_size=2, seed=1, iterations=120, period=4, device="cpu", num_workers=0)


def batches(data, count=1, number=1):
    return [batch for batch, _ in zip(data.train.epoch(number), range(count), strict=False)]


def task_of(data, line="", teacher="faster_rcnn_tiny_wide", student=None):
    """Return a task, in training mode, and its teacher."""
    torch.manual_seed(0)
    options = options_of(line)
    expert = create_detector(teacher, 3).eval().requires_grad_(False)
    student = student or train_detector.create_student(options, 3)
    task = train_detector.distillation(options, student, expert, data).train()
    task.start_epoch(1)
    return task, DetectorTeacher(expert)


def step_of(task, teacher, batch):
    batch = task.before_step(batch)
    with torch.no_grad():
        answers = teacher(batch)
    return task(batch, answers)


# ---------------------------------------------------------------- a step


@pytest.mark.parametrize("name", ["faster_rcnn_tiny", "retinanet_tiny"])
def test_a_step_alone_has_the_losses_of_the_library(name, data):
    student = create_detector(name, 3).train()
    task, (batch,) = DetectorTask(student, seed=5), batches(data)
    step = task(task.before_step(batch), None)
    seed_step(5, batch.iteration)
    targets = [{"boxes": boxes, "labels": labels} for boxes, labels in zip(batch.boxes, batch.labels, strict=True)]
    theirs = student(batch.images, targets)
    assert sorted(loss.item() for loss in step.losses.values()) == sorted(loss.item() for loss in theirs.values())
    torch.testing.assert_close(step.loss, sum(theirs.values()))
    assert step.tau is None and (step.logits is None or len(step.target) == len(step.logits))


def test_a_step_is_the_same_whenever_it_is_made(data):
    """Its random numbers depend on seed, iteration and process only."""
    losses = []
    for disturb in (0, 7):
        task, teacher = task_of(data)
        torch.rand(disturb)
        losses.append(step_of(task, teacher, batches(data)[0]).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("temperature", temperature_dict)
def test_gradients_reach_the_student_and_a_learned_temperature_and_not_the_teacher(temperature, data):
    task, teacher = task_of(data, f"--temperature {temperature} --kd_warmup_iters 0")
    step = step_of(task, teacher, batches(data)[0])
    step.loss.backward()
    assert step.losses["kd"] > 0 and step.loss.isfinite()
    student = task.student
    for layer in (
        student.backbone.body["0"][0],
        student.rpn.head.cls_logits,
        student.roi_heads.box_predictor.cls_score,
    ):
        assert layer.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    if temperature.startswith("ctkd"):
        assert any(each.grad is not None and each.grad.abs().sum() > 0 for each in task.temperature.parameters())


@pytest.mark.parametrize("distill", detector_distillers)
def test_every_distiller_learns_from_proposals_or_maps(distill, data):
    task, teacher = task_of(data, f"--distill {distill} --kd_warmup_iters 0")
    step = step_of(task, teacher, batches(data)[0])
    step.loss.backward()
    more = set(step.losses) - {"objectness", "rpn_box", "class", "box"}
    assert more and step.loss.isfinite()
    assert all(each.grad.abs().sum() > 0 for each in task.distiller.parameters())
    assert task.student.backbone.body["0"][0].weight.grad.isfinite().all()


def test_a_teacher_that_is_the_student_teaches_nothing_new(data):
    task, teacher = task_of(data)
    teacher.model = task.student
    kd = step_of(task, teacher, batches(data)[0]).losses["kd"].item()
    assert kd == pytest.approx(0, abs=1e-9)


def test_the_gradient_of_a_learned_tau_is_reversed(data):
    """Against the change of the KD term when tau grows a little."""
    task, teacher = task_of(data, "--temperature ctkd-global --kd_warmup_iters 0 --lambda_epochs 0.01")
    prediction, losses = task.temperature.prediction, []
    with torch.no_grad():  # an untrained detector's scores are so close that tau hardly matters
        for network in (task.student, teacher.model):
            network.classifier.weight.mul_(50)
    batch = batches(data)[0]
    for shift in (-1e-2, 1e-2, 0.0):
        with torch.no_grad():
            prediction.fill_(1 + shift)
        step = step_of(task, teacher, batch)
        losses.append(step.losses["kd"])
    step.loss.backward()
    slope = (losses[1] - losses[0]).item() / 2e-2
    assert prediction.grad.item() == pytest.approx(-slope, rel=0.02)


def test_the_teacher_sees_the_proposals_of_the_student(data, monkeypatch):
    task, teacher = task_of(data)
    seen, real = [], teacher.model.on_proposals
    monkeypatch.setattr(teacher.model, "on_proposals", lambda *given: seen.append(given[1]) or real(*given))
    step = step_of(task, teacher, batches(data)[0])
    assert sum(map(len, seen[0])) == len(step.logits) and not seen[0][0].requires_grad


def test_images_without_boxes_and_a_single_image(data):
    task, teacher = task_of(data)
    (batch,) = batches(data)
    batch.boxes[0], batch.labels[0] = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert step_of(task, teacher, batch).loss.isfinite()
    assert step_of(task, teacher, batch.part(0, 1)).loss.isfinite()


def test_bf16_computes_losses_in_float32(data):
    task, teacher = task_of(data, "--precision bf16")
    teacher.precision = "bf16"
    step = step_of(task, teacher, batches(data)[0])
    assert step.loss.dtype == step.logits.dtype == torch.float32
    step.loss.backward()
    assert all(each.grad.isfinite().all() for each in task.student.parameters())


# ---------------------------------------------------------------- RLKD


def test_images_that_repeat_add_to_their_entropy():
    policy = create_temperature("random", train_target=torch.zeros(4), epochs=10, aug_epoch=0, rl_warmup=1)
    policy.start_epoch(1)
    logits = torch.zeros(4, 5)
    policy(logits, logits, None, torch.tensor([1, 1, 1, 2]))
    assert (policy.entropy / torch.tensor(5.0).log()).tolist() == pytest.approx([0, 3, 1, 0])


def test_the_probe_of_rlkd_is_left_out_of_its_step_and_leaves_the_student_alone(data):
    task, teacher = task_of(data, "--temperature rlkd --rl_warmup 1 --rl_epoch 1 --batch_size 4")
    before = {name: buffer.clone() for name, buffer in task.student.named_buffers()}
    four = create_detection_data("shapes", batch_size=4, seed=1, iterations=8, period=4, device="cpu", num_workers=0)
    batch = next(iter(four.train.epoch(1)))
    rest = task.before_step(batch)
    assert len(rest) == 2 and len(task.probe["images"]) == 2
    assert len(task.probe["proposals"]) == len(task.probe["image"]) == len(task.probe["target"])
    torch.testing.assert_close(dict(task.student.named_buffers()), before)
    first, second = task._probe_loss(), task._probe_loss()
    assert torch.equal(first, second)
    state = task.get_extra_state()
    assert task.fits_extra_state(state)
    assert not task.fits_extra_state({"probe": state["probe"] | {"target": state["probe"]["target"] + 9}})


# ---------------------------------------------------------------- maps with padding


def test_padding_counts_neither_in_standardisation_nor_in_the_error():
    maps = torch.randn(2, 3, 4, 6)
    extent = torch.tensor([[1.0, 1.0], [0.5, 0.5]])
    covered = without_padding(maps, extent)
    assert covered.sum((1, 2, 3)).tolist() == [24, 6]
    torch.testing.assert_close(standardised_within(maps, torch.ones(2, 1, 4, 6)), standardised(maps))
    other = torch.where(covered.bool(), maps, 100.0)
    torch.testing.assert_close(standardised_within(other, covered), standardised_within(maps, covered))
    dpk = PyramidDPK([3, 8], [3, 8], 10)
    dpk.start_epoch(1)
    losses = []
    for each in (maps, other):
        torch.manual_seed(0)
        output = Output([each, torch.zeros(5, 8)], torch.zeros(5, 4), last_map=each, extent=extent)
        losses += dpk(output, output, None, None, None).values()
    assert losses[0].item() == pytest.approx(losses[1].item())


# ---------------------------------------------------------------- schedule and command line


def test_the_learning_rate_rises_and_drops():
    options = parse_detector(["--iterations", "180000"])
    rates = [rate_at(options, step) for step in (0, 500, 1000, 119_999, 120_000, 160_000)]
    assert rates == pytest.approx([1e-5, 0.01 * (0.001 + 0.999 / 2), 0.01, 0.01, 1e-3, 1e-4])


def test_the_protocol_is_in_proportion_to_the_iterations_and_the_batch():
    whole, short = parse_detector([]), parse_detector(["--iterations", "18000", "--batch_size", "16"])
    assert (whole.epochs, whole.learning_rate, whole.lr_steps) == (18, 0.01, [120_000, 160_000])
    assert (short.epochs, short.learning_rate, short.lr_steps) == (18, 0.02, [12_000, 16_000])
    assert short.warmup_iters == 100
    assert options_of("--iterations 60").kd_warmup_iters == 10
    assert parse_detector(["--batch_size", "16", "--learning_rate", "0.01"]).learning_rate == 0.01


def test_lambda_rises_in_proportion_to_the_run():
    assert options_of("--temperature ctkd-global --iterations 480 --eval_every 2").method["lambda_epochs"] == 10
    assert options_of("--temperature ctkd-global --lambda_epochs 3").method["lambda_epochs"] == 3


def test_the_published_range_is_a_flag():
    assert options_of("--temperature ctkd-global").method["tau_range"] == 3
    assert options_of("--temperature ctkd-global --tau_range 20").method["tau_range"] == 20


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--path-t x --trials 2", "--trials is not supported for detectors"),
        ("--path-t x --mixup 0.2", "--mixup is not supported for detectors (boxes cannot be mixed)"),
        ("--path-t x --teacher-table", "--teacher_table is not supported for detectors"),
        ("--path-t x --epochs 3", "a detector's run is counted in --iterations"),
        ("--path-t x --temperature rlkd --aug_epoch 2", "--aug_epoch is not supported for detectors"),
        ("--path-t x --distill crd", "--distill crd keeps a memory with a place for each image"),
        ("--path-t x --distill ofd", "unknown distiller of detectors 'ofd'"),
        ("--path-t x --model_s retinanet_tiny", "has no proposals whose predictions could be softened"),
        ("--path-t x --model_s resnet8", "unknown detector 'resnet8'"),
        ("--distill kd", "--distill kd needs a teacher: give --path-t FILE"),
        ("--path-t x --distill none", "--distill none trains without a teacher"),
        ("--temperature dtkd", "--temperature is for distillation"),
        ("--path-t x --distill kd -b 1", "--beta does nothing in --distill kd"),
        ("--path-t x --distill dkd -b 0", "--beta 0 leaves nothing of --distill dkd"),
        ("--path-t x -a 0", "--alpha 0 leaves nothing to distil"),
        ("--path-t x --distill dkd --kd_warmup_iters 3", "--kd_warmup_iters has no KD term to act on"),
        ("--path-t x --temperature standardised --logit_stand", "is on z-scored logits already"),
        ("--path-t x --tau_control shuffled", "--tau_control is for a --temperature that differs"),
        ("--kd_T 4", "--kd_T is for distillation"),
        ("--logit_stand", "--logit_stand is for distillation"),
        ("--eval_every 0", "--eval_every must be 1 or more, not 0"),
        ("--model_s retinanet_ResNet18 --rois 7", "--rois has no effect on retinanet_ResNet18"),
        ("--test_size 1400", "--max_size 1333 is below the short side 1400"),
        ("--path-t torchvision", "--path-t torchvision needs the teacher's name"),
        ("--plain --precision bf16", "--plain turns off everything that is for speed"),
        ("--path-t x --distill sp --batch_size 1", "--distill sp compares images of one process"),
        ("--path-t x --distill vid --temperature dtkd -a 0", "--alpha 0 leaves the temperature nothing"),
        ("--norm frozen", "--norm frozen needs weights"),
        ("--min_sizes 640,many", "give whole numbers separated by commas"),
        ("--max_size 100", "--max_size 100 is below the short side 800"),
        ("--iterations 0", "--iterations must be 1 or more"),
        ("--dataset cifar100", "the data set cifar100 is for classifiers (train_teacher.py): give one of coco"),
        ("--dataset voc", "unknown data set 'voc'; the known ones are: coco, shapes"),
        ("--path-t x --kd_T 0", "--kd_T must be above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_said(line, says):
    assert says in error_of(parse_detector, line.split())


def test_lambda_rises_within_a_part(data):
    task, _ = task_of(data, "--temperature ctkd-global --lambda_epochs 1 --eval_every 4")
    strengths = []
    for batch in batches(data, 4):
        task.before_step(batch)
        strengths.append(task.temperature.describe()["lambda"])
    assert strengths == sorted(strengths) and strengths[0] < 0.2 and strengths[-1] == 1


def test_mobilenet_is_not_frozen_but_for_its_batch_norm():
    layers = {name: parse_detector(["--backbone", "x", "--model_s", f"faster_rcnn_{name}"]).trainable_layers
              for name in ("ResNet18", "MobileNetV2")}  # fmt: skip
    assert layers == {"ResNet18": 3, "MobileNetV2": 5}


def test_processes_share_a_batch_evenly(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "--batch_size 2 cannot be shared evenly by 3 processes" in error_of(options_of)


def test_rlkd_needs_a_single_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--temperature rlkd does not work with several processes" in error_of(options_of, "--temperature rlkd")


def test_reviewkd_has_the_published_weights_of_a_pair():
    line = "--path-t x --distill reviewkd --model_s "
    for student, teacher, beta in (
        ("ResNet18", "ResNet101", 1.2),
        ("MobileNetV2", "ResNet50", 2.0),
        ("ResNet34", "ResNet50", 1.0),
    ):
        options = parse_detector(f"{line}faster_rcnn_{student}".split())
        assert resolve_pair(options, f"faster_rcnn_{teacher}").beta == beta


def test_a_gradient_is_clipped_at_its_norm(data):
    task, teacher = task_of(data, "--kd_warmup_iters 0 --kd_T 4")
    optimizer = torch.optim.SGD(task.parameters(), 0.0)
    train_step(task, teacher, batches(data)[0], optimizer, Metrics(), clip_grad=0.5)
    norm = torch.stack([each.grad.norm() for each in task.parameters() if each.grad is not None]).norm()
    assert norm.item() == pytest.approx(0.5, rel=1e-4)
