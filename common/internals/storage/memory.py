"""Memory is asked for before it is used: Linux grants more than there is, and kills the process hours later."""

import math
import os
from pathlib import Path

from common.args import WORLD_SIZE, fail


def require_memory(needed: int, what: str) -> None:
    """Ends the process with code 2 and one line if fewer than `needed` bytes are free for each process of torchrun."""
    available = available_memory() / (int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if WORLD_SIZE > 1 else 1)
    if needed > available:
        fail(
            f"{what} needs {needed / 2**30:.1f} GiB of memory, and {available / 2**30:.1f} GiB are free: "
            "lower --buffer-size"
        )


def available_memory() -> float:
    """Bytes that can be had without swapping; infinity where the system does not say."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return math.inf
