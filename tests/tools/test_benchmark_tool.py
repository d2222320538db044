"""python -m common benchmark: every run once, whatever is killed; and what benchmark and sweep share."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from tooling import FORK, run_dirs, started, starts, tool, until

from common.tools.launch.cli import again, ask, numbers
from common.tools.launch.jobs import Job, Pool, find_run


def grid(cwd):
    """(environment, seed) of every run directory, as often as there is one."""
    facts = [json.loads((path / "args.json").read_text()) for path in run_dirs(cwd)]
    return sorted((fact["env_id"], fact["seed"]) for fact in facts)


@pytest.fixture
def fork(tmp_path):
    shutil.copy(FORK, tmp_path / "my_fork.py")
    return tmp_path


WORDS = ["benchmark", "my_fork.py", "--env-ids", "A-v0", "B/x-v0", "--seeds", "1-2,5", "--workers", "2"]


def test_every_script_on_every_environment_with_every_seed_once(fork):
    shutil.copy(FORK, fork / "other.py")
    words = ["benchmark", "my_fork.py", "other.py", *WORDS[2:]]
    done = tool(*words, "--", "--gamma", "0.9", "--total-timesteps", "1e1", cwd=fork)
    found = [json.loads((path / "args.json").read_text()) for path in run_dirs(fork)]
    every = {(script, env, seed) for script in ("my_fork", "other") for env in ("A-v0", "B/x-v0") for seed in (1, 2, 5)}
    assert len(found) == 12 and {(f["script"], f["env_id"], f["seed"]) for f in found} == every
    for facts in found:
        assert facts["gamma"] == 0.9 and facts["wandb_group"] == "benchmark_my_fork_other"
        assert facts["wandb_tags"][0] == "benchmark"
    # Mean and standard deviation of -(-2 + 3)² + seed / 1000 over the seeds 1, 2 and 5.
    assert done.stdout.count("-1.0 ± 0.0") == 4 and "[12/12]" in done.stdout
    assert all(len(starts(path)) == 1 for path in run_dirs(fork))


def test_finished_runs_are_left_alone_and_more_can_be_added(fork):
    tool(*WORDS, cwd=fork)
    before = {path: (path / "metrics.jsonl").stat().st_mtime_ns for path in run_dirs(fork)}
    done = tool(*WORDS, cwd=fork)
    assert "6 of 6 runs are finished already" in done.stdout
    more = [*WORDS[:3], "A-v0", "C-v0", "--seeds", "1-2,4-5"]
    tool(*more, cwd=fork)
    assert grid(fork) == sorted(
        [("A-v0", s) for s in (1, 2, 4, 5)] + [("B/x-v0", s) for s in (1, 2, 5)] + [("C-v0", s) for s in (1, 2, 4, 5)]
    )
    assert {path: (path / "metrics.jsonl").stat().st_mtime_ns for path in before} == before
    assert all(len(starts(path)) == 1 for path in run_dirs(fork))


def test_killed_at_any_time_it_goes_on_and_runs_nothing_twice(fork):
    words = [*WORDS, "--", "--pause", "0.1"]
    for kills in range(4):
        with started(*words, cwd=fork) as process:
            # A different moment each time: before the first run, in the midst of several.
            until(lambda n=kills: sum(len(starts(path)) for path in run_dirs(fork)) >= 2 * n)
            time.sleep(0.15 * kills)
            process.send_signal(signal.SIGKILL)
    (fork / "hurry").touch()
    tool(*words, cwd=fork)
    assert grid(fork) == [(env, seed) for env in ("A-v0", "B/x-v0") for seed in (1, 2, 5)]
    for path in run_dirs(fork):
        assert (path / "finished.json").exists()
        steps = [json.loads(line)["global_step"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        assert steps == [*range(1, 11), 10]
        began = [step for step, _, _ in starts(path)]
        assert began == sorted(began) and began[1:] == [s for s in began[1:] if s > 0], "one did not go on, but began"
    assert any(len(starts(path)) > 1 for path in run_dirs(fork))


def test_a_killed_tool_takes_its_runs_with_it_and_they_make_a_checkpoint(fork):
    with started(*WORDS, "--", "--pause", "0.2", "--total-timesteps", "1000", cwd=fork) as process:
        until(lambda: len(run_dirs(fork)) == 2 and all(list(p.glob("checkpoints/*.pt")) for p in run_dirs(fork)))
        process.kill()
        process.wait()
        for path in run_dirs(fork):
            pid = starts(path)[0][1]
            until(
                lambda pid=pid: not Path(f"/proc/{pid}").exists() or "zombie" in Path(f"/proc/{pid}/status").read_text()
            )
    for log in fork.glob("runs/*.benchmark/logs/*.log"):
        assert "error: stopped at step" in log.read_text()


def test_a_killed_run_is_a_failure_that_the_same_command_resumes(fork):
    words = [*WORDS[:3], "A-v0", "--seeds", "3", "--", "--pause", "0.1"]
    with started(*words, cwd=fork) as process:
        path = until(lambda: [p for p in run_dirs(fork) if starts(p) and list(p.glob("checkpoints/*.pt"))])[0]
        os.kill(starts(path)[0][1], signal.SIGKILL)
        assert process.wait(60) == 137
        assert "failed: my_fork A-v0 seed 3 (exit 137)" in process.said()
    (fork / "hurry").touch()
    tool(*words, cwd=fork)
    assert len(run_dirs(fork)) == 1 and len(starts(path)) == 2 and starts(path)[1][0] > 0


def first_runs(cwd):
    """Process ids of the runs that have started."""
    return [starts(path)[-1][1] for path in run_dirs(cwd)]


@pytest.mark.parametrize(
    "number", [signal.SIGUSR2, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGTERM))]
)
def test_asked_to_stop_it_asks_its_runs_once_and_says_how_to_go_on(fork, number):
    words = [*WORDS, "--", "--pause", "0.1", "--total-timesteps", "30"]
    with started(*words, cwd=fork) as process:
        until(lambda: len([p for p in run_dirs(fork) if list(p.glob("checkpoints/*.pt"))]) == 2)
        if number == signal.SIGUSR2:  # SLURM sends it to every process of a job
            for run in first_runs(fork):
                os.kill(run, number)
        # Ctrl-C goes to every process of a terminal's group.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        assert process.wait(60) == 128 + number
        said = process.said()
    assert f"stopped by {number.name}; continue with python -m common {' '.join(words)}\n" in said
    first = run_dirs(fork)
    assert len(first) == 2  # no other was begun
    for log in fork.glob("runs/*.benchmark/logs/*.log"):
        assert log.read_text().count("error: stopped at step") == 1
    (fork / "hurry").touch()
    tool(*words, cwd=fork)
    assert set(first) < set(run_dirs(fork)) and len(run_dirs(fork)) == 6
    assert all(starts(path)[1][0] > 0 for path in first)


def test_two_commands_at_once_share_the_runs(fork):
    words = [*WORDS[:5], "--seeds", "1-6", "--workers", "1", "--", "--pause", "0.05"]
    with started(*words, cwd=fork) as one, started(*words, cwd=fork) as two:
        assert one.wait(100) == 0 and two.wait(100) == 0
        said = [one.said(), two.said()]
    assert grid(fork) == [("A-v0", s) for s in range(1, 7)] + [("B/x-v0", s) for s in range(1, 7)]
    assert all(len(starts(path)) == 1 for path in run_dirs(fork))
    assert all(text.count(" return ") >= 2 for text in said)  # each made some
    assert sum(text.count(": return ") for text in said) == 12


def test_failures_are_listed_with_their_last_error_and_the_others_go_on(fork):
    words = [*WORDS[:3], "A-v0", "Broken-v0", "--seeds", "1-2"]
    done = tool(*words, cwd=fork, check=5)
    for seed in (1, 2):
        assert (
            f"failed: my_fork Broken-v0 seed {seed} (exit 5): error: there is no environment Broken-v0" in done.stdout
        )
    assert done.stderr == "error: 2 of 4 runs failed; the same command retries them\n"
    assert grid(fork) == [("A-v0", 1), ("A-v0", 2)]
    done = tool(*words[:3], "A-v0", "--seeds", "9", "--name", "bug", "--", "--kind", "fails", cwd=fork, check=1)
    assert "error: RuntimeError: a bug in the fork" in done.stdout


def test_what_failed_goes_on_at_the_next_command(fork):
    words = [*WORDS[:3], "A-v0", "--seeds", "1", "--", "--kind", "crashes_once"]
    tool(*words, cwd=fork, check=1)
    tool(*words, cwd=fork)
    (path,) = run_dirs(fork)
    assert [step for step, _, _ in starts(path)] == [0, 2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["benchmark", "none.py", "--env-ids", "A-v0"], "there is no script none.py"),
        ([*WORDS, "--", "--gama", "0.9"], "--gamma"),
        ([*WORDS, "--", "--gamma", "1.9"], "--gamma must be between 0 and 1"),
        ([*WORDS, "--", "--seed", "9"], "--seed cannot be among the script's flags"),
        ([*WORDS, "--", "--resume", "somewhere"], "somewhere is not a run directory"),
        ([*WORDS, "--workers", "0"], "--workers must be at least 1"),
        ([*WORDS, "--seeds", "5-1"], "no range"),
        ([*WORDS, "--seeds", "1,x"], "not of the form"),
        ([*WORDS, "--seeds", "1-3,2"], "twice"),
        ([*WORDS, "--name", "../x"], "names a folder"),
        ([*WORDS[:2], "sub/my_fork.py", *WORDS[2:]], "two of the same name"),
        ([*WORDS[:3], "A-v0", "A-v0"], "two of the same name"),
        (["benchmark", "silent.py", "--env-ids", "A-v0"], "common.parse"),
        (["benchmark", "wrong.py", "--env-ids", "A-v0"], "ZeroDivisionError"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(fork, words, said):
    (fork / "silent.py").write_text("print('training')")
    (fork / "wrong.py").write_text("1 / 0")
    done = tool(*words, cwd=fork, check=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr
    assert not run_dirs(fork) and not (fork / "runs").exists()


def test_another_plan_under_the_same_name_is_refused(fork):
    words = [*WORDS[:3], "A-v0", "--seeds", "1"]
    tool(*words, "--", "--gamma", "0.9", cwd=fork)
    tool(*words, "--", "--gamma", "0.90", "--no-track", cwd=fork)  # the same experiment
    done = tool(*words, "--", "--gamma", "0.8", cwd=fork, check=2)
    assert "gamma was 0.9, is now 0.8; choose another --name" in done.stderr
    assert len(run_dirs(fork)) == 1
    # A run of this group that was made by hand with other flags is not mixed in either.
    by_hand = ["--env-id", "A-v0", "--seed", "2", "--wandb-group", "benchmark_my_fork", "--gamma", "0.8"]
    run_script(*by_hand, script=fork / "my_fork.py", cwd=fork)
    done = tool(*words[:-1], "1-2", "--", "--gamma", "0.9", cwd=fork, check=2)
    assert "gamma was 0.8, is now 0.9" in done.stderr and len(run_dirs(fork)) == 2


def test_two_versions_of_a_script_are_not_mixed(fork):
    words = [*WORDS[:3], "A-v0", "--seeds", "1"]
    tool(*words, cwd=fork)
    with (fork / "my_fork.py").open("a") as file:
        file.write("# changed\n")
    done = tool(*words[:-1], "1-2", cwd=fork, check=2)
    assert "my_fork.py has changed since" in done.stderr and len(run_dirs(fork)) == 1
    tool(*words, "--name", "second", cwd=fork)


def test_a_script_from_any_folder_of_any_name(fork):
    (fork / "a folder").mkdir()
    shutil.copy(FORK, fork / "a folder" / "my idea.py")
    words = ["benchmark", fork / "a folder" / "my idea.py", "--env-ids", "A-v0", "--seeds", "1"]
    tool(*words, cwd=fork)
    assert "finished already" in tool(*words, cwd=fork).stdout
    assert grid(fork) == [("A-v0", 1)]


def test_each_worker_has_cores_of_its_own():
    cores = sorted(os.sched_getaffinity(0))
    pools = {n: Pool(n).cores for n in (1, 2, 3, 7)}
    for n, shares in pools.items():
        assert len(shares) == n and all(share for share in shares)
        if n <= len(cores):
            assert sorted(core for share in shares for core in share) == cores
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
        else:
            assert {core for share in shares for core in share} <= set(cores)


def test_a_run_is_pinned_to_the_cores_of_its_worker(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid, ask=os.sched_getaffinity: {max(ask(pid))})
    pool = Pool(2)
    job = Job("j", FORK, ["--runs-dir", str(tmp_path)], {"seed": 1}, tmp_path, tmp_path)
    assert pool.start(job)
    pool.wait()
    monkeypatch.undo()
    (path,) = tmp_path.glob("*/starts")
    assert path.read_text().split(maxsplit=2)[2].strip() == f"[{max(os.sched_getaffinity(0))}]"


def test_numbers_against_brute_force():
    assert numbers("1-3,7,10-10", "--seeds") == [1, 2, 3, 7, 10]
    assert numbers("0", "--seeds") == [0]


def test_of_several_directories_the_furthest_is_taken(tmp_path):
    for name, steps, finished in (("a", 3, False), ("b", 1, True), ("c", 2, False), ("d", 9, False)):
        path = tmp_path / f"E__fork__1__{name}"
        (path / "checkpoints").mkdir(parents=True)
        (path / "checkpoints" / f"step-{steps:012d}.pt").touch()
        group = "other" if name == "d" else "g"
        (path / "args.json").write_text(json.dumps({"script": "fork", "seed": 1, "wandb_group": group}))
        if finished:
            (path / "finished.json").write_text("{}")
    wanted = {"seed": 1, "wandb_group": "g"}
    assert find_run(tmp_path, "fork", wanted).name == "E__fork__1__b"
    (tmp_path / "E__fork__1__b" / "finished.json").unlink()
    assert find_run(tmp_path, "fork", wanted).name == "E__fork__1__a"
    (tmp_path / "E__fork__1__a" / "args.json").write_text("{")  # killed while it was written
    assert find_run(tmp_path, "fork", wanted).name == "E__fork__1__c"
    assert find_run(tmp_path, "fork", {"seed": 2}) is None


@pytest.mark.parametrize(
    "script", ["ppo", *(pytest.param(s, marks=pytest.mark.slow) for s in ("dqn", "sac", "reinforce_rollout"))]
)
def test_scripts_tell_their_arguments_without_starting(script):
    path = ROOT / "algos" / f"{script}.py"
    types, answers = ask(path, [[], ["--gamma", "0.5", "--seed=7"], ["--gamma", "2"], ["--gama", "1"]])
    assert types["gamma"] == "float" and types["total_timesteps"] == "int" and types["wandb_group"] == "str | None"
    assert [answer.args.get("gamma") for answer in answers][1:] == [0.5, None, None]
    assert answers[1].args["seed"] == 7 and answers[1].args["env_id"] == answers[0].args["env_id"]
    assert "--gamma must be between 0 and 1" in answers[2].error and "--gamma" in answers[3].error


@pytest.mark.slow
def test_real_scripts(tmp_path):
    flags = ["--total-timesteps", "300", "--no-track", "--eval-episodes", "1", "--no-capture-video", "--no-cuda"]
    done = tool(
        *("benchmark", ROOT / "algos" / "ppo.py", ROOT / "algos" / "reinforce_rollout.py"),
        *("--env-ids", "CartPole-v1", "--seeds", "4", "--workers", "2", "--", *flags),
        cwd=tmp_path,
    )
    for path in run_dirs(tmp_path):
        facts = json.loads((path / "args.json").read_text())
        (score,) = [
            row["eval/episodic_return"]
            for row in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
            if "eval/episodic_return" in row
        ]
        assert re.search(rf"^{facts['script']} +CartPole-v1 +1 +{score:.1f} ± 0.0$", done.stdout, re.M)
    assert len(run_dirs(tmp_path)) == 2


def test_no_file_of_a_benchmark_has_a_secret_and_a_run_with_one_goes_on(fork, monkeypatch):
    secret = "env-9b1f44c0a1/x"
    monkeypatch.setenv("SERVICE_TOKEN", secret)
    bug = 'RuntimeError("a bug in the fork")'
    source = (
        (fork / "my_fork.py").read_text().replace(bug, "RuntimeError(os.environ['SERVICE_TOKEN'] + args.wandb_notes)")
    )
    (fork / "my_fork.py").write_text(source)
    words = ["benchmark", "my_fork.py", "--env-ids", "A-v0", "--seeds", "1", "--", "--kind", "crashes_once"]
    words += ["--wandb-notes", secret]
    done = tool(*words, cwd=fork, check=1)
    assert "RuntimeError: [redacted][redacted]" in done.stdout
    assert "[1/1]" in tool(*words, cwd=fork).stdout
    files = [path for path in fork.glob("runs/*.benchmark/**/*") if path.is_file()]
    assert "my_fork__A-v0__1.log" in {path.name for path in files}
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_resuming_gives_again_what_args_json_may_not_decide(monkeypatch):
    flags = ["--env-id", "mine:A-v0", "--allow-env-import", "--seed", "1"]
    assert again(flags) == ["--allow-env-import"] and again(flags[:2]) == []
    monkeypatch.setenv("SERVICE_TOKEN", "env-9b1f44c0a1/x")
    assert again([*flags, "--key", "env-9b1f44c0a1/x"]) == [*flags, "--key", "env-9b1f44c0a1/x"]


def test_the_score_of_a_run_is_its_last_evaluation(tmp_path):
    """Whatever else is in its metrics: lines that no run wrote, and a last one that a full disk has cut."""
    row = {"global_step": 5, "time": 0.0, "eval/episodic_return": 2.5}
    lines = ["[]", "x", "1" * 5000, "[" * 9999, json.dumps({**row, "global_step": 1, "eval/episodic_return": 9.0})]
    lines += [json.dumps({**row, "global_step": "eval/episodic_return"}), json.dumps(row), json.dumps(row)[:-9]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    job = Job("j", FORK, [], {"seed": 1}, tmp_path, tmp_path, run_dir=tmp_path)
    assert job.score() is None  # not finished
    (tmp_path / "finished.json").write_text("{}")
    assert job.score() == 2.5


def test_json_has_the_state_and_the_score_of_each_run(fork):
    words = ["benchmark", "my_fork.py", "--env-ids", "A-v0", "Broken-v0", "--seeds", "1-2", "--json", "all.json"]
    tool(*words, cwd=fork, check=5)
    good, other, broken, _ = json.loads((fork / "all.json").read_text())
    assert (good["env_id"], good["seed"], good["state"], other["seed"]) == ("A-v0", 1, "finished", 2)
    assert good["score"] == pytest.approx(-1 - 10 * 0.09**2 + 0.001) and (fork / good["run_dir"]).is_dir()
    assert (broken["state"], broken["score"], broken["exit_code"]) == ("failed", None, 5)
    assert broken["error"] == "error: there is no environment Broken-v0"
    words = ["benchmark", "my_fork.py", "--env-ids", "C-v0", "--seeds", "1-2", "--json", "stopped.json"]
    with started(*words, "--", "--pause", "0.1", cwd=fork) as process:
        until(lambda: list(fork.glob("runs/C-v0*/checkpoints/*.pt")))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert [run["state"] for run in json.loads((fork / "stopped.json").read_text())] == ["unfinished"] * 2
    done = tool(*words[:-1], "no/where.json", cwd=fork, check=6)
    assert done.stderr == "error: there is no folder no for where.json\n"
