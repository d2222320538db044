"""What tracking, TensorBoard, evaluation and videos cost algos/dqn.py at its defaults, W&B offline.

    python runs/bench/overhead_dqn.py --core 0 --repeats 3

Training time is from the first `envs.reset` to the end of the loop. Each repeat trains twice in turn, in processes
of their own: with the defaults ("full"), and with a run that logs, saves and evaluates nothing ("bare"). Start and
finish are what the process takes besides training, compared with the bare process.
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

ROOT = Path(__file__).resolve().parents[2]


def child(bare: bool, folder: str, steps: int) -> None:
    began = time.perf_counter()
    sys.path.insert(0, str(ROOT / "algos"))
    import dqn

    import common

    clock = {}

    class Timed(common.Envs):
        def reset(self, *words, **more):
            clock.setdefault("start", time.perf_counter())
            return super().reset(*words, **more)

    class Evaluation(common.Evaluation):
        def __call__(self, step):
            if step >= self.run.args.total_timesteps:
                clock["end"] = time.perf_counter()
            super().__call__(step)

    import common.envs

    common.envs.Envs = Timed
    common.Evaluation = Evaluation
    flags = {}
    if bare:
        for owner, method in ((common.Run, "log"), (common.Run, "log_episodes"), (common.Checkpoint, "save")):
            setattr(owner, method, lambda *words, **more: None)
        flags = {"track": False, "eval_episodes": 0}
    dqn.main(dqn.Args(cuda=False, runs_dir=folder, total_timesteps=steps, **flags))
    training = clock["end"] - clock["start"]
    print("CHILD " + json.dumps({"training": training, "rest": time.perf_counter() - began - training}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", type=int, default=0, help="the processor core everything is pinned to")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--steps", type=int, default=50_000, help="--total-timesteps of each run")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0] == "bare", args.child[1], args.steps)
    os.sched_setaffinity(0, {args.core})
    results: dict[str, list[dict[str, float]]] = {"full": [], "bare": []}
    for _ in range(args.repeats):
        for kind, values in results.items():
            with tempfile.TemporaryDirectory() as folder:
                done = subprocess.run(
                    [sys.executable, __file__, "--child", kind, folder, "--steps", str(args.steps)],
                    check=True,
                    capture_output=True,
                    text=True,
                )
            (line,) = [line for line in done.stdout.splitlines() if line.startswith("CHILD")]
            values.append(json.loads(line.removeprefix("CHILD ")))
            print(kind, values[-1], flush=True)
    for what, unit in (("training", "share"), ("rest", "seconds")):
        full, bare = ([run[what] for run in results[kind]] for kind in ("full", "bare"))
        pairs = [f / b - 1 if unit == "share" else f - b for f, b in zip(full, bare, strict=True)]
        shown = [f"{100 * x:.1f} %" if unit == "share" else f"{x:.2f} s" for x in sorted(pairs)]
        print(
            f"{what}: full {statistics.median(full):.2f} s, bare {statistics.median(bare):.2f} s; "
            f"cost, pair by pair: {', '.join(shown)}"
        )
    return None


if __name__ == "__main__":
    main()
