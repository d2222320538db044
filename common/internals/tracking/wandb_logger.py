"""Weights & Biases: online where the user is logged in and the server answers, else offline on disk."""

import atexit
import collections
import contextlib
import functools
import logging
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
from common.internals.tracking.local_loggers import Logger
from common.internals.tracking.redact import redact

# Where and how a run was started, and what W&B has in fields of its own: in args.json only, not in W&B's configuration.
NO_HYPERPARAMETERS = {"runs_dir", "resume", "debug", "track", "capture_video", "save_interval", "env_timeout", "cwd"}
NO_HYPERPARAMETERS |= {"allow_env_import", "folder", "common", "wandb_id"}
NO_HYPERPARAMETERS |= {name for name in RunArgs.__annotations__ if name.startswith("wandb_")}


def wandb_service() -> Any:
    """The `subprocess.Popen` of wandb's service, None if this process started none; wandb has no public name for it."""
    try:
        return sys.modules["wandb.sdk.wandb_setup"]._singleton._connection._proc._process
    except (KeyError, AttributeError):
        return None


class _Watchdog:
    """Kills wandb's service process when a call has waited too long for it: the call then raises, as after a crash.

    wandb 0.31 has calls that wait for the service without a limit (a run's summary, a full socket, at exit), and
    services that never answer occur (wandb/wandb issues 4929, 5601). One thread for all runs of a process.
    """

    def __init__(self) -> None:
        self.seconds_left = [float("inf")]  # another list for each call
        self.service: Any = None
        threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        self.service = wandb_service() or self.service  # wandb forgets it before it waits for its end
        self.seconds_left = [seconds]
        try:
            yield
        finally:
            self.seconds_left = [float("inf")]

    def at_exit(self) -> None:
        self.seconds_left = [Wandb.ANSWER_TIMEOUT]

    def _watch(self) -> None:
        while True:
            time.sleep(1)  # counted, not read from a clock: time in which this process is stopped is no fault of wandb
            self.service = wandb_service() or self.service
            left = self.seconds_left
            left[0] -= 1
            if left[0] < 0 and self.service is not None:
                self.service.kill()


_watchdog = functools.cache(_Watchdog)


class Wandb(Logger):
    """Never prompts, and never waits for a server or for wandb's own process longer than the timeouts below.

    `global_step` is the x axis of every metric. wandb's monitor_gym breaks with gymnasium >= 1.0, and sync_tensorboard
    logs everything twice with another x axis, so neither is used.
    """

    name = "W&B"
    INIT_TIMEOUT = 20  # seconds
    RESTART_TIMEOUT = 5  # for a wandb process that a silent server keeps; it has nothing to lose yet
    FINISH_TIMEOUT = 60  # what has not been uploaded by then stays on disk
    ANSWER_TIMEOUT = 60  # on top of those, for wandb's process to answer at all
    FLUSH_INTERVAL = 2  # wandb's own 15 are what a killed run would lose

    def __init__(self, path: Path, args: RunArgs, facts: dict[str, Any]) -> None:
        # Artifacts wait for their upload in the run directory, not in the user's home.
        os.environ.setdefault("WANDB_DATA_DIR", str((path / "wandb").absolute()))
        import wandb

        self.wandb, self.path = wandb, path
        self.watchdog = _watchdog()
        self.mode = ""
        self.unsent = ""  # why the server lacks something
        self.recent: collections.deque[tuple[float, dict[str, float], int]] = collections.deque()  # maybe not on disk
        logging.raiseExceptions = False  # no traceback where wandb's log file is on a full disk
        # wandb keeps the command line, and prints every traceback, whatever --debug is.
        argv, sys.argv, hook = sys.argv, redact(sys.argv), sys.excepthook
        try:
            self.run = self._start(args, facts)
        except wandb.Error as error:
            if self.mode != "online":
                raise
            why, server = (redact(text) for text in (str(error).splitlines()[0], wandb.setup().settings.base_url))
            late = "in time" in why or "timed out" in why
            self.unsent = f"{server} does not answer" if late else why.rstrip(".")
            with self.watchdog.limit(self.RESTART_TIMEOUT):
                self._teardown()  # a failed init keeps its id in use
            self.run = self._start(args, facts, offline=True)
        finally:
            sys.argv, sys.excepthook = argv, hook
        atexit.unregister(self.watchdog.at_exit)
        atexit.register(self.watchdog.at_exit)  # after wandb's own handler was registered, so called before it
        self.run.define_metric("global_step")
        self.run.define_metric("*", step_metric="global_step")
        with self.watchdog.limit(self.ANSWER_TIMEOUT):
            self.run.log_code(str(path / "source"), name=f"source-{facts['script']}", include_fn=lambda path: True)
        self.policy_name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{facts['script']}-{args.env_id}")
        say(self.where())

    def _start(self, args: RunArgs, facts: dict[str, Any], offline: bool = False) -> Any:
        wandb = self.wandb
        with self.watchdog.limit(self.INIT_TIMEOUT + self.ANSWER_TIMEOUT):
            settings = wandb.setup(wandb.Settings(silent=True)).settings
            os.environ.setdefault("WANDB_HTTP_TIMEOUT", "5")  # seconds, of login and artifacts: settings are read above
            self.mode = "offline" if offline else settings.mode  # WANDB_MODE, or online
            if self.mode == "offline":
                self.unsent = self.unsent or "as WANDB_MODE or `wandb offline` says"
            elif self.mode == "online" and not wandb.login(prompt=False, verify=True):
                self.mode, self.unsent = "offline", "not logged in"
            names = {"project": args.wandb_project, "entity": args.wandb_entity, "group": args.wandb_group}
            names |= {"name": args.wandb_name or self.path.name, "notes": args.wandb_notes}
            return wandb.init(
                **redact(names),
                tags=redact(list(args.wandb_tags)),
                id=facts["wandb_id"],
                resume="allow" if args.resume else None,
                allow_val_change=True,
                job_type="train",
                config={key: value for key, value in facts.items() if key not in NO_HYPERPARAMETERS},
                dir=self.path,
                mode=self.mode,
                save_code=False,  # code and git's diff may hold secrets: source/, without them, is uploaded instead
                settings=wandb.Settings(
                    silent=True,
                    disable_git=True,
                    git_commit=facts["git_commit"],
                    console="off",
                    init_timeout=self.INIT_TIMEOUT,
                    finish_timeout=self.FINISH_TIMEOUT,
                    finish_timeout_raises=True,
                    x_transaction_log_flush_interval=self.FLUSH_INTERVAL,
                ),
            )

    def log(self, row: dict[str, float], step: int, seconds: float) -> None:
        now = time.monotonic()
        while self.recent and self.recent[0][0] < now - 2 * self.FLUSH_INTERVAL:
            self.recent.popleft()
        self.recent.append((now, row, step))
        self._send(row, step)

    def video(self, path: Path, step: int) -> None:
        self._send({"videos/eval": self.wandb.Video(str(path), format="mp4")}, step)

    def _send(self, row: dict[str, Any], step: int) -> None:
        with self.watchdog.limit(self.ANSWER_TIMEOUT):
            self.run.log({**row, "global_step": step}, step=step)

    def close(self, exit_code: int) -> None:
        with self.watchdog.limit(self.FINISH_TIMEOUT + self.ANSWER_TIMEOUT):
            try:
                if (self.path / "policy.pt").exists() and self.mode != "disabled":
                    policy = self.wandb.Artifact(self.policy_name, type="model", metadata=dict(self.run.summary))
                    policy.add_file(str(self.path / "policy.pt"))
                    policy.add_file(str(self.path / "args.json"))
                    self.run.log_artifact(policy)
            finally:
                try:
                    self.run.finish(exit_code=exit_code)
                except TimeoutError:
                    self.unsent = self.unsent or "not all was uploaded"

    def drop(self) -> None:
        self.unsent = self.unsent or "failed during the run"
        with self.watchdog.limit(self.ANSWER_TIMEOUT):
            self._teardown()  # otherwise wandb's exit handler prints a traceback about its dead process

    def _teardown(self) -> None:
        with contextlib.suppress(Exception, SystemExit):  # it exits with the code of a service that was killed
            self.wandb.teardown(1)

    def where(self, look: bool = False) -> str:
        """One line: the address of the run, or how to upload it later and, with `look`, see it without a server."""
        if self.mode == "disabled":
            return "W&B: disabled by WANDB_MODE"
        if not self.unsent:
            return f"W&B: {self.run.url}"
        online = "--include-online " if self.mode == "online" else ""
        # One folder for each start or resume. Given several, wandb stops at the first that a killed process left.
        found = sorted((self.path / "wandb").glob("*run-*-*"), key=lambda folder: folder.name.removeprefix("offline-"))
        folders = [shlex.quote(str(folder)) for folder in found]
        upload = "; ".join(f"wandb sync {online}{folder}" for folder in folders)
        leet = f"  or look at it with: wandb leet {folders[-1]}" if look else ""
        return f"W&B: offline ({self.unsent}); upload later with: {upload}{leet}"
