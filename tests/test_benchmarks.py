"""The benchmarks run, and measure what they say."""

import json
import sys

import pytest

from benchmarks import cka_bias, cost
from distiller_zoo import distiller_dict
from helper.errors import UserError
from temperature import temperature_dict

SMALL = "--model_t resnet8 --model_s resnet8 --batch_size 4 --rounds 2 --temperature fixed"
KINDS = {"distillers": distiller_dict, "temperatures": temperature_dict}


def run(line, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cost.py", *line.split()])
    cost.main()


@pytest.mark.parametrize("what", KINDS)
def test_the_cost_of_each_is_relative_to_the_first(what, monkeypatch, capsys):
    run(f"{what} {SMALL} --steps 2 --json", monkeypatch)
    told = json.loads(capsys.readouterr().out)
    result = told["cost"]
    assert list(result) == list(KINDS[what])
    assert result[{"distillers": "kd", "temperatures": "fixed"}[what]]["ratio"] == 1
    assert all(0 < each["low"] <= each["ratio"] <= each["high"] for each in result.values())
    learning = [name for name, each in result.items() if each["parameters"]]
    if what == "distillers":
        assert learning == ["vid", "crd", "srrl", "dpk"]
        assert result["crd"]["parameters"] == 2 * (64 + 1) * 128
    else:
        assert learning == ["ctkd-global", "ctkd-instance", "rlkd"]
        assert result["ctkd-global"]["parameters"] == 1


def test_the_agent_learns_in_the_steps_that_are_timed(monkeypatch, capsys):
    updates = []
    monkeypatch.setattr(temperature_dict["rlkd"], "_learn", lambda self: updates.append(self.rewards.clear()))
    monkeypatch.setattr(cost, "WARM_UP", 0)
    monkeypatch.setattr(cost, "temperature_dict", {name: temperature_dict[name] for name in ("fixed", "rlkd")})
    run(f"temperatures {SMALL}", monkeypatch)
    assert len(updates) == 2  # one a round
    capsys.readouterr()


@pytest.mark.parametrize("what", KINDS)
def test_the_table_is_aligned(what, monkeypatch, capsys):
    run(f"{what} {SMALL} --steps 1", monkeypatch)
    _, heading, *rows, footnote = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == list(KINDS[what])
    assert footnote.startswith("ratio: ")
    assert {len(row) for row in rows} == {len(heading)}


def test_one_round_has_no_spread(monkeypatch):
    for wrong in ("--rounds 1", "--steps 0"):
        with pytest.raises(UserError, match="--rounds and --batch_size must be 2 or more, and --steps 1 or more"):
            run(f"distillers {SMALL} {wrong}", monkeypatch)


def test_the_table_of_cka_is_aligned_and_refuses_what_cannot_be_estimated(monkeypatch, capsys):
    monkeypatch.setattr(cka_bias, "FEATURES", (16, 8192))
    monkeypatch.setattr(sys, "argv", ["cka_bias.py", "--batch_size", "8", "--batches", "3"])
    cka_bias.main()
    _, heading, *rows, _, _ = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 * 2 * 4
    assert {len(row) for row in rows} == {len(heading)}
    for wrong in (["--batch_size", "3"], ["--batches", "1"]):
        monkeypatch.setattr(sys, "argv", ["cka_bias.py", *wrong])
        with pytest.raises(UserError, match="--batch_size must be 4 or more, and --batches 2 or more"):
            cka_bias.main()
