"""The pages that compare.py makes of logs."""

import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from test_compare import history, write_run

import compare
from distiller_zoo import distiller_dict
from helper import page
from helper.errors import UserError
from helper.svg import Band, Curve, draw
from helper.tables import Link, Table
from temperature import temperature_dict


@pytest.fixture
def results(tmp_path):
    """Full runs of a pair and short ones of another in two folders; in one of them somebody wrote what it means."""
    root = tmp_path / "results"
    machine = {"processor": "a processor", "threads": 1, "gpus": []}
    for seed, last in enumerate((70.5, 70.7, 70.6), 1):
        records = [record | {"seconds": 30} for record in history(last)]
        write_run(root / f"full/kd-{seed}", records, seed=seed, machine=machine)
    write_run(root / "full/ctkd", history(71.2, tau=True), temperature="ctkd-global", processes=2)
    short = {"teacher": "resnet110", "epochs": 5, "lr_decay_epochs": [3, 4]}
    write_run(root / "few/<one>", history(40.0, epochs=5), **short)
    write_run(root / "few/two", history(41.0, epochs=3), temperature="ctkd-global", **short)
    (root / "few/notes.md").write_text("# A <few> epochs\n\nNothing to see.\n")
    return root


class Page(HTMLParser):
    """The tags that are open, the texts, and where links lead."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "rect", "path", "polygon", "polyline"):
            self.open.append(tag)
        self.links += [value for key, value in attributes if key in ("href", "src")]

    def handle_endtag(self, tag):
        if tag not in ("rect", "path", "polygon", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_both_pages_show_the_same_and_lead_to_the_logs(results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", "--pages", str(results)])
    compare.main()
    assert "index.html" in capsys.readouterr().out
    told, shown = Page(), (results / "README.md").read_text()
    told.feed((results / "index.html").read_text())
    assert told.open == []
    text = " ".join(told.texts)
    for words in ("70.60 ± 0.10", "70.66", "within noise", "a processor, 1 thread", "2.00",
                  "unfinished (3/5 epochs)", "1 of 3 configurations follow a published protocol"):  # fmt: skip
        assert words in text and words in shown, words
    for links in (told.links, re.findall(r"\]\((.*?)\)", shown)):
        links = {unquote(link) for link in links}
        assert {"full/kd-2/log.jsonl", "few/<one>/config.json", "few/notes.md"} <= links
        assert all((results / link).exists() for link in links)
    assert "A <few> epochs" in text and "## A &lt;few&gt; epochs" in shown
    assert "http" not in "".join(told.links)  # all in one file
    assert str(results) not in shown + text


def test_longer_runs_stand_first_and_noise_is_told(results):
    shown = page.pages(results)["README.md"]
    assert shown.index("## full") < shown.index("## A &lt;few&gt; epochs")
    full, few = shown.split("## A &lt;few")
    assert "seeds spread by 0.10 points" in full and "pooled over 1 configurations, 2 degrees of freedom" in full
    assert "differ by less than 0.61 points" in full  # 4.303 * 0.1 * sqrt(2)
    assert "Noise: not known" in few


def test_what_is_not_made_any_more_goes(results):
    page.write_pages(results)
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    (results / "figures/old.svg").write_text("")
    page.write_pages(results)
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == before


def test_what_is_not_ours_is_not_overwritten(results, monkeypatch):
    (results / "README.md").write_text("# Somebody's\n")
    with pytest.raises(UserError, match="README.md was not made by --pages, and would be lost"):
        page.write_pages(results)
    assert (results / "README.md").read_text() == "# Somebody's\n" and not (results / "figures").exists()
    with pytest.raises(UserError, match="is a run itself: give the folder"):
        page.write_pages(results / "full/ctkd")
    monkeypatch.setattr(sys, "argv", ["compare.py", "save/models", "--pages", "results"])
    with pytest.raises(UserError, match="goes with no other flag or folder"):
        compare.main()


def test_only_what_is_finished_is_shown(tmp_path):
    write_run(tmp_path / "a/run", history(40.0, epochs=3), epochs=5)
    with pytest.raises(UserError, match="no run below .* is finished"):
        page.pages(tmp_path)


def test_every_method_has_its_line():
    assert page.LINES.keys() == {*distiller_dict, *temperature_dict}


def test_a_picture_has_its_curves_where_they_belong():
    curves = [Curve("a < b", "#123456", "none", [[(1, 10.0), (2, 30.0)], [(1, 12.0), (2, 20.0)]])]
    root = ElementTree.fromstring(draw("pair", "top-1", curves, [Band("paper", [(1, 12.0), (2, 13.0), (2, 12.0)])]))
    lines = [element for element in root if element.tag.endswith("polyline")]
    (first, second), _ = ([tuple(map(float, at.split(","))) for at in line.get("points").split()] for line in lines)
    assert first[0] < second[0] and first[1] > second[1]  # to the right, and up
    assert [element.text for element in root if element.tag.endswith("text")][-2:] == ["a < b", "paper"]
    labels = [element.text for element in root if element.tag.endswith("text")]
    assert {"10", "15", "20", "25", "30"} <= set(labels)


def test_a_picture_of_one_value():
    ElementTree.fromstring(draw("pair", "tau", [Curve("a", "#123456", "7 4", [[(1, 4.0)]])]))


def test_a_table_in_three_forms():
    table = Table(["pair", "n"], [["a|b <c>", "1"], [[Link("x", "y/z")], "20"]])
    assert table.text() == "pair       n\n-------  ---\na|b <c>    1\nx         20"
    assert table.markdown().splitlines() == [
        "| pair     |   n |", "| -------- | --: |", r"| a\|b <c> |   1 |", "| [x](y/z) |  20 |",
    ]  # fmt: skip
    assert "<thead><tr><th scope=col class=left>pair</th><th scope=col>n</th></tr></thead>" in table.html()
    assert "<td class=left>a|b &lt;c&gt;</td><td>1</td>" in table.html()
    assert '<td class=left><a href="y/z">x</a></td>' in table.html()
