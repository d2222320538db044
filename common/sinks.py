"""Where metrics go: plain JSON lines, TensorBoard, Weights & Biases. One method each for rows and for videos."""

import atexit
import collections
import contextlib
import functools
import json
import logging
import math
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.args import RunArgs, say
from common.internals.tracking.redact import redact


class Sink:
    """Where rows and videos go. Any method may raise: the run then warns once and drops the sink."""

    name: str

    def log(self, row: dict[str, float], step: int, seconds: float) -> None:
        raise NotImplementedError

    def video(self, path: Path, step: int) -> None:
        """Most sinks show no videos; the file lies in the run directory in any case."""

    def close(self, exit_code: int) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        """Called when a checkpoint is written; what is only in memory should not be lost with the process."""

    def drop(self) -> None:
        """Called after a failure; nothing is logged any more."""


def quiet_threads() -> None:
    """Keeps tracebacks of TensorBoard's and wandb's threads off the screen: the sink's next call raises as well."""
    hook = threading.excepthook

    def filtered(failure: Any) -> None:
        origins = type(failure.thread).__module__, failure.exc_type.__module__
        if not any(origin.startswith(("tensorboard", "wandb")) for origin in origins):
            hook(failure)

    threading.excepthook = filtered


class JsonLines(Sink):
    name = "metrics.jsonl"

    def __init__(self, path: Path, size: int = 0) -> None:
        """Goes on after the first `size` bytes: what a resumed run logged after its checkpoint, it logs again."""
        if path.exists():
            os.truncate(path, min(size, path.stat().st_size))
        self.file = path.open("a", buffering=1)

    def position(self) -> int:
        """Bytes so far, all of them on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def log(self, row: dict[str, float], step: int, seconds: float) -> None:
        plain = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self.file.write(json.dumps({"global_step": step, "time": round(seconds, 3), **plain}) + "\n")

    def close(self, exit_code: int) -> None:
        self.file.close()


class TensorBoard(Sink):
    name = "TensorBoard"

    def __init__(self, path: Path, facts: dict[str, Any], resumed_at: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if resumed_at is not None:
            _let_a_second_pass(path)
        # TensorBoard drops what earlier files hold from purge_step on.
        self.writer = SummaryWriter(str(path), purge_step=None if resumed_at is None else max(resumed_at, 1))
        if resumed_at is None:
            rows = (f"|{key}|{value}|" for key, value in facts.items())
            self.writer.add_text("hyperparameters", "\n".join(["|argument|value|", "|-|-|", *rows]))

    def log(self, row: dict[str, float], step: int, seconds: float) -> None:
        for key, value in row.items():
            self.writer.add_scalar(key, value, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self, exit_code: int) -> None:
        self.writer.close()


def _let_a_second_pass(path: Path) -> None:
    """Files of events are read in the order of their names: the second at which each began, then whatever differs."""
    seconds = [name.split(".")[3:4] for name in os.listdir(path) if name.startswith("events.out.tfevents.")]
    now = time.time()
    if [f"{int(now):010d}"] in seconds:
        time.sleep(1 - now % 1)


def wandb_service() -> Any:
    """The `subprocess.Popen` of wandb's service; None if there is none, or another process owns it. No public name."""
    try:
        return sys.modules["wandb.sdk.wandb_setup"]._singleton._connection._proc._process
    except (KeyError, AttributeError):
        return None


class _Patience:
    """Kills wandb's service process when a call has waited for it too long: the call then raises, as after a crash.

    wandb 0.31 waits for its service without a limit in places (for a run's summary, when a socket is full, at exit),
    and users have met services that never answer (wandb/wandb issues 4929, 5601). One thread for all runs of a process.
    """

    EXIT = 60  # seconds

    def __init__(self) -> None:
        self.call: list[float] | None = None  # another list for every call
        self.process: Any = None
        threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        self.call = [seconds]
        try:
            yield
        finally:
            self.call = None

    def at_exit(self) -> None:
        self.call = [self.EXIT]

    def _watch(self) -> None:
        call, naps = None, 0
        while True:
            time.sleep(1)
            self.process = wandb_service() or self.process
            # Naps, not the clock: seconds in which this process itself was stopped are not the service's fault.
            before, call = call, self.call
            naps = naps + 1 if call is before else 0
            if call is not None and naps >= call[0] and self.process is not None:
                self.process.kill()


_patience = functools.cache(_Patience)


class Wandb(Sink):
    """Weights & Biases: online where the user is logged in and the server answers, else offline on disk.

    Never prompts, never waits for a server, or for wandb's own process, longer than the timeouts below. `global_step`
    is the x axis of every metric. gymnasium >= 1.0 breaks wandb's own monitor_gym, and sync_tensorboard writes all of
    it twice with another x axis, so neither is used.
    """

    name = "W&B"
    LOGIN_TIMEOUT = 5  # seconds; unreachable networks are found out by this
    INIT_TIMEOUT = 20
    FINISH_TIMEOUT = 60  # what has not been uploaded by then stays on disk
    ANSWER_TIMEOUT = 60  # on top of those, for wandb's process to answer at all
    FLUSH_INTERVAL = 2  # wandb's own 15 are what a killed run would lose

    def __init__(self, path: Path, args: RunArgs, facts: dict[str, Any]) -> None:
        # Files of artifacts wait for their upload in the run directory, not in the user's home.
        os.environ.setdefault("WANDB_DATA_DIR", str((path / "wandb").absolute()))
        import wandb

        self.patience = _patience()
        hook = sys.excepthook
        logging.raiseExceptions = False  # a log file of wandb's on a full disk is not worth a page of traceback
        self.wandb = wandb
        self.late = False
        self.recent: collections.deque[tuple[float, dict[str, float], int]] = collections.deque()  # perhaps not on disk
        self.path = path
        with self.patience.within(self.LOGIN_TIMEOUT + self.ANSWER_TIMEOUT):
            self.mode = self._mode()

        @self.patience.within(self.INIT_TIMEOUT + self.ANSWER_TIMEOUT)
        def init(mode: Any) -> Any:
            return wandb.init(
                id=facts["wandb_id"],
                resume="allow" if args.resume else None,
                allow_val_change=True,
                project=args.wandb_project,
                entity=args.wandb_entity,
                group=redact(args.wandb_group),
                name=redact(args.wandb_name) or path.name,
                tags=redact(list(args.wandb_tags)),
                notes=redact(args.wandb_notes),
                job_type="train",
                config=facts,
                dir=path,
                mode=mode,
                save_code=False,  # what it would save, and its diff of uncommitted changes, may hold secrets:
                settings=wandb.Settings(  # source/ is uploaded below, without them
                    silent=True,
                    disable_git=True,
                    git_commit=facts["git_commit"],
                    console="off",
                    init_timeout=self.INIT_TIMEOUT,
                    finish_timeout=self.FINISH_TIMEOUT,
                    x_transaction_log_flush_interval=self.FLUSH_INTERVAL,
                ),
            )

        argv, sys.argv = sys.argv, redact(sys.argv)  # W&B keeps the command line
        try:
            self.run = init(self.mode)
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            if self.mode != "online":
                raise
            say(f"W&B: {str(error).splitlines()[0]}; this run stays on disk", sys.stderr)
            wandb.teardown(1)  # a failed init keeps its id in use
            self.mode = "offline"
            self.run = init(self.mode)
        finally:
            sys.argv = argv
        atexit.unregister(self.patience.at_exit)
        atexit.register(self.patience.at_exit)  # after wandb's own, which it is to come before
        sys.excepthook = hook  # wandb's own prints every traceback, whatever the user asked for
        self.run.define_metric("global_step")
        self.run.define_metric("*", step_metric="global_step")
        self.run.save(str(path / "source" / "*"), base_path=str(path), policy="now")
        self.artifact = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{facts['script']}-{args.env_id}")

    def log(self, row: dict[str, float], step: int, seconds: float) -> None:
        now = time.monotonic()
        while self.recent and self.recent[0][0] < now - 2 * self.FLUSH_INTERVAL:
            self.recent.popleft()
        self.recent.append((now, row, step))
        with self.patience.within(self.ANSWER_TIMEOUT):
            self.run.log({**row, "global_step": step}, step=step)

    def video(self, path: Path, step: int) -> None:
        with self.patience.within(self.ANSWER_TIMEOUT):
            self.run.log({"videos/eval": self.wandb.Video(str(path), format="mp4"), "global_step": step}, step=step)

    def close(self, exit_code: int) -> None:
        with self.patience.within(self.FINISH_TIMEOUT + self.ANSWER_TIMEOUT):
            try:
                if (self.path / "policy.pt").exists() and self.mode != "disabled":
                    policy = self.wandb.Artifact(self.artifact, type="model", metadata=dict(self.run.summary))
                    policy.add_file(str(self.path / "policy.pt"))
                    policy.add_file(str(self.path / "args.json"))
                    self.run.log_artifact(policy)
            finally:
                began = time.monotonic()
                self.run.finish(exit_code=exit_code)
                self.late = self.mode == "online" and time.monotonic() - began >= self.FINISH_TIMEOUT

    def drop(self) -> None:
        self.late = True
        # Else wandb's exit handler fails loudly on its dead process.
        with self.patience.within(self.ANSWER_TIMEOUT), contextlib.suppress(Exception):
            self.wandb.teardown(1)

    def where(self) -> str:
        if self.mode == "disabled":
            return "W&B: disabled by WANDB_MODE"
        if self.mode == "online" and not self.late:
            return f"W&B: {self.run.url}"
        online = "--include-online " if self.mode == "online" else ""
        # One folder for each start or resume. Given several, wandb stops at the first that a killed process left.
        found = sorted((self.path / "wandb").glob("*run-*-*"), key=lambda path: path.name.removeprefix("offline-"))
        folders = [shlex.quote(str(path)) for path in found]
        upload = "; ".join(f"wandb sync {online}{folder}" for folder in folders)
        return f"W&B offline: upload with  {upload}  or look at it with  wandb leet {folders[-1]}"

    def _mode(self) -> str:
        self.wandb.setup(self.wandb.Settings(silent=True))  # reads the environment before the lines below change it
        wanted = os.environ.get("WANDB_MODE", "online")
        if wanted != "online":
            return wanted
        errors = self.wandb.errors
        before = os.environ.get("WANDB_HTTP_TIMEOUT")
        os.environ["WANDB_HTTP_TIMEOUT"] = str(self.LOGIN_TIMEOUT)
        try:
            return "online" if self.wandb.login(prompt=False, verify=True) else "offline"
        except (errors.AuthenticationError, errors.UsageError, errors.CommError) as error:
            say(f"W&B: {str(error).splitlines()[0]}; this run stays on disk", sys.stderr)
            return "offline"
        finally:
            if before is None:
                del os.environ["WANDB_HTTP_TIMEOUT"]
            else:
                os.environ["WANDB_HTTP_TIMEOUT"] = before
