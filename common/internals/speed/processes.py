"""Training on several processes, which torchrun starts: each has its own data, and all learn by the mean gradient.

Weights begin equal, and stay equal to the bit, because every process takes the same steps with the same gradients.
There is no DistributedDataParallel: it averages the gradients of what goes through its own forward() alone, and says
nothing about those of other methods, of which scripts have several. With one process nothing here does anything.
"""

import atexit
import contextlib
import importlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common.args import RANK, WORLD_SIZE, fail

T = TypeVar("T")
# A process that died is noticed at once; this is for one that hangs, and above what an evaluation takes, for which the
# others wait.
TIMEOUT = timedelta(hours=2)
START_TIMEOUT = timedelta(minutes=10)


def init(device: torch.device) -> torch.device:
    """Meets the other processes; returns this one's device. All of them have to call each of the functions below."""
    if WORLD_SIZE > 1 and device.type == "cuda":
        device = own_gpu()
    if WORLD_SIZE == 1 or dist.is_initialized():
        return device
    # Imported later, by the optimizers, its default arguments would keep the process group to the end: gloo's threads
    # would outlive Python, and now and then abort a run that is over.
    importlib.import_module("torch.distributed.nn.functional")
    with _others():
        store = _new_store(launcher_store())
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE, timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)
    threading.Thread(target=_stop_with, args=(os.getppid(),), daemon=True).start()
    return device


def own_gpu() -> torch.device:
    """The GPU of this process; ends with code 2 if there are fewer than processes."""
    index, count = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if (found := torch.cuda.device_count()) < count:
        fail(f"{count} processes need a GPU each, and there are {found}: lower --nproc-per-node, or --no-cuda")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def sync_grads(params: Iterable[Tensor]) -> None:
    """Puts the mean over all processes in the place of each gradient: after `backward()`, before any clipping."""
    if WORLD_SIZE == 1:
        return
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])  # what costs is the number of reductions
    _all_reduce(flat)
    flat /= WORLD_SIZE
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def global_mean_std(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a batch, of which each process has a part of the same size, this one `x`."""
    if WORLD_SIZE == 1:
        return x.mean(), x.std()
    var, mean = torch.var_mean(x.double(), correction=0)
    parts = all_gather(torch.stack([mean, var]))
    mean, within = parts.mean(dim=0)
    size = WORLD_SIZE * x.numel()
    var = (within + parts[:, 0].var(correction=0)) * (size / (size - 1))
    return mean.to(x.dtype), var.sqrt().to(x.dtype)


def global_mean(x: Tensor) -> Tensor:
    """Of a number that each process has its own of; what is decided by it is decided everywhere alike."""
    return x if WORLD_SIZE == 1 else all_gather(x.double()).mean(dim=0).to(x.dtype)


def all_gather(x: Tensor) -> Tensor:
    """[processes, *x.shape]: the `x` of each, to the bit, as sums with zeros."""
    if WORLD_SIZE == 1:
        return x.unsqueeze(0)
    rows = torch.zeros((WORLD_SIZE, *x.shape), dtype=x.dtype, device=x.device)
    rows[RANK] = x
    _all_reduce(rows)
    return rows


def all_gather_object(value: T) -> list[T]:
    """The `value` of each process, in all of them; none goes on before all are here."""
    values: list[Any] = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        with _others():
            dist.all_gather_object(values, value)
    return values


def on_rank_zero(function: Callable[[], T]) -> T:
    """What `function` returns, called by the first process alone; where that ends the process, it ends them all."""
    if WORLD_SIZE == 1:
        return function()
    result, code, stop = None, None, None
    if RANK == 0:
        try:
            result = function()
        except SystemExit as reason:
            code, stop = reason.code or 0, reason
    result, code = all_gather_object((result, code))[0]
    if code is not None:
        raise stop or SystemExit(code)
    return result  # type: ignore[return-value]


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrites `tensors` with those of the first process."""
    if WORLD_SIZE > 1:
        with _others(), torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def launcher_store() -> dist.Store:
    """torchrun's own key-value store, which outlives the processes that it starts and starts again."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=START_TIMEOUT)


def _stop_with(launcher: int) -> None:
    """What torchrun does when it is asked to stop, where it was killed and cannot."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
    os._exit(128 + signal.SIGTERM)


def _new_store(launcher: dist.Store) -> dist.Store:
    """A store of these processes alone.

    In torchrun's own those that were started before left their addresses, which torch 2.13 then tries to reach. One
    that is gone with the first process cannot be mistaken for the new one.
    """
    host, key = os.environ["MASTER_ADDR"], "plainrl/port"
    if RANK == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        launcher.set(key, str(store.port))
        return store
    deadline = time.monotonic() + START_TIMEOUT.total_seconds()
    while True:
        with contextlib.suppress(dist.DistNetworkError, dist.DistStoreError):
            port = int(launcher.get(key))
            return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=2))
        if time.monotonic() > deadline:
            fail(f"the first process, at {host}, cannot be reached", code=1)
        time.sleep(0.1)


def _all_reduce(x: Tensor) -> None:
    if torch.compiler.is_compiling():
        _all_reduce_in_graph(x)
    else:
        _sum(x)


@torch.library.custom_op("plainrl::all_reduce", mutates_args={"x"})  # opaque to --compile, whose graph calls it
def _all_reduce_in_graph(x: Tensor) -> None:
    _sum(x)


def _sum(x: Tensor) -> None:
    with _others():
        dist.all_reduce(x)


@contextlib.contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        fail(f"another process of this training is gone, and its own message says why ({reason})", code=1)
