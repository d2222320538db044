"""What a second process brings: ppo.py on HalfCheetah, two processes on two cores beside one process on one core.

    python runs/bench/distributed_bench.py --cores 0 1 --seconds 30 --repeats 3
    python runs/bench/distributed_bench.py -- --hidden-sizes 256 256 --num-minibatches 4      # other flags of ppo.py

Each process has the same flags, so two of them play twice the steps between the same number of updates, and 2 would be
all there is. Runs of one and of two alternate. Printed of each: environment steps a second; processor time a step, over
all processes; and the share of the time that the first process spent in reductions, waiting for the other included.
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

ALGO = Path(__file__).resolve().parents[2] / "algos" / "ppo.py"
FLAGS = [
    *("--env-id", "HalfCheetah-v5", "--total-timesteps", "1000000000", "--norm-obs", "--norm-reward"),
    *("--logstd-init", "-1", "--num-envs", "16", "--num-steps", "128", "--num-minibatches", "16"),
    *("--update-epochs", "10", "--gamma", "0.99", "--gae-lambda", "0.95", "--learning-rate", "4e-4"),
    *("--no-cuda", "--no-track", "--eval-episodes", "0", "--save-interval", "0", "--log-interval", "1"),
]


def worker(folder: Path, cores: list[int], seconds: float, flags: list[str]) -> None:
    """ppo.py in this process, for `seconds` after its second rollout."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    os.sched_setaffinity(0, cores)  # torchrun pins nobody; one of two that is pinned to a core waits longer
    import importlib.util

    import common
    from common.internals.speed import processes

    spec = importlib.util.spec_from_file_location("ppo", ALGO)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules["ppo"] = script
    spec.loader.exec_module(script)
    reduce, log = processes._all_reduce, common.Run.log
    reducing, marks = [0.0], []

    def timed(x):
        began = time.perf_counter()
        reduce(x)
        reducing[0] += time.perf_counter() - began

    def marked(run, metrics, step):
        log(run, metrics, step)
        marks.append((step, time.perf_counter(), time.process_time(), reducing[0]))
        if len(marks) > 2 and processes.all_gather_object(marks[-1][1] - marks[1][1])[0] > seconds:
            first, last = marks[1], marks[-1]
            names = ("steps", "wall", "cpu", "reducing")
            measured = {name: b - a for name, a, b in zip(names, first, last, strict=True)}
            (folder / f"{rank}.json").write_text(json.dumps(measured))
            raise SystemExit(0)

    processes._all_reduce, common.Run.log = timed, marked
    script.main(common.parse(script.Args, argv=[*FLAGS, *flags, "--runs-dir", str(folder / "runs")]))


def measure(cores: list[int], seconds: float, flags: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(len(cores))]
        words = [__file__, "--worker", name, "--seconds", str(seconds), "--cores", *map(str, cores), "--", *flags]
        command = [sys.executable, *(launcher if len(cores) > 1 else []), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(cores))]
    first = found[0]
    return {
        "steps_per_second": first["steps"] / first["wall"],
        "cpu_us_per_step": 1e6 * sum(one["cpu"] for one in found) / first["steps"],
        "share_reducing": first["reducing"] / first["wall"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1], help="of the processes; one runs on the last")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help="of ppo.py, in place of its own above")
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.worker, options.cores, options.seconds, options.flags)
        return
    several: dict[int, list[dict[str, float]]] = {1: [], len(options.cores): []}
    for _ in range(options.repeats):
        for number, results in several.items():
            results.append(measure(options.cores[-number:], options.seconds, options.flags))
            print(json.dumps({"processes": number, **results[-1]}), flush=True)
    middle = [statistics.median(result["steps_per_second"] for result in results) for results in several.values()]
    print(f"{len(options.cores)} processes: {middle[1] / middle[0]:.2f} times the steps a second of one")


if __name__ == "__main__":
    main()
