"""Environment steps a second of our scripts beside Stable-Baselines3, in turn, on the same core.

    python runs/speed.py dqn --peer-python PEER_VENV/bin/python --core 0 --repeats 5
    python runs/speed.py ppo --peer-python PEER_VENV/bin/python --core 0 --repeats 5
    python runs/speed.py sac --peer-python PEER_VENV/bin/python --core 0 --repeats 5
    python runs/speed.py ppo-mujoco --peer-python PEER_VENV/bin/python --core 0 --repeats 5

Each round runs ours as it is (eager), ours with --compile (compiled), and the peer. The ratios are to the peer's run of
the same round, in wall-clock time and in the processor time of the training process: the second tells less of what
else the machine does.

CleanRL's hyperparameters; ours with its default tracking, Stable-Baselines3 with its default logging.
dqn, CartPole-v1: 120-84 network, batch 128, an update every 10 steps. ppo, CartPole-v1: 4 environments x 128 steps,
4 epochs x 4 minibatches, two 64-64 networks. sac, HalfCheetah-v4: three 256-256 networks, batch 256, an update of each
every step. ppo-mujoco, HalfCheetah-v4: 1 environment x 2048 steps, 10 epochs x 32 minibatches, two 64-64 networks,
observations and rewards normalised. Steady state: between two steps with updates running. The peer's interpreter needs
stable-baselines3 (and gymnasium[mujoco]); it may be the same one.
"""

import argparse
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WINDOW = {"dqn": (12_000, 40_000), "ppo": (20_480, 81_920), "sac": (5_200, 7_200), "ppo-mujoco": (4_096, 12_288)}
ENV_ID = {"dqn": "CartPole-v1", "ppo": "CartPole-v1", "sac": "HalfCheetah-v4", "ppo-mujoco": "HalfCheetah-v4"}
OURS = {
    "dqn": {
        "learning-starts": 10_000,
        "buffer-size": 10_000,
        "learning-rate": 2.5e-4,
        "batch-size": 128,
        "train-frequency": 10,
        "target-network-frequency": 500,
        "end-e": 0.05,
        "exploration-fraction": 0.5,
        "log-interval": 1000,
        "hidden-sizes": "120 84",
        "no-anneal-lr": "",
    },
    "ppo": {
        "num-envs": 4,
        "num-steps": 128,
        "learning-rate": 2.5e-4,
        "gamma": 0.99,
        "gae-lambda": 0.95,
        "num-minibatches": 4,
        "update-epochs": 4,
        "ent-coef": 0.01,
        "log-interval": 512,
        "clip-vloss": "",
        "no-anneal-lr": "",
    },
    "sac": {"learning-starts": 5_000, "policy-lr": 3e-4, "q-lr": 1e-3, "log-interval": 100},
    "ppo-mujoco": {
        "num-envs": 1,
        "num-steps": 2048,
        "learning-rate": 3e-4,
        "gamma": 0.99,
        "gae-lambda": 0.95,
        "num-minibatches": 32,
        "update-epochs": 10,
        "log-interval": 2048,
        "clip-vloss": "",
        "norm-obs": "",
        "norm-reward": "",
    },
}


def clock(step: int) -> None:
    print(f"CLOCK {step} {time.perf_counter()} {time.process_time()}", flush=True)


def ours(work: str, compiled: bool) -> None:
    """Runs the script in this process and prints the time at each row it logs."""
    from common.run import Run

    log = Run.log

    def log_and_clock(run: Run, metrics: Any, step: int) -> None:
        log(run, metrics, step)
        clock(step)

    Run.log = log_and_clock  # type: ignore[method-assign]
    script = str(ROOT / "algos" / f"{work.partition('-')[0]}.py")
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [script, "--env-id", ENV_ID[work], "--runs-dir", folder, "--eval-episodes", "0", "--no-cuda"]
        sys.argv += ["--total-timesteps", str(WINDOW[work][1]), "--compile" if compiled else "--no-compile"]
        sys.argv += [word for flag, value in OURS[work].items() for word in (f"--{flag}", *str(value).split())]
        runpy.run_path(script, run_name="__main__")


def peer(work: str) -> None:
    import torch
    from stable_baselines3 import DQN, PPO, SAC
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)
    on_policy = work.startswith("ppo")
    last = WINDOW[work][1]

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            if not on_policy and self.num_timesteps in WINDOW[work]:
                clock(self.num_timesteps)
            return True

        def _on_rollout_start(self) -> None:  # the update of the rollout before is done
            if on_policy and self.num_timesteps in WINDOW[work]:
                clock(self.num_timesteps)

    model: DQN | PPO | SAC
    if work == "dqn":
        model = DQN(
            "MlpPolicy",
            ENV_ID[work],
            learning_rate=2.5e-4,
            buffer_size=10_000,
            learning_starts=10_000,
            batch_size=128,
            train_freq=10,
            gradient_steps=1,
            target_update_interval=500,
            exploration_fraction=0.5,
            exploration_final_eps=0.05,
            policy_kwargs={"net_arch": [120, 84]},
            seed=1,
            device="cpu",
        )
    elif work == "sac":
        model = SAC("MlpPolicy", ENV_ID[work], learning_starts=5_000, seed=1, device="cpu")
    elif work == "ppo-mujoco":
        envs = VecNormalize(make_vec_env(ENV_ID[work], n_envs=1))
        model = PPO("MlpPolicy", envs, clip_range_vf=0.2, seed=1, device="cpu")
    else:
        model = PPO(
            "MlpPolicy",
            make_vec_env(ENV_ID[work], n_envs=4),
            learning_rate=2.5e-4,
            n_steps=128,
            batch_size=128,
            n_epochs=4,
            gamma=0.99,
            gae_lambda=0.95,
            clip_range=0.2,
            clip_range_vf=0.2,
            ent_coef=0.01,
            seed=1,
            device="cpu",
        )
    model.learn(last + on_policy, callback=Clock())  # one rollout more: its start is the end of the window


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=sorted(OURS))
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with stable-baselines3")
    parser.add_argument("--core", type=int, default=0, help="the processor core everything is pinned to")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, in turn")
    parser.add_argument("--part", choices=("eager", "compiled", "peer"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return peer(args.work) if args.part == "peer" else ours(args.work, args.part == "compiled")
    os.sched_setaffinity(0, {args.core})
    first, last = WINDOW[args.work]
    wall: dict[str, list[float]] = {"eager": [], "compiled": [], "peer": []}
    busy: dict[str, list[float]] = {part: [] for part in wall}
    for _ in range(args.repeats):
        for part in wall:
            python = args.peer_python if part == "peer" else sys.executable
            command = [python, __file__, args.work, "--part", part]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("CLOCK")]
            times = {int(step): (float(seconds), float(cpu)) for step, seconds, cpu in rows}
            for speeds, start, end in zip((wall, busy), times[first], times[last], strict=True):
                speeds[part].append((last - first) / (end - start))
        print({part: (round(wall[part][-1]), round(busy[part][-1])) for part in wall}, flush=True)
    for what, speeds in (("second", wall), ("second of processor time", busy)):
        for part, values in speeds.items():
            ratios = [mine / other for mine, other in zip(values, speeds["peer"], strict=True)]
            print(
                f"{part:<9} {statistics.median(values):8,.0f} steps a {what} ({min(values):,.0f} to {max(values):,.0f})"
                f"  x{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )
    return None


if __name__ == "__main__":
    main()
