"""A run: its seeds and device, its directory, and its logs."""

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
from common.internals.tracking.local_loggers import JsonLines
from common.internals.tracking.loggers import Loggers, as_floats
from common.internals.tracking.policy import save_policy


def setup(args: RunArgs, torchrun: bool = True) -> torch.device:
    """Seeds Python, NumPy and PyTorch, sets threads and kernels, and returns the device to train on.

    Under torchrun each process gets its own device and random numbers; with `torchrun=False` it is refused (code 2).
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
    """Creates the run directory `runs_dir/{env_id}__{script}__{seed}__{time}-{random}`, or reopens `args.resume`.

    Ends the process with code 6 if the directory cannot be written, and with code 3 if the run cannot be resumed.
    """
    script = Path(sys.modules[type(args).__module__].__file__ or "interactive.py").resolve()
    return Run(args, *run_dir.begin(args, device, script))


class Run:
    """The directory and the logs of a run. A logger that fails is turned off with one warning."""

    def __init__(self, args: RunArgs, path: Path, config: dict[str, Any], lock: Any = None, saved: Any = None) -> None:
        self.dir = path
        self.args = args
        self.saved = saved  # the checkpoint to resume from, until Checkpoint.restore has read it
        self.resumable = False  # whether the script makes a Checkpoint
        self.checkpointed = -1  # step of the last checkpoint on disk
        self.evaluated = 0  # step of the last evaluation
        self.best_return = -math.inf  # of all evaluations
        self.step = 0  # environment steps so far, as of the last log_episodes
        self.started = time.monotonic()
        if RANK == 0:
            count = f" x {WORLD_SIZE}" if WORLD_SIZE > 1 else ""
            start = f", from step {saved['step']:,}" if saved else ""
            say(f"{config['script']} on {args.env_id}, seed {args.seed}, {config['device']}{count}{start}: {path}")
        self.loggers = Loggers(path, args, config, saved)  # W&B may take 20 s, if its server does not answer
        self._lock = lock
        self._policy: Callable[..., Any] | None = None
        self._noted: dict[str, float | Tensor] = {}
        self._episodes = Episodes()
        self._clock = RowClock()
        self._progress = Progress(args.total_timesteps)
        self._alarms = Alarms(args.total_timesteps, args.num_envs)
        self.signals = StopSignals()
        self._finished = False
        atexit.register(self._close, exit_code=1)

    def note(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Keeps metrics for the next row, for example the losses of the last update."""
        self._noted |= metrics

    def log(self, metrics: Mapping[str, float | Tensor], step: int) -> None:
        """Logs one row: `metrics`, what was noted, charts/SPS, health/time_*, and the mean of the row's episodes.

        Reads tensors, which waits for the GPU. Under torchrun the first process logs the means over all processes.
        Ends the process with code 4 if a loss is not finite.
        """
        values = self._mean_over_processes(as_floats({**self._noted, **metrics}))
        self._noted = {}
        for key, value in values.items():
            if key.endswith("_loss") and not math.isfinite(value):
                self._policy = None  # keep the last policy.pt
                what = f"{key} is {value} at step {step}: lower the learning rate, or check the rewards"
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
        """Logs the episodes that ended in this step: call it after every `envs.step`.

        metrics.jsonl gets each episode (under torchrun at the next `log`), TensorBoard and W&B get means at the next
        `log`. After Ctrl-C or another stop signal a run without a Checkpoint ends here.
        """
        self.step = step
        for episode in self._episodes.add(infos, step, self._time()):
            self._log_episode(episode)
        if not self.resumable:
            if WORLD_SIZE > 1:
                fail("torchrun needs common.Checkpoint in the script: it gives all processes the same initial weights")
            if self.signals.number:
                self.stop(step)

    def _log_episode(self, episode: Episode) -> None:
        episodic_return, length, step, seconds = episode
        self._episodes.recent.append(episodic_return)
        self._alarms.note(episodic_return)
        row = {"charts/episodic_return": episodic_return, "charts/episodic_length": float(length)}
        self.loggers.call("log", row, step, seconds, only=JsonLines)

    def _mean_over_processes(self, values: dict[str, float]) -> dict[str, float]:
        """The means of `values` over all processes; the first process logs the episodes of all."""
        means, episodes = self._episodes.mean_over_processes(values)
        for episode in episodes:
            self._log_episode(episode)
        return means

    def evaluation_due(self, step: int) -> bool:
        """Whether `step` has passed a multiple of eval_interval, or the end, since the last evaluation."""
        args, last = self.args, self.evaluated
        if args.eval_episodes == 0 or step <= last:
            return False
        passed = args.eval_interval > 0 and step // args.eval_interval > last // args.eval_interval
        return passed or step >= args.total_timesteps

    def log_evaluation(self, metrics: Mapping[str, float], step: int, video: Path | None) -> None:
        """Logs an evaluation; `metrics` are empty if it failed."""
        self._mean_over_processes({})
        if RANK > 0 or not metrics:
            return
        self.loggers.log(dict(metrics), self._episodes.take_means(), step, self._time())
        if video is not None:
            self.loggers.call("video", video, step)
        mean, std = metrics["eval/episodic_return"], metrics["eval/episodic_return_std"]
        shown = f"step {step:,}: greedy evaluation {mean:.1f} ± {std:.1f}"
        self._progress.line(shown + (f"  {video}" if video else ""))

    def save_policy(self, policy: Callable[..., Any]) -> None:
        """Writes policy.pt now, at every evaluation and at the end; ends the process with code 6 if that fails now.

        Args:
            policy: as of `Evaluation`; the class of its network is in the script and takes `(envs, args)`: `python -m
                common evaluate` builds it from them.
        """
        self._policy = policy
        try:
            self._save_policy()
        except TypeError as error:
            self._policy = None
            fail(str(error))
        except (OSError, RuntimeError) as error:
            self._policy = None
            self._close(exit_code=6)
            fail(f"cannot write {self.dir / 'policy.pt'}: {error}", code=6)

    def write_policy(self, name: str = "policy.pt") -> None:
        """Writes the policy; a failure is a warning."""
        with beside_training(f"writing {name}"):
            self._save_policy(name)

    def _save_policy(self, name: str = "policy.pt") -> None:
        # Until the networks of a resumed run are restored, the file has the better policy.
        if self._policy is not None and self.saved is None and RANK == 0:
            save_policy(self._policy, self.dir / name, self.args.wrap)

    def stop(self, step: int) -> None:
        """Ends the process with code 128 + n after signal n; everything logged is kept."""
        number = self.signals.number
        resumable = self.checkpointed == step
        if resumable:
            self._episodes.ended.clear()  # the checkpoint has them for the resumed run's next row
        self._mean_over_processes({})

        def end() -> None:
            self._close(exit_code=128 + number)
            how = f"continue with --resume {self.dir}" if resumable else f"its policy and logs are in {self.dir}"
            fail(f"stopped by {signal.Signals(number).name} at step {step}; {how}", 128 + number)

        processes.on_rank_zero(end)

    def must_stop(self, now: bool = False) -> bool:
        """Whether a signal asked to stop; all processes must call it at the same steps."""
        return self.signals.agreed(now)

    def state_dict(self) -> dict[str, Any]:
        """The state of the logs. Flushes them to disk."""
        return {
            "step": self.step,
            "evaluated": self.evaluated,
            "best_return": self.best_return,
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
        self.best_return = state.get("best_return", -math.inf)
        self._progress.first_step = self.step
        self.loggers.load_state_dict(state["loggers"], self.step)
        self._episodes.ended = state["episodes"]
        self._episodes.recent.extend(state["recent"])
        self._alarms.load_state_dict(state["alarms"])
        self.started = time.monotonic() - state["seconds"]
        self._clock.load_state_dict(state["clock"])

    def leave_out(self, seconds: float) -> None:
        """Excludes `seconds` that were not training from charts/SPS."""
        self._clock.leave_out(seconds)

    def finish(self) -> None:
        """Writes the final policy, closes the loggers and prints the run directory."""
        self._mean_over_processes({})
        seconds = self._time()
        self._close(exit_code=0)
        if RANK > 0:
            return
        with beside_training("writing finished.json"):
            run_dir.write_json(self.dir / "finished.json", {"global_step": self.step, "time": seconds})
        self._progress.line(f"done in {seconds:.1f} s: {self.dir}")
        if self.loggers.wandb is not None:
            say(self.loggers.wandb.where(look=True))

    def _close(self, exit_code: int) -> None:
        if self._finished:
            return
        self._finished = True
        atexit.unregister(self._close)
        self.signals.restore_handlers()
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
        elif unsaved:  # another error ends the process
            warn(unsaved)

    def _time(self) -> float:
        return time.monotonic() - self.started
