"""Runs of scripts as processes, for `benchmark`, `sweep` and `check-results`.

Each run is a session of its own: Ctrl-C reaches it through the tool, once. It is found again by its args.json, so that
a tool that was killed knows what is finished.
"""

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from common.args import fail
from common.internals.resume.files import finished_step, read_object, write_atomically
from common.internals.tracking.redact import REDACTED, redact
from common.internals.tracking.redact import __file__ as redaction
from common.tools.find_runs import EVALUATION, read_lines
from common.tools.launch.cli import INCIDENTAL, again, as_words, jsonable, sanitized

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1
LOG_TIMEOUT = 5  # seconds to wait for the log of a run that has ended


def find_run(runs_dir: Path, stem: str, wanted: dict[str, Any]) -> Path | None:
    """The run directory of script `stem` whose args.json agrees with `wanted`; of several, the furthest."""
    wanted = {**wanted, "script": stem}
    found = []
    for path in runs_dir.glob("*" + sanitized(f"__{stem}__{wanted['seed']}__") + "*"):
        with contextlib.suppress(OSError, ValueError):  # still being written, or cut short
            config = read_object(path, "args.json")
            if all(config.get(key) == wanted[key] for key in wanted):
                checkpoints = sorted(file.name for file in path.glob("checkpoints/step-*.pt"))
                found.append((finished_step(path) is not None, checkpoints[-1:], path))
    return max(found)[2] if found else None


def write_file(path: Path, text: str) -> None:
    """Writes all of it or nothing, without secrets; code 6 if it cannot."""
    try:
        write_atomically(path, redact(text).encode("utf-8", "surrogateescape"))
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}", code=6)


def last_error(log: Path) -> str:
    """The error that a run ended with: its last line that starts with `error:`, else its last line."""
    try:
        lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "no output")


def make_folder(path: Path) -> None:
    """Code 6 if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make {path}: {error.strerror}; choose another with --runs-dir", code=6)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[int | None]:
    """Holds the lock on `path`, and gives its descriptor; None if another process has it and this one does not `wait`.

    A child process can inherit the descriptor: the lock is free when its last holder has ended.
    """
    import fcntl

    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


@dataclass(eq=False)
class Job:
    """A run to make. Its run directory is known by `wanted`, of its args.json; its log and lock are in `folder`."""

    name: str
    script: Path
    flags: list[str]
    wanted: dict[str, Any]
    runs_dir: Path
    folder: Path
    process: subprocess.Popen | None = None
    writer: subprocess.Popen | None = None  # of its log
    worker: int = 0
    code: int | None = None
    run_dir: Path | None = None
    started: float = 0.0

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.name}.log"

    @property
    def lock(self) -> Path:
        return self.folder / "locks" / self.name

    def find(self) -> Path | None:
        """Its run directory; None before it has one."""
        if self.run_dir is None:
            self.run_dir = find_run(self.runs_dir, self.script.stem, self.wanted)
        return self.run_dir

    def finished(self) -> bool:
        run_dir = self.find()
        return run_dir is not None and finished_step(run_dir) is not None

    def score(self) -> float | None:
        """The last greedy evaluation of a finished run; None if it has none."""
        if not self.finished():
            return None
        rows = read_lines(self.run_dir / "metrics.jsonl", [EVALUATION]).rows[EVALUATION]  # type: ignore[operator]
        return float(rows[2, -1]) if rows.size else None

    def error(self) -> str:
        if self.process is not None and self.process.returncode == 0:
            return "error: it ended without a finished run directory, or without an evaluation"
        return last_error(self.log)


def make_job(
    name: str, script: Path, flags: list[str], base: dict[str, Any], runs_dir: Path, folder: Path, **own: Any
) -> Job:
    """A run with `flags`, which give the script the arguments `base`, and with `own` arguments."""
    wanted = jsonable({key: value for key, value in base.items() if key not in INCIDENTAL} | own)
    return Job(name, script, [*flags, *as_words({"runs_dir": runs_dir, **own})], wanted, runs_dir, folder)


class Pool:
    """At most `workers` runs at a time, each pinned to its share of the cores."""

    def __init__(self, workers: int) -> None:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        n = len(cores)
        shares = [cores[i * n // workers : (i + 1) * n // workers] for i in range(workers)]
        self.cores = [share or cores[i % n : i % n + 1] if cores else [] for i, share in enumerate(shares)]
        self.free = list(range(workers))
        self.jobs: list[Job] = []
        self.signals: list[int] = []  # that asked this tool to stop
        self.forwarded = 0

    def listen(self) -> None:
        """Passes signals that ask this tool to stop on to its runs, which make a checkpoint first."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
            number = getattr(signal, name, None)  # nohup ignores SIGHUP
            if number is not None and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                signal.signal(number, lambda number, frame: self.signals.append(number))

    @property
    def stopping(self) -> bool:
        """A signal has asked this tool to stop."""
        return bool(self.signals)

    def start(self, job: Job) -> bool:
        """Starts a job, or resumes it from its checkpoint; False if another process has it or it is finished.

        The run inherits the lock, and holds it alone if this tool is killed.
        """
        make_folder(job.lock.parent)
        make_folder(job.log.parent)
        with locked(job.lock, wait=False) as lock:
            if lock is None:
                return False
            job.run_dir = None  # it may be another attempt's
            if job.finished():
                return False
            words = job.flags if job.run_dir is None else ["--resume", str(job.run_dir), *again(job.flags)]
            command = [sys.executable, str(job.script), *words]
            if REDACTED in shlex.join(words):
                fail(f"{job.name} has a secret among its flags, which no file keeps: let the script read it itself")
            job.worker = self.free.pop(0)
            try:
                # A separate process redacts the log, so that a run outlives this tool without losing its output.
                filtered = [sys.executable, "-I", redaction, str(job.log)]
                job.writer = subprocess.Popen(filtered, stdin=subprocess.PIPE, start_new_session=True)
                with job.writer.stdin as log:  # type: ignore[union-attr]
                    log.write(f"$ {shlex.join(command)}\n".encode("utf-8", "surrogateescape"))
                    log.flush()
                    job.process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        pass_fds=[lock],
                        preexec_fn=_prepare(self.cores[job.worker]),
                    )
            except OSError as error:
                fail(f"cannot start {job.script}: {error}", code=6)
        job.code, job.started = None, time.monotonic()
        self.jobs.append(job)
        return True

    def poll(self) -> list[Job]:
        """The jobs that have ended since the last call, with their exit codes. Passes signals on."""
        for _ in self.signals[self.forwarded :]:
            self.forwarded += 1
            for job in self.jobs:  # a run makes a checkpoint and ends; at a second signal it ends at once
                job.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
        ended = [job for job in self.jobs if job.process.poll() is not None]  # type: ignore[union-attr]
        for job in ended:
            with contextlib.suppress(subprocess.TimeoutExpired):  # a child of the run may still write
                job.writer.wait(LOG_TIMEOUT)  # type: ignore[union-attr]
            code = job.process.returncode  # type: ignore[union-attr]
            job.code = code if code >= 0 else 128 - code
            self.jobs.remove(job)
            self.free = sorted([*self.free, job.worker])
        return ended

    def wait(self) -> None:
        """Waits until every run has ended."""
        while self.jobs:
            self.poll()
            time.sleep(0.05)

    def leave(self, command: list[str]) -> NoReturn:
        """After a signal: waits for the checkpoints, and ends with 128 + its number and the command to continue."""
        number = self.signals[0]
        self.wait()
        fail(f"stopped by {signal.Signals(number).name}; continue with {shlex.join(command)}", 128 + number)


def _prepare(cores: list[int]) -> Callable[[], None]:
    """What a new process does before it becomes the script.

    It is pinned to `cores`, and ends with this tool (on Linux; elsewhere it continues and holds its lock). SIGUSR1 and
    SIGUSR2 are blocked: SLURM sends them to every process of a job, and with the tool's SIGTERM a run would count two
    requests to stop, and end without its checkpoint.
    """
    tool = os.getpid()

    def prepare() -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != tool:
                os._exit(143)
        if cores:
            os.sched_setaffinity(0, cores)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})

    return prepare
