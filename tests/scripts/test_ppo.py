"""PPO: advantages by brute force, its loss by hand on both sides of the clip, and probe environments."""

import functools
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import warm
from conftest import envs_of, load, network_of, rows, same, train_with, weights
from hypothesis import given, settings
from hypothesis import strategies as st

import common

ppo = load("ppo")
train = functools.partial(train_with, ppo)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    st.sampled_from([0.0, 0.8, 1.0]),
)
def test_gae_is_the_weighted_sum_within_each_hand_cut_episode(num_steps, num_envs, seed, gamma, lam):
    rng = np.random.default_rng(seed)
    rewards, values, next_values = rng.normal(size=(3, num_steps, num_envs))
    terminations, truncations = rng.random((2, num_steps, num_envs)) < 0.25
    arrays = (rewards, values, next_values, terminations, truncations)
    result = ppo.gae(*(torch.tensor(x) for x in arrays), gamma, lam)
    for env in range(num_envs):
        for t in range(num_steps):
            total = 0.0
            for k in range(t, num_steps):
                bootstrap = 0.0 if terminations[k, env] else next_values[k, env]
                total += (gamma * lam) ** (k - t) * (rewards[k, env] + gamma * bootstrap - values[k, env])
                if terminations[k, env] or truncations[k, env]:
                    break
            assert result[t, env].item() == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("norm_adv", [False, True])
@pytest.mark.parametrize("clip_vloss", [False, True])
def test_loss_and_gradient_against_a_hand_computation(norm_adv, clip_vloss):
    # Ratios below, inside and above the clip range, with advantages of both signs: all six sides.
    ratios = np.array([0.5, 1.1, 1.5, 0.5, 1.1, 1.5])
    advantages = np.array([2.0, 1.0, 3.0, -2.0, -1.0, -3.0])
    old_values = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    values = np.array([0.1, 1.5, 1.0, 3.0, 4.05, 6.0])
    returns = np.array([1.0, 0.0, 1.9, 3.5, 4.0, 5.0])
    entropies = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    eps = 0.2

    logprobs = torch.tensor(np.log(ratios) - 0.7, requires_grad=True)
    v = torch.tensor(values, requires_grad=True)
    mb = SimpleNamespace(
        actions=None,
        logprobs=torch.full((6,), -0.7, dtype=torch.float64),
        advantages=torch.tensor(advantages),
        values=torch.tensor(old_values),
        returns=torch.tensor(returns),
    )
    args = ppo.Args(norm_adv=norm_adv, clip_vloss=clip_vloss, clip_coef=eps, ent_coef=0.3, vf_coef=0.7)
    policy = SimpleNamespace(log_prob=lambda actions: logprobs, entropy=lambda: torch.tensor(entropies))
    loss, metrics = ppo.ppo_loss(policy, v, mb, args)
    loss.backward()

    a = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8) if norm_adv else advantages
    pg, pg_gradient = 0.0, []
    for ratio, adv in zip(ratios, a, strict=True):
        clipped = min(max(ratio, 1 - eps), 1 + eps)
        pg -= min(adv * ratio, adv * clipped) / 6
        # The gradient d(-adv * ratio)/d(log p) = -adv * ratio, unless the clipped side is the smaller one.
        pg_gradient.append(-adv * ratio / 6 if adv * ratio <= adv * clipped else 0.0)
    vf = 0.0
    for new, old, ret in zip(values, old_values, returns, strict=True):
        square = (new - ret) ** 2
        if clip_vloss:
            square = max(square, (old + min(max(new - old, -eps), eps) - ret) ** 2)
        vf += 0.5 * square / 6
    assert loss.item() == pytest.approx(pg - 0.3 * entropies.mean() + 0.7 * vf, abs=1e-9)
    assert np.allclose(logprobs.grad.numpy(), pg_gradient, atol=1e-9)
    assert metrics["losses/policy_loss"].item() == pytest.approx(pg, abs=1e-9)
    assert metrics["losses/value_loss"].item() == pytest.approx(vf, abs=1e-9)
    assert metrics["losses/entropy"].item() == pytest.approx(entropies.mean())
    assert metrics["losses/clipfrac"].item() == pytest.approx(4 / 6)
    assert metrics["losses/old_approx_kl"].item() == pytest.approx(-np.log(ratios).mean())
    assert metrics["losses/approx_kl"].item() == pytest.approx((ratios - 1 - np.log(ratios)).mean())


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"env_id": "Sheet-v0", "norm_obs": True, "norm_reward": True},
        {"env_id": "Board-v0"},
        {"env_id": "Pixels-v0", "clip_rewards": True},
    ],
)
def test_the_first_minibatch_of_a_rollout_has_ratio_one(flags, tmp_path, monkeypatch):
    # Log-probabilities computed after the rollout are those of the weights that acted.
    seen = []
    loss = ppo.ppo_loss

    def spy(policy, values, mb, args):
        result = loss(policy, values, mb, args)
        seen.append((result[1]["losses/approx_kl"].item(), (values - mb.values).abs().max().item()))
        return result

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    train(tmp_path, total_timesteps=512, update_epochs=4, num_minibatches=2, **flags)
    firsts = seen[:: 4 * 2]
    assert len(firsts) == 2
    assert all(kl < 1e-10 and gap < 1e-5 for kl, gap in firsts)
    assert max(kl for kl, _ in seen) > 1e-6


SMALL = {"total_timesteps": 1024, "num_envs": 2, "num_steps": 64, "num_minibatches": 4, "update_epochs": 3}


def test_target_kl_ends_the_updates_of_a_rollout(tmp_path, monkeypatch):
    updates = []
    loss = ppo.ppo_loss
    monkeypatch.setattr(ppo, "ppo_loss", lambda *words: updates.append(1) or loss(*words))
    train(tmp_path, **SMALL, target_kl=1e-12)
    assert len(updates) == 1024 // 128 * 4  # one epoch of each of the eight rollouts
    updates.clear()
    train(tmp_path, **SMALL, target_kl=1e9)
    assert len(updates) == 1024 // 128 * 4 * 3


def test_box_actions_run_and_every_metric_is_logged(tmp_path):
    run = train(tmp_path, env_id="Pendulum-v1", **SMALL, log_interval=100)
    names = (
        "policy_loss",
        "value_loss",
        "entropy",
        "approx_kl",
        "old_approx_kl",
        "clipfrac",
        "explained_variance",
        "values",
    )
    assert {f"losses/{name}" for name in names} | {"charts/learning_rate", "charts/SPS"} <= set().union(*rows(run))
    assert network_of(run).actor_logstd.shape == (1,)


def test_box_actions_begin_with_the_deviation_asked_for():
    torch.manual_seed(0)
    agent = ppo.Agent(envs_of("Sheet-v0", 1), ppo.Args(logstd_init=-1.5))
    drawn = agent.sample(torch.zeros(20_000, 2, 3))
    assert torch.allclose(drawn.std(0), torch.full((6,), math.exp(-1.5)), rtol=0.03)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"env_id": "Pixels-v0", "norm_obs": True}, "flat observations"),
        ({"gae_lambda": 1.5}, "--gae-lambda"),
        ({"num_envs": 1, "num_steps": 4, "num_minibatches": 3}, "--num-minibatches"),
    ],
)
def test_a_space_or_flag_that_does_not_fit_is_one_line(flags, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, **flags)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def flat_logits(agent, obs):
    return agent.actor(agent.features(obs)).detach().double()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Dials-v0", "Board-v0", "Reach-v0", "Sheet-v0"])
def test_log_probabilities_and_entropies_are_those_of_the_distributions_library_in_float64(env_id):
    envs = envs_of(env_id, 1)
    space = envs.single_action_space
    torch.manual_seed(0)
    agent = ppo.Agent(envs, ppo.Args())
    with torch.no_grad():
        for parameter in agent.actor.parameters():
            parameter.copy_(torch.randn_like(parameter))
        agent.actor_logstd.normal_()
    obs = torch.randn(50, *envs.single_observation_space.shape)
    actions = agent.sample(obs)
    policy, _ = agent(obs)
    out = flat_logits(agent, obs)
    if env_id == "CartPole-v1":
        parts = [(torch.distributions.Categorical(logits=out), actions)]
    elif isinstance(space, gym.spaces.MultiDiscrete):
        sizes = space.nvec.flatten().tolist()
        width = max(sizes)
        logits = [out[:, width * i : width * i + n] for i, n in enumerate(sizes)]
        parts = [(torch.distributions.Categorical(logits=row), actions[:, i]) for i, row in enumerate(logits)]
    else:
        std = agent.actor_logstd.detach().double().exp()
        parts = [(torch.distributions.Normal(out[:, i], std[i]), actions[:, i].double()) for i in range(out.shape[1])]
    expected = sum(part.log_prob(action) for part, action in parts)
    entropy = sum(part.entropy() for part, action in parts)
    assert torch.allclose(policy.log_prob(actions).double(), expected, atol=1e-4)
    assert torch.allclose(policy.entropy().double(), entropy.expand(50), atol=1e-4)
    # Its gradients are numbers, also where choices are absent.
    agent.zero_grad()
    (policy.log_prob(actions) + policy.entropy()).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in agent.parameters())


def test_multidiscrete_samples_have_their_probabilities_and_padding_is_never_drawn():
    envs = envs_of("Dials-v0", 1)
    torch.manual_seed(0)
    agent = ppo.Agent(envs, ppo.Args())
    with torch.no_grad():
        agent.actor[-1].bias.normal_()
        agent.actor[-1].weight.zero_()
    n = 100_000
    drawn = agent.sample(torch.zeros(n, 3))
    logits = flat_logits(agent, torch.zeros(1, 3))[0]
    # 99.9 % quantiles of chi-square with one degree of freedom less than the dial has choices.
    for i, (size, bound) in enumerate([(2, 10.83), (5, 18.47), (3, 13.82)]):
        expected = n * logits[5 * i : 5 * i + size].softmax(0)
        counts = torch.bincount(drawn[:, i], minlength=size)
        assert len(counts) == size
        assert ((counts - expected) ** 2 / expected).sum() < bound


def test_multidiscrete_actions_are_learnt(tmp_path):
    agent = network_of(train(tmp_path, env_id="Dials-v0", total_timesteps=8000))
    with torch.no_grad():
        assert agent.greedy(torch.zeros(1, 3)).tolist() == [[1, 3, 0]]  # the marks, counted from each dial's start


@pytest.mark.parametrize(
    "flags",
    [pytest.param({"norm_obs": True}, marks=pytest.mark.slow), {"norm_obs": True, "norm_reward": True}],
)
def test_box_actions_of_two_dimensions_are_learnt_from_observations_of_unlike_scales(flags, tmp_path):
    agent = network_of(train(tmp_path, env_id="Sheet-v0", total_timesteps=20_000, **flags))
    scale = torch.tensor([[1, 10, 100], [1e3, 1e4, 1e5]])
    with torch.no_grad():
        actions = agent.greedy(scale * (5 + torch.randn(100, 2, 3)))
    assert (actions - 0.5).abs().mean() < 0.15


def test_pixels_are_learnt_with_clipped_rewards_and_the_true_score_is_logged(tmp_path, monkeypatch):
    seen = []
    gae = ppo.gae
    monkeypatch.setattr(ppo, "gae", lambda rewards, *rest: seen.append(rewards) or gae(rewards, *rest))
    # Of the dark image nothing but biases can be learnt, which start at zero: many updates, hence four minibatches.
    flags = {"total_timesteps": 4096, "update_epochs": 4, "num_minibatches": 4, "log_interval": 100}
    run = train(tmp_path, env_id="Pixels-v0", clip_rewards=True, **flags)
    assert set(torch.cat(seen).flatten().tolist()) == {-1.0, 1.0}
    assert {row["charts/episodic_return"] for row in rows(run) if "charts/episodic_return" in row} == {-5.0, 5.0}
    agent = network_of(run)
    images = torch.zeros(2, 2, 36, 40, dtype=torch.uint8)
    images[1] = 255
    with torch.no_grad():
        assert agent.greedy(images).tolist() == [0, 1]
        assert agent.value(images).tolist() == pytest.approx([1.0, 1.0], abs=0.3)


def test_the_normaliser_holds_every_environments_observations_and_its_rollout_is_past(tmp_path, monkeypatch):
    stored, used = [], []

    class Spy(common.RolloutStorage):
        def add(self, **step):
            stored.append(step["obs"].clone())
            super().add(**step)

    class Watched(common.RunningMeanStd):
        def forward(self, x):
            used.append((len(stored), self.count.item()))
            return super().forward(x)

    monkeypatch.setattr(common, "RolloutStorage", Spy)
    monkeypatch.setattr(common, "RunningMeanStd", Watched)
    run = train(tmp_path, env_id="Sheet-v0", num_envs=3, num_steps=10, total_timesteps=90, norm_obs=True)
    seen = torch.cat(stored).double()
    state = weights(run)
    assert state["obs_rms.count"].item() == 90
    assert torch.allclose(state["obs_rms.mean"], seen.mean(0), rtol=1e-6)
    assert torch.allclose(state["obs_rms.var"], seen.var(0, correction=0), rtol=1e-6)
    # While rollout k acts and is learnt from, the statistics are those of the k rollouts before it. After its tenth
    # step comes the learning, and then the first act of the next.
    for rollout in range(3):
        acting = [count for steps, count in used if 10 * rollout < steps < 10 * (rollout + 1)]
        assert set(acting) == {30 * rollout}
        learning = [count for steps, count in used if steps == 10 * (rollout + 1)]
        assert learning[:-1] == [30 * rollout] * (len(learning) - 1) and len(learning) > 20


def test_a_normalised_policy_comes_back_to_the_bit_in_a_new_process_and_evaluation_leaves_it_alone(tmp_path):
    flags = {"env_id": "Sheet-v0", "total_timesteps": 1024, "norm_obs": True, "norm_reward": True}
    plain = train(tmp_path, **flags)
    evaluated = train(tmp_path, **flags, eval_episodes=3, eval_interval=300, capture_video=False)
    assert same(weights(plain), weights(evaluated))
    torch.manual_seed(3)
    obs = torch.tensor([[1, 10, 100], [1e3, 1e4, 1e5]]) * torch.randn(1000, 2, 3)
    torch.save(obs, tmp_path / "obs.pt")
    code = (
        "import sys, torch, probe_envs; from pathlib import Path; from common.tools.load_policy import load_policy\n"
        "policy, *_ = load_policy(Path(sys.argv[1])); torch.set_grad_enabled(False)\n"
        "torch.save(policy(torch.load(sys.argv[2])), sys.argv[3])"
    )
    assert warm.run(["-c", code, plain, tmp_path / "obs.pt", tmp_path / "actions.pt"]).returncode == 0
    agent = ppo.Agent(envs_of("Sheet-v0", 1), ppo.Args(norm_obs=True))
    agent.load_state_dict(weights(plain))
    with torch.no_grad():
        assert torch.equal(agent.greedy(obs), torch.load(tmp_path / "actions.pt"))


def test_an_atari_game_runs_from_pixels_with_every_ending_stored_right(tmp_path):
    pytest.importorskip("ale_py")
    flags = {"num_envs": 2, "num_steps": 16, "total_timesteps": 64, "num_minibatches": 2, "update_epochs": 1}
    run = train(tmp_path, env_id="ALE/Breakout-v5", clip_rewards=True, **flags, log_interval=1)
    assert {"losses/policy_loss", "losses/value_loss"} <= set().union(*rows(run))
    assert weights(run)["trunk.0.0.weight"].shape == (32, 4, 8, 8)


def test_rewards_are_scaled_by_statistics_that_include_their_rollout_and_sums_end_with_both_kinds_of_end(
    tmp_path, monkeypatch
):
    """Mixed-v0 rewards 1, 2, 3 ...; its episodes of 3, 5, 2 steps end by termination and truncation in turn."""
    seen, real = [], ppo.gae
    monkeypatch.setattr(ppo, "gae", lambda rewards, *rest: (seen.append(rewards.clone()), real(rewards, *rest))[1])
    train(tmp_path, env_id="Mixed-v0", num_envs=2, num_steps=7, total_timesteps=42, gamma=0.9, norm_reward=True)
    raw, episode = [], 0
    while len(raw) < 21:
        raw += [float(t + 1) for t in range((3, 5, 2)[episode % 3])]
        episode += 1
    sums, total = [], 0.0
    for t, reward in enumerate(raw):
        total = reward if reward == 1.0 else 0.9 * total + reward
        sums.append(total)
        if (t + 1) % 7 == 0:
            std = np.sqrt(np.var(sums[: t + 1]) + 1e-8)
            expected = np.clip(np.array(raw[t - 6 : t + 1]) / std, -10, 10)
            for env in range(2):
                assert seen[t // 7][:, env].numpy() == pytest.approx(expected, rel=1e-5)
    assert len(seen) == 3


@pytest.mark.parametrize("script", ["ppo", "reinforce_rollout"])
@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        ([0.0, -2.0], [1000.0, 6.0], lambda out: [500 + 500 * out[0], 2 + 4 * out[1]]),
        ([-np.inf, -3.0], [np.inf, np.inf], lambda out: out),  # no two finite bounds: in the environment's units
        ([-3e38, -1.0], [3e38, 3.0], lambda out: [out[0], 1 + 2 * out[1]]),  # their distance is no float32
    ],
)
def test_box_actions_are_stretched_from_minus_one_and_one_to_the_bounds(script, low, high, expected, monkeypatch):
    module = load(script)
    space = gym.spaces.Box(np.array(low, np.float32), np.array(high, np.float32))

    class Told(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32), space

        def reset(self, *, seed=None, options=None):
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.came = action.copy()
            return np.zeros(1, np.float32), 0.0, False, False, {}

    monkeypatch.setitem(gym.registry, "Told-v0", gym.envs.registration.EnvSpec("Told-v0", Told))
    envs = envs_of("Told-v0", 1)
    envs.reset(seed=1)
    agent = module.Agent(envs, module.Args())
    out = torch.tensor([[0.5, -0.25]])
    told = agent.in_env_units(out)
    assert told[0].tolist() == pytest.approx(list(expected([0.5, -0.25])))
    envs.step(told)
    assert envs.vector.envs[0].unwrapped.came.tolist() == pytest.approx(list(expected([0.5, -0.25])))
    # The policy played greedily is the mean, in the same units.
    agent.actor[-1].bias.data.copy_(out[0])
    agent.actor[-1].weight.data.zero_()
    assert agent.greedy(torch.zeros(1, 1))[0].tolist() == pytest.approx(list(expected([0.5, -0.25])))


@pytest.mark.parametrize("script", ["ppo", "reinforce_rollout"])
def test_the_same_task_in_other_units_is_learnt_alike(script, tmp_path):
    module = load(script)
    curves = []
    for env_id in ("Aim-unit-v0", "Aim-wide-v0"):
        flags = {"env_id": env_id, "total_timesteps": 4096, "num_envs": 4, "log_interval": 256}
        run_dir = train_with(module, tmp_path, **flags)
        table = rows(run_dir)
        curves.append([row["charts/episodic_return"] for row in table if "charts/episodic_return" in row])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3, abs=1e-3)
    if script == "ppo":
        assert np.mean(curves[0][-200:]) > np.mean(curves[0][:200]) + 0.05
