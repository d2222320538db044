"""Stable-Baselines3's SAC with the flags that sac.sh gives ours, evaluated in the same way: a JSON line a seed.

    PEER_VENV/bin/python runs/reference/sac_sb3.py HalfCheetah-v4 --seeds 31 32 33 >> sac_sb3.jsonl

The interpreter needs stable-baselines3 and, for the evaluation, this repository on its path (it is put there).
Its SAC updates the policy with every critic update, as --policy-frequency 1 does; everything not named is its default.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import stable_baselines3
import torch
from stable_baselines3 import SAC

from common.evaluation import play

FLAGS: dict[str, dict[str, Any]] = {
    "Pendulum-v1": {"total_timesteps": 20_000, "learning_starts": 1_000, "learning_rate": 1e-3},
    "LunarLanderContinuous-v3": {
        "total_timesteps": 300_000,
        "learning_starts": 10_000,
        "learning_rate": lambda left: left * 7.3e-4,
        "tau": 0.01,
        "policy_kwargs": {"net_arch": [400, 300]},
    },
    "HalfCheetah-v4": {"total_timesteps": 100_000, "learning_starts": 5_000, "learning_rate": 3e-4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env_id", choices=sorted(FLAGS))
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--episodes", type=int, default=100, help="episodes of the greedy evaluation")
    parser.add_argument("--total-timesteps", type=int, help="another number of environment steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        flags = dict(FLAGS[options.env_id])
        steps = flags.pop("total_timesteps")
        steps = options.total_timesteps or steps
        model = SAC("MlpPolicy", options.env_id, seed=seed, device="cpu", **flags)
        began = time.perf_counter()
        model.learn(steps)
        seconds = time.perf_counter() - began

        def greedy(obs: torch.Tensor, model: SAC = model) -> torch.Tensor:
            return torch.from_numpy(model.predict(obs.numpy(), deterministic=True)[0])

        returns, lengths = play(greedy, options.env_id, options.episodes, seed)
        result = {
            "env_id": options.env_id,
            "seed": seed,
            "total_timesteps": steps,
            "eval_return": float(returns.mean()),
            "eval_std_over_episodes": float(returns.std()),
            "eval_length": float(lengths.mean()),
            "training_seconds": round(seconds, 1),
            "stable_baselines3": stable_baselines3.__version__,
            "torch": torch.__version__,
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
