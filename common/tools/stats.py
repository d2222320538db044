"""Statistics of a few runs: robust means, their intervals, and which of two methods is better.

The definitions are those of Agarwal et al., 2021, https://arxiv.org/abs/2108.13264, and of their library rliable.
Scores are one array a task, [..., runs of this task]; leading dimensions are bootstrap replicates. Unlike rliable's
matrices, tasks may have different numbers of runs.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Tasks = Sequence[np.ndarray]
LEVEL = 0.01  # where the permutation test cannot reach it, no tool says which of two sides is better
DRAWS = 2000  # of a bootstrap interval
CELLS = 4_000_000  # floats of a bootstrap in memory at once
ARRANGEMENTS = 200_000  # of a permutation test: all up to 10 runs beside 10, so many are drawn of more


def iqm(tasks: Tasks) -> np.ndarray:
    """Interquartile mean: the mean of what is left when a quarter of all runs is cut off at either end."""
    pooled = np.sort(np.concatenate(tasks, axis=-1), axis=-1)
    runs = pooled.shape[-1]
    cut = int(0.25 * runs)
    return pooled[..., cut : runs - cut].mean(axis=-1)


def probability_of_improvement(x: Tasks, y: Tasks) -> np.ndarray:
    """How often a run of x beats a run of y on the same task, ties half; mean over tasks."""
    return np.mean([_beats(a, b) for a, b in zip(x, y, strict=True)], axis=0)


def _beats(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """P(x > y) + P(x = y) / 2 over all pairs of the last dimensions."""
    shape = x.shape[:-1]
    shares = []
    for a, b in zip(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), strict=True):
        below, up_to = (np.searchsorted(np.sort(b), a, side=side).sum() for side in ("left", "right"))
        shares.append((below + up_to) / 2 / (len(a) * len(b)))
    return np.array(shares).reshape(shape)


def too_few(ours: int, theirs: int, level: float = LEVEL) -> str:
    """Why the runs are too few for a verdict, whatever their scores; "" if they are enough. All tools ask this.

    The lowest p that the permutation test can reach is 1 over the number of ways to divide the runs into two groups.
    """
    if 1 / math.comb(ours + theirs, ours) <= level:
        return ""
    enough = next(n for n in itertools.count(1) if 1 / math.comb(2 * n, n) <= level)
    why = f"the permutation test cannot reach p = {level:g}; it can with {enough} beside {enough}"
    return f"{ours} beside {theirs} runs are too few to call one side better: {why}"


def interval(
    statistic: Callable[..., np.ndarray], *groups: Tasks, reps: int = DRAWS, seed: int = 0, level: float = 0.95
) -> Any:
    """Percentile interval by stratified bootstrap: runs are drawn again within their task, groups independently.

    Two numbers, or with leading dimensions of the scores two arrays of these. Both are nan where no task has more than
    one run: nothing was seen of luck.
    """
    if all(scores.shape[-1] < 2 for tasks in groups for scores in tasks):
        return np.nan, np.nan
    generator = np.random.default_rng(seed)
    at_once = max(1, CELLS // sum(scores.size for tasks in groups for scores in tasks))

    def drawn(scores: np.ndarray, draws: int) -> np.ndarray:
        runs = scores.shape[-1]
        return scores[..., generator.integers(runs, size=(draws, runs))]

    found = []
    for begin in range(0, reps, at_once):
        draws = min(at_once, reps - begin)
        found.append(statistic(*[[drawn(scores, draws) for scores in tasks] for tasks in groups]))
    return np.quantile(np.concatenate(found, axis=-1), [(1 - level) / 2, (1 + level) / 2], axis=-1)


def band(curves: np.ndarray, statistic: Callable[[Tasks], np.ndarray], reps: int) -> np.ndarray:
    """The statistic of curves [runs, points] at each point, and its interval: [3, points], centre, low, high.

    nan marks what a run does not reach: it does not count there. As in `interval`, one run has no interval.
    """
    result = np.full((3, curves.shape[1]), np.nan)
    present, kind = np.unique(~np.isnan(curves), axis=1, return_inverse=True)
    for i, there in enumerate(present.T):  # all points that the same runs reach at once
        points = np.flatnonzero(kind.reshape(-1) == i)
        if there.any():
            runs = curves[there][:, points].T  # [points, runs]
            result[0, points] = statistic([runs])
            result[1, points], result[2, points] = interval(statistic, [runs], reps=reps)
    return result


def significance(ours: Sequence[float], theirs: Sequence[float], promised: float) -> dict[str, Any]:
    """What the runs of a sweep's winner (ours) and the defaults show: a text, and its numbers.

    Args:
        promised: the winner's mean in the sweep.
    """
    if few := too_few(len(ours), len(theirs)):
        difference = float(np.mean(ours) - np.mean(theirs))
        text = f"No comparison, difference {difference:+.4g}: {few} (--fresh-seeds)."
        return {"text": text, "difference": difference}
    shift = permutation(theirs, ours, level=0.025)
    result = "These runs do not show that the winner beats the defaults"
    if shift.low > 0 or shift.high < 0:
        result = f"The winner {'beats' if shift.low > 0 else 'is worse than'} the defaults on fresh seeds"
    better = float(probability_of_improvement([np.asarray(ours)], [np.asarray(theirs)]))
    luck = promised - float(np.mean(ours))
    lost = f"; {luck:.3g} of the {promised:.5g} in the sweep did not replicate" if luck > 0 else ""
    interval = f"95 % interval {shift.low:+.4g} to {shift.high:+.4g} (permutation test)"
    text = f"{result}: difference {shift.difference:+.4g}, {interval}, probability of improvement {better:.2f}{lost}."
    numbers = {"difference": shift.difference, "interval": [shift.low, shift.high], "P(better)": better}
    return {"text": text, **numbers}


def mean_and_std(values: Sequence[float]) -> str:
    """With the sample standard deviation."""
    spread = np.std(values, ddof=1) if len(values) > 1 else math.nan
    return f"{np.mean(values):.5g} ± {spread:.3g}"


@dataclass
class Shift:
    """Of new scores beside old ones: the difference of their means, and what is known of it."""

    difference: float
    low: float  # the true difference is lower with a probability of at most `level`,
    high: float  # and higher with as much
    worse: float  # probability of a difference as low as this, or lower, if the new scores are drawn as the old ones
    better: float  # as high, or higher


def permutation(old: Sequence[float], new: Sequence[float], level: float, most: int = ARRANGEMENTS) -> Shift:
    """Permutation test of the difference of means, and its bounds; exact for any distribution of the scores.

    If all are drawn alike, every way to call so many of them the new ones is as likely as any other (Fisher, 1935); of
    more than `most` ways some are drawn (Phipson & Smyth, 2010: https://doi.org/10.2202/1544-6115.1585). The bounds
    are the ends of the shifts of the new scores that the test does not reject, infinite where it can reject none.
    """
    scores, m = np.array([*new, *old], dtype=float), len(new)
    if math.comb(len(scores), m) <= most:
        taken = np.array(list(itertools.combinations(range(len(scores)), m)))[1:]  # the first is as it was
    else:
        taken = np.argsort(np.random.default_rng(0).random((most - 1, len(scores))), axis=1)[:, :m]
    # To exchange k new scores for old ones gives a mean as low, or lower, just where the k are no lower than those; and
    # after a shift of all new scores, where it makes up for the k's excess.
    exchanged = np.maximum((taken >= m).sum(axis=1), 1)
    excess = np.sort((scores[:m].sum() - scores[taken].sum(axis=1)) / exchanged)
    ways, rounding = len(excess) + 1, 1e-9 * np.abs(scores).max()
    rejected = int((np.arange(1, ways + 1) / ways <= level).sum())
    return Shift(
        difference=float(np.mean(new) - np.mean(old)),
        low=float(excess[rejected - 1]) if rejected else -np.inf,
        high=float(excess[-rejected]) if rejected else np.inf,
        worse=float(1 + (excess >= -rounding).sum()) / ways,
        better=float(1 + (excess <= rounding).sum()) / ways,
    )


def runs_needed(old: int, level: float) -> int:
    """New runs without which `permutation` finds nothing at `level`, whatever they score: it takes 1/level ways."""
    return next(m for m in itertools.count(1) if 1 / math.comb(old + m, m) <= level)
