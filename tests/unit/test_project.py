"""The project's own files agree with one another."""

import re
import tomllib

from common import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(*names):
    """Return the lower bound of each package in requirements files."""
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines() if line[:1] not in ("", "#")]
    return dict(re.fullmatch("([a-zA-Z0-9_-]+)[>=]=([0-9.]+)", line).groups() for line in lines)


def as_numbers(version):
    return [int(part) for part in version.split(".")]


def test_running_needs_no_tool_of_the_tests():
    assert requirements("requirements.txt").keys() & {"pytest", "pytest-xdist", "ruff"} == set()
    assert requirements("requirements-dev.txt").keys() >= {"pytest", "pytest-xdist", "ruff"}


def test_the_metadata_reads_the_files_of_requirements():
    dynamic = PROJECT["tool"]["setuptools"]["dynamic"]
    extras = dynamic["optional-dependencies"].values()
    files = [name for each in (dynamic["dependencies"], *extras) for name in each["file"]]
    assert sorted(files) == sorted(path.name for path in ROOT.glob("requirements*.txt"))
    assert set(PROJECT["project"]["dynamic"]) == {"dependencies", "optional-dependencies"}


def test_the_last_tested_versions_are_those_of_every_requirement():
    tested = requirements("constraints.txt")
    needed = requirements(
        "requirements.txt", "requirements-dev.txt", "requirements-export.txt", "requirements-detection.txt"
    )
    assert needed.keys() <= tested.keys()
    assert all(as_numbers(tested[name]) >= as_numbers(least) for name, least in needed.items())


def test_the_version_stands_in_two_places():
    assert f"\nversion: {PROJECT['project']['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_folder_of_runs_is_in_a_clone_and_explains_itself():
    told = (ROOT / "save/README.md").read_text()
    assert {"models/", "student_model/", "quickstart/", "reproduce/"} <= set(re.findall(r"`(\w+/)", told))
    assert "!save/README.md" in (ROOT / ".gitignore").read_text().splitlines()
