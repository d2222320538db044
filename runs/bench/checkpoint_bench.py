"""What checkpoints cost at the default interval: the time of one, against that of the training steps between two.

    python runs/bench/checkpoint_bench.py --core 1

Each script trains for a while at its defaults. Before every checkpoint the replay gets as many more transitions as the
default interval brings (zeros: nothing is learnt here), so that a checkpoint writes what it would write; sac's replay
of a million is full before the first. Needs the extra mujoco.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
MUJOCO_PPO = {"norm_obs": True, "norm_reward": True, "num_envs": 16, "num_steps": 128, "num_minibatches": 16}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("dqn CartPole-v1", "dqn", {"env_id": "CartPole-v1", "total_timesteps": 20_000, "save_interval": 4_000}),
    (
        "sac HalfCheetah-v4",
        "sac",
        {"env_id": "HalfCheetah-v4", "total_timesteps": 4_000, "save_interval": 1_000, "learning_starts": 500},
    ),
    (
        "ppo HalfCheetah-v4",
        "ppo",
        {"env_id": "HalfCheetah-v4", "total_timesteps": 40_960, "save_interval": 8_192, **MUJOCO_PPO},
    ),
]


def fill(replay: Any, steps: int) -> None:
    step = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in replay._like.items()}
    for _ in range(steps):
        replay.add(**step)


def measure(name: str, script: str, flags: dict[str, Any]) -> None:
    spec = importlib.util.spec_from_file_location(script, ROOT / "algos" / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[script] = module
    spec.loader.exec_module(module)
    seconds: list[float] = []
    sizes: list[int] = []
    aside = 0.0  # neither training nor checkpoint
    write = Checkpoint.write

    def timed(self: Checkpoint, step: int, snapshots: bool = True) -> bool:
        nonlocal aside
        began = time.perf_counter()
        replay = self.parts.get("replay")
        if replay is not None:
            if not seconds and script == "sac":
                fill(replay, replay.rows)
                write(self, step)
            fill(replay, 50_000 // replay.num_envs)
        aside += time.perf_counter() - began
        before = set(self.folder.glob("*"))
        began = time.perf_counter()
        written = write(self, step, snapshots)
        seconds.append(time.perf_counter() - began)
        aside += seconds[-1]
        sizes.append(sum(path.stat().st_size for path in set(self.folder.glob("*")) - before))
        return written

    Checkpoint.write = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as folder, contextlib.redirect_stdout(io.StringIO()):
        args = module.Args(**flags, track=False, cuda=False, eval_episodes=0, runs_dir=folder)
        began = time.perf_counter()
        module.main(args)
        training = time.perf_counter() - began - aside
    Checkpoint.write = write  # type: ignore[method-assign]
    sps = args.total_timesteps / training
    cost = statistics.median(seconds)
    share = cost / (cost + 50_000 / sps)
    print(f"| {name} | {1e3 * cost:.0f} ms | {sizes[-1] / 1e6:.1f} MB | {sps:,.0f} | {100 * share:.2f} % |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", type=int, default=0)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {parser.parse_args().core})
    print("| work | one checkpoint | on disk | steps/s | share at every 50,000 steps |\n|---|---|---|---|---|")
    for case in CASES:
        measure(*case)
