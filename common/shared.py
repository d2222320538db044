"""Sums over the processes of one machine, in memory that they share and by waiting awake.

An all_reduce of gloo is eight switches between threads: 0.3 to 1 ms on CPUs, as long as a small network's whole update.
This one takes 0.01 ms; what it is worth is in runs/README.md, "Two processes".
"""

import contextlib
import mmap
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.args import RANK, WORLD_SIZE

LIMIT = 1 << 20  # bytes of a tensor: with larger ones the sum itself is what takes long
HEAD = 64  # bytes of a process's counter: a cache line, so that no process slows another down
AWAKE = 1e-3  # seconds; who waits longer sleeps in between


class SharedSum:
    """Replaces a tensor by its sum over all processes, the same to the bit in each."""

    def __init__(self, path: Path, pids: list[int], timeout: float) -> None:
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), size())
        self.pids, self.timeout = pids, timeout
        self.arrived = np.frombuffer(memory, np.int64, WORLD_SIZE * HEAD // 8).reshape(WORLD_SIZE, -1)[:, 0]
        data = torch.frombuffer(memory, dtype=torch.uint8, offset=WORLD_SIZE * HEAD)
        self.data = data.view(2, WORLD_SIZE, LIMIT)
        self.round = 0

    def sum_(self, x: Tensor) -> None:
        """`x`: contiguous, in host memory, at most LIMIT bytes, of the same shape and dtype in all processes.

        Raises:
            RuntimeError: a process has ended, or has not come for `timeout` seconds.
        """
        self.round += 1
        # Two places in turn: who writes into one again has seen all arrive in the other, so nobody reads it any more.
        parts = self.data[self.round % 2, :, : x.numel() * x.element_size()].view(x.dtype)
        parts[RANK] = x.view(-1)
        # Seen by the others after the line above: x86 keeps the order of stores. Elsewhere this class is not used.
        self.arrived[RANK] = self.round
        self._wait()
        torch.sum(parts, dim=0, dtype=x.dtype, out=x.view(-1))

    def _wait(self) -> None:
        began = time.monotonic()
        while (self.arrived < self.round).any():
            waited = time.monotonic() - began
            if waited < AWAKE:
                os.sched_yield()  # there may be more processes than cores
                continue
            for rank, pid in enumerate(self.pids):
                try:
                    os.kill(pid, 0)
                except ProcessLookupError:
                    raise RuntimeError(f"process {rank} has ended") from None
            if waited > self.timeout:
                raise RuntimeError(f"nothing from a process for {waited:.0f} s")
            time.sleep(min(waited / 10, 1e-3))


def size() -> int:
    return WORLD_SIZE * (HEAD + 2 * LIMIT)


def create() -> Path | None:
    """A file for `SharedSum`, to be removed once all have opened it; None where there can be none."""
    one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) == WORLD_SIZE
    if not one_machine or platform.machine() not in ("x86_64", "AMD64"):
        return None
    with contextlib.suppress(OSError):
        descriptor, name = tempfile.mkstemp(prefix="plainrl-", dir="/dev/shm")
        try:
            os.posix_fallocate(descriptor, 0, size())  # a full one would else be a SIGBUS later
        except OSError:
            os.unlink(name)
            raise
        finally:
            os.close(descriptor)
        return Path(name)
    return None
