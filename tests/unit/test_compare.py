"""compare.py and its parts: reading runs, the published tables, the verdicts, the plots."""

import errno
import functools
import io
import json
import math
import os
import re
import sys
from pathlib import Path
from statistics import fmean, stdev, variance

import pytest
from common import history, write_run
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy import stats

import compare
import published
from helper.errors import RunError
from inputs import UserError
from options.identity import neutral_options
from report import comparison, page, plot, statistics
from report.comparison import find_published
from report.plot import plot_compare, plot_run
from report.runs import Run, find_runs, group_labels, group_runs

ROOT = Path(compare.__file__).parent
REFERENCE = Path(__file__).resolve().parents[3] / "shared/reference/published_tables.json"


def cells(text, *words):
    """Return the cells of the only table line that has all these words."""
    (line,) = [line for line in text.splitlines() if line.startswith("|") and all(word in line for word in words)]
    return [cell.strip() for cell in line.strip("|").split("|")]


# --- reading runs


def test_runs_are_found_below_a_folder_with_last_and_best(tmp_path, capsys):
    write_run(tmp_path / "a/b/one", history(71.0, 71.6))
    write_run(tmp_path / "two", history(70.0), temperature="ctkd-global")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/config.json").write_text("{}")  # without a log it is not a run
    one, two = find_runs([tmp_path, tmp_path / "two"])
    assert (one.last, one.best, one.finished, one.epochs) == (71.0, 71.6, True, 240)
    assert one.label == "resnet56 → resnet20, kd, tau 4"
    assert two.label == "resnet56 → resnet20, kd, ctkd-global"
    assert capsys.readouterr().err == ""


def test_a_truncated_line_is_left_out_with_one_warning(tmp_path, capsys):
    folder = write_run(tmp_path / "run", history(71.0)[:200])
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"epoch": 201, "top1": 7')
    (run,) = find_runs([tmp_path])
    assert (run.epochs, run.finished, run.last) == (200, False, 50.0)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "line 201" in warning


@pytest.mark.parametrize("line", ["17", "[]", '{"top1": 3}', '{"epoch": null}', '{"epoch": Infinity}', "\0\0"])
def test_a_line_that_is_no_record_is_left_out(tmp_path, capsys, line):
    folder = write_run(tmp_path / "run", history(71.0))
    with open(folder / "log.jsonl", "a") as file:
        file.write(line + "\n")
    (run,) = find_runs([tmp_path])
    assert run.finished and run.last == 71.0
    assert "line 241 is left out" in capsys.readouterr().err


def test_a_damaged_config_leaves_out_that_run_only(tmp_path, capsys):
    write_run(tmp_path / "good", history(71.0))
    for name, text in (("half", '{"kind": "stu'), ("list", "[1]"), ("odd", '{"options": 3}')):
        (write_run(tmp_path / name, history(71.0)) / "config.json").write_text(text)
    assert [run.folder.name for run in find_runs([tmp_path])] == ["good"]
    assert capsys.readouterr().err.count("\n") == 3


@pytest.mark.parametrize(("told", "why"), [
    ({"distill": []}, "distill in its config.json is not a short text"),
    ({"seed": []}, "seed .* is not a whole number"), ({"seed": True}, "seed"), ({"epochs": 240.5}, "epochs"),
    ({"momentum": "3"}, "momentum .* is not a number"), ({"alpha": math.nan}, "alpha"), ({"kd_T": 10**400}, "kd_T"),
    ({"learning_rate": -math.inf}, "learning_rate"), ({"logit_stand": 1}, "logit_stand .* is not true or false"),
    ({"lr_decay_epochs": 3}, "lr_decay_epochs"), ({"lr_decay_epochs": ["3"]}, "lr_decay_epochs"),
    ({"machine": []}, None), ({"machine": None}, None), ({"machine": {"processor": None, "threads": None}}, None),
    ({"machine": [1]}, "no machine"), ({"machine": {"gpus": [None]}}, "gpus .* is not a list of short texts"),
    ({"machine": {"threads": "1"}}, "threads"), ({"model": "m" * 10**6}, "model"), ({"teacher": {}}, "teacher"),
    ({"teacher_top1": "72"}, "teacher_top1"), ({"processes": None}, None), ({"image_size": "x"}, "image_size"),
    ({"further": [[[[]]]]}, None), ({"further": 10**400}, None), ({"further": math.nan}, None),
    ({"further": functools.reduce(lambda inner, _: [inner], range(50), 0)}, "nested too deeply"),
])  # fmt: skip
def test_a_config_with_a_value_of_another_kind_leaves_out_that_run_only(tmp_path, capsys, told, why, no_pictures):
    write_run(tmp_path / "s/good", history(71.0))
    write_run(tmp_path / "s/odd", history(71.0), **{"seed": 2} | told)
    runs = find_runs([tmp_path])
    assert [run.folder.name for run in runs] == ["good", "odd"][: 1 + (why is None)]
    comparison.report(runs)
    page.pages(tmp_path)
    said = capsys.readouterr().err
    assert re.fullmatch(f"warning: .*odd is left out: .*{why}.*\n", said) if why else said == ""


@pytest.mark.parametrize(
    "text",
    ["[" * 10**5 + "]" * 10**5, '{"a":' * 10**5, "null", "[]", '"kind"', "\ud800", " " * 2**21 + "{}", "9" * 5000],
    ids=range(8),
)
def test_what_is_no_config_leaves_out_that_run_only(tmp_path, capsys, text):
    write_run(tmp_path / "good", history(71.0))
    (write_run(tmp_path / "odd", history(71.0)) / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    assert [run.folder.name for run in find_runs([tmp_path])] == ["good"]
    assert re.fullmatch("warning: .*odd is left out: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["config.json", "log.jsonl"])
def test_pipes_and_devices_are_left_out(tmp_path, capsys, name):
    kinds = {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": Path.mkdir}
    for kind, make in kinds.items():
        path = write_run(tmp_path / kind, history(71.0)) / name
        path.unlink()
        make(path)
    write_run(tmp_path / "good", history(71.0))
    assert [run.folder.name for run in find_runs([tmp_path])] == ["good"]
    assert capsys.readouterr().err.count("is no regular file") >= 2


def test_runs_are_found_beside_folders_that_are_nested_deep_or_closed(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", history(71.0))
    (tmp_path / "round").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for _ in range(2500):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(tmp_path)
    try:
        assert [run.folder for run in find_runs([tmp_path])] == [folder]
    finally:
        for _ in range(2500):  # too deep for shutil, with which pytest cleans up
            os.chdir("d")
        for _ in range(2500):
            os.chdir("..")
            os.rmdir("d")


def test_what_a_terminal_would_obey_is_not_shown(tmp_path, capsys):
    odd = "\x1b[31m\u202e\ud800\r\n\x07"
    folder = tmp_path / "a\x1b[2Jb\n"
    write_run(folder, history(71.0)[:3], teacher=odd, machine={"gpus": [odd]}, further=odd, **{odd: odd})
    write_run(tmp_path / "odd\x1b", [], model=[])
    runs = find_runs([tmp_path])
    told = comparison.report(runs, explain=True) + comparison.report(runs, markdown=True) + capsys.readouterr().err
    assert told.replace("\n", "").isprintable() and told.count("\n") == len(told.splitlines())
    assert "�[31m���→" in "".join(told.split()) and "/a�[2Jb" in "".join(told.split())


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, -1e300, True, "99", None, [99]])
def test_what_is_no_number_of_a_log_does_not_count(tmp_path, value, no_pictures):
    records = history(71.0, tau=True)
    records[10] |= {"top1": value, "tau_mean": value, "seconds": value}
    write_run(tmp_path / "s/run", records)
    write_run(tmp_path / "s/other", history(72.0, tau=True), 2)
    runs = find_runs([tmp_path])
    assert [run.best for run in runs] == [72.0, 71.0] and "top1" not in runs[1].history[10]
    told = "".join(made.decode() for name, made in page.pages(tmp_path).items() if not name.endswith(".pdf"))
    assert "nan" not in comparison.report(runs, explain=True) + told


@pytest.mark.parametrize("epoch", [-1, 0, 10**400, 1e9, 3.5, "3", True, math.nan])
def test_what_is_no_epoch_is_no_record(tmp_path, epoch, capsys):
    write_run(tmp_path / "run", [*history(71.0), {"epoch": epoch, "top1": 99.0}, {"epoch": epoch, "top1": 98.0}])
    (run,) = find_runs([tmp_path])
    assert (run.last, run.best, run.damaged, len(run.history)) == (71.0, 71.0, 2, 240)
    assert capsys.readouterr().err.count("\n") == 1  # one line per log, not per line of it


def test_an_epoch_logged_twice_counts_once(tmp_path):
    write_run(tmp_path / "run", [*history(75.0)[:239], {"epoch": 240, "top1": 99.0}, *history(71.0)[200:]])
    (run,) = find_runs([tmp_path])
    assert (run.last, run.best, len(run.history)) == (71.0, 71.0, 240)


def test_missing_values_never_crash(tmp_path):
    for name, config, log in (
        ("empty", "{}", ""),
        ("bare", '{"epochs": 1}', '{"epoch": 1}\n'),
        ("nan", '{"epochs": 1, "distill": "kd", "options": {"kd_T": null}}', '{"epoch": 1, "top1": NaN}\n'),
        ("nulls", '{"epochs": 1, "dataset": null, "model": "resnet20", "distill": "pkt"}', '{"epoch": 1, "top1": 3}\n'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        (tmp_path / name / "log.jsonl").write_text(log)
    runs = find_runs([tmp_path])
    assert len(runs) == 4
    for markdown in (False, True):
        text = comparison.report(runs, markdown, explain=True)
        assert "unfinished (0/? epochs)" in text
        assert text.count("none published") == 3 and "nan" not in text
    plot_compare(comparison.plotted([run for run in runs if run.option("distill") == "pkt"]), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


# --- which runs repeat one another


def test_seed_names_and_places_do_not_part_runs_but_alpha_does(tmp_path):
    for seed in (1, 2, 3):
        write_run(
            tmp_path / f"fold-{seed}", history(71.0), seed,
            trial=str(seed), path_t=f"/t{seed}", device=f"cuda:{seed}", data_dir=f"d{seed}", num_workers=seed,
        )  # fmt: skip
    write_run(tmp_path / "other", history(71.0), alpha=0.5)
    groups = group_runs(find_runs([tmp_path]))
    assert [len(group) for group in groups] == [3, 1]
    assert group_labels(groups) == ["kd, tau 4", "kd, tau 4, alpha 0.5"]
    assert group_labels(groups[:1]) == ["kd, tau 4"]


@pytest.mark.parametrize(
    "other",
    [{"model": "resnet32"}, {"teacher": "resnet110"}, {"temperature": "ctkd-global"}, {"kd_T": 3.0},
     {"batch_size": 128}, {"epochs": 200}, {"train_subset": 5000},
     {"teacher_sha256": "ab"}, {"dataset": "digits"}, {"distill": "dkd"}],
)  # fmt: skip
def test_what_changes_a_result_parts_runs(tmp_path, other):
    write_run(tmp_path / "a", history(71.0))
    write_run(tmp_path / "b", history(71.0), **other)
    assert len(group_runs(find_runs([tmp_path]))) == 2


OLD, NEW = "a" * 64, "2:" + "b" * 64  # hashes of the data by two versions of the formula


def parted(tmp_path, *hashes):
    """Return the number of runs in each group, and the labels, for runs with these hashes."""
    for seed, data in enumerate(hashes, 1):
        write_run(tmp_path / f"{seed}", history(70.0), seed, data_sha256=data)
    groups = group_runs(find_runs([tmp_path]))
    return sorted(len(group) for group in groups), group_labels(groups)


@pytest.mark.parametrize("hashes", [(OLD, NEW), (OLD, NEW, OLD, NEW), (None, OLD, NEW), (None, NEW)])
def test_hashes_of_two_versions_part_no_runs_and_are_in_no_label(tmp_path, hashes):
    assert parted(tmp_path, *hashes) == ([len(hashes)], ["kd, tau 4"])


def test_hashes_of_one_version_part_runs_and_tell_them_apart(tmp_path):
    sizes, labels = parted(tmp_path, NEW, "2:c", NEW)
    assert sizes == [1, 2] and sorted(labels) == ["kd, tau 4, data_sha256 2:" + "b" * 14, "kd, tau 4, data_sha256 2:c"]


def test_where_one_version_shows_two_data_sets_every_hash_parts_runs(tmp_path):
    """It is unknown which of the two the third hash belongs to."""
    sizes, labels = parted(tmp_path, OLD, NEW, "c" * 64, NEW, OLD, None)
    assert sizes == [1, 1, 2, 2]
    assert sorted(label.removeprefix("kd, tau 4, data_sha256 ") for label in labels) == [
        "2:" + "b" * 14, "None", "a" * 16, "c" * 16,
    ]  # fmt: skip


def test_hashes_of_two_versions_hinder_no_gain_and_those_of_one_do(tmp_path):
    alone = {"distill": None, "teacher": None}
    write_run(tmp_path / "kd", history(70.0), data_sha256=OLD)
    write_run(tmp_path / "ctkd", history(71.0), temperature="ctkd-global", data_sha256=NEW)
    write_run(tmp_path / "dtkd", history(72.0), temperature="dtkd", data_sha256="c" * 64)  # different data from kd's
    write_run(tmp_path / "alone", history(65.0), **alone, data_sha256=NEW)
    text = comparison.report(find_runs([tmp_path]), markdown=True)
    assert cells(text, "| kd, ctkd-global ", "| alone ")[3] == "+6.00 (noise unknown)"
    assert not any("| kd, dtkd " in line and "| kd, tau 4 " in line for line in text.splitlines())
    assert cells(text, "| kd, ctkd-global ", "| kd, tau 4 ")[3] == "+1.00 (noise unknown)"


def test_the_seed_is_not_neutral():
    """A run with another seed is another run: it must not be resumed in the same folder."""
    assert "seed" not in neutral_options()
    assert {"path_t", "device", "experiments_name", "print_freq"} <= neutral_options()


# --- the published tables


@pytest.mark.parametrize(
    ("teacher", "student", "distill", "temperature", "top1", "std", "source"),
    [
        ("resnet56", "resnet20", "kd", "fixed", 70.66, None, "S00"),
        ("resnet56", "resnet20", "kd", "ctkd-global", 71.19, None, "S00"),
        ("resnet56", "resnet20", "kd", "rlkd", 71.40, None, "S09"),
        ("resnet56", "resnet20", "pkt", "fixed", 70.85, 0.22, "S01"),
        ("resnet56", "resnet20", "pkt", "ctkd-global", 71.16, 0.08, "S01"),
        ("resnet56", "resnet20", "dkd", "fixed", 71.43, 0.13, "S01"),
        ("resnet56", "resnet20", "dkd", "ctkd-global", 71.65, 0.24, "S01"),
        ("resnet56", "resnet20", "crd", "rlkd", 72.29, None, "S08"),
        ("vgg13", "vgg8", "dkd", "fixed", 74.68, None, "S14"),
        ("ResNet50", "MobileNetV2", "kd", "ctkd-global", 68.47, None, "S00"),
        ("resnet32x4", "resnet8x4", "kd", "ctkd-global", 73.39, None, "S06"),
        ("resnet14", "resnet8", "kd", "fixed", 59.10, None, "S04"),
        ("resnet14", "resnet8", "kd", "dtkd", 62.87, None, "S04"),
        ("resnet56", "resnet20", "kd", "standardised", 71.43, None, "S06"),
        ("vgg13", "vgg8", "dkd", "standardised", 74.69, None, "E08"),
        ("vgg13", "vgg8", "kd", "ttm", 74.33, None, "E02"),
        ("wrn_40_2", "wrn_16_2", "crd", "wttm", 76.61, None, "E02"),
        ("resnet56", "resnet20", "dist", "fixed", 71.75, 0.3, "E01"),
        ("vgg13", "vgg8", "cat_kd", "fixed", 74.65, None, "S06"),
        ("vgg13", "vgg8", "mlkd", "fixed", 75.18, None, "S06"),
        ("resnet56", "resnet20", "kd", "ctkd-global on z-scores", 71.34, None, "S06"),
        ("resnet56", None, None, "fixed", 72.34, None, "S05"),
        (None, "resnet56", None, "fixed", 72.34, None, "S05"),
        ("resnet56", "resnet20", None, "fixed", 69.06, None, "S05"),
        (None, "ShuffleV1", None, "fixed", 70.50, None, "S05"),
        (None, "resnet8", None, "fixed", 59.87, None, "S04"),
    ],
)
def test_published_numbers(teacher, student, distill, temperature, top1, std, source):
    record = published.lookup("cifar100", teacher, student, distill, temperature)[0]
    assert (record["top1"], record.get("std"), record["source_id"]) == (top1, std, source)


def test_lookup_by_temperature_and_kd_term():
    def tops(distill, **more):
        found = published.lookup("cifar100", "wrn_40_2", "wrn_40_1", distill, **more)
        return [(record["top1"], record["source_id"]) for record in found]

    assert tops("kd", kd_T=3.6) == [(73.67, "S03")]
    assert tops("kd", kd_T=7.0) == [] == tops("kd", kd_T=None)
    assert tops("kd")[0] == (73.54, "S00") and (73.54, "S05") in tops("kd")
    assert tops("pkt", kd_term=True) == [(74.01, "S01")]
    assert tops("pkt", kd_term=False) == [(73.45, "S05")]
    assert tops("pkt") == [(74.01, "S01"), (73.45, "S05")]
    assert tops("kd", temperature="ctkd-instance") == []
    assert published.lookup("cifar100", "resnet14", None) == []  # always a teacher, and its accuracy is not published
    assert published.lookup("digits", "wrn_40_2", "wrn_40_1", "kd") == []
    assert published.lookup("imagenet", "resnet34", "resnet18", "kd", "ctkd-global")[0]["top5"] == 90.27
    assert published.lookup("imagenet", "ResNet50", "MobileNetV1_Imagenet", "kd", kd_T=1.0)[0]["top1"] == 70.5


@pytest.mark.parametrize(("classes", "shown"), [(1000, "71.32"), (10, "none published")])
def test_a_part_of_imagenet_has_no_published_numbers(classes, shown, tmp_path):
    networks = {"teacher": "ResNet34", "model": "ResNet18", "temperature": "ctkd-global"}
    write_run(tmp_path / "run", history(60.0), dataset="imagenet", num_classes=classes, **networks)
    assert shown in comparison.report(find_runs([tmp_path]), markdown=True)


def test_settings_follow_student_method_and_temperature():
    (record, *_) = published.lookup("cifar100", "vgg13", "MobileNetV2", "kd", "ctkd-global")
    found = published.settings(record)
    assert (found["learning_rate"], found["epochs"], found["alpha"], found["tau_range"]) == (0.01, 240, 0.9, 20)
    (record, *_) = published.lookup("cifar100", "resnet56", "resnet20", "crd", kd_term=False)
    found = published.settings(record)
    assert (found["learning_rate"], found["alpha"], found["beta"], "tau_range" in found) == (0.05, 0, 0.8, False)
    (record,) = published.lookup("cifar100", "resnet32x4", "resnet8x4", "kd", "ctkd-global")
    assert published.settings(record) == {}


def test_settings_that_are_assumed_are_not_the_protocol():
    record = published.lookup("cifar100", "ResNet50", "MobileNetV2", "dkd", "standardised")[0]
    assert published.settings(record) == {} and "70.77" in comparison.source_note(record)
    assumed = published.settings(record, assumed=True)
    assert (assumed["epochs"], assumed["learning_rate"], assumed["base_tau"]) == (240, 0.01, 2)  # the last its own
    known = published.lookup("cifar100", "vgg13", "vgg8", "ickd", kd_term=False)[0]
    assert published.settings(known, assumed=True) == published.settings(known) != {}
    assert "last epoch's" not in comparison.source_note(known)


def test_every_source_is_described_and_ordered():
    content = published.tables()
    assert {record["source_id"] for record in content["records"]} == set(content["sources"])
    assert sorted(content["preference"]["distilled"]) == sorted(content["sources"])
    for source in content["sources"].values():
        assert source["reports"] in comparison.REPORTS and source["protocol"] and source["name"]


def test_every_record_equals_the_reference():
    if not REFERENCE.exists():
        pytest.skip("the reference tables the records were made from are not beside this repository")
    theirs, ours = json.loads(REFERENCE.read_text()), published.tables()
    further = json.loads(REFERENCE.with_name("published_extra.json").read_text())
    count = len(theirs["records"])
    assert count > 0
    for record, reference in zip(ours["records"][:count], theirs["records"], strict=True):
        assert record | {"source": published.source(record)["where"]} == reference
    same = ("dataset", "teacher", "student", "teacher_acc", "top1", "top5", "std", "last", "table", "source_id")
    for record, reference in zip(ours["records"][count:], further["records"], strict=True):
        assert [record.get(key) for key in same] == [reference.get(key) for key in same]
        assert record["method"] == reference["method"].removesuffix(" (quoted)")
        alone, note = f"{record['student_acc']:.2f}", reference.get("note", "")
        assert alone in note if "alone" in note else float(alone) == reference["student_acc"]
        own, told = record.get("settings", {}), re.findall(r"file name: (\d),(\d+)", note)
        assert own.get("epochs", 240) == reference.get("epochs", 240)
        assert [own.get("base_tau")] == ([int(tau) for tau, _ in told] or [None])
        assert own.get("alpha") in (None, *(int(weight) for _, weight in told))
    assert ours["pairs"] == theirs["pairs"] and ours["not_found"] == theirs["not_found"] + further["not_found"]


def test_one_record_a_line():
    lines = (Path(published.__file__).parent / "tables.json").read_text().splitlines()
    assert sum(line.startswith('  {"dataset"') for line in lines) == len(published.tables()["records"])


def test_the_readme_counts_the_records():
    text = (Path(published.__file__).parent / "README.md").read_text()
    assert f" {len(published.tables()['records'])} published accuracies" in text


# --- verdicts


def runs_with(lasts, bests=None):
    bests = bests or lasts
    return [Run(Path(), {"options": {}}, history(a, b, epochs=3)) for a, b in zip(lasts, bests, strict=True)]


def verdict_on(accuracies, top1, **more):
    """Return the verdict on a published number of the last epoch."""
    return comparison.verdict(runs_with(accuracies), {"source_id": "S05", "top1": top1, **more})


def test_verdict_at_the_edge_of_the_prediction_interval():
    accuracies = [70.0, 70.4, 70.5]
    half = stats.t.ppf(0.975, 2) * stdev(accuracies) * math.sqrt(4 / 3)
    mean = fmean(accuracies)
    for inside in (mean - half + 1e-6, mean + half - 1e-6):
        assert verdict_on(accuracies, inside) == f"within noise (±{half:.2f})"
    assert verdict_on(accuracies, mean - half - 1e-6) == "above"
    assert verdict_on(accuracies, mean + half + 1e-6) == "below"


def test_verdict_adds_the_published_spread_in_quadrature():
    accuracies = [70.0, 70.4, 70.5]
    half = stats.t.ppf(0.975, 2) * math.hypot(stdev(accuracies) * math.sqrt(4 / 3), 0.3)
    edge = fmean(accuracies) - half
    assert verdict_on(accuracies, edge + 1e-6, std=0.3) == f"within noise (±{half:.2f})"
    assert verdict_on(accuracies, edge - 1e-6, std=0.3) == "above"
    assert verdict_on([70.0, 70.0], 70.0) == "within noise (±0.00)"


def test_verdict_takes_what_the_source_reports():
    last, best = [70.0, 70.1, 70.2], [73.0, 73.1, 73.2]
    runs = runs_with(last, best)

    def verdict(source, top1):
        return comparison.verdict(runs, {"source_id": source, "top1": top1})

    assert verdict("S05", 70.1) == "within noise (±0.50)" and verdict("S05", 73.1) == "below"  # reports the last epoch
    assert verdict("S09", 73.1) == "within noise (±0.50)" and verdict("S09", 70.1) == "above"  # reports the best epoch
    # not stated which: both must agree
    assert [verdict("S00", top1) for top1 in (60, 70.1, 72, 73.1, 80)] == [
        "above", "within noise (±0.50)", "between last and best", "within noise (±0.50)", "below",
    ]  # fmt: skip
    # t(2) * 0.1 * sqrt(4 / 3) = 0.497, and 4.303 * hypot(0.115, 0.2) = 0.993 with the published 0.2
    assert comparison.verdict(runs, {"source_id": "S05", "top1": 69.5}) == "above"
    assert comparison.verdict(runs, {"source_id": "S05", "top1": 69.5, "std": 0.2}) == "within noise (±0.99)"
    assert comparison.verdict(runs_with([70.0]), {"source_id": "S00", "top1": 60.0}) == "noise unknown (n = 1)"


def test_chance_pools_the_spread_of_several_configurations():
    """The half-width of the two-sample t interval equals scipy's for the pooled samples."""
    ours, base = [71.0, 71.3, 71.5], [70.0, 70.6]
    groups = [runs_with(ours), runs_with(base)]
    interval = stats.ttest_ind(ours, base).confidence_interval()
    assert statistics.significance_margin(groups, "last", 3, 2) == pytest.approx((interval.high - interval.low) / 2)
    spread, freedom = statistics.pooled([*groups, runs_with([60.0])], "last")  # one run has no spread
    assert freedom == 3
    assert spread == pytest.approx(math.sqrt((2 * variance(ours) + variance(base)) / 3))
    assert statistics.significance_margin([runs_with([60.0]), runs_with([61.0, 61.0])], "last", 3, 2) is None
    assert statistics.significance_margin(groups, "last", 3, 0) is None


# --- the table


def test_numbers_of_a_row_and_of_the_gain(tmp_path):
    for seed, (kd, ctkd) in enumerate([(70.9, 71.3), (71.0, 71.4), (71.4, 71.8)], 1):
        write_run(tmp_path / f"kd{seed}", history(kd, kd + 0.3), seed)
        write_run(tmp_path / f"ctkd{seed}", history(ctkd, ctkd + 0.2), seed, temperature="ctkd-global")
    text = comparison.report(find_runs([tmp_path]), markdown=True)
    pair = "resnet56 → resnet20"
    # mean of 70.9, 71.0, 71.4 = 71.10; sample deviation = sqrt((0.04 + 0.01 + 0.09) / 2) = 0.26;
    # 4.303 * 0.2646 * sqrt(4 / 3) = 1.31
    assert cells(text, "| kd, tau 4 ", "70.66") == [
        pair, "kd, tau 4", "71.10 ± 0.26", "71.40 ± 0.26", "3", "70.66 [1]", "+0.44", "+0.74", "within noise (±1.31)",
        "72.34", "240",
    ]  # fmt: skip
    # 71.3, 71.4, 71.8: 71.50 and 0.26; published 71.19 in the same table, so by the same footnote
    assert cells(text, "71.19")[2:8] == ["71.50 ± 0.26", "71.70 ± 0.26", "3", "71.19 [1]", "+0.31", "+0.51"]
    # gain 0.40 and 0.30, each ± t(4) * 0.2646 * sqrt(2 / 3) = 2.776 * 0.2160 = 0.60
    gain = cells(text, "3, 3")
    assert gain == [pair, "kd, ctkd-global", "kd, tau 4", "+0.40 ± 0.60", "+0.30 ± 0.60", "3, 3", "240"]
    assert "- [1] CTKD, CIFAR-100 table: last or best epoch, not stated which." in text
    assert "selected on the test set" in text


def test_gain_over_the_student_alone_and_with_other_weights(tmp_path):
    write_run(tmp_path / "alone", history(69.0), distill=None)
    write_run(tmp_path / "other", history(60.0), distill=None, epochs=5)
    write_run(tmp_path / "kd", history(70.5))
    write_run(tmp_path / "dkd", history(71.5), distill="dkd", gamma=1.0, alpha=0.0, beta=1.0)
    text = comparison.report(find_runs([tmp_path]), markdown=True)
    gains = [cells(line)[1:4] for line in text.splitlines() if "| 1, 1 |" in line]
    assert gains == [
        ["kd, tau 4", "alone", "+1.50 (noise unknown)"],
        ["dkd, tau 4", "alone", "+2.50 (noise unknown)"],
        ["dkd, tau 4", "kd, tau 4 (other weights)", "+1.00 (noise unknown)"],
    ]


def test_above_and_below(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"kd{seed}", history(71.5 + 0.01 * seed), seed)
        write_run(tmp_path / f"alone{seed}", history(68.0 + 0.02 * seed), seed, distill=None)
    text = comparison.report(find_runs([tmp_path]), markdown=True)
    assert cells(text, "kd, tau 4", "above")[8] == "above"
    assert cells(text, "| resnet20 ") == [
        "resnet20", "alone", "68.03 ± 0.01", "68.03 ± 0.01", "2", "69.06 [1]", "-1.03", "-1.03", "below", "–", "240",
    ]  # fmt: skip


def test_a_row_of_one_run_and_a_printed_spread(tmp_path):
    write_run(tmp_path / "pkt", history(71.0), distill="pkt", beta=30000.0)
    text = comparison.report(find_runs([tmp_path]), markdown=True)
    assert cells(text, "pkt+kd, tau 4")[2:9] == [
        "71.00", "71.00", "1", "70.85 ± 0.22 [1]", "+0.15", "+0.15", "noise unknown (n = 1)",
    ]  # fmt: skip


def test_a_method_without_the_kd_term_is_set_beside_one_without_it(tmp_path):
    write_run(tmp_path / "pkt", history(70.0), distill="pkt", gamma=1.0, alpha=0.0, beta=30000.0)
    text = comparison.report(find_runs([tmp_path]), markdown=True)
    assert cells(text, "| pkt, tau 4 ")[5:9] == ["70.34 [1]", "-0.34", "-0.34", "noise unknown (n = 1)"]
    assert "RepDistiller README: the last epoch" in text


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"epochs": 5, "lr_decay_epochs": [3, 4, 4]}, "epochs 5 instead of 240; lr_decay_epochs [3, 4, 4] instead of"),
        ({"train_subset": 5000}, "5000 training images instead of all"),
        ({"batch_size": 128}, "batch_size 128 instead of 64"),
        ({"learning_rate": 0.1}, "learning_rate 0.1 instead of 0.05"),
        ({"alpha": 0.5}, "alpha 0.5 instead of 0.9"),
        ({"alpha": None}, "alpha not recorded instead of 0.9"),
        ({"teacher_top1": 70.0}, "teacher of 70.00 instead of 72.34"),
        ({"teacher_top1": None}, "a teacher of unmeasured accuracy instead of 72.34"),
    ],
)
def test_another_protocol_makes_no_claim(tmp_path, other, told):
    for seed in (1, 2):
        write_run(tmp_path / str(seed), history(40.0 + seed / 100, epochs=other.get("epochs", 240)), seed, **other)
    text = comparison.report(find_runs([tmp_path]), markdown=True)
    assert cells(text, "70.66")[6:9] == ["–", "–", "other protocol [2]"]
    assert f"- [2] Own protocol: {told}" in text


def test_dtkd_is_marked_as_read_off_a_chart_and_its_loss_is_checked(tmp_path):
    pair = {"temperature": "dtkd", "teacher": "resnet14", "model": "resnet8"}
    write_run(tmp_path / "a", history(62.0), **pair, gamma=1.0, alpha=3.0, fixed_alpha=1.0, kd_warmup=20,
              dtkd_detach=False)  # fmt: skip
    write_run(tmp_path / "b", history(62.0), **pair)
    text = comparison.report(find_runs([tmp_path]), markdown=True)
    assert cells(text, "| kd, dtkd, alpha 3,")[5:9:3] == ["≈62.87 [1]", "noise unknown (n = 1)"]
    assert cells(text, "| kd, dtkd, alpha 0.9")[5:9:3] == ["≈62.87 [1]", "other protocol [2]"]
    assert "The number is approximate (read off a chart)." in text
    assert "gamma 0.1 instead of 1; kd_warmup not recorded instead of 20" in text


def test_unknown_protocol_and_no_published_number(tmp_path):
    write_run(tmp_path / "a", history(73.0), temperature="ctkd-global", teacher="resnet32x4", model="resnet8x4")
    write_run(tmp_path / "b", history(73.0), temperature="ctkd-instance")
    text = comparison.report(find_runs([tmp_path]), markdown=True)
    assert cells(text, "73.39")[8] == "protocol unknown"
    assert cells(text, "ctkd-instance")[5:9] == ["–", "–", "–", "none published"]


def test_gain_needs_the_same_recipe_and_prefers_tau_4(tmp_path):
    write_run(tmp_path / "kd4", history(71.0))
    for seed in (1, 2):
        write_run(tmp_path / f"kd2-{seed}", history(70.0), seed, kd_T=2.0)
    write_run(tmp_path / "short", history(60.0, epochs=5), epochs=5, temperature="ctkd-global")
    text = comparison.report(find_runs([tmp_path]), markdown=True)
    assert cells(text, "2, 1")[1:] == [
        "kd, tau 2",
        "kd, tau 4",
        "-1.00 (noise unknown)",
        "-1.00 (noise unknown)",
        "2, 1",
        "240",
    ]
    assert "1, 1" not in text  # the short run has no baseline


def test_a_distiller_under_ctkd_is_compared_with_kd_and_with_itself(tmp_path):
    write_run(tmp_path / "kd", history(70.0))
    write_run(tmp_path / "pkt", history(71.0), distill="pkt", beta=30000.0)
    write_run(tmp_path / "weak", history(60.0), distill="pkt", beta=1.0)
    write_run(tmp_path / "both", history(71.5), distill="pkt", beta=30000.0, temperature="ctkd-global")
    text = comparison.report(find_runs([tmp_path]), markdown=True)
    gains = [cells(line)[1:4] for line in text.splitlines() if "| 1, 1 |" in line]
    fixed = [f"pkt+kd, tau 4, beta {beta}" for beta in (30000, 1)]
    assert [gain[0] for gain in gains] == [*fixed, *["pkt+kd, ctkd-global"] * 2]
    assert [gain[1:] for gain in gains] == [
        ["kd, tau 4", "+1.00 (noise unknown)"],
        ["kd, tau 4", "-10.00 (noise unknown)"],
        ["kd, tau 4", "+1.50 (noise unknown)"],
        ["pkt+kd, tau 4, beta 30000", "+0.50 (noise unknown)"],
    ]


def test_options_of_another_distiller_part_no_runs(tmp_path):
    write_run(tmp_path / "old", history(70.0), 1)
    write_run(tmp_path / "new", history(70.2), 2, dkd_beta=2.0, nce_k=16384, hint_layer=2)
    (group,) = group_runs(find_runs([tmp_path]))
    assert len(group) == 2


def test_dtkd_is_compared_with_kd_and_with_the_same_weight_at_a_fixed_tau(tmp_path):
    weights = {"gamma": 1.0, "kd_warmup": 20}
    write_run(tmp_path / "a", history(70.0))
    write_run(tmp_path / "b", history(72.0), **weights, alpha=1.5)
    write_run(tmp_path / "c", history(73.0), **weights, temperature="dtkd", alpha=1.0, fixed_alpha=0.5)
    write_run(tmp_path / "d", history(74.0), logit_stand=True)  # fixed tau, but not equal for all samples
    text = comparison.report(find_runs([tmp_path]), markdown=True)
    assert cells(text, "| kd, dtkd ", "| kd, tau 4 (other weights) ")[3] == "+3.00 (noise unknown)"
    assert cells(text, "| kd, dtkd ", "| kd, tau 4, alpha 1.5, gamma 1, kd_warmup 20 ")[3] == "+1.00 (noise unknown)"
    assert cells(text, "| kd, tau 4 on z-scores ", "| kd, tau 4  ")[3] == "+4.00 (noise unknown)"


def test_options_of_another_temperature_and_new_ones_part_no_runs(tmp_path):
    write_run(tmp_path / "a", history(70.0), temperature="rlkd")
    write_run(tmp_path / "b", history(71.0), 2, temperature="rlkd", tau_init=3.0, base_tau=3.0, random_std=1.0,
              fixed_alpha=0.0, kd_warmup=0, logit_stand=False)  # fmt: skip
    assert len(group_runs(find_runs([tmp_path]))) == 1
    write_run(tmp_path / "c", history(70.0), temperature="rlkd", rl_rollout=8)
    write_run(tmp_path / "d", history(70.0), temperature="rlkd", logit_stand=True)
    assert len(group_runs(find_runs([tmp_path]))) == 3


def test_a_controlled_temperature_is_a_configuration_of_its_own_without_published_numbers(tmp_path):
    for name, control in (("a", {}), ("b", {"tau_control": "none"}), ("c", {"tau_control": "mean"})):
        write_run(tmp_path / name, history(70.0), 1 + (name == "b"), temperature="ctkd-global", **control)
    runs = {run.folder.name: run for run in find_runs([tmp_path])}
    assert sorted(len(group) for group in group_runs(runs.values())) == [1, 2]
    assert [runs[name].method for name in "abc"] == ["kd, ctkd-global", "kd, ctkd-global", "kd, ctkd-global, mean"]
    assert [bool(comparison.find_published(run)) for run in runs.values()] == [True, True, False]


def test_a_crd_with_other_negatives_is_no_baseline(tmp_path):
    crd = {"distill": "crd", "beta": 0.8}
    write_run(tmp_path / "fixed", history(70.0), **crd, nce_k=16384)
    write_run(tmp_path / "ctkd", history(71.0), **crd, nce_k=100, temperature="ctkd-global")
    assert "gain" not in comparison.report(find_runs([tmp_path]), markdown=True)


def test_the_published_number_of_the_same_protocol_is_preferred(tmp_path):
    dkd = {"distill": "dkd", "gamma": 1.0, "alpha": 0.0, "beta": 1.0, "dkd_alpha": 1.0, "dkd_beta": 2.0}
    write_run(tmp_path / "ctkd", history(71.0), **dkd, dkd_warmup=0)
    assert cells(comparison.report(find_runs([tmp_path]), markdown=True), "dkd")[5] == "71.43 ± 0.13 [1]"
    write_run(tmp_path / "mdistiller", history(71.9), **dkd, dkd_warmup=20)
    assert cells(comparison.report(find_runs([tmp_path]), markdown=True), "dkd_warmup 20")[5] == "71.97 [2]"


def test_unfinished_runs_are_listed_and_never_counted(tmp_path):
    write_run(tmp_path / "done", history(71.0), 1)
    write_run(tmp_path / "going", history(99.0)[:33], 2)
    text = comparison.report(find_runs([tmp_path]), markdown=True)
    assert cells(text, "70.66")[2:5] == ["71.00", "71.00", "1"]
    assert f"- unfinished (33/240 epochs): resnet56 → resnet20, kd, tau 4, {tmp_path / 'going'}" in text
    with (tmp_path / "done/log.jsonl").open("a") as log:
        log.write('{"epoch": 2\n')
    text = comparison.report(find_runs([tmp_path]), markdown=True)
    assert f"- left out of {tmp_path / 'done/log.jsonl'}: lines without a record, 1" in text
    assert cells(text, "70.66")[2] == "71.00"
    only = comparison.report(find_runs([tmp_path / "going"]))
    assert only.startswith("unfinished (33/240 epochs)") and "pair" not in only


def some_runs(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"runs/kd{seed}", history(70.0 + seed, tau=True), seed)
        write_run(tmp_path / f"runs/ctkd{seed}", history(71.0 + seed, tau=True), seed, temperature="ctkd-global")
    write_run(tmp_path / "runs/digits", history(95.0), dataset="digits", model="a|b")
    return tmp_path / "runs"


def test_the_screen_explains_when_asked(tmp_path):
    write_run(tmp_path / "done", history(71.0))
    for name in ("going", "also"):
        write_run(tmp_path / name, history(99.0)[:33], epochs=50)
    runs = find_runs([tmp_path])
    short, full, markdown = (
        comparison.report(runs),
        comparison.report(runs, explain=True),
        comparison.report(runs, True),
    )
    *table, legend, unfinished = short.splitlines()
    assert legend == comparison.LEGEND and len(legend) <= 120
    assert unfinished == "Unfinished runs, not counted: 2 (--explain lists them)" and table[-1] == ""
    assert "noise unknown (n = 1)" in short and "70.66 " in short
    for told in ("[1]", "prediction interval", "CTKD, CIFAR-100 table", "going"):
        assert told not in short and told in " ".join(full.split()) and told in markdown, told
    assert "--explain" not in full + markdown


def test_markdown_tables_are_well_formed(tmp_path):
    text = comparison.report(find_runs([some_runs(tmp_path)]), markdown=True)
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert [len(table) for table in tables] == [4, 3, 3]
    for heading, rule, *rows in tables:
        assert all(re.fullmatch(":?-+:?", cell) for cell in rule.strip("|").split("|"))
        for row in (rule, *rows):
            assert row.replace(r"\|", "").count("|") == heading.count("|")
    assert text.count("## ") == 2 and r"a\|b" in text


def test_screen_tables_are_aligned(tmp_path):
    heading, rule, *rows = comparison.report(find_runs([some_runs(tmp_path)])).splitlines()[2:6]
    ends = [end for end in range(len(rule)) if rule[end : end + 2] == "- "]
    assert heading[ends[2] - 3 : ends[2] + 1] == "last"
    for row in rows:
        assert all(row[end + 1 : end + 3] == "  " for end in ends)


# --- the plots


def is_picture(path, share=0.01):
    """Return whether a PNG can be read and contains colour, not only white."""
    pixels = imread(path)[..., :3]
    return min(pixels.shape[:2]) > 300 and (pixels < 0.9).any(axis=-1).mean() > share


@pytest.mark.parametrize("epochs", [1, 240])
def test_pictures_of_short_and_long_runs(tmp_path, epochs):
    records = history(71.0, epochs=epochs, tau=True)
    plot_run(records, "a run", tmp_path / "run.png")
    assert is_picture(tmp_path / "run.png")
    run = Run(tmp_path, {"distill": "kd", "options": {}, "epochs": epochs}, records)
    plot_compare([run, run], tmp_path / "both.png")
    assert is_picture(tmp_path / "both.png")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".png"] * 2  # no other files


def test_panels_for_tau_and_lambda_only_where_there_are_any(tmp_path):
    for name, tau in (("with", True), ("without", False)):
        plot_run(history(71.0, epochs=2, tau=tau), name, tmp_path / name)
    assert imread(tmp_path / "with").shape[0] > 1.5 * imread(tmp_path / "without").shape[0] > 300


def test_panels_for_the_agent_and_the_teachers_tau(tmp_path):
    records = history(71.0, epochs=40, tau=True)
    plot_run(records, "plain", tmp_path / "plain")
    for record in records:
        record |= {"tau_teacher_mean": 5.0, "rl_action_mean": 0.1, "rl_action_std": 0.6}
    records[19] |= {"rl_reward": 0.002}  # the agent learns only in this epoch
    plot_run(records, "rlkd", tmp_path / "rlkd")
    assert imread(tmp_path / "rlkd").shape[0] > 1.4 * imread(tmp_path / "plain").shape[0]


def test_panels_for_dpk_with_a_line_a_stage(tmp_path):
    records = history(71.0, epochs=3)
    plot_run(records, "plain", tmp_path / "plain")
    for record in records:
        record |= {f"dpk_{what}_stage{n}": 0.2 * n for what in ("ratio", "cka") for n in (2, 3)}
    plot_run(records, "dpk", tmp_path / "dpk")
    heights = [imread(tmp_path / name).shape[0] for name in ("plain", "dpk")]
    assert heights[1] == pytest.approx(heights[0] + 2 * 1.7 * 130, abs=2)
    panels = Figure().subplots(2)
    for axes, key in zip(panels, ("dpk_ratio", "dpk_cka"), strict=True):
        plot._draw_panel(axes, records, key)
        assert [line.get_label() for line in axes.get_lines()] == ["stage 2", "stage 3"]
        assert axes.get_lines()[1].get_ydata() == pytest.approx([0.6] * 3)


def test_a_seed_counts_once(tmp_path, capsys):
    for name, seed, last in (("fold-1", 1, 71.0), ("fold-2", 1, 71.0), ("fold-3", 2, 71.5)):
        write_run(tmp_path / name, history(last), seed=seed)
    (line,) = [line for line in comparison.report(find_runs([tmp_path])).splitlines() if line.startswith("resnet56")]
    assert "71.25 ± 0.35" in line
    assert re.search(r"fold-2 is left out: .*fold-1 has the same seed, 1", capsys.readouterr().err)


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "curve.png"
    path.write_text("old")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("helper.files.os.replace", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(RunError, match="No space left"):
        plot_run(history(71.0, epochs=2), "a run", path)
    assert path.read_text() == "old"


@pytest.mark.parametrize("name", ["$", "$\\frac$", "a$b$c", "\\$x$", "_y", "é<&>"])
def test_names_in_pictures_are_no_formulas(tmp_path, name):
    write_run(tmp_path / "a", history(71.0, epochs=3), teacher=name, epochs=3)
    write_run(tmp_path / "b", history(72.0, epochs=3), teacher=name, epochs=3, dkd=name)
    plot_compare(find_runs([tmp_path]), tmp_path / "x.png")
    plot_run(history(71.0, epochs=3), name, tmp_path / "y.png")
    assert is_picture(tmp_path / "x.png") and is_picture(tmp_path / "y.png")


def test_a_picture_of_an_incomplete_or_odd_log(tmp_path):
    records = history(71.0, epochs=20)
    records[3] |= {"rl_action_mean": 0.1}
    records[4] |= {"rl_action_mean": 0.1, "rl_action_std": 0.6}
    records[-1] |= {f"dpk_ratio{end}": 0.5 for end in ("", "_stagex", "_stage99", "_stage" + "9" * 5000)}
    plot_run(records, "a run", tmp_path / "run.png")
    assert is_picture(tmp_path / "run.png")


# --- the command line


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
    compare.main()


def test_output_and_plot(tmp_path, monkeypatch, capsys):
    runs = some_runs(tmp_path)
    two = [runs / "kd1", runs / "ctkd1"]
    call(monkeypatch, *two, "--markdown", "--output", tmp_path / "t.md", "--plot", tmp_path / "p.png")
    assert capsys.readouterr().out == f"picture: {tmp_path / 'p.png'}\n"
    assert (tmp_path / "t.md").read_text() == comparison.report(find_runs(two), markdown=True)
    assert is_picture(tmp_path / "p.png")
    for name, begin in (("p.svg", b"<svg"), ("p.pdf", b"%PDF")):
        call(monkeypatch, *two, "--plot", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begin)
    capsys.readouterr()
    for words, explain in (([], False), (["--explain"], True)):
        call(monkeypatch, runs, *words)
        assert capsys.readouterr().out == comparison.report(find_runs([runs]), explain=explain)


def test_a_plot_holds_one_pair_and_its_student_alone(tmp_path):
    runs = some_runs(tmp_path)
    with pytest.raises(UserError, match="draws one pair, here are 2"):
        comparison.plotted(find_runs([runs]))
    write_run(tmp_path / "begun", [])
    with pytest.raises(UserError, match="here are 0 pairs"):
        comparison.plotted(find_runs([tmp_path / "begun"]))
    write_run(tmp_path / "more/alone", history(69.0), distill=None)
    write_run(tmp_path / "more/teacher", history(72.0), distill=None, model="resnet56")
    found = comparison.plotted(find_runs([runs / "kd1", tmp_path / "more"]))
    assert [run.folder.name for run in found] == ["alone", "kd1"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["n" * 300], "nnn is no folder"),
        (["empty"], "empty holds no run"),
        ([], "save is no folder"),
        (["runs", "empty"], "empty holds no run"),
        (["runs/kd1", "--plot", "curve.gif"], "ends in .png, .svg or .pdf"),
        (["runs", "--plot", "curve.png"], "draws one pair"),
        (["runs/kd1", "--output", "no/such/t.md"], "cannot be written"),
        (["runs/kd1", "--plot", "no/such/c.png"], "cannot be written"),
        (["runs/kd1", "--mark"], "unrecognized arguments"),
    ],
)
def test_wrong_use_is_one_sentence_and_status_2(tmp_path, monkeypatch, capsys, words, told):
    some_runs(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    with pytest.raises(SystemExit) as stop:
        compare.run_main(compare.main)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_a_picture_that_cannot_be_made_leaves_the_table_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "t.md").write_text("old")
    with pytest.raises(UserError, match="draws one pair"):
        call(monkeypatch, some_runs(tmp_path), "--output", tmp_path / "t.md", "--plot", tmp_path / "p.png")
    assert (tmp_path / "t.md").read_text() == "old"


def test_an_encoding_without_our_letters_is_enough(tmp_path, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["compare.py", str(some_runs(tmp_path))])
    compare.run_main(compare.main)
    assert b"resnet56 ? resnet20" in written.getvalue()


@pytest.mark.parametrize(
    ("precision", "said"), [("fp32", []), ("tf32", []), ("bf16", ["precision bf16 instead of fp32"])]
)
def test_pytorchs_own_choice_of_precision_is_no_other_protocol(precision, said):
    (run,) = find_runs([ROOT / "results/published-protocol/resnet8_vanilla"])
    run.config["options"]["precision"] = precision
    (record,) = find_published(run)
    assert comparison.differences([run], record) == said
