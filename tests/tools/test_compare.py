"""compare: which runs are found, which are one group, what is computed of them, and what is written."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from common.tools import find_runs
from common.tools.compare import compare, groups, measure, tables

RETURN, EVAL = "charts/episodic_return", "eval/episodic_return"


def make_run(
    folder, name, *, script="dqn", env_id="CartPole-v1", seed=1, episodes=(), evals=(), end=None, finished=True, **facts
):
    """A run directory. `episodes` and `evals` are (step, value); a step takes a hundredth of a second."""
    path = folder / name
    path.mkdir(parents=True)
    total = 1000 if end is None else end
    facts = {"env_id": env_id, "script": script, "seed": seed, "total_timesteps": 1000, "wandb_group": None, **facts}
    (path / "args.json").write_text(json.dumps(facts))
    lines = [(step, {RETURN: value}) for step, value in episodes] + [(step, {EVAL: value}) for step, value in evals]
    lines.append((total, {"losses/td_loss": 0.5}))
    lines.sort(key=lambda line: line[0])
    text = "".join(json.dumps({"global_step": s, "time": s / 100, **row}) + "\n" for s, row in lines)
    (path / "metrics.jsonl").write_text(text)
    if finished:
        (path / "finished.json").write_text("{}")
    return path


def linear(slope, offset=0.0, n=50):
    return [(20 * i, offset + slope * i) for i in range(1, n + 1)]


@pytest.fixture
def folder(tmp_path):
    """dqn with two learning rates on two tasks, and a fork of it on one."""
    where = tmp_path / "runs"
    for seed in (1, 2, 3, 4, 5):
        for env_id, scale in (("CartPole-v1", 10.0), ("Acrobot-v1", 2.0)):
            for rate in (0.1, 0.2):
                value = scale * (seed + (3 if rate == 0.2 else 0))
                make_run(
                    where, f"{env_id}__dqn__{seed}__{rate}", env_id=env_id, seed=seed, learning_rate=rate,
                    gamma=0.9 if env_id == "Acrobot-v1" else 0.99, episodes=linear(value / 50),
                    evals=[(500, value * 2), (1000, value)], track=seed == 1, wandb_group=f"rate {rate}",
                )  # fmt: skip
        value = 10.0 * seed + 1
        make_run(
            where, f"CartPole-v1__my_idea__{seed}", script="my_idea", seed=seed, learning_rate=0.1, gamma=0.99,
            episodes=linear(value / 50), evals=[(1000, value)], beta=7,
        )  # fmt: skip
    return where


def found(words, where):
    return find_runs.find([str(word) for word in words], where)


def run_compare(*words, cwd=None, env=None):
    """Finished within two minutes, or it says where each of its threads stood."""
    command = [sys.executable, "-X", "faulthandler", "-m", "common", "compare", *map(str, words)]
    env = {**os.environ, **(env or {})}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=env)
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        try:
            err = process.communicate(timeout=10)[1]
        except subprocess.TimeoutExpired as late:  # a child of it holds the pipe
            err = str(late.stderr)
        pytest.fail(f"not finished (exit code {process.poll()}):\n{err}")
    assert "Traceback" not in err, err
    return subprocess.CompletedProcess(command, process.returncode, out, err)


# Finding runs


def test_words_mean_folders_runs_scripts_and_groups(folder, tmp_path):
    assert len(found([folder], folder)) == 25
    one = folder / "CartPole-v1__my_idea__3"
    assert [run.path for run in found([one], folder)] == [one]
    assert {run.script for run in found(["anywhere/my_idea.py"], folder)} == {"my_idea"}
    assert {run.config["learning_rate"] for run in found(["rate 0.2"], folder)} == {0.2}
    assert len(found([folder, one, "my_idea.py"], folder)) == 25  # each once
    both = found(["my_idea.py", "algos/dqn.py"], folder)
    assert [run.script for run in both] == ["my_idea"] * 5 + ["dqn"] * 20
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "deep").symlink_to(folder)
    (folder / "back").symlink_to(tmp_path / "more")
    assert len(found([tmp_path / "more"], folder)) == 25


def test_committed_results_are_runs(tmp_path):
    shutil.copytree(make_run(tmp_path / "runs", "a", seed=4, episodes=linear(1), evals=[(1000, 9.5)]), tmp_path / "x")
    target = tmp_path / "results" / "dqn" / "CartPole-v1"
    target.mkdir(parents=True)
    facts = json.loads((tmp_path / "x" / "args.json").read_text())
    (target / "runs.json").write_text(json.dumps([{"seed": 4, "args": facts}]))
    (target / "seed4.jsonl.gz").write_bytes(gzip.compress((tmp_path / "x" / "metrics.jsonl").read_bytes()))
    for word in (tmp_path / "results", target, target / "seed4.jsonl.gz"):
        (run,) = found([word], tmp_path)
        assert run.finished and run.seed() == "4"
        assert run.read([EVAL]).rows[EVAL].tolist() == [[1000], [10], [9.5]]
    committed = ROOT / "runs" / "reference" / "results" / "dqn"
    assert len(found([committed], tmp_path)) == len(list(committed.glob("*/seed*.jsonl.gz"))) > 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "which runs?"),
        (["nothing.py"], 2, "no run of nothing"),
        (["rate 0.3"], 2, "the groups are: rate 0.1, rate 0.2"),
        (["dqn.py", "--runs-dir", "nowhere"], 2, "--runs-dir"),
        (["empty"], 3, "no run below empty"),
        (["a/dqn.py", "b/dqn.py"], 2, "two scripts are named dqn.py"),
        (["runs", "--by", "learnin-rate"], 2, "did you mean learning_rate?"),
        (["runs", "--threshold", "much"], 2, "--threshold much"),
        (["runs", "--threshold", "Pong=3"], 2, "no run is of Pong"),
        (["runs", "--threshold", "nan"], 2, "ENV=NUMBER"),
        (["runs", "--json", "no/where.json"], 6, "there is no folder no for where.json"),
        (["runs", "--metric", "charts/none"], 2, "has logged charts/none"),
        (["runs", "--window", "0"], 2, "--window"),
        (["runs", "--plot", "a.bmp"], 2, ".png, .svg or .pdf"),
        (["runs", "--markdown", "no/where.md"], 6, "no folder no"),
        (["runs", "--x", "days"], 2, "days"),
        (["unfinished", "--finished"], 2, "is finished"),
        (["strange"], 3, "strange is not a run directory"),
        (["broken/seed1.jsonl.gz"], 3, "cannot be read"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, words, code, says, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_run(tmp_path, "unfinished", episodes=linear(1), finished=False)
    (make_run(tmp_path, "strange") / "args.json").write_text("[]")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "runs.json").write_text('[{"seed": 1, "args": {"env_id": "a", "script": "b"}}]')
    (tmp_path / "broken" / "seed1.jsonl.gz").write_bytes(gzip.compress(b"x" * 99)[:15] + b"?" * 9)
    with pytest.raises(SystemExit) as stop:
        compare.main(words)
    error = capsys.readouterr().err
    assert stop.value.code == code, error
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    assert says in error


def test_what_is_not_a_run_is_left_out_with_a_warning(folder, capsys):
    (folder / "torn").mkdir()
    (folder / "torn" / "args.json").write_text('{"env_id": "Cart')
    (folder / "other").mkdir()
    (folder / "other" / "args.json").write_text('{"alpha": 1}')
    assert len(found([folder], folder)) == 25
    assert capsys.readouterr().err.count("is left out") == 2


def test_metrics_of_runs_that_are_not_compared_are_not_opened(folder, monkeypatch, capsys):
    for path in folder.glob("*dqn*"):
        (path / "metrics.jsonl").unlink()
        (path / "metrics.jsonl").mkdir()  # opening it would be an error
    compare.main(["my_idea.py", "--runs-dir", str(folder)])
    assert "my_idea" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compare.main(["dqn.py", "--runs-dir", str(folder)])


def test_reading_a_run_that_is_being_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    row = '{"global_step": 10, "time": 1.5, "a": 2.0, "b": null}\n'
    path.write_text(
        row + '{"global_step": 20, "time"\n' + '{"global_step": 30, "time": 3, "c": 1}\n{"global_step": 40, "a'
    )
    metrics = find_runs.read_lines(path, ["a", "b", "time"])
    assert metrics.rows["a"].tolist() == [[10], [1.5], [2.0]]
    assert metrics.rows["b"].shape == (3, 0)
    assert (metrics.end_step, metrics.end_seconds) == (30, 3)
    assert find_runs.read_lines(tmp_path / "none", ["a"]).rows["a"].shape == (3, 0)


GOOD = [b'{"global_step": %d, "time": %d, "charts/episodic_return": 1}' % (n, n) for n in range(1, 9)]


@pytest.mark.parametrize(
    ("lines", "kept", "said"),
    [
        ([*GOOD, b'{"global_step": 9, "ti'], 8, None),  # killed while it wrote
        ([*GOOD, b"\0" * 900], 8, None),  # the machine lost its power
        ([*GOOD, b"\xff\xfe\x00 \n"], 8, "line 9 is no row of metrics"),
        ([*GOOD[:3], b'{"global_step": 9, "ti' + GOOD[3], *GOOD[4:], b""], 7, "line 4 is no row of metrics"),
        ([*GOOD[:3], b"[" * 9999, b'{"charts/episodic_return": "x"}', b"1" * 2_000_000, *GOOD[3:], b""], 8,
         "line 4 and 2 other lines are no rows of metrics"),
    ],
    ids=["cut", "zeros", "garbage", "joined", "several"],
)  # fmt: skip
def test_rows_before_and_after_a_broken_one_are_read(tmp_path, capsys, lines, kept, said):
    """Fault: a metrics file that a kill or a full disk left; one warning names the file and the line."""
    path = make_run(tmp_path, f"run{said}") / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines))
    for _ in range(2):
        metrics = find_runs.read_lines(path, [RETURN])
        assert metrics.rows[RETURN].shape == (3, kept) and (metrics.end_step, metrics.end_seconds) == (8, 8)
    error = capsys.readouterr().err
    assert error == ("" if said is None else f"warning: {path}: {said}, and left out\n")


def test_thirty_runs_take_less_than_five_seconds(tmp_path, capsys):
    """Of processor time, which does not depend on what else the machine does."""
    for i in range(30):
        episodes = [(10 * n, float(n % 500)) for n in range(1, 5001)]
        facts = {"script": ("dqn", "fork")[i % 2], "env_id": ("CartPole-v1", "Acrobot-v1", "Pendulum-v1")[i % 3]}
        make_run(tmp_path / "runs", f"run{i}", seed=i // 6, episodes=episodes, evals=[(50_000, i)], end=50_000, **facts)
    began = time.process_time()
    compare.main([str(tmp_path / "runs")])
    assert time.process_time() - began < 5
    assert capsys.readouterr().out.count("final score") == 3


# Groups


def labels(found_runs, by=()):
    return {label: sorted(run.name for run in mine) for label, mine in groups.group(found_runs, by).items()}


def test_groups_are_scripts_and_the_hyperparameters_that_differ(folder):
    groups = labels(found([folder], folder))
    assert set(groups) == {"dqn learning_rate=0.1", "dqn learning_rate=0.2", "my_idea"}
    assert [len(mine) for mine in groups.values()] == [10, 10, 5]  # gamma is another on each task: no difference
    assert set(labels(found(["dqn.py", "my_idea.py"], folder), ["script"])) == {"dqn", "my_idea"}
    assert set(labels(found([folder], folder), ["--learning-rate"])) == {"learning_rate=0.1", "learning_rate=0.2"}
    assert set(labels(found([folder], folder), ["env-id", "script"])) == {
        "env_id=CartPole-v1, dqn", "env_id=Acrobot-v1, dqn", "env_id=CartPole-v1, my_idea",
    }  # fmt: skip


def test_groups_and_named_folders_are_groups(folder, tmp_path):
    assert set(labels(found(["rate 0.1", "rate 0.2"], folder))) == {"rate 0.1", "rate 0.2"}
    shutil.copytree(folder, tmp_path / "again")
    groups = labels(found([f"old={folder}", f"new={tmp_path / 'again'}"], folder))
    assert list(groups) == ["old", "new"] and [len(mine) for mine in groups.values()] == [25, 25]
    shutil.move(folder, tmp_path / "first")
    same = found([tmp_path / "first" / "CartPole-v1__my_idea__1", tmp_path / "again"], folder)
    assert len(labels([run for run in same if run.script == "my_idea"])) == 2  # a folder against a run of another


def test_what_only_some_runs_have_makes_no_group(tmp_path):
    make_run(tmp_path, "old", seed=1, gamma=0.9)
    make_run(tmp_path, "new", seed=2, gamma=0.9, n_step=1)
    elsewhere = {"cuda": True, "device": "H100", "eval_episodes": 3, "resume": "x", "parent": {"sha256": "7"}}
    make_run(tmp_path, "elsewhere", seed=3, gamma=0.9, n_step=1, **elsewhere)
    assert set(labels(found([tmp_path], tmp_path))) == {"dqn"}
    make_run(tmp_path, "three", seed=3, gamma=0.9, n_step=3)
    assert set(labels(found([tmp_path], tmp_path))) == {"dqn", "dqn n_step=1", "dqn n_step=3"}


def test_reference_results_are_compared_only_where_they_are_named(tmp_path):
    """`compare runs` in a fresh clone shows the user's runs."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "reference").symlink_to(ROOT / "runs" / "reference")
    mine = make_run(tmp_path / "runs", "mine")
    assert [run.path for run in found([tmp_path / "runs"], tmp_path)] == [mine]
    assert [run.path for run in found(["dqn.py"], tmp_path / "runs")] == [mine]
    assert len(found([tmp_path / "runs" / "reference"], tmp_path)) > 200


def test_labels_are_the_flags_that_differ_never_numbers(tmp_path):
    """All of them where they fit, else as few as it takes."""
    for i, (a, b) in enumerate([(1, 1), (1, 2), (2, 2)]):
        make_run(tmp_path / "few", f"run{i}", gae=a, rate=b)
        more = {f"a_rather_long_hyperparameter_{j}": int(i == 2) for j in range(9)}
        make_run(tmp_path / "many", f"run{i}", the_rate=b, **more)
    assert list(labels(found([tmp_path / "few"], tmp_path))) == [
        "dqn gae=1, rate=1",
        "dqn gae=1, rate=2",
        "dqn gae=2, rate=2",
    ]
    assert list(labels(found([tmp_path / "many"], tmp_path))) == [
        "dqn a_rather_long_hyperparameter_0=0, the_rate=1",
        "dqn a_rather_long_hyperparameter_0=0, the_rate=2",
        "dqn a_rather_long_hyperparameter_0=1, the_rate=2",
    ]


# What is computed


@pytest.mark.parametrize("seed", range(5))
def test_a_point_of_a_curve_is_the_mean_of_its_window(seed):
    generator = np.random.default_rng(seed)
    steps = np.sort(generator.integers(1, 60, 25)).astype(float)
    values = generator.normal(size=25)
    at = np.arange(0, 70, 1.0)
    for window in (1.0, 7.0, 100.0):
        ours = measure.smoothed(steps, values, at, window)
        for g, value in zip(at, ours, strict=True):
            inside = [v for s, v in zip(steps, values, strict=True) if g - window < s <= g]
            before = [v for s, v in zip(steps, values, strict=True) if s <= g]
            expected = sum(inside) / len(inside) if inside else before[-1] if before else float("nan")
            assert value == pytest.approx(expected, nan_ok=True)


def task_of(folder, words=None, *flags, notes=None):
    args = compare.parse(compare.Args, None, [*map(str, words or [folder]), *flags])
    comparison = compare.compare(found(words or [folder], folder), args)
    if notes is not None:
        notes += comparison.notes
    return comparison


def test_final_best_and_the_threshold_by_hand(tmp_path):
    # Returns of 2, 4, 6 ... every 20 steps: the mean of the last 100 steps (5 episodes) at step 20 i is 2 i - 4.
    make_run(tmp_path, "a", seed=1, episodes=linear(2.0), evals=[(300, 80.0), (1000, 70.0)])
    make_run(tmp_path, "b", seed=2, episodes=[(20, 500.0), *linear(2.0)[1:]], evals=[(1000, 60.0)])
    make_run(tmp_path, "c", seed=3, episodes=linear(0.2), evals=[(1000, 5.0)])
    (task,) = task_of(tmp_path, None, "--window", "0.1", "--threshold", "30").tasks
    (cell,) = task.cells.values()
    assert cell.final.tolist() == [70, 60, 5] and [run.best for run in cell.runs] == [80, 60, 5]
    # 2 i - 4 >= 30 from i = 17, step 340. b's lucky first episode is in windows only up to step 100 (i = 1 to 5),
    # whose mean (500 + 4 + 6 + 8 + 10) / 5 is over 30 at step 100, the first whole window.
    assert [run.reached for run in cell.runs] == [(340, 3.4), (100, 1.0), (float("inf"), float("inf"))]
    assert cell.runs[0].curve[-1] == pytest.approx(2 * 50 - 4)
    assert [run.end for run in cell.runs] == [(1000, 10.0)] * 3
    assert compare.half(np.array([340, 100, np.inf])) == 340  # two of three; after 100 steps it was one
    assert compare.half(np.array([340, np.inf])) == 340
    assert compare.half(np.array([5, 340, np.inf, 7])) == 7
    assert compare.half(np.array([np.inf, 340, np.inf])) == np.inf
    assert task.steps[-1] == 1000 and len(task.steps) == 100
    assert cell.band[0, -1] == pytest.approx(np.mean([96.0, 96.0, 9.6]))  # of 3 runs nothing is cut
    assert cell.seconds[1:] == pytest.approx(task.steps[1:] / 100)  # no episode has ended at the first point


def test_curves_end_where_runs_end(tmp_path):
    make_run(tmp_path, "whole", seed=1, episodes=linear(2.0), evals=[(1000, 1.0)])
    make_run(tmp_path, "killed", seed=2, episodes=linear(2.0, n=30), evals=[(500, 9.0)], end=600, finished=False)
    make_run(tmp_path, "young", seed=3, episodes=linear(2.0, n=2), end=50, finished=False)
    make_run(tmp_path, "empty", seed=1, finished=False, end=10)
    notes = []
    (task,) = task_of(tmp_path, notes=notes).tasks
    (cell,) = task.cells.values()
    assert cell.final.tolist() == [9.0, 1.0]
    killed, whole = cell.runs
    assert np.isnan(killed.curve[task.steps > 606]).all() and not np.isnan(killed.curve[2:60]).any()
    assert not np.isnan(whole.curve[2:]).any()
    assert np.array_equal(cell.band[0, 61:], whole.curve[61:]) and np.isnan(cell.band[1, 61:]).all()
    said = "\n".join(notes)
    assert "1 of 2 runs are unfinished, at step 600." in said
    assert f"have not logged {RETURN} yet: empty" in said and f"have not logged {EVAL} yet: young" in said
    assert "seed 1 more than once" in said
    assert "Intervals of fewer than 5 runs" in said
    (cell,) = task_of(tmp_path, [tmp_path / "whole"]).tasks[0].cells.values()
    assert len(cell.runs) == 1


def test_without_evaluations_scores_are_of_the_curve(tmp_path):
    make_run(tmp_path, "a", seed=1, episodes=[(20 * i, 100.0 - abs(i - 25)) for i in range(1, 51)])
    make_run(tmp_path, "b", seed=2, episodes=linear(1.0), evals=[(1000, 999.0)])
    notes = []
    (task,) = task_of(tmp_path, None, "--window", "0.1", notes=notes).tasks
    (cell,) = task.cells.values()
    assert task.score == RETURN
    assert cell.final == pytest.approx([77.0, 48.0])  # of i = 46 .. 50: 79 .. 75; 46 .. 50
    assert cell.runs[0].best == pytest.approx((98 + 99 + 100 + 99 + 98) / 5)
    assert f"1 runs have no {EVAL}" in "\n".join(notes)


def cells_of(table, label):
    return dict(zip(table.header, next(row for row in table.rows if row[0] == label), strict=True))


@pytest.mark.parametrize(
    ("counts", "said"), [((5, 5), True), ((4, 5), True), ((4, 4), False), ((3, 7), True), ((3, 6), False)]
)
def test_too_few_runs_are_not_called_better(tmp_path, counts, said):
    for group, count in zip(("a", "b"), counts, strict=True):
        for seed in range(count):
            value = 1.0 + seed + (group == "b") * 100
            make_run(tmp_path, f"{group}{seed}", script=group, seed=seed, episodes=linear(1), evals=[(1000, value)])
    comparison = task_of(tmp_path)
    (table,) = [table for table in comparison.tables if "final score" in table.title]
    assert cells_of(table, "b")["P(better)"] == ("1.00 [1.00, 1.00]" if said else "-")
    few = f"No P(better): {counts[1]} beside {counts[0]} runs are too few to call one side better: "
    few += "the permutation test cannot reach p = 0.01; it can with 5 beside 5."
    assert (few in comparison.notes) is not said


def test_tables_hold_what_a_hand_would_compute(folder):
    comparison = task_of(folder, ["dqn.py", "my_idea.py"], "--by", "script")
    tables = {table.title: table for table in comparison.tables}
    row = cells_of(tables["CartPole-v1: final score (last greedy evaluation)"], "dqn")
    scores = sorted([10.0 * s for s in (1, 2, 3, 4, 5)] + [10.0 * (s + 3) for s in (1, 2, 3, 4, 5)])
    assert row["runs"] == "10"
    assert float(row["IQM"]) == pytest.approx(np.mean(scores[2:8]))
    assert float(row["median"]) == 45 and float(row["mean"]) == 45
    assert (float(row["lowest"]), float(row["highest"])) == (10, 80)
    assert float(row["best"]) == pytest.approx(2 * np.mean(scores[2:8]))
    row = cells_of(tables["CartPole-v1: final score (last greedy evaluation)"], "my_idea")
    mine = [10.0 * s + 1 for s in (1, 2, 3, 4, 5)]
    share = sum((m > t) + 0.5 * (m == t) for m in mine for t in scores) / 50
    assert row["P(better)"].startswith(f"{share:.2f} [")
    assert cells_of(tables["over tasks (Acrobot-v1, CartPole-v1)"], "my_idea")["tasks in common"] == "1"
    assert not any("fewer than" in note for note in comparison.notes)
    differ = {row[0]: row[1:] for row in tables["what differs"].rows}
    assert differ["beta"] == ["-", "7"] and differ["learning_rate"] == ["0.1, 0.2", "0.1"]
    assert "seed" not in differ and "track" not in differ
    cost = cells_of(tables["Acrobot-v1: what it took"], "dqn")
    assert cost["steps"] == "1,000" and float(cost["seconds"]) == 10 and float(cost["steps/s"]) == 100
    assert cost["reached -100"] == "10 of 10" and cost["steps to it"] == "60"  # the first whole window: 50 steps


def test_gymnasiums_own_threshold_is_the_default(folder):
    thresholds = {task.env_id: task.threshold for task in task_of(folder).tasks}
    assert thresholds == {"CartPole-v1": 475, "Acrobot-v1": -100}
    assert compare.registered_threshold("Nowhere-v7") is None
    assert {t.threshold for t in task_of(folder, None, "--threshold", "5").tasks} == {5}
    flags = ("--threshold", "CartPole-v1=7")
    assert {task.env_id: task.threshold for task in task_of(folder, None, *flags).tasks}["CartPole-v1"] == 7


@pytest.mark.parametrize(
    ("x", "text"),
    [(0, "0"), (500, "500.0"), (12345.6, "12,346"), (-81.394, "-81.39"), (0.12345, "0.1235"), (1e-7, "1e-07"),
     (float("nan"), "-"), (float("inf"), "-")],
)  # fmt: skip
def test_numbers_have_four_digits(x, text):
    assert compare.number(x) == text


# What is written


def test_the_command_writes_tables_figures_and_a_page(folder, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotly")
    files = {kind: tmp_path / f"out.{kind}" for kind in ("md", "png", "html")}
    flags = ("--markdown", files["md"], "--plot", files["png"], "--html", files["html"])
    done = run_compare(ROOT / "algos" / "dqn.py", "my_idea.py", "--by", "script", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "font cache" not in line] == []  # matplotlib's first time
    lines = done.stdout.splitlines()
    assert next(line for line in lines if line.startswith("group")).split()[:3] == ["group", "runs", "IQM"]
    assert lines[-3:] == [str(path) for path in files.values()]
    rows = [line for line in files["md"].read_text().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows[:3]}) == 1 and rows[1].startswith("| --- |")
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert run_compare("runs", "--plot", "a.svg", "--x", "time", cwd=tmp_path).returncode == 0
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_tables_fit_a_terminal_of_120_columns(tmp_path, capsys, monkeypatch):
    """Six groups, long names of runs and environments: nothing is wider, and each name is told from the others.

    Notes fit a narrower terminal as well.
    """
    words = []
    for env_id in ("CarRacing-v3", "ALE/MontezumaRevengeNoFrameskip-v4"):
        for i in range(6):
            name = f"{env_id.replace('/', '-')}__reinforce_rollout__{i}__20261125-105144-abcde{i}"
            facts = {"rate": i, "kwargs": {f"a_long_name_{n}": i for n in range(9)}, "script": "reinforce_rollout"}
            evals = [(1000, -9876.5 + 211 * i)]
            words.append(
                f"{name}={make_run(tmp_path, name, env_id=env_id, episodes=linear(1.0), evals=evals, **facts)}"
            )
    compare.main(words[:6])
    compare.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    notes = ["P(better): how often a run beats another, ties half.", f"\x1b[2J{'x' * 90}"]
    monkeypatch.setenv("COLUMNS", "50")
    assert tables.wrapped(notes).splitlines() == [
        "P(better): how often a run beats another, ties", "  half.", f"?[2J{'x' * 46}", f"  {'x' * 44}",
    ]  # fmt: skip
    indented = tables.wrapped(notes[:1], indent=" " * 6)
    assert indented == f"{' ' * 6}P(better): how often a run beats another,\n{' ' * 8}ties half."
    assert {word.partition("=")[0] for word in words[:6]} <= {line.strip() for line in lines}
    assert any("'a_long_name_8': 5}" in line and "…" in line for line in lines)
    name = "CarRacing-v3__reinforce_rollout__1__20261125-105144-abcdef"
    assert len(tables.shortened(name, 40)) == 40 and tables.shortened(name, 40).startswith("CarRacing-v3_…")
    assert tables.shortened(name, 40).endswith("1__20261125-105144-abcdef") and tables.shortened(name, 58) == name


def test_json_has_the_numbers_of_the_tables(folder, tmp_path):
    shutil.rmtree(folder / "CartPole-v1__my_idea__1")
    make_run(folder, "other", script="other", env_id="CartPole-v1", episodes=linear(1), evals=[(1000, 3.0)])
    words = ("rate 0.1", "my_idea.py", "other.py", "--threshold", "CartPole-v1=25")
    done = run_compare(*words, "--json", "-", cwd=tmp_path)
    assert "CartPole-v1: final score" in done.stderr  # the tables make way
    found = json.loads(done.stdout)
    cartpole = next(task for task in found["tasks"] if task["env_id"] == "CartPole-v1")
    first, mine, other = cartpole["groups"]
    assert (cartpole["score"], cartpole["threshold"], first["group"]) == (EVAL, 25, "dqn")
    assert (first["runs"], first["IQM"], first["lowest"], first["highest"], first["best"]) == (5, 30, 10, 50, 60)
    assert first["interval"][0] < 30 < first["interval"][1] and "P(better)" not in first
    # Curves of slope 0.2 to 1 a step of 20: at the end 10 to 50, so that 3 of 5 come to 25.
    assert first["reached"] == 3 and first["steps"] == 1000 and first["steps_per_second"] == 100
    assert other["reached"] == 0 or other["steps_to_threshold"] is not None
    assert mine["P(better)"] == pytest.approx(sum(m > t for m in (21, 31, 41, 51) for t in (10, 20, 30, 40, 50)) / 20)
    assert "1 beside 5 runs are too few" in other["no_comparison"] and other["interval"] == [None, None]
    assert [one["final"] for one in mine["each"]] == [21, 31, 41, 51]
    assert found["differences"]["beta"] == {"dqn": "-", "my_idea": "7", "other": "-"}
    assert run_compare(*words, "--json", "a.json", cwd=tmp_path).stdout.endswith("a.json\n")
    assert json.loads((tmp_path / "a.json").read_text()) == found


def test_a_missing_extra_is_one_line(folder, tmp_path):
    for name in ("plotly", "matplotlib"):
        shadow = tmp_path / f"no_{name}"
        shadow.mkdir()
        (shadow / f"{name}.py").write_text(f"raise ModuleNotFoundError('no', name='{name}')\n")
        env = {"PYTHONPATH": f"{shadow}{os.pathsep}{os.environ['PYTHONPATH']}"}
        flag = ("--html", "a.html") if name == "plotly" else ("--plot", "a.png")
        done = run_compare("runs", *flag, cwd=tmp_path, env=env)
        assert done.returncode == 2
        assert done.stderr == f'error: {name} is not installed: pip install -e ".[plot]"\n'
        assert run_compare("runs", "--markdown", "a.md", cwd=tmp_path, env=env).returncode == 0


def test_a_full_disk_is_one_line(folder, tmp_path):
    done = run_compare("runs", "--markdown", "/dev/full", cwd=tmp_path)
    assert done.returncode == 6
    assert re.fullmatch(r"error: cannot write .*No space left on device\n", done.stderr)
