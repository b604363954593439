"""The check of a GPU, with tiny sizes on a CPU: every part, its time limit, and what is kept; missing packages."""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from common import ROOT

from benchmarks import bench, gpu_check, packages
from dataset import dataset_dict
from helper.errors import RunError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def random_images(monkeypatch):
    """Use random images, so that the tests do not depend on what is here."""
    monkeypatch.delenv("CIFAR100_DIR", raising=False)


def results_of(name, folder):
    """Run a part in this process, and return what it wrote."""
    gpu_check.run_part(name, CPU, folder, 100.0)
    return json.loads((folder / "results.json").read_text())


def test_the_parts_fit_into_nine_minutes():
    assert sum(part.seconds for part in gpu_check.PARTS.values()) <= gpu_check.SECONDS < 9 * 60
    assert [part.work.__name__ for part in gpu_check.PARTS.values()] == list(gpu_check.PARTS)


def test_variants_are_compared_with_their_precisions_usual_one(tmp_path, monkeypatch):
    groups = {"steps": ("fp32", "fp32+contiguous", "fp32+eager"), "at once": ("tf32", "tf32 x2", "tf32 x9")}
    monkeypatch.setattr(gpu_check, "GROUPS", groups)
    results = results_of("speed", tmp_path)
    assert {group: list(each) for group, each in results.items()} == {
        "steps": list(groups["steps"]), "at once": ["tf32", "tf32 x2"],
    }  # fmt: skip
    for each in (variant for group in results.values() for variant in group.values()):
        assert each["images_per_second"] > 0 and each["tested_per_second"] > 0
        assert each["ratio_low"] <= each["ratio"] <= each["ratio_high"]
    assert results["steps"]["fp32"]["ratio"] == results["at once"]["tf32"]["ratio_low"] == 1


def test_a_variant_that_cannot_be_built_is_named_and_the_others_are_measured(tmp_path, monkeypatch):
    class Ours(bench.Ours):
        def __init__(self, variant, *args):
            if "compiled" in variant:
                raise ValueError("no compiler\nhere")
            super().__init__(variant, *args)

    monkeypatch.setattr(gpu_check, "GROUPS", {"compiled": ("bf16+compiled", "bf16")})
    monkeypatch.setattr(bench, "Ours", Ours)
    with pytest.raises(RunError, match=r"^bf16\+compiled: ValueError no compiler$"):
        gpu_check.run_part("speed", CPU, tmp_path, 100.0)
    assert list(json.loads((tmp_path / "results.json").read_text())["compiled"]) == ["bf16"]


def test_variants_are_what_their_names_say(monkeypatch):
    args = argparse.Namespace(images=8, batch_size=8, classes=100, data_dir=None)
    made = {name: bench.Ours(name, "resnet8:resnet8", args, CPU, "") for name in ("fp32", "fp32+contiguous+eager")}
    formats = {name: next(each.runs[0][0].student.parameters()) for name, each in made.items()}
    assert formats["fp32"].is_contiguous(memory_format=torch.channels_last)
    assert formats["fp32+contiguous+eager"].is_contiguous() and not formats["fp32"].is_contiguous()
    assert made["fp32+contiguous+eager"].runs[0][-1] is bench.train_step
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, backend: compiled.append((type(self).__name__, backend))
    )
    bench.Ours("fp32+compiled", "resnet20:resnet8", args, CPU, "")
    assert compiled == [("ResNet", "eager")] * 2


def test_the_table_is_filled_as_a_whole(tmp_path):
    results = results_of("table", tmp_path)
    assert list(results) == ["fp32", "tf32"]
    for each in results.values():
        assert each["rows"] == 162
        assert each["minutes_for_cifar100"] == pytest.approx(8.1e6 / each["rows_per_second"] / 60)


def test_epochs_are_those_of_the_training_script(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "CPU", gpu_check.CPU._replace(train=8, val=8))
    results = results_of("epochs", tmp_path)
    assert list(results) == ["tf32", "bf16", "tf32 x2"]
    for name, each in results.items():
        runs = 2 if "x2" in name else 1
        folder = tmp_path / (name if runs == 1 else "tf32_x2_seed-1")
        _, second = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        assert each["epoch_seconds"] == second["seconds"] and each["hours"] == second["seconds"] / 15
        assert each["hours_per_run"] == each["hours"] / runs
    assert gpu_check.NAME not in dataset_dict


def test_memory_is_measured_for_each_case(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "CPU", gpu_check.CPU._replace(val=4, batch_size=2))
    results = results_of("memory", tmp_path)
    cases = ("fp32 x1", "fp32+eager x1", "tf32 x1", "bf16 x1", "tf32 x2")
    assert list(results) == [f"resnet8:resnet8 {case}" for case in cases]
    assert all(each["process_mib"] > 100 for each in results.values())


def test_losses_are_compared_with_those_of_plain_runs_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "CPU", gpu_check.CPU._replace(compared=16))
    results = results_of("agreement", tmp_path)
    assert list(results) == ["fixed", "ctkd-global"]
    for name, each in results.items():
        assert 0 <= each["largest_relative_difference"] < 1e-4 and len(each["here"]) == len(each["cpu"]) == 3
        configs = [json.loads((tmp_path / f"{name}_{kind}/config.json").read_text()) for kind in ("here", "cpu")]
        assert [config["options"]["plain"] for config in configs] == [False, True]


def test_losses_that_differ_fail(tmp_path, monkeypatch):
    logs = iter([[{"loss": 1.0}, {"loss": 2.0}], [{"loss": 1.0}, {"loss": 2.1}]] * 2)
    monkeypatch.setattr(gpu_check, "distil", lambda *_: [tmp_path])
    monkeypatch.setattr(gpu_check, "read_log", lambda folder: next(logs))
    with pytest.raises(RunError, match=r"more than 0.01: fixed is off by 4.8e-02, ctkd-global is off by 4.8e-02"):
        gpu_check.run_part("agreement", CPU, tmp_path, 100.0)
    assert json.loads((tmp_path / "results.json").read_text())["fixed"]["cpu"] == [1.0, 2.1]


def test_the_conventional_loops_are_measured_by_bench(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "measure", lambda *args: asked.append(args) or {"field 0 workers": {"train": 1.0}})
    assert results_of("loops", tmp_path) == {"resnet8:resnet8": {"field 0 workers": {"train": 1.0}}}
    ((pair, args, _, until),) = asked
    assert pair == "resnet8:resnet8" and until <= time.monotonic() + 80
    assert bench.variants_of(args) == ["field 0 workers", "mdistiller 0 workers", "tf32"]


XML = '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase name="a"><failure/></testcase>'
XML += '<testcase name="b"><skipped/></testcase><testcase name="c"/></testsuite></testsuites>'


@pytest.mark.parametrize(("status", "device", "fails"), [(1, "cpu", True), (0, "cpu", False), (0, "cuda", True)])
def test_the_tests_of_gpus_are_counted(status, device, fails, tmp_path, monkeypatch):
    asked = []

    def run(command, cwd):
        asked.append(command)
        (tmp_path / "tests.xml").write_text(XML)
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", run)
    check = gpu_check.Check(torch.device(device), gpu_check.CPU, tmp_path, 0.0)
    results = gpu_check.tests(check)
    assert next(results) == ("gpu", {"tests": 3, "failures": 1, "errors": 0, "skipped": 1, "failed": ["a"]})
    if fails:
        with pytest.raises(RunError, match="1 tests failed and 1 were skipped"):
            next(results)
    else:
        assert next(results, None) is None
    files = [word for word in asked[0] if word.endswith(".py")]
    assert (
        str(ROOT / "tests/integration/test_speed.py") in files and str(ROOT / "tests/unit/test_house.py") not in files
    )


def stand_in(folder, script):
    """Return a Python that, in place of a part, runs a shell script in the part's folder."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\ncd "$(dirname "$0")/part"\n{script}\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "state", "error"),
    [("exit 0", "passed", ""), ("echo 'error: it is broken' >&2; exit 1", "failed", "error: it is broken"),
     ("sleep 60 & echo $! > child; wait", "failed", "not over after 1 s")],
)  # fmt: skip
def test_what_a_part_measured_is_kept_however_it_ends(script, state, error, tmp_path, monkeypatch):
    begin = """echo '{"first": {"ms": 2.5}}' > results.json\n"""
    monkeypatch.setattr(sys, "executable", stand_in(tmp_path, begin + script))
    outcome = gpu_check.attempt("speed", CPU, tmp_path / "part", 1.0)
    assert (outcome["state"], outcome["error"], outcome["results"]) == (state, error, {"first": {"ms": 2.5}})
    assert outcome["seconds"] < 30
    if "sleep" in script:  # the processes that a part started end with it
        stat = Path("/proc", (tmp_path / "part/child").read_text().strip(), "stat")
        assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_the_report_has_all_parts_and_a_summary(tmp_path, monkeypatch, capsys):
    outcomes = {
        "speed": {"state": "passed", "seconds": 2.0, "error": "", "results": {"steps": {"fp32": {"ratio": 1.5}}}},
        "table": {"state": "failed", "seconds": 5.0, "error": "not over after 5 s", "results": {"fp32": {"rows": 7}}},
    }

    def attempt(name, device, folder, seconds):
        folder.mkdir()
        (folder / "output.txt").write_text(f"output of {name}")
        return outcomes[name]

    monkeypatch.setattr(gpu_check, "attempt", attempt)
    argv = ["--parts", "speed", "table", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *argv])
    with pytest.raises(RunError, match=r"1 of 2 parts did not pass \(table\): see "):
        gpu_check.main()
    text = (tmp_path / "gpu_check.txt").read_text()
    assert text in capsys.readouterr().out
    *_, speed, table = text.splitlines()
    assert speed.split() == ["speed", "passed", "2.0", "160"] and table.split() == ["table", "failed", "5.0", "25"]
    assert "  steps\n    fp32:  ratio 1.5\n" in text and "  fp32:  rows 7\n  not over after 5 s\n" in text
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["parts"] == outcomes and report["machine"]["images"].startswith("random")
    with tarfile.open(tmp_path / "gpu_check.tar.gz") as archive:
        assert archive.getnames() == ["gpu_check.txt", "gpu_check.json", "speed/output.txt", "table/output.txt"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *argv, "--seconds", "5"])
    with pytest.raises(RunError, match="2 of 2 parts did not pass"):
        gpu_check.main()
    assert "speed       not run " in (tmp_path / "gpu_check.txt").read_text()


def test_the_loops_are_shown_as_the_table_of_the_benchmark():
    measured = {"images_per_second": 10.0, "memory_mib": 7.0, "of_peak": 50.0}
    measured |= {f"{name}{end}": 1.5 for name in ("train", "validation") for end in ("", "_low", "_high")}
    part = {"state": "passed", "seconds": 1.0, "error": ""}
    report = {"machine": {}, "parts": {"loops": part | {"results": {"a:b": {"field 4 workers": measured}}}}}
    lines = gpu_check.text(report).splitlines()
    assert f"  {list(bench.table(report['parts']['loops']['results']))[1]}" in lines
    report["parts"]["loops"]["results"] = {}  # ended before its first result
    assert gpu_check.text(report).splitlines()[-1].split() == ["loops", "passed", "1.0", "115"]


def test_real_images_are_used_where_they_are(cifar100_dir, monkeypatch):
    assert len(gpu_check.images(8, 4).val_images) == 4
    monkeypatch.setenv("CIFAR100_DIR", str(cifar100_dir))
    data = gpu_check.images(8, 4)
    assert (len(data.train_images), len(data.val_target), data.num_classes) == (8, 4, 100)
    args = argparse.Namespace(images=8, classes=100, data_dir=str(cifar100_dir))
    images, target = bench.images_of(args)
    assert torch.equal(images.permute(0, 3, 1, 2), data.train_images) and torch.equal(target, data.train_target)
    assert gpu_check.machine(CPU)["images"] == "CIFAR-100"


def test_missing_packages_are_named(tmp_path, monkeypatch, capsys):
    path = tmp_path / "requirements.txt"
    path.write_text("torch>=2.6\nno-such-package>=1\nnor.this[extra]==2; python_version > '3'\n")
    assert packages.missing(ROOT / "requirements.txt") == []
    monkeypatch.setattr(sys, "argv", ["packages.py", str(path)])
    with pytest.raises(SystemExit) as end:
        packages.main()
    assert end.value.code == 2
    assert "has no no-such-package, nor.this: install them" in capsys.readouterr().err


@pytest.mark.full
def test_the_script_runs_every_part_on_a_cpu(tmp_path):
    """The whole command, in minutes on two cores."""
    done = subprocess.run(
        ["sh", "scripts/gpu_check.sh", "--device", "cpu", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {name: part["state"] for name, part in report["parts"].items()} == dict.fromkeys(gpu_check.PARTS, "passed")
