"""torchrun with two processes: what one process with twice the data learns, and nothing lost when one of them dies."""

import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import HELPERS, ROOT, TESTS, clockless, envs_of, load, only_run, rows, run_script, same, weights

import common
import common.internals.storage.memory
import common.run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TIMEOUT = 900  # a test has pytest's 300 s, unless it is marked slow


def launch(*words, options=()):
    return subprocess.Popen(
        [*TORCHRUN, *map(str, options), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process, check=0):
    out, err = process.communicate(timeout=TIMEOUT)
    assert check is None or process.returncode == check, f"exit {process.returncode}\n{out}\n{err}"
    return out, err


def errors(err):
    return [line for line in err.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Results of the two processes, of the one that had the data of both, and their folders."""
    home = {
        "HOME": str(tmp_path_factory.mktemp("home")),
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS, HELPERS, ROOT))),
    }
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    script = str(HELPERS / "ranks.py")
    for command in ([*TORCHRUN, script, str(two)], [sys.executable, script, str(one)]):
        done = subprocess.run(command, env={**os.environ, **home}, capture_output=True, text=True, timeout=TIMEOUT)
        assert done.returncode == 0, done.stderr
    paths = two / "results-2-0.pt", two / "results-2-1.pt", one / "results-1-0.pt"
    return *(torch.load(path, weights_only=True) for path in paths), two, one


SCRIPTS = ["ppo", "ppo_recurrent", "reinforce_rollout", "dqn", "pqn", "sac", "crossq"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_learn_what_one_learns_from_the_data_of_both(script, both):
    first, second, one, _, _ = both
    first, second, one = first[script], second[script], one[script]
    assert first["updates"] == second["updates"] == one["updates"] >= 40
    assert same(first["weights"], second["weights"])
    for name, value in one["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_first_process_logs_what_one_would(script, both):
    """The episodes of both, in their order, and losses that are means of both."""
    *_, two, one = both
    alone = rows(only_run(one / script))
    together = rows(only_run(two / script))
    assert [row["global_step"] for row in together] == [row["global_step"] for row in alone]
    for mine, theirs in zip(together, alone, strict=True):
        health = {key for key in theirs if key.startswith("health/")}  # of samples that each process draws of its own
        for key in theirs.keys() - {"time", "charts/SPS", "losses/explained_variance"} - health:
            assert math.isclose(mine[key], theirs[key], rel_tol=1e-4, abs_tol=1e-6), (key, mine, theirs)
        assert mine.keys() == theirs.keys()
    if script not in ("sac", "crossq"):  # whose run is shorter than an episode
        assert script.startswith("ppo") or sum("charts/episodic_return" in row for row in together) > 10
        assert any("losses/policy_loss" in row or "losses/td_loss" in row for row in together)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_environment_has_the_seed_of_another(script, both):
    first, second, one, _, _ = both
    assert len({*first[script]["seeds"], *second[script]["seeds"]}) == 4
    assert [*first[script]["seeds"], *second[script]["seeds"]] == one[script]["seeds"]


@pytest.mark.parametrize(("mean", "updates"), [("below", 2 * 3 * 2), ("above", 2 * 1 * 2)])
def test_a_kl_that_is_large_in_one_process_is_decided_on_by_both(mean, updates, both):
    first, second, *_ = both
    case = f"one KL above, mean {mean}"
    assert first[case]["updates"] == second[case]["updates"] == updates
    assert same(first[case]["weights"], second[case]["weights"])


def test_statistics_are_those_of_the_data_of_both(both):
    for mine in (both[0]["statistics"], both[1]["statistics"]):
        everything = mine["x"].flatten(0, 1)
        mean, std = mine["mean_std"]
        torch.testing.assert_close(mean.double(), everything.mean(), rtol=1e-7, atol=0)
        torch.testing.assert_close(std.double(), everything.std(), rtol=1e-6, atol=0)
        mean, var, count = mine["rms"]
        torch.testing.assert_close(mean, everything.mean(dim=0), rtol=1e-12, atol=0)
        torch.testing.assert_close(var, everything.var(dim=0, correction=0), rtol=1e-10, atol=0)
        assert count == len(everything)
        assert mine["mean"] == 0.5
        weight, unused, bias = mine["grads"]
        assert weight.tolist() == [[1.5, 1.5], [1.5, 1.5]] and unused is None and bias.tolist() == [7.5, 9.0, 10.5]


def test_the_processes_draw_other_random_numbers(both):
    assert not torch.equal(both[0]["statistics"]["random"], both[1]["statistics"]["random"])


def test_where_the_first_process_ends_all_do(both):
    assert [both[0]["ended"], both[1]["ended"]] == [6, 6]


def test_a_script_that_does_not_average_its_gradients_is_found_out(both):
    assert [both[0]["different_weights"], both[1]["different_weights"]] == [1, 1]


def test_a_signal_to_one_process_is_heard_by_all_at_the_same_call(both):
    (call, number), other = both[0]["signalled"], both[1]["signalled"]
    assert [call, number] == other
    assert number == signal.SIGTERM and 300 <= call <= 500


def test_a_checkpoint_counts_if_it_is_committed_and_whole_in_all_processes(both):
    for mine, files in zip(both, [["1", "3"], ["1", "2", "3"]], strict=False):
        assert mine["loaded"]["steps"] == [4, 3, 2, 1]
        assert [name.removeprefix("step-00000000000").split(".")[0] for name in mine["loaded"]["files"]] == files
    # The files of all are renamed by one: the other would find them gone.
    commits = [f"step-00000000000{step}.commit" for step in (3, 2)]
    assert [mine["loaded"]["renamed others"] for mine in both[:2]] == [commits, []]


def test_threads_of_gloo_end_before_python_does(both):
    """One that still lets go of a tensor when Python is gone aborts the process, after a run without fault."""
    for rank in (0, 1):
        names = (both[3] / f"threads-{rank}").read_text()
        assert "python" in names and "gloo" not in names


def test_new_episodes_of_environments_that_cannot_be_restored_have_seeds_of_their_own(monkeypatch):
    seeds = []
    for rank in (0, 1, 2):
        for module in ("envs", "internals.vector.make"):
            monkeypatch.setattr(f"common.{module}.RANK", rank)
            monkeypatch.setattr(f"common.{module}.WORLD_SIZE", 3)
        envs = envs_of("CartPole-v1", 50)
        envs.reset(seed=1)
        seeds += envs._seeds
        envs.load_state_dict({**envs.state_dict(), "snapshots": None, "steps": 7})
        seeds += envs._seeds
        assert all(seed % 3 == rank for seed in envs._seeds)
        envs.close()
    assert len(set(seeds)) == len(seeds) == 300


def test_environments_that_the_processes_cannot_share_equally_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("common.envs.WORLD_SIZE", 3)
    with pytest.raises(SystemExit) as stop:
        common.make_envs(common.RunArgs(num_envs=4))
    assert stop.value.code == 2
    assert "--num-envs 4 cannot be shared equally by 3 processes" in capsys.readouterr().err


def test_fewer_gpus_than_processes_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(SystemExit) as stop:
        common.internals.speed.processes.own_gpu()
    assert stop.value.code == 2
    assert "4 processes need a GPU each, and there are 3" in capsys.readouterr().err


def test_processes_share_the_memory_of_their_machine(monkeypatch, capsys):
    monkeypatch.setattr("common.internals.storage.memory.available_memory", lambda: 100)
    common.internals.storage.memory.require_memory(60, "a replay")
    monkeypatch.setattr("common.internals.storage.memory.WORLD_SIZE", 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    common.internals.storage.memory.require_memory(50, "a replay")
    with pytest.raises(SystemExit) as stop:
        common.internals.storage.memory.require_memory(51, "a replay")
    assert stop.value.code == 2


def test_a_script_without_checkpoint_is_refused(monkeypatch, tmp_path, capsys):
    """Nothing else makes the processes begin with the same weights."""
    args = common.RunArgs(track=False, cuda=False, runs_dir=str(tmp_path))
    run = common.track(args, torch.device("cpu"))
    run.log_episodes({}, 1)
    monkeypatch.setattr("common.run.WORLD_SIZE", 2)
    with pytest.raises(SystemExit) as stop:
        run.log_episodes({}, 2)
    assert stop.value.code == 2
    assert "torchrun needs common.Checkpoint" in capsys.readouterr().err
    monkeypatch.undo()
    run.finish()


def processes(launcher):
    """pid of each rank, once torchrun has started them."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(path.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            environ = path.joinpath("environ").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue
        ranks = [word for word in environ if word.startswith(b"RANK=")]
        if parent == launcher.pid and ranks:
            found[int(ranks[0][5:])] = int(path.name)
    return found


def pids_of(launcher):
    return set(processes(launcher).values())


def commits(folder):
    return sorted(path.name for path in folder.glob("*/checkpoints/*.commit"))


def wait_for(condition, process):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, finish(process, check=None)
        assert time.monotonic() < deadline
        time.sleep(0.02)


QUIET = ["--no-track", "--no-capture-video", "--eval-episodes", 2, "--log-interval", 700, "--num-envs", 4]
PPO = ["ppo", *QUIET, "--norm-obs", "--norm-reward", "--eval-interval", 2000, "--save-interval", 256]
RAINBOW = ["rainbow", *QUIET, "--learning-starts", 400, "--buffer-size", 700, "--save-interval", 200]
CHAINED = HELPERS / "chained.py"
linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")


@linux
def test_one_that_dies_ends_all_and_another_number_cannot_go_on(tmp_path):
    process = launch(CHAINED, *PPO, "--total-timesteps", 10**6, "--runs-dir", tmp_path)
    wait_for(lambda: len(commits(tmp_path)) >= 1, process)
    pids = processes(process)
    assert pids.keys() == {0, 1}
    began = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    out, err = finish(process, check=None)
    assert process.returncode != 0
    assert time.monotonic() - began < 60
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    assert all("process 0: another process of this training is gone" in line for line in errors(err))
    run_dir = only_run(tmp_path)
    facts = (run_dir / "args.json").read_bytes()
    assert "ppo on CartPole-v1, seed 1, cpu x 2" in out
    done = run_script("--resume", run_dir, script="ppo", check=3)
    assert "is a run of 2 processes, not 1: start it with torchrun --nproc-per-node 2" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (run_dir / "args.json").read_bytes() == facts


def test_a_script_for_one_process_says_so(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lightning")
    monkeypatch.setattr("common.run.WORLD_SIZE", 2)
    dqn = load("dqn_lightning")
    with pytest.raises(SystemExit) as stop:
        dqn.main(dqn.Args(runs_dir=str(tmp_path)))
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == "error: this script trains in one process: start it with python, not torchrun\n"


def equal_runs(a, b):
    assert same(weights(a), weights(b))
    assert [(a / name).read_text() for name in ("chain", "chain1")] == [
        (b / name).read_text() for name in ("chain", "chain1")
    ]
    assert clockless(a) == clockless(b)


@linux
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("flags", [[*PPO, "--total-timesteps", 12_000], [*RAINBOW, "--total-timesteps", 4000]])
def test_a_killed_process_is_started_again_and_nothing_changes(flags, tmp_path):
    finish(launch(CHAINED, *flags, "--runs-dir", tmp_path / "whole"))
    folder = tmp_path / "killed"
    process = launch(CHAINED, *flags, "--runs-dir", folder, options=["--max-restarts", 3])

    def new_commit(seen, old):
        return commits(folder) > seen and not old & pids_of(process)

    seen, old = [], set()
    for rank in (1, 0, 1):
        wait_for(functools.partial(new_commit, seen, old), process)
        time.sleep(0.3)
        seen, old = commits(folder), pids_of(process)
        os.kill(processes(process)[rank], signal.SIGKILL)
    out, _ = finish(process)
    assert len(re.findall(r"cpu x 2, from step", out)) == 3
    equal_runs(only_run(tmp_path / "whole"), only_run(folder))


@linux
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_torchrun_is_a_checkpoint_at_one_step_and_resume_changes_nothing(number, tmp_path):
    """Of SIGKILL it can tell nobody; its processes find out."""
    flags = [*PPO, "--total-timesteps", 4000]
    finish(launch(CHAINED, *flags, "--runs-dir", tmp_path / "whole"))
    folder = tmp_path / "stopped"
    process = launch(CHAINED, *flags, "--runs-dir", folder)
    wait_for(lambda: len(commits(folder)) >= 1, process)
    process.send_signal(number)
    _, err = finish(process, check=None)
    (line,) = errors(err)
    run_dir = only_run(folder)
    step = int(re.search(r"stopped by SIGTERM at step (\d+); continue with --resume", line).group(1))
    assert f"step-{step:012d}.commit" in commits(folder)
    # A newer one that is not committed is as if it were not there.
    newest = run_dir / "checkpoints" / f"step-{step:012d}.commit"
    before = sorted(run_dir.glob("checkpoints/*.commit"))[-2]
    newest.unlink()
    out, _ = finish(launch(CHAINED, "ppo", "--resume", run_dir))
    assert f"from step {int(re.search(r'step-(.*).commit', before.name).group(1)):,}" in out
    equal_runs(only_run(tmp_path / "whole"), run_dir)
    assert json.loads((run_dir / "args.json").read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_compiled_update_of_crossq_averages_its_batch_statistics_too(tmp_path):
    """In float64: its float32 rounding errors grow to 0.002, two steps of Adam, within four updates."""
    out, _ = finish(launch(HELPERS / "compiled_ranks.py", tmp_path))
    assert {"process 0: equal", "process 1: equal"} <= {*out.splitlines()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("script", ["ppo", "sac"])
def test_a_compiled_update_averages_too(script, tmp_path):
    flags = ["--no-track", "--eval-episodes", 0, "--save-interval", 100]
    if script == "sac":  # 100 updates: after some hundred more, rounding errors grow into other weights
        flags += ["--env-id", "Pendulum-v1", "--num-envs", 2, "--learning-starts", 100, "--total-timesteps", 200]
    else:
        flags += ["--env-id", "CartPole-v1", "--num-envs", 4, "--total-timesteps", 600]
    final = []
    for more in ([], ["--compile"]):
        folder = tmp_path / f"runs{len(more)}"
        finish(launch(ROOT / "algos" / f"{script}.py", *flags, *more, "--runs-dir", folder))
        final.append(weights(only_run(folder)))
    for name, value in final[0].items():
        torch.testing.assert_close(final[1][name], value, rtol=1e-4, atol=1e-5, msg=name)
