"""PQN: Q(lambda) returns by brute force, its loss by hand, its choice of actions, and probe environments."""

import functools
import importlib.util
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import envs_of, load, network_of, only_run, rows, train_with, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pqn = load("pqn")
train = functools.partial(train_with, pqn)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    st.sampled_from([0.0, 0.65, 1.0]),
)
def test_returns_are_the_weighted_sum_of_n_step_returns_within_each_hand_cut_episode(
    num_steps, num_envs, seed, gamma, lam
):
    rng = np.random.default_rng(seed)
    rewards, next_values = rng.normal(size=(2, num_steps, num_envs))
    terminations, truncations = rng.random((2, num_steps, num_envs)) < 0.25
    next_values[terminations & (rng.random((num_steps, num_envs)) < 0.5)] = -np.inf  # no action is allowed any more
    stored = {"rewards": rewards, "terminations": terminations, "truncations": truncations}
    rollout = SimpleNamespace(**{name: torch.tensor(value) for name, value in stored.items()})
    args = pqn.Args(gamma=gamma, q_lambda=lam)
    result = pqn.q_lambda_returns(rollout, torch.tensor(next_values), args)
    for env in range(num_envs):
        for t in range(num_steps):
            n_step, discounted = [], 0.0
            for k in range(t, num_steps):
                discounted += gamma ** (k - t) * rewards[k, env]
                bootstrap = 0.0 if terminations[k, env] else gamma ** (k - t + 1) * next_values[k, env]
                n_step.append(discounted + bootstrap)
                if terminations[k, env] or truncations[k, env]:
                    break
            total = sum((1 - lam) * lam**n * value for n, value in enumerate(n_step[:-1]))
            total += lam ** (len(n_step) - 1) * n_step[-1]
            assert result[t, env].item() == pytest.approx(total, abs=1e-6)
    assert torch.equal(rollout.rewards, torch.tensor(rewards))  # which the minibatches have too


class Table(nn.Module):
    """Q(s, a) = table[s, a] for obs [B, 1] that hold s."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table, dtype=torch.float64))

    def forward(self, obs):
        return self.table[obs[:, 0].long()]


def test_loss_and_gradient_against_a_hand_computation():
    network = Table([[1.0, 2.0], [5.0, 3.0]])
    mb = SimpleNamespace(
        obs=torch.tensor([[0], [1], [0], [0]]),
        actions=torch.tensor([1, 0, 0, 1]),
        returns=torch.tensor([3.0, 1.0, 1.5, 0.0], dtype=torch.float64),
    )
    loss, metrics = pqn.pqn_loss(network, mb)
    loss.backward()
    # Errors Q - R: 2 - 3, 5 - 1, 1 - 1.5, 2 - 0.
    assert loss.item() == pytest.approx((1 + 16 + 0.25 + 4) / 4)
    assert metrics["losses/td_loss"].item() == loss.item()
    assert metrics["losses/q_values"].item() == pytest.approx((2 + 5 + 1 + 2) / 4)
    assert np.allclose(network.table.grad.numpy(), [[2 * -0.5 / 4, 2 * (-1 + 2) / 4], [2 * 4 / 4, 0]])


@pytest.mark.parametrize("flags", [{"env_id": "CartPole-v1"}, {"env_id": "Pixels-v0", "clip_rewards": True}])
def test_the_first_update_of_a_rollout_starts_from_the_values_that_acted_and_were_bootstrapped_from(
    flags, tmp_path, monkeypatch
):
    acted, updates = {}, []

    class Spy(pqn.QNetwork):
        def sample(self, obs, action_mask, epsilon):
            for row, q in zip(obs, self(obs), strict=True):
                acted[tuple(row.flatten().tolist())] = q
            return super().sample(obs, action_mask, epsilon)

    def spy(q_network, mb):
        with torch.no_grad():
            expected = torch.stack([acted[tuple(row.flatten().tolist())] for row in mb.obs])
            next_values = q_network(mb.next_obs).amax(dim=1)
            targets = mb.rewards + 0.9 * next_values * ~mb.terminations
            gap = (q_network(mb.obs) - expected).abs().max(), (mb.returns - targets).abs().max()
        updates.append([float(x) for x in gap])
        return loss(q_network, mb)

    loss = pqn.pqn_loss
    monkeypatch.setattr(pqn, "QNetwork", Spy)
    monkeypatch.setattr(pqn, "pqn_loss", spy)
    flags = {**flags, "num_envs": 4, "num_steps": 20, "num_minibatches": 2, "update_epochs": 2}
    train(tmp_path, total_timesteps=240, q_lambda=0.0, gamma=0.9, **flags)
    assert len(updates) == 3 * 4
    assert all(gap < 1e-5 for update in updates[::4] for gap in update)
    assert min(update[0] for update in updates[3::4]) > 1e-5


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pixels-v0"])
def test_every_hidden_layer_is_normalised_over_all_of_it_before_its_relu(env_id):
    envs = envs_of(env_id, 1)
    network, before, after = pqn.QNetwork(envs, pqn.Args(hidden_sizes=(32, 16, 8))), [], []
    *hidden, _ = (module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    for module in hidden:
        module.register_forward_hook(lambda module, words, result: before.append(result.flatten(1)))
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(lambda module, words: after.append(words[0].flatten(1)))
    network(torch.randint(0, 256, (5, *envs.single_observation_space.shape), dtype=torch.uint8).float())
    assert len(before) == len(after) == (4 if env_id == "Pixels-v0" else 3)
    for x, normalised in zip(before, after, strict=True):
        mean, var = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
        assert torch.allclose(normalised, (x - mean) / (var + 1e-5).sqrt(), atol=1e-4)


def test_each_environment_explores_for_itself_and_never_beyond_its_mask():
    envs = envs_of("Taxi-v4", 1)  # 6 actions
    torch.manual_seed(0)
    network, n, epsilon = pqn.QNetwork(envs, pqn.Args()), 60_000, 0.4
    obs = torch.zeros(1, *envs.single_observation_space.shape).expand(n, -1)
    mask = torch.tensor([True, False, True, True, False, True]).expand(n, -1)
    for action_mask, allowed in ((None, range(6)), (mask, (0, 2, 3, 5))):
        best = network.greedy(obs[:1], None if action_mask is None else action_mask[:1]).item()
        with torch.no_grad():
            counts = torch.bincount(network.sample(obs, action_mask, epsilon), minlength=6) / n
        for action in range(6):
            share = epsilon / len(allowed) * (action in allowed) + (1 - epsilon) * (action == best)
            # Five standard errors of a share of n draws.
            assert counts[action].item() == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / n))


@pytest.mark.parametrize("num_envs", [1, 3])
def test_budget_and_epsilon_follow_environment_steps(num_envs, tmp_path, monkeypatch):
    updates, epsilons = [], []
    real = pqn.pqn_loss
    monkeypatch.setattr(pqn, "pqn_loss", lambda *words: updates.append(len(words[1].obs)) or real(*words))

    class Spy(pqn.QNetwork):
        def sample(self, obs, action_mask, epsilon):
            epsilons.append(epsilon)
            return super().sample(obs, action_mask, epsilon)

    monkeypatch.setattr(pqn, "QNetwork", Spy)
    flags = {"num_envs": num_envs, "num_steps": 40, "num_minibatches": 3, "update_epochs": 2, "log_interval": 100}
    flags |= {"start_e": 0.9, "end_e": 0.2, "exploration_fraction": 0.25, "total_timesteps": 600}
    run = train(tmp_path, **flags)
    rollouts = math.ceil(600 / (40 * num_envs))
    assert sum(updates) == 2 * rollouts * 40 * num_envs and len(updates) == 2 * 3 * rollouts
    steps = range(0, 40 * num_envs * rollouts, num_envs)
    assert epsilons == pytest.approx([max(0.9 - 0.7 * step / 150, 0.2) for step in steps])
    logged = [row for row in rows(run) if "charts/epsilon" in row]
    assert [row["charts/epsilon"] for row in logged] == [epsilons[row["global_step"] // num_envs - 1] for row in logged]
    lrs = [pqn.Args().learning_rate * (1 - (row["global_step"] - 40 * num_envs) / 600) for row in logged]
    assert [row["charts/learning_rate"] for row in logged] == pytest.approx(lrs)


@pytest.mark.parametrize("clip_rewards", [False, True])
def test_images_are_learnt_by_the_convolutions(clip_rewards, tmp_path):
    flags = {"total_timesteps": 1024, "num_envs": 8, "num_steps": 8, "num_minibatches": 2, "end_e": 0.5}
    run = train(tmp_path, env_id="Pixels-v0", clip_rewards=clip_rewards, learning_rate=1e-3, **flags)
    images = torch.stack([torch.full((2, 36, 40), x, dtype=torch.uint8) for x in (0, 255)])
    with torch.no_grad():
        dark, bright = network_of(run)(images)
    size = 1.0 if clip_rewards else 5.0
    assert dark.tolist() == pytest.approx([size, -size], abs=0.3 * size)
    assert bright.tolist() == pytest.approx([-size, size], abs=0.3 * size)
    assert {row["charts/episodic_return"] for row in rows(run) if "charts/episodic_return" in row} == {5.0, -5.0}


def test_an_episode_that_ends_and_is_cut_at_once_is_learnt_from_as_ended(tmp_path, monkeypatch):
    """What `python -m common check` has no environment for."""
    seen = []
    real = pqn.q_lambda_returns
    monkeypatch.setattr(pqn, "q_lambda_returns", lambda *words: seen.append(real(*words)) or seen[-1])
    flags = {"num_envs": 2, "num_steps": 10, "total_timesteps": 20, "num_minibatches": 1}
    train(tmp_path, env_id="BothAtOnce-v0", gamma=1.0, q_lambda=1.0, **flags)
    (returns,) = seen
    # Rewards 1, 2, 3 ... in episodes of 3, 5 and 2 steps.
    expected = list(itertools.chain.from_iterable([sum(range(t, n + 1)) for t in range(1, n + 1)] for n in (3, 5, 2)))
    assert returns.T.tolist() == [expected, expected]


@pytest.mark.skipif(importlib.util.find_spec("ale_py") is None, reason="needs ale-py")
def test_an_atari_game_runs_from_pixels(tmp_path):
    flags = {"num_envs": 2, "num_steps": 16, "total_timesteps": 64, "num_minibatches": 2, "update_epochs": 1}
    run = train(tmp_path, env_id="ALE/Breakout-v5", clip_rewards=True, **flags, log_interval=1)
    assert "losses/td_loss" in set().union(*rows(run))
    assert weights(run)["network.1.weight"].shape == (32, 20, 20)


def test_native_environments_are_trained_in_as_many_rollouts(tmp_path):
    flags = {"total_timesteps": 2000, "num_envs": 8, "num_steps": 25, "num_minibatches": 2, "log_interval": 500}
    plain, native = (train(tmp_path, native_envs=native, **flags) for native in (False, True))
    for run in (plain, native):
        assert [row["global_step"] for row in rows(run) if "losses/td_loss" in row] == [600, 1000, 1600, 2000]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"env_id": "Pendulum-v1"}, "PQN needs a Discrete action space"),
        ({"num_envs": 2, "num_steps": 7, "num_minibatches": 8}, "--num-minibatches must leave at least 2 samples each"),
    ],
)
def test_what_it_cannot_train_with_is_one_line(flags, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, **flags)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, total_timesteps=2000, num_envs=4, num_steps=32, learning_rate=1e30, log_interval=100)
    assert stop.value.code == 4
    assert "losses/td_loss is" in capsys.readouterr().err
    for value in weights(only_run(next(tmp_path.iterdir()))).values():
        assert value.isfinite().all()  # the last good policy was not written over
