"""The rules and messages for several processes, without starting any."""

import socket
from types import SimpleNamespace

import pytest
from common import Tiny

from dataset import create_dataset
from helper import checkpoint, device, distributed, signals
from helper.errors import Interrupted, RunError
from helper.metrics import Metrics
from helper.run_folder import RunFolder
from helper.task import Vanilla
from helper.trainer import Trainer, make_optimizer
from inputs import UserError
from options.parse import parse_student


def test_what_several_processes_cannot_do_is_said(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--trials trains side by side in one process"):
        parse_student(["--trials", "2"])
    monkeypatch.delenv("RANK", raising=False)
    for address in ("nowhere", "tcp://127.0.0.1:99999"):
        with pytest.raises(UserError, match="--dist_url is an address and a port"):
            distributed.start_together(2, address)


def test_a_meeting_point_must_be_free(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"cannot meet at tcp://127.0.0.1:\d+ \(Address already in use\)"):
            distributed.start_together(2, f"tcp://127.0.0.1:{taken.getsockname()[1]}")


def test_a_device_that_only_one_process_lacks_is_said_by_that_one(monkeypatch, capsys):
    for local_rank, said in (("0", 0), ("1", 1)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        monkeypatch.setenv("RANK", local_rank)
        options = {"device": "cuda:99", "gpu_id": None, "deterministic": False, "plain": True, "dist_timeout": 1,
                   "precision": "fp32"}  # fmt: skip
        with pytest.raises(UserError, match="there is no device cuda:99"), device.device_of(SimpleNamespace(**options)):
            pass
        assert capsys.readouterr().err.count("error in process 1: there is no device cuda:99") == said


def test_several_processes_keep_what_they_trained_and_go_on_testing(monkeypatch, tmp_path):
    """A process asked to end during an evaluation cannot know whether the others are, so it does not leave them."""

    def tested(name):
        """Return a trainer whose epoch is trained, during the evaluation that follows."""
        module, run = Vanilla(Tiny()), RunFolder(tmp_path / name, "resnet8", {"options": {}}, overwrite=False).check()
        run.folder.mkdir()
        optimizer = make_optimizer(module, 0.05, 0.9, 5e-4)
        data = create_dataset("digits", batch_size=32, seed=1, device="cpu", train_subset=100)
        trainer = Trainer(run, module, None, optimizer, Metrics(), data, {})
        trainer.trained = {"loss": 1.5}
        return trainer

    alone, one_of_two = tested("alone"), tested("one of two")
    alone._on_test_batch()
    assert alone.run.trained is None and not (alone.run.folder / "last.pth").exists()
    monkeypatch.setattr(signals, "asked", lambda: True)
    with pytest.raises(Interrupted):
        alone._on_test_batch()
    assert alone.run.step == 4 and alone.run.trained == {"loss": 1.5}
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for loss in (1.5, 2.5):  # saved once
        one_of_two.trained = {"loss": loss}
        one_of_two._on_test_batch()
    for trainer in (alone, one_of_two):
        state = checkpoint.load(trainer.run.folder / "last.pth")
        assert state["step"] == 4 and state["trained"] == {"loss": 1.5}


def test_other_errors_are_not_taken_for_lost_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="something else"), distributed._explain_lost_processes(1):
        raise RuntimeError("something else")
    with pytest.raises(RunError, match=r"lost another \(Connection"), distributed._explain_lost_processes(1):
        raise RuntimeError("[/gloo/pair.cc:545] Connection closed by peer")


def test_a_process_that_was_lost_does_not_start_the_run_anew(monkeypatch, tmp_path):
    """With --overwrite. Each machine counts its own restarts, so one restart on any machine is enough."""
    monkeypatch.setattr(distributed, "any_rank", lambda flag: True)
    assert not RunFolder(tmp_path / "run", "resnet8", {"options": {}}, overwrite=True).check().overwrite
    monkeypatch.setattr(distributed, "any_rank", lambda flag: flag)
    assert RunFolder(tmp_path / "run", "resnet8", {"options": {}}, overwrite=True).check().overwrite
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert not RunFolder(tmp_path / "run", "resnet8", {"options": {}}, overwrite=True).check().overwrite


@pytest.mark.parametrize(
    ("gpu_id", "local_rank", "local_size", "gpu"),
    [(None, 0, 1, "0"), ("3", 0, 1, "3"), (None, 2, 4, "2"), ("5,7", 1, 2, "7")],
)
def test_each_process_has_a_gpu_of_its_own(gpu_id, local_rank, local_size, gpu, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_size))
    assert device._gpu_of_this_process(gpu_id) == gpu
    with pytest.raises(UserError, match="lists 2 GPUs for 3 processes"):
        monkeypatch.setenv("LOCAL_RANK", "2")
        device._gpu_of_this_process("0,1")
    with pytest.raises(UserError, match="--gpu_id takes numbers and commas, like 0,1; not 0,x"):
        device.gpus_of("0,x")
