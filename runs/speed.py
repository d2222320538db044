"""Environment steps a second of our scripts beside Stable-Baselines3, in turn, on the same core.

    python runs/speed.py dqn --peer-python PEER_VENV/bin/python --core 0 --repeats 5
    python runs/speed.py ppo --peer-python PEER_VENV/bin/python --core 0 --repeats 5
    python runs/speed.py sac --peer-python PEER_VENV/bin/python --core 0 --repeats 5

CleanRL's hyperparameters; ours with its default tracking, Stable-Baselines3 with its default logging.
dqn, CartPole-v1: 120-84 network, batch 128, an update every 10 steps. ppo, CartPole-v1: 4 environments x 128 steps,
4 epochs x 4 minibatches, two 64-64 networks. sac, HalfCheetah-v4: three 256-256 networks, batch 256, an update of each
every step. Steady state: between two steps with updates running. The peer's interpreter needs stable-baselines3 (and
gymnasium[mujoco]); it may be the same one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WINDOW = {"dqn": (12_000, 40_000), "ppo": (20_480, 81_920), "sac": (5_200, 7_200)}
ENV_ID = {"dqn": "CartPole-v1", "ppo": "CartPole-v1", "sac": "HalfCheetah-v4"}
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
}


def ours(script: str) -> float:
    first, last = WINDOW[script]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / "algos" / f"{script}.py"),
            "--env-id",
            ENV_ID[script],
            "--runs-dir",
            folder,
        ]
        command += ["--eval-episodes", "0", "--total-timesteps", str(last)]
        command += [word for flag, value in OURS[script].items() for word in (f"--{flag}", *str(value).split())]
        subprocess.run(command, check=True, capture_output=True)
        (log,) = Path(folder).glob("*/metrics.jsonl")
        rows = [json.loads(line) for line in log.read_text().splitlines()]
    times = {row["global_step"]: row["time"] for row in rows if "charts/SPS" in row}
    return (last - first) / (times[last] - times[first])


def peer(script: str) -> None:
    import torch
    from stable_baselines3 import DQN, PPO, SAC
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    first, last = WINDOW[script]

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            if script != "ppo" and self.num_timesteps in (first, last):
                print(f"CLOCK {time.perf_counter()}")
            return True

        def _on_rollout_start(self) -> None:  # the update of the rollout before is done
            if script == "ppo" and self.num_timesteps in (first, last):
                print(f"CLOCK {time.perf_counter()}")

    model: DQN | PPO | SAC
    if script == "dqn":
        model = DQN(
            "MlpPolicy",
            ENV_ID[script],
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
    elif script == "sac":
        model = SAC("MlpPolicy", ENV_ID[script], learning_starts=5_000, seed=1, device="cpu")
    else:
        model = PPO(
            "MlpPolicy",
            make_vec_env(ENV_ID[script], n_envs=4),
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
    model.learn(last + (512 if script == "ppo" else 0), callback=Clock())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=sorted(OURS))
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with stable-baselines3")
    parser.add_argument("--core", type=int, default=0, help="the processor core everything is pinned to")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, in turn")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(args.script)
    os.sched_setaffinity(0, {args.core})
    first, last = WINDOW[args.script]
    speeds: dict[str, list[float]] = {"plainrl": [], "stable-baselines3": []}
    for _ in range(args.repeats):
        speeds["plainrl"].append(ours(args.script))
        done = subprocess.run(
            [args.peer_python, __file__, args.script, "--peer"], check=True, capture_output=True, text=True
        )
        start, end = (float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("CLOCK"))
        speeds["stable-baselines3"].append((last - first) / (end - start))
        print({name: round(values[-1]) for name, values in speeds.items()}, flush=True)
    for name, values in speeds.items():
        print(f"{name:<18} {statistics.median(values):8,.0f} steps/s  ({min(values):,.0f} to {max(values):,.0f})")
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    print(f"ratio, pair by pair: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return None


if __name__ == "__main__":
    main()
