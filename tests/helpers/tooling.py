"""Runs `python -m common` as a user does, on a fork whose runs take a moment."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

FORK = Path(__file__).parent / "quick_fork.py"


def tool(*words, cwd, check=0, timeout=280):
    done = subprocess.run(
        [sys.executable, "-m", "common", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env=dict(os.environ),  # without the COLUMNS that readline sets behind its back
    )
    assert check is None or done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


@contextlib.contextmanager
def started(*words, cwd):
    """The tool in the background; whatever happens, nothing of it is left afterwards."""
    log = (cwd / f"tool{time.time_ns()}.log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "common", *map(str, words)],
        cwd=cwd,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=dict(os.environ),
        start_new_session=True,  # so that a test can send a signal to all of it, as a terminal does
    )
    process.said = lambda: Path(log.name).read_text()
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        log.close()


def until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def run_dirs(cwd):
    return sorted(path.parent for path in cwd.glob("runs/*/args.json"))


def starts(run_dir):
    """(step, process id, cores) of every process that worked at a run."""
    lines = (run_dir / "starts").read_text().splitlines() if (run_dir / "starts").exists() else []
    return [(int(line.split()[0]), int(line.split()[1]), line.split(maxsplit=2)[2]) for line in lines]
