"""Keeps what finished runs leave as small files that can be committed, and prints their scores as a table.

    python runs/reference/collect.py runs/new/dqn --into runs/reference/results/dqn

For each run: metrics.jsonl, gzipped, as {env_id}/seed{seed}.jsonl.gz. For each environment: {env_id}/runs.json with
every argument, version and commit, and the last greedy evaluation of every seed.
"""

import argparse
import gzip
import json
import statistics
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--into", type=Path, required=True)
    options = parser.parse_args()
    kept: dict[str, list[dict]] = {}
    for folder in sorted(options.runs.iterdir()):
        args = json.loads((folder / "args.json").read_text())
        text = (folder / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        logged = [row for row in rows if "charts/SPS" in row]
        evaluation = [row for row in rows if "eval/episodic_return" in row][-1]
        if evaluation["global_step"] < args["total_timesteps"]:
            raise SystemExit(f"error: {folder} did not finish")
        target = options.into / args["env_id"].replace("/", "-").replace(":", "-")
        target.mkdir(parents=True, exist_ok=True)
        with gzip.GzipFile(target / f"seed{args['seed']}.jsonl.gz", "wb", mtime=0) as file:
            file.write(text.encode())
        # Training alone: a row's time, less what evaluations before it took, is what charts/SPS is made of.
        steps = [0, *(row["global_step"] for row in logged)]
        seconds = sum((b - a) / row["charts/SPS"] for a, b, row in zip(steps, steps[1:], logged, strict=False))
        for name in ("runs_dir", "common", "folder", "cwd"):  # places of one machine
            args.pop(name, None)
        kept.setdefault(args["env_id"], []).append(
            {
                "seed": args["seed"],
                "eval_return": evaluation["eval/episodic_return"],
                "eval_std_over_episodes": evaluation["eval/episodic_return_std"],
                "training_seconds": round(seconds, 1),
                "args": args,
            }
        )
    for env_id, runs in kept.items():
        runs.sort(key=lambda run: run["seed"])
        (options.into / env_id.replace("/", "-").replace(":", "-") / "runs.json").write_text(
            json.dumps(runs, indent=1) + "\n"
        )
        scores = [run["eval_return"] for run in runs]
        print(
            f"| {env_id} | {runs[0]['args']['total_timesteps']:,} | {len(runs)} | {statistics.mean(scores):.1f} ± "
            f"{statistics.pstdev(scores):.1f} | {min(scores):.1f} | "
            f"{statistics.mean(run['training_seconds'] for run in runs):.1f} s | {runs[0]['args']['git_commit'][:7]} |"
        )
        print("   ", ", ".join(f"{score:.1f}" for score in scores))


if __name__ == "__main__":
    main()
