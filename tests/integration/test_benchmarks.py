"""The benchmarks run, and measure what they claim."""

import argparse
import json
import os
import sys
from contextlib import contextmanager

import pytest
import torch
from common import OWN_LOSS
from tqdm import tqdm

from benchmarks import bench, cka_bias, cost, growth, operations, sharing
from benchmarks.baseline import LOOPS
from inputs import UserError
from models import create_model
from temperature import temperature_dict

SMALL = "--model_t resnet8 --model_s resnet8 --batch_size 4 --rounds 2 --temperature fixed"
KINDS = {"distillers": OWN_LOSS, "temperatures": temperature_dict}


def run(line, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cost.py", *line.split()])
    cost.main()


@pytest.mark.parametrize("what", KINDS)
def test_the_cost_of_each_is_relative_to_the_first(what, monkeypatch, capsys):
    run(f"{what} {SMALL} --steps 2 --json", monkeypatch)
    told = json.loads(capsys.readouterr().out)
    result = told["cost"]
    assert list(result) == list(KINDS[what])
    assert result[{"distillers": "kd", "temperatures": "fixed"}[what]]["ratio"] == 1
    assert all(0 < each["low"] <= each["ratio"] <= each["high"] for each in result.values())
    learning = [name for name, each in result.items() if each["parameters"]]
    if what == "distillers":
        assert learning == ["vid", "crd", "srrl", "dpk", "hint", "cc", "ickd", "srd", "reviewkd", "ofd", "simkd",
                            "itrd", "ft"]  # fmt: skip
        assert result["crd"]["parameters"] == 2 * (64 + 1) * 128
    else:
        assert learning == ["ctkd-global", "ctkd-instance", "rlkd"]
        assert result["ctkd-global"]["parameters"] == 1


def test_the_agent_learns_in_the_steps_that_are_timed(monkeypatch, capsys):
    updates = []
    monkeypatch.setattr(temperature_dict["rlkd"], "_learn", lambda self: updates.append(self.rewards.clear()))
    monkeypatch.setattr(cost, "WARM_UP", 0)
    monkeypatch.setattr(cost, "temperature_dict", {name: temperature_dict[name] for name in ("fixed", "rlkd")})
    run(f"temperatures {SMALL}", monkeypatch)
    assert len(updates) == 2  # one per round
    capsys.readouterr()


@pytest.mark.parametrize("what", KINDS)
def test_the_table_is_aligned(what, monkeypatch, capsys):
    run(f"{what} {SMALL} --steps 1", monkeypatch)
    _, heading, *rows, footnote = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == list(KINDS[what])
    assert footnote.startswith("ratio: ")
    assert {len(row) for row in rows} == {len(heading)}


def test_one_round_has_no_spread(monkeypatch):
    for wrong in ("--rounds 1", "--steps 0"):
        with pytest.raises(UserError, match="--rounds and --batch_size must be 2 or more|--steps must be 1 or more"):
            run(f"distillers {SMALL} {wrong}", monkeypatch)


def test_the_table_of_cka_is_aligned_and_refuses_what_cannot_be_estimated(monkeypatch, capsys):
    monkeypatch.setattr(cka_bias, "FEATURES", (16, 8192))
    monkeypatch.setattr(sys, "argv", ["cka_bias.py", "--batch_size", "8", "--batches", "3"])
    cka_bias.main()
    _, heading, *rows, _, _ = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 * 2 * 4
    assert {len(row) for row in rows} == {len(heading)}
    for wrong in (["--batch_size", "3"], ["--batches", "1"]):
        monkeypatch.setattr(sys, "argv", ["cka_bias.py", *wrong])
        with pytest.raises(UserError, match="--batch_size must be 4 or more|--batches must be 2 or more"):
            cka_bias.main()


def test_the_benchmark_measures_ratios_to_the_field(monkeypatch, capsys):
    line = "--pairs resnet8:resnet8 --variants fp32+table --images 16 --batch_size 8 --rounds 2 --workers 0 1"
    line += " --loops field --trials 2 --device cpu --json"
    monkeypatch.setattr(sys, "argv", ["bench.py", *line.split()])
    bench.main()
    told = capsys.readouterr()
    result = json.loads(told.out)["results"]["resnet8:resnet8"]
    fields, ours = ["field 0 workers", "field 1 workers"], ["fp32+table"]
    assert list(result) == [*fields, *ours, *(f"{name} x2 at once" for name in ours)]
    assert any(result[name]["train"] == result[name]["train_low"] == 1 for name in fields)
    for each in result.values():
        assert 0 < each["train_low"] <= each["train"] <= each["train_high"]
        assert 0 < each["validation_low"] <= each["validation"] <= each["validation_high"]
        assert each["images_per_second"] > 0 and each["memory_mib"] > 100 and 0 < each["of_peak"] < 100
    *_, ratio, hours, table = lines = told.err.strip().splitlines()
    assert ratio.startswith("ratio: ") and hours.startswith("hours: ") and table.startswith("table: ")
    rows = lines[-8:-3]
    assert "cores" in lines[-9]
    assert {len(row) for row in rows} == {len(rows[0])}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--pairs resnet8", "a pair is a teacher and a student"),
        ("--pairs resnet8:nonsense", "unknown model 'nonsense'"),
        ("--rounds 1", "--rounds and --batch_size must be 2 or more"),
        ("--workers -1", "--workers must be 0 or more"),
        ("--device nonsense", "'nonsense' is no device"),
        ("--precision tf32 --variants plain", "plain computes in float32"),
        ("--data_dir nowhere --classes 10", "CIFAR-100 has 50000 images of 100 classes"),
    ],
)
def test_the_benchmark_refuses_nonsense(line, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", *line.split()])
    with pytest.raises(UserError, match=message):
        bench.main()


def baseline(name, images):
    """Return a conventional loop with resnet8 as student and an equal teacher, on random images."""
    args = argparse.Namespace(images=images, classes=100, data_dir=None)
    torch.manual_seed(0)
    networks = [create_model("resnet8", 100) for _ in range(2)]
    return LOOPS[name](*networks, *bench.images_of(args), 8, 0, torch.device("cpu"))


def test_all_conventional_loops_train_the_same(monkeypatch, capsys):
    """From equal weights and batches they come to equal weights; how they read back and show is their own."""
    ends = {}
    for name in LOOPS:
        loop = baseline(name, 16)
        loop.train_loader = [(torch.ones(8, 3, 32, 32), torch.arange(8), torch.arange(8))[: 2 + loop.indexed]] * 2
        loop.train()
        loop.validate()
        ends[name] = torch.cat([value.flatten() for value in loop.student.state_dict().values()])
    for name in ("repdistiller", "mdistiller"):
        torch.testing.assert_close(ends[name], ends["field"], rtol=1e-4, atol=1e-5)
    before = torch.cat([value.flatten() for value in baseline("field", 16).student.state_dict().values()])
    assert (ends["field"] - before).abs().max() > 1e-3
    assert "loss " in capsys.readouterr().out  # RepDistiller's, every hundred steps


@pytest.mark.parametrize(("name", "sizes"), [("field", (4, 6)), ("repdistiller", (4, 3)), ("mdistiller", (8, 1))])
def test_conventional_loops_have_their_own_loaders(name, sizes):
    loop = baseline(name, 16)
    assert loop.of_validation(8, 6) == sizes
    batch = next(iter(loop.train_loader))
    assert len(batch) == 2 + (name != "field")
    assert batch[0].shape == (8, 3, 32, 32)


def test_ratios_are_to_each_loop_with_its_best_workers(monkeypatch):
    """Made-up times: of the field's loop two workers are faster, of RepDistiller's none."""
    times = {"field 0 workers": 8.0, "field 2 workers": 4.0, "repdistiller 0 workers": 3.0,
             "repdistiller 2 workers": 6.0, "fp32": 1.0, "fp32 x2 at once": 1.0}  # fmt: skip
    asked = []

    class Stub:
        def __init__(self, variant):
            self.variant = variant

        def send(self, what):
            asked.append(self.variant)

        def recv(self):
            return times[self.variant], 2.0, 100.0

    @contextmanager
    def servers(variants, pair, args):
        yield {variant: Stub(variant) for variant in variants}

    monkeypatch.setattr(bench, "servers", servers)
    monkeypatch.setattr(bench, "shares", lambda rates, *_: dict.fromkeys(rates, 50.0))
    given = {"loops": ["field", "repdistiller"], "workers": [0, 2], "variants": ["fp32"], "trials": 2, "images": 10}
    args = argparse.Namespace(**given, rounds=5)
    result = bench.measure("a:b", args, tqdm(disable=True))
    assert list(result) == list(times) and len(asked) == 6 * 6
    assert [result["fp32"]["train"], result["fp32"]["over"]["repdistiller"]["train"]] == [4, 3]
    assert [result["fp32 x2 at once"]["train"], result["fp32 x2 at once"]["validation"]] == [8, 2]
    assert result["fp32"]["images_per_second"] == 10 and result["fp32 x2 at once"]["images_per_second"] == 20
    asked.clear()
    bench.measure("a:b", args, tqdm(disable=True), until=0.0)  # the time is over: two rounds, and one that warms up
    assert len(asked) == 3 * 6
    lines = list(bench.table({"a:b": result}))
    assert len(lines) == 2 * (1 + len(times)) and len({len(line) for line in lines[7:]}) == 1
    assert lines[7].split() == ["training,", "over", "repdistiller", "quartiles"]
    assert lines[-2].split() == ["fp32", "3.00", "3.00-3.00"]
    assert lines[1].split()[3:6] == ["1", "2666.7", "50"]  # 240 epochs of 50,000 images at 1.25 images a second


def test_the_share_of_the_peak_is_that_of_the_operations(monkeypatch):
    monkeypatch.setattr(bench, "peak", lambda device, dtype: 1e9 if dtype == torch.float32 else 2e9)
    args = argparse.Namespace(device="cpu", precision="fp32", classes=100)
    rates = dict.fromkeys(("field 0 workers", "fp32+table", "bf16", "bf16+table x2 at once"), 1.0)
    found = bench.shares(rates, "resnet56:resnet8", args)
    # multiplications by hand: outputs times inputs of each convolution
    stem, first = 32**2 * 16 * 27, 32**2 * 2 * 16 * 144
    second = 16**2 * 32 * (144 + 288 + 16)
    third = 8**2 * 64 * (288 + 576 + 32)
    forward = 2 * (stem + first + second + third + 6400)
    student = 3 * forward - 2 * stem  # images need no gradient
    teacher = 1e9 * (found["field 0 workers"] - found["fp32+table"]) / 100
    assert found["fp32+table"] == pytest.approx(100 * student / 1e9)
    assert found["bf16+table x2 at once"] == pytest.approx(found["fp32+table"] / 2)
    assert found["bf16"] == pytest.approx(found["field 0 workers"] / 2)
    assert teacher == pytest.approx(2 * 125.49e6, rel=0.01)  # 125 million multiplications, as is often stated


def test_the_peak_is_measured(monkeypatch):
    monkeypatch.setattr(bench, "SIDE", {"cpu": 64})
    bench.peak.cache_clear()
    assert 1e6 < bench.peak(torch.device("cpu"), torch.float32) < 1e13
    bench.peak.cache_clear()


def test_precision_is_the_same_in_all_loops(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--precision", "tf32"])
    assert bench.parse_args().variants == ["tf32", "bf16", "tf32+table", "bf16+table"]
    seen = {}

    class Connection:
        def send(self, what): ...

        def recv(self):
            seen[self.variant] = torch.backends.cudnn.allow_tf32
            return "end"

    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    connection = Connection()
    args = argparse.Namespace(
        images=8, batch_size=8, classes=100, device="cpu", precision="tf32", data_dir=None, trials=1
    )
    for precision in ("tf32", "fp32"):
        args.precision = precision
        for connection.variant in ("field 0 workers", "mdistiller 0 workers", precision):
            bench.serve(connection, connection.variant, "resnet8:resnet8", args)
        assert set(seen.values()) == {precision == "tf32"} and len(seen) == 3
        seen.clear()
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before


def test_growth_is_measured_and_drawn(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(growth, "SIZES", {"images": (16, 32), "batch_size": (4, 8), "classes": (5, 10)})
    monkeypatch.setattr(growth, "BASE", {"images": 16, "batch_size": 4, "classes": 5})
    argv = ["--model_t", "resnet8", "--rounds", "1", "--device", "cpu", "--json"]
    argv += ["--plot", str(tmp_path / "growth.png")]
    monkeypatch.setattr(sys, "argv", ["growth.py", *argv])
    growth.main()
    told = capsys.readouterr()
    seconds = json.loads(told.out)["seconds"]
    assert {name: [int(size) for size in each] for name, each in seconds.items()} == {
        "images": [16, 32], "batch_size": [4, 8], "classes": [5, 10],
    }  # fmt: skip
    assert told.err.count("exponent") == 4
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert growth.exponent({1: 1.0, 2: 3.0, 4: 16.0}) == pytest.approx(2)


def test_the_profile_adds_up(monkeypatch, capsys):
    line = "--pair resnet8:resnet8 --variants fp32 fp32+table --images 16 --batch_size 8"
    monkeypatch.setattr(sys, "argv", ["operations.py", *line.split()])
    operations.main()
    _, heading, *rows = capsys.readouterr().out.splitlines()
    assert {len(row) for row in rows} == {len(heading)}
    shares = {row[:24].strip(): row[24:].split() for row in rows}
    assert shares["all"][1::2] == ["100%", "100%"]
    for column in (0, 2):
        values = [float(cells[column]) for kind, cells in shares.items() if kind != "all"]
        assert sum(values) == pytest.approx(float(shares["all"][column]), abs=0.5)
        assert float(shares["convolutions, backward"][column]) > 0


def run_sharing(monkeypatch, capsys, chosen):
    """Run sharing.py; return the numbers of each row, by the setting's name."""
    line = "--pair resnet8:resnet8 --images 16 --batch_size 8 --rounds 1 --threads 1"
    monkeypatch.setattr(sharing, "SETTINGS", chosen)
    monkeypatch.setattr(sys, "argv", ["sharing.py", *line.split()])
    before = dict(os.environ)
    sharing.main()
    assert dict(os.environ) == before
    machine, heading, *rows = capsys.readouterr().out.splitlines()
    assert "1 threads" in machine
    assert len(rows) == len(chosen) and {len(row) for row in rows} == {len(heading)}
    assert all(row.startswith(name) for row, name in zip(rows, chosen, strict=True))
    return [[float(x) for x in row.removeprefix(name).split()] for row, name in zip(rows, chosen, strict=True)]


def test_sharing_measures_a_training_alone_and_beside_another(monkeypatch, capsys):
    ((alone, shared, ratio),) = run_sharing(monkeypatch, capsys, dict(list(sharing.SETTINGS.items())[-1:]))
    assert alone > 0 and shared > 0 and ratio == pytest.approx(shared / alone, rel=0.1)


def test_sharing_measures_every_setting(monkeypatch, capsys):
    settings = dict(sharing.SETTINGS)
    monkeypatch.setattr(sharing, "measure", lambda spin, threads, *_: (10.0, int(spin) / 1000 + threads))
    rows = run_sharing(monkeypatch, capsys, settings)
    shared = [int(spin) / 1000 + threads for spin, threads in settings.values()]
    assert rows == [[10, pytest.approx(each, abs=0.51), pytest.approx(each / 10, abs=0.0051)] for each in shared]


@pytest.mark.parametrize(("threads", "own"), [(0, "5"), (1, "1")])
def test_trainings_of_sharing_start_with_their_spin_count_and_threads(threads, own, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "9")
    seen = []

    @contextmanager
    def servers(*_):
        seen.append({name: os.environ[name] for name in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")})
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(sharing, "servers", servers)
    with pytest.raises(KeyboardInterrupt):
        sharing.measure("7", threads, argparse.Namespace(threads=5, pair=""), None)
    assert seen == [{"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": own}]
    assert os.environ["GOMP_SPINCOUNT"] == "9"


def test_only_ours_have_the_memory_and_the_threads_of_the_runners(monkeypatch):
    seen = {}
    monkeypatch.setattr(bench, "serve", tell_environment)
    args = argparse.Namespace()
    with bench.servers(["field 0 workers", "fp32"], "", args) as connections:
        for name, connection in connections.items():
            connection.send("round")
            seen[name] = connection.recv()
    ours = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT")}
    assert seen == {"field 0 workers": {"GLIBC_TUNABLES": "", "GOMP_SPINCOUNT": "300000"}, "fp32": ours}


def tell_environment(connection, *_):
    """Stand in for bench.serve in a process: send what was set for it."""
    connection.send("ready")
    while connection.recv() == "round":
        connection.send({name: os.environ.get(name) for name in ("GLIBC_TUNABLES", "GOMP_SPINCOUNT")})
