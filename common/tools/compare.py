"""Compares runs: learning curves, scores with intervals, who is better, what it cost, which arguments differ.

    python -m common compare runs                          every run below a folder
    python -m common compare algos/dqn.py my_idea.py       the runs of two scripts below --runs-dir
    python -m common compare baseline my_idea              the runs of two --wandb-group names below --runs-dir
    python -m common compare old=runs/a new=runs/b         two arms with names of your own
    python -m common compare wandb:ENTITY/PROJECT/GROUP    runs on a W&B server

Runs of one script with the same hyperparameters are one arm, whatever their seeds; environments are tasks. --by names
other arguments to tell arms apart by. The first arm is what the others are measured against.

A curve is the mean of the metric over the last --window steps; the line is the interquartile mean (IQM) over runs, the
band its 95 % interval by stratified bootstrap, with the definitions of https://arxiv.org/abs/2108.13264. A final score
is a run's last greedy evaluation, its best one the highest it has had, which flatters whoever evaluates more often;
without evaluations both are of the training curve.
"""

import dataclasses
import difflib
import math
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from common.args import fail, parse
from common.tools import stats
from common.tools.runs import Metrics, Run, duplicates, find

POINTS, MOST_POINTS = 100, 400  # of the shortest arm's curve, of any
CURVE_REPS = 1000  # bootstrap draws at each of them
# What may differ between runs of one method: how and where it ran, what else was written down.
NOT_THE_METHOD = {"seed", "cuda", "torch_deterministic", "torch_threads", "track", "capture_video", "resume", "debug"}
NOT_THE_METHOD |= {"eval_episodes", "eval_interval", "log_interval", "save_interval", "async_envs", "env_timeout"}
NOT_THE_METHOD |= {"runs_dir", "allow_env_import", "env_id", "script", "device", "threads", "versions", "git_commit"}
NOT_THE_METHOD |= {"common", "exp_name"}
NOT_SHOWN = {"seed", "env_id", "script", "track", "capture_video", "resume", "debug", "runs_dir", "common", "exp_name"}
TOLD_APART = 60  # characters of a label that is made of hyperparameters


@dataclass
class Args:
    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUNS...")]
    """folders, scripts (.py), groups, wandb:ENTITY/PROJECT[/GROUP]; NAME=RUNS makes these runs one arm"""
    runs_dir: Path = Path("runs")
    """where the runs of scripts and groups are looked for"""
    by: tuple[str, ...] = ()
    """arguments that tell arms apart (default: script, and the hyperparameters that differ within a task)"""
    metric: str = "charts/episodic_return"
    """what curves show, and what the threshold is a threshold of"""
    score: str = "eval/episodic_return"
    """what final and best scores are of; --metric where no run has it"""
    threshold: tuple[str, ...] = ()
    """475, or CartPole-v1=475 for each task: when is it reached (default: gymnasium's reward threshold)"""
    normalize: tuple[str, ...] = ()
    """CartPole-v1=20,500 for each task: the scores that count as 0 and 1; several tasks then have one score"""
    window: float = 0.05
    """the share of a run that a point of a curve is the mean of; where arms differ in length, of the shortest arm's"""
    bootstrap: int = 2000
    """draws for each interval"""
    finished: bool = False
    """leave out runs that have not come to their end"""
    x: Annotated[str, arg(metavar="{steps,time}")] = "steps"
    """x axis of --plot"""
    markdown: Path | None = None
    """write the tables to this file"""
    plot: Path | None = None
    """draw the curves into this .png, .svg or .pdf file (extra `plot`)"""
    html: Path | None = None
    """write one page that needs no network: curves, tables, videos, differences of the code (extra `plot`)"""
    embed_mb: float = 20
    """megabytes of videos that the page holds; the others are linked to where they lie"""
    debug: bool = False
    """print the whole traceback of an error"""


@dataclass
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass
class Measured:
    """One run on the grid of its task. Steps and seconds to the threshold are inf where it was not reached."""

    run: Run
    curve: np.ndarray  # [points], nan beyond the end of the run
    seconds: np.ndarray  # [points]
    evaluations: np.ndarray  # [3, n]: steps, seconds, scores
    final: float
    best: float
    end: tuple[float, float]  # steps, seconds
    reached: tuple[float, float]


@dataclass
class Cell:
    """One arm on one task."""

    runs: list[Measured]
    band: np.ndarray  # [3, points]: IQM, low, high
    seconds: np.ndarray  # [points]: median over runs

    @property
    def final(self) -> np.ndarray:
        return np.array([run.final for run in self.runs])


@dataclass
class Task:
    env_id: str
    steps: np.ndarray  # the grid, [points]
    threshold: float | None
    score: str  # the key that final and best are of
    cells: dict[str, Cell]  # of the arms that ran it


@dataclass
class Comparison:
    arms: dict[str, list[Run]]
    tasks: list[Task]
    tables: list[Table]
    notes: list[str] = field(default_factory=list)


def main(argv: list[str]) -> None:
    args = parse(Args, __doc__, argv, prog="python -m common compare")
    check(args)
    runs = [run for run in find(args.runs, args.runs_dir) if run.finished or not args.finished]
    if not runs:
        fail("none of these runs has come to its end")
    comparison = compare(runs, args)
    for table in comparison.tables:
        print(text(table) + "\n")
    print("\n".join(comparison.notes))
    command = shlex.join(["python", "-m", "common", "compare", *argv])
    try:
        if args.markdown is not None:
            args.markdown.write_text(markdown(comparison, command), "utf-8")
        if args.plot is not None:
            from common.tools.figure import draw

            draw(comparison, args.plot, args.metric, args.x)
        if args.html is not None:
            from common.tools.page import write

            write(comparison, args.html, args.metric, command, args.embed_mb)
    except OSError as error:
        fail(f"cannot write {error.filename or ''}: {error.strerror or error}", code=6)
    for path in (args.markdown, args.plot, args.html):
        if path is not None:
            print(path)


def check(args: Args) -> None:
    if not args.runs:
        fail("which runs? for example: python -m common compare runs")
    if args.x not in ("steps", "time"):
        fail(f"--x is steps or time, not {args.x}")
    if not 0 < args.window <= 1:
        fail(f"--window is a share of the run, above 0 and up to 1, not {args.window}")
    if args.bootstrap < 100:
        fail(f"--bootstrap must be at least 100, not {args.bootstrap}")
    if args.embed_mb < 0:
        fail(f"--embed-mb must be at least 0, not {args.embed_mb}")
    if args.plot is not None and args.plot.suffix not in (".png", ".svg", ".pdf"):
        fail(f"--plot ends in .png, .svg or .pdf: {args.plot}")
    if args.plot is not None or args.html is not None:
        try:
            import matplotlib  # noqa: F401
            import plotly  # noqa: F401
        except ImportError as error:
            fail(f'{error.name} is not installed: pip install -e ".[plot]"')
    for path in (args.markdown, args.plot, args.html):
        if path is not None and not path.parent.is_dir():
            fail(f"there is no folder {path.parent} for {path.name}", code=6)


def compare(runs: list[Run], args: Args) -> Comparison:
    """Reads, measures and tabulates `runs`."""
    arms = group(runs, args.by)
    comparison = Comparison(arms, [], [])
    envs = list(dict.fromkeys(run.env_id for run in runs))
    thresholds = {env: values[0] for env, values in per_task("threshold", args.threshold, envs, 1).items()}
    goals = per_task("normalize", args.normalize, envs, 2)
    for env_id in envs:
        if not args.threshold and (known := registered_threshold(env_id)) is not None:
            thresholds[env_id] = known
        there = {label: [run for run in mine if run.env_id == env_id] for label, mine in arms.items()}
        task = measure(env_id, {k: v for k, v in there.items() if v}, thresholds.get(env_id), args, comparison.notes)
        if task is not None:
            comparison.tasks.append(task)
    if not comparison.tasks:
        fail(f"none of these runs has logged {args.metric} yet")
    for task in comparison.tasks:
        comparison.tables += task_tables(task, args)
    if len(comparison.tasks) > 1 or goals:
        comparison.tables += over_tasks(comparison, goals, args)
    if len(arms) > 1:
        comparison.tables.append(differences(arms))
    comparison.notes[:0] = [
        f"IQM: interquartile mean. [ ]: 95 % interval of the IQM, stratified bootstrap, {args.bootstrap:,} draws.",
        *(["P(better): how often a run beats one of the first arm, ties half."] if len(arms) > 1 else []),
    ]
    return comparison


def group(runs: list[Run], by: Sequence[str]) -> dict[str, list[Run]]:
    """Arms by their labels, in the order in which their first runs were named."""
    by = [key.replace("-", "_").lstrip("_") for key in by]
    known = {key for run in runs for key in run.facts}
    for key in by:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            fail(f"--by {key}: no run has an argument of this name" + (f"; there is {near[0]}" if near else ""))
    keys = [] if by else differing(runs)
    arms: dict[tuple, list[Run]] = {}
    for run in runs:
        mine = [run.facts.get(key) for key in by] if by else [run.script, *(_said(run).get(key) for key in keys)]
        arms.setdefault((run.arm,) if run.arm else (None, *map(repr, mine)), []).append(run)
    return dict(zip(labels(list(arms.values()), by, keys), arms.values(), strict=True))


def _said(run: Run) -> dict[str, Any]:
    """What may make another method of it: hyperparameters, and the word of the command line that it was found by."""
    method = {k: v for k, v in run.facts.items() if k not in NOT_THE_METHOD and not k.startswith("wandb_")}
    return {**method, "": run.word}


def differing(runs: list[Run]) -> list[str]:
    """Hyperparameters that differ between runs of one script on one task; between tasks, tuning is part of a method.

    An argument that some runs do not have, because the script got it later, is no difference by itself.
    """
    seen: dict[tuple[str, str, str], set[str]] = {}
    for run in runs:
        if run.arm is None:
            for key, value in _said(run).items():
                seen.setdefault((run.script, run.env_id, key), set()).add(repr(value))
    return sorted({key for (_, _, key), values in seen.items() if len(values) > 1})


def labels(arms: list[list[Run]], by: Sequence[str], keys: Sequence[str]) -> list[str]:
    """The shortest of these kinds of names that tells all arms apart: script, word, hyperparameters, numbers."""
    firsts = [mine[0] for mine in arms]

    def pairs(run: Run, names: Sequence[str]) -> str:
        return ", ".join(str(run.facts[k]) if k == "script" else f"{k}={run.facts[k]}" for k in names if k in run.facts)

    def differ(run: Run) -> list[str]:
        others = [other for other in firsts if other.script == run.script and other.arm is None]
        return [k for k in keys if k and len({repr(other.facts.get(k)) for other in others}) > 1]

    if by:
        kinds = [[pairs(run, by) for run in firsts]]
    else:
        words = [Path(run.word).name if len({r.word for r in mine}) == 1 else "" for run, mine in zip(firsts, arms)]
        full = [" ".join([run.script, pairs(run, differ(run))]).strip() for run in firsts]
        kinds = [[run.script for run in firsts], words, [run.word for run in firsts], full]
    for kind in kinds:
        named = [run.arm or name for run, name in zip(firsts, kind, strict=True)]
        if len(set(named)) == len(named) and all(named) and all(len(name) <= TOLD_APART for name in named):
            return named
    return [run.arm or f"{run.script} #{i}" for i, run in enumerate(firsts, 1)]


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
        found |= {name: numbers for name in ([env] if env else envs)}
    return found


def registered_threshold(env_id: str) -> float | None:
    """The return at which gymnasium's registration calls the environment solved."""
    import gymnasium

    try:
        return gymnasium.spec(env_id).reward_threshold
    except (gymnasium.error.Error, ImportError):
        return None


def smoothed(steps: np.ndarray, values: np.ndarray, at: np.ndarray, window: float) -> np.ndarray:
    """Mean of the values in (at - window, at]; the last before, where there are none; nan before the first."""
    right = np.searchsorted(steps, at, side="right")
    left = np.minimum(np.searchsorted(steps, at - window, side="right"), right - 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(right > 0, (total[right] - total[np.maximum(left, 0)]) / (right - left), np.nan)


def measure(
    env_id: str, arms: dict[str, list[Run]], threshold: float | None, args: Args, notes: list[str]
) -> Task | None:
    """The runs of one task on one grid; None if none of them has logged anything."""
    read: list[tuple[str, Run, Metrics]] = []
    for label, mine in arms.items():
        for run in mine:
            metrics = run.read([args.metric, args.score])
            read.append((label, run, metrics))
            if metrics.broken:
                notes.append(f"{run.name}: {metrics.broken} lines of its metrics could not be read.")
        for seed in duplicates(mine):
            notes.append(f"{label} has seed {seed} more than once on {env_id}: each counts as a run of its own.")
    read = _leave_out(read, args.metric, notes)
    without = [(run, metrics) for _, run, metrics in read if metrics.rows[args.score].size == 0]
    score = args.score
    if len(without) == len(read) or any(_whole_run(run, metrics) for run, metrics in without):
        score = args.metric
        if read and score != args.score:
            notes.append(f"{env_id}: {len(without)} runs have no {args.score}; final and best are of {score}.")
    else:
        read = _leave_out(read, args.score, notes)
    if not read:
        return None
    ends = {label: max(metrics.end_step for name, _, metrics in read if name == label) for label, _, _ in read}
    window = args.window * min(ends.values())
    longest = max(ends.values())
    points = min(round(POINTS * longest / max(min(ends.values()), 1)), MOST_POINTS)
    steps = np.linspace(0, longest, points + 1)[1:]
    runs = [
        (label, on_grid(run, metrics, steps, window, threshold, args.metric, score)) for label, run, metrics in read
    ]
    cells = {}
    for label in arms:
        mine = [one for name, one in runs if name == label]
        if mine:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # points that no run has reached yet
                seconds = np.nanmedian([one.seconds for one in mine], axis=0)
            curves = np.stack([one.curve for one in mine])
            cells[label] = Cell(mine, stats.band(curves, stats.iqm, CURVE_REPS), seconds)
        early = [metrics.end_step for name, run, metrics in read if name == label and not _whole_run(run, metrics)]
        if early:
            at = ", ".join(f"{step:,.0f}" for step in early[:5]) + (", ..." if len(early) > 5 else "")
            notes.append(
                f"{label} on {env_id}: {len(early)} of {len(mine)} runs are not at their end, but at step {at}."
            )
    return Task(env_id, steps, threshold, score, cells)


def _leave_out(read: list[tuple[str, Run, Metrics]], key: str, notes: list[str]) -> list[tuple[str, Run, Metrics]]:
    """Those that have logged `key`."""
    names = [run.name for _, run, metrics in read if metrics.rows[key].size == 0]
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        notes.append(f"{len(names)} runs are left out, as they have not logged {key} yet: {shown}")
    return [one for one in read if one[2].rows[key].size]


def _whole_run(run: Run, metrics: Metrics) -> bool:
    return run.finished or metrics.end_step >= float(run.facts.get("total_timesteps") or math.inf)


def on_grid(
    run: Run, metrics: Metrics, steps: np.ndarray, window: float, threshold: float | None, key: str, score: str
) -> Measured:
    at, seconds, values = metrics.rows[key]
    curve = smoothed(at, values, steps, window)
    # Runs end where a step of all their environments ends, a little beyond the total: such an end is one of them.
    curve[steps > metrics.end_step * 1.01] = np.nan
    whole = at >= window  # before, a few lucky episodes would pass for a level
    level = smoothed(at, values, at, window)
    reached = (math.inf, math.inf)
    if threshold is not None and (over := np.flatnonzero(whole & (level >= threshold))).size:
        reached = float(at[over[0]]), float(seconds[over[0]])
    evaluations = metrics.rows[score] if score != key else np.stack([at, seconds, level])[:, whole]
    if evaluations.size == 0:  # the run is shorter than a window
        evaluations = np.stack([at, seconds, level])[:, -1:]
    clock = np.interp(steps, np.append(at, metrics.end_step), np.append(seconds, metrics.end_seconds))
    return Measured(
        run,
        curve,
        np.where(np.isnan(curve), np.nan, clock),
        evaluations if score != key else np.empty((3, 0)),
        float(evaluations[2, -1]),
        float(evaluations[2].max()),
        (metrics.end_step, metrics.end_seconds),
        reached,
    )


def task_tables(task: Task, args: Args) -> list[Table]:
    first = next(iter(task.cells))
    of = "last greedy evaluation" if task.score.startswith("eval/") else f"end of {task.score}"
    scores = Table(
        f"{task.env_id}: final score ({of})",
        ["arm", "runs", "IQM", "95 % interval", "median", "mean", "std", "lowest", "highest", "best so far (IQM)"],
        [],
    )
    costs = Table(f"{task.env_id}: what it took", ["arm", "steps", "seconds", "steps/s"], [])
    if task.threshold is not None:
        costs.header += [f"reached {task.threshold:g}", "steps to it", "seconds to it"]
    if len(task.cells) > 1:
        scores.header.append(f"P(better than {first})")
    for label, cell in task.cells.items():
        final, best = cell.final, np.array([run.best for run in cell.runs])
        bounds = stats.interval(stats.iqm, [final], reps=args.bootstrap)
        numbers = [np.median(final), final.mean(), final.std(), final.min(), final.max(), stats.iqm([best])]
        row = [label, str(len(final)), number(stats.iqm([final])), span(bounds), *map(number, numbers)]
        if len(task.cells) > 1:
            row.append("" if label == first else better([final], [task.cells[first].final], args))
        scores.rows.append(row)
        ends = np.array([run.end for run in cell.runs])
        reached = np.array([run.reached for run in cell.runs])
        steps, seconds = np.median(ends, axis=0)
        row = [label, whole(steps), number(seconds), number(np.median(ends[:, 0] / np.maximum(ends[:, 1], 1e-9)))]
        if task.threshold is not None:
            row.append(f"{np.isfinite(reached[:, 0]).sum()} of {len(reached)}")
            row += [whole(half(reached[:, 0])), number(half(reached[:, 1]))]
        costs.rows.append(row)
    return [scores, costs]


def half(reached: np.ndarray) -> float:
    """When half of the runs had reached it: the upper median, inf if fewer ever did."""
    return float(np.sort(reached)[len(reached) // 2])


def over_tasks(comparison: Comparison, goals: dict[str, list[float]], args: Args) -> list[Table]:
    """All tasks together: P(better) needs no common scale, the means do."""
    tasks, labels = comparison.tasks, list(comparison.arms)
    envs = ", ".join(task.env_id for task in tasks)
    tables = []
    if len(tasks) > 1 and len(labels) > 1:
        table = Table(f"over tasks ({envs})", ["arm", "tasks in common", f"P(better than {labels[0]})"], [])
        for label in labels[1:]:
            shared = [task for task in tasks if label in task.cells and labels[0] in task.cells]
            if shared:
                pair = [[task.cells[name].final for task in shared] for name in (label, labels[0])]
                table.rows.append([label, str(len(shared)), better(pair[0], pair[1], args)])
        if table.rows:
            tables.append(table)
    missing = [task.env_id for task in tasks if task.env_id not in goals]
    if goals and missing:
        fail(f"--normalize says nothing of {', '.join(missing)}")
    if goals:
        statistics = {
            "IQM": stats.iqm,
            "median": stats.median,
            "mean": stats.mean,
            "optimality gap": stats.optimality_gap,
        }
        table = Table(f"normalised final scores over tasks ({envs})", ["arm", "tasks", "runs", *statistics], [])
        for label in labels:
            mine = [task for task in tasks if label in task.cells]
            if len(mine) < len(tasks):
                comparison.notes.append(f"{label} has no normalised score: it has runs of {len(mine)} tasks only")
                continue
            scores = []
            for task in mine:
                low, high = goals[task.env_id]
                scores.append((task.cells[label].final - low) / (high - low))
            row = [label, str(len(mine)), str(sum(map(len, scores)))]
            for statistic in statistics.values():
                bounds = stats.interval(statistic, scores, reps=args.bootstrap)
                row.append(f"{number(statistic(scores))} {span(bounds)}")
            table.rows.append(row)
        tables.append(table)
    return tables


def better(mine: stats.Tasks, theirs: stats.Tasks, args: Args) -> str:
    bounds = stats.interval(stats.probability_of_improvement, mine, theirs, reps=args.bootstrap)
    interval = f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if math.isfinite(bounds[0]) else ""
    return f"{stats.probability_of_improvement(mine, theirs):.2f}{interval}"


def differences(arms: dict[str, list[Run]]) -> Table:
    """Every argument, version and device in which the arms differ; '–' where an arm does not have it."""
    flat = {label: [_flat(run.facts) for run in mine] for label, mine in arms.items()}
    names = list(dict.fromkeys(name for mine in flat.values() for facts in mine for name in facts))
    table = Table("what differs", ["argument", *arms], [])
    for name in names:
        row = []
        for mine in flat.values():
            values = dict.fromkeys(facts[name] for facts in mine if name in facts)
            shown = list(values)[:4]
            row.append(", ".join(shown) + (f" and {len(values) - 4} more" if len(values) > 4 else "") or "–")
        if len(set(row)) > 1:
            table.rows.append([name, *row])
    return table


def _flat(facts: dict[str, Any]) -> dict[str, str]:
    kept = {name: value for name, value in facts.items() if name not in NOT_SHOWN and not name.startswith("wandb_")}
    versions = kept.pop("versions", None) or {}
    kept["git_commit"] = str(kept.get("git_commit"))[:7]
    return {name: str(value) for name, value in {**kept, **versions}.items()}


def number(x: Any) -> str:
    """Four digits that count."""
    x = float(x)
    if not math.isfinite(x):
        return "–"
    if abs(x) >= 1000:
        return f"{x:,.0f}"
    return f"{x:.{max(0, 3 - math.floor(math.log10(abs(x))))}f}" if abs(x) >= 0.001 else f"{x:.4g}"


def whole(x: float) -> str:
    return f"{x:,.0f}" if math.isfinite(x) else "–"


def span(bounds: tuple[float, float]) -> str:
    return f"[{number(bounds[0])}, {number(bounds[1])}]" if math.isfinite(bounds[0]) else "–"


def text(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
    lines = [table.title]
    for row in (table.header, *table.rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(comparison: Comparison, command: str) -> str:
    parts = [f"```\n{command}\n```"]
    for table in comparison.tables:
        rows = [table.header, ["---"] * len(table.header), *table.rows]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts.append(f"**{table.title}**\n\n" + "\n".join(lines))
    return "\n\n".join([*parts, "  \n".join(comparison.notes)]) + "\n"
