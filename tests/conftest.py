"""Fixtures for several test files."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
import pytest
from common import train

from options.plugins import REGISTRIES

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def signals():
    """Restore signal handlers after each test; processes started later would inherit them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def cifar100_dir(tmp_path_factory):
    """Return a folder with the official cifar-100-python: CIFAR100_DIR if it has it, else freshly unpacked."""
    given = os.environ.get("CIFAR100_DIR")
    if given and (Path(given) / "cifar-100-python" / "train").is_file():
        return Path(given)
    unpack = SHARED / "data" / "unpack_cifar100.py"
    if not unpack.is_file():
        pytest.skip("CIFAR-100 is not here: set CIFAR100_DIR to the folder that holds cifar-100-python")
    folder = tmp_path_factory.mktemp("cifar100")
    subprocess.run([sys.executable, str(unpack), str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "resnet8_vanilla_digits"
    train(f"--model resnet8 --epochs 2 --run_dir {folder}")
    return folder


@pytest.fixture
def no_pictures(monkeypatch):
    """Write figures without drawing them, which takes most of the time that pages take."""
    monkeypatch.setattr("report.figures.svg", lambda drawing, name, about: f'<svg role="img" id="{name}"></svg>\n')
    monkeypatch.setattr("report.page.pdf", lambda drawing, about, maker: f"%PDF /Producer ({maker})".encode())


@pytest.fixture
def registries():
    """Restore the registries after each test, and forget the files that were loaded."""
    before = {kind: dict(registry) for kind, registry in REGISTRIES.items()}
    yield
    for kind, registry in REGISTRIES.items():
        registry.clear()
        registry.update(before[kind])
    for name in [name for name in sys.modules if name.startswith("plugin_")]:
        del sys.modules[name]
