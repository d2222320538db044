"""Evaluation: which episodes count, and what it may touch (P19, P20, P22)."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import envs_of, load, only_run, rows, run_script, run_tool, same, weights
from torch import nn

from common.evaluation import PARALLEL_ENVS, play

# Its best evaluation is not its last one.
UNSTEADY = ["--total-timesteps", 9216, "--eval-interval", 1024, "--eval-episodes", 3, "--learning-rate", 0.02]
UNSTEADY += ["--no-anneal-lr", "--no-track", "--no-capture-video"]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.modes = set()

    def parameters(self, recurse=True):
        return iter([torch.zeros(1)])

    def zeros(self, obs):
        self.modes.add(self.training)
        return torch.zeros(len(obs), dtype=torch.int64)

    def noisy(self, obs):
        np.random.random(), random.random()  # noqa: NPY002
        return torch.randint(2, (len(obs),))


@pytest.mark.parametrize("episodes", [1, 4, 10, 12, 25])
def test_short_episodes_count_no_more_than_long_ones(episodes):
    # Each of these environments plays episodes of 1, 30, 4, 1, 30 ... steps; episode e is number e // 10 of its own.
    returns, lengths = play(Network().zeros, "Uneven-v0", episodes, seed=1)
    expected = [(1, 30, 4)[e // PARALLEL_ENVS % 3] for e in range(episodes)]
    assert lengths.tolist() == expected
    assert returns.tolist() == [n * (n + 1) / 2 for n in expected]


def test_evaluation_restores_everything_it_changes():
    network = Network()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = play(network.noisy, "CartPole-v1", 5, seed=1)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert np.array_equal(before[2], after[2])
    torch.manual_seed(99)
    assert np.array_equal(first[0], play(network.noisy, "CartPole-v1", 5, seed=1)[0])
    assert not np.array_equal(first[0], play(network.noisy, "CartPole-v1", 5, seed=2)[0])
    play(network.zeros, "CartPole-v1", 1, seed=1)
    assert network.modes == {False}
    assert network.training


def test_evaluation_environments_are_not_those_of_training():
    seen = []

    class Recorder(Network):
        def zeros(self, obs):
            seen.append(obs)
            return super().zeros(obs)

    play(Recorder().zeros, "CartPole-v1", 3, seed=1)
    training, _ = envs_of("CartPole-v1", 3).reset(seed=1)
    assert not (seen[0].unsqueeze(0) == training.unsqueeze(1)).all(dim=2).any()


@pytest.mark.parametrize(("interval", "steps"), [(0, [300]), (1000, [300]), (300, [300]), (100, [100, 200, 300])])
def test_there_is_one_evaluation_at_the_end_and_none_twice(interval, steps, tmp_path):
    dqn = load("dqn")
    flags = {"track": False, "cuda": False, "capture_video": False, "learning_starts": 100, "eval_episodes": 2}
    dqn.main(dqn.Args(total_timesteps=300, eval_interval=interval, runs_dir=str(tmp_path), **flags))
    table = rows(only_run(tmp_path))
    assert [row["global_step"] for row in table if "eval/episodic_return" in row] == steps


def logged_returns(run):
    return [(row["global_step"], row["eval/episodic_return"]) for row in rows(run) if "eval/episodic_return" in row]


def test_the_best_policy_is_kept_and_played_on_request(tmp_path):
    run_script(*UNSTEADY, "--runs-dir", tmp_path, script="ppo")
    run = only_run(tmp_path)
    best, last = max(mean for _, mean in logged_returns(run)), logged_returns(run)[-1][1]
    assert best > last  # or the two files could be mixed up
    assert f"episodic_return {best:.6g} " in run_tool("evaluate", run, "--best").stdout
    assert f"episodic_return {last:.6g} " in run_tool("evaluate", run).stdout
    (run / "policy_best.pt").unlink()
    assert "policy_best.pt is missing" in run_tool("evaluate", run, "--best", check=3).stderr


def test_the_best_return_survives_a_resume(tmp_path):
    """A resumed run whose evaluations are all worse than the best one before keeps that policy."""
    run_script(*UNSTEADY, "--runs-dir", tmp_path, script="ppo")
    run = only_run(tmp_path)
    before, best = (run / "policy_best.pt").read_bytes(), max(mean for _, mean in logged_returns(run))
    run_script("--resume", run, "--total-timesteps", 10_240, script="ppo")
    assert logged_returns(run)[-1][1] < best  # or it could not fail
    assert (run / "policy_best.pt").read_bytes() == before


def test_a_run_ends_when_an_evaluation_reaches_the_return_asked_for(tmp_path):
    run_script(*UNSTEADY, "--runs-dir", tmp_path / "a", script="ppo")
    whole = logged_returns(only_run(tmp_path / "a"))
    limit = max(mean for _, mean in whole)
    run_script(*UNSTEADY, "--runs-dir", tmp_path / "b", "--stop-at-return", limit, script="ppo")
    run = only_run(tmp_path / "b")
    reached = next(i for i, (_, mean) in enumerate(whole) if mean >= limit)
    assert 0 < reached < len(whole) - 1  # or it could not fail
    assert logged_returns(run) == whole[: reached + 1]
    assert json.loads((run / "finished.json").read_text())["global_step"] == whole[reached][0]
    assert (run / "policy.pt").read_bytes() == (run / "policy_best.pt").read_bytes()
    assert "already complete" in run_script("--resume", run, script="ppo").stdout
    run_script("--resume", run, "--stop-at-return", "None", script="ppo")  # the run that was not stopped, to the bit
    assert logged_returns(run) == whole
    assert same(weights(run), weights(only_run(tmp_path / "a")))
