"""The list of the published runs."""

import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest

import published
import reproduce
from inputs import UserError, this_python
from options.flags import as_dict
from options.identity import foreign_options, neutral_options
from options.parse import parse_student, parse_teacher, resolve_pair
from report.comparison import find_published
from report.rows import METHODS, SHORT, TABLES, assumptions, left_out, rows
from report.runs import Run


def resolved(row):
    return resolve(row.teacher, *row.command(1))


@cache
def resolve(teacher, script, *argv):
    options = (parse_teacher if script == "train_teacher.py" else parse_student)(argv)
    return as_dict(resolve_pair(options, teacher) if teacher else options)


@pytest.mark.parametrize("table", TABLES)
def test_a_row_is_a_run_that_is_set_beside_its_published_number(table):
    _, *sources = TABLES[table]
    for row in rows(table):
        options = resolved(row)
        config = {"dataset": row.dataset, "model": row.model, "teacher": row.teacher, "options": options}
        config |= {key: options.get(key) for key in ("distill", "temperature")}
        found = find_published(Run(row.folder(1), config, []))
        if row.top1 is not None and (row.teacher or sources == ["S05"]):
            record = next(r for r in found if r["source_id"] in sources and r["top1"] == row.top1)
            protocol = published.settings(record, assumed=True)
            assert protocol, row
            for key, value in protocol.items():
                assert options[key] == value, (row, key)


ROOT = Path(reproduce.__file__).parent
RUNNER = (ROOT / "scripts/run_imagenet_distill.sh").read_text()
DOCUMENTED = {  # our rows: the runner's names
    "kd_ctkd-global": "", "kd_tau-4": "kd", "pkt+kd_ctkd-global": "pkt+ctkd", "srrl+kd_ctkd-global": "srrl+ctkd",
    "rkd+kd_ctkd-global": "rkd+ctkd", "rkd+kd_tau-4": "rkd",
    "dkd_ctkd-global": "dkd+ctkd", "kd_tau-1_mdistiller": "kd-mdistiller", "dkd_tau-1_mdistiller": "dkd-mdistiller",
}  # fmt: skip


@pytest.mark.parametrize("row", [row for table in TABLES for row in rows(table) if row.method in DOCUMENTED and
                                 row.dataset == "imagenet" and row.model == "ResNet18"])  # fmt: skip
def test_rows_of_imagenet_are_what_its_runner_documents(row):
    fixed = RUNNER.partition("train_student.py ")[2].replace("\\\n", " ").replace('"$@"', "")
    name = DOCUMENTED[row.method]
    lines = RUNNER.replace("\\\n#", " ").splitlines()
    flags = next((line for line in lines if f"--experiments_name {name} " in line + " "), "") if name else ""
    line = f"{fixed} --model_t {row.teacher} --teacher_weights torchvision {flags[flags.find('--') :] if flags else ''}"
    here, there = resolved(row), as_dict(resolve_pair(parse_student(shlex.split(line)), row.teacher))
    left_out = neutral_options() | foreign_options(here["distill"], here["temperature"])
    assert {key for key in here.keys() - left_out if here[key] != there[key]} == set()


def test_every_number_has_a_row_or_a_reason():
    for table, (dataset, *sources) in TABLES.items():
        records = published.tables()["records"]
        here = [r["top1"] for r in records if r["dataset"] == dataset and r["source_id"] in sources]
        made = [row.top1 for row in rows(table) if row.teacher]
        assert len(here) == len(made) + sum(int(line.split()[0]) for line in left_out(table)) > 0
        assert set(made) <= set(here)
    told = {dataset: {source for kind, *sources in TABLES.values() if kind == dataset for source in sources}
            for dataset in ("CIFAR-100", "ImageNet-1k")}  # fmt: skip
    assert {r["source_id"] for r in records if r["source_id"] not in told[r["dataset"]]} == {"E10"}  # all quoted


ALONE, BESIDE = {"gamma": 1, "alpha": 0}, {"gamma": 1, "alpha": 1}


@pytest.mark.parametrize(
    ("table", "pair", "method", "top1", "options"),
    [
        ("lskd", "resnet56 → resnet20", "kd_standardised_base_tau-2", 71.43,
         {"distill": "kd", "temperature": "standardised", "gamma": 0.1, "alpha": 9}),
        ("lskd", "resnet32x4 → wrn_16_2", "kd_ctkd-global_z-scores", 75.16,
         {"temperature": "ctkd-global", "logit_stand": True, "alpha": 9, "tau_init": 2}),
        ("lskd", "vgg13 → vgg8", "hint", 71.02, ALONE | {"distill": "hint", "beta": 100}),
        ("lskd", "wrn_40_2 → MobileNetV2", "crd", 70.28, ALONE | {"beta": 0.8, "learning_rate": 0.01}),
        ("lskd", "vgg13 → vgg8", "dkd_tau-4_mdistiller", 74.68, ALONE | {"dkd_weights": "mdistiller", "beta": 1}),
        ("lskd", "vgg13 → vgg8", "mlkd_lr-0.025", 75.18, {"epochs": 240, "learning_rate": 0.025, "distill": "mlkd"}),
        ("lskd", "resnet32x4 → ShuffleV2", "mlkd", 78.44, {"epochs": 960, "learning_rate": 0.01}),
        ("lskd", "vgg13 → vgg8", "cat_kd", 74.65, ALONE | {"distill": "cat_kd"}),
        ("lskd", "vgg13 → vgg8", "simkd", 74.89, {"distill": "simkd", "gamma": 0, "alpha": 0}),
        ("simkd", "resnet32x4 → resnet8x4", "simkd", 78.08, {"gamma": 0, "alpha": 0}),
        ("simkd", "resnet32x4 → vgg8", "simkd_factor-4", 75.62, {"gamma": 0, "alpha": 0, "simkd_factor": 4}),
        ("sdd", "vgg13 → MobileNetV2", "sdd_tau-4_loss-dkd", 70.25, {"alpha": 0, "sdd_loss": "dkd", "kd_T": 4}),
        ("lskd-imagenet", "ResNet34 → ResNet18", "reviewkd_mdistiller_batch-256", 71.61, ALONE),
        ("lskd-logs", "vgg13 → vgg8", "kd_standardised_base_tau-3", 74.69, {"base_tau": 3, "alpha": 9, "gamma": 0.1}),
        ("dist", "resnet56 → resnet20", "dist_tau-4", 71.75, ALONE | {"distill": "dist", "beta": 2, "kd_T": 4}),
        ("wttm", "vgg13 → vgg8", "kd_ttm", 74.33, {"temperature": "ttm", "gamma": 1, "alpha": 45}),
        ("wttm", "resnet56 → resnet20", "kd_wttm", 71.92, {"temperature": "wttm", "gamma": 1, "alpha": 4}),
        ("wttm", "wrn_40_2 → wrn_16_2", "crd+kd_wttm", 76.61, {"distill": "crd", "temperature": "wttm", "alpha": 4}),
        ("wttm", "vgg13 → vgg8", "dist_tau-4", 73.89, ALONE | {"beta": 2, "kd_T": 4}),
        ("ickd", "vgg13 → vgg8", "ickd", 73.42, ALONE | {"beta": 2.5}),
        ("ickd", "wrn_40_2 → wrn_16_2", "ickd+kd_tau-4", 75.57, BESIDE | {"beta": 2.5}),
        ("simkd", "resnet32x4 → vgg8", "crd+kd_tau-4_simkd", 73.54, BESIDE | {"beta": 0.8, "kd_T": 4}),
        ("lskd-imagenet", "ResNet34 → ResNet18", "dkd_tau-1_mdistiller", 71.7, ALONE | {"kd_T": 1, "dkd_beta": 0.5}),
        ("dist-imagenet", "ResNet152 → ResNet18", "dist_tau-1_batch-256", 72.24, ALONE | {"beta": 2, "kd_T": 1}),
        ("ctkd-imagenet", "ResNet34 → ResNet18", "rkd+kd_ctkd-global", 71.11, BESIDE | {"temperature": "ctkd-global"}),
    ],
)  # fmt: skip
def test_rows_of_each_source(table, pair, method, top1, options):
    (row,) = [row for row in rows(table) if (row.pair, row.method) == (pair, method)]
    assert row.top1 == top1 and row.options | options == row.options


def test_a_flag_without_a_value_is_given_or_not():
    standardised, dtkd = (next(row for row in rows(table) if row.options.get("temperature") == name).command(1)
                          for table, name in (("lskd-logs", "ctkd-global"), ("dtkd", "dtkd")))  # fmt: skip
    assert "--logit_stand" in standardised and "True" not in standardised
    assert "--dtkd_detach" not in dtkd


def test_what_is_left_out_is_told_with_the_reason():
    assert left_out("repdistiller") == []
    assert "8 left out, protocol unknown: KD (CTKD global)" in left_out("lskd")
    assert any(line.startswith("10 left out, no network ShuffleV2x1.5 here: AT+KD, ") for line in left_out("simkd"))
    assert "18 left out, no weight is published for the pair: CAT-KD, DKD, ReviewKD" in left_out("lskd")
    assert any(line.endswith("is another loss: NKD, SDD-NKD") for line in left_out("sdd-imagenet"))
    assert rows("wttm-imagenet") == [] and left_out(SHORT) == [] == assumptions("wttm-imagenet")


def test_a_method_needs_a_line_to_have_its_rows(monkeypatch):
    counts = {"OFD": {"lskd": 14, "lskd-imagenet": 2}, "SDD-KD": {"sdd": 6}, "FT": {"repdistiller": 13}}
    for name, tables in counts.items():
        monkeypatch.delitem(METHODS, name, raising=False)
        before = {table: len([row for row in rows(table) if row.teacher]) for table in tables}
        monkeypatch.setitem(METHODS, name, "rkd")  # stands for a method that is not here
        for table, count in tables.items():
            assert len([row for row in rows(table) if row.teacher]) == before[table] + count
    assert left_out("ofd") == ["4 left out, no network wrn_28_4 here: OFD"]


def test_a_longer_distillation_has_the_usual_teacher():
    long = [row for row in rows("lskd") if row.options["epochs"] > 240]
    assert {row.options["epochs"] for row in long} == {480, 960}
    assert {row.teacher_folder.name for row in long} <= {row.folder(1).name for row in rows("repdistiller")}
    assert all("480-epochs" in str(row.folder(1)) or "960-epochs" in str(row.folder(1)) for row in long)


def test_assumptions_are_told():
    assert [assumptions(table) for table in ("ctkd", "ickd", SHORT)] == [[], [], []]
    assert assumptions("mdistiller") == [] and assumptions("mdistiller-imagenet") != []
    assert len(assumptions("lskd-logs")) == 2


def test_a_folder_belongs_to_one_configuration():
    """Rows of several tables share a run if and only if they are the same."""
    known = {}
    for row in (row for table in (*TABLES, SHORT) for row in rows(table)):
        options = resolved(row) | {"dkd_weights": None}  # it only selects other options
        assert known.setdefault(row.folder(1), options) == options
        assert row.folder(1) != row.folder(2)


def test_teachers_come_before_what_they_teach():
    for table in (*TABLES, SHORT):
        trained = set()
        for row in rows(table):
            argv = row.command(1)
            if "--path-t" in argv:
                assert argv[argv.index("--path-t") + 1] in trained
            trained.add(str(row.folder(1)))


def test_pairs_choose_rows_and_their_networks_alone():
    assert reproduce.chosen("ctkd", None) == rows("ctkd")
    told = [(row.pair, row.method) for row in reproduce.chosen("ctkd", ["resnet110:resnet20", "vgg13:vgg8"])]
    assert told == [
        ("resnet110", "alone"), ("vgg13", "alone"), ("resnet20", "alone"), ("vgg8", "alone"),
        ("resnet110 → resnet20", "kd_tau-4"), ("vgg13 → vgg8", "kd_tau-4"),
        ("resnet110 → resnet20", "kd_ctkd-global"), ("vgg13 → vgg8", "kd_ctkd-global"),
    ]  # fmt: skip


def test_a_pair_of_one_table_draws_no_row_of_another():
    assert reproduce.chosen(SHORT, ["resnet56:resnet20"]) == []


def test_the_control_of_dtkd_has_its_weights():
    control, dtkd = (resolved(next(row for row in rows(SHORT) if row.method == name))
                     for name in ("kd_tau-4_dtkd-weights", "kd_dtkd"))  # fmt: skip
    assert control["alpha"] == dtkd["alpha"] + dtkd["fixed_alpha"] and control["fixed_alpha"] == 0
    assert all(control[key] == dtkd[key] for key in ("gamma", "beta", "kd_warmup", "epochs", "lr_decay_epochs"))


def test_the_short_table_is_short():
    assert {row.options["epochs"] for row in rows(SHORT)} == {40}
    assert {row.options["epochs"] for table in TABLES for row in rows(table)} == {240, 120, 100, 480, 960}


def test_wrong_use(monkeypatch):
    for line, says in (("nothing", "no table 'nothing'"), ("nkd-imagenet", "no row of nkd-imagenet can be made"),
                       ("--seeds 0", "--seeds must be 1"),
                       ("--jobs 0", "--jobs must be 1"),
                       ("--trials", "--trials trains several --seeds"), ("-- --percision bf16", "percision"),
                       ("-- --percision bf16", f"{re.escape(this_python())} train_student.py --help"),
                       ("-- --seed 2", "--seed is set by the tables"), ("-- -a 3", "--alpha is set by the tables"),
                       ("-- --batch-size 8", "--batch_size is set by the tables"),
                       ("-- --logit-stand", "logit_stand"),
                       ("-- --fixed_alpha 2", "--fixed_alpha is set by the tables"),
                       ("--train_subset 64", "go after --"), ("--pairs a:b ctkd", "tables go before --pairs"),
                       ("dtkd --pairs resnet56:resnet20", "these tables have no pair resnet56:resnet20")):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *line.split()])
        with pytest.raises(UserError, match=says):
            reproduce.parse_args()
    line = ["reproduce.py", "ctkd", "--jobs", "2", "ctkd-imagenet", "--", "--num_workers", "4"]
    monkeypatch.setattr(sys, "argv", line)
    args, more = reproduce.parse_args()
    assert args.tables == ["ctkd", "ctkd-imagenet"] and more == ["--num_workers", "4"]
