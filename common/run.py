"""A run: its seeds and device, its directory, and everything that is logged."""

import atexit
import functools
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.args import RANK, WORLD_SIZE, RunArgs, beside_training, fail, say, warn
from common.internals.console.progress import Progress
from common.internals.resume.random_state import seed_everything
from common.internals.resume.signals import StopSignals
from common.internals.speed import processes
from common.internals.speed.compile import require_compiler
from common.internals.speed.timing import RowClock
from common.internals.tracking import run_dir
from common.internals.tracking.diagnostics import Alarms
from common.internals.tracking.episodes import Episode, Episodes
from common.internals.tracking.loggers import Loggers, as_floats
from common.internals.tracking.policy import save_policy
from common.sinks import JsonLines


def setup(args: RunArgs, torchrun: bool = True) -> torch.device:
    """Seeds python, numpy and torch; sets threads and kernels; returns the device to train on.

    Under torchrun each process gets a device and random numbers of its own.

    Args:
        torchrun: whether the script can train on several processes; one that cannot ends with code 2 there.
    """
    if WORLD_SIZE > 1 and not torchrun:
        fail("this script trains in one process: start it with python, not torchrun")
    if args.compile:
        require_compiler()
    seed_everything(args.seed)
    torch.set_num_threads(args.torch_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cudnn.benchmark = not args.torch_deterministic
    if args.cuda and not torch.cuda.is_available() and RANK == 0:
        say("no CUDA GPU found: training on the CPU")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    return processes.init(device)


def track(args: RunArgs, device: torch.device) -> "Run":
    """Makes or reopens the run directory, `runs_dir/{env_id}__{script}__{seed}__{time}-{random}`, with its loggers.

    Ends the process with code 6 if the directory cannot be written, and with code 3 if `args.resume` names no run that
    can be resumed.
    """
    script = Path(sys.modules[type(args).__module__].__file__ or "interactive.py").resolve()
    return Run(args, *run_dir.begin(args, device, script))


class Run:
    """One run's directory and its log. A logger that fails costs one warning, never the training."""

    def __init__(self, args: RunArgs, path: Path, config: dict[str, Any], lock: Any = None, saved: Any = None) -> None:
        self.dir = path
        self.args = args
        self.saved = saved  # the checkpoint to go on from, until a Checkpoint has taken it
        self.resumable = False  # whether the script has a Checkpoint
        self.checkpointed = -1  # step of the last checkpoint that is on the disk
        self.evaluated = 0  # step of the last evaluation
        self.step = 0  # environment steps so far, as of the last log_episodes
        self.started = time.monotonic()
        self.loggers = Loggers(path, args, config, saved)
        self._lock = lock
        self._policy: Callable[[Tensor], Tensor] | None = None
        self._noted: dict[str, float | Tensor] = {}  # metrics for the next row
        self._episodes = Episodes()  # since the last row
        self._clock = RowClock()
        self._progress = Progress(args.total_timesteps)
        self._alarms = Alarms(args.total_timesteps, args.num_envs)
        self._signals = StopSignals()
        self._finished = False
        atexit.register(self._close, exit_code=1)
        if RANK == 0:
            many = f" x {WORLD_SIZE}" if WORLD_SIZE > 1 else ""
            again = f", from step {saved['step']:,}" if saved else ""
            say(f"{config['script']} on {args.env_id}, seed {args.seed}, {config['device']}{many}{again}: {path}")

    def note(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Keeps metrics, the losses of the last update for example, for the next row."""
        self._noted |= metrics

    def log(self, metrics: Mapping[str, float | Tensor], step: int) -> None:
        """Logs one row: these metrics, what was noted, charts/SPS, health/time_* and the mean of the episodes.

        The only place that reads a tensor's value (and so waits for a GPU). `step` counts environment steps.
        Under torchrun the first process logs the means of the metrics and the episodes of all.

        Ends the process with code 4 if a loss is not finite.
        """
        values = self._mean_over_processes(as_floats({**self._noted, **metrics}))
        self._noted = {}
        for key, value in values.items():
            if key.endswith("_loss") and not math.isfinite(value):
                self._policy = None  # policy.pt stays as it last was
                what = f"{key} is {value} at step {step}: lower the learning rate, or look at the rewards"
                processes.on_rank_zero(functools.partial(fail, what, code=4))
        values |= self._clock.row(step)
        self.loggers.log(values, self._episodes.take_means(), step, self._time())
        if RANK == 0:
            for line in self._alarms.look(values, step):
                self._progress.line("")
                warn(line)
            recent = self._episodes.recent
            self._progress.show(step, values["charts/SPS"], sum(recent) / len(recent) if recent else None)

    def log_episodes(self, infos: dict[str, Any], step: int) -> None:
        """Logs the episodes that ended in this step; call it after every `envs.step`.

        metrics.jsonl gets a line for each, under torchrun at the next `log`. TensorBoard and W&B get their mean at the
        next `log`, so that an environment whose episodes are short does not spend its time on dashboards.
        A run without a Checkpoint stops here when Ctrl-C or a signal asks it to; one that has one, when that saves.
        """
        self.step = step
        for episode in self._episodes.add(infos, step, self._time()):
            self._log_episode(episode)
        if not self.resumable:
            if WORLD_SIZE > 1:
                fail("torchrun needs common.Checkpoint in the script: by it all processes begin with the same weights")
            if self._signals.number:
                self.stop(step)

    def _log_episode(self, episode: Episode) -> None:
        r, length, step, seconds = episode
        self._episodes.recent.append(r)
        self._alarms.note(r)
        row = {"charts/episodic_return": r, "charts/episodic_length": float(length)}
        self.loggers.call("log", row, step, seconds, only=JsonLines)

    def _mean_over_processes(self, values: dict[str, float]) -> dict[str, float]:
        """The means of `values` over all processes; the first one logs the episodes of all."""
        means, episodes = self._episodes.mean_over_processes(values)
        for episode in episodes:
            self._log_episode(episode)
        return means

    def evaluation_due(self, step: int) -> bool:
        """Whether a multiple of eval_interval, or the end, has been reached since the last evaluation."""
        args, last = self.args, self.evaluated
        if args.eval_episodes == 0 or step <= last:
            return False
        passed = args.eval_interval > 0 and step // args.eval_interval > last // args.eval_interval
        return passed or step >= args.total_timesteps

    def log_evaluation(self, metrics: Mapping[str, float], step: int, video: Path | None) -> None:
        """Logs an evaluation; `metrics` are empty where it failed."""
        self._mean_over_processes({})
        if RANK > 0 or not metrics:
            return
        self.loggers.log(dict(metrics), self._episodes.take_means(), step, self._time())
        if video is not None:
            self.loggers.call("video", video, step)
        mean, std = metrics["eval/episodic_return"], metrics["eval/episodic_return_std"]
        shown = f"step {step:,}: greedy evaluation {mean:.1f} ± {std:.1f}"
        self._progress.line(shown + (f"  {video}" if video else ""))

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
        # Until the networks of a resumed run are restored, policy.pt is better than they are.
        if self._policy is not None and self.saved is None and RANK == 0:
            save_policy(self._policy, self.dir / "policy.pt")

    def stop(self, step: int) -> None:
        """Ends the process because a signal asked for it, with everything kept; 128 + its number."""
        number = self._signals.number
        resumable = self.checkpointed == step
        if resumable:
            self._episodes.ended.clear()  # the checkpoint has them, and the next row will
        self._mean_over_processes({})

        def end() -> None:
            self._close(exit_code=128 + number)
            how = f"continue with --resume {self.dir}" if resumable else f"what it learnt is in {self.dir}"
            fail(f"stopped by {signal.Signals(number).name} at step {step}; {how}", 128 + number)

        processes.on_rank_zero(end)

    def must_stop(self, now: bool = False) -> bool:
        """Whether a signal asked to stop; all processes call it at the same steps."""
        return self._signals.agreed(now)

    @property
    def stop_requested(self) -> bool:
        return bool(self._signals.number)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs so that its rows follow on; everything logged so far is on the disk afterwards."""
        return {
            "step": self.step,
            "evaluated": self.evaluated,
            "loggers": self.loggers.state_dict(self.step),
            "noted": self._noted,
            "episodes": self._episodes.ended,
            "recent": list(self._episodes.recent),
            "alarms": self._alarms.state_dict(),
            "seconds": self._time(),
            "clock": self._clock.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.evaluated, self._noted = state["step"], state["evaluated"], state["noted"]
        self._progress.first_step = self.step
        self.loggers.load_state_dict(state["loggers"], self.step)
        self._episodes.ended = state["episodes"]
        self._episodes.recent.extend(state["recent"])
        self._alarms.load_state_dict(state["alarms"])
        self.started = time.monotonic() - state["seconds"]
        self._clock.load_state_dict(state["clock"])

    def leave_out(self, seconds: float) -> None:
        """charts/SPS is that of training: `seconds` of something else do not count."""
        self._clock.leave_out(seconds)

    def finish(self) -> None:
        """Writes the final policy, closes the loggers and prints where the run is."""
        self._mean_over_processes({})
        seconds = self._time()
        self._close(exit_code=0)
        if RANK > 0:
            return
        with beside_training("writing finished.json"):
            run_dir.write_json(self.dir / "finished.json", {"global_step": self.step, "time": seconds})
        self._progress.line(f"done in {seconds:.1f} s: {self.dir}")
        if self.loggers.wandb is not None:
            say(self.loggers.wandb.where())

    def _close(self, exit_code: int) -> None:
        if self._finished:
            return
        self._finished = True
        atexit.unregister(self._close)
        self._signals.restore_handlers()
        unsaved = ""
        try:
            self._save_policy()
        except (OSError, RuntimeError) as error:
            unsaved = f"cannot write {self.dir / 'policy.pt'}: {error}"
            exit_code = exit_code or 6
        if self._episodes.ended:
            self.loggers.log({}, self._episodes.take_means(), self.step, self._time())
        self.loggers.call("close", exit_code)
        if self._lock is not None:
            self._lock.close()
        if unsaved and exit_code == 6:
            fail(unsaved, code=6)
        elif unsaved:  # another error ends the run
            warn(unsaved)

    def _time(self) -> float:
        return time.monotonic() - self.started
