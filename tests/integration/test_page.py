"""The pages that compare.py makes of logs."""

import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from common import history, write_run

import compare
from distiller_zoo import distiller_dict
from helper.errors import RunError
from inputs import UserError
from report import page, statistics, style
from report.comparison import finished_groups
from report.figures import THIN, figures
from report.plot import Curve, draw_curves, draw_dots
from report.runs import find_runs, group_labels
from report.tables import Link, Table, in_markdown
from temperature import temperature_dict


@pytest.fixture(autouse=True)
def stand_ins(request):
    """Draw no figures unless a test asks for `pictures`."""
    if "pictures" not in request.fixturenames:
        request.getfixturevalue("no_pictures")


@pytest.fixture
def pictures():
    """Draw figures as users get them."""


@pytest.fixture
def results(tmp_path):
    """Write full runs of one pair and short runs of another into two folders, one of which has a description."""
    root = tmp_path / "results"
    machine = {"processor": "a processor", "threads": 1, "gpus": []}
    for seed, last in enumerate((70.5, 70.7, 70.6), 1):
        records = [record | {"seconds": 30} for record in history(last)]
        write_run(root / f"full/kd-{seed}", records, seed=seed, machine=machine)
    write_run(root / "full/ctkd", history(71.2, tau=True), temperature="ctkd-global", processes=2)
    short = {"teacher": "resnet110", "epochs": 5, "lr_decay_epochs": [3, 4]}
    write_run(root / "few/<one>", history(40.0, epochs=5), **short)
    write_run(root / "few/two", history(41.0, epochs=3), temperature="ctkd-global", **short)
    (root / "few/notes.md").write_text("# A <few> epochs\n\n**Nothing** to\nsee < all.\n\nMore.\n")
    return root


class Page(HTMLParser):
    """Collects a page's open tags, texts, link targets and anchors."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.links, self.names, self.seen = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)
        self.names += [value for key, value in attributes if key == "id"]
        self.links += [value for key, value in attributes if key in ("href", "src")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_both_pages_show_the_same_and_lead_to_the_logs(pictures, results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", "--pages", str(results)])
    compare.main()
    assert "index.html" in capsys.readouterr().out
    told, shown = Page(), (results / "README.md").read_text()
    told.feed((results / "index.html").read_text())
    assert told.open == [] and len(set(told.names)) == len(told.names)
    text = " ".join(told.texts)
    for words in ("70.60 ± 0.10", "70.66", "within noise (±0.50)", "a processor, 1 thread", "2.00", "0.1, 0.9, 0",
                  "unfinished (3/5 epochs)", "1 configuration follows a published protocol"):  # fmt: skip
        assert words in text and words in shown, words
    in_markdown = (re.findall(pattern, shown) for pattern in (r"\]\((.*?)\)", 'id="(.*?)"'))
    for links, names in ((told.links, told.names), in_markdown):
        within = {link[1:] for link in links if link.startswith("#")}
        assert within == {"full", "few", "few-notes", "reading"} and within <= set(names)
        links = {unquote(link) for link in links if not link.startswith("#")}
        assert {"full/kd-2/log.jsonl", "few/<one>/config.json", "figures/full_resnet56_resnet20_top1.pdf"} <= links
        assert all((results / link).exists() for link in links)
    assert "A <few> epochs" in text and "## A &lt;few&gt; epochs" in shown
    assert "Nothing" in told.texts and "More." in told.texts
    assert "**Nothing** to\nsee &lt; all." in shown and "### Discussion\n\nMore.\n" in shown
    assert "http" not in "".join(told.links)  # self-contained
    assert str(results) not in shown + text


def test_longer_runs_stand_first_and_noise_is_told(results):
    shown = page.pages(results)["README.md"].decode()
    assert shown.index("## full") < shown.index("## A &lt;few&gt; epochs")
    full, few = shown.split("## A &lt;few")
    # t(2) = 4.303: times 0.1 * sqrt(2) 0.61, times 0.1 * sqrt(1 + 1 / 3) 0.50
    assert "Noise of resnet20 on cifar100, all images, 240 epochs: seeds spread by 0.10 points" in full
    assert "degrees of freedom: 2" in full and "differ by less than 0.61 points" in full and "| +0.60 ± 0.50 |" in full
    assert "Noise: not known" in few and "5 epochs instead of 240" in few
    write_run(results / "full/ctkd-2", history(71.3, tau=True), 2, temperature="ctkd-global", processes=2)
    write_run(results / "full/other-1", history(60.0), 1, model="resnet32")  # another student, with a larger spread
    write_run(results / "full/other-2", history(66.0), 2, model="resnet32")
    write_run(results / "full/subset-1", history(50.0), 1, train_subset=100)
    write_run(results / "full/subset-2", history(56.0), 2, train_subset=100)
    full, _ = page.pages(results)["README.md"].decode().split("## A &lt;few")
    assert "Noise of resnet32 on cifar100, all images, 240 epochs: seeds spread by 4.24 points" in full
    assert "Noise of resnet20 on cifar100, 100 images, 240 epochs: seeds spread by 4.24 points" in full
    # sqrt((2 * 0.01 + 0.005) / 3) = 0.0913; t(3) = 3.182: times sqrt(2) 0.41, times sqrt(1 / 2 + 1 / 3) 0.27
    assert "spread by 0.09 points" in full and "differ by less than 0.41 points" in full and "| +0.65 ± 0.27 |" in full


def test_other_data_than_the_published_stand_last(results):
    write_run(results / "a/run", history(90.0, epochs=500), epochs=500, dataset="digits")
    shown = page.pages(results)["README.md"].decode()
    assert shown.index("## full") < shown.index("## A &lt;few") < shown.index("## a\n")


def test_pictures_of_a_pair(pictures, results):
    write_run(results / "full/alone", history(69.0), distill=None)
    records = [record | {"tau_teacher_mean": 5.0} for record in history(71.0, tau=True)]
    write_run(results / "full/dtkd", records, temperature="dtkd")
    for i in range(20):
        write_run(results / f"full/pkt-{i}", history(70.0 + i), distill="pkt", beta=float(i))
    made = {name.removeprefix("figures/full_"): text for name, text in page.pages(results).items() if "/full_" in name}
    pair = "resnet56_resnet20"
    names = {"alone_top1", f"{pair}_last", f"{pair}_top1", f"{pair}_tau"}
    assert made.keys() == {f"{name}.{form}" for name in names for form in ("svg", "pdf")}
    told = {}
    for name in names:
        told[name] = [
            each.text for each in ElementTree.fromstring(made[f"{name}.svg"]).iter() if each.tag.endswith("text")
        ]
    for end in ("last", "top1"):  # all methods of a pair in one figure
        for label in (
            "resnet20 alone, 240 epochs",
            "kd, tau 4",
            "kd, dtkd",
            *(f"pkt+kd, tau 4, beta {i}" for i in range(20)),
        ):
            assert any(re.match(f"{re.escape(label)}(:|$)", line) for line in told[f"{pair}_{end}"]), label
    ends = [float(line.split(": ")[1].split()[0]) for line in told[f"{pair}_top1"] if re.search(r": \d", line)]
    assert ends == sorted(ends, reverse=True) and len(ends) == 24
    assert "CTKD's figure (about)" in told[f"{pair}_tau"] and "kd, dtkd, teacher's: 5.00" in told[f"{pair}_tau"]


def test_what_is_not_made_any_more_goes(results):
    page.write_pages(results)
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    for form in ("svg", "pdf"):
        old = before[results / f"figures/full_resnet56_resnet20_tau.{form}"]
        (results / f"figures/old.{form}").write_bytes(old)
    page.write_pages(results)
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == before


def test_what_is_not_ours_is_not_overwritten(results, monkeypatch):
    readme, picture = results / "README.md", results / "figures/full_resnet56_resnet20_last.svg"
    (results / "figures").mkdir()
    (results / "figures/mine.svg").write_text("<svg/>")
    (results / "figures/mine.pdf").write_text("%PDF-1.4\n/Producer (somebody's)")
    about_us = f"# Somebody's\n\n`python compare.py --pages results` makes pages.\n\n{page.MARK}\n"
    theirs = picture.with_suffix(".pdf")
    for path, text in ((readme, "# Somebody's\n"), (readme, about_us), (picture, "<svg/>"), (theirs, "%PDF-1.4")):
        path.write_text(text)
        with pytest.raises(UserError, match=f"{path.name} was not made by --pages, and would be lost"):
            page.write_pages(results)
        assert path.read_text() == text and not (results / "index.html").exists()
        path.unlink()
    page.write_pages(results)
    assert (results / "figures/mine.svg").exists() and (results / "figures/mine.pdf").exists()
    with pytest.raises(UserError, match="is a run itself: give the folder"):
        page.write_pages(results / "full/ctkd")
    monkeypatch.setattr(sys, "argv", ["compare.py", "save/models", "--pages", "results"])
    with pytest.raises(UserError, match="goes with no other flag or folder"):
        compare.main()


def test_only_what_is_finished_is_shown(tmp_path):
    write_run(tmp_path / "a/run", history(40.0, epochs=3), epochs=5)
    with pytest.raises(UserError, match="no run below .* is finished"):
        page.pages(tmp_path)


def test_a_run_without_a_log_or_a_protocol_is_said(results):
    (results / "full/ctkd/log.jsonl").unlink()
    (results / "full/config.json").write_text('{"somebody": "else"}')
    for seed in (1, 2, 3):
        path = results / f"full/kd-{seed}/config.json"
        path.write_text(path.read_text().replace('"momentum": 0.9', '"momentum": null'))
    shown = page.pages(results)["README.md"].decode()
    assert "- unfinished (0/240 epochs): resnet56 → resnet20, kd, ctkd-global, full/ctkd\n" in shown
    assert "Protocol: not fully recorded in config.json." in shown and "70.60 ± 0.10" in shown


@pytest.mark.parametrize(("text", "title", "about"), [
    ("", "few", ""), ("Only a\ntext.\n", "few", "Only a\ntext."),
    ("# A `title`\nand a\ntext.\n\nMore.", "A title", "and a\ntext."),
    ("\n# A title\n", "A title", ""), ("## No title\n", "few", ""), ("- a\n- b\n", "few", ""),
])  # fmt: skip
def test_notes_without_a_title_or_a_paragraph(results, text, title, about):
    (results / "few/notes.md").write_text(text)
    shown = page.pages(results)["README.md"].decode()
    assert f"- [{title}](#few): " in shown and f"\n## {title}\n\n{about}" in shown
    assert ("\n\n\n" in shown, "More" in shown) == (False, "More" in text)


@pytest.mark.parametrize("make", [
    lambda path: path.write_bytes(b"# Title \xff"), lambda path: path.write_text("# Title", encoding="utf-16"),
    os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir(),
], ids=["latin-1", "utf-16", "pipe", "device", "folder"])  # fmt: skip
def test_notes_that_cannot_be_read_are_left_out(results, capsys, make):
    (results / "few/notes.md").unlink()
    make(results / "few/notes.md")
    shown = page.pages(results)["README.md"].decode()
    assert "\n## few\n\nProtocol" in shown and "few-notes" not in shown
    assert re.fullmatch("warning: .*few/notes.md is left out: .*\n", capsys.readouterr().err)


# --- text from runs is escaped


@pytest.mark.parametrize(("text", "shown"), [
    ("kd_warmup 20, beta 0.5 [1], lr_decay_epochs [25, 30] instead of 3", None), ("-0.44", None), ("+0.1 ± 0.2", None),
    ("<b> & <!--", "&lt;b&gt; &amp; &lt;!--"), ("&lt;", "&amp;lt;"), ("a|b", r"a\|b"), ("a\\", "a\\\\"),
    ("[x](javascript:alert(1))", r"\[x\](javascript:alert(1))"), ("![x](y)", r"!\[x\](y)"), ("[1](y)", r"\[1\](y)"),
    ("[1]: javascript:alert(1)", r"\[1\]: javascript:alert(1)"), ("*a* _b_ __c__", r"\*a\* \_b\_ \_\_c\_\_"),
    ("`a` ~~b~~ $c$", r"\`a\` \~\~b\~\~ \$c\$"), ("# a", r"\# a"), ("- a", r"\- a"), ("1. a", r"1\. a"),
    ("---", r"\---"),
])  # fmt: skip
def test_a_text_in_markdown_is_no_markup(text, shown):
    assert in_markdown(text) == (shown or text)


HOSTILE = ("<script>alert(1)</script>", "[x](javascript:alert(1))", '"><img src=x onerror=alert(1)>', "a`*b*`|$c$ ]]>")


def test_what_runs_say_is_no_markup(pictures, results):
    for i, text in enumerate(HOSTILE):
        told = {"dataset": text, "teacher": text, "machine": {"processor": text, "gpus": [text, text]}, "further": text}
        write_run(results / f"<i>{i}/one", history(70.0), **told, model=text, distill=text)
        write_run(results / f"<i>{i}/two", history(70.0), **told, model=text, distill=text, temperature=text)
        write_run(results / f"<i>{i}/[x](y)", history(70.0)[:3], **told, model=text)
        (results / f"<i>{i}/notes.md").write_text(f"# {text}\n\n{text} {text}")
    page.write_pages(results)
    told, shown = Page(), (results / "README.md").read_text()
    told.feed((results / "index.html").read_text())
    assert told.open == [] and not {"img", "i"} & set(told.seen)
    assert told.seen.count("script") == 1  # ours
    assert not re.search(r"<(?!!-- Made|a id=|/a>)", shown)
    assert not re.search(r"(?<!\\)\]\((?!figures/|#|few/|full/|%3Ci%3E|index.html)", shown)
    assert all((results / unquote(link)).exists() for link in told.links if not link.startswith("#"))
    for picture in (results / "figures").glob("*.svg"):
        assert not {"script", "img", "i"} & {element.tag for element in ElementTree.parse(picture).iter()}


# --- files


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["/../../../OUT", "..", "a/b", "é" * 150, "\x00"])
def test_names_of_runs_lead_to_no_other_folder(results, name):
    write_run(results / "few/more", history(40.0, epochs=5), epochs=5, dataset=name, model=name, teacher="t")
    before = files(results.parent)
    page.write_pages(results)
    made = {path.relative_to(results) for path in files(results.parent).keys() - before.keys()}
    assert {str(path) for path in made if path.parent.name != "figures"} == {"README.md", "index.html"}
    ours = [path.name for path in made if path.parent.name == "figures" and "resnet" not in path.name]
    assert len(ours) == 2 and all(re.fullmatch(r"few_[A-Za-z0-9_.+-]{,105}_top1.(svg|pdf)", each) for each in ours)


def test_where_a_file_cannot_be_written_all_stays_as_it_was(results, monkeypatch):
    page.write_pages(results)
    write_run(results / "full/more", history(75.0), distill=None)
    before, real = files(results), page.write_atomically

    def full_after_the_first(path, content):
        if path.suffix == ".svg":
            raise RunError("No space left on device")
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(page, "write_atomically", full_after_the_first)
        with pytest.raises(RunError, match="No space left"):
            page.write_pages(results)
    assert files(results) == before and not list(results.glob(".pages*"))
    page.write_pages(results)
    assert files(results).keys() > before.keys()


def test_a_place_of_pictures_that_is_elsewhere_or_no_folder_is_refused(results, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (results / "figures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="figures is a symbolic link, and leads elsewhere"):
        page.write_pages(results)
    (results / "figures").unlink()
    (results / "figures").write_text("mine")
    with pytest.raises(RunError, match="cannot be written"):
        page.write_pages(results)
    assert not list((tmp_path / "elsewhere").iterdir()) and not (results / "README.md").exists()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.mkdir(), lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_is_not_replaced(results, make):
    make(results / "README.md")
    with pytest.raises(UserError, match="README.md was not made by --pages"):
        page.write_pages(results)
    assert not (results / "index.html").exists()


LINE = {"color": "#123456", "linestyle": "--", "marker": "s", "markersize": 4}


@pytest.mark.parametrize("ends", [(1e-30, 2e-30), (0, 5e-324), (1e19, 1e19), (-1e19, 1e19), (4.0, 4.0), (7.1, 7.10001)])
def test_axes_are_around_the_values(ends):
    curves, dots = draw_curves("pair", "tau", [Curve("a", LINE, [([1, 2], ends)])]), draw_dots("pair", "tau", [
        ("a", LINE, ends)])  # fmt: skip
    for figure, axis in ((curves, "y"), (dots, "x")):
        ElementTree.fromstring(style.svg(figure, "a", "a"))
        low, high = getattr(figure.axes[0], f"get_{axis}lim")()
        assert low <= ends[0] and ends[1] <= high and low < high


def test_every_method_has_its_line():
    assert page.TEMPLATES.get_template("texts.j2").module.methods.keys() == {*distiller_dict, *temperature_dict}


def test_a_picture_has_its_curves_where_they_belong():
    curves = [Curve("a < b", LINE, [([1, 2], [10.0, 30.0]), ([1, 2], [12.0, 20.0])])]
    band = [(1, 12.0), (2, 13.0), (2, 12.0)]
    figure = draw_curves("pair", "top-1", curves, band)
    (axes,), (legend,) = figure.axes, figure.legends
    assert len(draw_curves("pair", "top-1", curves, late=True).axes) == 1  # too short for a last quarter
    assert [line.get_xydata().tolist() for line in axes.get_lines()] == [[[1, 10], [2, 30]], [[1, 12], [2, 20]]]
    assert {line.get_color() for line in axes.get_lines()} == {LINE["color"]}
    assert axes.patches[0].get_xy().tolist()[:3] == [list(corner) for corner in band]
    assert [text.get_text()[:11] for text in legend.get_texts()] == ["a < b", "CTKD's figu"]
    assert figure.get_suptitle() == "pair" and (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "top-1")
    told = [element.text for element in ElementTree.fromstring(style.svg(figure, "name", "a pair")).iter()]
    assert {"a < b", "pair", "top-1", "a pair", "10.0", "30.0"} <= set(told)


def test_a_picture_is_the_same_each_time_and_small():
    runs = [([*range(1, 241)], [1 / 3 + epoch for epoch in range(240)])]
    first, second = (style.svg(draw_curves("pair", "top-1", [Curve("0.12345", LINE, runs)]), "n", "a") for _ in "12")
    assert first == second and "0.12345" in first and len(first) < 20_000
    assert not re.search(r"metadata|<[^>]*\.\d{3}|figure_1", first)
    other = style.svg(draw_curves("pair", "top-1", [Curve("0.12345", LINE, runs)]), "m", "a")
    ids = [set(re.findall(' id="(.*?)"', text)) for text in (first, other)]
    assert ids[0] and not ids[0] & ids[1]  # both may stand in a page


def test_a_method_has_one_colour_in_every_picture(results, tmp_path):
    write_run(results / "full/dkd", history(72.0), distill="dkd")
    write_run(results / "full/alone", history(69.0), distill=None)
    seen = {}
    for names in (["full", "few"], ["few"], ["full"]):
        groups = finished_groups(find_runs([results / name for name in names]))
        for figure in figures("s", groups, group_labels(groups)):
            axes, (legend,) = figure.drawing.axes[0], figure.drawing.legends
            if figure.leads:
                told = [(text.get_text(), line.get_color()) for text, line in zip(
                    axes.get_yticklabels(), axes.get_lines(), strict=False)]  # fmt: skip
            else:
                lines = zip(legend.get_texts(), legend.get_lines(), strict=False)
                told = [(text.get_text().split(":")[0], line.get_color()) for text, line in lines]
            for name, color in told:
                assert seen.setdefault(name, color) == color, name
    assert {seen["kd, tau 4"], seen["kd, ctkd-global"], seen["dkd+kd, tau 4"], seen["resnet20 alone, 240 epochs"]} == {
        style.COLOURS[name] for name in ("kd", "ctkd-global", "dkd", "alone")}  # fmt: skip


def test_curves_are_those_of_the_logs(results):
    runs = {run.label: run for run in find_runs([results / "full"])}
    groups = finished_groups(runs.values())
    for key, figure in zip(("top1", "tau_mean"), [figure for figure in figures("s", groups, group_labels(groups)) if not
                           figure.leads], strict=True):  # fmt: skip
        whole, *late = figure.drawing.axes
        lines = whole.get_lines()
        for end in late:
            assert [line.get_ydata().tolist() for line in end.get_lines()] == [
                line.get_ydata().tolist()[180:] for line in lines]  # fmt: skip
            assert end.get_xlim()[0] > 150 and "last quarter" in end.get_xlabel() and "enlarged" in end.get_ylabel()
        assert len(late) == (key == "top1")
        shown = {tuple(line.get_ydata().tolist()) for line in lines}
        logs = {tuple(record[key] for record in run.history if key in record) for run in runs.values()}
        assert shown == logs - {()} and all(line.get_xdata().tolist() == [*range(1, 241)] for line in lines)


def test_every_method_has_a_colour_of_its_own():
    assert style.COLOURS.keys() == {"alone", *distiller_dict, *temperature_dict} - {"fixed"}
    assert len(set(style.COLOURS.values())) == len(style.COLOURS)


def test_the_colour_of_a_method_from_elsewhere_is_its_own_and_stays(tmp_path, monkeypatch):
    write_run(tmp_path / "a", history(71.0), distill="someones")
    (run,) = find_runs([tmp_path])
    first = style.colour(run)
    assert first not in style.COLOURS.values() and len({*style.PLUGINS, *style.COLOURS.values()}) == 8 + len(
        style.COLOURS
    )
    monkeypatch.setitem(style.COLOURS, "a new one of ours", "#000001")
    assert style.colour(run) == first


def test_methods_within_the_noise_of_kd_are_thin(results):
    write_run(results / "full/dkd", history(75.0), distill="dkd")
    write_run(results / "full/pkt", history(70.7), distill="pkt")
    groups = finished_groups(find_runs([results / "full"]))
    (figure,) = [each for each in figures("s", groups, group_labels(groups)) if each.name.endswith("_top1")]
    (legend,) = figure.drawing.legends
    lines = zip(legend.get_texts(), legend.get_lines(), strict=True)
    thin = {text.get_text().split(",")[0] for text, line in lines if line.get_linewidth() == THIN}
    assert thin == {"pkt+kd"} and legend.get_title().get_text() == "last; thin: within KD's noise, 70.60 ± 0.50"


@pytest.mark.parametrize(("taus", "scale"), [((9.0, 3.0), "log"), ((4.0, 3.0), "linear"), ((9.0, -1.0), "linear")])
def test_a_tau_that_falls_fast_has_a_logarithmic_axis(pictures, tmp_path, taus, scale):
    first, *rest = history(70.0, epochs=5, tau=True)
    records = [record | {"tau_mean": tau} for tau, record in zip((taus[0], *taus[1:] * 4), (first, *rest), strict=True)]
    write_run(tmp_path / "a", records, temperature="ctkd-global", epochs=5)
    groups = finished_groups(find_runs([tmp_path]))
    (figure,) = [each for each in figures("s", groups, group_labels(groups)) if each.name.endswith("_tau")]
    (axes,) = figure.drawing.axes
    assert axes.get_yscale() == scale and ("logarithmic" in axes.get_ylabel()) == (scale == "log")
    ElementTree.fromstring(figure.svg)


def dots(figure):
    """The names, the values, and where the line and the band of a picture of dots are."""
    (axes,) = figure.axes
    *rows, line = axes.get_lines()
    names = [label.get_text() for label in axes.get_yticklabels()]
    values = {round(float(value), 2) for row in rows for value in row.get_xdata()}
    (band,) = axes.patches
    box = band.get_extents().transformed(axes.transData.inverted())
    return names, values, line.get_xdata()[0], (box.x0, box.width)


def test_the_picture_of_last_top1_marks_the_kd_of_the_same_teacher_and_recipe(tmp_path):
    few = {"epochs": 5, "lr_decay_epochs": [3, 4]}
    write_run(tmp_path / "kd-5", history(40.0, epochs=5), **few)
    write_run(tmp_path / "ctkd-5", history(41.0, epochs=5), temperature="ctkd-global", **few)
    write_run(tmp_path / "kd-tau2", history(70.0), kd_T=2.0)
    for seed, last in enumerate((71.0, 71.2, 71.6), 1):
        write_run(tmp_path / f"kd-tau4-{seed}", history(last), seed)
    write_run(tmp_path / "better", history(75.0), teacher_sha256="0123456789")
    write_run(tmp_path / "dkd", history(73.0), distill="dkd")
    groups = finished_groups(find_runs([tmp_path]))
    made = {figure.name: figure.drawing for figure in figures("s", groups, group_labels(groups)) if figure.leads}
    assert len(made) == 2  # a run is no picture
    names, values, line, (_, wide) = dots(made["s_resnet56_resnet20_1_last"])
    assert len(names) == 2 and line == 40.0 and values == {40.0, 41.0} and wide == pytest.approx(0)
    names, values, line, (start, wide) = dots(made["s_resnet56_resnet20_2_last"])
    assert [name.split(",")[1] for name in names] == [" tau 4", " tau 2", " tau 4"]  # KD at tau 4, KD at tau 2, DKD
    assert values == {70.0, 71.0, 71.2, 71.6, 73.0} and line == pytest.approx(213.8 / 3)  # a mean of three
    noise = statistics.significance_margin(groups, "last", 1, 3)
    assert (start, wide) == pytest.approx((line - noise, 2 * noise))


def test_several_data_sets_in_a_section_have_their_own_pictures(results):
    write_run(results / "few/digits", history(90.0, epochs=5), epochs=5, dataset="digits")
    made = {name for name in page.pages(results) if name.startswith("figures/few")}
    ends = [f"figures/few_{end}_top1" for end in ("digits_resnet56_resnet20", "cifar100_resnet110_resnet20")]
    assert made == {f"{name}.{form}" for name in ends for form in ("svg", "pdf")}


@pytest.mark.parametrize(("other", "pictures"), [("2:b", 1), ("b" * 64, 2)])
def test_runs_on_other_data_have_pictures_of_their_own(tmp_path, other, pictures):
    """Hashes by two versions of the formula do not show that the data differs."""
    alone = {"distill": None, "teacher": None, "data_sha256": "a" * 64}
    write_run(tmp_path / "alone", history(60.0), **alone)
    write_run(tmp_path / "kd", history(70.0), data_sha256="a" * 64)
    write_run(tmp_path / "ctkd", history(71.0), temperature="ctkd-global", data_sha256=other)
    groups = finished_groups(find_runs([tmp_path]))
    made = [figure for figure in figures("s", groups, group_labels(groups)) if figure.name.endswith("_top1")]
    assert [figure.svg.count("resnet20 alone") for figure in made if "resnet56" in figure.name] == [1, 0][:pictures]


def test_incomplete_logs_leave_out_what_they_do_not_have(tmp_path):
    write_run(tmp_path / "a/kd", [{"epoch": 240}])
    for seed, tau in ((1, True), (2, False)):
        write_run(tmp_path / f"a/ctkd-{seed}", history(70.0, tau=tau), seed, temperature="ctkd-global")
    made = page.pages(tmp_path)
    names = [f"figures/a_resnet56_resnet20_{end}" for end in ("top1", "tau")]
    assert made.keys() == {"README.md", "index.html", *(f"{name}.{form}" for name in names for form in ("svg", "pdf"))}


def test_dots_stand_where_their_values_are():
    rows = [("a < b", LINE, [10.0, 30.0]), ("n" * 100, LINE, [20.0])]
    figure = draw_dots("pair", "top-1", rows, 20.0, 5.0)
    names, values, line, band = dots(figure)
    assert names == ["a < b", "n" * (style.LONGEST - 1) + "…"] and values == {10.0, 20.0, 30.0}
    assert line == 20.0 and band == pytest.approx((15.0, 10.0))
    (axes,) = figure.axes
    first, second = (row.get_ydata().tolist() for row in axes.get_lines()[:2])
    assert (first, second) == ([0, 0], [1]) and axes.get_ylim() == (1.5, -0.5)  # the first row stands above
    assert len(draw_dots("pair", "top-1", rows).axes[0].get_lines()) == 2  # no line where nothing is marked
    figure.draw_without_rendering()
    assert axes.get_position().width > 0.3


def test_a_picture_of_one_value():
    figure = draw_curves("pair", "tau", [Curve("a", LINE, [([1], [4.0])])])
    assert figure.axes[0].get_lines()[0].get_marker() == "s"
    ElementTree.fromstring(style.svg(figure, "a", "a"))


def test_a_table_in_two_forms():
    table = Table(["pair", "n"], [["a|b <c>", "1"], [[Link("x", "y/z")], "20"], ["-0.40", "x"]])
    assert table.text() == "pair      n\n-------  --\na|b <c>   1\nx        20\n-0.40     x"
    assert table.markdown().splitlines() == [
        "| pair           |  n |", "|:---------------|---:|", r"| a\|b &lt;c&gt; |  1 |", "| [x](y/z)       | 20 |",
        "| -0.40          |  x |",
    ]  # fmt: skip


def test_tables_of_the_page(results):
    text = page.pages(results)["index.html"].decode()
    assert "<thead><tr><th scope=col class=left>pair</th>" in text and "<th scope=col>last</th>" in text
    row = re.search('<td data-name="pair" class="left">resnet56 → resnet20</td>\n?(.*?)</tr>', text, re.DOTALL)[1]
    assert (
        '<td data-name="method" class="left">kd, tau 4</td>' in row and '<td data-name="last">70.60 ± 0.10</td>' in row
    )
    links = '<a href="few/%3Cone%3E/log.jsonl">seed 1</a>, <a href="few/%3Cone%3E/config.json">'
    assert f'<td data-name="seeds" class="left">{links}' in text


def test_a_script_sorts_the_tables_and_without_it_nothing_is_missing(results):
    """What the script finds is there: tables in `.wide` with a heading and a body, columns of text marked `left`."""
    text = page.pages(results)["index.html"].decode()
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    assert "src=" not in script and "http" not in script
    assert all(word in script for word in ('".wide th"', '"left"', "aria-sort", "tBodies[0]", "addEventListener"))
    tables = re.findall(
        '<div class="wide" tabindex="0">\n<table>\n<thead>(.*?)</thead>\n<tbody>(.*?)</tbody>', text, re.DOTALL
    )
    assert len(tables) == text.count("<table") > 2 and "<button" not in text.replace(script, "")
    for heading, body in tables:
        rows = body.split("</tr>")[:-1]
        assert rows and {row.count("<td") for row in rows} == {heading.count("<th ")}


# --- notes


NOTES = r"""# Title

About **this** and `<script>`.

<script>alert(1)</script> [x](javascript:alert(1)) ![picture](http://far.away/x.png) <b>bold</b>

- [log](two/log.jsonl), [table](../README.md#few), [others](../full/notes.md), [code](../../code.py), [far](http://far.away)
  - inner

## Heading

```sh
<img src=x>
```

| a | b |
|---|--:|
| `x\|y` | <i> |
"""


def test_notes_are_shown_with_their_html_escaped(results):
    (results / "few/notes.md").write_text(NOTES)
    (results / "full/notes.md").write_text("# Full\n")
    made = {name: text.decode() for name, text in page.pages(results).items() if "figures/" not in name}
    told = Page()
    told.feed(made["index.html"])
    assert told.open == [] and told.seen.count("script") == 1 and not {"img", "b", "i"} & set(told.seen)
    assert {"strong", "code", "pre", "h4"} <= set(told.seen)
    assert {"few/two/log.jsonl", "#few", "#full", "../code.py", "http://far.away"} <= set(told.links)
    assert not any(link.startswith("javascript") for link in told.links)
    shown = made["README.md"]
    for line in ("About **this** and `<script>`.", "#### Heading", "```sh\n<img src=x>\n```", r"| `x\|y` | &lt;i&gt; |",
                 r"\[x\](javascript:alert(1)) \![picture](http://far.away/x.png) &lt;b&gt;bold&lt;/b&gt;", "  - inner",
                 "- [log](few/two/log.jsonl), [table](#few), [others](#full), [code](../code.py), [far]"):  # fmt: skip
        assert line in shown, line
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown and "<script>alert" not in "".join(made.values())


# --- sections


def test_folders_that_belong_together_share_a_section(tmp_path):
    for seed in (1, 2):  # directly below the folder, and seeds of one configuration
        write_run(tmp_path / f"save/kd_seed-{seed}", history(70.0 + seed), seed)
    write_run(tmp_path / "save/models/alone", history(69.0), distill=None)  # the baseline
    write_run(tmp_path / "save/more/kd_seed-3", history(73.0), 3)
    write_run(tmp_path / "save/short/run", history(40.0, epochs=5), epochs=5)
    for name in ("models", "short"):
        (tmp_path / "save" / name / "notes.md").write_text(f"# The {name}\n\nAbout {name}.")
    shown = page.pages(tmp_path / "save")["README.md"].decode()
    titles = re.findall("^## (.*)", shown, re.MULTILINE)
    assert titles[1:3] == ["The short", "The methods"] and sorted(titles[0].split(" and ")) == [
        "The models",
        "more",
        "save",
    ]
    assert "| 72.00 ± 1.00 |" in shown and "| +3.00 ± " in shown and "\n\nAbout models.\n\n" in shown
