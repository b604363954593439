"""compare.py with runs of detectors: tables, gains, pages and curves, and the numbers published for COCO."""

import json
import re
from pathlib import Path
from statistics import fmean, stdev

import pytest
from common import history, write_run
from matplotlib.figure import Figure
from torchvision.models import get_model_weights, list_models

import published
from models.detector_files import COCO_WEIGHTS
from models.detector_names import DETECTORS
from report import comparison, detector_rows, page, plot
from report.comparison import finished_groups, plotted, report
from report.figures import figures
from report.runs import find_runs, group_labels, group_runs

ROOT = Path(published.__file__).parents[1]
PROTOCOL = {
    "iterations": 120, "eval_every": 40, "batch_size": 8, "learning_rate": 0.02, "lr_steps": [96], "lr_decay_rate": 0.1,
    "warmup_iters": 20, "momentum": 0.9, "weight_decay": 1e-4, "clip_grad": 10.0, "min_sizes": [96], "max_size": 96,
    "test_size": 96, "rois": 32, "norm": "trained", "trainable_layers": 5, "keep_empty": False, "kd_warmup_iters": 20,
}  # fmt: skip


def write_detector(folder, last, best=0.0, seed=1, distill="kd", temperature="fixed", dataset="shapes", **more):
    """Write a run of three parts whose last APs are `last` and, at two IoU thresholds, `last` + 20 and + 10."""
    folder.mkdir(parents=True)
    config = {
        "kind": "detector", "dataset": dataset, "model": more.pop("model", "faster_rcnn_tiny"),
        "teacher": more.pop("teacher", "faster_rcnn_tiny_wide") if distill else None, "distill": distill,
        "temperature": temperature if distill else None, "seed": seed, "epochs": 3,
    }  # fmt: skip
    if distill:
        config["teacher_ap"] = 51.375
    own = {"seed": seed, "alpha": float(distill == "kd"), "beta": 0.0, "kd_T": 1.0, "temperature": temperature}
    config["options"] = PROTOCOL | own | more
    records = []
    for part, ap in enumerate((last / 2, max(best, last / 2), last), 1):
        found = {"ap": ap, "ap50": ap + 20, "ap75": ap + 10, "ap_small": ap + 1, "ap_medium": ap + 2}
        tau = {"tau_mean": 1.0 + part * (temperature != "fixed")} if distill else {}
        records.append({"epoch": part, "iteration": 40 * part, "train_top1": 80.0} | found | tau)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Return three configurations of detectors with two seeds each."""
    for seed, change in ((1, -0.5), (2, 0.5)):
        write_detector(tmp_path / f"d/alone-{seed}", 20 + change, seed=seed, distill=None)
        write_detector(tmp_path / f"d/kd-{seed}", 22 + change, best=30.0, seed=seed)
        write_detector(tmp_path / f"d/ctkd-{seed}", 24 + change, seed=seed, temperature="ctkd-global")
    return find_runs([tmp_path])


def rows_of(table):
    """Return the rows of a table as dicts of their cells by column."""
    return [dict(zip(table.heading, row, strict=True)) for row in table.rows]


def tables(runs):
    groups = finished_groups(runs)
    return comparison.tables_of(groups, group_labels(groups), comparison.Footnotes())


def test_a_row_has_the_mean_and_spread_of_each_average_precision(runs):
    results, *_ = tables(runs)
    alone, kd, ctkd = rows_of(results)
    assert (alone["method"], kd["method"], ctkd["method"]) == ("alone", "kd, tau 1", "kd, ctkd-global")
    lasts = [21.5, 22.5]
    for column, more in (("AP last", 0), ("AP50", 20), ("AP75", 10), ("APs", 1), ("APm", 2)):
        assert kd[column] == f"{fmean(lasts) + more:.2f} ± {stdev(lasts):.2f}"
    assert kd["AP best (on test)"] == "30.00 ± 0.00"
    assert (kd["APl"], kd["n"], kd["teacher"], kd["steps"]) == ("–", "2", "51.38", "120")
    assert (alone["pair"], alone["teacher"], alone["AP last"]) == ("faster_rcnn_tiny", "–", "20.00 ± 0.71")
    assert not {"verdict", "published", "Δ last"} & set(results.heading)


def test_gains_are_over_the_student_alone_and_over_kd_at_tau_1(runs):
    _, gains = tables(runs)
    told = [(row["method"], row["over"], row["gain last"].split(" ± ")[0]) for row in rows_of(gains)]
    assert told == [
        ("kd, tau 1", "alone", "+2.00"), ("kd, ctkd-global", "alone", "+4.00"),
        ("kd, ctkd-global", "kd, tau 1", "+2.00"),
    ]  # fmt: skip
    assert gains.heading[-1] == "steps" and rows_of(gains)[0]["steps"] == "120"


@pytest.mark.parametrize(
    "other", [{"clip_grad": 0.0}, {"lr_steps": [90]}, {"iterations": 121}, {"rois": 64}, {"kd_warmup_iters": 0}]
)
def test_kd_of_another_recipe_is_no_baseline(other, tmp_path):
    write_detector(tmp_path / "kd", 22.0, **other)
    write_detector(tmp_path / "ctkd", 24.0, temperature="ctkd-global")
    assert len(tables(find_runs([tmp_path]))) == 1
    write_detector(tmp_path / "same", 21.0)
    gains = rows_of(tables(find_runs([tmp_path]))[1])
    assert [row["gain last"] for row in gains if "ctkd" in row["method"]] == ["+3.00 (noise unknown)"]


def test_a_distiller_without_kd_is_compared_with_kd_and_told_apart_by_its_weights(runs, tmp_path):
    write_detector(tmp_path / "d/at", 23.0, distill="at", beta=1000.0)
    gains = rows_of(tables(find_runs([tmp_path]))[1])
    assert ("at, tau 1", "kd, tau 1 (other weights)", "+1.00") in [
        (row["method"], row["over"], row["gain last"].split(" ± ")[0]) for row in gains
    ]


def test_seeds_form_a_group_and_what_changes_a_result_parts_them(tmp_path):
    for seed in (1, 2):
        write_detector(tmp_path / f"seed-{seed}", 20.0, seed=seed, run_dir=f"somewhere/{seed}", data_dir=f"{seed}")
    assert [len(group) for group in group_runs(find_runs([tmp_path]))] == [2]
    write_detector(tmp_path / "other", 20.0, seed=3, clip_grad=0.0)
    assert sorted(len(group) for group in group_runs(find_runs([tmp_path]))) == [1, 2]


def test_the_screen_explains_detectors_only_if_there_are_any(runs, tmp_path):
    assert detector_rows.LEGEND in report(runs) and comparison.LEGEND not in report(runs)
    explained = report(runs, markdown=True)
    assert detector_rows.EXPLANATION in explained and comparison.EXPLANATION not in explained
    write_run(tmp_path / "c/one", history(71.0))
    classifiers = report(find_runs([tmp_path / "c"]), markdown=True)
    assert comparison.EXPLANATION in classifiers and "AP50" not in classifiers
    both = report(find_runs([tmp_path]), markdown=True)
    assert comparison.EXPLANATION in both and detector_rows.EXPLANATION in both
    assert "mem" not in both  # published numbers are for COCO


def test_an_unfinished_run_and_one_without_a_protocol_are_told(tmp_path):
    folder = write_detector(tmp_path / "d/one", 20.0)
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(lines[:2]))
    odd = write_detector(tmp_path / "d/odd", 20.0)
    config = json.loads((odd / "config.json").read_text())
    config["options"] = {"distill": "kd"}
    (odd / "config.json").write_text(json.dumps(config))
    text = report(find_runs([tmp_path]), explain=True)
    assert "unfinished (2/3 parts)" in text and "None" in text
    assert page.protocol(find_runs([odd])[0]) == "not fully recorded in config.json"


def test_a_value_of_another_kind_leaves_the_run_out(tmp_path, capsys):
    write_detector(tmp_path / "good", 20.0)
    for key, value in (("iterations", "many"), ("lr_steps", 3), ("clip_grad", []), ("teacher_ap", "x")):
        write_detector(tmp_path / f"odd-{key}", 20.0, seed=2, **{key: value})
    assert [run.folder.name for run in find_runs([tmp_path])] == ["good"]
    assert capsys.readouterr().err.count("is left out") == 4


# ---------------------------------------------------------------- pages and figures


def test_the_pages_have_a_section_of_detectors(runs, tmp_path, no_pictures):
    made = page.pages(tmp_path)["README.md"].decode()
    assert "[d](#d): shapes, 120 steps, finished runs: 6" in made
    assert (
        "Protocol: shapes, 120 steps of 8 images, learning rate 0.02, rising over 20 steps, times 0.1 after steps 96,"
        " momentum 0.9, weight decay 0.0001, gradient clipped at a norm of 10; short sides 96" in made
    )
    assert "Noise of faster_rcnn_tiny on shapes, all images, 120 steps: seeds spread by 0.71" in made
    assert re.search(r"\| kd, tau 1 +\|.*22\.00 ± 0\.71", made) and re.search(r"\| kd, tau 1 +\| 1, 1, 0 \|", made)
    assert detector_rows.EXPLANATION in made and comparison.EXPLANATION not in made


def test_pages_of_classifiers_do_not_change_by_what_detectors_add(tmp_path, no_pictures):
    write_run(tmp_path / "c/one", history(71.0))
    made = page.pages(tmp_path)["README.md"].decode()
    assert made.count(comparison.EXPLANATION) == 1
    assert "AP" not in re.sub("API|MAP", "", made) and "steps" not in made


def test_figures_show_average_precision_by_part(runs):
    groups = finished_groups(runs)
    drawn = {figure.name: figure for figure in figures("d", groups, group_labels(groups))}
    pair = "d_faster_rcnn_tiny_wide_faster_rcnn_tiny"
    assert list(drawn) == ["d_alone_ap", f"{pair}_last", f"{pair}_ap", f"{pair}_tau"]
    (axes,) = drawn[f"{pair}_ap"].drawing.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("part", "AP (%)")
    assert sorted(line.get_ydata()[-1] for line in axes.lines) == [19.5, 20.5, 21.5, 22.5, 23.5, 24.5]
    assert drawn[f"{pair}_tau"].drawing.axes[0].get_ylabel().startswith("tau, mean of a part")


def test_plot_draws_average_precision(runs, monkeypatch):
    kept = []
    monkeypatch.setattr(plot, "save", lambda figure, path: kept.append(figure))
    plot.plot_compare(plotted(runs), "x.png")
    plot.plot_run(runs[0].history, "a run", "y.png")
    several, single = kept
    assert isinstance(several, Figure) and several.axes[0].get_ylabel() == "average precision (%)"
    assert len(several.axes[0].lines) == 6 and several.axes[-1].get_xlabel() == "part"
    assert single.axes[-1].get_xlabel() == "part"


# ---------------------------------------------------------------- published numbers


def test_cocos_numbers_stand_below_the_runs_with_their_marks_and_without_a_verdict(tmp_path):
    pair = {"model": "faster_rcnn_ResNet18", "teacher": "faster_rcnn_ResNet101", "dataset": "coco"}
    write_detector(tmp_path / "dkd", 35.0, distill="dkd", beta=1.0, **pair)
    results, known = tables(find_runs([tmp_path]))
    assert "verdict" not in results.heading
    rows = {row["method"]: row for row in rows_of(known)}
    assert list(rows) == ["alone", "KD", "ReviewKD", "DKD", "DKD+ReviewKD"]
    assert rows["DKD"] == {
        "pair": "faster_rcnn_ResNet101 → faster_rcnn_ResNet18", "method": "DKD", "AP": "35.05", "AP50": "56.60",
        "AP75": "37.54", "APs": "–", "APm": "–", "APl": "–", "mark": "mem",
        "published by": "DKD's and ReviewKD's tables",
    }  # fmt: skip
    assert rows["ReviewKD"]["AP75"] == "–" and {row["mark"] for row in rows.values()} == {"mem"}
    text = report(find_runs([tmp_path]), markdown=True)
    assert detector_rows.PUBLISHED_EXPLANATION in text and "within noise" not in text
    assert not comparison.find_published(find_runs([tmp_path])[0])


def test_a_detector_without_published_numbers_has_no_such_table(tmp_path):
    write_detector(tmp_path / "one", 20.0, distill=None, dataset="coco", model="faster_rcnn_ResNet34")
    assert len(tables(find_runs([tmp_path]))) == 1


def test_the_published_rows_are_well_formed():
    content = published.coco()
    assert {row["mark"] for row in content["rows"]} == set(content["marks"]) == {"code", "author", "mem"}
    assert {row["source"] for row in content["rows"]} == set(content["sources"])
    for row in content["rows"]:
        numbers = {key: row[key] for key in detector_rows.AP_NAMES if key in row}
        assert numbers and all(10 < value < 70 for value in numbers.values())
        assert row.keys() - numbers.keys() <= {"teacher", "student", "method", "source", "mark"}
        assert (row["mark"] == "mem") == row["source"].startswith("mdistiller")
        assert "teacher" not in row or {row["teacher"], row["student"]} <= set(DETECTORS)
    lines = (ROOT / "published/coco.json").read_text().splitlines()
    assert sum("student" in line for line in lines) == len(content["rows"])


def test_torchvisions_numbers_are_those_of_its_weights():
    rows = [row for row in published.coco()["rows"] if row["source"] == "torchvision"]
    known = {*list_models()}
    assert len(rows) == 11
    for row in rows:
        name = COCO_WEIGHTS.get(row["student"], row["student"])
        assert name in known
        weights = get_model_weights(name)
        metrics = (weights.COCO_V1 if hasattr(weights, "COCO_V1") else weights.DEFAULT).meta["_metrics"]
        assert metrics["COCO-val2017"]["box_map"] == row["ap"]


def test_every_published_number_is_in_the_document_with_its_mark():
    text = (ROOT / "docs/detection.md").read_text().split("## Published numbers")[1]
    shown = {
        mark: set(re.findall(r"\d+\.\d+", " ".join(line for line in text.splitlines() if line.endswith(f"`{mark}` |"))))
        for mark in published.coco()["marks"]
    }
    for row in published.coco()["rows"]:
        digits = 2 if row["mark"] == "mem" else 1
        for key in detector_rows.AP_NAMES.keys() & row.keys():
            assert f"{row[key]:.{digits}f}" in shown[row["mark"]], row
    counted = {mark: sum(row["mark"] == mark for row in published.coco()["rows"]) for mark in shown}
    assert counted == {"code": 30, "author": 1, "mem": 13}
