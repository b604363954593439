"""README.md and docs/: links, lengths, rows of tables, Python blocks and results; test_commands.py has the commands."""

import re
import warnings
from urllib.parse import unquote

import pytest
import torch
from common import ROOT

import dataset
import distiller_zoo
import models
import temperature
from distiller_zoo import distiller_dict
from models.base import Output
from options.flags import student_parser
from temperature import temperature_dict

README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
PLACES = ("*.md", "docs/*.md", "published/*.md", "results/**/*.md", "save/*.md", "tests/golden/*.md")
PAGES = sorted(path for place in PLACES for path in ROOT.glob(place))


def name_of(path):
    return str(path.relative_to(ROOT))


def prose(text):
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text):
    """Return the anchors of a page: of its headings, as GitHub makes them, and explicit ones."""
    found = re.findall(r'<a id="(.+?)">', text)
    for heading in re.findall(r"^#+ +(.+?) *$", prose(text), re.MULTILINE):
        shown = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


def broken_links(path, text):
    """Return the links of a page that lead to no file or to no heading."""
    broken = []
    for link in re.findall(r"\]\(([^()\s]+)\)", prose(text)):
        if re.match("https?://|mailto:", link):
            continue
        file, _, anchor = unquote(link).partition("#")
        target = path.parent / file if file else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(path):
    assert broken_links(path, path.read_text()) == []


def test_a_broken_link_is_noticed():
    text = "# A page\n## Two `words`, one\n[a](#two-words-one) [b](#two-words) [c](docs/none.md)\n```\n[d](none)\n```\n"
    assert anchors(text) == ["a-page", "two-words-one"]
    assert broken_links(README, f"{text}[e](docs/results.md#resuming) [f](docs/results.md#none)") == [
        "#two-words-one", "#two-words", "docs/none.md", "docs/results.md#none"]  # fmt: skip


def test_the_readme_links_to_every_page():
    assert set(re.findall(r"\((docs/[\w-]+\.md)", README.read_text())) == {name_of(path) for path in DOCS}


@pytest.mark.parametrize("path", [README, *DOCS], ids=name_of)
def test_a_page_is_short_and_begins_with_what_it_is_for(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= (150 if path == README else 199)
    assert lines[0].startswith("# ") and lines[1] == "" and re.match("[A-Z]", lines[2])


def missing_rows(page, text, names):
    """Return a sentence for each name without a row; `name` is a cell of its own."""
    rows = re.findall(r"\| `([a-z_-]+)` \|", text)
    return [f"{page} has no row for '{name}'" for name in names if name not in rows]


@pytest.mark.parametrize(
    ("page", "names"),
    [("README.md", [*distiller_dict, *temperature_dict]), ("docs/methods.md", distiller_dict),
     ("docs/temperatures.md", temperature_dict)],
)  # fmt: skip
def test_every_method_has_a_row(page, names):
    missing = missing_rows(page, (ROOT / page).read_text(), names)
    assert not missing, "; ".join(missing)


def test_a_missing_row_is_named_with_its_page():
    assert missing_rows("docs/methods.md", "| `kd` | x |\n", ["kd", "xyz"]) == ["docs/methods.md has no row for 'xyz'"]


@pytest.mark.parametrize("path", [README, *DOCS], ids=name_of)
def test_code_is_where_a_page_says(path):
    said = re.findall(r"((?:`[\w.]+`(?:, )?)+) in \[[^\]]+\]\((\S+?\.py)\)", path.read_text())
    assert said or path.name != "architecture.md"
    for names, file in said:
        code = (path.parent / file).read_text()
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^ *(def|class) {name}\b|^{name}( =|:)", code, re.MULTILINE), f"{name} in {file}"


def test_the_readmes_results_are_those_of_the_logs():
    logged = {}
    for line in (ROOT / "results/README.md").read_text().splitlines():  # made from the logs, see test_commands.py
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 11:
            pair, method, last, _, seeds, published, *_, epochs = cells
            logged[pair, method, epochs, seeds, last] = published.split(" [")[0]
    section = re.search(r"## Results so far\n(.*?)\n## ", README.read_text(), re.DOTALL)[1]
    told = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in section.splitlines() if "|" in line]
    assert len(told) > 3
    for *row, published in told[2:]:
        assert tuple(row) in logged, row
        assert published in (logged[tuple(row)], "–"), row


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", [README, *DOCS], ids=name_of)
def test_python_blocks_are_python(path):
    for block in python_blocks(path):
        compile(block, str(path), "exec")


def test_the_loop_of_ones_own_runs_and_moves_tau(capsys):
    (script,) = python_blocks("docs/own-loop.md")
    assert len(script.splitlines()) <= 30
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("error")
        exec(compile(script, "own-loop.md", "exec"), {"__name__": "__main__"})
    told = re.findall(
        r"^epoch (\d): loss ([\d.]+), tau ([\d.]+) \{'lambda': ([\d.]+)\}$", capsys.readouterr().out, re.M
    )
    epochs, losses, taus, lambdas = (list(map(float, column)) for column in zip(*told, strict=True))
    assert epochs == [1, 2, 3, 4, 5]
    assert losses[-1] < losses[0] and taus == sorted(taus) and taus[-1] > taus[0] + 0.1
    assert lambdas[0] == pytest.approx(0.0245, abs=1e-4) and lambdas[-1] == pytest.approx(0.5)


def test_the_loop_of_ones_own_without_start_epoch_says_so(capsys):
    (script,) = python_blocks("docs/own-loop.md")
    forgotten, count = re.subn(r"^    temperature\.start_epoch.*\n", "", script, flags=re.MULTILINE)
    assert count == 1
    with torch.random.fork_rng(), pytest.raises(UserWarning, match=r"call start_epoch\(epoch\)"):
        exec(compile(forgotten, "own-loop.md", "exec"), {"__name__": "__main__"})


@pytest.fixture
def registries():
    """Restore the dictionaries of names afterwards."""
    known = [models.model_dict, dataset.dataset_dict, temperature_dict, distiller_dict]
    copies = [dict(each) for each in known]
    yield
    for each, copy in zip(known, copies, strict=True):
        each.clear()
        each.update(copy)


def test_the_methods_that_need_one_class_for_each_image_are_named():
    page = (ROOT / "docs/command-line.md").read_text()
    sentence = re.search("compare with one class for each image: (.*?);", page, re.DOTALL)[1]
    takers = {**distiller_dict, **temperature_dict}
    assert set(re.findall("`(.+?)`", sentence)) == {name for name, taker in takers.items() if taker.uses_target}


def test_what_one_adds_is_registered_and_works(registries):
    for block in python_blocks("docs/extending.md"):
        try:
            exec(compile(block, "extending.md", "exec"), {"__name__": "added"})
        except ModuleNotFoundError as error:  # a package that is not a requirement
            assert not (ROOT / error.name.split(".")[0]).exists() and error.name != "inputs"
    features, logits = models.create_model("MyNet", 7)(torch.randn(2, 3, 32, 32), is_feat=True)
    assert [each.shape[1] for each in features] == [16, 32, 64, 64] and logits.shape == (2, 7)
    images = dataset.dataset_dict["mine"]()
    assert len(images.train_images) == 100 and len(images.val_images) == 20
    logits = torch.tensor([[1.0, 5.0], [-3.0, -2.0]])
    assert temperature.create_temperature("sharper", least=2.0)(logits, logits).student.tolist() == [[5], [2]]
    assert "--least" in student_parser().format_help()
    student, teacher = Output([torch.zeros(2, 3)], logits), Output([torch.ones(2, 3)], logits)
    pooled = distiller_zoo.create_distiller("pooled")
    assert pooled(student, teacher, None, None, None)["pooled"].item() == 1
