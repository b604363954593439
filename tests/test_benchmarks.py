"""The benchmarks run, and measure what they say."""

import json
import sys

import pytest

from benchmarks import distillers
from distiller_zoo import distiller_dict
from helper.errors import UserError

SMALL = "--model_t resnet8 --model_s resnet8 --batch_size 4 --rounds 2 --temperature fixed"


def run(line, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distillers.py", *line.split()])
    distillers.main()


def test_the_cost_of_every_distiller_is_relative_to_kd(monkeypatch, capsys):
    run(SMALL + " --json", monkeypatch)
    result = json.loads(capsys.readouterr().out)["distillers"]
    assert result.keys() == distiller_dict.keys()
    assert result["kd"]["ratio"] == 1
    assert all(0 < cost["low"] <= cost["ratio"] <= cost["high"] for cost in result.values())
    assert [name for name, cost in result.items() if cost["parameters"]] == ["vid", "crd", "srrl"]
    assert result["crd"]["parameters"] == 2 * (64 + 1) * 128


def test_the_table_is_aligned(monkeypatch, capsys):
    run(SMALL, monkeypatch)
    _, heading, *rows, footnote = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == list(distiller_dict)
    assert footnote.startswith("ratio: ")
    assert {len(row) for row in rows} == {len(heading)}


def test_one_round_has_no_spread(monkeypatch):
    with pytest.raises(UserError, match="--rounds and --batch_size must be 2 or more"):
        run(SMALL + " --rounds 1", monkeypatch)
