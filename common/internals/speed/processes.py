"""Training in several processes, started by torchrun: each has its own data, and all learn from the mean gradient.

Weights start equal and stay equal to the bit, as every process takes the same steps with the same gradients.
DistributedDataParallel averages only the gradients that went through its own forward(), silently; scripts call other
methods as well. With one process nothing here does anything.
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
# For a process that hangs (one that died is noticed at once); longer than an evaluation, for which the others wait.
TIMEOUT = timedelta(hours=2)
START_TIMEOUT = timedelta(minutes=10)


def init(device: torch.device) -> torch.device:
    """Connects the processes; returns this one's device. Each function below must be called by all of them."""
    if WORLD_SIZE > 1 and device.type == "cuda":
        device = own_gpu()
    if WORLD_SIZE == 1 or dist.is_initialized():
        return device
    # If an optimizer imports it later, its default arguments keep the process group alive: gloo's threads then outlive
    # Python, and sometimes abort a run that is over.
    importlib.import_module("torch.distributed.nn.functional")
    with _others():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        store = _new_store(launcher_store())
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
    """Replaces each gradient by its mean over all processes: after `backward()`, before any clipping."""
    if WORLD_SIZE == 1:
        return
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])  # one reduction: each has a fixed cost
    _all_reduce(flat)
    flat /= WORLD_SIZE
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def global_mean_std(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a batch over all processes; each has a part `x` of the same size."""
    if WORLD_SIZE == 1:
        return x.mean(), x.std()
    var, mean = torch.var_mean(x.double(), correction=0)
    parts = all_gather(torch.stack([mean, var]))
    mean, within = parts.mean(dim=0)
    size = WORLD_SIZE * x.numel()
    var = (within + parts[:, 0].var(correction=0)) * (size / (size - 1))
    return mean.to(x.dtype), var.sqrt().to(x.dtype)


def global_mean(x: Tensor) -> Tensor:
    """The mean of `x` over all processes, so that all decide alike."""
    return x if WORLD_SIZE == 1 else all_gather(x.double()).mean(dim=0).to(x.dtype)


def all_gather(x: Tensor) -> Tensor:
    """[processes, *x.shape]: the `x` of each process, exact: sums with zeros."""
    if WORLD_SIZE == 1:
        return x.unsqueeze(0)
    rows = torch.zeros((WORLD_SIZE, *x.shape), dtype=x.dtype, device=x.device)
    rows[RANK] = x
    _all_reduce(rows)
    return rows


def all_gather_object(value: T) -> list[T]:
    """The `value` of each process, in all of them; waits for all."""
    if WORLD_SIZE == 1:
        return [value]
    values: list[Any] = [None] * WORLD_SIZE
    with _others():
        dist.all_gather_object(values, value)
    return values


def on_rank_zero(function: Callable[[], T]) -> T:
    """Calls `function` in the first process and returns its result in all; if it exits, all processes exit."""
    if WORLD_SIZE == 1:
        return function()
    result, code = None, None
    if RANK == 0:
        try:
            result = function()
        except SystemExit as stop:
            code = stop.code or 0
    result, code = all_gather_object((result, code))[0]
    if code is not None:
        raise SystemExit(code)
    return result  # type: ignore[return-value]


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrites `tensors` with those of the first process."""
    if WORLD_SIZE > 1:
        with _others(), torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def launcher_store() -> dist.Store:
    """torchrun's own key-value store, which outlives the processes that it starts and restarts."""
    port = int(os.environ["MASTER_PORT"])
    return dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=START_TIMEOUT)


def _stop_with(launcher: int) -> None:
    """Stops this process as torchrun would, if torchrun was killed. (PR_SET_PDEATHSIG would send several signals.)"""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
    os._exit(128 + signal.SIGTERM)


def _new_store(launcher: dist.Store) -> dist.Store:
    """A store of these processes alone: torchrun's holds the addresses of those that it started before, which torch
    2.13 would try to reach. A store of theirs is gone with its first process, so it is not mistaken for this one.
    """
    host, key = os.environ["MASTER_ADDR"], "plainrl/port"
    if RANK == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        launcher.set(key, str(store.port))
        return store
    deadline = time.monotonic() + START_TIMEOUT.total_seconds()
    while True:
        with contextlib.suppress(dist.DistNetworkError, dist.DistStoreError):
            return dist.TCPStore(host, int(launcher.get(key)), is_master=False, timeout=timedelta(seconds=2))
        if time.monotonic() > deadline:
            fail(f"the first process, at {host}, cannot be reached", code=1)
        time.sleep(0.1)


@torch.library.custom_op("plainrl::all_reduce", mutates_args={"x"})  # opaque to --compile, whose graph calls it
def _all_reduce(x: Tensor) -> None:
    with _others():
        dist.all_reduce(x)


@contextlib.contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        fail(f"another process of this training is gone; its own message says why ({reason})", code=1)
