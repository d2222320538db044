"""python -m common sweep: the space that is meant, every trial once whatever is killed, and an honest end."""

import collections
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tooling import FORK, run_dirs, started, starts, tool, until

from common.tools import stats
from common.tools.launch import sweep
from common.tools.launch.cli import ask
from common.tools.launch.search_space import Dimension, flags, product, read_space

optuna = pytest.importorskip("optuna", reason="extra sweep")
scipy_stats = pytest.importorskip("scipy.stats", reason="extra sweep")
TYPES = ask(FORK, [[]])[0]


def score(learning_rate, gamma, seed):
    """What quick_fork.py's docstring says."""
    return -((math.log10(learning_rate) + 3) ** 2) - 10 * (gamma - 0.9) ** 2 + seed / 1000


def space(*search, fixed=()):
    return read_space(FORK, list(fixed), TYPES, search)


def results(cwd):
    (path,) = cwd.glob("runs/*.sweep/results.json")
    return json.loads(path.read_text())


def trials(cwd):
    """(slot, state) of every trial in the study, failed attempts too."""
    (path,) = cwd.glob("runs/*.sweep/study.db")
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    name = min(optuna.get_all_study_names(storage), key=len)
    return [(t.user_attrs["slot"], t.state.name, t) for t in optuna.load_study(study_name=name, storage=storage).trials]


@pytest.fixture
def fork(tmp_path):
    shutil.copy(FORK, tmp_path / "my_fork.py")
    return tmp_path


# --- what is searched


def test_a_space_is_what_it_says():
    found = space(
        "learning_rate=1e-4..1e-2:log",
        "gamma=0.9,0.95,0.990",
        "num_steps=8..2_000:log:4",
        "norm_adv=true,False",
        "hidden_sizes=64 64,128,  32  16 8",
        "target-kl=None,0.02",
        "total_timesteps=1e1,20",
        "kind=plain,refuses",
    )
    assert found == [
        Dimension("learning_rate", low=1e-4, high=1e-2, log=True),
        Dimension("gamma", (0.9, 0.95, 0.99), (0.9, 0.95, 0.99)),
        Dimension("num_steps", low=8, high=2000, log=True, points=4),
        Dimension("norm_adv", (True, False), (True, False)),
        Dimension("hidden_sizes", ("64 64", "128", "32 16 8"), ([64, 64], [128], [32, 16, 8])),
        Dimension("target_kl", (None, 0.02), (None, 0.02)),
        Dimension("total_timesteps", (10, 20), (10, 20)),
        Dimension("kind", ("plain", "refuses"), ("plain", "refuses")),
    ]
    assert [type(v) for v in found[6].values] == [int, int] and type(found[2].low) is int


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("points", [2, 3, 5, 12])
def test_points_of_a_range_against_numpy(whole, log, points):
    low, high = (3, 17) if whole else (0.003, 17.0)
    expected = (np.geomspace if log else np.linspace)(low, high, points)
    got = Dimension("x", low=low, high=high, log=log, points=points).grid()
    assert got[0] == low and got[-1] == high
    if whole:
        assert got == sorted({round(value) for value in expected}) and all(type(value) is int for value in got)
    else:
        assert got == pytest.approx(expected)


def test_the_flags_of_a_value_are_read_back_as_that_value():
    """Whatever Optuna draws, the script gets that: to the last bit, negative, none, several words."""
    drawn = [
        {"learning_rate": 0.1 + 0.2, "gamma": 1 / 3, "num_steps": 17, "norm_adv": False},
        {"learning_rate": 5e-324, "norm_adv": True, "target_kl": None, "hidden_sizes": "32 16 8"},
        {"offset": -1.5e-7, "hidden_sizes": "128", "kind": "fails"},
    ]
    for params, answer in zip(drawn, ask(FORK, [flags(params) for params in drawn])[1], strict=True):
        assert answer.error is None
        expected = {k: [*map(int, v.split())] if k == "hidden_sizes" else v for k, v in params.items()}
        assert {name: answer.args[name] for name in params} == expected


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("low", "high"), [(1e-5, 1e-1), (2, 9)])
def test_draws_are_even_in_the_range_or_in_its_logarithm(log, low, high):
    """Kolmogorov-Smirnov and chi-squared tests against the definition, of the first draw of each of 600 slots."""
    from common.tools.launch.study import sampler

    dimension, values = Dimension("x", low=low, high=high, log=log), []
    for slot in range(600):
        study = optuna.create_study(sampler=sampler("random", 0, 20, slot))
        values.append(dimension.suggest(study.ask()))
    assert low <= min(values) and max(values) <= high
    if isinstance(low, int):
        # Optuna's: a logarithmic range of whole numbers is that of [low - 0.5, high + 0.5], rounded.
        edges = np.arange(low, high + 2) - 0.5
        share = np.diff(np.log(edges) if log else edges)
        expected = 600 * share / share.sum()
        assert scipy_stats.chisquare(np.histogram(values, edges)[0], expected).pvalue > 0.001
    else:
        position = [(math.log(v / low) / math.log(high / low)) if log else (v - low) / (high - low) for v in values]
        assert len(set(values)) == 600 and scipy_stats.kstest(position, "uniform").pvalue > 0.001


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--search", "learning_rat=1,2"], "did you mean learning_rate?"),
        (["--search", "zzz=1"], "my_fork.py has no such argument\n"),
        (["--search", "learning_rate"], "not of the form"),
        (["--search", "learning_rate=1e-4,"], "empty value"),
        (["--search", "learning_rate=1e-4..x"], "does not accept x"),
        (["--search", "learning_rate=1e-2..1e-4"], "is empty"),
        (["--search", "gamma=0..1:log"], "begins above 0"),
        (["--search", "learning_rate=0..1:lg"], "a range is low..high"),
        (["--search", "gamma=0.9,1.5"], "--gamma must be between 0 and 1, not 1.5"),
        (["--search", "gamma=0.9..1.5"], "--gamma must be between 0 and 1, not 1.5"),
        (["--search", "gamma=0.9,0.90"], "lists a value twice"),
        (["--search", "gamma=0.9,1", "gamma=0.9"], "names gamma twice"),
        (["--search", "num_steps=1.5,2"], "does not accept 1.5"),
        (["--search", "norm_adv=true,2"], "neither true nor false"),
        (["--search", "norm_adv=0..1"], "has no meaning"),
        (["--search", "hidden_sizes=1..2"], "has no meaning"),
        (["--search", "kind=plain,other"], "does not accept other"),
        (["--search", "seed=1,2"], "no hyperparameter"),
        (["--search", "gamma=0.9..0.99", "--method", "grid"], "a grid needs a number of points, as in 0.9..0.99:5"),
        (["--search", "gamma=0.9..0.99:1", "--method", "grid"], "at least 2 points"),
        (["--search", "gamma=0.9..0.99:5"], "leave out :5"),
        (["--search", "gamma=0.9,1", "--method", "grid", "--trials", "3"], "this grid has 2 points"),
        (["--search", "gamma=0.9,1", "--name", "a/b"], "--name 'a/b' names a folder"),
        (["--search", "gamma=0.9,1", "--trials", "0"], "--trials must be at least 1"),
        (["--search", "gamma=0.9,1", "--fresh-seeds", "3-5"], "the winner was chosen on those"),
        (["--search", "gamma=0.9,1", "--", "--gamma", "0.5"], "searched, and fixed"),
        (["--search", "gamma=0.9,1", "--", "--eval-episodes", "0"], "nothing to judge"),
        (["--search", "gamma=0.9,1", "--", "--lerning-rate", "0.5"], "--learning-rate"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(fork, words, said):
    done = tool("sweep", "my_fork.py", *words, cwd=fork, check=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr
    assert not run_dirs(fork)


# --- the search


def test_a_grid_is_its_product_each_once_and_the_end_is_honest(fork):
    search = ["learning_rate=1e-4..1e-2:log:3", "hidden_sizes=64 64,32"]
    words = ["sweep", "my_fork.py", "--search", *search, "--method", "grid", "--seeds", "1,4", "--no-prune"]
    done = tool(*words, "--fresh-seeds", "11-15", "--workers", "2", "--json", "all.json", cwd=fork)
    found = results(fork)
    assert json.loads((fork / "all.json").read_text()) == found
    expected = set(itertools.product([1e-4, 1e-3, 1e-2], ["64 64", "32"]))
    got = [(round(math.exp(math.log(p["learning_rate"])), 12), p["hidden_sizes"]) for p in
           (trial["params"] for trial in found["trials"])]  # fmt: skip
    assert set(got) == expected and len(got) == 6
    for trial in found["trials"]:
        p = trial["params"]
        each = [score(p["learning_rate"], 0.99, seed) for seed in (1, 4)]
        assert trial["values"] == pytest.approx(each) and trial["value"] == pytest.approx(sum(each) / 2)
    facts = [json.loads((path / "args.json").read_text()) for path in run_dirs(fork)]
    assert collections.Counter(fact["seed"] for fact in facts) == {1: 6, 4: 6, **dict.fromkeys(range(11, 16), 2)}
    assert {fact["wandb_group"] for fact in facts} == {"sweep_my_fork_CartPole-v1_grid"}
    assert {tuple(fact["wandb_tags"]) for fact in facts if fact["seed"] < 11} == {
        ("sweep", f"trial-{i}") for i in range(6)
    }
    assert {fact["hidden_sizes"].__repr__() for fact in facts} == {"[64, 64]", "[32]"}
    # The winner is the best of the closed form, and only it and the defaults are run on fresh seeds.
    assert found["winner"]["learning_rate"] == pytest.approx(1e-3)
    assert found["fresh"]["winner"] == pytest.approx([score(1e-3, 0.99, seed) for seed in range(11, 16)])
    assert found["fresh"]["defaults"] == pytest.approx([score(1e-2, 0.99, seed) for seed in range(11, 16)])
    assert "The winner beats the defaults on fresh seeds: difference +1, 95" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert found["verdict"]["text"] in " ".join(done.stdout.split()) and found["verdict"]["P(better)"] == 1
    assert found["verdict"]["difference"] == pytest.approx(1) and found["verdict"]["interval"][0] > 0.9
    (folder,) = (fork / "runs").glob("*.sweep")
    assert "| 6 |" not in (folder / "report.md").read_text() and (folder / "report.md").read_text().count("\n| ") == 8


def searched(tmp_path, method, count):
    """The learning rates that `count` trials draw one after the other, each told its score."""
    from common.tools.launch.study import Queue

    args = sweep.Args(FORK, ("learning_rate=1e-5..1e-1:log",), method=method, trials=count)
    folder = tmp_path / method
    folder.mkdir()
    dimensions = space("learning_rate=1e-5..1e-1:log")
    search = sweep.Sweep(args, folder, method, [], {"env_id": "x"}, dimensions, [1])
    queue = Queue(search, method, [{"slot": i, "fixed": {}, "seeds": [1]} for i in range(count)])
    rates = []
    while (trial := queue.take()) is not None:
        rates.append(dimensions[0].suggest(trial))
        queue.tell(trial, "COMPLETE", score(rates[-1], 0.9, 0))
    return np.log10(rates)


def test_bayesian_search_learns_from_every_trial_so_far(tmp_path):
    blind = searched(tmp_path, "random", 30)
    tpe, gp = searched(tmp_path, "tpe", 30), searched(tmp_path, "gp", 14)
    assert len(blind) == len(tpe) == 30
    assert np.array_equal(tpe[:5], blind[:5])  # drawn before there is anything to learn from
    # The best is at -3, of a range from -5 to -1 in which random draws are 1 away from it on average. Optuna's own loop
    # with its TPE comes to 0.50 to 0.67 (6 seeds).
    away = [np.abs(rates + 3).mean() for rates in (blind, tpe[15:], gp[7:])]
    assert 0.7 < away[0] < 1.3
    assert away[1] < 0.75 and away[2] < 0.2


@pytest.mark.parametrize(
    "method", ["tpe", pytest.param("random", marks=pytest.mark.slow), pytest.param("gp", marks=pytest.mark.slow)]
)
def test_a_search_makes_as_many_trials_as_asked_for_and_more_can_be_added(fork, method):
    words = ["sweep", "my_fork.py", "--search", "learning_rate=1e-5..1e-1:log", "gamma=0.9,0.95", "--method", method]
    words += ["--seeds", "1", "--fresh-seeds", "5", "--no-prune", "--workers", "2"]
    tool(*words, "--trials", "3", cwd=fork)
    first = {trial["trial"]: trial for trial in results(fork)["trials"]}
    tool(*words, "--trials", "5", cwd=fork)
    found = results(fork)
    assert sorted(trial["trial"] for trial in found["trials"]) == list(range(5))
    assert all(first[trial["trial"]] == trial for trial in found["trials"] if trial["trial"] < 3)
    rates = [trial["params"]["learning_rate"] for trial in found["trials"]]
    # A Gaussian process may rightly go to the end of a range twice.
    assert len(set(rates)) >= (4 if method == "gp" else 5) and all(1e-5 <= rate <= 1e-1 for rate in rates)
    best = max(score(t["params"]["learning_rate"], t["params"]["gamma"], 1) for t in found["trials"])
    winner = found["winner"]
    assert score(winner["learning_rate"], winner["gamma"], 1) == pytest.approx(best)
    # Another search under the same name is refused, whatever differs.
    other_method = "random" if method == "tpe" else "tpe"
    for other in (["--seeds", "2"], ["--method", other_method], ["--search", "gamma=0.9,0.95"], ["--search-seed", "7"]):
        changed = [*words, *other, "--name", f"sweep_my_fork_CartPole-v1_{method}"]
        done = tool(*changed, cwd=fork, check=2)
        assert "choose another --name" in done.stderr
    with (fork / "my_fork.py").open("a") as file:
        file.write("# changed\n")
    assert "begun with another source" in tool(*words, cwd=fork, check=2).stderr


def test_a_second_command_is_refused_while_the_first_works(fork):
    words = ["sweep", "my_fork.py", "--search", "gamma=0.9,0.95", "--method", "grid", "--seeds", "1"]
    with started(*words, "--", "--pause", "0.2", cwd=fork):
        until(lambda: run_dirs(fork))
        assert "another process works at runs/sweep_my_fork_" in tool(*words, cwd=fork, check=2).stderr


def test_killed_again_and_again_it_goes_on(fork):
    """Fault 48: trials are queued again and resume their runs; each is completed once."""
    words = ["sweep", "my_fork.py", "--search", "gamma=0.9,0.95,0.99", "--method", "grid", "--seeds", "1-2"]
    words += ["--fresh-seeds", "5", "--workers", "2", "--no-prune", "--", "--pause", "0.05"]
    for kills in range(3):
        with started(*words, cwd=fork) as process:
            until(lambda n=kills: sum(len(starts(path)) for path in run_dirs(fork)) > 2 * n)
            time.sleep(0.2 * kills)
            process.kill()
    (fork / "hurry").touch()
    tool(*words, cwd=fork)
    found = sorted(results(fork)["trials"], key=lambda trial: trial["trial"])
    assert [(t["params"]["gamma"], t["state"]) for t in found] == [(0.9, "DONE"), (0.95, "DONE"), (0.99, "DONE")]
    for trial in found:
        expected = [score(1e-2, trial["params"]["gamma"], seed) for seed in (1, 2)]
        assert trial["values"] == pytest.approx(expected)
    for path in run_dirs(fork):
        began = [step for step, _, _ in starts(path)]
        assert began[0] == 0 and 0 not in began[1:]
    facts = [json.loads((path / "args.json").read_text()) for path in run_dirs(fork)]
    pairs = collections.Counter((tuple(fact["wandb_tags"]), fact["seed"]) for fact in facts)
    assert set(pairs.values()) == {1} and len(pairs) == 3 * 2 + 2
    states = collections.Counter(state for _, state, _ in trials(fork))
    assert states["COMPLETE"] == 3 and states["FAIL"] >= 2 and set(states) == {"COMPLETE", "FAIL"}


def test_asked_to_stop_it_gives_its_trials_back_and_says_how_to_go_on(fork):
    words = [
        "sweep",
        "my_fork.py",
        "--search",
        "gamma=0.9,0.95",
        "--method",
        "grid",
        "--seeds",
        "1",
        "--fresh-seeds",
        "5",
    ]
    words += ["--workers", "2", "--", "--pause", "0.1"]
    with started(*words, cwd=fork) as process:
        until(lambda: len([p for p in run_dirs(fork) if list(p.glob("checkpoints/*.pt"))]) == 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        assert f"error: stopped by SIGTERM; continue with python -m common {' '.join(words)}\n" in process.said()
    assert sorted(state for _, state, _ in trials(fork)) == ["FAIL", "FAIL", "WAITING", "WAITING"]
    (fork / "hurry").touch()
    tool(*words, cwd=fork)
    assert len(run_dirs(fork)) == 4


def test_a_trial_that_is_not_finite_is_recorded_and_the_sweep_goes_on(fork):
    """Fault 49."""
    words = ["sweep", "my_fork.py", "--search", "learning_rate=0.9,0.001", "--method", "grid", "--seeds", "1-2"]
    done = tool(*words, "--fresh-seeds", "5-6", cwd=fork)
    bad, good = sorted(results(fork)["trials"], key=lambda trial: trial["trial"])
    assert bad["state"] == "PRUNED" and bad["value"] is None and good["state"] == "DONE"
    assert bad["error"].startswith("exit 4: error: losses/policy_loss is nan at step 5")
    assert "trial 0 (learning_rate=0.9): pruned, exit 4: error: losses/policy_loss is nan" in done.stdout
    assert results(fork)["winner"] == {"learning_rate": 0.001}
    assert [state for _, state, _ in trials(fork)] == ["PRUNED", "COMPLETE"]  # and was not tried again


def test_if_no_trial_comes_to_its_end_it_says_so(fork):
    words = ["sweep", "my_fork.py", "--search", "learning_rate=0.9,0.8", "--method", "grid", "--seeds", "1"]
    done = tool(*words, cwd=fork, check=4)
    assert done.stderr.startswith("error: no trial was completed; the last: exit 4: error: losses/policy_loss is nan")


def test_failed_trials_are_tried_again_but_not_for_ever(fork):
    words = ["sweep", "my_fork.py", "--search", "kind=plain,crashes_once,fails,refuses", "--method", "grid"]
    done = tool(*words, "--seeds", "1", "--fresh-seeds", "5-6", "--retries", "2", cwd=fork)
    states = collections.defaultdict(list)
    for slot, state, _ in trials(fork):
        states[slot].append(state)
    # Arguments that the script refuses (exit 2) are not tried again: they will not fit the next time.
    assert states == {0: ["COMPLETE"], 1: ["FAIL", "COMPLETE"], 2: ["FAIL"] * 3, 3: ["FAIL"]}
    assert "failed: trial 2: exit 1: error: RuntimeError: a bug in the fork" in done.stdout
    assert "failed: trial 3: exit 2: error: these do not fit together" in done.stdout
    assert len(starts(next(p for p in run_dirs(fork) if "crashes_once" in (p / "args.json").read_text()))) == 2


def test_trials_below_the_median_are_pruned_after_a_seed(fork):
    """In turn: five that are not judged, then one above their median, one below it, and one above."""
    rates = [1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 1.5e-3, 1e-1, 2.5e-3]
    words = ["sweep", "my_fork.py", "--search", f"learning_rate={','.join(map(str, rates))}", "--method", "grid"]
    words += ["--seeds", "1-3", "--fresh-seeds", "5", "--name", "mine"]
    done = tool(*words, cwd=fork)
    found = sorted(results(fork)["trials"], key=lambda trial: trial["trial"])
    assert [trial["state"] for trial in found] == ["DONE"] * 6 + ["PRUNED", "DONE"]
    assert f"trial 6 (learning_rate=0.1): {score(1e-1, 0.99, 1):.5g}, pruned after 1 of 3 seeds\n" in done.stdout
    assert found[6]["values"] == pytest.approx([score(1e-1, 0.99, 1)]) and found[6]["value"] is None
    facts = [json.loads((path / "args.json").read_text()) for path in run_dirs(fork)]
    assert [fact["seed"] for fact in facts if fact["learning_rate"] == 0.1] == [1]
    assert {fact["wandb_group"] for fact in facts} == {"mine"} and (fork / "runs" / "mine.sweep").is_dir()
    # What was reported is the mean of the scores so far.
    (trial,) = [trial for slot, _, trial in trials(fork) if slot == 0]
    assert trial.intermediate_values == pytest.approx({n: score(1e-3, 0.99, (n + 1) / 2) for n in (1, 2)})


def test_if_the_defaults_win_nothing_is_compared(fork):
    words = ["sweep", "my_fork.py", "--search", "gamma=0.99,0.95", "--method", "grid", "--seeds", "1"]
    done = tool(*words, "--fresh-seeds", "5-6", "--", "--learning-rate", "1e-3", cwd=fork)
    assert "winner is the defaults" not in done.stdout  # 0.95 is better
    words[3] = "gamma=0.99,0.1"
    done = tool(*words, "--fresh-seeds", "5-6", "--name", "again", cwd=fork)
    assert "The winner is the defaults. On the fresh seeds 5-6: -1.0755 ± 0.000707." in done.stdout


def test_without_optuna_it_says_what_to_install(fork):
    (fork / "shadow").mkdir()
    (fork / "shadow" / "optuna.py").write_text("raise ImportError('not here', name='optuna')\n")
    done = subprocess.run(
        [sys.executable, "-m", "common", "sweep", "my_fork.py", "--search", "gamma=0.9,1"],
        cwd=fork,
        env={**os.environ, "PYTHONPATH": f"{fork / 'shadow'}{os.pathsep}{os.environ['PYTHONPATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == 'error: sweep needs optuna, which is not installed: pip install -e ".[sweep]"\n'


# --- what the end says


def said(ours, theirs, promised):
    return stats.significance(ours, theirs, promised)["text"]


def test_probability_of_improvement_against_counting():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 9, 7), generator.integers(0, 9, 11)
    wins = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b)
    assert f"probability of improvement {wins / 77:.2f}" in said(a, b, 0.0)
    assert f"probability of improvement {1 - wins / 77:.2f}" in said(b, a, 0.0)


def test_the_sentence_claims_no_more_than_the_interval():
    up, flat, down = [11.0, 12.0, 13.0, 14.0, 15.0], [1.0, 12.0, 19.0, 14.0, 9.0], [1.0, 2.0, 3.0, 4.0, 5.0]
    assert said(up, down, 20.0).startswith("The winner beats the defaults on fresh seeds: difference +10")
    assert said(down, up, 20.0).startswith("The winner is worse than the defaults on fresh seeds")
    assert said(flat, up, 20.0).startswith("These runs do not show that the winner beats the defaults")
    assert "7 of the 20 in the sweep did not replicate" in said(up, down, 20.0)
    assert "in the sweep" not in said(up, down, 12.0)
    for ours, theirs in ((up[:4], down[:4]), (up, [1.0]), ([5.0], [1.0])):
        text = said(ours, theirs, 20.0)
        assert text.startswith("No comparison, difference +") and stats.too_few(len(ours), len(theirs)) in text
        assert "beats" not in text and "probability" not in text


def test_product_is_the_product():
    dimensions = [Dimension("a", (1, 2)), Dimension("b", low=0.0, high=1.0, points=3)]
    assert product(dimensions) == [{"a": a, "b": b} for a in (1, 2) for b in (0.0, 0.5, 1.0)]


def test_no_file_of_a_sweep_has_a_secret_and_two_runs_beside_two_are_no_verdict(fork, monkeypatch):
    secret = "env-9b1f44c0a1/x"
    monkeypatch.setenv("SERVICE_TOKEN", secret)
    source = (fork / "my_fork.py").read_text()
    spoken = (
        "    print('with', os.environ['SERVICE_TOKEN'], flush=True)\n    if args.learning_rate == 2e-3:\n        raise "
    )
    spoken += "RuntimeError(os.environ['SERVICE_TOKEN'])\n"
    (fork / "my_fork.py").write_text(source.replace("    stopped = []\n", f"    stopped = []\n{spoken}"))
    search = "learning_rate=1e-2,1e-3,2e-3"
    words = ["sweep", "my_fork.py", "--search", search, "--method", "grid", "--seeds", "1", "--retries", "0"]
    words += ["--fresh-seeds", "1001-1002", "--workers", "2", "--", "--wandb-notes", secret, "--gamma", "0.92"]
    done = tool(*words, cwd=fork)
    assert "No comparison, difference +1: 2 beside 2 runs are too few" in done.stdout and "beats" not in done.stdout
    files = [path for path in fork.glob("runs/*.sweep/**/*") if path.is_file()]
    assert {"study.db", "report.md", "results.json"} < {path.name for path in files} and secret not in done.stdout
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert sum(b"with [redacted]" in path.read_bytes() for path in files) >= 5
