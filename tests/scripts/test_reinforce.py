"""REINFORCE: returns by brute force, its loss by hand, its distributions, and probe environments."""

import functools
import math

import numpy as np
import pytest
import torch
from conftest import envs_of, load, rows, train_with, weights
from hypothesis import given, settings
from hypothesis import strategies as st

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
        p = discrete.policy(obs[0]).base_dist.probs.numpy()
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


SMALL = {"env_id": "CartPole-v1", "total_timesteps": 1200, "num_envs": 2, "num_steps": 32, "log_interval": 100}


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
def test_a_space_or_flag_that_does_not_fit_is_one_line(flags, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, **flags)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
