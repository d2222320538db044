"""The algorithm: its loss by hand, its schedule, its counts, and probe environments whose Q-values are known."""

import functools
import importlib.util
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load, network_of, only_run, rows, train_with, weights
from torch import nn

import common

dqn = load("dqn")
train = functools.partial(train_with, dqn)


def q_values(run_dir, obs):
    with torch.no_grad():
        return network_of(run_dir)(torch.as_tensor(np.asarray(obs, np.float32)))


class Table(nn.Module):
    """Q(s, a) = table[s, a] for obs [B, 1] that hold s."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table, dtype=torch.float64))

    def forward(self, obs):
        return self.table[obs[:, 0].long()]


@pytest.mark.parametrize("double", [False, True])
def test_loss_and_gradient_against_a_hand_computation(double):
    # Three transitions: an ordinary one, a terminated one, and one whose two networks disagree on the best action.
    q, target = [[1.0, 2.0], [5.0, 3.0], [0.5, 9.0]], [[4.0, 3.0], [2.0, 8.0], [7.0, 6.0]]
    s, a, r, s2 = [0, 1, 0], [1, 0, 0], [3.0, -4.0, 0.25], [1, 2, 2]
    terminated = [False, True, False]
    gradient = np.zeros((3, 2))
    losses = []
    for i in range(3):
        row, target_row = q[s2[i]], target[s2[i]]
        best = int(np.argmax(row if double else target_row))
        y = r[i] if terminated[i] else r[i] + 0.9 * target_row[best]
        losses.append((q[s[i]][a[i]] - y) ** 2)
        gradient[s[i], a[i]] += 2 * (q[s[i]][a[i]] - y) / 3

    network, frozen = Table(q), Table(target)
    batch = SimpleNamespace(
        obs=torch.tensor(s).unsqueeze(1),
        actions=torch.tensor(a),
        rewards=torch.tensor(r, dtype=torch.float64),
        next_obs=torch.tensor(s2).unsqueeze(1),
        terminations=torch.tensor(terminated),
    )
    loss, metrics = dqn.dqn_loss(network, frozen, batch, dqn.Args(double=double, gamma=0.9))
    loss.backward()
    assert loss.item() == pytest.approx(np.mean(losses), abs=1e-6)
    assert metrics["losses/td_loss"].item() == loss.item()
    assert metrics["losses/q_values"].item() == pytest.approx(np.mean([q[i][j] for i, j in zip(s, a, strict=True)]))
    assert np.allclose(network.table.grad.numpy(), gradient, atol=1e-6)
    assert frozen.table.grad is None


def test_epsilon_starts_and_ends_where_it_says():
    schedule = [dqn.linear_schedule(1.0, 0.05, 0.2 * 1000, t) for t in range(1001)]
    assert schedule[0] == 1.0
    assert schedule[200] == 0.05
    assert set(schedule[200:]) == {0.05}
    assert schedule[50] == pytest.approx(1 - 0.95 / 4)
    assert all(a >= b for a, b in itertools.pairwise(schedule))
    assert dqn.linear_schedule(1.0, 0.1, 0.0, 0) == 0.1  # --exploration-fraction 0


def test_polyak_update_is_the_weighted_mean():
    torch.manual_seed(0)
    network, target = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = [0.75 * t + 0.25 * p for p, t in zip(network.parameters(), target.parameters(), strict=True)]
    dqn.polyak_update(network, target, 0.25)
    for t, e in zip(target.parameters(), expected, strict=True):
        assert torch.allclose(t, e, atol=1e-7)
    dqn.polyak_update(network, target, 1.0)
    for p, t in zip(network.parameters(), target.parameters(), strict=True):
        assert torch.equal(p, t)


@pytest.mark.parametrize("num_envs", [3, 8])
def test_budget_updates_and_targets_follow_environment_steps(num_envs, tmp_path, monkeypatch):
    counts = {"step": 0, "update": 0, "target": 0, "epsilon": []}

    class Counted(common.Envs):
        def step(self, actions):
            counts["step"] += len(actions)
            return super().step(actions)

    def counted(name, function):
        def wrapper(*words):
            counts[name] += 1
            return function(*words)

        return wrapper

    def schedule(start, end, duration, t):
        if start == 1.0:
            counts["epsilon"].append(t)
        return dqn_schedule(start, end, duration, t)

    dqn_schedule = dqn.linear_schedule
    monkeypatch.setattr("common.envs.Envs", Counted)
    monkeypatch.setattr(dqn, "dqn_loss", counted("update", dqn.dqn_loss))
    monkeypatch.setattr(dqn, "polyak_update", counted("target", dqn.polyak_update))
    monkeypatch.setattr(dqn, "linear_schedule", schedule)
    run = train(
        tmp_path,
        env_id="CartPole-v1",
        total_timesteps=1000,
        num_envs=num_envs,
        learning_starts=100,
        train_frequency=4,
        target_network_frequency=50,
        log_interval=100,
    )
    taken = math.ceil(1000 / num_envs) * num_envs
    assert counts["step"] == taken
    assert counts["update"] == (taken - 100) // 4
    assert counts["target"] == (taken - 100) // 50
    assert counts["epsilon"] == list(range(0, taken, num_envs))
    logged = [row["global_step"] for row in rows(run) if "charts/SPS" in row]
    assert len(logged) == taken // 100
    assert logged == sorted(logged)
    assert logged[-1] <= taken


def test_an_episode_that_ends_and_is_cut_at_once_is_stored_as_ended(tmp_path, monkeypatch):
    """What `python -m common check` has no environment for."""
    stored = []

    class Spy(common.ReplayBuffer):
        def add(self, **step):
            stored.append({name: value.clone() for name, value in step.items() if value is not None})
            super().add(**step)

    monkeypatch.setattr(common, "ReplayBuffer", Spy)
    run = train(tmp_path, env_id="BothAtOnce-v0", total_timesteps=140, num_envs=7, learning_starts=50)
    assert [step["terminations"].tolist() for step in stored] == [
        [t in (2, 7, 9, 12, 17, 19)] * 7
        for t in range(20)  # episodes of 3, 5, 2, 3, 5, 2 steps
    ]
    assert all(torch.equal(step["next_obs"], step["obs"] + 1) for step in stored)
    logged = [row["charts/episodic_length"] for row in rows(run) if "charts/episodic_length" in row]
    assert logged == [length for length in (3, 5, 2, 3, 5, 2) for _ in range(7)]


@pytest.mark.parametrize("clip_rewards", [False, True])
def test_the_sign_of_each_reward_is_stored_if_it_is_clipped(clip_rewards, tmp_path, monkeypatch):
    stored = []
    add = common.ReplayBuffer.add
    monkeypatch.setattr(common.ReplayBuffer, "add", lambda self, **step: stored.append(step) or add(self, **step))
    train(tmp_path, env_id="Uneven-v0", total_timesteps=60, learning_starts=50, clip_rewards=clip_rewards)
    lengths = itertools.cycle((1, 30, 4))
    rewards = itertools.chain.from_iterable(range(1, length + 1) for length in lengths)
    expected = [1.0 if clip_rewards else float(reward) for reward in itertools.islice(rewards, 60)]
    assert torch.cat([step["rewards"] for step in stored]).tolist() == expected


@pytest.mark.skipif(importlib.util.find_spec("ale_py") is None, reason="needs ale-py")
def test_atari_frames_are_stored_once(tmp_path, monkeypatch):
    made = []

    class Kept(common.ReplayBuffer):
        def __init__(self, *words, **options):
            super().__init__(*words, **options)
            made.append(self)

    monkeypatch.setattr(common, "ReplayBuffer", Kept)
    flags = {"total_timesteps": 60, "learning_starts": 40, "buffer_size": 100, "batch_size": 4, "train_frequency": 10}
    train(tmp_path, env_id="ALE/Pong-v5", **flags)
    (replay,) = made
    assert replay.frame_stack == 4
    assert "obs" not in replay.fields and len(replay.frames.ring) == 104


@pytest.mark.parametrize("clip_rewards", [False, True])
def test_images_are_learnt_by_the_convolutions(clip_rewards, tmp_path):
    run = train(
        tmp_path,
        env_id="Pixels-v0",
        clip_rewards=clip_rewards,
        total_timesteps=400,
        buffer_size=400,
        learning_starts=50,
        train_frequency=2,
        target_network_frequency=20,
        learning_rate=1e-3,
        batch_size=32,
        end_e=0.5,
    )
    dark, bright = q_values(run, np.stack([np.full((2, 36, 40), x) for x in (0, 255)]))
    size = 1.0 if clip_rewards else 5.0
    assert dark.tolist() == pytest.approx([size, -size], abs=0.3 * size)
    assert bright.tolist() == pytest.approx([-size, size], abs=0.3 * size)
    assert {row["charts/episodic_return"] for row in rows(run) if "charts/episodic_return" in row} == {5.0, -5.0}


SMALL = {"env_id": "CartPole-v1", "total_timesteps": 600, "learning_starts": 100, "log_interval": 100}


def test_a_wrong_action_space_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, env_id="Pendulum-v1")
    assert stop.value.code == 2
    assert "DQN needs a Discrete action space" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, **{**SMALL, "learning_rate": 1e30})
    assert stop.value.code == 4
    assert "losses/td_loss is" in capsys.readouterr().err
    for value in weights(only_run(next(tmp_path.iterdir()))).values():
        assert value.isfinite().all()  # the last good policy was not written over


@pytest.mark.parametrize("num_envs", [1, 3])
def test_epsilon_falls_over_its_share_of_the_run_and_no_longer(num_envs, tmp_path):
    flags = {"start_e": 0.9, "end_e": 0.2, "exploration_fraction": 0.25, "total_timesteps": 600, "log_interval": 30}
    run_dir = train(tmp_path, num_envs=num_envs, learning_starts=500, **flags)
    logged = {row["global_step"]: row["charts/epsilon"] for row in rows(run_dir) if "charts/epsilon" in row}
    assert len(logged) == 20
    for step, epsilon in logged.items():
        acted_at = step - num_envs  # the steps before the ones that were just taken
        assert epsilon == pytest.approx(max(0.9 - 0.7 * acted_at / 150, 0.2))
