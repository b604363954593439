"""Trainings in the tests' own process evaluate on few digits; all of them would take half of the time."""

import pytest

import helper.environment  # noqa: F401 (before PyTorch)
from dataset import dataset_dict, digits


@pytest.fixture(autouse=True)
def few_digits_to_test_on(monkeypatch):
    def load(**given):
        whole = digits.load(**given)
        return whole._replace(val_images=whole.val_images[:80], val_target=whole.val_target[:80])

    monkeypatch.setitem(dataset_dict, "digits", load)
