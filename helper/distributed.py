"""Several processes that train one network together: ranks and communication.

`torchrun` starts them and sets each one's rank. Every process has the same networks and gets its shard of each batch;
losses are computed on the whole batch, which `all_gather_grad` reassembles in order. So a distiller or a temperature
sees what it would see in a single process, draws the same random numbers on all ranks, and reaches the same state on
all ranks. Only rank 0 writes files and prints. With a single process, everything here does nothing.
"""

import inspect
import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dataset.base
from helper.errors import RunError
from inputs import CPU, UserError, printable
from options.identity import differing

P = ParamSpec("P")
T = TypeVar("T")


def env_rank() -> int:
    """Return the global rank set by the launcher (0 for a single process)."""
    return int(os.environ.get("RANK", 0))


def env_local_rank() -> int:
    """Return the rank among the processes on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def env_local_world_size() -> int:
    """Return the number of processes on this machine, set by torchrun (1 for a single process)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def env_world_size() -> int:
    """Return the number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def restarts() -> int:
    """Return the number of restarts of this machine's processes by `torchrun`, or of the job by Slurm."""
    return sum(int(os.environ.get(name, 0)) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank among those that train together."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_rank0() -> bool:
    """Return whether this is the process that writes files and prints."""
    return rank() == 0


@contextmanager
def process_group(device: torch.device, timeout: float) -> Iterator[None]:
    """Join the process group of the processes that `torchrun` started, if any, and leave it at the end.

    Inside, only rank 0 prints.

    Args:
        device: the device of this process.
        timeout: seconds to wait for another process before giving up.

    Raises:
        RunError: another process does not answer, or was lost.
    """
    if env_world_size() == 1 or dist.is_initialized():
        yield
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _explain_lost_processes(timeout), ExitStack() as stack:
        wait = timedelta(seconds=timeout)
        store, own, count = next(dist.rendezvous("env://", timeout=wait))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(count):
            # torchrun keeps its store across restarts, with the addresses of lost processes. (Each machine counts its
            # own restarts: with several machines the store must be a new one, see docs/distributed.md.)
            store = dist.PrefixStore(f"start {restarts()}", store)
        dist.init_process_group(backend, store=store, rank=own, world_size=count, timeout=wait)
        if not is_rank0():
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        if world_size() > 1:
            threads = f", with {torch.get_num_threads()} threads" * (device.type == "cpu")
            print(f"{world_size()} processes train together, each on its share of every batch{threads}")
        try:
            yield
        except BaseException:
            if backend == "gloo":  # NCCL would wait for the other processes
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()


@contextmanager
def print_own_errors() -> Iterator[None]:
    """Print a UserError that not all processes raise; `run_main` prints those of local rank 0."""
    try:
        yield
    except UserError as error:
        if env_local_rank() and not error.known_to_all:
            print(f"error in process {env_rank()}: {printable(str(error))}", file=sys.stderr)
            error.known_to_all = True  # it is printed now
        raise


@contextmanager
def _explain_lost_processes(timeout: float) -> Iterator[None]:
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and not _of_connections(str(error)):
            raise
        why = re.sub(r"^\[.*?\] ", "", str(error).partition(". ")[0].splitlines()[0])
        what = f"timed out after {timeout:g} s of waiting for another" if "time" in why.lower() else "lost another"
        lost = RunError(
            f"process {env_rank()} of {env_world_size()} {what} ({why}): see the last output of that one; unless"
            " torchrun restarts them, repeat the command, which resumes from the last checkpoint"
        )
        lost.known_to_all = True  # local rank 0 of each machine prints it
        raise lost from error


def _of_connections(message: str) -> bool:
    return any(word in message.lower() for word in ("gloo", "nccl", "connection closed by", "connection reset by"))


def on_rank0(work: Callable[[], T]) -> T:
    """Run on rank 0; return its result, or raise its UserError, on all ranks."""
    if world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if is_rank0():
        try:
            outcome[0] = work()
        except UserError as error:
            error.known_to_all = True
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, device=CPU)
    if outcome[1]:
        raise outcome[1]
    return outcome[0]


def by_rank0(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function run on rank 0 only, for all ranks, as `on_rank0` does; it must not call another such one."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return on_rank0(lambda: function(*args, **kwargs))

    return call


def local_rank0_first(work: Callable[[], T]) -> T:
    """Run on local rank 0 first, then on the others, which can use its files; all raise a UserError of any rank."""
    result = error = None
    for turn in (True, False):
        if turn == (env_local_rank() == 0):
            try:
                result = work()
            except UserError as mine:
                error = mine
        if found := next(filter(None, gather_objects(error)), None):
            found.known_to_all = True
            raise found
    return result


def one_a_machine(work: Callable[[], T]) -> T | None:
    """Run on local rank 0 of each machine and return None on the others; all raise a UserError of any rank."""
    return local_rank0_first(lambda: work() if env_local_rank() == 0 else None)


def check_same(own: dict[str, Any]) -> None:
    """Raise UserError if processes have different options or data."""
    first, *_ = everyone = gather_objects(own)
    for other, theirs in enumerate(everyone):
        if found := differing(theirs, first) or differing(first, theirs):
            error = UserError(
                f"process {other} differs from process 0 ({found}): give all of them the same options and data"
            )
            error.known_to_all = True
            raise error


def shard(rows: Tensor) -> Tensor:
    """Return this process's rows of [B, ...], see `dataset.base.shard`; `all_gather_grad` is the inverse."""
    return dataset.base.shard(rows, rank(), world_size())


def all_gather_grad(rows: Tensor, count: int) -> Tensor:
    """Return the rows [b, ...] of all processes in the order before `shard`, [count, ...].

    The gradient of this process's rows is multiplied by the number of processes, so that DistributedDataParallel's
    average over the processes is the gradient of a loss on all rows. Extra trainable modules process all rows on every
    rank, so their gradients are equal before averaging.
    """
    return rows if world_size() == 1 else _Gather.apply(rows)[:count]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows)
        return torch.stack(parts, 1).flatten(0, 1)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient[rank() :: world_size()] * world_size()


class GatheredFeatures(Sequence):
    """A network's features of all processes; each is gathered from shards [b, ...] on first access."""

    def __init__(self, features: Sequence[Tensor], count: int) -> None:
        self.features, self.count = features, count
        self.known: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, place: int | slice) -> Tensor | list[Tensor]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        if place not in self.known:
            self.known[place] = all_gather_grad(self.features[place], self.count)
        return self.known[place]


def all_reduce(values: Tensor) -> Tensor:
    """Return the sum of all processes' values, on all of them; `values` is overwritten."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_objects(own: T) -> list[T]:
    """Return the objects of all processes in the order of their ranks, on all of them."""
    if world_size() == 1:
        return [own]
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, own)
    return objects


def any_rank(flag: bool) -> bool:
    """Return whether the flag is true in any process."""
    return flag if world_size() == 1 else bool(all_reduce(torch.tensor(float(flag))).item())


def ddp(module: nn.Module) -> nn.Module:
    """Return the module wrapped so that gradients are averaged over the processes; unchanged if there is only one."""
    if world_size() == 1:
        return module
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **{sync: False})


@torch.no_grad()
def average_statistics(module: nn.Module) -> None:
    """Average batch norm's running statistics over the processes, each of which updates them on its shard.

    The mean becomes that of all images, the variance the average of the variances within shards.
    """
    if world_size() == 1:
        return
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    norms = [norm for norm in norms if norm.training and not isinstance(norm, nn.SyncBatchNorm)]
    buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    if not buffers:
        return
    flat = torch.cat(buffers)
    dist.all_reduce(flat)
    flat /= world_size()
    torch._foreach_copy_(buffers, list(flat.split([len(buffer) for buffer in buffers])))


@torch.no_grad()
def broadcast_state(module: nn.Module) -> None:
    """Copy rank 0's weights and state to all processes, once per epoch.

    They differ only if different GPUs or non-deterministic kernels changed state that gets no gradient.
    """
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)


def hide_progress() -> bool | None:
    """Return tqdm's argument `disable`: True, or None on rank 0, which shows progress on terminals only."""
    return None if is_rank0() else True


def start_together(count: int, address: str | None) -> None:
    """Run this command in several processes on this machine by torchrun and exit with their status.

    Does nothing in a process that torchrun started, or for a single one.

    Args:
        count: number of processes.
        address: address of the rendezvous, like tcp://127.0.0.1:23451; None for a free port.

    Raises:
        UserError: the address is invalid, or its port is taken.
    """
    if count == 1 or "RANK" in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    where = ["--standalone"] if address is None else _endpoint(address)
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the process that failed has printed why
    try:
        run(parse_args([*where, "--nnodes=1", f"--nproc-per-node={count}", *sys.argv]))
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        sys.exit(status if status >= 0 else 128 - status)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    sys.exit(0)


def _endpoint(address: str) -> list[str]:
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--dist_url is an address and a port, like tcp://127.0.0.1:23451, not {address}")
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, int(port)))
    except OSError as error:
        raise UserError(
            f"processes cannot meet at {address} ({error.strerror}): give another --dist_url, or none for a free port"
        ) from error
    return [f"--master-addr={host}", f"--master-port={port}"]
