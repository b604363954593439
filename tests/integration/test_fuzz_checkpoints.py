"""A hundred damaged checkpoints: each is refused in one sentence and changes nothing, or holds valid values."""

import copy
import io
import math
import random
import zipfile
from types import SimpleNamespace

import pytest
import torch
from common import Tiny
from small_runs import TEACHER, a_run, a_training, an_epoch, snapshot, stopped_run

from helper import checkpoint
from helper.metrics import Metrics
from helper.teacher import find_teacher
from inputs import UserError
from models import create_model

ODD = [
    None, True, -1, 10**400, 0.5, math.nan, "", "x" * 99, [], {}, [1, "a"], {"a": 1}, {1: 2}, (), b"bytes", 1j,
    {(1, 2): "tuple"}, {"nested": {"deep": [[[]]]}}, torch.zeros(()), torch.zeros(0), torch.arange(7), torch.Size([2]),
]  # fmt: skip
TENSOR_CHANGES = [
    lambda x: x.flatten(),
    lambda x: torch.cat([x, x]) if x.dim() else x,
    lambda x: x.unsqueeze(0),
    lambda x: x.transpose(0, -1) if x.dim() else x,
    lambda x: torch.cat([x.reshape(-1), x.reshape(-1)]),
    lambda x: x.reshape(-1)[:-1],
    lambda x: x.reshape(-1)[:1].expand(x.numel()).reshape(x.shape),  # the same number everywhere, and stored
    lambda x: torch.zeros((), dtype=x.dtype).expand(x.shape),
    lambda x: torch.zeros(1, dtype=x.dtype).expand(10**11),
    lambda x: torch.stack([x, x], -1)[..., 0],  # strides of 2
    lambda x: x.long(),
    lambda x: x.bool(),
    lambda x: x.half(),
    lambda x: x.double(),
    lambda x: x.to(torch.complex64),
    lambda x: x * math.nan,
    lambda x: -x - 1,
    lambda x: x.double().fill_(1e300),
    lambda x: x.to_sparse() if x.dim() else x.to("meta"),
    lambda x: x.to("meta"),
    lambda x: torch.nn.Parameter(x.float()),
    lambda x: x.tolist(),
]


def places(content, way=()):
    """Yield a container and a key for each value in nested dicts and lists."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield content, key
        yield from places(value, (*way, key))


def change(content, rng):
    """Change one place of the content; every kind of container and tensor is chosen at times."""
    holds = {}
    for where, key in places(content):
        holds.setdefault(type(where[key]).__name__, []).append((where, key))
    where, key = rng.choice(holds[rng.choice(sorted(holds))])
    value, kind = where[key], rng.random()
    if kind < 0.15:
        del where[key]
    elif kind < 0.25 and isinstance(where, dict):
        where[rng.choice(["more", 99, (1, 2)])] = where.pop(key) if rng.random() < 0.5 else value
    elif isinstance(value, torch.Tensor) and kind < 0.8:
        where[key] = rng.choice(TENSOR_CHANGES)(value)
    else:
        where[key] = rng.choice(ODD)


def stored(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def damage(raw, rng):
    """Return the bytes of a file with damage as from disks, transfers and attackers."""
    kind, size = rng.randrange(6), len(raw)
    start, length = rng.randrange(size), rng.randrange(1, 200)
    if kind == 0:
        return raw[:start]
    if kind == 1:
        return raw[:start] + bytes([raw[start] ^ 1 << rng.randrange(8)]) + raw[start + 1 :]
    if kind == 2:
        return raw[:start] + rng.randbytes(length) + raw[start + length :]
    if kind == 3:
        return raw[:start] + raw[start + length :]
    if kind == 4:
        return raw + raw[start : start + length]
    out = io.BytesIO()  # a valid zip of other content, which no checksum reveals
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            content = bytearray(old.read(name))
            if name == chosen and content:
                place = rng.randrange(len(content))
                content[place : place + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
            new.writestr(name, bytes(content))
    return out.getvalue()


def mutated(content, rng):
    """Return the bytes of a checkpoint with one to three changes, or with damage."""
    if rng.random() < 0.3:
        return damage(stored(content), rng)
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change(content, rng)
    return stored(content)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return stopped_run(tmp_path_factory.mktemp("fuzz") / "run")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    trainer = a_training(tmp_path_factory.mktemp("fuzz") / "fresh")
    return trainer.task, trainer.optimizer


@pytest.mark.filterwarnings("ignore")  # the reader's warnings about damaged files
@pytest.mark.parametrize("seed", range(60))
def test_a_mutated_state_is_refused_or_goes_on(seed, state, fresh, tmp_path):
    (tmp_path / "last.pth").write_bytes(mutated(state, random.Random(seed)))
    before = snapshot(*fresh, tmp_path)
    try:
        a_run(tmp_path).resume(*fresh, Metrics(), steps=3)
    except UserError as error:
        assert str(error).count("\n") == 0 and "--overwrite" in str(error)
        after = snapshot(*fresh, tmp_path)
        torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
        assert after[1] == before[1]
        return
    assert all(value.isfinite().all() for value in fresh[0].state_dict().values() if isinstance(value, torch.Tensor))
    training = a_training(tmp_path)
    an_epoch(training)
    assert training.run.step == 0 and training.run.history[-1]["epoch"] == len(training.run.history)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(40))
def test_a_mutated_teacher_is_refused_or_teaches(seed, tmp_path):
    rng, path = random.Random(1000 + seed), tmp_path / "teacher.pth"
    torch.manual_seed(0)
    content = create_model("resnet8", 10).state_dict()
    content = dict(content) if rng.random() < 0.5 else {"model": dict(content), "epoch": 3}
    raw = mutated(content, rng)
    path.write_bytes(raw)
    try:
        found = find_teacher(SimpleNamespace(**TEACHER, path_t=str(path)))
        model = checkpoint.network(found.path, found.weights, found.name, 10).eval()
    except UserError as error:
        assert str(error).count("\n") == 0
    else:
        assert model(torch.zeros(2, 3, 32, 32)).isfinite().all()
    assert path.read_bytes() == raw and list(tmp_path.iterdir()) == [path]


def test_the_state_that_is_mutated_is_a_whole_one(state):
    assert state["module"]["_extra_state"]["probe"] and state["metrics"]
    assert state["module"]["temperature._extra_state"]["rollout"]
    assert Tiny().state_dict().keys() == {key.removeprefix("student.") for key in state["module"] if "student" in key}
