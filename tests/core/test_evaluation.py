"""Evaluation: which episodes count, and what it may touch (P19, P20, P22)."""

import random

import numpy as np
import pytest
import torch
from conftest import envs_of, load, only_run, rows
from torch import nn

from common.evaluation import PARALLEL_ENVS, play


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
