"""The list of the published runs."""

import shlex
import sys
from pathlib import Path

import pytest

import published
import reproduce
from inputs import UserError
from options.flags import as_dict
from options.identity import foreign_options, neutral_options
from options.parse import parse_student, parse_teacher, resolve_pair
from report.comparison import find_published
from report.rows import IMAGENET, SHORT, TABLES, left_out, rows
from report.runs import Run


def resolved(row):
    script, *argv = row.command(1)
    options = (parse_teacher if script == "train_teacher.py" else parse_student)(argv)
    return as_dict(resolve_pair(options, row.teacher) if row.teacher else options)


@pytest.mark.parametrize("table", TABLES)
def test_a_row_is_a_run_that_is_set_beside_its_published_number(table):
    source, _ = TABLES[table]
    for row in rows(table):
        options = resolved(row)
        config = {"dataset": row.dataset, "model": row.model, "teacher": row.teacher, "options": options}
        config |= {key: options.get(key) for key in ("distill", "temperature")}
        found = find_published(Run(row.folder(1), config, []))
        if row.top1 is not None and (row.teacher or source == "S05"):
            record = next(r for r in found if r["source_id"] == source and r["top1"] == row.top1)
            known = IMAGENET[source] if row.dataset == "imagenet" else None
            protocol = published.settings(record, known)
            assert protocol, row
            for key, value in protocol.items():
                assert options[key] == value, (row, key)


ROOT = Path(reproduce.__file__).parent
RUNNER = (ROOT / "scripts/run_imagenet_distill.sh").read_text()
DOCUMENTED = {  # our rows: the runner's names
    "kd_ctkd-global": "", "kd_tau-4": "kd", "pkt+kd_ctkd-global": "pkt+ctkd", "srrl+kd_ctkd-global": "srrl+ctkd",
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


def test_every_record_of_a_method_that_is_here_has_its_row():
    for table, (source, dataset) in TABLES.items():
        records = [r for r in published.tables()["records"] if (r["source_id"], r["dataset"]) == (source, dataset)]
        here = [record["top1"] for record in records if record["method"] not in left_out(table)]
        assert here and [row.top1 for row in rows(table) if row.teacher] == here
    assert left_out("repdistiller") == ["AB", "FSP", "FT"]


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
    assert {row.options["epochs"] for table in TABLES for row in rows(table)} == {240, 120, 100}


def test_wrong_use(monkeypatch):
    for line, says in (("nothing", "no table 'nothing'"), ("--seeds 0", "--seeds must be 1"),
                       ("--jobs 0", "--jobs must be 1"),
                       ("--trials", "--trials trains several --seeds"), ("-- --percision bf16", "percision"),
                       ("-- --percision bf16", "python train_student.py --help"),
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
