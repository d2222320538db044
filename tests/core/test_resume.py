"""A run killed and resumed, again and again, is the run that was not: weights, metrics, and a hash of all of it."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from conftest import HELPERS, clockless, load, only_run, rows, run_script, same, train_with, weights
from fake_wandb import FakeWandb

import common
from common.internals.tracking.local_loggers import TensorBoard

CHAINED = str(HELPERS / "chained.py")
TIMEOUT = 300


def start(script, flags):
    return warm.Warm([CHAINED, script, *flags])


def finish(process):
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, f"exit {process.returncode}\n{out}\n{err}"
    return out


def newest(run_dir):
    return max((path.name for path in run_dir.glob("checkpoints/step-*.pt")), default="")


def wait_for_checkpoint(process, folder, after):
    """The run directory, once it has a checkpoint newer than `after`; None if the run ends before."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        for run_dir in folder.glob("*"):
            if newest(run_dir) > after:
                return run_dir
        if process.poll() is not None:
            return None
        time.sleep(0.02)
    raise AssertionError("no checkpoint was written")


def interrupted(script, flags, folder, numbers, rng, delay=1.0):
    """Runs to the end, stopped by signal after signal; returns the run directory and how often it was stopped."""
    process = start(script, [*flags, "--runs-dir", folder])
    after, stops = "", 0
    for number in numbers:
        run_dir = wait_for_checkpoint(process, folder, after)
        if run_dir is None:
            break
        time.sleep(rng.uniform(0, delay))
        after = newest(run_dir)
        process.send_signal(number)
        _, err = process.communicate(timeout=TIMEOUT)
        if process.returncode == 0:
            break
        stops += 1
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 128 + number, err
            assert f"--resume {run_dir}" in err
            after = newest(run_dir)
        process = start(script, ["--resume", run_dir])
    if process.poll() is None:
        finish(process)
    return only_run(folder), stops


def same_metrics(a, b):
    return clockless(a) == clockless(b)


def tensorboard(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag != "charts/SPS" and not tag.startswith("health/time_")
    }


# Rows are not due where checkpoints are: the episodes since the last one are part of the state.
QUICK = ["--no-track", "--no-capture-video", "--eval-episodes", 3, "--log-interval", 700]
DQN = [*QUICK, "--total-timesteps", 12_000, "--save-interval", 500, "--learning-starts", 500, "--eval-interval", 4000]
PPO = [*QUICK, "--save-interval", 500, "--eval-interval", 4000, "--num-envs", 2]
PQN = [*QUICK, "--total-timesteps", 60_000, "--save-interval", 1000, "--eval-interval", 20_000, "--num-envs", 4]
RING = ["--buffer-size", 3000]
EPOCHS = ["--num-steps", 64, "--sequence-length", 32, "--update-epochs", 4]
NORMALISED = ["--norm-obs", "--norm-reward", "--num-steps", 128, "--num-minibatches", 4, "--update-epochs", 4]
MUJOCO = [*PPO, *NORMALISED, "--total-timesteps", 16_000]
ATARI = ["--env-id", "ALE/Breakout-v5", "--total-timesteps", 3000, "--save-interval", 300, "--batch-size", 8]
SHORT = ["--total-timesteps", 2500]

CASES = {
    "dqn CartPole": ("dqn", DQN),
    "dqn CartPole, full ring": ("dqn", [*DQN, *RING]),
    "dqn CartPole, 2 threads": ("dqn", [*DQN, "--torch-threads", 2]),
    "dqn CartPole, compiled": ("dqn", [*DQN, "--compile"]),
    "dqn CartPole, 3 environments in processes": ("dqn", [*DQN, "--num-envs", 3, "--async-envs"]),
    "dqn_lightning CartPole, full ring": ("dqn_lightning", [*DQN, *RING]),
    "dqn LunarLander": ("dqn", [*DQN, "--env-id", "LunarLander-v3"]),
    "rainbow CartPole, full ring": ("rainbow", [*DQN, *RING]),
    "rainbow CartPole, compiled": ("rainbow", [*DQN, *RING, "--compile"]),
    "rainbow Breakout": ("rainbow", [*DQN, "--buffer-size", 1000, *ATARI]),
    "ppo CartPole": ("ppo", [*PPO, "--total-timesteps", 30_000]),
    "pqn CartPole": ("pqn", PQN),
    "pqn CartPole, compiled": ("pqn", [*PQN, "--compile"]),
    "ppo HalfCheetah, normalised": ("ppo", [*MUJOCO, "--env-id", "HalfCheetah-v5"]),
    "ppo HalfCheetah, normalised, in processes": ("ppo", [*MUJOCO, "--env-id", "HalfCheetah-v5", "--async-envs"]),
    "ppo Ant, normalised, 2 threads": ("ppo", [*MUJOCO, "--env-id", "Ant-v5", "--torch-threads", 2]),
    "ppo_recurrent CartPole": ("ppo_recurrent", [*PPO, *EPOCHS, "--total-timesteps", 60_000]),
    "ppo_recurrent CartPole, GRU": ("ppo_recurrent", [*PPO, *EPOCHS, "--no-lstm", "--total-timesteps", 30_000]),
    "ppo_recurrent CartPole, compiled": ("ppo_recurrent", [*PPO, *EPOCHS, "--compile", "--total-timesteps", 60_000]),
    "sac Pendulum": ("sac", [*QUICK, *SHORT, "--learning-starts", 200, "--save-interval", 200]),
    "sac Pendulum, compiled": ("sac", [*QUICK, "--compile", "--learning-starts", 200, "--save-interval", 200, *SHORT]),
    "crossq Pendulum, compiled": (
        "crossq",
        [*QUICK, "--compile", "--learning-starts", 200, "--save-interval", 200, *SHORT],
    ),
    "reinforce_rollout CartPole": ("reinforce_rollout", [*PPO, "--total-timesteps", 60_000]),
}
SMALL = ["--hidden-sizes", 32, 32, "--batch-size", 32]
RARE = ["--train-frequency", 4]
IN_CI = {
    "rainbow": [*DQN, *SMALL, *RARE, "--buffer-size", 600, "--total-timesteps", 3000, "--eval-interval", 1500],
    "pqn": [*PQN, "--num-steps", 32, "--total-timesteps", 10_000, "--save-interval", 250],
    "ppo": [*PPO, "--total-timesteps", 6000, "--save-interval", 250],
    "ppo_recurrent": [*PPO, *EPOCHS, "--total-timesteps", 6000, "--save-interval", 250],
    "crossq": [*QUICK, *SMALL, *RARE, "--learning-starts", 200, "--total-timesteps", 1200, "--save-interval", 100],
}


def check(script, flags, tmp_path, numbers, seed, least, delay=1.0):
    needs = {
        "LunarLander": "Box2D",
        "HalfCheetah": "mujoco",
        "Ant": "mujoco",
        "ALE": "ale_py",
        "lightning": "lightning",
    }
    for name, module in needs.items():
        if any(name in str(word) for word in [script, *flags]):
            pytest.importorskip(module)
    finish(start(script, [*flags, "--runs-dir", tmp_path / "whole"]))
    whole = only_run(tmp_path / "whole")
    began = time.monotonic()
    stopped, stops = interrupted(script, flags, tmp_path / "stopped", numbers, random.Random(seed), delay)
    print(f"{stops} stops in {time.monotonic() - began:.0f} s")
    assert stops >= least
    assert (whole / "chain").read_text() == (stopped / "chain").read_text()
    assert same(weights(whole), weights(stopped))
    assert same_metrics(whole, stopped)
    assert tensorboard(whole) == tensorboard(stopped)


@pytest.mark.parametrize("script", IN_CI)
def test_two_kills_change_nothing(script, tmp_path):
    check(script, IN_CI[script], tmp_path, [signal.SIGKILL] * 2, seed=1, least=1, delay=0.2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES)
def test_six_kills_change_nothing(case, tmp_path):
    check(*CASES[case], tmp_path, [signal.SIGKILL] * 6, seed=2, least=5)


def test_signals_stop_with_a_checkpoint_and_change_nothing(tmp_path):
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
    # Half of the time is evaluation, so that some of the signals fall into one.
    flags = [*DQN, *SMALL, "--eval-interval", 500, "--eval-episodes", 30, "--total-timesteps", 4000]
    check("dqn", flags, tmp_path, numbers, seed=3, least=3, delay=0.5)


@pytest.mark.parametrize("earlier", [0, 9])
def test_tensorboard_has_each_step_once(earlier, tmp_path, monkeypatch):
    """Also if a run is resumed within the second in which it began: tensorboard counts the files of a process, and
    sorts the tenth before the ninth."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(earlier))
    before = TensorBoard(tmp_path, {})
    for step in range(1, 11):
        before.log({"a": float(step)}, step, 0.0)
    before.flush()  # and killed: five of them came after the checkpoint
    after = TensorBoard(tmp_path, {}, resumed_at=5)
    for step in range(5, 13):  # the run logs the rows of the checkpoint's step again
        after.log({"a": float(step)}, step, 0.0)
    after.close(0)
    assert tensorboard(tmp_path) == {"a": [(step, float(step)) for step in range(1, 13)]}


@pytest.mark.parametrize("log_interval", [50, 70])
def test_a_kill_after_an_evaluation_leaves_its_row_once_in_tensorboard(log_interval, tmp_path, monkeypatch):
    """The checkpoint comes before the evaluation, and rows of its step before that."""

    class Killed(Exception):  # noqa: N818
        pass

    dqn = load("dqn")
    flags = {"env_id": "CartPole-v1", "total_timesteps": 300, "learning_starts": 40, "eval_interval": 100}
    flags |= {"eval_episodes": 2, "capture_video": False, "log_interval": log_interval}
    whole = train_with(dqn, tmp_path, **flags)
    log_evaluation = common.Run.log_evaluation

    def killed(self, metrics, step, video):
        log_evaluation(self, metrics, step, video)
        self.state_dict()  # all is on the disk
        if step == 200:
            raise Killed

    monkeypatch.setattr(common.Run, "log_evaluation", killed)
    before = set(tmp_path.rglob("checkpoints"))
    with pytest.raises(Killed):
        train_with(dqn, tmp_path, **flags)
    monkeypatch.setattr(common.Run, "log_evaluation", log_evaluation)
    (stopped,) = (path.parent for path in set(tmp_path.rglob("checkpoints")) - before)
    (stopped / ".lock").unlink()  # the first run's, which is still in this process
    dqn.main(dqn.Args(**flags, track=False, cuda=False, runs_dir=str(tmp_path), resume=str(stopped)))
    assert tensorboard(stopped) == tensorboard(whole)
    assert same_metrics(stopped, whole)


def test_a_resumed_run_continues_its_wandb_run(tmp_path):
    flags = ["--eval-episodes", 1, "--total-timesteps", 3000, "--save-interval", 500, "--log-interval", 100]
    flags += ["--no-capture-video", *SMALL]
    run_dir, stops = interrupted("dqn", flags, tmp_path, [signal.SIGKILL] * 2, random.Random(4), delay=0.2)
    assert stops == 2
    args = json.loads((run_dir / "args.json").read_text())
    logged = []
    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert {folder.name.split("-")[-1] for folder in folders} == {args["wandb_id"]}
    for folder in folders:  # one killed at once may hold no record at all
        inspect = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", folder]
        records = [json.loads(x) for x in subprocess.run(inspect, capture_output=True, text=True).stdout.splitlines()]
        assert {r["run"]["run_id"] for r in records if r["type"] == "run"} <= {args["wandb_id"]}
        logged.append(read_history(r["history"] for r in records if r["type"] == "history"))
    for steps in logged:
        assert list(steps) == sorted(steps)
    everything = {}
    for steps in logged:
        for step, row in steps.items():  # what both processes logged is the same, so that W&B may keep either
            assert everything.setdefault(step, row) == row
    # None is lost: what wandb had not written yet when it was killed has been logged again.
    assert {row["global_step"]: row["losses/td_loss"] for row in rows(run_dir) if "losses/td_loss" in row} == {
        step: row["losses/td_loss"] for step, row in everything.items() if "losses/td_loss" in row
    }

    printed = finish(start("dqn", ["--resume", run_dir, "--total-timesteps", 3100]))
    command = re.search(r"(wandb sync .*?)  or look", printed).group(1)
    assert command.count("wandb sync") == len(folders) + 1
    server = FakeWandb()
    try:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, **server.env, "PATH": path}
        subprocess.run(command, shell=True, env=environment, check=True, capture_output=True, timeout=60)
        (history,) = server.history.values()
    finally:
        server.close()
    uploaded = {row["global_step"] for row in history if "losses/td_loss" in row}
    assert uploaded == {row["global_step"] for row in rows(run_dir) if "losses/td_loss" in row}


def read_history(history):
    steps = {}
    for record in history:
        row = record["item"]
        mine = {k: v for k, v in row.items() if k.startswith("losses/")}
        assert row["_step"] == row["global_step"]
        steps.setdefault(row["global_step"], {}).update(mine)
    return steps


def quick_run(tmp_path, *more, script="dqn"):
    flags = ["--no-track", "--eval-episodes", 0, "--total-timesteps", 600, "--learning-starts", 100]
    run_script(*flags, "--save-interval", 200, "--runs-dir", tmp_path, *more, script=script)
    return only_run(tmp_path)


def test_a_finished_run_is_left_as_it_is(tmp_path):
    run_dir = quick_run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"}
    done = run_script("--resume", run_dir)
    assert "already complete, at step 600" in done.stdout
    after = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"}
    assert before == after


def test_a_finished_run_can_be_made_longer(tmp_path):
    run_dir = quick_run(tmp_path, "--save-interval", 250)
    done = run_script("--resume", run_dir, "--total-timesteps", 1000)
    assert "from step 600" in done.stdout
    assert json.loads((run_dir / "finished.json").read_text())["global_step"] == 1000
    steps = [row["global_step"] for row in rows(run_dir)]
    assert steps == sorted(steps) and steps[-1] == 1000


def test_an_argument_that_is_new_since_the_run_began_may_have_its_default_only(tmp_path):
    run_dir = quick_run(tmp_path, "--save-interval", 250)
    config = json.loads((run_dir / "args.json").read_text())
    (run_dir / "args.json").write_text(json.dumps({name: config[name] for name in config if name != "double"}))
    done = run_script("--resume", run_dir, "--total-timesteps", 1000, "--no-double", check=3)
    assert "double was True, is now False" in done.stderr
    run_script("--resume", run_dir, "--total-timesteps", 700)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--gamma", 0.5], "gamma was 0.99, is now 0.5"),
        (["--seed", 7], "seed was 1, is now 7"),
        (["--env-id", "Acrobot-v1"], "env_id was 'CartPole-v1', is now 'Acrobot-v1'"),
        (["--num-envs", 2, "--batch-size", 32], "num_envs was 1, is now 2, batch_size was 64, is now 32"),
    ],
)
def test_resume_refuses_flags_that_would_change_the_run(flags, says, tmp_path):
    run_dir = quick_run(tmp_path)
    (run_dir / "finished.json").unlink()
    before = (run_dir / "metrics.jsonl").read_bytes()
    done = run_script("--resume", run_dir, *flags, check=3)
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_resume_refuses_what_is_not_a_run_directory(tmp_path):
    done = run_script("--resume", tmp_path / "nothing", check=3)
    assert "is not a run directory" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    run_dir = quick_run(tmp_path)
    assert "is a run of dqn" in run_script("--resume", run_dir, script="ppo", check=3).stderr


def test_a_run_without_a_checkpoint_begins_again_in_its_place(tmp_path):
    run_dir = quick_run(tmp_path)
    expected, metrics = weights(run_dir), rows(run_dir)
    (run_dir / "finished.json").unlink()
    for path in (run_dir / "checkpoints").iterdir():
        path.unlink()
    done = run_script("--resume", run_dir)
    assert "has no checkpoint yet: it starts again from step 0" in done.stderr
    assert same(expected, weights(run_dir))
    assert [row["global_step"] for row in rows(run_dir)] == [row["global_step"] for row in metrics]


def test_two_processes_cannot_resume_one_run(tmp_path):
    process = start("dqn", ["--no-track", "--runs-dir", tmp_path, "--total-timesteps", 1_000_000])
    try:
        for line in process.stdout:
            if "dqn on" in line:
                break
        run_dir = only_run(tmp_path)
        done = run_script("--resume", run_dir, check=6)
        assert "in use by another process" in done.stderr
    finally:
        process.kill()
        process.wait()
    run_script("--resume", run_dir, "--total-timesteps", 500, check=0)  # the lock went with the process


def test_another_number_of_threads_is_reported(tmp_path):
    run_dir = quick_run(tmp_path)
    (run_dir / "finished.json").unlink()
    done = run_script("--resume", run_dir, "--torch-threads", 2)
    assert "resumed, but not to the bit: threads 1 -> 2" in done.stderr


def test_a_changed_script_is_reported(tmp_path):
    run_dir = quick_run(tmp_path)
    (run_dir / "finished.json").unlink()
    (run_dir / "source" / "dqn.py").write_text("another = 1")
    assert "has changed since the run began" in run_script("--resume", run_dir).stderr


def test_checkpoints_change_no_result(tmp_path):
    often = quick_run(tmp_path / "a", "--save-interval", 50)
    never = quick_run(tmp_path / "b", "--save-interval", 0)
    assert same(weights(often), weights(never))
    assert same_metrics(often, never)
    assert not (never / "checkpoints").exists()


def test_a_stop_without_checkpoints_keeps_the_policy(tmp_path):
    process = start("dqn", ["--no-track", "--total-timesteps", 10**6, "--save-interval", 0, "--runs-dir", tmp_path])
    for line in process.stdout:
        if "steps/s" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume" not in err
    assert os.path.exists(only_run(tmp_path) / "policy.pt")
