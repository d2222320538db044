"""The algorithm: its loss by hand, its schedule, its counts, and worlds whose Q-values are known."""

import functools
import importlib.util
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import envs_of, load, network_of, only_run, rows, same, train_with, weights
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


@pytest.mark.parametrize("num_envs", [1, 3, 8])
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


@pytest.mark.parametrize("num_envs", [1, 7])
@pytest.mark.parametrize("env_id", ["Uneven-v0", "Mixed-v0", "Terminating-v0", "Truncating-v0", "BothAtOnce-v0"])
def test_every_episode_is_logged_once_and_every_stored_transition_is_true(env_id, num_envs, tmp_path, monkeypatch):
    stored = []

    class Spy(common.ReplayBuffer):
        def add(self, **step):
            stored.append({name: value.clone() for name, value in step.items()})
            super().add(**step)

    monkeypatch.setattr(common, "ReplayBuffer", Spy)
    run = train(tmp_path, env_id=env_id, total_timesteps=300, num_envs=num_envs, learning_starts=50, learning_rate=1e-5)
    for step in stored:
        assert torch.equal(step["next_obs"], step["obs"] + 1)
    lengths = {"Uneven-v0": (1, 30, 4)}.get(env_id, (3, 5, 2))
    vector_steps = math.ceil(300 / num_envs)
    expected, t, k = [], 0, 0
    while t + lengths[k % 3] <= vector_steps:
        n = lengths[k % 3]
        t, k = t + n, k + 1
        expected += [(t * num_envs, n * (n + 1) / 2, n)] * num_envs
    logged = [
        (row["global_step"], row["charts/episodic_return"], row["charts/episodic_length"])
        for row in rows(run)
        if "charts/episodic_return" in row
    ]
    assert logged == expected
    terminations = sum(int(step["terminations"].sum()) for step in stored)
    ended = len(expected)
    ends = {"Truncating-v0": 0, "Terminating-v0": ended, "BothAtOnce-v0": ended}
    mixed = num_envs * math.ceil(ended / num_envs / 2)
    assert terminations == ends.get(env_id, mixed)


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


PROBES = {
    # world: (gamma, {observation: Q(s, 0), Q(s, 1)}); the limit is the closed form, not what came out
    "Probe-constant-v0": {0.0: (1.0, 1.0)},
    "Probe-obs-v0": {-1.0: (-1.0, -1.0), 1.0: (1.0, 1.0)},
    "Probe-discount-v0": {0.0: (0.5, 0.5), 1.0: (1.0, 1.0)},
    "Probe-action-v0": {0.0: (-1.0, 1.0)},
    "Probe-both-v0": {-1.0: (1.0, -1.0), 1.0: (-1.0, 1.0)},
}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("env_id", PROBES)
def test_probe_environments_reach_their_values(env_id, double, tmp_path):
    run = train(
        tmp_path,
        env_id=env_id,
        double=double,
        gamma=0.5,
        total_timesteps=2500,
        learning_starts=100,
        train_frequency=2,
        target_network_frequency=20,
        learning_rate=3e-3,
        batch_size=64,
        end_e=0.5,
    )
    for obs, expected in PROBES[env_id].items():
        assert q_values(run, [[obs]])[0].tolist() == pytest.approx(expected, abs=0.05)


def test_a_time_limit_is_no_end_of_the_world(tmp_path):
    # Reward 1 for ever, episodes cut after 5 steps: Q = 1 / (1 - gamma). Truncation taken for death gives at most 2.4.
    gamma = 0.8
    run = train(
        tmp_path,
        env_id="Endless-v0",
        gamma=gamma,
        total_timesteps=6000,
        learning_starts=100,
        train_frequency=2,
        target_network_frequency=50,
        learning_rate=3e-3,
        batch_size=64,
    )
    values = q_values(run, [[0.0, 0.0], [0.5, -0.5]])
    assert torch.allclose(values, torch.full((2, 2), 1 / (1 - gamma)), atol=0.25)


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


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    first = train(tmp_path, **SMALL)
    assert same(weights(first), weights(train(tmp_path, **SMALL)))
    assert not same(weights(first), weights(train(tmp_path, **SMALL, seed=2)))
    keep = ("global_step", "charts/episodic_return", "losses/td_loss", "losses/q_values")

    def story(run):
        return [{key: row[key] for key in keep if key in row} for row in rows(run)]

    assert story(first) == story(train(tmp_path, **SMALL))


def test_evaluation_and_video_change_no_weight(tmp_path):
    plain = weights(train(tmp_path, **SMALL))
    evaluated = train(tmp_path, **SMALL, eval_episodes=3, eval_interval=150, capture_video=False)
    filmed = train(tmp_path, **SMALL, eval_episodes=3, eval_interval=150)
    assert same(plain, weights(evaluated))
    assert same(plain, weights(filmed))
    assert len(list((filmed / "videos").iterdir())) == 4
    assert not (evaluated / "videos").exists()


def test_parameters_move_and_only_after_learning_starts(tmp_path):
    still = weights(train(tmp_path, **{**SMALL, "learning_starts": 600}))
    moved = weights(train(tmp_path, **SMALL))
    for name in still:
        assert not torch.equal(still[name], moved[name]), name
    torch.manual_seed(1)
    envs = envs_of("CartPole-v1", 1)
    initial = dqn.QNetwork(envs, dqn.Args()).state_dict()
    assert same(still, initial)


def test_boolean_flags_of_the_algorithm_change_what_is_learnt(tmp_path):
    base = {**SMALL, "env_id": "Probe-discount-v0", "gamma": 0.9, "target_network_frequency": 50}
    plain = weights(train(tmp_path, **base))
    assert not same(plain, weights(train(tmp_path, **base, anneal_lr=False)))
    assert not same(plain, weights(train(tmp_path, **base, double=False)))
    pixels = {**SMALL, "env_id": "Pixels-v0", "total_timesteps": 150}
    assert not same(weights(train(tmp_path, **pixels)), weights(train(tmp_path, **pixels, clip_rewards=True)))


def test_the_step_size_falls_to_zero_unless_told_not_to(tmp_path):
    def logged(**flags):
        run = train(tmp_path, **SMALL, learning_rate=0.5, **flags)
        return [row["charts/learning_rate"] for row in rows(run) if "charts/learning_rate" in row]

    assert logged() == pytest.approx([0.5 * (1 - step / 600) for step in range(100, 601, 100)])
    assert logged()[-1] == 0.0
    assert set(logged(anneal_lr=False)) == {0.5}


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
