"""The statistics against sorting by hand, counting pairs, enumerating every bootstrap sample, and rliable itself."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from common.tools import stats

RLIABLE = json.loads(Path(__file__).with_name("rliable_numbers.json").read_text())


def tables(seed, shapes=((1,), (4,), (5,), (3, 8), (7, 2, 6))):
    generator = np.random.default_rng(seed)
    return [[generator.normal(size=runs).round(1) for runs in shape] for shape in shapes]


def by_hand(scores):
    """The mean of what a quarter of the runs, rounded down, cut off at either end leaves."""
    scores = sorted(scores)
    cut = math.floor(len(scores) / 4)
    for _ in range(cut):
        scores.pop(0), scores.pop()
    return sum(scores) / len(scores)


def pairs(x, y):
    return sum((a > b) + 0.5 * (a == b) for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize("seed", range(5))
def test_point_estimates_by_hand(seed):
    for tasks in tables(seed):
        pooled = [score for task in tasks for score in task]
        means = sorted(sum(task) / len(task) for task in tasks)
        middle = (means[len(means) // 2] + means[(len(means) - 1) // 2]) / 2
        assert stats.iqm(tasks) == pytest.approx(by_hand(pooled))
        assert stats.mean(tasks) == pytest.approx(sum(means) / len(means))
        assert stats.median(tasks) == pytest.approx(middle)
        assert stats.optimality_gap(tasks) == pytest.approx(sum(max(0, 1 - s) for s in pooled) / len(pooled))


def test_iqm_of_the_paper():
    assert stats.iqm([np.array([1000.0, 1, 2, 3, 4, 5, 6, -1000])]) == 3.5  # of 2, 3, 4, 5 and neither outlier


@pytest.mark.parametrize("seed", range(5))
def test_probability_of_improvement_counts_pairs(seed):
    for x, y in zip(tables(seed), tables(seed + 100, ((3,), (4,), (6,), (8, 3), (2, 7, 7))), strict=True):
        expected = sum(pairs(a, b) for a, b in zip(x, y, strict=True)) / len(x)
        assert stats.probability_of_improvement(x, y) == pytest.approx(expected)
        assert stats.probability_of_improvement(y, x) == pytest.approx(1 - expected)
    assert stats.probability_of_improvement([np.ones(3)], [np.ones(4)]) == 0.5


def test_statistics_work_on_every_replicate_apart():
    generator = np.random.default_rng(0)
    x, y = [generator.normal(size=(6, n)) for n in (4, 7)], [generator.normal(size=(6, n)) for n in (5, 3)]
    for statistic in (stats.iqm, stats.mean, stats.median, stats.optimality_gap):
        apart = [statistic([task[i] for task in x]) for i in range(6)]
        assert statistic(x) == pytest.approx(apart)
    apart = [stats.probability_of_improvement([t[i] for t in x], [t[i] for t in y]) for i in range(6)]
    assert stats.probability_of_improvement(x, y) == pytest.approx(apart)


def every_sample(tasks):
    """All equally likely stratified bootstrap samples: each task's runs drawn again, with replacement."""
    choices = [list(itertools.product(task, repeat=len(task))) for task in tasks]
    return [[np.array(task) for task in sample] for sample in itertools.product(*choices)]


def exact(values, share):
    """The inverse of the distribution function, and how far `share` is from the next jump of it."""
    values = sorted(values)
    position = share * len(values)
    jumps = [i for i in range(1, len(values)) if values[i] > values[i - 1] + 1e-12]
    return values[int(position)], min(abs(jump - position) / len(values) for jump in jumps)


@pytest.mark.parametrize("statistic", [stats.iqm, stats.mean, stats.median])
@pytest.mark.parametrize("tasks", [[[0.0, 1, 5, 7]], [[0.0, 1], [10.0, 12, 20]], [[1.0, 4, 4, 9, 2]]])
def test_the_interval_is_that_of_every_bootstrap_sample(statistic, tasks):
    tasks = [np.array(task) for task in tasks]
    values = [float(statistic(sample)) for sample in every_sample(tasks)]
    checked = 0
    for level in (0.5, 0.7, 0.8, 0.9, 0.95):
        low, high = stats.interval(statistic, tasks, reps=40_000, level=level)
        for bound, share in ((low, (1 - level) / 2), (high, (1 + level) / 2)):
            expected, margin = exact(values, share)
            if margin > 0.01:  # 40,000 draws know a distribution function to 0.0022 (a standard deviation) or better
                checked += 1
                assert bound == pytest.approx(expected), (level, share)
    assert checked >= 3


def test_two_arms_are_drawn_independently():
    x, y = [np.array([1.0, 2.0])], [np.array([1.0, 2.0])]
    values = [
        float(stats.probability_of_improvement(a, b)) for a in every_sample(x) for b in every_sample(y)
    ]  # 0 with probability 1/16; drawn together it would never be 0
    assert min(values) == 0 and values.count(0) / len(values) == 1 / 16
    low, high = stats.interval(stats.probability_of_improvement, x, y, reps=5000, level=0.9)
    assert (low, high) == (0, 1)


def test_one_run_has_no_interval():
    assert np.isnan(stats.interval(stats.iqm, [np.array([3.0])], reps=100)).all()
    assert np.isnan(stats.interval(stats.iqm, [np.array([3.0]), np.array([4.0])], reps=100)).all()
    assert stats.interval(stats.iqm, [np.array([3.0]), np.array([4.0, 5.0])], reps=100)[0] == pytest.approx(11 / 3)


def test_many_runs_are_drawn_in_parts(monkeypatch):
    scores = [np.arange(8.0), np.arange(5.0) * 2]
    monkeypatch.setattr(stats, "CELLS", 13 * 7)  # 7 draws at once, and 3 left over
    low, high = stats.interval(lambda tasks: tasks[0].mean(axis=-1), scores, reps=6000, level=0.9)
    assert (low, high) == pytest.approx((3.5 - 1.645 * 2.291 / 8**0.5, 3.5 + 1.645 * 2.291 / 8**0.5), abs=0.12)
    shapes = []
    stats.interval(lambda tasks: shapes.append(tasks[0].shape) or tasks[0].mean(axis=-1), scores, reps=24)
    assert shapes == [(7, 8), (7, 8), (7, 8), (3, 8)]


def test_a_band_is_the_interval_at_each_point():
    generator = np.random.default_rng(3)
    curves = generator.normal(size=(6, 9)).cumsum(axis=1)
    curves[2, 5:] = np.nan  # a run that ended early
    curves[:, 8] = np.nan
    curves[0, 8] = 1.0  # one run alone
    curves[:, 0] = np.nan
    band = stats.band(curves, stats.mean, reps=4000)
    assert np.isnan(band[:, 0]).all()
    assert band[0, 8] == 1.0 and np.isnan(band[1:, 8]).all()
    for point in range(1, 8):
        there = curves[:, point][~np.isnan(curves[:, point])]
        assert band[0, point] == pytest.approx(sum(there) / len(there))
        low, high = stats.interval(stats.mean, [there], reps=4000, seed=1)
        spread = there.max() - there.min()
        assert band[1:, point] == pytest.approx([low, high], abs=0.06 * spread)


def test_a_band_in_parts_is_the_same_band(monkeypatch):
    curves = np.random.default_rng(3).normal(size=(6, 9))
    whole = stats.band(curves, stats.iqm, reps=500)
    monkeypatch.setattr(stats, "CELLS", 500 * 6 * 2)
    assert np.array_equal(stats.band(curves, stats.iqm, reps=500), whole)


@pytest.mark.parametrize("name", RLIABLE["tables"])
def test_numbers_are_those_of_rliable(name):
    table = RLIABLE["tables"][name]
    x, y = (list(np.array(table[arm]).T) for arm in "xy")
    for statistic, point in table["points"].items():
        function = getattr(stats, statistic)
        arms = (x, y) if statistic == "probability_of_improvement" else (x,)
        assert function(*arms) == pytest.approx(point)
        theirs = table["intervals"][statistic]
        ours = stats.interval(function, *arms, reps=20_000)
        # Two bootstraps of 20,000 draws differ in a 2.5 % quantile by about 1 % of the interval's length.
        assert ours == pytest.approx(theirs, abs=0.04 * (theirs[1] - theirs[0])), statistic


def test_rliable_where_it_imports():
    try:
        from rliable import metrics
    except (ImportError, TypeError) as error:  # arch 7.2 raises TypeError with pandas 3
        pytest.skip(f"rliable does not import here ({error}); rliable_numbers.json has what it said elsewhere")
    for seed in range(20):
        scores = np.random.default_rng(seed).normal(size=(4 + seed % 5, 1 + seed % 3))
        others = np.random.default_rng(seed + 50).normal(size=(6, 1 + seed % 3))
        tasks = list(scores.T)
        for name in ("iqm", "mean", "median", "optimality_gap"):
            assert getattr(stats, name)(tasks) == pytest.approx(getattr(metrics, f"aggregate_{name}")(scores))
        theirs = metrics.probability_of_improvement(scores, others)
        assert stats.probability_of_improvement(tasks, list(others.T)) == pytest.approx(theirs)
