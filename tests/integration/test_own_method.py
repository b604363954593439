"""A custom method: a class with a flag in a file outside the project, with no other change."""

import importlib.util
import json
from typing import Annotated

import pytest
from common import distil, read_log

from inputs import Option, UserError
from options.flags import all_options, student_parser
from temperature import Temperature, temperature_dict

METHOD = '''
from typing import Annotated

from inputs import Option
from temperature.base import KD_T, KdT
from temperature.fixed import Fixed


class Sharper(Fixed):
    """kd_T, divided by a number."""

    def __init__(
        self, kd_T: KdT = KD_T, sharpness: Annotated[float, Option("what kd_T is divided by", 1, 9)] = 2.0
    ) -> None:
        super().__init__(kd_T / sharpness)
'''


@pytest.fixture(params=["", "from __future__ import annotations\n"], ids=["", "annotations are texts"])
def sharper(request, tmp_path, monkeypatch):
    file = tmp_path / "sharper.py"
    file.write_text(request.param + METHOD)
    spec = importlib.util.spec_from_file_location("sharper", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(temperature_dict, "sharper", module.Sharper)


def test_a_flag_that_is_declared_in_a_constructor_is_all_that_a_flag_is(sharper, teacher, tmp_path, capsys):
    line = f"--path-t {teacher} --epochs 1 --temperature sharper --run_dir {tmp_path / 'run'}"
    folder = distil(f"{line} --sharpness 4")
    assert read_log(folder)[0]["tau_mean"] == 1.0
    assert json.loads((folder / "config.json").read_text())["options"]["sharpness"] == 4
    assert "sharper: kd_T" not in capsys.readouterr().out  # kd_T belongs to all runs
    assert "--sharpness float" in student_parser().format_help()
    with pytest.raises(UserError, match="--sharpness must be 9 or less, not 10"):
        distil(f"{line} --sharpness 10")
    with pytest.raises(UserError, match="sharpness 4.0 instead of 2.0"):
        distil(line)


def test_it_makes_no_run_of_another_method_a_different_one(sharper, teacher, tmp_path, capsys):
    line = f"--path-t {teacher} --epochs 1 --run_dir {tmp_path / 'run'}"
    distil(line)
    distil(f"{line} --sharpness 4")
    assert "already finished" in capsys.readouterr().out


def test_a_name_that_is_taken_otherwise_is_refused(monkeypatch):
    class Another(Temperature):
        def __init__(self, anneal_from: Annotated[float, Option("another thing", 0, 1)] = 0.5) -> None:
            super().__init__()

    monkeypatch.setitem(temperature_dict, "another", Another)
    with pytest.raises(ValueError, match="declare --anneal_from differently"):
        all_options()
