"""Curves, final and best scores of runs, and when they reached a threshold, on one grid of steps an environment."""

import math
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.tools import stats
from common.tools.compare.tables import Table
from common.tools.find_runs import Metrics, Run, unreadable

POINTS, MOST_POINTS = 100, 400  # of the shortest group's curve, of any
CURVE_REPS = 1000  # bootstrap draws at each of them


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
    """One group on one task."""

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
    cells: dict[str, Cell]  # of the groups that ran it


def smoothed(steps: np.ndarray, values: np.ndarray, at: np.ndarray, window: float) -> np.ndarray:
    """Mean of the values in (at - window, at]; the last before, where there are none; nan before the first."""
    right = np.searchsorted(steps, at, side="right")
    left = np.minimum(np.searchsorted(steps, at - window, side="right"), right - 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(right > 0, (total[right] - total[np.maximum(left, 0)]) / (right - left), np.nan)


def measure(
    env_id: str,
    groups: dict[str, list[Run]],
    threshold: float | None,
    metric: str,
    score: str,
    window: float,
    notes: list[str],
) -> Task | None:
    """The runs of one task on one grid, by the label of their group; None if none has logged anything.

    Args:
        metric: the key of the curves.
        score: the key of final and best scores; where a finished run lacks it, `metric` takes its place.
        window: width of the averaging window, as a share of the shortest group.
        notes: gets a line for everything that is left out or unusual.
    """
    read: list[tuple[str, Run, Metrics]] = []
    for label, mine in groups.items():
        for run in mine:
            try:
                metrics = run.read([metric, score])
            except OSError as error:
                unreadable.append(f"{run.name}: its metrics cannot be read ({error.strerror or error})")
                notes.append(f"{unreadable[-1]}; it is left out.")
                continue
            read.append((label, run, metrics))
        for seed, count in sorted(Counter(run.seed() for run in mine).items()):
            if count > 1:
                notes.append(f"{label} has seed {seed} more than once on {env_id}: each counts as a run of its own.")
    read = _leave_out(read, metric, notes)
    without = [(run, metrics) for _, run, metrics in read if metrics.rows[score].size == 0]
    if len(without) == len(read) or any(_is_finished(run, metrics) for run, metrics in without):
        if read and score != metric:
            notes.append(f"{env_id}: {len(without)} runs have no {score}; final and best are of {metric}.")
        score = metric
    else:
        read = _leave_out(read, score, notes)
    if not read:
        return None
    ends = [max(metrics.end_step for name, _, metrics in read if name == label) for label, _, _ in read]
    width, longest = window * min(ends), max(ends)
    points = min(round(POINTS * longest / max(min(ends), 1)), MOST_POINTS)
    steps = np.linspace(0, longest, points + 1)[1:]
    cells = {}
    for label in dict.fromkeys(name for name, _, _ in read):
        own = [(run, metrics) for name, run, metrics in read if name == label]
        here = [on_grid(run, metrics, steps, width, threshold, metric, score) for run, metrics in own]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # at points that no run has reached
            seconds = np.nanmedian([one.seconds for one in here], axis=0)
        curves = np.stack([one.curve for one in here])
        cells[label] = Cell(here, stats.band(curves, stats.iqm, CURVE_REPS), seconds)
        if cut := [f"{metrics.end_step:,.0f}" for run, metrics in own if not _is_finished(run, metrics)]:
            notes.append(f"{label} on {env_id}: {len(cut)} of {len(here)} runs are unfinished, at step {_few(cut)}.")
    return Task(env_id, steps, threshold, score, cells)


def _leave_out(read: list[tuple[str, Run, Metrics]], key: str, notes: list[str]) -> list[tuple[str, Run, Metrics]]:
    """Those that have logged `key`."""
    names = [run.name for _, run, metrics in read if metrics.rows[key].size == 0]
    if names:
        notes.append(f"left out, as they have not logged {key} yet: {_few(names)}")
    return [one for one in read if one[2].rows[key].size]


def _few(words: list[str]) -> str:
    return ", ".join(words[:5]) + (", ..." if len(words) > 5 else "")


def _is_finished(run: Run, metrics: Metrics) -> bool:
    return run.finished or metrics.end_step >= float(run.config.get("total_timesteps") or math.inf)


def on_grid(
    run: Run, metrics: Metrics, steps: np.ndarray, window: float, threshold: float | None, key: str, score: str
) -> Measured:
    at, seconds, values = metrics.rows[key]
    curve = smoothed(at, values, steps, window)
    # Runs end where a step of all their environments ends, a little beyond the total: such an end is one of them.
    curve[steps > metrics.end_step * 1.01] = np.nan
    full = at >= window  # before, a few lucky episodes would count as a level
    level = smoothed(at, values, at, window)
    reached = (math.inf, math.inf)
    if threshold is not None and (over := np.flatnonzero(full & (level >= threshold))).size:
        reached = float(at[over[0]]), float(seconds[over[0]])
    levels = np.stack([at, seconds, level])
    scores = metrics.rows[score] if score != key else levels[:, full]
    scores = scores if scores.size else levels[:, -1:]  # the run is shorter than a window
    final, best, end = float(scores[2, -1]), float(scores[2].max()), (metrics.end_step, metrics.end_seconds)
    evaluations = scores if score != key else np.empty((3, 0))
    clock = np.interp(steps, np.append(at, end[0]), np.append(seconds, end[1]))
    clock[np.isnan(curve)] = np.nan
    return Measured(run, curve, clock, evaluations, final, best, end, reached)


@dataclass
class Comparison:
    """What `compare` prints, draws and puts on its page."""

    groups: dict[str, list[Run]]
    tasks: list[Task]
    tables: list[Table]
    notes: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)  # what --json writes
