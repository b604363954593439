"""Choose and set up the device of a run, its precision and its reproducibility."""

import ctypes
import os
import platform
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from helper import distributed
from inputs import TRAINED, UserError, check_fits
from options.flags import CommonOptions
from options.sizes import check_sizes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def prepare_device(
    name: str | None, gpu_id: str | None, deterministic: bool, plain: bool = False, precision: str = "fp32"
) -> torch.device:
    """Return the device of a run, after setting PyTorch's global flags for it.

    Args:
        name: name of the device; None: the first of `gpu_id`, else a GPU if there is one, else the CPU. With several
            processes on a machine, each gets its own GPU.
        gpu_id: comma-separated numbers of the GPUs to use; None: all.
        deterministic: use only algorithms that are bitwise reproducible.
        plain: turn off everything that is only for speed.
        precision: "tf32" computes convolutions on a GPU in TensorFloat-32, PyTorch's default and thus that of the
            published code.

    Raises:
        UserError: the name is no device, or a GPU that this machine does not have.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs a fixed workspace for this
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic and not plain
    if not plain:
        keep_memory()
    torch.backends.cudnn.allow_tf32 = precision == "tf32"  # TensorFloat-32 keeps 10 of float32's 23 bits
    if name is None and not torch.cuda.is_available():
        return torch.device("cpu")
    if name is None or name == "cuda" and distributed.env_world_size() > 1:
        name = f"cuda:{_gpu_of_this_process(gpu_id)}"
    elif name.startswith("cuda:") and distributed.env_world_size() > 1:
        raise UserError(f"--device {name} is one GPU for several processes: list their GPUs with --gpu_id 0,1")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"'{name}' is no device known here: use cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"there is no device {name}: PyTorch sees {torch.cuda.device_count()} GPUs here; leave --device out,"
            " or use --device cpu"
        )
    return device


@contextmanager
def device_of(options: CommonOptions) -> Iterator[torch.device]:
    """Set up the device of a run and, with several processes, their process group; yield the device.

    Raises:
        UserError: as `prepare_device`, or the sizes in the options do not fit into the device's memory.
        RunError: as `distributed.process_group`.
    """
    tf32 = torch.backends.cudnn.allow_tf32  # restored, since a student's run may train its teacher first
    with distributed.print_own_errors():
        device = prepare_device(options.device, options.gpu_id, options.deterministic, options.plain, options.precision)
        check_sizes(options, device)
        try:
            with distributed.process_group(device, options.dist_timeout):
                yield device
        finally:
            torch.backends.cudnn.allow_tf32 = tf32


def gpus_of(gpu_id: str) -> list[str]:
    """Return the numbers in a comma-separated list, as text. Raises UserError for anything else."""
    listed = [number.strip() for number in gpu_id.split(",")]
    if not all(number.isdecimal() for number in listed):
        raise UserError(f"--gpu_id takes numbers and commas, like 0,1; not {gpu_id}")
    return listed


def _gpu_of_this_process(gpu_id: str | None) -> str:
    own = distributed.env_local_rank()
    if gpu_id is None:
        return str(own)
    listed = gpus_of(gpu_id)
    if own >= len(listed):
        raise UserError(f"--gpu_id {gpu_id} lists {len(listed)} GPUs for {own + 1} processes or more on this machine")
    return listed[own]


def start_together(options: CommonOptions) -> None:
    """Start the processes of --multiprocessing_distributed, if it is given; see `distributed.start_together`."""
    if options.multiprocessing_distributed:
        listed = gpus_of(options.gpu_id) if options.gpu_id else range(max(1, torch.cuda.device_count()))
        distributed.start_together(len(listed), options.dist_url)


def keep_memory() -> None:
    """Make glibc keep freed memory; other C libraries are left alone.

    By default it returns every large block to the system, which must clear the pages again for the next step. On a CPU
    this takes a tenth of a step.
    """
    if _mallopt(M_MMAP_THRESHOLD, 2**30):  # some versions refuse it
        _mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def all_cores(device: torch.device) -> Iterator[None]:
    """Use all cores inside, divided among the run's processes on this machine; then restore the number of threads.

    This is for long work on a CPU before the run, whatever the run's own number of threads. With a GPU the number is
    unchanged.
    """
    before = torch.get_num_threads()
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(before, cores // distributed.env_local_world_size()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def unbenchmarked() -> Iterator[None]:
    """Make cuDNN choose convolution algorithms by heuristics inside, instead of trying all of them.

    Trying takes seconds and much memory with the large batches of a validation, for each batch size and again in each
    run of --trials.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def share_freed_memory() -> None:
    """Make threads started from now on share freed memory, if the C library is glibc.

    By default each has its own arena, and runs that take turns each need the memory of a step.
    """
    _mallopt(M_ARENA_MAX, 1)


def _mallopt(parameter: int, value: int) -> bool:
    """Set a parameter of glibc's malloc; return False if it is refused or the C library is another."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(parameter, value))


def place(module: nn.Module, device: torch.device, plain: bool = False) -> nn.Module:
    """Move a module to the device, in the faster channels-last memory format unless `plain`, and return it.

    Raises:
        UserError: the module, with the memory for its training, does not fit into the device's memory.
    """
    size = sum(parameter.numel() * (TRAINED if parameter.requires_grad else 4) for parameter in module.parameters())
    size += sum(buffer.nbytes for buffer in module.buffers())
    check_fits("a network and what is trained beside it", size, "network, --feat_dim or --dpk_width", device)
    return module.to(device) if plain else module.to(device, memory_format=torch.channels_last)


@contextmanager
def fitting_batch(size: int) -> Iterator[None]:
    """Turn a GPU's out-of-memory error for a batch of `size` images into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"a batch of {size} images does not fit: choose a lower --batch_size") from error


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Return a context in which networks compute in one of options.flags.PRECISIONS; their weights stay float32."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def cpu_info() -> dict[str, str]:
    """Return /proc/cpuinfo of one core, with `model name`, `flags` and more; without Linux, only the processor type."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {"model name": platform.processor() or platform.machine(), "flags": ""} | told


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
