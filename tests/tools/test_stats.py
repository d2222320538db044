"""The statistics against sorting by hand, counting pairs, enumerating every bootstrap sample, and rliable itself."""

import itertools
import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest
from conftest import HELPERS, ROOT

from common.tools import stats
from common.tools.launch import check_results

RLIABLE = json.loads((HELPERS / "rliable_numbers.json").read_text())


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
        assert stats.iqm(tasks) == pytest.approx(by_hand(pooled))


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
    apart = [stats.iqm([task[i] for task in x]) for i in range(6)]
    assert stats.iqm(x) == pytest.approx(apart)
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


def mean(tasks):
    return np.mean([scores.mean(axis=-1) for scores in tasks], axis=0)


@pytest.mark.parametrize("statistic", [stats.iqm, mean])
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


def test_two_groups_are_drawn_independently():
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
    band = stats.band(curves, mean, reps=4000)
    assert np.isnan(band[:, 0]).all()
    assert band[0, 8] == 1.0 and np.isnan(band[1:, 8]).all()
    for point in range(1, 8):
        there = curves[:, point][~np.isnan(curves[:, point])]
        assert band[0, point] == pytest.approx(sum(there) / len(there))
        low, high = stats.interval(mean, [there], reps=4000, seed=1)
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
    x, y = (list(np.array(table[group]).T) for group in "xy")
    for statistic, point in table["points"].items():
        function = getattr(stats, statistic)
        groups = (x, y) if statistic == "probability_of_improvement" else (x,)
        assert function(*groups) == pytest.approx(point)
        theirs = table["intervals"][statistic]
        ours = stats.interval(function, *groups, reps=20_000)
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
        assert stats.iqm(tasks) == pytest.approx(metrics.aggregate_iqm(scores))
        theirs = metrics.probability_of_improvement(scores, others)
        assert stats.probability_of_improvement(tasks, list(others.T)) == pytest.approx(theirs)


def ways(old, new):
    """Difference of means of every assignment of the scores to the two names, as often as there are orders of them."""
    scores = [Fraction(score) for score in (*new, *old)]
    m = len(new)
    return [
        sum(order[:m]) / m - sum(order[m:]) / (len(order) - m)  # one entry each for many equal arrangements: no matter
        for order in itertools.permutations(scores)
    ]


@pytest.mark.parametrize("shape", [(1, 3), (3, 3), (4, 3), (2, 5), (5, 1)])
@pytest.mark.parametrize("kind", ["distinct", "ties", "constant"])
def test_the_permutation_test_against_all_orders_in_fractions(shape, kind):
    generator = np.random.default_rng(sum(shape))
    scores = {"distinct": generator.normal(size=8), "ties": generator.integers(0, 3, 8), "constant": np.full(8, 0.1)}
    old, new = scores[kind][: shape[0]], scores[kind][8 - shape[1] :]
    differences = ways(old, new)
    observed = sum(map(Fraction, new)) / len(new) - sum(map(Fraction, old)) / len(old)
    found = stats.permutation(old, new, 0.1)
    assert found.difference == pytest.approx(float(observed))
    assert found.worse == pytest.approx(sum(d <= observed for d in differences) / len(differences))
    assert found.better == pytest.approx(sum(d >= observed for d in differences) / len(differences))


@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (2, 5)])
@pytest.mark.parametrize("level", [0.05, 0.1, 0.3])
def test_its_bounds_are_the_shifts_it_does_not_reject(shape, level):
    """Just inside the interval the brute force does not reject a shift, just outside it does, on either side."""
    generator = np.random.default_rng(8)
    old, new = (generator.normal(size=size).round(2) for size in shape)

    def share(shift, sign):
        moved = [sign * (Fraction(float(score)) - Fraction(shift)) for score in new]
        there = [sign * Fraction(float(score)) for score in old]
        differences = ways(there, moved)
        observed = sum(moved) / len(moved) - sum(there) / len(there)
        return sum(d <= observed for d in differences) / len(differences)

    found = stats.permutation(old, new, level)
    if stats.runs_needed(shape[0], level) > shape[1]:
        assert (found.low, found.high) == (-np.inf, np.inf) and share(1e6, 1) > level
        return
    for bound, outwards, sign in ((found.high, 1e-6, 1), (found.low, -1e-6, -1)):
        assert share(bound + outwards, sign) <= level < share(bound - outwards, sign)


@pytest.mark.parametrize(("old", "new"), [((10, 0), (5, 4)), ((10, 0), (5, 3)), ((10, 1), (5, 4)), ((20, 1), (5, 4))])
def test_of_seeds_that_fail_or_not_it_is_fishers_exact_test(old, new):
    """(seeds, failures): the hypergeometric tail."""
    seeds, failures = old[0] + new[0], old[1] + new[1]
    tail = sum(
        math.comb(failures, k) * math.comb(seeds - failures, new[0] - k)
        for k in range(new[1], min(failures, new[0]) + 1)
    ) / math.comb(seeds, new[0])
    scores = [[500.0] * (n - bad) + [143.8] * bad for n, bad in (old, new)]
    assert stats.permutation(*scores, 0.01).worse == pytest.approx(tail)
    assert (tail <= 0.01) == ((old, new) in [((10, 0), (5, 4)), ((20, 1), (5, 4))])


def test_of_too_many_ways_some_are_drawn():
    """Against the exact answer, which is within 5 standard errors of the draws'."""
    generator = np.random.default_rng(3)
    old, new = generator.normal(size=9), generator.normal(size=8) - 1.5
    exact, drawn = stats.permutation(old, new, 0.01), stats.permutation(old, new, 0.01, most=20_000)
    assert 0.01 < exact.worse < 0.2 and drawn.worse != exact.worse
    for p, q in ((exact.worse, drawn.worse), (exact.better, drawn.better)):
        assert abs(p - q) < 5 * math.sqrt(p * (1 - p) / 20_000)
    assert drawn.low == pytest.approx(exact.low, abs=0.1) and drawn.high == pytest.approx(exact.high, abs=0.1)
    # However far apart, the probability is never below that of the observed way itself.
    assert stats.permutation([1.0] * 30, [0.0] * 30, 0.01, most=1000).worse == 1 / 1000


def failures(old, new, level):
    """How many rows of old [rows, n] and new [rows, m] scores FAIL, by another way: the rank of a sum among all."""
    scores = np.concatenate([old, new], axis=1)
    chosen = np.zeros((math.comb(scores.shape[1], new.shape[1]), scores.shape[1]))
    for row, indices in zip(chosen, itertools.combinations(range(scores.shape[1]), new.shape[1]), strict=True):
        row[list(indices)] = 1
    sums = scores @ chosen.T
    return ((sums <= new.sum(axis=1, keepdims=True) + 1e-6).mean(axis=1) <= level).sum()


SKEWED = [lambda g, size: g.normal(size=size), lambda g, size: np.where(g.random(size) < 0.1, 143.8, 500.0)]
SKEWED += [lambda g, size: np.minimum(480 + 30 * g.exponential(size=size), 500), lambda g, size: np.full(size, 500.0)]


@pytest.mark.parametrize("draw", SKEWED, ids=["normal", "one in ten fails", "capped", "constant"])
@pytest.mark.parametrize(("n", "m"), [(5, 5), (10, 5), (3, 7)])
def test_a_script_that_learns_as_before_fails_in_no_more_than_1_percent(draw, n, m):
    generator, rows = np.random.default_rng(n), 300
    old, new = draw(generator, (rows, n)), draw(generator, (rows, m))
    found = sum(stats.permutation(*pair, 0.01).worse <= 0.01 for pair in zip(old, new, strict=True))
    assert found == failures(old, new, 0.01)
    old, new = draw(generator, (8000, n)), draw(generator, (8000, m))
    rate, error = failures(old, new, 0.01) / 8000, math.sqrt(0.01 * 0.99 / 8000)
    assert rate <= 0.01 + 4 * error
    if draw is SKEWED[0]:  # without ties the rate is the share of the ways that are rejected
        ways = math.comb(n + m, m)
        assert abs(rate - math.floor(0.01 * ways) / ways) < 4 * error


PAGE = (ROOT / "docs" / "many-runs.md").read_text()
POWER = re.findall(r"^\| (\d+) \| (\d+) \| (\d\.\d) \|$", PAGE, re.M)  # stored seeds, new seeds, drop


@pytest.mark.parametrize(("n", "m", "drop"), POWER)
def test_the_drop_that_is_found_in_four_of_five_cases(n, m, drop):
    """What docs/many-runs.md, and with its numbers the help of check-results, say of normal scores."""
    assert f" {drop} " in check_results.__doc__ and len(POWER) == 4
    n, m, drop = int(n), int(m), float(drop)
    generator, rows = np.random.default_rng(0), 4000
    old, new = generator.normal(size=(rows, n)), generator.normal(size=(rows, m)) - drop
    assert 0.78 < failures(old, new, 0.01) / rows < 0.83
    some = range(200)
    assert failures(old[some], new[some], 0.01) == sum(
        stats.permutation(old[i], new[i], 0.01).worse <= 0.01 for i in some
    )


def test_how_many_runs_it_takes():
    """The smallest p of n beside m runs is one way of all."""
    for n, level in itertools.product(range(1, 12), (0.01, 0.05, 0.2)):
        m = stats.runs_needed(n, level)
        far = [stats.permutation([1.0] * n, [0.0] * size, level).worse <= level for size in (m, m - 1) if size]
        assert far == [True, False][: len(far)]
        for size in range(15):
            few = stats.too_few(size, n, level)
            assert bool(few) == (size < m) and (not few or few.startswith(f"{size} beside {n} runs are too few"))
    assert "cannot reach p = 0.01; it can with 5 beside 5" in stats.too_few(4, 4)
    assert "cannot reach p = 0.05; it can with 3 beside 3" in stats.too_few(2, 2, 0.05)
    assert [stats.runs_needed(n, 0.01) for n in (1, 2, 3, 5)] == [99, 13, 7, 4]
