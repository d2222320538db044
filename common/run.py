"""A run: its seeds and device, its directory, and the one `log` that every sink hears."""

import atexit
import collections
import dataclasses
import datetime
import errno
import functools
import itertools
import json
import math
import os
import random
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import distributed
from common.args import RANK, WORLD_SIZE, RunArgs, beside_training, fail, read_facts, say, warn
from common.files import finished_step, require_no_links, write_atomically
from common.health import Alarms
from common.local_loggers import JsonLines, TensorBoard, quiet_threads
from common.local_loggers import Logger as Sink
from common.phases import stepping, updating
from common.provenance import is_saved_source, keep_source, places, versions
from common.redact import REDACTED, redact
from common.wandb_logger import Wandb

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
RUN_DIR_KEY = "plainrl/run_dir"  # in torchrun's store
# What may differ when a run is resumed; all else would make another run of it.
MAY_CHANGE = {"total_timesteps", "eval_episodes", "eval_interval", "eval_max_steps", "log_interval", "save_interval"}
MAY_CHANGE |= {"resume", "runs_dir", "cuda", "torch_threads", "track", "capture_video", "allow_env_import", "debug"}


def setup(args: RunArgs, torchrun: bool = True) -> torch.device:
    """Seeds python, numpy and torch; sets threads and kernels; returns the device to train on.

    Under torchrun each process gets a device and random numbers of its own.

    Args:
        torchrun: whether the script can train on several processes; one that cannot ends with code 2 there.
    """
    if WORLD_SIZE > 1 and not torchrun:
        fail("this script trains in one process: start it with python, not torchrun")
    if args.compile:
        from common.compilation import require_compiler

        require_compiler()
    seed = args.seed
    if RANK > 0:
        seed = int(np.random.SeedSequence(args.seed, spawn_key=(RANK,)).generate_state(1, np.uint64)[0] >> 1)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - for environments and forks that draw from it
    torch.manual_seed(seed)
    torch.set_num_threads(args.torch_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cudnn.benchmark = not args.torch_deterministic
    if args.cuda and not torch.cuda.is_available() and RANK == 0:
        say("no CUDA GPU found: training on the CPU")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if WORLD_SIZE > 1:
        if device.type == "cuda":
            device = _own_gpu(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
        distributed.join(device)
    return device


def _own_gpu(index: int, processes: int) -> torch.device:
    if (found := torch.cuda.device_count()) < processes:
        fail(f"{processes} processes need a GPU each, and there are {found}: lower --nproc-per-node, or --no-cuda")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def track(args: RunArgs, device: torch.device) -> "Run":
    """Makes the run directory, `runs_dir/{env_id}__{script}__{seed}__{time}-{random}`, and opens every sink in it.

    Ends the process with code 6 if the directory cannot be made.
    """
    script = Path(sys.modules[type(args).__module__].__file__ or "interactive.py").resolve()
    lock = None
    if WORLD_SIZE > 1:
        args.resume = distributed.on_first(_begun_by_this_launch) or args.resume

    def begin() -> tuple[Path, dict[str, Any]]:
        nonlocal lock
        path, facts, lock = _new(args, device, script) if args.resume is None else _reopened(args, device, script)
        return path, facts

    path, facts = distributed.on_first(begin)
    if args.resume is None:
        return Run(path, args, facts, script, lock)
    from common.checkpoint import load_latest

    saved = load_latest(path / "checkpoints")
    if saved is None:
        warn(f"{path} has no checkpoint yet: it starts again from step 0")

    def write() -> None:
        try:
            write_atomically(path / "args.json", _json(facts))
            (path / "finished.json").unlink(missing_ok=True)
        except OSError as error:
            fail(f"cannot write the run directory {path}: {error.strerror}", code=6)

    distributed.on_first(write)
    return Run(path, args, facts, script, lock, saved)


def _begun_by_this_launch() -> str | None:
    """The directory of the run that a torchrun, which starts its processes anew when one has died, began before."""
    store = distributed.launcher_store()
    return store.get(RUN_DIR_KEY).decode() if store.check([RUN_DIR_KEY]) else None


def _new(args: RunArgs, device: torch.device, script: Path) -> tuple[Path, dict[str, Any], Any]:
    """The directory of a new run, its facts and its lock."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{args.env_id}__{script.stem}__{args.seed}__{stamp}-{secrets.token_hex(3)}"
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).lstrip(".-")[-200:]
    path = Path(args.runs_dir) / name
    try:
        path.mkdir(parents=True)
        lock = _lock(path)
        facts = {
            **dataclasses.asdict(args),
            "script": script.stem,
            "device": _device_name(device),
            "threads": torch.get_num_threads(),
            "processes": WORLD_SIZE,
            "versions": versions(),
            **keep_source(script, path / "source"),
            **places(script),
            "common": str(Path(__file__).parent),
            "wandb_id": secrets.token_hex(4),
        }
        facts = redact(facts)
        write_atomically(path / "args.json", _json(facts))
        if WORLD_SIZE > 1:
            distributed.launcher_store().set(RUN_DIR_KEY, str(path))
    except OSError as error:
        fail(f"cannot write the run directory {path}: {error.strerror}; choose another with --runs-dir", code=6)
    return path, facts, lock


def _reopened(args: RunArgs, device: torch.device, script: Path) -> tuple[Path, dict[str, Any], Any]:
    """The directory of the run to go on with, its facts and its lock."""
    path = Path(str(args.resume))
    try:
        lock = _lock(path)
        require_no_links(path)
    except OSError as error:
        fail(f"cannot resume {path}: {error.filename}: {error.strerror}", code=3)
    facts = read_facts(str(path))
    known = {"device", "threads", "versions", "total_timesteps", "script", "wandb_id"} <= facts.keys()
    if not known or not re.fullmatch(r"\w{1,64}", facts["wandb_id"]):
        fail(f"cannot resume {path}: its args.json is not one of a run", code=3)
    then = {"device": facts["device"], "threads": facts["threads"], **facts["versions"]}
    total_then = facts["total_timesteps"]
    if facts["script"] != script.stem:
        fail(f"cannot resume {path}: it is a run of {facts['script']}, not of {script.stem}", code=3)
    now = json.loads(json.dumps(dataclasses.asdict(args)))
    differ = []
    for name, value in now.items():
        flag = "--" + name.replace("_", "-")
        if REDACTED in json.dumps(value) and not name.startswith("wandb_"):
            fail(f"{flag} was not kept, as it is a secret: give it again")
        now[name] = redact(value)
        if name not in MAY_CHANGE and facts.get(name) != now[name]:
            differ.append(f"{name} was {facts.get(name)!r}, now {now[name]!r}")
            if REDACTED in json.dumps(facts.get(name)):
                fail(f"{flag} is not what an environment variable held when the run began: set that variable as well")
    if differ:
        fail(f"cannot resume {path}: {', '.join(differ)}", code=3)
    processes = facts.get("processes", 1)
    if processes != WORLD_SIZE:
        how = f"torchrun --nproc-per-node {processes}" if processes > 1 else "python"
        fail(f"{path} is a run of {processes} processes, not {WORLD_SIZE}: start it with {how}", code=3)
    finished = finished_step(path)
    if finished is not None and args.total_timesteps <= total_then:
        say(f"already complete, at step {finished}: {path}")
        raise SystemExit(0)
    if args.total_timesteps != total_then:
        grown = f"total_timesteps was {total_then:,}, is now {args.total_timesteps:,}"
        warn(f"{grown}: schedules that end there (learning rate, exploration) jump, as they follow the new total")
    if not is_saved_source(script, path):
        warn(f"{script} has changed since the run began; the source it began with is in {path / 'source'}")
    today = {"device": _device_name(device), "threads": torch.get_num_threads(), **versions()}
    changed = [f"{name} {then.get(name)} -> {value}" for name, value in today.items() if then.get(name) != value]
    if changed:
        warn(f"resumed, but not to the bit: {', '.join(changed)}")
    facts |= {name: value for name, value in now.items() if name in MAY_CHANGE} | redact(places(script))
    return path, facts, lock


def _json(facts: dict[str, Any]) -> bytes:
    return (json.dumps(facts, indent=2) + "\n").encode()


class Run:
    """What a script tells its run. Everything a sink can get wrong costs one warning, never the training."""

    def __init__(
        self, path: Path, args: RunArgs, facts: dict[str, Any], script: Path, lock: Any = None, saved: Any = None
    ) -> None:
        self.dir = path
        self.args = args
        self.saved = saved  # the checkpoint to go on from, until a Checkpoint has taken it
        self.resumable = False  # whether the script has a Checkpoint
        self.checkpointed = -1  # step of the last checkpoint that is on the disk
        self.evaluated = 0  # step of the last evaluation
        self.started = time.monotonic()
        self.sinks: list[Sink] = []
        self.wandb: Wandb | None = None
        self.world_size = WORLD_SIZE  # processes that train together, each with num_envs environments
        self._lock = lock
        self._json: JsonLines | None = None
        if RANK == 0:
            quiet_threads()
            self._json = self._open(JsonLines, path / "metrics.jsonl", saved["run"]["metrics_size"] if saved else 0)
            self._open(TensorBoard, path, facts, (saved["step"] if saved else 0) if args.resume else None)
            self.wandb = self._open(Wandb, path, args, facts) if args.track else None
        self._policy: Callable[[Tensor], Tensor] | None = None
        self._episodes: list[tuple[float, int, int, float]] = []  # return, length, step and time of its end
        self._recent: collections.deque[float] = collections.deque(maxlen=100)
        self._last_log = (0, time.monotonic())
        self._phases = (stepping.seconds, updating.seconds)  # at the last row
        self._rows: list[dict[str, float]] = []  # those of the step `_rows_at`, as TensorBoard has them
        self._rows_at = 0
        self._console = _Console(args.total_timesteps)
        self._alarms = Alarms(args.total_timesteps, args.num_envs * WORLD_SIZE)
        self.step = 0  # environment steps so far, as log_episodes was told
        self._signal = 0
        self._asked = (0, time.monotonic())  # calls of must_stop since all processes agreed on it, and when they did
        self._ask_after = 1
        self._finished = False
        self._old_handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._old_handlers[number] = signal.signal(number, self._on_signal)
        atexit.register(self._close, exit_code=1)
        if RANK == 0:
            many = f" x {WORLD_SIZE}" if WORLD_SIZE > 1 else ""
            again = f", from step {saved['step']:,}" if saved else ""
            say(f"{script.stem} on {args.env_id}, seed {args.seed}, {facts['device']}{many}{again}: {path}")

    def log(self, metrics: Mapping[str, float | Tensor], step: int) -> None:
        """Writes one row to every sink, with charts/SPS, health/time_* and the mean of the episodes since the last.

        The only place that reads a tensor's value (and so waits for a GPU). `step` counts environment steps.
        Under torchrun the first process writes the means of the metrics and the episodes of all.

        Ends the process with code 4 if a loss is not finite.
        """
        values = self._of_all(_read(metrics))
        for key, value in values.items():
            if key.endswith("_loss") and not math.isfinite(value):
                self._policy = None  # policy.pt stays as it last was
                what = f"{key} is {value} at step {step}: lower the learning rate, or look at the rewards"
                distributed.on_first(functools.partial(fail, what, code=4))
        now = time.monotonic()
        last_step, last_time = self._last_log
        seconds = max(now - last_time, 1e-9)
        in_envs, in_updates = self._since_last_log()
        values["charts/SPS"] = (step - last_step) / seconds
        values["health/time_env"] = in_envs / seconds
        values["health/time_update"] = in_updates / seconds
        values["health/time_other"] = 1 - (in_envs + in_updates) / seconds
        self._last_log, self._phases = (step, now), (stepping.seconds, updating.seconds)
        self._write(values, step)
        for line in self._alarms.look(values, step) if RANK == 0 else ():
            self._console.line("")
            warn(line)
        if RANK == 0:
            mean_return = sum(self._recent) / len(self._recent) if self._recent else None
            self._console.progress(step, values["charts/SPS"], mean_return)

    def _since_last_log(self) -> tuple[float, float]:
        """Seconds in environments and in updates."""
        return stepping.seconds - self._phases[0], updating.seconds - self._phases[1]

    def log_episodes(self, infos: dict[str, Any], step: int) -> None:
        """Notes the episodes that ended in this step; call it after every `envs.step`.

        metrics.jsonl gets a line for each, under torchrun at the next `log`. TensorBoard and W&B get their mean at the
        next `log`, so that an environment whose episodes are short does not spend its time on dashboards.
        A run without a Checkpoint stops here when Ctrl-C or a signal asks it to; one that has one, when that saves.
        """
        self.step = step
        if "episode" in infos:
            for i in np.flatnonzero(infos["_episode"]):
                r, length = float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i])
                self._episodes.append((r, length, step, self._time()))
                if WORLD_SIZE == 1:
                    self._note(self._episodes[-1])
        if not self.resumable:
            if WORLD_SIZE > 1:
                fail("torchrun needs common.Checkpoint in the script: by it all processes begin with the same weights")
            if self._signal:
                self.stop(step)

    def _note(self, episode: tuple[float, int, int, float]) -> None:
        r, length, step, seconds = episode
        self._recent.append(r)
        self._alarms.note(r)
        row = {"charts/episodic_return": r, "charts/episodic_length": float(length)}
        self._tell([sink for sink in self.sinks if sink is self._json], "log", row, step, seconds)

    def _of_all(self, values: dict[str, float]) -> dict[str, float]:
        """The means of `values` over all processes; the first one has the episodes of all afterwards."""
        if WORLD_SIZE == 1:
            return values
        everyone = distributed.gather((values, self._episodes))
        self._episodes = []
        if RANK == 0:
            episodes = itertools.chain(*(theirs for _, theirs in everyone))
            self._episodes = sorted(episodes, key=lambda episode: episode[2])
            for episode in self._episodes:
                self._note(episode)
        # What one process cannot measure has no mean.
        shared = [key for key in values if all(key in theirs for theirs, _ in everyone)]
        return {key: sum(theirs[key] for theirs, _ in everyone) / WORLD_SIZE for key in shared}

    def evaluation_due(self, step: int) -> bool:
        """Whether a multiple of eval_interval, or the end, has been reached since the last evaluation."""
        args, last = self.args, self.evaluated
        if args.eval_episodes == 0 or step <= last:
            return False
        passed = args.eval_interval > 0 and step // args.eval_interval > last // args.eval_interval
        return passed or step >= args.total_timesteps

    def log_evaluation(self, metrics: Mapping[str, float], step: int, video: Path | None) -> None:
        """Writes an evaluation's row; no metrics where it failed."""
        self._of_all({})
        if RANK > 0 or not metrics:
            return
        self._write(dict(metrics), step)
        if video is not None:
            self._tell(self.sinks, "video", video, step)
        mean, std = metrics["eval/episodic_return"], metrics["eval/episodic_return_std"]
        self._console.line(f"step {step:,}: greedy evaluation {mean:.1f} ± {std:.1f}" + (f"  {video}" if video else ""))

    def save_policy(self, policy: Callable[[Tensor], Tensor]) -> None:
        """Writes policy.pt now, and again at every evaluation and when the run ends or is stopped.

        Args:
            policy: a method, [n, ...] observations to [n, ...] actions, of a network that is made of
                `(envs, args)` by a class in the script; `python -m common evaluate` makes it anew.

        Ends the process with code 6 if the file cannot be written.
        """
        self._policy = policy
        try:
            self._save_policy()
        except (OSError, RuntimeError) as error:
            self._policy = None
            self._close(exit_code=6)
            fail(f"cannot write {self.dir / 'policy.pt'}: {error}", code=6)

    def write_policy(self) -> None:
        """Writes policy.pt as it is now; a warning where that fails."""
        with beside_training("writing policy.pt"):
            self._save_policy()

    def _save_policy(self) -> None:
        from common.policy import save_policy

        # Until the networks of a resumed run are restored, policy.pt is better than they are.
        if self._policy is not None and self.saved is None and RANK == 0:
            save_policy(self._policy, self.dir / "policy.pt")

    def stop(self, step: int) -> None:
        """Ends the process because a signal asked for it, with everything kept; 128 + its number."""
        number = self._signal
        resumable = self.checkpointed == step
        if resumable:
            self._episodes.clear()  # the checkpoint has them, and the next row will
        self._of_all({})

        def end() -> None:
            self._close(exit_code=128 + number)
            how = f"go on with --resume {self.dir}" if resumable else f"what it learnt is in {self.dir}"
            fail(f"stopped by {signal.Signals(number).name} at step {step}; {how}", 128 + number)

        distributed.on_first(end)

    def must_stop(self, now: bool = False) -> bool:
        """Whether a signal asked to stop. All processes call it at the same steps, and are told at the same one.

        Under torchrun they ask each other, four times a second unless `now`: each call would cost more than a step.
        """
        if WORLD_SIZE == 1:
            return bool(self._signal)
        calls, since = self._asked[0] + 1, self._asked[1]
        self._asked = calls, since
        if calls < self._ask_after and not now:
            return False
        seconds = (time.monotonic() - since) / calls
        answers = distributed.gather((self._signal, min(max(round(0.25 / seconds), 1), 200)))
        self._signal, self._ask_after = max(number for number, _ in answers), answers[0][1]
        self._asked = 0, time.monotonic()
        return bool(self._signal)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs so that its rows follow on; everything logged so far is on the disk afterwards."""
        self._tell(self.sinks, "flush")
        last_step, last_time = self._last_log
        return {
            "metrics_size": self._metrics_size(),
            "step": self.step,
            "evaluated": self.evaluated,
            "rows": self._rows if self._rows_at == self.step else [],
            "wandb_rows": [] if self.wandb is None else [(row, at) for _, row, at in self.wandb.recent],
            "episodes": [list(episode) for episode in self._episodes],
            "recent": list(self._recent),
            "alarms": self._alarms.state_dict(),
            "seconds": self._time(),
            "last_log": (last_step, time.monotonic() - last_time),
            "phases": self._since_last_log(),
        }

    def _metrics_size(self) -> int:
        """Bytes of metrics.jsonl that a resumed run keeps: all, also where the disk took no more of them."""
        if self._json is not None and self._json in self.sinks:
            return self._json.position()
        path = self.dir / "metrics.jsonl"
        return path.stat().st_size if RANK == 0 and path.exists() else 0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        now = time.monotonic()
        self.step, self.evaluated = state["step"], state["evaluated"]
        self._console.first_step = self.step
        # TensorBoard drops all that it had from this step on, an evaluation after the checkpoint among it.
        self._rows, self._rows_at = state["rows"], self.step
        for row in self._rows:
            self._tell([sink for sink in self.sinks if isinstance(sink, TensorBoard)], "log", row, self.step, 0.0)
        for row, at in state["wandb_rows"]:
            self._tell([sink for sink in self.sinks if sink is self.wandb], "log", row, at, 0.0)
        self._episodes = [tuple(episode) for episode in state["episodes"]]
        self._recent.extend(state["recent"])
        self._alarms.load_state_dict(state["alarms"])
        self.started = now - state["seconds"]
        last_step, ago = state["last_log"]
        self._last_log = last_step, now - ago
        in_envs, in_updates = state["phases"]
        self._phases = (stepping.seconds - in_envs, updating.seconds - in_updates)

    def leave_out(self, seconds: float) -> None:
        """charts/SPS is that of training: `seconds` of something else do not count."""
        self._last_log = self._last_log[0], self._last_log[1] + seconds

    @property
    def stop_requested(self) -> bool:
        return bool(self._signal)

    def finish(self) -> None:
        """Keeps the final policy, closes every sink and says where the run is."""
        self._of_all({})
        if RANK > 0:
            self._close(exit_code=0)
            return
        seconds = self._time()
        self._close(exit_code=0)
        with beside_training("writing finished.json"):
            write_atomically(self.dir / "finished.json", _json({"global_step": self.step, "time": seconds}))
        self._console.line(f"done in {seconds:.1f} s: {self.dir}")
        if self.wandb is not None:
            say(self.wandb.where())

    def _close(self, exit_code: int) -> None:
        if self._finished:
            return
        self._finished = True
        atexit.unregister(self._close)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        unsaved = ""
        try:
            self._save_policy()
        except (OSError, RuntimeError) as error:
            unsaved = f"cannot write {self.dir / 'policy.pt'}: {error}"
            exit_code = exit_code or 6
        if self._episodes:  # those since the last row
            self._write({}, self.step)
        self._tell(self.sinks, "close", exit_code)
        if self._lock is not None:
            self._lock.close()
        if unsaved and exit_code == 6:
            fail(unsaved, code=6)
        elif unsaved:  # another error ends the run
            warn(unsaved)

    def _write(self, values: dict[str, float], step: int) -> None:
        row = dict(values)
        if self._episodes:
            returns, lengths, _, _ = zip(*self._episodes, strict=True)
            row["charts/episodic_return"] = sum(returns) / len(returns)
            row["charts/episodic_length"] = sum(lengths) / len(lengths)
            self._episodes.clear()
        self._rows, self._rows_at = [*(self._rows if self._rows_at == step else []), row], step
        for sink in list(self.sinks):
            if mine := values if sink is self._json else row:  # metrics.jsonl has the episodes themselves
                self._tell([sink], "log", mine, step, self._time())

    def _open(self, kind: Callable[..., Any], *words: Any) -> Any:
        try:
            sink = kind(*words)
        except Exception as error:
            warn(f"{kind.__name__} is off for this run: {type(error).__name__}: {error}")
            return None
        self.sinks.append(sink)
        return sink

    def _tell(self, sinks: Iterable[Sink], method: str, *words: Any) -> None:
        for sink in list(sinks):
            try:
                getattr(sink, method)(*words)
            except Exception as error:
                self.sinks.remove(sink)
                sink.drop()
                warn(f"{sink.name} failed and is off for the rest of the run: {type(error).__name__}: {error}")

    def _time(self) -> float:
        return time.monotonic() - self.started

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = number
        for known in self._old_handlers:
            signal.signal(known, signal.SIG_DFL)
        if RANK == 0:
            os.write(2, b"\nstopping at the next step (again: at once)\n")


class _Console:
    """One line that renews itself in a terminal; a line every tenth of the run in a redirected log."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.first_step = 0  # of this process
        self.terminal = sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()
        self.started = time.monotonic()
        self.last_time = -math.inf
        self.last_tenth = -1

    def progress(self, step: int, sps: float, mean_return: float | None) -> None:
        now, tenth = time.monotonic(), 10 * step // self.total
        if now - self.last_time < 0.5 if self.terminal else tenth == self.last_tenth:
            return
        self.last_time, self.last_tenth = now, tenth
        # The last step may lie beyond the total, where that is no multiple of num_envs.
        left = max(self.total - step, 0) / max(step - self.first_step, 1) * (now - self.started)
        so_far = "" if mean_return is None else f"  return {mean_return:.1f}"
        clock = datetime.timedelta(seconds=round(left))
        self.line(f"{step:>9,}/{self.total:,} steps{so_far}  {sps:,.0f} steps/s  {clock} left", renewed=True)

    def line(self, text: str, renewed: bool = False) -> None:
        say(f"\r{text:<78}" if self.terminal else text, end="" if self.terminal and renewed else "\n")


def _read(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Python numbers; the tensors of a device in one transfer."""
    values = dict(metrics)
    tensors = {key: value.detach().float() for key, value in metrics.items() if isinstance(value, Tensor)}
    for device in {tensor.device for tensor in tensors.values()}:
        mine = {key: tensor for key, tensor in tensors.items() if tensor.device == device}
        values.update(zip(mine, torch.stack(list(mine.values())).tolist(), strict=True))
    return {key: float(value) for key, value in values.items()}


def _lock(path: Path) -> Any:
    """Holds the run directory for this process; the system lets go of it however the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    deadline = time.monotonic() + (5 if WORLD_SIZE > 1 else 0)  # env workers outlive the process that torchrun replaces
    while True:
        try:
            # Neither emptied nor followed: it may be somebody's link to a file of the user's.
            file = os.fdopen(os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+b", 0)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError as error:
            if error.errno == errno.ELOOP:
                fail(f"cannot resume {path}: its .lock is a link; remove it", code=3)
            if time.monotonic() > deadline:
                fail(f"{path} is in use by another process, or cannot be written ({error.strerror})", code=6)
        time.sleep(0.2)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
