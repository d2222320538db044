"""REINFORCE: returns by brute force, its loss by hand, its distributions, and worlds whose answers are known."""

import functools
import math

import numpy as np
import pytest
import torch
from conftest import envs_of, load, network_of, rows, same, train_with, weights
from hypothesis import given, settings
from hypothesis import strategies as st

import common

reinforce = load("reinforce_rollout")
train = functools.partial(train_with, reinforce)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 0.97, 1.0]))
def test_returns_are_the_sums_of_each_hand_cut_episode(num_steps, num_envs, seed, gamma):
    rng = np.random.default_rng(seed)
    rewards, next_values = rng.normal(size=(2, num_steps, num_envs))
    terminations, truncations = rng.random((2, num_steps, num_envs)) < 0.25
    result = reinforce.discounted_returns(
        *(torch.tensor(x) for x in (rewards, next_values, terminations, truncations)), gamma
    )
    for env in range(num_envs):
        for t in range(num_steps):
            total, discount = 0.0, 1.0
            for k in range(t, num_steps):
                total += discount * rewards[k, env]
                discount *= gamma
                if terminations[k, env]:
                    break
                if truncations[k, env] or k == num_steps - 1:
                    total += discount * next_values[k, env]
                    break
            assert result[t, env].item() == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("norm_adv", [True, False])
def test_loss_against_a_hand_computation(baseline, norm_adv):
    envs = envs_of("CartPole-v1", 1)
    torch.manual_seed(3)
    args = reinforce.Args(baseline=baseline, norm_adv=norm_adv, ent_coef=0.3, vf_coef=0.7)
    agent = reinforce.Agent(envs, args).double()
    obs, actions = torch.randn(4, 2, 4, dtype=torch.float64), torch.randint(2, (4, 2))
    returns = torch.randn(4, 2, dtype=torch.float64) * 3
    loss, metrics = reinforce.reinforce_loss(agent, obs, actions, returns, args)

    with torch.no_grad():
        logits = agent.actor(obs).reshape(8, 2).numpy()
        values = agent.critic(obs).reshape(8).numpy() if baseline else np.zeros(8)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    g = returns.reshape(8).numpy()
    a = g - values
    if norm_adv:
        a = (a - a.mean()) / (a.std(ddof=1) + 1e-8)
    pg = -np.mean([math.log(p[i, x]) * a[i] for i, x in enumerate(actions.flatten())])
    entropy = np.mean([-sum(q * math.log(q) for q in row) for row in p])
    v = np.mean((g - values) ** 2)
    assert loss.item() == pytest.approx(pg + 0.7 * v - 0.3 * entropy, abs=1e-6)
    assert metrics["losses/policy_loss"].item() == pytest.approx(pg, abs=1e-6)
    assert metrics["losses/value_loss"].item() == pytest.approx(v, abs=1e-6)
    assert metrics["losses/entropy"].item() == pytest.approx(entropy, abs=1e-6)
    assert metrics["losses/values"].item() == pytest.approx(values.mean(), abs=1e-6)
    variance = 1 - (g - values).var(ddof=1) / g.var(ddof=1)
    assert metrics["losses/explained_variance"].item() == pytest.approx(variance, abs=1e-6)
    # The baseline is no path for the policy's gradient: the critic learns from its own loss alone.
    loss.backward()
    for param in agent.critic.parameters():
        assert (param.grad is not None) == baseline
    if baseline:
        bias = agent.critic[-1].bias.grad.item()
        assert bias == pytest.approx(0.7 * 2 * (values - g).mean(), abs=1e-6)


def test_actions_are_drawn_from_the_policy_they_are_scored_by():
    torch.manual_seed(0)
    discrete = reinforce.Agent(envs_of("Acrobot-v1", 1), reinforce.Args())
    with torch.no_grad():
        discrete.actor[-1].bias.copy_(torch.tensor([0.0, 1.0, -2.0]))
        obs = torch.randn(1, 6).repeat(60_000, 1)
        p = discrete.policy(obs[0]).probs.numpy()
        counts = np.bincount(discrete.sample(obs).numpy(), minlength=3)
        assert ((counts - 60_000 * p) ** 2 / (60_000 * p)).sum() < 13.8  # 99.9 % of chi-square, 2 degrees of freedom
        box = reinforce.Agent(envs_of("Reach-v0", 1), reinforce.Args())
        box.actor_logstd.copy_(torch.tensor([-1.0, 0.5]))
        obs = torch.randn(1, 2).repeat(60_000, 1)
        actions = box.sample(obs)
        assert torch.allclose(actions.mean(0), box.greedy(obs[:1])[0], atol=0.03)
        assert torch.allclose(actions.std(0), torch.tensor([-1.0, 0.5]).exp(), rtol=0.02)
        assert np.corrcoef(actions.numpy().T)[0, 1] == pytest.approx(0, abs=0.02)  # a draw for each dimension


def test_log_probabilities_against_float64():
    torch.manual_seed(0)
    for env_id in ("Acrobot-v1", "Reach-v0"):
        agent = reinforce.Agent(envs_of(env_id, 1), reinforce.Args())
        dims = agent.actor[0].in_features
        obs = torch.randn(50, dims)
        with torch.no_grad():
            actions = agent.sample(obs)
            mine = agent.policy(obs).log_prob(actions).double()
            out = agent.double().actor(obs.double())
        if agent.discrete:
            theirs = torch.distributions.Categorical(logits=out).log_prob(actions)
        else:
            theirs = torch.distributions.Normal(out, agent.actor_logstd.exp()).log_prob(actions.double()).sum(-1)
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("env_id", ["Probe-action-v0", "Probe-both-v0"])
def test_probe_environments_are_solved(env_id, baseline, tmp_path):
    run = train(
        tmp_path, env_id=env_id, baseline=baseline, total_timesteps=8000, num_steps=16, learning_rate=1e-2, gamma=0.5
    )
    agent = network_of(run)
    for obs in (0.0,) if env_id == "Probe-action-v0" else (-1.0, 1.0):
        right = 1 if env_id == "Probe-action-v0" or obs == 1.0 else 0
        with torch.no_grad():
            assert agent.policy(torch.tensor([[obs]])).probs[0, right] > 0.9


@pytest.mark.parametrize(
    ("env_id", "values"),
    [
        ("Probe-constant-v0", {0.0: 1.0}),
        ("Probe-obs-v0", {-1.0: -1.0, 1.0: 1.0}),
        ("Probe-discount-v0", {0.0: 0.5, 1.0: 1.0}),
    ],
)
def test_values_reach_their_closed_forms(env_id, values, tmp_path):
    agent = network_of(
        train(tmp_path, env_id=env_id, gamma=0.5, total_timesteps=10_000, num_steps=16, learning_rate=1e-2)
    )
    for obs, value in values.items():
        with torch.no_grad():
            assert agent.value(torch.tensor([[obs]])).item() == pytest.approx(value, abs=0.07)


def test_a_time_limit_is_no_end_of_the_world(tmp_path):
    # Reward 1 for ever, cut after 5 steps: 1 / (1 - gamma). Truncation taken for death gives at most 3.4.
    run = train(tmp_path, env_id="Endless-v0", gamma=0.8, total_timesteps=30_000, num_steps=16, learning_rate=1e-2)
    with torch.no_grad():
        assert network_of(run).value(torch.zeros(1, 2)).item() == pytest.approx(5.0, abs=0.25)


@pytest.mark.parametrize("num_envs", [1, 3, 8])
@pytest.mark.parametrize("env_id", ["Mixed-v0", "Uneven-v0", "Terminating-v0", "Truncating-v0", "BothAtOnce-v0"])
def test_every_stored_pair_is_a_true_transition_and_the_budget_is_kept(env_id, num_envs, tmp_path, monkeypatch):
    stored, learning_rates = [], []

    class Spy(common.RolloutStorage):
        def add(self, **step):
            stored.append({name: value.clone() for name, value in step.items()})
            super().add(**step)

    def schedule(start, end, duration, t):
        learning_rates.append((t, linear_schedule(start, end, duration, t)))
        return learning_rates[-1][1]

    linear_schedule = reinforce.linear_schedule
    monkeypatch.setattr(common, "RolloutStorage", Spy)
    monkeypatch.setattr(reinforce, "linear_schedule", schedule)
    run = train(
        tmp_path, env_id=env_id, num_envs=num_envs, num_steps=7, total_timesteps=200, learning_rate=0.5, log_interval=50
    )
    size = 7 * num_envs
    rollouts = math.ceil(200 / size)
    assert len(stored) == 7 * rollouts
    for step in stored:
        assert torch.equal(step["next_obs"], step["obs"] + 1)
    assert learning_rates == [(k * size, pytest.approx(0.5 * (1 - k * size / 200))) for k in range(rollouts)]
    assert max(row["global_step"] for row in rows(run)) <= rollouts * size
    lengths = {"Uneven-v0": (1, 30, 4)}.get(env_id, (3, 5, 2))
    expected, t, k = [], 0, 0
    while t + lengths[k % 3] <= 7 * rollouts:
        t, k = t + lengths[k % 3], k + 1
        expected += [(t * num_envs, lengths[(k - 1) % 3])] * num_envs
    logged = [(r["global_step"], r["charts/episodic_length"]) for r in rows(run) if "charts/episodic_length" in r]
    assert logged == expected


SMALL = {"env_id": "CartPole-v1", "total_timesteps": 1200, "num_envs": 2, "num_steps": 32, "log_interval": 100}


def test_the_same_seed_gives_the_same_weights_and_evaluation_changes_none(tmp_path):
    first = weights(train(tmp_path, **SMALL))
    assert same(first, weights(train(tmp_path, **SMALL)))
    assert not same(first, weights(train(tmp_path, **SMALL, seed=2)))
    assert same(first, weights(train(tmp_path, **SMALL, eval_episodes=2, eval_interval=300)))


def test_parameters_move_and_every_flag_of_the_algorithm_changes_what_is_learnt(tmp_path):
    torch.manual_seed(1)
    untrained = reinforce.Agent(envs_of("CartPole-v1", 1), reinforce.Args()).state_dict()
    plain = weights(train(tmp_path, **SMALL))
    for name, value in untrained.items():
        still = value.numel() == 0 or name in ("action_scale", "action_bias")
        assert torch.equal(value, plain[name]) == still, name
    for flags in (
        {"anneal_lr": False},
        {"baseline": False},
        {"norm_adv": False},
        {"ent_coef": 0.1},
        {"vf_coef": 5.0},
        {"max_grad_norm": 0.01},
        {"gamma": 0.5},
    ):
        assert not same(plain, weights(train(tmp_path, **SMALL, **flags))), flags


def test_without_a_baseline_no_value_is_learnt(tmp_path):
    torch.manual_seed(1)
    untrained = reinforce.Agent(envs_of("CartPole-v1", 1), reinforce.Args()).state_dict()
    trained = weights(train(tmp_path, **SMALL, baseline=False))
    for name in untrained:
        if name.startswith("critic"):
            assert torch.equal(untrained[name], trained[name])


def test_box_actions_run_and_are_logged(tmp_path):
    run = train(tmp_path, env_id="Pendulum-v1", total_timesteps=900, num_envs=2, num_steps=32, log_interval=100)
    keys = set().union(*rows(run))
    assert {
        "losses/policy_loss",
        "losses/value_loss",
        "losses/entropy",
        "losses/values",
        "losses/explained_variance",
        "charts/learning_rate",
        "charts/SPS",
    } <= keys


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"env_id": "Pixels-v0"}, "flat observations"),
        ({"num_envs": 1, "num_steps": 1}, "--num-steps"),
    ],
)
def test_what_it_cannot_learn_is_one_line(flags, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, **flags)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
