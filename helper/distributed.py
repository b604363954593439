"""Several processes that train one network together: who they are, and what they tell one another.

`torchrun` starts them and tells each its number, its rank. Every process has the same networks and is given its share
of each batch; the losses are those of the whole batch, which `all_gather_grad` puts together again, in its order. So a
distiller or a temperature sees what it would see if there were one process, draws the same random numbers everywhere,
and comes to the same state everywhere. What happens once (files, what is printed) is the first process's.

Where there is one process, everything here does nothing.
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
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dataset.base
from helper.errors import RunError, UserError
from helper.run_identity import differing
from inputs import InputError, printable

T = TypeVar("T")
CPU = torch.device("cpu")  # where processes speak of what is no part of a step


def env_rank() -> int:
    """The number of this process among those that were started together; 0 where it is alone."""
    return int(os.environ.get("RANK", 0))


def env_local_rank() -> int:
    """Its number among those on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def env_world_size() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def restarts() -> int:
    """How often `torchrun` has started the processes of this machine again after one was lost, or Slurm the job."""
    return sum(int(os.environ.get(name, 0)) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_rank0() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


@contextmanager
def process_group(device: torch.device, timeout: float) -> Iterator[None]:
    """Meet the other processes that `torchrun` started, if there are any, and part from them at the end.

    All but the first are silent in here.

    Args:
        device: what this process computes on. timeout: seconds to wait for another process before giving up.

    Raises:
        RunError: another process does not answer, or not any more.
    """
    if env_world_size() == 1 or dist.is_initialized():
        yield
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _lost_processes_said(timeout), ExitStack() as stack:
        wait = timedelta(seconds=timeout)
        store, own, count = next(dist.rendezvous("env://", timeout=wait))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(count):
            # torchrun keeps its store over restarts, where the addresses of those who were lost still stand. (Machines
            # count restarts each for itself: with several of them the store must be a new one, see README.)
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
            if backend == "gloo":  # NCCL would wait for the others
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()


@contextmanager
def own_errors_said() -> Iterator[None]:
    """Say what only this process finds wrong, if it is not the one on its machine that speaks."""
    try:
        yield
    except InputError as error:
        if env_local_rank() and not error.known_to_all:
            print(f"error in process {env_rank()}: {printable(str(error))}", file=sys.stderr)
            error.known_to_all = True  # said
        raise


@contextmanager
def _lost_processes_said(timeout: float) -> Iterator[None]:
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and not _of_connections(str(error)):
            raise
        why = re.sub(r"^\[.*?\] ", "", str(error).partition(". ")[0].splitlines()[0])
        what = f"waited {timeout:g} s for another in vain" if "time" in why.lower() else "lost another"
        lost = RunError(
            f"process {env_rank()} of {env_world_size()} {what} ({why}): look at what that said last; unless torchrun"
            " has them start again, repeat the command, which goes on from the last checkpoint"
        )
        lost.known_to_all = True  # in so far as the first one of each machine says it
        raise lost from error


def _of_connections(message: str) -> bool:
    return any(word in message.lower() for word in ("gloo", "nccl", "connection closed by", "connection reset by"))


def on_rank0(work: Callable[[], T]) -> T:
    """What some work comes to, which the first process does for all: its result, or its InputError."""
    if world_size() == 1:
        return work()
    told: list[Any] = [None, None]
    if is_rank0():
        try:
            told[0] = work()
        except InputError as error:
            error.known_to_all = True
            told[1] = error
    dist.broadcast_object_list(told, src=0, device=CPU)
    if told[1]:
        raise told[1]
    return told[0]


def local_rank0_first(work: Callable[[], T]) -> T:
    """What some work comes to that leaves something on a machine's disk: its first process does it, then the others
    find it done. An InputError of one of them is everybody's."""
    if world_size() == 1:
        return work()
    result = error = None
    for turn in (True, False):
        if turn == (env_local_rank() == 0):
            try:
                result = work()
            except InputError as mine:
                error = mine
        errors = [None] * world_size()
        dist.all_gather_object(errors, error)
        if found := next(filter(None, errors), None):
            found.known_to_all = True
            raise found
    return result


def one_a_machine(work: Callable[[], T]) -> T | None:
    """What some work comes to that the first process of each machine does; None on its others. An InputError of one
    of them is everybody's."""
    return local_rank0_first(lambda: work() if env_local_rank() == 0 else None)


def check_same(told: dict[str, Any]) -> None:
    """Raise UserError where another process was told something else, or has other data."""
    if world_size() == 1:
        return
    all_told = [None] * world_size()
    dist.all_gather_object(all_told, told)
    for other, theirs in enumerate(all_told):
        if found := differing(theirs, all_told[0]) or differing(all_told[0], theirs):
            error = UserError(
                f"process {other} differs from process 0 ({found}): give all of them the same options and data"
            )
            error.known_to_all = True
            raise error


def shard(rows: Tensor) -> Tensor:
    """Return this process's rows of [B, ...], see `dataset.base.shard`; `all_gather_grad` puts them together again."""
    return dataset.base.shard(rows, rank(), world_size())


def all_gather_grad(rows: Tensor, count: int) -> Tensor:
    """All processes' rows, of which each has [b, ...], in the order that `shard` took them from: [count, ...].

    The gradient reaches this process's rows, times the number of processes: the mean over the processes, which is
    what DistributedDataParallel takes, is then the gradient of a loss that all of them computed from all rows. What
    they learn beside the student sees all rows everywhere, and its gradients are equal before that mean.
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
    """A network's features [b, ...] of all processes: each is gathered when a distiller asks for it."""

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
    """The sum of each process's values, on all of them."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """Whether it is true in any process."""
    return flag if world_size() == 1 else bool(all_reduce(torch.tensor(float(flag))).item())


def ddp(module: nn.Module) -> nn.Module:
    """The module, with gradients that are averaged over the processes."""
    if world_size() == 1:
        return module
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **{sync: False})


@torch.no_grad()
def average_statistics(module: nn.Module) -> None:
    """Give the batch norms of all processes, of which each saw its own share of a batch, the same running statistics.

    The mean over the processes; a mean is that of all images, a variance that within the shares.
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
    """Give all processes the first one's weights and state, once an epoch: they hold the same already, but for what a
    GPU of another kind, or kernels that do not repeat bit by bit, may have made of state that no gradient moves."""
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)


def hide_progress() -> bool | None:
    """What tqdm's `disable` is to be: only the first process shows progress, and only on a terminal."""
    return None if is_rank0() else True


def start_together(count: int, address: str | None) -> None:
    """Start so many processes of this very command on this machine by torchrun, wait, and end as they did; if this is
    not one of them.

    Args:
        address: where they meet, like tcp://127.0.0.1:23451; None is a free port.

    Raises:
        UserError: that is no address, or its port is taken.
    """
    if count == 1 or "RANK" in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    where = ["--standalone"] if address is None else _endpoint(address)
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # what failed has been said by who failed
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
