"""Checkpoints of several processes: one counts only if every process has written its file."""

import functools
from collections.abc import Callable
from pathlib import Path

from common.args import WORLD_SIZE
from common.internals.resume.checkpoint_files import FORMAT, failure, write_file
from common.internals.speed import processes


def write_committed(path: Path, commits: Path, write: Callable[[], None]) -> str | None:
    """Calls `write`, which writes `path`, in every process; the first one then writes the commit file to `commits`.

    Returns:
        Why a process could not write, or None.
    """
    reasons = processes.all_gather_object(failure(write))
    reason = next(filter(None, reasons), None)
    if WORLD_SIZE == 1:
        return reason
    if reason is None:
        content = {"format": FORMAT, "processes": WORLD_SIZE}
        commit = functools.partial(write_file, commits / f"{path.stem}.commit", content)
        reason = processes.on_rank_zero(functools.partial(failure, commit))
    if reason is not None:
        path.unlink(missing_ok=True)  # not every process has written its file
    return reason
