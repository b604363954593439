"""Several processes that train one network together: gloo, on the CPU."""

import copy
import hashlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from common import OWN_LOSS, Normed, Tiny, check_same_end, distil, in_turn, make, product_of, read_log, train
from PIL import Image
from torch import nn

from dataset.memory import MemoryLoader
from distiller_zoo import distiller_dict
from helper import checkpoint, distributed
from helper.first_stage import FirstTask
from helper.loops import evaluate, train_one_epoch
from helper.metrics import Metrics
from helper.run_folder import RunFolder
from helper.task import Vanilla
from helper.teacher_cache import OnlineTeacher
from helper.trainer import make_optimizer, make_step
from inputs import UserError
from models import create_model
from options.parse import parse_student
from temperature import temperature_dict

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 52  # in batches of 16: the last one has 4, which three processes cannot split evenly
PAIRS = product_of(OWN_LOSS, temperature_dict, few=in_turn)


class Wide(MemoryLoader):
    """Batches in float64, in which rounding does not matter."""

    def normalise(self, pixels):
        return pixels.double().sub_(self.mean).div_(self.std)


def loader(count=IMAGES, batch_size=16, augment=True, kind=MemoryLoader):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return kind(
        images=images, target=torch.arange(count) % 10, batch_size=batch_size, mean=(0.5,) * 3, std=(0.25,) * 3,
        device="cpu", augment=augment, flip=True, rank=distributed.rank(), world_size=distributed.world_size(),
    )  # fmt: skip


def digest(module):
    """Return a hash of every bit of a module's state, including buffers that are not saved."""
    known = hashlib.sha256()
    for tensor in (*module.parameters(), *module.buffers()):
        known.update(tensor.detach().numpy().tobytes())
    return known.hexdigest()


def noted_epoch(task, teacher, batches, step=None):
    """Train an epoch with the steps of the command line; return losses, digests after each step, and the record."""
    losses, digests = [], []

    def note(number, output):
        assert number == len(losses) + 1
        losses.append(output.loss.item())
        digests.append(digest(task))

    step = step or make_step(task, torch.device("cpu"), {})
    optimizer = make_optimizer(task, 0.05, 0.9, 5e-4)
    record = train_one_epoch(task, teacher, batches, optimizer, Metrics(), 1, on_step=note, step=step)
    return {"losses": losses, "digests": digests, "record": record}


def trained(distill, temperature):
    """Train a small network without batch norm; return losses, digests after each step, and the final state."""
    torch.manual_seed(0)
    expert = Normed(width=12).double().eval()
    module = make(temperature, distill, Tiny(), expert, target=torch.arange(IMAGES) % 10).double()
    getattr(module.temperature, "agent", nn.Identity()).float()  # its inputs are always float32
    for name, layer in list(module.student.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):  # of SimKD's projector
            module.student.set_submodule(name, nn.Identity())
    return noted_epoch(module, OnlineTeacher(expert), loader(kind=Wide)) | {"state": module.state_dict()}


def first_stage(distill):
    """Train an epoch of the first stage of small networks, and one of their own; return what `trained` does of both."""
    torch.manual_seed(0)
    expert = Tiny(width=8 if distill == "fsp" else 12).double().eval()
    main = make("fixed", distill, Tiny(), expert, target=torch.arange(IMAGES) % 10).double()
    task, step = FirstTask(main, 32), make_step(main, torch.device("cpu"), {})  # before the first stage, as in a run
    known = OnlineTeacher(expert), loader(kind=Wide)
    with task.learning():
        first = noted_epoch(task, *known) | {"state": copy.deepcopy(main.state_dict())}
    return first, noted_epoch(main, *known, step) | {"state": main.state_dict()}


def real_networks():
    """Train networks with batch norm; return digests, and an evaluation on images that cannot be split evenly."""
    torch.manual_seed(0)
    module = Vanilla(create_model("resnet8", 10))
    noted = noted_epoch(module, None, loader(32))
    return noted | {"tested": evaluate(module.student, loader(7, 2, augment=False))}


def work(rank, size, port, connection):
    """Join the other processes in this one, and compute whatever is requested."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with distributed.process_group(torch.device("cpu"), 120):
        while asked := pickle.loads(connection.recv_bytes()):
            what, arguments = asked
            connection.send_bytes(pickle.dumps(what(*arguments)))


def started(size):
    """Start processes that train together; yield connections to them."""
    port, connections = free_port(), []
    for rank in range(size):
        ours, theirs = torch.multiprocessing.Pipe()
        arguments = (rank, size, port, theirs)
        torch.multiprocessing.get_context("spawn").Process(target=work, args=arguments, daemon=True).start()
        theirs.close()
        connections.append(ours)
    return connections


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def together():
    """Return a function that runs work in each of `size` processes, which are started only once."""
    pools = {}

    def ask(size, what, *arguments):
        pools[size] = pools.get(size) or started(size)
        for connection in pools[size]:
            connection.send_bytes(pickle.dumps((what, arguments)))
        return [pickle.loads(connection.recv_bytes()) for connection in pools[size]]

    yield ask
    for connection in (each for pool in pools.values() for each in pool):
        connection.send_bytes(pickle.dumps(None))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("distill", "temperature"), PAIRS)
def test_processes_with_shares_of_a_batch_are_one_process_with_all_of_it(size, distill, temperature, together):
    if (size, temperature) == (3, "rlkd"):
        pytest.skip("three processes have a probe of nine images instead of eight")
    check_agreement(together(size, trained, distill, temperature), trained(distill, temperature))


@pytest.mark.parametrize("distill", [name for name, distiller in distiller_dict.items() if distiller.has_first_stage])
def test_processes_share_a_first_stage(distill, together):
    for ranks, alone in zip(zip(*together(2, first_stage, distill), strict=True), first_stage(distill), strict=True):
        check_agreement(ranks, alone)


def check_agreement(ranks, alone):
    """Check that losses and updated weights agree, and that after each step every bit is the same on all ranks."""
    assert len(alone["losses"]) == 4
    for each in ranks:
        assert each["digests"] == ranks[0]["digests"]
        assert each["losses"] == pytest.approx(alone["losses"], rel=1e-9)
        assert each["record"] == pytest.approx(alone["record"], rel=1e-6, nan_ok=True)
        for name, tensor in alone["state"].items():
            if isinstance(tensor, torch.Tensor):
                torch.testing.assert_close(each["state"][name], tensor, rtol=1e-6, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("size", [2, 3])
def test_batch_norms_agree_and_every_image_is_tested_once(size, together):
    ranks, alone = together(size, real_networks), real_networks()
    assert len(set(ranks[0]["digests"])) == 2
    for each in ranks:
        assert each["digests"] == ranks[0]["digests"]
        assert each["tested"] == ranks[0]["tested"]
        assert (each["tested"]["top1"] * 7 / 100) == pytest.approx(round(each["tested"]["top1"] * 7 / 100))
    assert alone["tested"].keys() == ranks[0]["tested"].keys()


def evaluated(state):
    model = Tiny()
    model.load_state_dict(state)
    return evaluate(model, loader(7, 2, augment=False))


@pytest.mark.parametrize("size", [2, 3])
def test_a_test_set_that_cannot_be_shared_evenly_is_counted_exactly(size, together):
    torch.manual_seed(0)
    state = Tiny().state_dict()
    alone = evaluated(state)
    for told in together(size, evaluated, state):
        assert told == pytest.approx(alone, rel=1e-6)


def probe_taken_up():
    """Save and load an RLKD run mid-epoch.

    Returns the probe before and after, what was saved, this process's shard of it, and the probe's images.
    """
    module = make("rlkd", "kd", Tiny(), Tiny(width=12), target=torch.arange(IMAGES) % 10)
    module.start_epoch(1)
    batch = next(iter(loader()))
    module.before_step(batch)
    before, state = module.probe, module.state_dict()
    module.probe = None
    module.load_state_dict(state)
    own = [distributed.shard(column) for column in module.probe]
    return before, module.probe, state["_extra_state"]["probe"], own, [batch.images, batch.target]


def test_each_process_takes_up_its_own_part_of_a_probe(together):
    told = together(2, probe_taken_up)
    _, _, (all_images, all_target), (images, target), _ = told[0]
    for before, after, saved, own, batch in told:
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert torch.equal(saved[0], all_images) and torch.equal(saved[1], all_target)
        assert all(torch.equal(a, b[: len(a)]) for a, b in zip(own, batch, strict=True))
    assert not torch.equal(images, told[1][3][0])
    assert torch.equal(all_images[::2], images) and len(all_target) == 2 * len(target)


def few_images(count):
    return evaluate(Tiny(), loader(count, 2, augment=False))


def test_fewer_images_than_processes_are_tested_too(together):
    ranks = together(3, few_images, 1)
    assert all(set(each) == {"test_loss", "top1", "top5"} for each in ranks)
    assert all(each["top1"] in (0.0, 100.0) for each in ranks)


def told_by_the_first(fails):
    def ask():
        if fails:
            raise fails("there is no such thing")
        return {"rank": distributed.rank()}

    try:
        return distributed.on_rank0(ask), distributed.any_rank(distributed.rank() == 1)
    except UserError as error:
        return type(error), str(error)


def test_the_first_process_finds_out_for_all(together):
    assert together(2, told_by_the_first, None) == 2 * [({"rank": 0}, True)]
    for kind in (UserError, UserError):
        assert together(2, told_by_the_first, kind) == 2 * [(kind, "there is no such thing")]


def turns_taken(folder):
    """Return which processes had written to the disk before this one, and whether errors are known to all."""

    def leave():
        there = sorted(path.name for path in folder.iterdir())
        (folder / str(distributed.rank())).touch()
        return there

    def fail(kind):
        raise kind(f"found by {distributed.rank()}")

    there = distributed.local_rank0_first(leave)
    with pytest.raises(UserError, match="found by 0") as first:
        distributed.local_rank0_first(lambda: fail(UserError))
    with pytest.raises(UserError, match="found by 1") as second:
        distributed.local_rank0_first(lambda: fail(UserError) if distributed.rank() == 1 else None)
    return there, first.value.known_to_all, second.value.known_to_all


def test_the_first_process_of_a_machine_is_done_before_the_others_begin(together, tmp_path):
    first, *others = together(3, turns_taken, tmp_path)
    assert first == ([], True, True)
    assert all("0" in there and known == [True, True] for there, *known in others)


def a_run_of_its_own(folder, differing):
    """Open a run's folder with different options in one process."""
    options = {"batch_size": 64, "num_workers": distributed.rank()}  # num_workers may differ between processes
    options |= differing if distributed.rank() else {}
    try:
        run = RunFolder(folder, "resnet8", {"options": options}, overwrite=False).check()
    except UserError as error:
        return str(error)
    module = Vanilla(Tiny())
    optimizer = make_optimizer(module, 0.05, 0.9, 5e-4)
    run.resume(module, optimizer, Metrics())
    run.folder = folder / f"{distributed.rank()}"
    run.folder.mkdir()
    run.save(module, optimizer, step=1)
    return run.config["processes"], (run.folder / "last.pth").exists()


def a_run_on_the_data_of_its_machine(folder, machines):
    """Return each process's hash of the data, and the error if two machines have different data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", str(0 if machines == 2 else distributed.rank()))
        known = distributed.one_a_machine(lambda: f"2:{distributed.rank()}")
    try:
        RunFolder(folder, "resnet8", {"kind": "teacher", "data_sha256": known, "options": {}}, overwrite=False).check()
    except UserError as error:
        return known, str(error).partition(":")[0]
    return known, None


def test_data_is_identified_once_a_machine(together, tmp_path):
    assert together(2, a_run_on_the_data_of_its_machine, tmp_path, 1) == [("2:0", None), (None, None)]
    says = "process 1 differs from process 0 (other data)"
    assert together(2, a_run_on_the_data_of_its_machine, tmp_path, 2) == [("2:0", says), ("2:1", says)]


def test_processes_that_were_told_something_else_are_refused(together, tmp_path):
    for told in together(2, a_run_of_its_own, tmp_path / "none", {"batch_size": 32}):
        assert told.startswith("process 1 differs from process 0 (batch_size 32 instead of 64): give all of them")
    assert not (tmp_path / "none").exists()
    tmp_path.joinpath("run").mkdir()
    assert together(2, a_run_of_its_own, tmp_path / "run", {}) == [(2, True), (2, False)]  # the first process wrote


# ---------------------------------------------------------------- the command line

LINE = "--dataset digits --train_subset 320 --batch_size 32 --epochs 2 --model resnet8 --lr 0.05 "


def command(script, line, *torchrun):
    started = [sys.executable, "-m", "torch.distributed.run", *torchrun] if torchrun else [sys.executable]
    return [*started, str(ROOT / script), *line.split()]


def run(command, status=0, **more):
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment() | more)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def environment():
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")} | {"OMP_NUM_THREADS": "1"}


def two():
    return "--nproc-per-node=2", "--standalone"


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    """Train in two processes, started by the published flags and not interrupted."""
    folder = tmp_path_factory.mktemp("two") / "resnet8_vanilla_digits"
    line = f"--multiprocessing-distributed --gpu_id 0,1 --device cpu --dist-url tcp://127.0.0.1:{free_port()} "
    return folder, run(command("train_teacher.py", LINE + line + f"--run_dir {folder}"))


def test_processes_that_the_published_flag_started_end_as_one_would(tmp_path):
    """They print one sentence and exit with the error's status; at a free port."""
    (tmp_path / "last.pth").touch()
    line = f"--multiprocessing-distributed --gpu_id 0,1 --device cpu --run_dir {tmp_path} "
    done = run(command("train_teacher.py", LINE + line), 2)
    assert done.stderr.count("\n") == 1 and "which is not from a run of this program" in done.stderr


def test_one_process_speaks_and_writes(run_of_two):
    folder, done = run_of_two
    assert done.stdout.count("train resnet8, digits") == done.stdout.count("images/s") == 1
    assert [record["epoch"] for record in read_log(folder)] == [1, 2]
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith("events")) == [
        ".lock", "ckpt_epoch_2.pth", "config.json", "curve.png", "last.pth", "log.jsonl", "resnet8_best.pth",
        "resnet8_last.pth",
    ]  # fmt: skip
    assert len(list(folder.glob("events*"))) == 1


def wait_for(path, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.05)


@pytest.mark.full  # as the test of two machines, on one
def test_a_lost_worker_is_started_again_and_the_end_is_the_same(run_of_two, tmp_path):
    line = f"self SIGKILL train_teacher.py {LINE} --run_dir {tmp_path / 'run'} --overwrite"
    done = run(command("tests/distributed/at_a_step.py", line, "--max-restarts=1", *two()))
    assert "resuming after epoch 1 of 2\n" in done.stdout
    check_same_end(tmp_path / "run", run_of_two[0])


@pytest.mark.parametrize("processes_before", [1, 2])
def test_a_run_that_was_asked_to_end_saves_within_the_epoch(processes_before, run_of_two, tmp_path):
    """It resumes bit by bit with as many processes, and also with another number of them."""
    folder = tmp_path / "run"
    line = LINE + f"--run_dir {folder}"
    whom, torchrun = ("self", ()) if processes_before == 1 else ("parent", two())
    status = 143 if processes_before == 1 else 1  # torchrun has a status of its own
    told = run(command("tests/distributed/at_a_step.py", f"{whom} SIGTERM train_teacher.py {line}", *torchrun), status)
    assert f"stopped; {folder} keeps the state after epoch 1 and 3 steps of the next" in told.stdout
    done = run(command("train_teacher.py", line, *two()))
    assert "resuming after epoch 1 of 2 and 3 steps of the next" in done.stdout
    if processes_before == 2:
        check_same_end(folder, run_of_two[0])
    else:
        assert "2 processes instead of 1" in done.stdout
        assert len(read_log(folder)) == 2


def test_two_machines_meet_and_survive_the_loss_of_a_worker(run_of_two, tmp_path):
    """Two torchrun agents with one worker each, as on two machines."""
    folder, port = tmp_path / "run", free_port()
    nodes = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}")
    line = f"self SIGKILL train_teacher.py {LINE} --run_dir {folder}"
    started = command("tests/distributed/at_a_step.py", line, "--max-restarts=1", *nodes)
    new_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agents = [subprocess.Popen(started, cwd=ROOT, env=environment() | new_store) for _ in range(2)]
    assert [agent.wait(300) for agent in agents] == [0, 0]
    check_same_end(folder, run_of_two[0])


def test_a_process_that_never_comes_is_an_error_within_the_timeout(tmp_path):
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    alone["MASTER_PORT"] = str(free_port())
    started = command("train_teacher.py", LINE + f"--dist_timeout 3 --run_dir {tmp_path / 'run'}")
    done = run(started, 1, **alone)
    assert "process 0 of 2 timed out after 3 s of waiting for another" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_student_of_two_processes(run_of_two, tmp_path):
    line = f"--dataset digits --train_subset 96 --batch_size 32 --epochs 1 --path-t {run_of_two[0]} --device cpu "
    line += "--temperature ctkd-global --teacher_table "
    told = []
    for name, torchrun in (("one", ()), ("two", two())):
        folder = tmp_path / name
        own = f"--run_dir {folder} --table_dir {tmp_path / name}-table"
        told.append(run(command("train_student.py", line + own, *torchrun)).stdout)
        (record,) = read_log(folder)
        assert record["tau_mean"] > 0
    assert [text.count("the teacher resnet8 has top-1") for text in told] == [1, 1]
    assert read_log(tmp_path / "one")[0]["loss"] == pytest.approx(read_log(tmp_path / "two")[0]["loss"], rel=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs here")
def test_synchronised_batch_norm_needs_gpus_where_there_are_several_processes(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", nn.BatchNorm2d.forward)  # SyncBatchNorm's own needs GPUs
    for start, line in ((train, "--model resnet8"), (distil, f"--path-t {teacher} --model_s resnet8")):
        start(f"{line} --train_subset 16 --batch_size 8 --epochs 1 --sync_bn --run_dir {tmp_path / start.__name__}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--sync_bn works on GPUs only"):
        parse_student(["--sync_bn"])


def test_what_only_one_process_finds_wrong_is_said(tmp_path):
    """An image in the second process's shard cannot be read."""
    for split, count in (("train", 8), ("val", 2)):
        (tmp_path / split / "cat").mkdir(parents=True)
        for i in range(count):
            pixels = torch.full((40, 40, 3), 10 * i, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / split / "cat" / f"{i}.png")
    (tmp_path / "val/cat/1.png").write_bytes(b"no image")  # the second of two images is the second process's
    line = f"--dataset imagenet --data_dir {tmp_path} --image_size 32 --model resnet8 --batch_size 8 --epochs 1 "
    line += f"--num_workers 0 --device cpu --run_dir {tmp_path / 'run'}"
    started = command("train_teacher.py", line, *two())
    done = run(started, 1)
    assert done.stderr.count("error in process 1: the image") == 1
    assert "val/cat/1.png cannot be read" in done.stderr


def descendants(pid):
    """Return the processes that a process has started, and their descendants."""
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    children = [int(child) for children in lists for child in children]
    return [*children, *(each for child in children for each in descendants(child))]


@pytest.mark.parametrize("whom", ["group", "torchrun", pytest.param("everyone", marks=pytest.mark.full)])
def test_workers_that_decode_do_not_die_before_the_training_has_saved(whom, tmp_path):
    """Ctrl-C and torchrun signal whole process groups, Slurm all processes."""
    for split, count in (("train", 192), ("val", 4)):
        (tmp_path / split / "cat").mkdir(parents=True)
        for i in range(count):
            pixels = torch.full((40, 40, 3), i, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / split / "cat" / f"{i}.png")
    folder = tmp_path / "run"
    line = f"--dataset imagenet --data_dir {tmp_path} --image_size 32 --model resnet8 --batch_size 8 --epochs 50 "
    line += f"--num_workers 2 --device cpu --lr 0.001 --run_dir {folder}"
    started = command("train_teacher.py", line, *(() if whom == "group" else two()))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(started, cwd=ROOT, env=environment(), start_new_session=True, **pipes) as running:
        wait_for(folder / "last.pth")
        time.sleep(0.3)
        if whom == "torchrun":
            running.terminate()
        elif whom == "group":
            os.killpg(running.pid, signal.SIGTERM)
        else:
            for each in (running.pid, *descendants(running.pid)):
                os.kill(each, signal.SIGTERM)
        told, _ = running.communicate(timeout=100)
    assert running.returncode == (143 if whom == "group" else 1), told
    assert "stopped; " in told and "is killed by signal" not in told
    assert checkpoint.load(folder / "last.pth")["history"]
