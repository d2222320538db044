"""Learning curves from committed or fresh runs, as a PNG.

    python runs/plot.py runs/results/dqn/CartPole-v1 -o runs/results/dqn_cartpole.png

Reads every `*.jsonl.gz` or `metrics.jsonl` below the folder, one a seed. Training return: the mean over the last
20 episodes at each point; thick line and band: mean and range over seeds. Dots: greedy evaluations.
Needs matplotlib: pip install -e ".[plot]"
"""

import argparse
import gzip
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def read(path: Path) -> list[dict[str, float]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        return [json.loads(line) for line in file]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--title", default=None)
    args = parser.parse_args()
    runs = [read(path) for path in sorted([*args.folder.rglob("*.jsonl.gz"), *args.folder.rglob("metrics.jsonl")])]
    last = max(row["global_step"] for run in runs for row in run)
    grid = np.linspace(0, last, 200)[1:]
    curves, dots = [], []
    for run in runs:
        episodes = [(r["global_step"], r["charts/episodic_return"]) for r in run if "charts/episodic_return" in r]
        steps, returns = np.array(episodes).T
        means = np.array([returns[max(0, i - 19) : i + 1].mean() for i in range(len(returns))])
        curves.append(np.interp(grid, steps, means))
        dots += [(r["global_step"], r["eval/episodic_return"]) for r in run if "eval/episodic_return" in r]
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=130)
    for curve in curves:
        axes.plot(grid, curve, color="#4477aa", alpha=0.25, linewidth=0.8)
    axes.plot(grid, np.mean(curves, axis=0), color="#4477aa", linewidth=2.2, label="training, exploring (mean)")
    axes.fill_between(grid, np.min(curves, axis=0), np.max(curves, axis=0), color="#4477aa", alpha=0.12, linewidth=0)
    axes.scatter(*np.array(dots).T, color="#cc3311", s=18, zorder=3, label="greedy evaluation (each seed)", alpha=0.7)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("episodic return")
    axes.set_title(args.title or f"{args.folder.name}, {len(runs)} seeds")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(args.output)


if __name__ == "__main__":
    main()
