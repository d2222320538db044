"""Environment steps a second of algos/dqn.py beside Stable-Baselines3's DQN, in turn, on the same core.

    python runs/speed_dqn.py --peer-python PEER_VENV/bin/python --core 0 --repeats 5

CartPole-v1 with CleanRL's hyperparameters (120-84 network, batch 128, an update every 10 steps); ours with its
default tracking, Stable-Baselines3 with its default logging. Steady state: from step 12,000 to 40,000, updates
running. The peer's interpreter needs stable-baselines3; it may be the same one.
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

FIRST, LAST = 12_000, 40_000
ROOT = Path(__file__).resolve().parent.parent
OURS = {
    "env-id": "CartPole-v1",
    "learning-starts": 10_000,
    "buffer-size": 10_000,
    "learning-rate": 2.5e-4,
    "batch-size": 128,
    "train-frequency": 10,
    "target-network-frequency": 500,
    "end-e": 0.05,
    "exploration-fraction": 0.5,
    "log-interval": 1000,
    "eval-episodes": 0,
    "total-timesteps": LAST,
}


def ours() -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "algos" / "dqn.py"), "--no-anneal-lr", "--runs-dir", folder]
        command += [word for flag, value in OURS.items() for word in (f"--{flag}", str(value))]
        subprocess.run([*command, "--hidden-sizes", "120", "84"], check=True, capture_output=True)
        (log,) = Path(folder).glob("*/metrics.jsonl")
        rows = [json.loads(line) for line in log.read_text().splitlines()]
    times = {row["global_step"]: row["time"] for row in rows if "charts/SPS" in row}
    return (LAST - FIRST) / (times[LAST] - times[FIRST])


def peer() -> None:
    import torch
    from stable_baselines3 import DQN
    from stable_baselines3.common.callbacks import BaseCallback

    torch.set_num_threads(1)

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps in (FIRST, LAST):
                print(f"CLOCK {time.perf_counter()}")
            return True

    DQN(
        "MlpPolicy",
        "CartPole-v1",
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
    ).learn(LAST, callback=Clock())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with stable-baselines3")
    parser.add_argument("--core", type=int, default=0, help="the processor core everything is pinned to")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, in turn")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer()
    os.sched_setaffinity(0, {args.core})
    speeds: dict[str, list[float]] = {"plainrl": [], "stable-baselines3": []}
    for _ in range(args.repeats):
        speeds["plainrl"].append(ours())
        done = subprocess.run(
            [args.peer_python, __file__, "--peer"], check=True, capture_output=True, text=True, env={**os.environ}
        )
        start, end = (float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("CLOCK"))
        speeds["stable-baselines3"].append((LAST - FIRST) / (end - start))
        print({name: round(values[-1]) for name, values in speeds.items()}, flush=True)
    for name, values in speeds.items():
        print(f"{name:<18} {statistics.median(values):8,.0f} steps/s  ({min(values):,.0f} to {max(values):,.0f})")
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    print(f"ratio, pair by pair: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return None


if __name__ == "__main__":
    main()
