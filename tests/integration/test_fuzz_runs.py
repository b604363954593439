"""Run folders with odd or damaged content: every report skips what it cannot read, and continues."""

import copy
import json
import math
import random
import shutil
from pathlib import Path

import pytest

import reproduce
from report import page
from report.comparison import report
from report.plot import plot_compare
from report.rows import SHORT, rows
from report.runs import find_runs

RESULTS = Path(reproduce.__file__).parent / "results/cifar100_40-epochs"
INTACT, ODD = (next(row for row in rows(SHORT) if row.method == method) for method in ("kd_tau-4", "kd_dtkd"))
VALUES = (
    None, True, 0, 1, -1, 3, 40, 0.5, -1e-320, 1e19, 1e308, 10**30, 10**400, math.nan, math.inf, -math.inf, "", "3",
    "kd", "cifar100", "\x1b[31mred\x07", "\u202egnp.exe", "\ud800", "\n\n# heading\n", "| a | b |", "$\\frac$", "_*`~",
    "<script>alert(1)</script>", '"><img src=x>', "[x](javascript:alert(1))", "/../../../OUT", "..", "é" * 300,
    [], [[]], [1, "a"], {}, {"a": None}, {"\x1b": {"<b>": [1]}},
)  # fmt: skip
DEEP = "[" * 100_000 + "]" * 100_000


def places(value, above=()):
    """Yield the path to every value in a JSON value."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*above, key)
        yield from places(value[key], (*above, key))


def changed(value, draw):
    """Return the value with something in it replaced, removed or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 2, 5))):
        if not (ways := list(places(value))):
            break
        *above, key = draw.choice(ways)
        parent = value
        for step in above:
            parent = parent[step]
        what = draw.random()
        if what < 0.8:
            parent[key] = draw.choice(VALUES)
        elif what < 0.9 or isinstance(parent, list):
            del parent[key]
        else:
            parent[str(draw.choice(VALUES))[:300]] = parent.pop(key)
    return value


def damaged(text, draw):
    """Return the bytes of a text, cut, shuffled or in another encoding."""
    at = draw.randrange(len(text))
    return draw.choice((
        lambda: text[:at].encode(), lambda: text[at:].encode(), lambda: b"\0" * 50 + text.encode(), lambda: b"",
        lambda: text.encode("utf-16"), lambda: text.encode("utf-8-sig"), lambda: b"\xff\xfe" + text.encode(),
        lambda: text.replace('"', "\xe9", 3).encode("latin-1"), lambda: (text[:at] + DEEP + text[at:]).encode(),
        lambda: DEEP.encode(), lambda: json.dumps(draw.choice(VALUES)).encode(), lambda: (text[:at] + text).encode(),
    ))()  # fmt: skip


def odd_run(folder, draw):
    """Write a run with an odd config.json or log.jsonl."""
    config = json.loads((RESULTS / "kd_dtkd_seed-1/config.json").read_text())
    log = [json.loads(line) for line in (RESULTS / "kd_dtkd_seed-1/log.jsonl").read_text().splitlines()]
    what = draw.random()
    if what < 0.5:
        config = changed(config, draw)
    elif what < 0.8:
        log[-1] = changed(log[-1], draw)  # the reports show this record
        log = changed(log, draw)
        draw.shuffle(log) if draw.random() < 0.2 else None
    texts = {"config.json": json.dumps(config, indent=2), "log.jsonl": "".join(json.dumps(each) + "\n" for each in log)}
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / "resnet8_last.pth").touch()
    for name, text in texts.items():
        (folder / name).write_text(text)
    if what >= 0.8:
        name = draw.choice(list(texts))
        (folder / name).write_bytes(damaged(texts[name], draw))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return a folder with an intact run, and room for an odd one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "rows", lambda table: [INTACT, ODD])
    shutil.copytree(RESULTS / "kd_tau-4_seed-1", INTACT.folder(1))
    monkeypatch.setattr("sys.argv", ["reproduce.py", SHORT, "--list"])
    return tmp_path


def outside(place, root):
    """Return all files except those of the pages below root."""
    made = {root / "README.md", root / "index.html", root / "figures"}
    return {path for path in place.rglob("*") if path not in made and path.parent not in made}


@pytest.mark.parametrize("part", [0, 1, *(pytest.param(part, marks=pytest.mark.full) for part in range(2, 12))])
def test_odd_runs_stop_no_report_and_reach_no_other_place(place, part, capsys, monkeypatch):
    monkeypatch.setattr(page, "pdf", lambda *given: f"/Producer ({given[-1]})".encode())  # drawing PDFs is slow
    root = Path("save/student_model")
    args, more = reproduce.parse_args()
    for seed in range(25 * part, 25 * (part + 1)):
        draw = random.Random(seed)
        odd_run(ODD.folder(1), draw)
        before = outside(place, place / root)
        try:
            runs = find_runs(["save"])
            told = [report(runs), report(runs, markdown=True), *reproduce.listed(args, more)]
            page.write_pages(root)
            if seed % 25 == 0:
                plot_compare([run for run in runs if run.history], place / "curves.png")
                (place / "curves.png").unlink()
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        assert INTACT.folder(1) in [run.folder for run in runs]
        pages = [(root / name).read_text() for name in ("README.md", "index.html")]
        assert all(text.replace("\n", "").isprintable() for text in (*told, *pages)), seed
        assert [text.count("<script") for text in pages] == [0, 1] and "<img" not in "".join(pages), seed
        assert outside(place, place / root) == before, seed
        capsys.readouterr()
