"""Accuracy and calibration, against a case computed by hand and another implementation."""

import numpy as np
import pytest
import torch

from report.scores import BINS, calibration_error, score


def logits_for(probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_the_calibration_error_of_five_samples_by_hand():
    # confidences 0.9 right, 0.9 wrong, 0.55 right, 0.55 right, 0.7 wrong; in 5 bins of width 0.2:
    # (0.8, 1]: 2 of 5, accuracy 0.5, confidence 0.9; (0.4, 0.6]: 2 of 5, 1 and 0.55; (0.6, 0.8]: 1 of 5, 0 and 0.7
    logits = logits_for([[0.9, 0.1], [0.9, 0.1], [0.45, 0.55], [0.45, 0.55], [0.7, 0.3]])
    target = torch.tensor([0, 1, 1, 1, 1])
    assert calibration_error(logits, target, 5) == pytest.approx(0.4 * 0.4 + 0.4 * 0.45 + 0.2 * 0.7)
    assert calibration_error(logits, target, 1) == pytest.approx(abs(0.6 - 0.72))  # only means count


def test_sure_and_right_is_calibrated_and_sure_and_wrong_is_not():
    logits = torch.tensor([[100.0, 0.0], [100.0, 0.0]])
    assert calibration_error(logits, torch.tensor([0, 0])) == pytest.approx(0)
    assert calibration_error(logits, torch.tensor([1, 1])) == pytest.approx(1)


def by_loops(logits, target, bins):
    """Compute the error bin by bin in NumPy, as the paper defines it."""
    exp = np.exp(logits - logits.max(1, keepdims=True))
    probability = exp / exp.sum(1, keepdims=True)
    confidence, hit = probability.max(1), probability.argmax(1) == target
    error = 0.0
    for number in range(bins):
        inside = (confidence > number / bins) & (confidence <= (number + 1) / bins)
        if inside.any():
            error += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return error


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bins", [1, 10, BINS])
def test_the_calibration_error_is_that_of_another_implementation(seed, bins):
    rng = np.random.default_rng(seed)
    logits, target = rng.normal(size=(300, 7)) * (seed + 1), rng.integers(7, size=300)
    ours = calibration_error(torch.from_numpy(logits), torch.from_numpy(target), bins)
    assert ours == pytest.approx(by_loops(logits, target, bins))
    assert 0 < ours < 1


def test_accuracies_are_counted_by_class_and_classes_without_images_have_none():
    logits = torch.eye(7)[[0, 1, 1, 2, 3, 3]] * 5
    scores = score(logits, torch.tensor([0, 1, 2, 2, 0, 3]), [f"class {i}" for i in range(7)])
    assert scores.samples == 6 and scores.top1 == pytest.approx(100 * 4 / 6)
    assert [(each.samples, each.top1) for each in scores.classes] == [
        (2, 50), (1, 100), (2, 50), (1, 100), (0, None), (0, None), (0, None)
    ]  # fmt: skip
    assert scores.top5 >= scores.top1
    loss = torch.nn.functional.cross_entropy(logits.double(), torch.tensor([0, 1, 2, 2, 0, 3]))
    assert scores.loss == pytest.approx(loss.item())
    text = scores.text()
    assert text.index("class 0") < text.index("class 1") and "class 4" not in text


def test_the_worst_classes_are_listed_first_and_no_more_than_ten():
    target = torch.arange(20).repeat(4)
    logits = torch.eye(20)[target].clone()
    logits[17], logits[37] = torch.eye(20)[0], torch.eye(20)[0]  # half of class 17
    text = score(logits, target, [f"name{i}" for i in range(20)]).text()
    assert "the 10 worst classes" in text and text.count("name") == 10
    assert text.index("name17") == text.index("name")


def test_top_5_of_fewer_classes_is_everything():
    assert score(torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]), list("abc")).top5 == 100
