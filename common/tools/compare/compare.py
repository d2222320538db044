"""Compares runs: learning curves, scores with intervals, costs, and the arguments that differ.

    python -m common compare runs                          every run below a folder
    python -m common compare algos/dqn.py my_idea.py       the runs of two scripts below --runs-dir
    python -m common compare baseline my_idea              the runs of two --wandb-group names below --runs-dir
    python -m common compare old=runs/a new=runs/b         two groups with names of your own
    python -m common compare runs/reference/results/dqn    the reference results

Runs of one script with the same hyperparameters, and any seed, are one group; --by groups by other arguments. Groups
are compared with the first one, for each environment.

A point of a curve is the mean of the metric over the last --window steps. The line is the interquartile mean (IQM) over
runs, the band its 95 % interval by stratified bootstrap, as in https://arxiv.org/abs/2108.13264. The final score of a
run is its last greedy evaluation, the best score its highest one (more evaluations find higher ones); without
evaluations, both are of the training curve.
"""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import Positional, arg

from common.args import fail
from common.internals.console.cli import parse
from common.internals.tracking.redact import redact
from common.tools import stats
from common.tools.compare import figure, page, tables
from common.tools.compare.groups import group
from common.tools.compare.measure import Comparison, Task, measure
from common.tools.compare.tables import Table, integer, number, span
from common.tools.find_runs import Run, find, unreadable
from common.tools.launch.cli import check_folder, write_json

NOT_SHOWN = {"seed", "env_id", "script", "track", "capture_video", "resume", "debug", "runs_dir", "common", "exp_name"}
NOT_SHOWN |= {"folder", "cwd"}


@dataclass
class Args:
    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUNS...")]
    """folders, scripts (.py), groups; NAME=RUNS makes these runs one group"""
    runs_dir: Path = Path("runs")
    """folder with the runs of scripts and groups"""
    by: tuple[str, ...] = ()
    """arguments to group by (default: script, and the hyperparameters that differ on an environment)"""
    metric: str = "charts/episodic_return"
    """metric of the curves and the threshold"""
    score: str = "eval/episodic_return"
    """metric of the final and best scores; --metric if no run has it"""
    threshold: tuple[str, ...] = ()
    """report when it is reached: 475, or CartPole-v1=475 (default: gymnasium's reward threshold)"""
    window: float = 0.05
    """width of the averaging window, as a share of the shortest group's steps"""
    finished: bool = False
    """leave out unfinished runs"""
    x: Literal["steps", "time"] = "steps"
    """x axis of --plot"""
    markdown: Path | None = None
    """write the tables to this file"""
    plot: Path | None = None
    """draw the curves into this .png, .svg or .pdf file (extra `plot`)"""
    html: Path | None = None
    """write one offline page with curves, tables, videos and differences of the code (extra `plot`)"""
    json: Path | None = None
    """write all numbers to this file (-: to the standard output)"""
    debug: bool = False
    """print the whole traceback of an error"""


def main(argv: list[str]) -> None:
    args = parse(Args, __doc__, argv, prog="python -m common compare")
    check(args)
    runs = [run for run in find(args.runs, args.runs_dir) if run.finished or not args.finished]
    if not runs:
        fail("none of these runs is finished")
    comparison = compare(runs, args)
    for table in comparison.tables:
        print(tables.text(table) + "\n")
    print(tables.wrapped(comparison.notes))
    command = redact(shlex.join(["python", "-m", "common", "compare", *argv]))
    try:
        if args.markdown is not None:
            parts = [f"**{table.title}**\n\n{tables.markdown(table)}" for table in comparison.tables]
            parts = [f"```\n{command}\n```", *parts, "  \n".join(comparison.notes)]
            args.markdown.write_text("\n\n".join(parts) + "\n", "utf-8")
        if args.plot is not None:
            figure.draw(comparison, args.plot, args.metric, args.x)
        if args.html is not None:
            page.write(comparison, args.html, args.metric, command)
    except OSError as error:
        fail(f"cannot write {error.filename or ''}: {error.strerror or error}", code=6)
    write_json(args.json, comparison.numbers)
    for path in filter(None, (args.markdown, args.plot, args.html, args.json)):
        print(path)
    if unreadable:
        fail(f"left out: {'; '.join(unreadable)}", code=3)


def check(args: Args) -> None:
    if not args.runs:
        fail("which runs? for example: python -m common compare runs")
    if not 0 < args.window <= 1:
        fail(f"--window is a share of the run, above 0 and up to 1, not {args.window}")
    if args.plot is not None and args.plot.suffix not in (".png", ".svg", ".pdf"):
        fail(f"--plot ends in .png, .svg or .pdf: {args.plot}")
    if args.plot is not None or args.html is not None:
        try:
            import matplotlib  # noqa: F401
            import plotly  # noqa: F401
        except ImportError as error:
            fail(f'{error.name} is not installed: pip install -e ".[plot]"')
    for path in (args.markdown, args.plot, args.html, args.json):
        check_folder(path)


def compare(runs: list[Run], args: Args) -> Comparison:
    """Reads, measures and tabulates `runs`."""
    groups = group(runs, args.by)
    comparison = Comparison(groups, [], [])
    envs = list(dict.fromkeys(run.env_id for run in runs))
    thresholds = read_thresholds(args.threshold, envs)
    for env_id in envs:
        if not args.threshold and (known := registered_threshold(env_id)) is not None:
            thresholds[env_id] = known
        there = {label: [run for run in mine if run.env_id == env_id] for label, mine in groups.items()}
        there = {label: mine for label, mine in there.items() if mine}
        goal = thresholds.get(env_id)
        task = measure(env_id, there, goal, args.metric, args.score, args.window, comparison.notes)
        if task is not None:
            comparison.tasks.append(task)
    if not comparison.tasks:
        if unreadable:
            fail(unreadable[0], code=3)
        fail(f"none of these runs has logged {args.metric} yet")
    tasks: list[dict[str, Any]] = []
    for task in comparison.tasks:
        about = {"env_id": task.env_id, "score": task.score, "threshold": task.threshold}
        tasks.append({**about, "groups": measured(task)})
        comparison.tables += task_tables(task, tasks[-1]["groups"])
    if over := over_tasks(comparison.tasks, list(groups)):
        title = f"over tasks ({', '.join(task.env_id for task in comparison.tasks)})"
        rows = [[row["group"], str(row["tasks"]), shown(row)] for row in over]
        comparison.tables.append(Table(title, ["group", "tasks in common", "P(better)"], rows))
    compared = [row for task in tasks for row in task["groups"]]
    head = [
        f"IQM: interquartile mean. [ ]: 95 % interval of the IQM, stratified bootstrap, {stats.DRAWS:,} draws.",
        "best: IQM of the highest scores so far. seconds: median of the whole run, evaluations included.",
    ]
    if any("reached" in row for row in compared):
        head[1] += " To a threshold: when half of the runs had reached it."
    tail = []
    if any(row["runs"] > 1 and stats.too_few(row["runs"], row["runs"]) for row in compared):
        tail.append("Intervals of fewer than 5 runs are too narrow.")
    differ = differences(groups)
    if len(groups) > 1:
        head.append(f"P(better): how often a run beats one of {next(iter(groups))}, ties half.")
        if differ.rows:
            comparison.tables.append(differ)
        else:
            tail.insert(0, "The groups have the same arguments, versions and device.")
        tail += dict.fromkeys(f"No P(better): {row['no_comparison']}." for row in compared if "no_comparison" in row)
    comparison.notes[:] = [*head, *comparison.notes, *tail]
    differ_by_name = {name: dict(zip(groups, values, strict=True)) for name, *values in differ.rows}
    comparison.numbers = {"tasks": tasks, "over_tasks": over, "differences": differ_by_name, "notes": comparison.notes}
    return comparison


def read_thresholds(words: Sequence[str], envs: Sequence[str]) -> dict[str, float]:
    """`ENV=NUMBER` words by task; a word without ENV is for every task."""
    found: dict[str, float] = {}
    for word in words:
        env, _, text = word.rpartition("=")
        try:
            threshold = float(text)
        except ValueError:
            threshold = math.nan
        if not math.isfinite(threshold):
            fail(f"--threshold {word}: write ENV=NUMBER")
        if env and env not in envs:
            fail(f"--threshold {word}: no run is of {env}; there are: {', '.join(envs)}")
        found |= dict.fromkeys([env] if env else envs, threshold)
    return found


def registered_threshold(env_id: str) -> float | None:
    """The return at which gymnasium's registration calls the environment solved."""
    import gymnasium

    try:
        return gymnasium.spec(env_id).reward_threshold
    except (gymnasium.error.Error, ImportError):
        return None


def measured(task: Task) -> list[dict[str, Any]]:
    """The numbers of each group on a task, as the tables show them and --json has them."""
    found, first = [], next(iter(task.cells.values()))
    for label, cell in task.cells.items():
        final, ends = cell.final, np.array([run.end for run in cell.runs])
        best, reached = np.array([run.best for run in cell.runs]), np.array([run.reached for run in cell.runs])
        row: dict[str, Any] = {"group": label, "runs": len(final), "IQM": stats.iqm([final])}
        row |= {"interval": stats.interval(stats.iqm, [final]), "median": np.median(final), "mean": final.mean()}
        row |= {"std": final.std(), "lowest": final.min(), "highest": final.max(), "best": stats.iqm([best])}
        if cell is not first:
            row |= better([final], [first.final])
        row |= dict(zip(("steps", "seconds"), np.median(ends, axis=0), strict=True))
        row["steps_per_second"] = np.median(ends[:, 0] / np.maximum(ends[:, 1], 1e-9))
        if task.threshold is not None:
            row["reached"] = int(np.isfinite(reached[:, 0]).sum())
            row |= {"steps_to_threshold": half(reached[:, 0]), "seconds_to_threshold": half(reached[:, 1])}
        names = "run", "seed", "final", "best", "steps", "seconds"
        each = [(run.run.name, run.run.seed(), run.final, run.best, *run.end) for run in cell.runs]
        found.append({**row, "each": [dict(zip(names, one, strict=True)) for one in each]})
    return found


def task_tables(task: Task, groups: list[dict[str, Any]]) -> list[Table]:
    of = "last greedy evaluation" if task.score.startswith("eval/") else f"end of {task.score}"
    header = ["group", "runs", "IQM", "95 % interval", "median", "mean", "std", "lowest", "highest", "best"]
    scores = Table(f"{task.env_id}: final score ({of})", header + ["P(better)"] * (len(groups) > 1), [])
    costs = Table(f"{task.env_id}: what it took", ["group", "steps", "seconds", "steps/s"], [])
    if task.threshold is not None:
        costs.header += [f"reached {task.threshold:g}", "steps to it", "seconds to it"]
    for row in groups:
        cells = [row["group"], str(row["runs"]), number(row["IQM"]), span(row["interval"])]
        cells += [number(row[name]) for name in header[4:]]
        scores.rows.append(cells + [shown(row) if row is not groups[0] else ""] * (len(groups) > 1))
        cells = [row["group"], integer(row["steps"]), number(row["seconds"]), number(row["steps_per_second"])]
        if task.threshold is not None:
            cells += [f"{row['reached']} of {row['runs']}", integer(row["steps_to_threshold"])]
            cells.append(number(row["seconds_to_threshold"]))
        costs.rows.append(cells)
    return [scores, costs]


def half(reached: np.ndarray) -> float:
    """When half of the runs had reached it; inf if fewer than half ever did."""
    return float(np.sort(reached)[(len(reached) - 1) // 2])


def over_tasks(tasks: list[Task], labels: list[str]) -> list[dict[str, Any]]:
    """P(better) over the tasks that each group has in common with the first: it needs no common scale of scores."""
    found = []
    for label in labels[1:] if len(tasks) > 1 else ():
        if shared := [task.cells for task in tasks if label in task.cells and labels[0] in task.cells]:
            pair = [[cells[name].final for cells in shared] for name in (label, labels[0])]
            found.append({"group": label, "tasks": len(shared), **better(*pair)})
    return found


def better(mine: stats.Tasks, theirs: stats.Tasks) -> dict[str, Any]:
    """The probability of improvement, or why so few runs have none."""
    few = filter(None, (stats.too_few(len(a), len(b)) for a, b in zip(mine, theirs, strict=True)))
    if no_comparison := next(few, None):
        return {"no_comparison": no_comparison}
    bounds = stats.interval(stats.probability_of_improvement, mine, theirs)
    return {"P(better)": stats.probability_of_improvement(mine, theirs), "P(better) interval": bounds}


def shown(row: dict[str, Any]) -> str:
    if "no_comparison" in row:
        return "-"
    low, high = row["P(better) interval"]
    return f"{row['P(better)']:.2f}" + (f" [{low:.2f}, {high:.2f}]" if math.isfinite(low) else "")


def differences(groups: dict[str, list[Run]]) -> Table:
    """Every argument, version and device in which the groups differ; '-' where a group does not have it."""
    flat = {label: [_flat(run.config) for run in mine] for label, mine in groups.items()}
    names = list(dict.fromkeys(name for mine in flat.values() for config in mine for name in config))
    table = Table("what differs", ["argument", *groups], [])
    for name in names:
        row = []
        for mine in flat.values():
            values = dict.fromkeys(config[name] for config in mine if name in config)
            shown = list(values)[:4]
            row.append(", ".join(shown) + (f" and {len(values) - 4} more" if len(values) > 4 else "") or "-")
        if len(set(row)) > 1:
            table.rows.append([name, *row])
    return table


def _flat(config: dict[str, Any]) -> dict[str, str]:
    kept = {name: value for name, value in config.items() if name not in NOT_SHOWN and not name.startswith("wandb_")}
    versions = kept.pop("versions", None) or {}
    kept["git_commit"] = str(kept.get("git_commit"))[:7]
    if isinstance(parent := kept.pop("parent", None), dict):
        kept["parent"] = f"{parent['script']} +{parent['lines_added']} -{parent['lines_removed']} lines"
    return {name: str(value) for name, value in {**kept, **versions}.items()}
