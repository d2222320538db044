"""CrossQ: batch renormalisation against NumPy in float64, the joint loss by hand, counts, who sees which statistics."""

import functools
from types import SimpleNamespace

import numpy as np
import probe_envs
import pytest
import torch
from conftest import envs_of, load, rows, same, train_with, weights
from torch import nn

from common.tools.load_policy import load_policy

crossq = load("crossq")
train = functools.partial(train_with, crossq)
NETS = {"hidden_sizes": (32, 32), "batch_size": 32, "buffer_size": 10_000}
SMALL = {**NETS, "env_id": "Push-2-v0", "total_timesteps": 300, "learning_starts": 100, "log_interval": 20}
QUICK = {**SMALL, "total_timesteps": 140}


def networks(env_id="Push-2-v0", **flags):
    torch.manual_seed(0)
    envs, args = envs_of(env_id, 1), crossq.Args(env_id=env_id, **flags)
    return crossq.Actor(envs, args), crossq.Critic(envs, args)


def norms(network):
    return [module for module in network.modules() if isinstance(module, crossq.BatchRenorm)]


def updates(network):
    return {module.num_updates.item() for module in norms(network)}


# --- batch renormalisation


def test_batch_renormalisation_against_numpy_before_and_after_the_warm_up(monkeypatch):
    """Outputs, running statistics and gradients of eight updates; r and d reach both of their bounds."""
    monkeypatch.setattr(crossq, "WARM_UP", 3)
    rng = np.random.default_rng(0)
    layer = crossq.BatchRenorm(4).double()
    weight, bias = rng.normal(size=4), rng.normal(size=4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    running_mean, running_var, seen = np.zeros(4), np.ones(4), set()
    for update in range(8):
        x = rng.normal([0.5, 9.0, -9.0, 0.0], [1.0, 5.0, 0.1, 1e-4], size=(16, 4))
        slope = rng.normal(size=(16, 4))  # of some loss, in the outputs
        mean, std = x.mean(axis=0), np.sqrt(x.var(axis=0) + 1e-3)
        r, d = np.ones(4), np.zeros(4)
        if update >= 3:
            running_std = np.sqrt(running_var + 1e-3)
            r, d = std / running_std, (mean - running_mean) / running_std
            seen |= {("r", value > 3, value < 1 / 3) for value in r} | {("d", value > 5, value < -5) for value in d}
            r, d = np.clip(r, 1 / 3, 3), np.clip(d, -5, 5)
        normal = (x - mean) / std
        running_mean, running_var = 0.99 * running_mean + 0.01 * mean, 0.99 * running_var + 0.01 * x.var(axis=0)
        g = slope * weight

        inputs = torch.tensor(x, requires_grad=True)
        outputs = layer(inputs, train=True)
        layer.zero_grad()
        outputs.backward(torch.tensor(slope))
        for found, expected in (
            (outputs.detach(), (normal * r + d) * weight + bias),
            (layer.mean, running_mean),
            (layer.var, running_var),
            (inputs.grad, r / std * (g - g.mean(axis=0) - normal * (g * normal).mean(axis=0))),
            (layer.weight.grad, (slope * (normal * r + d)).sum(axis=0)),
            (layer.bias.grad, slope.sum(axis=0)),
        ):
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)
        assert layer.num_updates.item() == update + 1
    bounds = [(False, False), (True, False), (False, True)]
    assert seen == {(name, *bound) for name in ("r", "d") for bound in bounds}

    before = {name: value.clone() for name, value in layer.state_dict().items()}
    found = layer(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(found, (x - running_mean) / np.sqrt(running_var + 1e-3) * weight + bias, rtol=1e-9)
    assert same(layer.state_dict(), before)


def test_the_warm_up_and_the_bounds_are_those_of_the_authors():
    assert (crossq.WARM_UP, crossq.R_MAX, crossq.D_MAX) == (100_000, 3, 5)


def test_statistics_stay_in_float32_with_bfloat16():
    layer, x = crossq.BatchRenorm(3), 100 + torch.randn(64, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(x, train=True)
    assert outputs.dtype == layer.mean.dtype == torch.float32
    torch.testing.assert_close(layer.mean, 0.01 * x.float().mean(dim=0))


def test_a_network_normalises_before_each_linear_layer():
    actor, critic = networks(hidden_sizes=(16, 8), critic_hidden_sizes=(32,))
    for network, widths in ((actor.network, [2, 16, 8]), (critic.qf1, [4, 32]), (critic.qf2, [4, 32])):
        assert [len(norm.mean) for norm in norms(network)] == widths
        layers = list(network)
        assert all(isinstance(before, crossq.BatchRenorm) for before in layers[:-1:3])
        assert all(isinstance(linear, nn.Linear) for linear in layers[1::3])
        assert all(isinstance(relu, nn.ReLU) for relu in layers[2::3])


# --- the losses


def test_evaluated_together_or_apart_the_values_are_the_same_and_trained_together_they_are_not():
    _, critic = networks(hidden_sizes=(16, 16))
    obs, actions = torch.randn(2, 32, 2), torch.rand(2, 32, 2)
    obs[1] += 2.0
    critic(obs.flatten(0, 1), actions.flatten(0, 1), train=True)
    both = critic(obs.flatten(0, 1), actions.flatten(0, 1))
    for half in (0, 1):
        apart = critic(obs[half], actions[half])
        for whole, part in zip(both, apart, strict=True):
            torch.testing.assert_close(whole[32 * half : 32 * half + 32], part)
    mixed = critic(obs.flatten(0, 1), actions.flatten(0, 1), train=True)[0][:32]
    assert (mixed - critic(obs[0], actions[0], train=True)[0]).abs().max() > 0.1


class Plane(nn.Module):
    """Q_i(s, a) = s . w_i + a . v_i for i = 1, 2, called once, with all of a batch, to train."""

    def __init__(self, w, v):
        super().__init__()
        self.w, self.v = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (w, v))
        self.calls = []

    def forward(self, obs, actions, train=False):
        self.calls.append((len(obs), train))
        q = obs @ self.w.T + actions @ self.v.T
        return q[:, 0], q[:, 1]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_joint_loss_and_gradient_against_a_hand_computation(alpha):
    # An ordinary transition, a terminated one, and one where the other critic has the smaller next value.
    w, v = np.array([[1.0, 2.0], [0.5, -1.0]]), np.array([[3.0], [-2.0]])
    s = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    s2 = np.array([[1.0, 1.0], [2.0, 0.0], [1.0, -2.0]])
    a, a2, log_prob = np.array([0.5, -0.5, 0.2]), np.array([0.1, 0.9, -0.3]), np.array([-1.0, 0.7, 2.0])
    r, terminated, gamma = np.array([1.0, -2.0, 0.5]), [False, True, False], 0.9
    loss, grad_w, grad_v, which = np.zeros(2), np.zeros((2, 2)), np.zeros((2, 1)), set()
    for k in range(3):
        next_values = [s2[k] @ w[i] + a2[k] * v[i, 0] for i in (0, 1)]
        which.add(int(np.argmin(next_values)))
        y = r[k] if terminated[k] else r[k] + gamma * (min(next_values) - alpha * log_prob[k])
        for i in (0, 1):
            error = s[k] @ w[i] + a[k] * v[i, 0] - y  # y is a constant: no gradient of Q(s', a')
            loss[i] += error**2 / 3
            grad_w[i] += 2 * error * s[k] / 3
            grad_v[i] += 2 * error * a[k] / 3
    assert which == {0, 1}

    critic, policy_parameter = Plane(w, v), torch.tensor([1.0], dtype=torch.float64, requires_grad=True)

    def sample(obs, train=False):
        assert np.array_equal(obs.numpy(), s2) and not train
        return policy_parameter * torch.tensor(a2).unsqueeze(1), policy_parameter * torch.tensor(log_prob)

    batch = SimpleNamespace(
        obs=torch.tensor(s),
        actions=torch.tensor(a).unsqueeze(1),
        rewards=torch.tensor(r),
        next_obs=torch.tensor(s2),
        terminations=torch.tensor(terminated),
    )
    alpha = torch.tensor(alpha, dtype=torch.float64)
    actor = SimpleNamespace(sample=sample)
    total, metrics = crossq.joint_critic_loss(critic, actor, alpha, batch, crossq.Args(gamma=gamma))
    total.backward()
    assert critic.calls == [(6, True)]
    assert total.item() == pytest.approx(loss.sum())
    assert np.allclose(critic.w.grad.numpy(), grad_w)
    assert np.allclose(critic.v.grad.numpy(), grad_v)
    assert policy_parameter.grad is None
    for i in (0, 1):
        assert metrics[f"losses/qf{i + 1}_loss"].item() == pytest.approx(loss[i])
        mean = np.mean([s[k] @ w[i] + a[k] * v[i, 0] for k in range(3)])
        assert metrics[f"losses/qf{i + 1}_values"].item() == pytest.approx(mean)


# --- a run: counts, statistics, evaluation


class Watch:
    """The losses that a run calls, in their order, and its networks."""

    def __init__(self, monkeypatch):
        self.calls = []
        for name in ("joint_critic_loss", "actor_loss"):
            monkeypatch.setattr(crossq, name, functools.partial(self.noted, name, getattr(crossq, name)))

    def noted(self, name, function, *words):
        self.calls.append(name)
        if name == "joint_critic_loss":
            self.critic, self.actor = words[:2]
        return function(*words)


@pytest.mark.parametrize(("num_envs", "train_frequency", "policy_frequency"), [(1, 1, 3), (2, 2, 1), (8, 1, 4)])
def test_updates_follow_environment_steps_and_each_network_sees_the_statistics_of_its_own(
    num_envs, train_frequency, policy_frequency, tmp_path, monkeypatch
):
    watch, steps, step = Watch(monkeypatch), [], probe_envs.Push.step
    monkeypatch.setattr(probe_envs.Push, "step", lambda env, action: steps.append(1) or step(env, action))
    train(
        tmp_path,
        **{**SMALL, "total_timesteps": 200, "hidden_sizes": (4,), "batch_size": 4},
        save_interval=0,
        num_envs=num_envs,
        train_frequency=train_frequency,
        policy_frequency=policy_frequency,
    )
    count = 100 // train_frequency
    expected = []
    for number in range(1, count + 1):
        expected += ["joint_critic_loss"] + ["actor_loss"] * (number % policy_frequency == 0)
    assert watch.calls == expected
    assert len(steps) == 200
    # Acting, logging, a' and the critics in the policy's loss add nothing to the statistics.
    assert updates(watch.critic) == {count}
    assert updates(watch.actor) == {count // policy_frequency}


def test_evaluation_changes_no_statistics_and_the_policy_file_has_them(tmp_path):
    runs = []
    for flags in ({"eval_episodes": 3, "eval_interval": 50}, {"eval_episodes": 0}):
        runs.append(train(tmp_path, **QUICK, **flags, capture_video=False))
    assert len([row for row in rows(runs[0]) if "eval/episodic_return" in row]) == 3
    first, second = map(weights, runs)
    assert same(first, second)
    assert {key.rpartition(".")[2] for key in first} >= {"mean", "var", "num_updates"}
    greedy, *_ = load_policy(runs[0])
    actor = greedy.__self__
    assert {module.num_updates.item() for module in actor.network if hasattr(module, "num_updates")} == {13}
    assert all(module.mean.abs().sum() > 0 for module in actor.network if hasattr(module, "num_updates"))


def test_the_greedy_action_is_the_squashed_mean_in_the_units_of_the_environment():
    actor, _ = networks("Aim-v0")
    obs = torch.linspace(-1, 1, 7).unsqueeze(1)
    with torch.no_grad():
        mean, _ = actor(obs)
        expected = np.tanh(mean.numpy()) * (2.0, 1.5) + (1.0, -0.5)  # [-1, 3] x [-2, 1]
        assert np.allclose(actor.greedy(obs).numpy(), expected, atol=1e-6)
    assert updates(actor) == {0}


@pytest.mark.parametrize("anneal_lr", [False, True])
def test_learning_rates_and_momentum_of_the_optimizers(anneal_lr, tmp_path, monkeypatch):
    optimizers = []

    class Adam(torch.optim.Adam):
        def __init__(self, *words, **flags):
            super().__init__(*words, **flags)
            self.used = []
            optimizers.append(self)

        def step(self, closure=None):
            self.used.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    run = train(tmp_path, **QUICK, policy_lr=0.01, q_lr=0.02, anneal_lr=anneal_lr, policy_frequency=1)
    left = [1 - step / 140 if anneal_lr else 1.0 for step in range(141)]
    logged = [row["charts/learning_rate"] for row in rows(run) if "charts/learning_rate" in row]
    assert logged == pytest.approx([0.01 * left[step] for step in range(20, 141, 20)])
    for optimizer, lr in zip(optimizers, (0.01, 0.02, 0.02), strict=True):
        assert optimizer.param_groups[0]["betas"] == (0.5, 0.999)
        assert optimizer.used == pytest.approx([lr * left[step] for step in range(101, 141)])


@pytest.mark.parametrize("alpha", [None, 0.2])
def test_every_metric_is_logged_and_the_temperature_is_learnt_unless_fixed(alpha, tmp_path):
    run = train(tmp_path, **QUICK, alpha=alpha)
    names = ("qf1_loss", "qf2_loss", "qf1_values", "qf2_values", "actor_loss", "alpha")
    keys = set().union(*rows(run))
    assert {f"losses/{name}" for name in names} | {"charts/learning_rate", "charts/SPS", "health/dead_units"} <= keys
    assert ("losses/alpha_loss" in keys) == (alpha is None)
    curve = [row["losses/alpha"] for row in rows(run) if "losses/alpha" in row]
    assert len(set(curve)) == 2 if alpha is None else curve == pytest.approx([0.2] * 2)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"env_id": "CartPole-v1"}, "CrossQ needs a Box action space with finite bounds; CartPole-v1 has Discrete(2)"),
        ({"env_id": "Pixels-Box-v0"}, "this script takes flat observations; Pixels-Box-v0 has Box(0, 255, (2, 36, 40)"),
        ({"alpha": -0.1}, "--alpha must be at least 0, not -0.1"),
    ],
)
def test_a_space_or_flag_that_does_not_fit_is_one_line(flags, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, **flags)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {says}")
    assert not list(tmp_path.iterdir())
