"""Steps a second of ppo_recurrent.py beside sb3-contrib's RecurrentPPO, with the same numbers, on one core.

    python runs/bench/recurrent_speed.py --core 1 --rounds 3 --sb3-python VENV/bin/python   # pip install sb3-contrib

CartPole-v1 without velocities; 8 environments x 128 steps, 10 epochs of 4 minibatches, a memory of 64 units. Everybody
in a process of its own, in turn; the clock runs from step 4,096 to the last, without evaluation, with the logs of its
default. RecurrentPPO has LSTMs alone: by its default one for policy and one for value, and, as ours, one for both.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS, FIRST = 20_480, 4_096
OURS = [str(ROOT / "algos" / "ppo_recurrent.py"), "--env-id", "memory_envs:CartPoleNoVel-v1", "--allow-env-import"]
OURS += ["--num-envs", "8", "--num-steps", "128", "--update-epochs", "10", "--num-minibatches", "4"]
OURS += ["--total-timesteps", str(STEPS), "--eval-episodes", "0", "--no-cuda", "--no-track", "--log-interval", "2048"]
SB3 = f"""
import sys, time
import gymnasium as gym
import memory_envs
import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

torch.set_num_threads(1)


class Clock(BaseCallback):
    began = None

    def _on_step(self):
        if self.num_timesteps >= {FIRST} and self.began is None:
            self.began, self.first = time.perf_counter(), self.num_timesteps
        return True


envs = make_vec_env(lambda: gym.make("CartPoleNoVel-v1"), 8)
one = {{"shared_lstm": True, "enable_critic_lstm": False}} if sys.argv[1] == "one" else {{}}
policy = {{"lstm_hidden_size": 64, "net_arch": [], **one}}
model = RecurrentPPO("MlpLstmPolicy", envs, n_steps=128, batch_size=256, n_epochs=10, learning_rate=1e-3, gamma=0.99,
                     gae_lambda=0.95, policy_kwargs=policy, device="cpu")
clock = Clock()
model.learn({STEPS}, callback=clock)
print((model.num_timesteps - clock.first) / (time.perf_counter() - clock.began))
"""


def steps_a_second(words: list[str], core: int | None) -> float:
    pinned = [] if core is None else ["taskset", "-c", str(core)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "runs" / "reference"), os.environ.get("PYTHONPATH", "")])
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*pinned, *words], cwd=folder, env=environ, capture_output=True, text=True, check=True)
        if words[1] == "-c":
            return float(done.stdout.split()[-1])
        (metrics,) = Path(folder).glob("runs/*/metrics.jsonl")
        rows = [row for row in map(json.loads, metrics.open()) if "charts/SPS" in row]
        rows = [row for row in rows if row["global_step"] >= FIRST]
        return (rows[-1]["global_step"] - rows[0]["global_step"]) / (rows[-1]["time"] - rows[0]["time"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sb3-python", default=sys.executable)
    parser.add_argument("--core", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    works = {
        "RecurrentPPO, two LSTMs": [options.sb3_python, "-c", SB3, "two"],
        "RecurrentPPO, one LSTM": [options.sb3_python, "-c", SB3, "one"],
        "ppo_recurrent.py --no-lstm": [sys.executable, *OURS, "--no-lstm"],
        "ppo_recurrent.py": [sys.executable, *OURS],
        "ppo_recurrent.py --compile": [sys.executable, *OURS, "--compile"],
    }
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(options.rounds):
        for name, words in works.items():
            found[name].append(steps_a_second(words, options.core))
            print(f"{name}: {found[name][-1]:,.0f}", file=sys.stderr)
    for name, rates in found.items():
        ratios = [[a / b for a, b in zip(rates, found[peer], strict=True)] for peer in list(works)[:2]]
        said = ", ".join(f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios)
        print(f"{name:<36} {statistics.median(rates):>7,.0f} steps/s; of two LSTMs', of one LSTM's: {said}")


if __name__ == "__main__":
    main()
