"""What speed.py measures, one piece of work a process: `PYTHON runs/bench/speed_parts.py JOB PART WORK [...]`.

Runs in the interpreter of the part it measures, so it imports nothing but the standard library until it is known which
that is. Ours and CleanRL's scripts run as they are, by runpy; what is timed is wrapped from outside. A clock row on
stdout is `CLOCK step seconds processor_seconds`, the processor's time that of this process and of those it started.
"""

import argparse
import json
import os
import platform
import resource
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "gymnasium", "numpy", "mujoco", "stable-baselines3", "sbx-rl", "jax", "wandb", "tensorboard")
SOLVED, SOLVED_EPISODES, SOLVED_INTERVAL = 475.0, 20, 5_000
WARM_UP = 1.0  # seconds of processor time


@dataclass
class Work:
    """One piece of work for everybody: CleanRL's flags, which ours have too, and what each says in its own way."""

    script: str
    cleanrl: str
    env_id: str
    window: tuple[int, int]  # environment steps between which speed is measured, updates running
    flags: dict[str, float | bool]
    ours: tuple[str, ...] = ()
    hidden_sizes: tuple[int, ...] = (64, 64)
    normalise: bool = False
    bf16: bool = False  # whether our script has --bf16


DQN: dict[str, float | bool] = {
    "learning-starts": 10_000,
    "buffer-size": 10_000,
    "learning-rate": 2.5e-4,
    "batch-size": 128,
    "gamma": 0.99,
    "tau": 1.0,
    "train-frequency": 10,
    "target-network-frequency": 500,
    "start-e": 1.0,
    "end-e": 0.05,
    "exploration-fraction": 0.5,
}
PPO: dict[str, float | bool] = {
    "num-envs": 4,
    "num-steps": 128,
    "learning-rate": 2.5e-4,
    "anneal-lr": False,
    "gamma": 0.99,
    "gae-lambda": 0.95,
    "num-minibatches": 4,
    "update-epochs": 4,
    "clip-coef": 0.2,
    "clip-vloss": True,
    "ent-coef": 0.01,
    "vf-coef": 0.5,
    "max-grad-norm": 0.5,
}
MUJOCO = PPO | {
    "num-envs": 1,
    "num-steps": 2048,
    "learning-rate": 3e-4,
    "num-minibatches": 32,
    "update-epochs": 10,
    "ent-coef": 0.0,
}
SAC: dict[str, float | bool] = {
    "learning-starts": 1_000,
    "buffer-size": 1_000_000,
    "policy-lr": 3e-4,
    "q-lr": 1e-3,
    "batch-size": 256,
    "gamma": 0.99,
    "tau": 0.005,
    "policy-frequency": 2,
    "target-network-frequency": 1,
}
WORKS = {
    "dqn": Work("dqn", "dqn", "CartPole-v1", (12_000, 32_000), DQN, ("--no-anneal-lr", "--no-double"), (120, 84)),
    "ppo": Work("ppo", "ppo", "CartPole-v1", (10_240, 40_960), PPO),
    "ppo-64": Work(
        "ppo", "ppo", "CartPole-v1", (20_480, 61_440), PPO | {"num-envs": 64, "num-steps": 32}, ("--native-envs",)
    ),
    "ppo-mujoco": Work(
        "ppo", "ppo_continuous_action", "HalfCheetah-v4", (4_096, 12_288), MUJOCO, ("--norm-obs", "--norm-reward"),
        normalise=True,
    ),
    # medium is float32 by oneDNN where the processor has no AMX, as here, and bfloat16 where it has
    "sac": Work(
        "sac", "sac_continuous_action", "HalfCheetah-v4", (1_500, 2_000), SAC, ("--matmul-precision", "medium"),
        (256, 256), bf16=True,
    ),
}  # fmt: skip
OURS = {"eager": ["--no-compile"], "compiled": ["--compile"], "bf16": ["--compile", "--bf16"]}
PEERS = ("sb3", "sbx", "cleanrl")


def flags(work: Work, total: int) -> list[str]:
    """The command line of ours and of CleanRL's script."""
    words = ["--env-id", work.env_id, "--total-timesteps", str(total)]
    for name, value in work.flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


def sb3_arguments(work: Work) -> tuple[dict[str, Any], int]:
    """The same flags as arguments of Stable-Baselines3's and SBX's classes, and the number of environments.

    Raises:
        KeyError: a flag is not known here, so that none can be forgotten.
    """
    names = {
        "learning-starts": "learning_starts",
        "buffer-size": "buffer_size",
        "learning-rate": "learning_rate",
        "policy-lr": "learning_rate",
        "batch-size": "batch_size",
        "gamma": "gamma",
        "tau": "tau",
        "train-frequency": "train_freq",
        "target-network-frequency": "target_update_interval",
        "start-e": "exploration_initial_eps",
        "end-e": "exploration_final_eps",
        "exploration-fraction": "exploration_fraction",
        "num-steps": "n_steps",
        "gae-lambda": "gae_lambda",
        "update-epochs": "n_epochs",
        "clip-coef": "clip_range",
        "ent-coef": "ent_coef",
        "vf-coef": "vf_coef",
        "max-grad-norm": "max_grad_norm",
    }
    # One policy update a critic update is what CleanRL's two in a row every two come to; one step size for all networks
    # changes no amount of work; step sizes are constant unless a schedule is given.
    left_out = {"num-envs", "num-minibatches", "clip-vloss", "anneal-lr", "policy-frequency", "q-lr"}
    words = {names[flag]: value for flag, value in work.flags.items() if flag not in left_out}
    num_envs = int(work.flags.get("num-envs", 1))
    if work.script == "ppo":
        words["batch_size"] = int(num_envs * work.flags["num-steps"] / work.flags["num-minibatches"])
        words["clip_range_vf"] = work.flags["clip-coef"] if work.flags["clip-vloss"] else None
    return words | {"policy_kwargs": {"net_arch": list(work.hidden_sizes)}}, num_envs


def processor_time() -> float:
    """Seconds of processor time of this process and of all that it started (W&B runs in one of its own); Linux."""
    ticks, waiting = 0.0, [os.getpid()]
    while waiting:
        try:
            for children in Path(f"/proc/{waiting[-1]}/task").glob("*/children"):
                waiting[:0] = map(int, children.read_text().split())
            if waiting[-1] != os.getpid():
                stat = Path(f"/proc/{waiting[-1]}/stat").read_text().rpartition(")")[2].split()
                ticks += int(stat[11]) + int(stat[12])
        except OSError:
            pass  # it has ended since
        waiting.pop()
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def clock(step: int) -> None:
    print(f"CLOCK {step} {time.perf_counter()} {processor_time()}", flush=True)


def evaluated(step: int, mean_return: float) -> None:
    """A row of the work `solved`; ends the process once the task is solved. The clock is the same in all processes."""
    print(f"EVAL {step} {time.monotonic()} {processor_time()} {mean_return}", flush=True)
    if mean_return >= SOLVED:
        sys.stdout.flush()
        os._exit(0)


def ours_flags(work: Work, part: str, folder: str) -> list[str]:
    words = [*flags(work, work.window[1]), *work.ours, "--hidden-sizes", *map(str, work.hidden_sizes)]
    words += ["--runs-dir", folder, "--eval-episodes", "0", "--no-cuda"]
    return [*words, *OURS[part]]


def run_ours(script: str, words: list[str]) -> None:
    path = str(ROOT / "algos" / f"{script}.py")
    sys.argv = [path, *words]
    runpy.run_path(path, run_name="__main__")


def on_log(then: Callable[[int], None]) -> None:
    """Calls `then(step)` after each row that one of our scripts logs."""
    from common.run import Run

    log = Run.log

    def log_and_then(run: Run, metrics: Any, step: int) -> None:
        log(run, metrics, step)
        then(step)

    Run.log = log_and_then  # type: ignore[method-assign]


def sb3_model(library: str, work: Work, seed: int = 1, defaults: bool = False) -> Any:
    """A model of Stable-Baselines3 (`sb3`) or SBX (`sbx`); with `defaults`, with the library's hyperparameters."""
    if library == "sb3":
        import stable_baselines3 as algorithms
        import torch

        torch.set_num_threads(1)
    else:
        import sbx as algorithms
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    words, num_envs = ({}, 1) if defaults else sb3_arguments(work)
    if library == "sb3":
        words["device"] = "cpu"
    else:  # SBX clips no values, and its SAC's targets follow at every update, as they do here
        words.pop({"ppo": "clip_range_vf", "sac": "target_update_interval"}.get(work.script, ""), None)
    envs = make_vec_env(work.env_id, n_envs=num_envs, seed=seed)
    if work.normalise:
        envs = VecNormalize(envs)
    return getattr(algorithms, work.script.upper())("MlpPolicy", envs, seed=seed, **words)


def learn(model: Any, total: int, then: Callable[[int], None], on_policy: bool) -> None:
    """Trains a model of Stable-Baselines3's or SBX's; `then(step)` where the updates of `step` steps are done."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Then(BaseCallback):
        def _on_step(self) -> bool:
            if not on_policy:
                then(self.num_timesteps)
            return True

        def _on_rollout_start(self) -> None:
            if on_policy:
                then(self.num_timesteps)

    model.learn(total + on_policy, callback=Then())  # one rollout more: its start is the end of the last one's updates


def run_cleanrl(checkout: str, script: str, words: list[str], then: Callable[[int, dict[str, Any]], None]) -> None:
    """Runs a script of CleanRL's; `then(step, its global names)` at each of its rows with charts/SPS."""
    from torch.utils import tensorboard

    class Writer(tensorboard.SummaryWriter):
        def add_scalar(self, tag: str, value: Any, step: Any = None, *more: Any, **named: Any) -> None:
            super().add_scalar(tag, value, step, *more, **named)
            if tag == "charts/SPS":
                then(int(step), sys._getframe(1).f_globals)

    tensorboard.SummaryWriter = Writer  # type: ignore[misc]
    sys.path.insert(0, checkout)  # for its cleanrl_utils
    path = str(Path(checkout) / "cleanrl" / f"{script}.py")
    sys.argv = [path, *words, "--no-cuda"]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # it writes to runs/ where it is started
        runpy.run_path(path, run_name="__main__")


def steps(part: str, work: Work, checkout: str) -> None:
    """Clock rows of one training run."""
    last = work.window[1]
    if part in OURS:
        on_log(clock)
        with tempfile.TemporaryDirectory() as folder:
            run_ours(work.script, ours_flags(work, part, folder))
    elif part == "cleanrl":
        run_cleanrl(checkout, work.cleanrl, flags(work, last + 1), lambda step, names: clock(step))
    else:
        on_policy = work.script == "ppo"
        learn(sb3_model(part, work), last, lambda step: step in work.window and clock(step), on_policy)


def phase_of(frames: list[tuple[str, str]], script: str) -> str:
    """The part of a training step that a stack belongs to.

    Args:
        frames: (file, qualified name) from the outermost frame to the innermost.
        script: the file of the script.
    """
    if (script, "main") not in frames:
        return "other"
    for path, name in frames[frames.index((script, "main")) + 1 :]:
        file, function = Path(path).name, name.rpartition(".")[2]
        if path == script:
            return {"act": "acting", "sample": "acting", "linear_schedule": "loop"}.get(function, "update")
        if Path(path).parent == ROOT / "common":
            if file == "health.py" or function in ("spread", "mean_age"):
                return "logging"
            if file in ("replay.py", "rollout.py", "priorities.py", "frames.py"):
                return "sampling" if function in ("sample", "minibatches", "sequences") else "storing"
            phases = {
                "envs.py": "environment",
                "run.py": "logging",
                "compilation.py": "update",
                "normalize.py": "update",
            }
            return phases.get(file, "loop")
    return "loop"


class Profile:
    """Processor time of the main thread by phase: the stack is read about every millisecond, from outside.

    What a script calls stays as it is, closures included. The time since the last look goes to the phase that is
    found; a call into C is looked at when it returns, and so is charged its whole time.
    """

    def __init__(self, script: str) -> None:
        self.script = script
        self.seconds: dict[str, float] = {}
        self.last = 0.0

    def start(self) -> None:
        self.last = time.thread_time()
        signal.signal(signal.SIGALRM, self.look)
        signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def look(self, number: int, frame: Any) -> None:
        frames = []
        while frame is not None:
            frames.append((frame.f_code.co_filename, frame.f_code.co_qualname))
            frame = frame.f_back
        phase = phase_of(frames[::-1], self.script)
        now = time.thread_time()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


def phases(part: str, work: Work) -> None:
    """The processor time of one training run of ours by phase, from the first row of the window on."""
    profile, began = Profile(str(ROOT / "algos" / f"{work.script}.py")), [0]

    def look(step: int) -> None:
        if began[0]:
            print("PHASES " + json.dumps({"steps": step - began[0], "seconds": profile.seconds}), flush=True)
        elif step >= work.window[0]:
            began[0] = step
            profile.start()

    on_log(look)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_ours(work.script, ours_flags(work, part, folder))
        finally:
            profile.stop()


def greedy_return(policy: Callable[[Any], Any]) -> float:
    """Mean return of SOLVED_EPISODES greedy episodes of CartPole-v1; `policy` is observations to actions, NumPy."""
    import gymnasium as gym
    import numpy as np

    envs = [gym.make("CartPole-v1") for _ in range(SOLVED_EPISODES)]
    obs = [env.reset(seed=10_000 + i)[0] for i, env in enumerate(envs)]
    running, total = list(range(SOLVED_EPISODES)), 0.0
    while running:
        actions = policy(np.stack(obs, dtype=np.float32))
        for i in list(running):
            obs[i], reward, terminated, truncated, _ = envs[i].step(int(actions[i]))
            total += float(reward)
            if terminated or truncated:
                running.remove(i)
    return total / SOLVED_EPISODES


def solved(part: str, seed: int, checkout: str) -> None:
    """Rows of evaluations of PPO with a library's own hyperparameters, until CartPole-v1 is solved."""
    due = SOLVED_INTERVAL

    def evaluate(step: int, policy: Callable[[Any], Any]) -> None:
        nonlocal due
        if step >= due:
            due = (step // SOLVED_INTERVAL + 1) * SOLVED_INTERVAL
            evaluated(step, greedy_return(policy))

    if part in OURS:
        from common.run import Run

        log_evaluation = Run.log_evaluation

        def log_and_end(run: Run, metrics: Any, step: int, *more: Any) -> None:
            log_evaluation(run, metrics, step, *more)
            evaluated(step, metrics["eval/episodic_return"])

        Run.log_evaluation = log_and_end  # type: ignore[method-assign]
        words = ["--env-id", "CartPole-v1", "--seed", str(seed), "--no-capture-video"]
        words += ["--eval-interval", str(SOLVED_INTERVAL), "--eval-episodes", str(SOLVED_EPISODES)]
        with tempfile.TemporaryDirectory() as folder:
            run_ours("ppo", [*words, "--runs-dir", folder, *OURS[part]])
    elif part == "cleanrl":
        import torch

        def look(step: int, names: dict[str, Any]) -> None:
            with torch.no_grad():
                evaluate(step, lambda obs: names["agent"].actor(torch.from_numpy(obs)).argmax(dim=1).numpy())

        run_cleanrl(checkout, "ppo", ["--env-id", "CartPole-v1", "--seed", str(seed)], look)
    else:
        model = sb3_model(part, Work("ppo", "", "CartPole-v1", (0, 0), {}), seed, defaults=True)
        policy: Callable[[Any], Any] = lambda obs: model.predict(obs, deterministic=True)[0]  # noqa: E731
        learn(model, 500_000, lambda step: evaluate(step, policy), on_policy=True)


def fill_replay() -> None:
    """Lets the next `add` of a ReplayBuffer fill it with copies of its transitions."""
    from common.replay import ReplayBuffer

    add = ReplayBuffer.add

    def add_many(replay: ReplayBuffer, **step: Any) -> None:
        ReplayBuffer.add = add  # type: ignore[method-assign]
        while len(replay) < replay.rows * replay.num_envs:
            replay.add(**step)

    ReplayBuffer.add = add_many  # type: ignore[method-assign]


def cost(script: str, env_id: str, seconds: float, fill: bool, words: list[str]) -> None:
    """Clock rows of one of our scripts for `seconds` of processor time after WARM_UP of it, then the peak memory.

    Args:
        fill: the replay is full from the start, of copies of the first transition, as after a long run.
    """
    began, rows = 0.0, 0  # rows after the warm-up

    def look(step: int) -> None:
        nonlocal began, rows
        clock(step)
        now = time.process_time()
        began = began or now
        rows += now > began + WARM_UP
        if rows > 2 and now > began + WARM_UP + seconds:
            print(f"MEMORY {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}", flush=True)
            os._exit(0)

    on_log(look)
    if fill:
        fill_replay()
    with tempfile.TemporaryDirectory() as folder:
        run_ours(script, ["--env-id", env_id, "--runs-dir", folder, "--eval-episodes", "0", "--no-cuda", *words])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=("steps", "phases", "solved", "cost"))
    parser.add_argument("part")
    parser.add_argument("work", help="a work, a seed (solved), or a script (cost)")
    parser.add_argument("--cleanrl", default="")
    parser.add_argument("--env-id", default="CartPole-v1")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--fill", action="store_true")
    args, words = parser.parse_known_args()
    installed = {name: version for name in PACKAGES if (version := version_of(name))}
    print("VERSIONS " + json.dumps({"python": platform.python_version(), **installed}), flush=True)
    if args.job == "steps":
        steps(args.part, WORKS[args.work], args.cleanrl)
    elif args.job == "phases":
        phases(args.part, WORKS[args.work])
    elif args.job == "solved":
        solved(args.part, int(args.work), args.cleanrl)
    else:
        cost(args.work, args.env_id, args.seconds, args.fill, [*words, *OURS[args.part]])


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
