"""Writes rliable_numbers.json: what rliable itself says of a few score tables.

    python -m venv rliable && rliable/bin/pip install rliable==1.2.0 "pandas<3"
    rliable/bin/python tests/helpers/rliable_numbers.py

rliable needs arch, which does not import with pandas 3; hence an environment of its own.
"""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
from rliable import library, metrics

REPS = 20_000


def main():
    generator = np.random.default_rng(7)
    tables = {}
    for name, runs, tasks in (("one task", 10, 1), ("three tasks", 5, 3), ("odd", 7, 2)):
        x = generator.normal(0.6, 0.5, (runs, tasks)).round(3)
        y = generator.normal(0.4, 0.5, (runs + 2, tasks)).round(3)
        x[0], y[0] = y[1], y[1]  # ties
        points, intervals = {}, {}
        found = library.get_interval_estimates({"x": x}, lambda s: np.array([metrics.aggregate_iqm(s)]), reps=REPS)
        points["iqm"], intervals["iqm"] = float(found[0]["x"][0]), found[1]["x"].ravel().tolist()
        found = library.get_interval_estimates({"x": [x, y]}, metrics.probability_of_improvement, reps=REPS)
        points["probability_of_improvement"] = float(np.ravel(found[0]["x"])[0])
        intervals["probability_of_improvement"] = found[1]["x"].ravel().tolist()
        tables[name] = {"x": x.tolist(), "y": y.tolist(), "points": points, "intervals": intervals}
    versions = {name: importlib.metadata.version(name) for name in ("rliable", "arch", "numpy", "scipy", "pandas")}
    text = json.dumps({"versions": versions, "reps": REPS, "tables": tables})
    Path(__file__).with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
