"""python -m common check-results: a stored row again, with its arguments, and a verdict that can be either."""

import dataclasses
import gzip
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, load, run_script
from tooling import FORK, run_dirs, started, starts, tool, until

from common.args import RunArgs
from common.tools.launch import check_results
from common.tools.launch.check_results import Args, read_row

SEEDS = (99, 100, 103, 108, 109)
GIVEN = {"learning_rate": 3e-3, "gamma": 0.95, "norm_adv": False, "hidden_sizes": [8, 16], "target_kl": 0.5}
GIVEN |= {"total_timesteps": 12, "eval_episodes": 7, "env_id": "A-v0", "torch_threads": 2}
FACTS = {"script": "my_fork", "device": "cpu", "git_commit": "0123456789", "versions": {"torch": "1.0"}}
FEW = ["--seeds", "101,102,104-106"]  # the fewest that are compared
WORDS = ["check-results", "--results", "kept", "--script", "my_fork.py"]


@pytest.fixture
def fork(tmp_path):
    shutil.copy(FORK, tmp_path / "my_fork.py")
    return tmp_path


@pytest.fixture
def refused(fork, monkeypatch, capsys):
    """Of the tool in this process, which is quicker: code 2 and one line."""

    def check(words, said):
        monkeypatch.chdir(fork)
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        with pytest.raises(SystemExit) as stop:
            check_results.main([*WORDS[1:], *words])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1 and said in error

    return check


def score(seed, args):
    """The fork's, by its own formula."""
    rate, gamma = args["learning_rate"], args["gamma"]
    return -((math.log10(rate) + 3) ** 2) - 10 * (gamma - 0.9) ** 2 + seed / 1000


def keep(cwd, name="my_fork/A-v0", seeds=SEEDS, change=None, curves=True, **given):
    """A row as the fork's runs would have left it; `change` may spoil it."""
    args = json.loads(json.dumps(dataclasses.asdict(load(FORK).Args()))) | GIVEN | FACTS | given
    runs = [
        {
            "seed": seed,
            "eval_return": score(seed, args),
            "training_seconds": 2.0,
            "args": {key: value for key, value in {**args, "seed": seed}.items() if value is not ...},
        }
        for seed in seeds
    ]
    folder = cwd / "kept" / name
    folder.mkdir(parents=True)
    text = json.dumps(change(runs) or runs if change else runs)
    (folder / "runs.json").write_text(text)
    for seed in seeds if curves else ():
        steps = range(1, args["total_timesteps"] + 1)
        rows = [{"global_step": step, "time": 0.0, "charts/episodic_return": score(seed, args)} for step in steps]
        rows.append({"global_step": steps[-1], "time": 0.0, "eval/episodic_return": score(seed, args)})
        with gzip.open(folder / f"seed{seed}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return runs


def edit(fork, old, new):
    script = fork / "my_fork.py"
    assert script.read_text().count(old) == 1
    script.write_text(script.read_text().replace(old, new))


def facts(cwd):
    return [json.loads((path / "args.json").read_text()) for path in run_dirs(cwd)]


def test_a_script_that_learns_as_before_passes_with_the_stored_arguments_and_fresh_seeds(fork):
    keep(fork, versions={"torch": "1.0", **{f"library_{i}": "1.0" for i in range(9)}})
    done = tool(*WORDS, "my_fork/A-v0", cwd=fork)
    assert sorted(fact["seed"] for fact in facts(fork)) == [101, 102, 104, 105, 106]  # 103 is the row's
    for fact in facts(fork):
        assert {key: fact[key] for key in GIVEN} == GIVEN
        assert fact["kind"] == "plain" and fact["track"] is False and fact["capture_video"] is False
    base = score(0, GIVEN)
    # Scores are seeds in thousandths, but for a constant: the new ones have a sum of 518, the stored ones of 519.
    ways = [sum(five) for five in itertools.combinations((*SEEDS, 101, 102, 104, 105, 106), 5)]
    said = " ".join(done.stdout.split())  # lines are wrapped to the terminal
    assert f"p = {sum(way <= 518 for way in ways) / len(ways):.2g}, FAIL up to 0.01" in said
    assert re.search(rf"^PASS  my_fork/A-v0$[\s\S]*stored +{base + 0.1038:.1f} ± 0\.0, 5 seeds", done.stdout, re.M)
    assert "difference -0.0002" in said and "98 % interval" in said
    assert "git_commit 0123456 -> None" in said and "torch 1.0 -> -" in said
    assert max(map(len, done.stdout.partition("PASS")[2].splitlines())) <= 120
    again = tool(*WORDS, "my_fork/A-v0", cwd=fork)
    assert "5 of 5 runs are finished already" in again.stdout and "PASS" in again.stdout
    assert all(len(starts(path)) == 1 for path in run_dirs(fork))


def test_a_worse_script_fails_and_a_better_one_passes(fork):
    keep(fork)
    edit(fork, "+ args.seed / 1000", "+ args.seed / 1000 - 0.02")
    done = tool(*WORDS, "my_fork/A-v0", cwd=fork, check=1)
    assert "FAIL  my_fork/A-v0\n" in done.stdout and done.stderr == ""
    assert "difference -0.0202" in done.stdout and "p = 0.004" in done.stdout  # one way of 252
    # Runs of the script as it was are not taken for those of the script as it is.
    edit(fork, "- 0.02", "+ 0.02")
    done = tool(*WORDS, "my_fork/A-v0", cwd=fork)
    assert "PASS  my_fork/A-v0 (better)\n" in done.stdout and len(run_dirs(fork)) == 10


def test_it_fails_up_to_the_level_and_not_above(fork):
    """Beside new scores of 101 to 105 (and a constant), a stored 103.5 and four high ones: of 252 ways to choose five,
    three have no higher a sum: as it is, and with 103.5 in place of 104 or 105."""

    def high(runs):
        for run, place in zip(runs, (103.5, 200, 201, 202, 203), strict=True):
            run["eval_return"] = score(place, GIVEN)

    keep(fork, seeds=range(5), change=high, total_timesteps=1)
    for level, word in (("0.01", "PASS"), ("0.0119", "PASS"), ("0.012", "FAIL")):
        done = tool(*WORDS, "my_fork/A-v0", "--level", level, cwd=fork, check=word == "FAIL")
        assert f"{word}  my_fork/A-v0\n" in done.stdout and f"p = 0.012, FAIL up to {level}\n" in done.stdout
    assert len(run_dirs(fork)) == 5


def test_one_bad_row_of_two_is_a_fail(fork):
    keep(fork, "good/A-v0")
    keep(fork, "bad/A-v0", change=lambda runs: [run | {"eval_return": run["eval_return"] + 1} for run in runs])
    words = [*WORDS, "good/A-v0", "bad/A-v0", *FEW, "--workers", "2", "--json", "all.json"]
    done = tool(*words, cwd=fork, check=1)
    assert "PASS  good/A-v0\n" in done.stdout and "FAIL  bad/A-v0\n" in done.stdout and len(run_dirs(fork)) == 10
    good, bad = json.loads((fork / "all.json").read_text())
    assert (good["row"], good["verdict"], bad["verdict"]) == ("good/A-v0", "PASS", "FAIL")
    assert good["reference"] == {str(seed): pytest.approx(score(seed, GIVEN)) for seed in SEEDS}
    assert good["scores"] == {str(seed): pytest.approx(score(seed, GIVEN)) for seed in (101, 102, 104, 105, 106)}
    assert bad["p"] == pytest.approx(1 / 252) and bad["difference"] == pytest.approx(-1.0002)
    assert bad["reason"] in " ".join(done.stdout.split())  # lines are wrapped to the terminal
    assert good["interval"][0] < good["difference"] < good["interval"][1]


def test_interrupted_or_killed_it_goes_on(fork):
    keep(fork, pause=0.1)
    words = [*WORDS, "my_fork/A-v0", "--workers", "2"]
    with started(*words, cwd=fork) as process:
        until(lambda: len([p for p in run_dirs(fork) if list(p.glob("checkpoints/*.pt"))]) == 2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert f"continue with python -m common {' '.join(words)}" in process.said()
    first = run_dirs(fork)
    assert len(first) == 2
    with started(*words, cwd=fork) as process:
        until(lambda: len(run_dirs(fork)) == 4)
        process.kill()
    (fork / "hurry").touch()
    done = tool(*words, cwd=fork)
    assert "PASS" in done.stdout and len(run_dirs(fork)) == 5
    assert all(starts(path)[1][0] > 0 for path in first), "they did not go on, but began"
    for path in run_dirs(fork):
        steps = [json.loads(line)["global_step"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        assert steps == [*range(1, 13), 12]


def test_the_same_seeds_to_the_bit(fork):
    keep(fork, seeds=(4, 5, 6))
    done = tool(*WORDS, "my_fork/A-v0", "--same-seeds", cwd=fork)
    assert sorted(fact["seed"] for fact in facts(fork)) == [4, 5, 6]
    assert "PASS  my_fork/A-v0" in done.stdout and "equal to the stored one in 3 of 3 runs" in done.stdout
    edit(fork, '"charts/episodic_return": score(args)', '"charts/episodic_return": score(args) + (step == 3) * 1e-15')
    done = tool(*WORDS, "my_fork/A-v0", "--same-seeds", cwd=fork, check=1)
    assert "FAIL  my_fork/A-v0" in done.stdout and "equal to the stored one in 0 of 3 runs" in done.stdout
    edit(fork, " + (step == 3) * 1e-15", "")
    (fork / "kept" / "my_fork" / "A-v0" / "seed5.jsonl.gz").unlink()
    done = tool(*WORDS, "my_fork/A-v0", "--same-seeds", cwd=fork, check=1)
    assert "FAIL  my_fork/A-v0\n" in done.stdout and "2 of 3 runs" in done.stdout


def test_beside_few_stored_seeds_it_runs_as_many_as_the_test_needs(fork):
    keep(fork, seeds=(4, 5, 6), total_timesteps=1)
    done = tool(*WORDS, "my_fork/A-v0", cwd=fork)
    assert "PASS" in done.stdout and sorted(fact["seed"] for fact in facts(fork)) == list(range(101, 108))


def test_runs_that_fail_are_named_and_their_code_is_its_own(fork):
    keep(fork, env_id="Broken-v0")
    keep(fork, "fine/A-v0", total_timesteps=1)
    done = tool(*WORDS, "my_fork/A-v0", "fine/A-v0", *FEW, "--workers", "4", cwd=fork, check=5)
    assert "5 of 5 runs ended with an error: error: there is no environment Broken-v0\n" in done.stdout
    assert "FAIL  my_fork/A-v0" in done.stdout and "PASS  fine/A-v0" in done.stdout
    assert done.stderr == "error: 5 of 10 runs failed; the same command retries them\n"


def test_an_evaluation_that_is_not_finite_is_a_fail(fork):
    keep(fork, total_timesteps=1)
    edit(fork, '"eval/episodic_return": score(args)', '"eval/episodic_return": None if args.seed == 102 else 1e9')
    done = tool(*WORDS, "my_fork/A-v0", *FEW, cwd=fork, check=1)
    assert "FAIL  my_fork/A-v0: 1 of 5 runs have no finite evaluation\n" in done.stdout


def test_new_arguments_have_their_defaults_and_what_is_the_users_stays_so(fork):
    """A row of older code lacks num_steps and matmul_precision; its project, its import and its films are not taken."""
    mine = {"wandb_project": "theirs", "allow_env_import": True, "capture_video": True, "debug": True}

    def older(runs):
        for run in runs[:2]:
            del run["args"]["gamma"]

    keep(
        fork,
        change=older,
        num_steps=...,
        matmul_precision=...,
        total_timesteps=1,
        wandb_id="x",
        processes=1,
        parent=None,
        **mine,
    )
    tool(*WORDS, "my_fork/A-v0", *FEW, cwd=fork)
    assert len(run_dirs(fork)) == 5
    for fact in facts(fork):
        assert fact["gamma"] == GIVEN["gamma"] and fact["num_steps"] == 8 and fact["matmul_precision"] == "highest"
        assert fact["wandb_project"] == RunArgs.wandb_project and not fact["allow_env_import"] and not fact["debug"]


def test_without_a_row_it_lists_them(fork):
    keep(fork, "deep/er/A-v0")
    keep(fork, "odd", change=lambda runs: [{"seed": 3}])
    lines = tool(*WORDS[:3], cwd=fork).stdout.splitlines()
    mean = sum(score(seed, GIVEN) for seed in SEEDS) / 5
    assert re.fullmatch(rf"deep/er/A-v0 +my_fork +A-v0 +12 +5 +{mean:.1f} ± 0\.0 +2\.0 s", lines[2])
    assert lines[3:] == ["odd cannot be run again: its runs.json cannot be read: KeyError('eval_return')"]
    listed = tool("check-results", cwd=fork).stdout  # the reference results, from any folder
    kept = [
        path.parent.relative_to(ROOT / "runs" / "reference" / "results")
        for path in ROOT.glob("runs/reference/results/**/runs.json")
    ]
    names = [line.split()[0] for line in listed.splitlines()]  # some are too long for a line with their numbers
    assert kept and {name.as_posix() for name in kept} <= set(names) and max(map(len, listed.splitlines())) <= 120
    assert not (fork / "runs").exists()


def spoil(key, value):
    return {"change": lambda runs: [{**run, key: value} for run in runs]}


@pytest.mark.parametrize(
    ("row", "words", "said"),
    [
        ({}, ["my_fork/B-v0"], "there is no row my_fork/B-v0; did you mean my_fork/A-v0?"),
        ({}, ["zzz"], "there is no row zzz"),
        ({}, ["my_fork/A-v0", "--results", "nowhere"], "no results (runs.json) below nowhere"),
        ({}, ["my_fork/A-v0", "--workers", "0"], "--workers must be at least 1"),
        ({}, ["my_fork/A-v0", "--level", "0.5"], "--level must be between 0 and 0.5"),
        ({}, ["my_fork/A-v0", "--level", "0"], "--level must be between 0 and 0.5"),
        ({}, ["my_fork/A-v0", "--seeds", "103-108"], "has seed 103 itself"),
        ({}, ["my_fork/A-v0", "--seeds", "1-3"], "3 beside 5 runs are too few to call one side better: "),
        ({}, ["my_fork/A-v0", "--seeds", "x"], "not of the form"),
        ({}, ["my_fork/A-v0", "--same-seeds", "--seeds", "101"], "has no seed 101"),
        ({}, ["my_fork/A-v0", "--script", "none.py"], "there is no script none.py"),
        (
            {"seeds": (1,)},
            ["my_fork/A-v0"],
            "and beside 1 stored ones it takes 99 new --seeds",
        ),
        ({"seeds": (7, 7)}, ["my_fork/A-v0"], "a seed twice"),
        ({"seeds": ()}, ["my_fork/A-v0"], "no run"),
        (
            {"old_rate": 3, "old_way": False},
            ["my_fork/A-v0"],
            "was run with --old-rate 3 --no-old-way, which my_fork.py",
        ),
        ({"hidden_sizes": [8, "--resume", "x"]}, ["my_fork/A-v0"], "my_fork.py: x is not a run directory"),
        ({"hidden_sizes": [8, "--runs-dir", "x"]}, ["my_fork/A-v0"], "--runs-dir cannot be among the script's flags"),
        ({"hidden_sizes": [8, "--pause", "1"]}, ["my_fork/A-v0"], "does not make of --hidden-sizes 8 --pause 1"),
        ({"gamma": 2}, ["my_fork/A-v0"], "--gamma must be between 0 and 1"),
        ({"script": "../../my_fork"}, ["my_fork/A-v0", "--script", "None"], "its script '../../my_fork'"),
        ({"processes": 2}, ["my_fork/A-v0"], "used several processes"),
        (spoil("eval_return", float("nan")), ["my_fork/A-v0"], "not finite"),
        (spoil("eval_return", "high"), ["my_fork/A-v0"], "cannot be read"),
        (spoil("args", {"script": "my_fork", "env_id": "A-v0"}), ["my_fork/A-v0"], "KeyError('total_timesteps')"),
        (spoil("args", [1]), ["my_fork/A-v0"], "cannot be read"),
        ({"change": lambda runs: {"seed": 1}}, ["my_fork/A-v0"], "cannot be read"),
        (
            {"change": lambda runs: runs[0]["args"].update(gamma=0.1)},
            ["my_fork/A-v0"],
            "its runs differ in gamma: no single command repeats them",
        ),
        (
            {"change": lambda runs: runs[0]["args"].update(script="other")},
            ["my_fork/A-v0"],
            "its runs differ in script",
        ),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(fork, refused, row, words, said):
    keep(fork, curves=False, **row)
    refused(words, said)
    assert not (fork / "runs").exists()


@pytest.mark.parametrize("text", ["", "[{", '{"a": 1}', "\x00", "null"])
def test_a_damaged_file_is_one_line(fork, refused, text):
    keep(fork)
    (fork / "kept" / "my_fork" / "A-v0" / "runs.json").write_text(text)
    refused(["my_fork/A-v0"], "error: my_fork/A-v0 cannot be run again: ")


STORED = sorted(
    path.parent for path in ROOT.glob("runs/reference/results/**/runs.json") if "eval_return" in path.read_text()
)
ROWS = [read_row(folder, folder.parent.name) for folder in STORED]
# Of a fork there are results, but its script is made by the command that made them.
ONE_EACH = {row.args["script"]: row for row in reversed(ROWS) if (ROOT / "algos" / f"{row.args['script']}.py").exists()}


@pytest.mark.parametrize("folder", STORED, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_the_reference_results_can_be_read(folder):
    row = read_row(folder, "x")
    assert len(row.scores) == len(list(folder.glob("seed*.jsonl.gz")))


@pytest.mark.parametrize("script", [s if s == "ppo" else pytest.param(s, marks=pytest.mark.slow) for s in ONE_EACH])
def test_a_reference_row_becomes_the_command_that_made_it(script, tmp_path, capsys):
    """Every argument that a stored run had, the script has again once it has parsed the command."""
    row = ONE_EACH[script]
    (job, *_) = check_results.make_jobs(row, Args(runs_dir=tmp_path / "runs", level=0.05, seeds="101-119"))
    assert job.script == ROOT / "algos" / f"{script}.py"
    ignored = check_results.NOT_ARGUMENTS | check_results.NOT_REPEATED | {"cuda", "torch_threads"}
    ignored |= {*check_results.LEFT_DQN, "prioritized_replay_alpha", "prioritized_replay_beta"}
    compared = {key: value for key, value in row.args.items() if key not in ignored}
    assert {key: job.wanted[key] for key in compared} == compared and len(compared) > 15
    assert f"python {job.script}" in capsys.readouterr().out


def test_a_row_of_dqn_with_options_is_run_by_the_script_that_has_them_now(tmp_path):
    (row,) = [row for row in ROWS if "dqn_all" in row.name or row.folder.parent.name == "dqn_all"]
    (job, *_) = check_results.make_jobs(row, Args(runs_dir=tmp_path / "runs", level=0.05, seeds="101-119"))
    assert job.script == ROOT / "algos" / "rainbow.py"
    wanted = {"dueling": True, "n_step": 3, "prioritized_replay": True, "distributional": False, "noisy": False}
    assert {name: job.wanted[name] for name in wanted} == wanted
    assert job.wanted["learning_rate"] == row.args["learning_rate"]


def test_a_real_script_collected_and_run_again(tmp_path):
    flags = [
        "--total-timesteps",
        "600",
        "--num-envs",
        "2",
        "--log-interval",
        "200",
        "--seed",
        "3",
        "--eval-episodes",
        "2",
    ]
    flags += ["--no-track", "--ent-coef", "0.02", "--runs-dir", "first"]
    run_script(*flags, script="reinforce_rollout", cwd=tmp_path)
    words = [sys.executable, str(ROOT / "runs" / "reference" / "collect.py"), "first", "--into", "kept/mine"]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    done = tool("check-results", "mine/CartPole-v1", "--results", "kept", "--same-seeds", cwd=tmp_path)
    assert "PASS  mine/CartPole-v1\n" in done.stdout and "equal to the stored one in 1 of 1 runs" in done.stdout
    (fact,) = facts(tmp_path)
    assert fact["ent_coef"] == 0.02 and fact["eval_episodes"] == 2 and fact["seed"] == 3
    # The videos of the stored run, and the missing ones of the new, have changed no number; nor has anything else.
    assert re.search(r"changed since: (nothing|uncommitted changes)\n", done.stdout)
