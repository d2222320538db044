"""Whether the winner of a sweep is better than the defaults: on seeds that neither was chosen on."""

import math
from collections.abc import Sequence

import numpy as np

from common.tools.stats import interval, mean, probability_of_improvement, too_few

RESAMPLES = 20_000


def difference_interval(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of mean(ours) - mean(theirs), each resampled by itself.

    Efron, 1979: https://doi.org/10.1214/aos/1176344552. With fewer than about ten values it is too narrow.
    """
    arms = [np.asarray(ours)], [np.asarray(theirs)]
    return interval(lambda a, b: mean(a) - mean(b), *arms, reps=RESAMPLES, seed=seed)


def sentence(ours: Sequence[float], theirs: Sequence[float], promised: float) -> str:
    """What the runs on fresh seeds show, in words. `promised` is the winner's mean in the sweep."""
    difference = float(np.mean(ours) - np.mean(theirs))
    if few := too_few(len(ours), len(theirs)):
        return (
            f"No verdict from {len(ours)} and {len(theirs)} runs, difference {difference:+.4g}: {few} (--fresh-seeds)."
        )
    low, high = difference_interval(ours, theirs)
    if low > 0:
        verdict = "The winner beats the defaults on fresh seeds"
    elif high < 0:
        verdict = "The winner is worse than the defaults on fresh seeds"
    else:
        verdict = "These runs do not show that the winner beats the defaults"
    better = float(probability_of_improvement([np.asarray(ours)], [np.asarray(theirs)]))
    luck = promised - float(np.mean(ours))
    told = f"in the sweep it had had {promised:.5g}, of which {luck:.3g} did not come back" if luck > 0 else ""
    return (
        f"{verdict}: difference {difference:+.4g}, 95 % bootstrap interval {low:+.4g} to {high:+.4g}, "
        f"probability of improvement {better:.2f}" + (f"; {told}." if told else ".")
    )


def summary(values: Sequence[float]) -> str:
    """mean ± sample standard deviation."""
    spread = np.std(values, ddof=1) if len(values) > 1 else math.nan
    return f"{np.mean(values):.5g} ± {spread:.3g}"
