"""Sums over the processes of one machine, against sums of what they bring."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import shared

HERE = Path(__file__).parent
WORLD = 3


def start(path, case):
    """Output of each process, in their order; they share `path`."""
    path.write_bytes(b"")
    os.truncate(path, WORLD * (shared.HEAD + 2 * shared.LIMIT))
    own = {
        "WORLD_SIZE": str(WORLD),
        "TORCHELASTIC_RUN_ID": "test",
        "PYTHONPATH": str(HERE.parent),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "sums.py", path, case],
            env={**os.environ, **own, "RANK": str(rank)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for rank in range(WORLD)
    ]
    for process in processes:
        process.stdin.write(json.dumps([each.pid for each in processes]) + "\n")
        process.stdin.flush()
    if case == "ends":  # somebody has to take note of its end, as torchrun does
        processes[1].wait(60)
    return [process.communicate(timeout=120)[0] for process in processes], [process.returncode for process in processes]


def test_every_process_has_the_sum_the_same_to_the_bit(tmp_path):
    outputs, codes = start(tmp_path / "memory", "equal")
    assert codes == [0] * WORLD
    assert len(set(outputs)) == 1 and len(outputs[0].strip()) == 64


@pytest.mark.parametrize(
    ("case", "says", "least"), [("ends", "process 1 has ended", 0), ("hangs", "nothing from a process for 1 s", 1)]
)
def test_a_process_that_does_not_come_is_an_error(case, says, least, tmp_path):
    outputs, codes = start(tmp_path / "memory", case)
    assert codes == [0, 9, 0]
    for output in (outputs[0], outputs[2]):
        seconds, _, message = output.strip().partition(" ")
        assert message == says
        assert least <= float(seconds) < 10


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(shared, "WORLD_SIZE", 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(shared.platform, "machine", lambda: "x86_64")


def test_the_memory_is_there_and_no_more(two):
    path = shared.create()
    try:
        assert path.stat().st_size == 2 * shared.HEAD + 4 * shared.LIMIT
        assert path.stat().st_mode & 0o777 == 0o600  # nobody else reads gradients
    finally:
        path.unlink()


@pytest.mark.parametrize("where", ["two machines", "another processor", "no /dev/shm", "a full /dev/shm"])
def test_elsewhere_there_is_none_and_nothing_is_left(where, two, monkeypatch, tmp_path):
    real = shared.tempfile.mkstemp
    monkeypatch.setattr(shared.tempfile, "mkstemp", lambda prefix, dir: real(prefix=prefix, dir=tmp_path))
    path = shared.create()
    assert path is not None and path.parent == tmp_path
    path.unlink()

    def fail(*words, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "two machines":
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    elif where == "another processor":
        monkeypatch.setattr(shared.platform, "machine", lambda: "aarch64")
    elif where == "no /dev/shm":
        monkeypatch.setattr(shared.tempfile, "mkstemp", fail)
    else:
        monkeypatch.setattr(shared.os, "posix_fallocate", fail)
    assert shared.create() is None
    assert list(tmp_path.iterdir()) == []
