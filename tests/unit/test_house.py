"""The code is within the limits of tests/house.py, which detects violations."""

import ast

import house
import pytest


def test_the_house_keeps_its_limits():
    numbers, told = house.measure()
    assert {name: number for name, number in numbers.items() if number > house.LIMITS[name]} == {}, told
    assert numbers["frames from fit to backward"] >= 1
    assert told[-1].startswith("from fit to backward: ") and told[-1].count(" > ") == numbers[
        "frames from fit to backward"
    ] - 1  # fmt: skip


@pytest.mark.parametrize(
    ("importer", "text", "against"),
    [
        ("temperature.fixed", "import helper.errors", True), ("models.vgg", "from helper import errors", True),
        ("dataset.tree", "def load():\n    from helper.errors import UserError", True),
        ("helper.teacher", "import train_teacher", True), ("helper.loops", "import report.plots", True),
        ("compare", "from helper import errors", False), ("report.plots", "import helper.errors", False),
        ("helper.loops", "import models.vgg", False), ("models.vgg", "import dataset.tree, torch", False),
    ],
)  # fmt: skip
def test_imports_go_one_way(importer, text, against):
    names = ("helper.errors", "models.vgg", "dataset.tree", "train_teacher", "report.plots")
    trees = dict.fromkeys(names, ast.parse("")) | {importer: ast.parse(text)}
    found = house.imports(trees)
    assert len(found) == 1 and bool(house.upward(found)) == against


def test_circles_are_found():
    edges = {("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("d", "e"), ("x", "y"), ("y", "x")}
    assert house.circles(edges) == [["a", "b", "c"], ["x", "y"]]
    assert house.circles({("a", "b"), ("a", "c"), ("b", "c")}) == []


def test_functions_are_measured_with_the_longest_first():
    tree = ast.parse("def short():\n    pass\n\n\nclass A:\n    def long(self):\n" + "        pass\n" * 70)
    assert house.functions({"m": tree}) == [("m.long", 71), ("m.short", 2)]


def test_every_module_has_its_place():
    texts = house.code()
    assert house.line_counts(texts).keys() >= {
        "scripts",
        "benchmarks",
        "helper",
        "report",
        "inputs",
        "published",
        *house.ZOO,
    }
    assert not any(name.startswith("tests") for name in texts)
    floors = {"compare": 5, "report": 4, "helper.loops": 3, "options.parse": 2, "models": 1, "inputs": 0}
    assert {name: house.floor_of(name) for name in floors} == floors
