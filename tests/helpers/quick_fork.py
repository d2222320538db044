"""A fork whose runs take a moment: everything the tools read of a run, and no learning. Used by their tests.

The score is known: -(log10(learning_rate) + 3)² - 10 (gamma - 0.9)² + seed / 1000, best at 1e-3 and 0.9. Every step is
a checkpoint. Each process leaves a line in `starts`, with its step, its process id and its cores.
"""

import dataclasses
import fcntl
import json
import math
import os
import re
import secrets
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common


@dataclass
class Args(common.RunArgs):
    total_timesteps: int = 10
    """steps"""
    learning_rate: float = 1e-2
    """part of the score; above 0.5 a loss is not finite"""
    gamma: float = 0.99
    """part of the score"""
    num_steps: int = 8
    """of no use"""
    norm_adv: bool = True
    """of no use"""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """of no use"""
    target_kl: float | None = None
    """of no use"""
    offset: float = 0.0
    """of no use, and may be negative"""
    kind: Literal["plain", "fails", "crashes_once", "refuses"] = "plain"
    """what becomes of the run"""
    pause: float = 0.0
    """seconds that a step takes, while the current folder has no file `hurry`"""


def score(args):
    return -((math.log10(args.learning_rate) + 3) ** 2) - 10 * (args.gamma - 0.9) ** 2 + args.seed / 1000


def main(args):
    stopped = []

    def on_signal(number, frame):
        stopped.append(number)
        for known in numbers:  # a second one ends it at once, as it does a run
            signal.signal(known, signal.SIG_DFL)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    for number in numbers:
        signal.signal(number, on_signal)
    if args.kind == "refuses":
        common.fail("these do not fit together")
    if args.env_id == "Broken-v0":
        common.fail("there is no environment Broken-v0", 5)
    if args.resume:
        run_dir = Path(args.resume)
        if (run_dir / "finished.json").exists():
            return
    else:
        name = f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{time.time():.0f}-{secrets.token_hex(3)}"
        run_dir = Path(args.runs_dir) / re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
        (run_dir / "source").mkdir(parents=True)
        (run_dir / "checkpoints").mkdir()
        (run_dir / "source" / Path(__file__).name).write_text(Path(__file__).read_text())
        (run_dir / "args.json").write_text(json.dumps({**dataclasses.asdict(args), "script": Path(__file__).stem}))
    lock = (run_dir / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        common.fail(f"{run_dir} is in use", 6)
    saved = sorted((run_dir / "checkpoints").iterdir())
    step, size = json.loads(saved[-1].read_text()) if saved else (0, 0)
    with (run_dir / "starts").open("a") as file:
        print(step, os.getpid(), sorted(os.sched_getaffinity(0)), file=file)
    with (run_dir / "metrics.jsonl").open("a") as metrics:
        metrics.truncate(size)
        while step < args.total_timesteps:
            time.sleep(0 if Path("hurry").exists() else args.pause)
            step += 1
            row = {"global_step": step, "time": 0.0, "charts/episodic_return": score(args)}
            print(json.dumps(row), file=metrics, flush=True)
            if args.learning_rate > 0.5 and step == 5:
                common.fail(f"losses/policy_loss is nan at step {step}: lower the learning rate", 4)
            if args.kind == "fails" or (args.kind == "crashes_once" and step == 3 and not saved):
                raise RuntimeError("a bug in the fork")
            checkpoint = run_dir / "checkpoints" / f"step-{step:012d}.pt"
            checkpoint.with_suffix(".tmp").write_text(json.dumps([step, metrics.tell()]))
            checkpoint.with_suffix(".tmp").rename(checkpoint)
            if stopped:
                common.fail(f"stopped at step {step}", 128 + stopped[0])
        print(json.dumps({"global_step": step, "time": 0.0, "eval/episodic_return": score(args)}), file=metrics)
    (run_dir / "finished.json").write_text(json.dumps({"global_step": step, "time": 0.0}))


if __name__ == "__main__":
    main(common.parse(Args, __doc__))
