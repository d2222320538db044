"""Compares runs: learning curves, scores with intervals, costs, and the arguments that differ.

    python -m common compare runs                          every run below a folder
    python -m common compare algos/dqn.py my_idea.py       the runs of two scripts below --runs-dir
    python -m common compare baseline my_idea              the runs of two --wandb-group names below --runs-dir
    python -m common compare old=runs/a new=runs/b         two groups with names of your own
    python -m common compare wandb:ENTITY/PROJECT/GROUP    runs on a W&B server
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

NOT_SHOWN = {"seed", "env_id", "script", "track", "capture_video", "resume", "debug", "runs_dir", "common", "exp_name"}
NOT_SHOWN |= {"folder", "cwd"}


@dataclass
class Args:
    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUNS...")]
    """folders, scripts (.py), groups, wandb:ENTITY/PROJECT[/GROUP]; NAME=RUNS makes these runs one group"""
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
    normalize: tuple[str, ...] = ()
    """scores that count as 0 and 1, to combine environments: CartPole-v1=20,500"""
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
    print("\n".join(comparison.notes))
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
    for path in filter(None, (args.markdown, args.plot, args.html)):
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
    for path in filter(None, (args.markdown, args.plot, args.html)):
        if not path.parent.is_dir():
            fail(f"there is no folder {path.parent} for {path.name}", code=6)


def compare(runs: list[Run], args: Args) -> Comparison:
    """Reads, measures and tabulates `runs`."""
    groups = group(runs, args.by)
    comparison = Comparison(groups, [], [])
    envs = list(dict.fromkeys(run.env_id for run in runs))
    thresholds = {env: values[0] for env, values in per_task("threshold", args.threshold, envs, 1).items()}
    goals = per_task("normalize", args.normalize, envs, 2)
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
    for task in comparison.tasks:
        comparison.tables += task_tables(task)
    if len(comparison.tasks) > 1 or goals:
        comparison.tables += over_tasks(comparison, goals)
    counts = [len(cell.runs) for task in comparison.tasks for cell in task.cells.values()]
    head = [
        f"IQM: interquartile mean. [ ]: 95 % interval of the IQM, stratified bootstrap, {stats.DRAWS:,} draws.",
        "seconds: median of the whole run, evaluations included. To a threshold: when half of the runs had reached it.",
    ]
    tail = [f"Fewer than {stats.FEW} runs: a bootstrap of so few is too narrow."]
    tail = tail if any(1 < count < stats.FEW for count in counts) else []
    if len(groups) > 1:
        head.append("P(better): how often a run beats one of the first group, ties half.")
        if (differ := differences(groups)).rows:
            comparison.tables.append(differ)
        else:
            tail.insert(0, "The groups have the same arguments, versions and device.")
        if few := stats.too_few(*counts):
            tail.append(f"P(better) is left out where there are fewer runs: {few}.")
    comparison.notes[:] = [*head, *comparison.notes, *tail]
    return comparison


def per_task(flag: str, words: Sequence[str], envs: Sequence[str], count: int) -> dict[str, list[float]]:
    """`ENV=1,2` words as numbers by task; a word without ENV is for every task."""
    found: dict[str, list[float]] = {}
    for word in words:
        env, _, text = word.rpartition("=")
        try:
            numbers = [float(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != count or not all(map(math.isfinite, numbers)):
            fail(f"--{flag} {word}: write {'ENV=LOW,HIGH' if count == 2 else 'ENV=NUMBER'}")
        if count == 2 and numbers[0] == numbers[1]:
            fail(f"--{flag} {word}: the two scores must differ")
        if env and env not in envs:
            fail(f"--{flag} {word}: no run is of {env}; there are: {', '.join(envs)}")
        found |= dict.fromkeys([env] if env else envs, numbers)
    return found


def registered_threshold(env_id: str) -> float | None:
    """The return at which gymnasium's registration calls the environment solved."""
    import gymnasium

    try:
        return gymnasium.spec(env_id).reward_threshold
    except (gymnasium.error.Error, ImportError):
        return None


def task_tables(task: Task) -> list[Table]:
    first = next(iter(task.cells))
    of = "last greedy evaluation" if task.score.startswith("eval/") else f"end of {task.score}"
    scores = Table(
        f"{task.env_id}: final score ({of})",
        ["group", "runs", "IQM", "95 % interval", "median", "mean", "std", "lowest", "highest", "best so far (IQM)"],
        [],
    )
    costs = Table(f"{task.env_id}: what it took", ["group", "steps", "seconds", "steps/s"], [])
    if task.threshold is not None:
        costs.header += [f"reached {task.threshold:g}", "steps to it", "seconds to it"]
    if len(task.cells) > 1:
        scores.header.append(f"P(better than {first})")
    for label, cell in task.cells.items():
        final, best = cell.final, np.array([run.best for run in cell.runs])
        bounds = stats.interval(stats.iqm, [final])
        numbers = [np.median(final), final.mean(), final.std(), final.min(), final.max(), stats.iqm([best])]
        row = [label, str(len(final)), number(stats.iqm([final])), span(bounds), *map(number, numbers)]
        if len(task.cells) > 1:
            row.append("" if label == first else better([final], [task.cells[first].final]))
        scores.rows.append(row)
        ends = np.array([run.end for run in cell.runs])
        reached = np.array([run.reached for run in cell.runs])
        steps, seconds = np.median(ends, axis=0)
        row = [label, integer(steps), number(seconds), number(np.median(ends[:, 0] / np.maximum(ends[:, 1], 1e-9)))]
        if task.threshold is not None:
            row.append(f"{np.isfinite(reached[:, 0]).sum()} of {len(reached)}")
            row += [integer(half(reached[:, 0])), number(half(reached[:, 1]))]
        costs.rows.append(row)
    return [scores, costs]


def half(reached: np.ndarray) -> float:
    """When half of the runs had reached it; inf if fewer than half ever did."""
    return float(np.sort(reached)[(len(reached) - 1) // 2])


def over_tasks(comparison: Comparison, goals: dict[str, list[float]]) -> list[Table]:
    """All tasks together: P(better) needs no common scale, the means do."""
    tasks, labels = comparison.tasks, list(comparison.groups)
    envs = ", ".join(task.env_id for task in tasks)
    found = []
    if len(tasks) > 1 and len(labels) > 1:
        table = Table(f"over tasks ({envs})", ["group", "tasks in common", f"P(better than {labels[0]})"], [])
        for label in labels[1:]:
            shared = [task for task in tasks if label in task.cells and labels[0] in task.cells]
            if shared:
                pair = [[task.cells[name].final for task in shared] for name in (label, labels[0])]
                table.rows.append([label, str(len(shared)), better(*pair)])
        found += [table] if table.rows else []
    missing = [task.env_id for task in tasks if task.env_id not in goals]
    if goals and missing:
        fail(f"--normalize says nothing of {', '.join(missing)}")
    if goals:
        statistics = {"IQM": stats.iqm, "median": stats.median, "mean": stats.mean}
        statistics |= {"optimality gap": stats.optimality_gap}
        table = Table(f"normalised final scores over tasks ({envs})", ["group", "tasks", "runs", *statistics], [])
        for label in labels:
            mine = [task for task in tasks if label in task.cells]
            if len(mine) < len(tasks):
                comparison.notes.append(f"{label} has no normalised score: it has runs of {len(mine)} tasks only")
                continue
            bounds = [goals[task.env_id] for task in mine]
            scores = [(t.cells[label].final - low) / (high - low) for t, (low, high) in zip(mine, bounds, strict=True)]
            row = [label, str(len(mine)), str(sum(map(len, scores)))]
            for statistic in statistics.values():
                interval = stats.interval(statistic, scores)
                row.append(f"{number(statistic(scores))} {span(interval)}")
            table.rows.append(row)
        found.append(table)
    return found


def better(mine: stats.Tasks, theirs: stats.Tasks) -> str:
    if stats.too_few(*map(len, [*mine, *theirs])):
        return "-"
    bounds = stats.interval(stats.probability_of_improvement, mine, theirs)
    interval = f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if math.isfinite(bounds[0]) else ""
    return f"{stats.probability_of_improvement(mine, theirs):.2f}{interval}"


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
