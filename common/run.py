"""A run: its seeds and device, its directory, and the one `log` that every sink hears."""

import atexit
import collections
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
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

from common.args import RunArgs, fail, read_facts, warn
from common.health import Alarms
from common.provenance import keep_source
from common.redact import REDACTED, redact
from common.sinks import JsonLines, Sink, TensorBoard, Wandb, quiet_threads

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
# What may differ when a run is resumed; all else would make another run of it.
MAY_CHANGE = {
    "total_timesteps",
    "cuda",
    "torch_threads",
    "track",
    "capture_video",
    "eval_episodes",
    "eval_interval",
    "log_interval",
    "save_interval",
    "resume",
    "runs_dir",
    "debug",
}


def setup(args: RunArgs) -> torch.device:
    """Seeds python, numpy and torch; sets threads and kernels; returns the device to train on."""
    if args.compile:
        from common.compilation import require_compiler

        require_compiler()
    random.seed(args.seed)
    np.random.seed(args.seed % 2**32)  # noqa: NPY002 - for environments and forks that draw from it
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cudnn.benchmark = not args.torch_deterministic
    if args.cuda and not torch.cuda.is_available():
        print("no CUDA GPU found: training on the CPU", flush=True)
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


def track(args: RunArgs, device: torch.device) -> "Run":
    """Makes the run directory and opens every sink.

    `runs_dir/{env_id}__{script}__{seed}__{time}-{random}` holds args.json, metrics.jsonl, TensorBoard's event
    file, wandb/, source/ and, later, videos/ and policy.pt. With `--no-track` there is no wandb/.

    Ends the process with code 6 if the directory cannot be made.
    """
    script = Path(sys.modules[type(args).__module__].__file__ or "interactive.py").resolve()
    if args.resume is not None:
        return _resume(args, device, script)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{args.env_id}__{script.stem}__{args.seed}__{stamp}-{secrets.token_hex(3)}"
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).lstrip(".-")[-200:]
    path = Path(args.runs_dir) / name
    try:
        path.mkdir(parents=True)
        lock = _lock(path)
        source = keep_source(script, path / "source")
        facts = {
            **dataclasses.asdict(args),
            "script": script.stem,
            "device": _device_name(device),
            "threads": torch.get_num_threads(),
            "versions": _versions(),
            **source,
            "common": str(Path(__file__).parent),
            "wandb_id": secrets.token_hex(4),
        }
        facts = redact(facts)
        (path / "args.json").write_text(json.dumps(facts, indent=2) + "\n")
    except OSError as error:
        fail(f"cannot write the run directory {path}: {error.strerror}; choose another with --runs-dir", code=6)
    return Run(path, args, facts, script, lock)


def _resume(args: RunArgs, device: torch.device, script: Path) -> "Run":
    """The run in `args.resume`, as its last whole checkpoint left it."""
    from common.checkpoint import load_latest

    path = Path(str(args.resume))
    facts = read_facts(str(path))
    lock = _lock(path)
    now = json.loads(json.dumps(dataclasses.asdict(args)))
    for name, value in now.items():
        if isinstance(value, str) and REDACTED in value and not name.startswith("wandb_"):
            fail(f"--{name.replace('_', '-')} was not kept, as it is a secret: give it again")
    now = redact(now)
    differ = [name for name, value in now.items() if name not in MAY_CHANGE and facts.get(name) != value]
    if facts["script"] != script.stem or differ:
        was = ", ".join(f"{name} was {facts.get(name)!r}, now {now[name]!r}" for name in differ)
        fail(
            f"{path} is a run of {facts['script']}, and would not go on as it began: {was or 'another script'}", code=3
        )
    if (path / "finished.json").exists():
        finished = json.loads((path / "finished.json").read_text())["global_step"]
        if args.total_timesteps <= facts["total_timesteps"]:
            print(f"already complete, at step {finished}: {path}")
            raise SystemExit(0)
        (path / "finished.json").unlink()
    saved_script = path / "source" / script.name
    if not saved_script.exists() or saved_script.read_text("utf-8") != redact(script.read_text("utf-8")):
        warn(f"{script} has changed since the run began; the source it began with is in {saved_script}")
    then = {"device": facts["device"], "threads": facts["threads"], **facts["versions"]}
    today = {"device": _device_name(device), "threads": torch.get_num_threads(), **_versions()}
    changed = [f"{name} {then.get(name)} -> {value}" for name, value in today.items() if then.get(name) != value]
    if changed:
        warn(f"resumed, but not to the bit: {', '.join(changed)}")
    saved = load_latest(path / "checkpoints")
    if saved is None:
        warn(f"{path} has no checkpoint yet: it starts again from step 0")
    facts |= {name: value for name, value in now.items() if name in MAY_CHANGE}
    try:
        (path / "args.tmp").write_text(json.dumps(facts, indent=2) + "\n")
        (path / "args.tmp").replace(path / "args.json")
    except OSError as error:
        fail(f"cannot write the run directory {path}: {error.strerror}", code=6)
    return Run(path, args, facts, script, lock, saved)


class Run:
    """What a script tells its run. Everything a sink can get wrong costs one warning, never the training."""

    def __init__(
        self,
        path: Path,
        args: RunArgs,
        facts: dict[str, Any],
        script: Path,
        lock: Any = None,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self.dir = path
        self.args = args
        self.saved = saved  # the checkpoint to go on from, until a Checkpoint has taken it
        self.checkpoint: Any = None  # the script's Checkpoint, if it has one
        self.started = time.monotonic()
        self.sinks: list[Sink] = []
        self.wandb: Wandb | None = None
        self._lock = lock
        quiet_threads()
        self._json = self._open(JsonLines, path / "metrics.jsonl", saved["run"]["metrics_size"] if saved else 0)
        self._open(TensorBoard, path, facts, (saved["step"] if saved else 0) if args.resume else None)
        if args.track:
            self.wandb = self._open(Wandb, path, args, facts)
        self._policy: Callable[[Tensor], Tensor] | None = None
        self._keep_policy = saved is not None  # until the networks are restored, policy.pt is better than they are
        self._episodes: list[tuple[float, int]] = []
        self._recent: collections.deque[float] = collections.deque(maxlen=100)
        self._last_log = (0, time.monotonic())
        self._paused = 0.0
        self._console = _Console(args.total_timesteps)
        self._alarms = Alarms(args.total_timesteps, args.num_envs)
        self._step = 0
        self._signal = 0
        self._finished = False
        self._old_handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._old_handlers[number] = signal.signal(number, self._on_signal)
        atexit.register(self._close, exit_code=1)
        again = f", from step {saved['step']:,}" if saved else ""
        print(f"{script.stem} on {args.env_id}, seed {args.seed}, {facts['device']}{again}: {path}", flush=True)

    def log(self, metrics: Mapping[str, float | Tensor], step: int) -> None:
        """Writes one row to every sink, with charts/SPS and the mean of the episodes that ended since the last.

        The only place that reads a tensor's value (and so waits for a GPU). `step` counts environment steps.

        Ends the process with code 4 if a loss is not finite.
        """
        values = _read(metrics)
        for key, value in values.items():
            if key.endswith("_loss") and not math.isfinite(value):
                self._policy = None  # policy.pt stays as it last was
                fail(f"{key} is {value} at step {step}: lower the learning rate, or look at the rewards", code=4)
        now = time.monotonic()
        last_step, last_time = self._last_log
        values["charts/SPS"] = (step - last_step) / max(now - last_time - self._paused, 1e-9)
        self._last_log, self._paused = (step, now), 0.0
        self._write(values, step)
        for line in self._alarms.look(values, step):
            self._console.line("")
            warn(line)
        mean_return = sum(self._recent) / len(self._recent) if self._recent else None
        self._console.progress(step, values["charts/SPS"], mean_return)

    def log_episodes(self, infos: dict[str, Any], step: int) -> None:
        """Notes the episodes that ended in this step; call it after every `envs.step`.

        metrics.jsonl gets a line for each. TensorBoard and W&B get their mean at the next `log`, so that an
        environment whose episodes are short does not spend its time on dashboards.
        A run without a Checkpoint stops here when Ctrl-C or a signal asks it to; one that has one, when that saves.
        """
        self._step = step
        if "episode" in infos:
            for i in np.flatnonzero(infos["_episode"]):
                r, length = float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i])
                self._episodes.append((r, length))
                self._recent.append(r)
                self._alarms.episodes = True
                row = {"charts/episodic_return": r, "charts/episodic_length": float(length)}
                self._tell([sink for sink in self.sinks if isinstance(sink, JsonLines)], "log", row, step, self._time())
        if self._signal and self.checkpoint is None:
            self.stop(step)

    def log_evaluation(self, metrics: Mapping[str, float], step: int, seconds: float, video: Path | None) -> None:
        """An evaluation that took `seconds`, which charts/SPS does not count."""
        self._paused += seconds
        self._write(dict(metrics), step)
        if video is not None:
            self._tell(self.sinks, "video", video, step)
        mean, std = metrics["eval/episodic_return"], metrics["eval/episodic_return_std"]
        self._console.line(f"step {step:,}: greedy evaluation {mean:.1f} ± {std:.1f}" + (f"  {video}" if video else ""))

    def save_policy(self, policy: Callable[[Tensor], Tensor]) -> None:
        """Writes policy.pt now, and again when the run ends or is stopped.

        Args:
            policy: a method, [n, ...] observations to [n, ...] actions, of a network that is made of
                `(envs, args)` by a class in the script; `python -m common evaluate` makes it anew.

        Ends the process with code 6 if the file cannot be written.
        """
        from common.policy import save_policy

        self._policy = policy
        if self._keep_policy:
            return
        try:
            save_policy(policy, self.dir / "policy.pt")
        except (OSError, RuntimeError) as error:
            self._policy = None
            self._close(exit_code=6)
            fail(f"cannot write {self.dir / 'policy.pt'}: {error}", code=6)

    def resumed(self) -> None:
        """The networks are what they were, or a new run's: from here on policy.pt is theirs."""
        self._keep_policy = False

    def stop(self, step: int, resumable: bool = False) -> None:
        """Ends the process because a signal asked for it, with everything kept; 128 + its number."""
        number = self._signal
        if resumable:
            self._episodes.clear()  # the checkpoint has them, and the next row will
        self._close(exit_code=128 + number)
        how = f"go on with --resume {self.dir}" if resumable else f"what it learnt is in {self.dir}"
        fail(f"stopped by {signal.Signals(number).name} at step {step}; {how}", 128 + number)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs so that its rows follow on; everything logged so far is on the disk afterwards."""
        for sink in self.sinks:
            self._tell([sink], "flush")
        last_step, last_time = self._last_log
        return {
            "metrics_size": self._json.position() if self._json in self.sinks else 0,
            "step": self._step,
            "wandb_rows": [] if self.wandb is None else [(row, at) for _, row, at in self.wandb.recent],
            "episodes": [list(episode) for episode in self._episodes],
            "recent": list(self._recent),
            "alarms": self._alarms.state_dict(),
            "seconds": self._time(),
            "last_log": (last_step, time.monotonic() - last_time - self._paused),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        now = time.monotonic()
        self._step = state["step"]
        self._console.first_step = self._step
        for row, at in state["wandb_rows"]:
            self._tell([sink for sink in self.sinks if sink is self.wandb], "log", row, at, 0.0)
        self._episodes = [(r, length) for r, length in state["episodes"]]
        self._recent.extend(state["recent"])
        self._alarms.load_state_dict(state["alarms"])
        self.started = now - state["seconds"]
        last_step, ago = state["last_log"]
        self._last_log, self._paused = (last_step, now - ago), 0.0

    def leave_out(self, seconds: float) -> None:
        """charts/SPS is that of training: `seconds` of something else do not count."""
        self._paused += seconds

    @property
    def policy(self) -> Callable[[Tensor], Tensor]:
        """What `save_policy` was given."""
        assert self._policy is not None, "run.save_policy(...) comes before the checkpoint starts"
        return self._policy

    @property
    def stop_requested(self) -> bool:
        return bool(self._signal)

    def finish(self) -> None:
        """Keeps the final policy, closes every sink and says where the run is."""
        seconds = self._time()
        try:
            (self.dir / "finished.json").write_text(json.dumps({"global_step": self._step, "time": seconds}) + "\n")
        except OSError as error:
            warn(f"cannot write {self.dir / 'finished.json'}: {error.strerror}")
        self._close(exit_code=0)
        self._console.line(f"done in {seconds:.1f} s: {self.dir}")
        if self.wandb is not None:
            print(self.wandb.where(), flush=True)

    def _close(self, exit_code: int) -> None:
        if self._finished:
            return
        self._finished = True
        atexit.unregister(self._close)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        if self._policy is not None:
            self.save_policy(self._policy)
        if self._episodes:  # those since the last row
            self._write({}, self._step)
        self._tell(self.sinks, "close", exit_code)

    def _write(self, values: dict[str, float], step: int) -> None:
        row = dict(values)
        if self._episodes:
            returns, lengths = zip(*self._episodes, strict=True)
            row["charts/episodic_return"] = sum(returns) / len(returns)
            row["charts/episodic_length"] = sum(lengths) / len(lengths)
            self._episodes.clear()
        for sink in list(self.sinks):
            mine = values if isinstance(sink, JsonLines) else row  # metrics.jsonl has the episodes themselves
            if mine:
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
        os.write(2, b"\nstopping at the next step (again: at once)\n")


class _Console:
    """One line that renews itself in a terminal; a line every tenth of the run in a redirected log."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.first_step = 0  # of this process
        self.terminal = sys.stdout.isatty()
        self.started = time.monotonic()
        self.last_time = -math.inf
        self.last_tenth = -1

    def progress(self, step: int, sps: float, mean_return: float | None) -> None:
        now = time.monotonic()
        tenth = 10 * step // self.total
        if now - self.last_time < 0.5 if self.terminal else tenth == self.last_tenth:
            return
        self.last_time, self.last_tenth = now, tenth
        # The last step may lie beyond the total, where that is no multiple of num_envs.
        left = max(self.total - step, 0) / max(step - self.first_step, 1) * (now - self.started)
        parts = [f"{step:>9,}/{self.total:,} steps", f"{sps:,.0f} steps/s", f"{_clock(left)} left"]
        if mean_return is not None:
            parts.insert(1, f"return {mean_return:.1f}")
        text = "  ".join(parts)
        print(f"\r{text:<78}" if self.terminal else text, end="" if self.terminal else "\n", flush=True)

    def line(self, text: str) -> None:
        print(f"\r{text:<78}" if self.terminal else text, flush=True)


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


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
    try:
        file = (path / ".lock").open("w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        fail(f"{path} is in use by another process, or cannot be written ({error.strerror})", code=6)
    return file


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _versions() -> dict[str, str]:
    names = ("torch", "gymnasium", "numpy", "wandb", "ale-py", "mujoco", "box2d", "lightning")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
