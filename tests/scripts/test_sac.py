"""SAC: its density against float64 and integration, its losses by hand, its counts, and probe environments."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import probe_envs
import pytest
import torch
from conftest import envs_of, load, rows, same, train_with, weights
from torch import nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

import common
from common.tools.load_policy import load_policy

sac = load("sac")
train = functools.partial(train_with, sac)


def leaf(values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


# --- the squashed Gaussian


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_log_probability_against_transformed_distribution_in_float64(dtype):
    torch.manual_seed(0)
    mean, log_std, noise = (
        torch.randn(64, 3).double() * 4,
        torch.empty(64, 3).double().uniform_(-5, 2),
        torch.randn(64, 3),
    )
    mean[0], log_std[0] = torch.tensor([8.0, -10.0, 12.0]), -3.0  # where log(1 - tanh^2 + 1e-6) is off by nats
    actions, log_prob = sac.squashed_gaussian(mean.to(dtype), log_std.to(dtype), noise.to(dtype))
    tanh = TanhTransform(cache_size=1)  # remembers x, which float64 cannot get back from a saturated tanh(x)
    expected_actions = tanh(mean + log_std.exp() * noise.double())
    squashed = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), tanh)
    expected = squashed.log_prob(expected_actions)
    assert log_prob.shape == (64,)
    assert torch.allclose(actions.double(), expected_actions, atol=1e-6)
    assert torch.allclose(log_prob.double(), expected, rtol=1e-6, atol=1e-9 if dtype == torch.float64 else 2e-4)


@pytest.mark.parametrize("mean", [-2.0, 0.0, 0.7])
@pytest.mark.parametrize("log_std", [-3.0, -1.0, 0.5])
def test_density_integrates_to_one_over_the_actions(mean, log_std):
    noise = torch.linspace(-9, 9, 200_001, dtype=torch.float64).unsqueeze(1)
    actions, log_prob = sac.squashed_gaussian(torch.full_like(noise, mean), torch.full_like(noise, log_std), noise)
    assert torch.trapezoid(log_prob.exp(), actions.squeeze(1)).item() == pytest.approx(1, abs=1e-6)
    assert actions.min() > -1 - 1e-9 and actions.max() < 1 + 1e-9


@pytest.mark.parametrize("x", [-15.0, 15.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_saturated_actions_keep_an_exact_density_and_a_nonzero_gradient(x, dtype):
    mean = torch.full((1, 1), x, dtype=dtype, requires_grad=True)
    log_std = torch.full((1, 1), -1.0, dtype=dtype, requires_grad=True)
    _, log_prob = sac.squashed_gaussian(mean, log_std, torch.zeros(1, 1, dtype=dtype))
    log_prob.sum().backward()
    # 1 - tanh(x)^2 = 4 exp(-2|x|) / (1 + exp(-2|x|))^2; the derivative of -log of it is 2 tanh(x)
    log_det = math.log(4) - 2 * abs(x) - 2 * math.log1p(math.exp(-2 * abs(x)))
    expected = 1.0 - 0.5 * math.log(2 * math.pi) - log_det
    assert log_prob.item() == pytest.approx(expected, rel=1e-6)
    assert mean.grad.item() == pytest.approx(2 * math.tanh(x), rel=1e-5)
    assert log_std.grad.item() == pytest.approx(-1.0)


def make(env_id, **flags):
    torch.manual_seed(0)
    envs, args = envs_of(env_id, 1), sac.Args(env_id=env_id, **flags)
    return sac.Actor(envs, args), sac.Critic(envs, args)


def test_samples_have_the_density_they_are_said_to_have():
    actor, _ = make("Push-2-v0")
    obs = torch.tensor([[0.3, -0.8]]).repeat(100_000, 1)
    with torch.no_grad():
        mean, log_std = (x[:1].double() for x in actor(obs))
        actions, log_prob = actor.sample(obs)
    x = torch.atanh(actions.double())
    assert torch.allclose(x.mean(dim=0), mean[0], atol=0.02)
    assert torch.allclose(x.std(dim=0), log_std[0].exp(), rtol=0.02)
    assert abs(np.corrcoef(x.numpy().T)[0, 1]) < 0.02
    expected = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), TanhTransform())
    assert torch.allclose(log_prob.double(), expected.log_prob(actions.double()), atol=2e-3)


def test_log_std_stays_between_its_bounds():
    actor, _ = make("Push-2-v0")
    with torch.no_grad():
        last = actor.network[-1]
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.0, 0.0, -100.0, 100.0]))
        _, log_std = actor(torch.zeros(1, 2))
        assert log_std.tolist() == [[-5.0, 2.0]]
        last.bias.zero_()
        assert actor(torch.zeros(1, 2))[1].tolist() == [[-1.5, -1.5]]


def test_bounds_are_those_of_each_dimension():
    actor, _ = make("Aim-v0")
    corners = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.5]])
    assert actor.in_env_units(corners).tolist() == [[-1.0, -2.0], [3.0, 1.0], [1.0, 0.25]]
    with torch.no_grad():
        actor.network[-1].bias[:2] = torch.tensor([30.0, -30.0])
    assert actor.greedy(torch.zeros(1, 1)).tolist() == [[3.0, -2.0]]


def test_the_greedy_action_is_the_squashed_mean():
    actor, _ = make("Aim-v0")
    obs = torch.linspace(-1, 1, 7).unsqueeze(1)
    with torch.no_grad():
        mean, _ = actor(obs)
        expected = np.tanh(mean.numpy()) * (2.0, 1.5) + (1.0, -0.5)  # [-1, 3] x [-2, 1]
        assert np.allclose(actor.greedy(obs).numpy(), expected, atol=1e-6)


# --- the losses


class Plane(nn.Module):
    """Q_i(s, a) = s . w_i + a . v_i + b_i for i = 1, 2."""

    def __init__(self, w, v, b):
        super().__init__()
        self.w, self.v, self.b = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (w, v, b))

    def forward(self, obs, actions):
        q = obs @ self.w.T + actions @ self.v.T + self.b
        return q[:, 0], q[:, 1]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_critic_loss_and_gradient_against_a_hand_computation(alpha):
    # An ordinary transition, a terminated one, and one where the other target critic is the smaller one.
    w, v, b = np.array([[1.0, 2.0], [0.5, -1.0]]), np.array([[3.0], [-2.0]]), np.array([0.1, 0.2])
    tw, tv, tb = np.array([[2.0, 0.0], [-1.0, 1.0]]), np.array([[1.0], [4.0]]), np.array([0.0, 0.5])
    s = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    s2 = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    a, a2, log_prob = np.array([0.5, -0.5, 0.2]), np.array([0.1, 0.9, -0.3]), np.array([-1.0, 0.7, 2.0])
    r, terminated, gamma = np.array([1.0, -2.0, 0.5]), [False, True, False], 0.9
    loss, grad_w, grad_v, which = np.zeros(2), np.zeros((2, 2)), np.zeros((2, 1)), set()
    for k in range(3):
        targets = [s2[k] @ tw[i] + a2[k] * tv[i, 0] + tb[i] for i in (0, 1)]
        which.add(int(np.argmin(targets)))
        y = r[k] if terminated[k] else r[k] + gamma * (min(targets) - alpha * log_prob[k])
        for i in (0, 1):
            error = s[k] @ w[i] + a[k] * v[i, 0] + b[i] - y
            loss[i] += error**2 / 3
            grad_w[i] += 2 * error * s[k] / 3
            grad_v[i] += 2 * error * a[k] / 3
    assert which == {0, 1}

    critic, target = Plane(w, v, b), Plane(tw, tv, tb)
    policy_parameter = leaf([1.0])

    def sample(obs):
        assert np.array_equal(obs.numpy(), s2)
        return policy_parameter * torch.tensor(a2).unsqueeze(1), policy_parameter * torch.tensor(log_prob)

    batch = SimpleNamespace(
        obs=torch.tensor(s),
        actions=torch.tensor(a).unsqueeze(1),
        rewards=torch.tensor(r),
        next_obs=torch.tensor(s2),
        terminations=torch.tensor(terminated),
    )
    args = sac.Args(gamma=gamma)
    alpha = torch.tensor(alpha, dtype=torch.float64)
    total, metrics = sac.critic_loss(critic, target, SimpleNamespace(sample=sample), alpha, batch, args)
    total.backward()
    assert total.item() == pytest.approx(loss.sum())
    assert np.allclose(critic.w.grad.numpy(), grad_w)
    assert np.allclose(critic.v.grad.numpy(), grad_v)
    assert target.w.grad is None and policy_parameter.grad is None
    for i in (0, 1):
        assert metrics[f"losses/qf{i + 1}_loss"].item() == pytest.approx(loss[i])
        mean = np.mean([s[k] @ w[i] + a[k] * v[i, 0] + b[i] for k in range(3)])
        assert metrics[f"losses/qf{i + 1}_values"].item() == pytest.approx(mean)


def test_actor_loss_and_its_gradient_in_the_policy_against_finite_differences():
    rng = np.random.default_rng(0)
    mean, log_std, noise = rng.normal(size=(5, 2)), rng.uniform(-2, 0.5, (5, 2)), rng.normal(size=(5, 2))
    s, alpha = rng.normal(size=(5, 1)), 0.4
    w, v, b = np.array([[1.0], [-0.5]]), np.array([[1.0, -1.0], [0.5, 2.0]]), np.array([0.3, 0.0])

    def by_hand(mean, log_std):
        total = 0.0
        for k in range(5):
            log_prob, action = 0.0, []
            for d in range(2):
                x = mean[k, d] + math.exp(log_std[k, d]) * noise[k, d]
                action.append(math.tanh(x))
                log_prob += -0.5 * noise[k, d] ** 2 - log_std[k, d] - 0.5 * math.log(2 * math.pi)
                log_prob -= math.log(1 - math.tanh(x) ** 2)
            q = [s[k, 0] * w[i, 0] + action[0] * v[i, 0] + action[1] * v[i, 1] + b[i] for i in (0, 1)]
            total += (alpha * log_prob - min(q)) / 5
        return total

    critic, m, ls = Plane(w, v, b), leaf(mean), leaf(log_std)
    actions, log_prob = sac.squashed_gaussian(m, ls, torch.tensor(noise))
    fixed = torch.tensor(alpha, dtype=torch.float64)
    loss, metrics = sac.actor_loss(critic, fixed, torch.tensor(s), actions, log_prob)
    loss.backward()
    assert loss.item() == pytest.approx(by_hand(mean, log_std))
    assert metrics["losses/actor_loss"].item() == loss.item()
    assert metrics["losses/alpha"].item() == alpha
    for place in np.ndindex(5, 2):
        step = np.zeros((5, 2))
        step[place] = 1e-6
        slope = (by_hand(mean + step, log_std) - by_hand(mean - step, log_std)) / 2e-6
        assert m.grad[place].item() == pytest.approx(slope, abs=1e-6)
        slope = (by_hand(mean, log_std + step) - by_hand(mean, log_std - step)) / 2e-6
        assert ls.grad[place].item() == pytest.approx(slope, abs=1e-6)


def test_only_hidden_layers_compute_in_bfloat16():
    torch.manual_seed(0)
    critic = sac.Critic(envs_of("Pendulum-v1", 1), sac.Args(hidden_sizes=(64, 32)))
    obs, actions = torch.randn(128, 3), torch.rand(128, 1) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        qf1, _ = critic(obs, actions)
    assert qf1.dtype == torch.float32
    x, (first, second, head) = torch.cat([obs, actions], dim=1), critic.qf1[::2]

    def rounded(value):
        return value.bfloat16().double()

    for layer in (first, second):
        x = rounded(torch.relu(rounded(x) @ rounded(layer.weight).T + rounded(layer.bias)))
    by_hand = x @ head.weight.double().T + head.bias.double()
    # A sum that falls on the other side of a rounding edge moves a unit by 2^-8 of itself; rounding the head as well,
    # or nothing, would differ by more.
    error = (qf1 - by_hand.squeeze(1)).abs().max().item()
    assert error < 2e-3 * by_hand.std().item()
    assert (rounded(qf1) - qf1).abs().max().item() > 2 * error
    assert (critic(obs, actions)[0] - qf1).abs().max().item() > 2 * error


@pytest.mark.parametrize(("entropies", "sign"), [([0.5, 1.5, 1.0], 1), ([-3.0, -2.0, -4.0], -1)])
def test_alpha_loss_moves_the_temperature_towards_the_target_entropy(entropies, sign):
    # dJ/d(log alpha) = alpha (mean entropy - target): positive, so alpha falls, where there is entropy to spare.
    target, alpha = -2.0, 0.7
    temperature = sac.Temperature(alpha)
    loss, metrics = sac.alpha_loss(temperature(), -torch.tensor(entropies), target)
    loss.backward()
    expected = alpha * (np.mean(entropies) - target)
    assert loss.item() == pytest.approx(expected)
    assert metrics["losses/alpha_loss"].item() == loss.item()
    assert temperature.log_alpha.grad.item() == pytest.approx(expected)
    assert np.sign(expected) == sign


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_a_fixed_temperature_has_the_value_it_is_set_to(alpha):
    assert sac.Temperature(alpha)().item() == pytest.approx(alpha)


# --- a run: units, counts, exploration

NETS = {"hidden_sizes": (32, 32), "batch_size": 32, "buffer_size": 10_000}
SMALL = {**NETS, "env_id": "Push-2-v0", "total_timesteps": 300, "learning_starts": 100, "log_interval": 20}


def curve(run, key="losses/alpha"):
    return [row[key] for row in rows(run) if key in row]


def test_the_temperature_does_not_depend_on_the_offset_of_the_action_bounds(tmp_path):
    reference = train(tmp_path, **SMALL)
    assert len(curve(reference)) == 10 and curve(reference)[-1] < 0.95
    shifted = train(tmp_path, **{**SMALL, "env_id": "Push-shifted-v0"})
    assert curve(shifted) == pytest.approx(curve(reference), rel=1e-4, abs=0)  # rounding in the environment's units


class Watch:
    """What happens in a run: calls of the losses and of the target update, and the steps the environment took."""

    def __init__(self, monkeypatch, env_class=None):
        self.calls, self.actions, self.env_steps = [], [], 0
        for name in ("critic_loss", "actor_loss", "polyak_update"):
            monkeypatch.setattr(sac, name, functools.partial(self.noted, name, getattr(sac, name)))
        watch = self

        class Envs(common.Envs):
            def step(self, actions):
                watch.actions.append(actions.clone())
                return super().step(actions)

        monkeypatch.setattr("common.envs.Envs", Envs)
        if env_class is not None:
            step = env_class.step

            def counted(env, action):
                self.env_steps += 1
                return step(env, action)

            monkeypatch.setattr(env_class, "step", counted)

    def noted(self, name, function, *words):
        self.calls.append(name)
        return function(*words)


@pytest.mark.parametrize("num_envs", [1, 2, 8])
@pytest.mark.parametrize(("train_frequency", "policy_frequency", "target_frequency"), [(1, 2, 1), (3, 1, 2), (2, 3, 5)])
def test_budget_and_updates_follow_environment_steps(
    num_envs, train_frequency, policy_frequency, target_frequency, tmp_path, monkeypatch
):
    watch = Watch(monkeypatch, probe_envs.Push)
    train(
        tmp_path,
        **{**SMALL, "total_timesteps": 200, "hidden_sizes": (4,), "batch_size": 4},
        save_interval=0,  # the trial of snapshots steps environments of its own
        num_envs=num_envs,
        train_frequency=train_frequency,
        policy_frequency=policy_frequency,
        target_network_frequency=target_frequency,
    )
    assert watch.env_steps == 200
    updates = 100 // train_frequency
    assert watch.calls.count("critic_loss") == updates
    assert watch.calls.count("actor_loss") == updates // policy_frequency * policy_frequency
    assert watch.calls.count("polyak_update") == updates // target_frequency
    # Each policy_frequency-th critic update is followed by as many policy updates.
    order, expected = [name for name in watch.calls if name != "polyak_update"], []
    for number in range(1, updates + 1):
        expected += ["critic_loss"] + ["actor_loss"] * (policy_frequency if number % policy_frequency == 0 else 0)
    assert order == expected


@pytest.mark.parametrize("learning_starts", [0, 4000])
def test_exploration_is_independent_per_environment_and_dimension(learning_starts, tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    flags = {**SMALL, "env_id": "Aim-v0", "total_timesteps": 4000, "learning_starts": learning_starts}
    train(tmp_path, **flags, num_envs=4, train_frequency=10**6)
    actions = torch.stack(watch.actions).numpy()  # [1000 steps, 4 environments, 2 dimensions], as they are sent
    columns = actions.reshape(1000, 8).T
    assert columns.std(axis=1).min() > 0.1
    correlation = np.corrcoef(columns) - np.eye(8)
    assert np.abs(correlation).max() < 0.15  # 4.7 standard deviations of 1000 independent pairs
    low, high = np.array([-1.0, -2.0]), np.array([3.0, 1.0])
    assert (actions >= low).all() and (actions <= high).all()
    if learning_starts:
        assert np.allclose(actions.min(axis=(0, 1)), low, atol=0.02)
        assert np.allclose(actions.max(axis=(0, 1)), high, atol=0.02)
        assert np.allclose(actions.mean(axis=(0, 1)), (low + high) / 2, atol=0.08)  # 4.4 standard errors
        assert np.allclose(actions.std(axis=(0, 1)), (high - low) / math.sqrt(12), rtol=0.05)


def test_the_target_critics_follow_at_their_pace_and_nothing_else_moves_them(tmp_path, monkeypatch):
    seen = []
    loss = sac.critic_loss

    def spy(critic, critic_target, actor, alpha, batch, args):
        seen.append([[p.detach().clone() for p in net.parameters()] for net in (critic, critic_target)])
        return loss(critic, critic_target, actor, alpha, batch, args)

    monkeypatch.setattr(sac, "critic_loss", spy)
    train(tmp_path, **{**SMALL, "total_timesteps": 120}, tau=0.25, target_network_frequency=3)
    assert len(seen) == 20
    for critic, target in zip(*seen[0], strict=True):
        assert torch.equal(critic, target)
    for k in range(1, 20):
        for before, after, critic in zip(seen[k - 1][1], seen[k][1], seen[k][0], strict=True):
            moved = 0.75 * before + 0.25 * critic if k % 3 == 0 else before
            assert torch.allclose(after, moved, atol=1e-7)
        assert not torch.equal(seen[k][0][0], seen[k - 1][0][0])


# --- the run as a whole


def test_evaluation_plays_in_the_units_of_the_environment(tmp_path, capsys):
    from common.tools import evaluate

    flags = {**NETS, "env_id": "Aim-v0", "total_timesteps": 2000, "learning_starts": 300, "gamma": 0.5}
    run = train(tmp_path, **flags, policy_lr=3e-3, q_lr=3e-3, eval_episodes=5, capture_video=False)
    greedy, *_ = load_policy(run)
    with torch.no_grad():
        assert greedy(torch.zeros(1, 1))[0].tolist() == pytest.approx(probe_envs.Aim.GOAL.tolist(), abs=0.2)
    (score,) = curve(run, "eval/episodic_return")
    assert -0.08 < score <= 0
    evaluate.main([str(run)])
    assert f"episodic_return {score:.6g} " in capsys.readouterr().out


@pytest.mark.parametrize("alpha", [None, 0.2])
def test_every_metric_is_logged_and_the_temperature_is_learnt_unless_fixed(alpha, tmp_path, monkeypatch):
    targets = set()
    loss = sac.alpha_loss

    def spy(alpha, log_prob, target_entropy):
        targets.add(target_entropy)
        return loss(alpha, log_prob, target_entropy)

    monkeypatch.setattr(sac, "alpha_loss", spy)
    run = train(tmp_path, **SMALL, alpha=alpha)
    assert targets == ({-2} if alpha is None else set())  # minus the dimension of the action
    names = ("qf1_loss", "qf2_loss", "qf1_values", "qf2_values", "actor_loss", "alpha")
    keys = set().union(*rows(run))
    assert {f"losses/{name}" for name in names} | {"charts/learning_rate", "charts/SPS"} <= keys
    assert ("losses/alpha_loss" in keys) == (alpha is None)
    if alpha is None:
        assert len(set(curve(run))) == 10
    else:
        assert curve(run) == pytest.approx([0.2] * 10)


@pytest.mark.parametrize("anneal_lr", [False, True])
def test_learning_rates_are_those_of_the_flags_and_fall_to_zero_with_anneal_lr(anneal_lr, tmp_path, monkeypatch):
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
    run = train(tmp_path, **SMALL, policy_lr=0.01, q_lr=0.02, anneal_lr=anneal_lr, policy_frequency=1)
    left = [1 - step / 300 if anneal_lr else 1.0 for step in range(301)]
    assert curve(run, "charts/learning_rate") == pytest.approx([0.01 * left[step] for step in range(20, 301, 20)])
    actor, critic, alpha = optimizers
    assert sum(p.numel() for p in alpha.param_groups[0]["params"]) == 1
    for optimizer, lr in ((actor, 0.01), (critic, 0.02), (alpha, 0.02)):
        assert optimizer.used == pytest.approx([lr * left[step] for step in range(101, 301)])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"env_id": "CartPole-v1"}, "SAC needs a Box action space with finite bounds; CartPole-v1 has Discrete(2)"),
        ({"env_id": "Unbounded-v0"}, "SAC needs a Box action space with finite bounds; Unbounded-v0 has Box(-inf, inf"),
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


def test_a_resumed_run_updates_targets_and_policy_when_the_whole_one_does(tmp_path, monkeypatch):
    flags = {**SMALL, "target_network_frequency": 7, "policy_frequency": 3, "tau": 0.5, "save_interval": 110}
    whole = train(tmp_path, **flags)

    class Killed(Exception):  # noqa: N818
        pass

    write = common.Checkpoint.write

    def killed_at(self, step, *rest):
        write(self, step, *rest)
        if step == 110:  # 10 updates: between two of the targets, and two of the policy
            raise Killed

    monkeypatch.setattr(common.Checkpoint, "write", killed_at)
    with pytest.raises(Killed):
        train(tmp_path, **flags)
    monkeypatch.setattr(common.Checkpoint, "write", write)
    unfinished = (path.parent for path in tmp_path.glob("*/*/checkpoints"))
    (run_dir,) = (path for path in unfinished if not (path / "finished.json").exists())
    (run_dir / ".lock").unlink()  # the first run's, which is still in this process
    sac.main(sac.Args(**{**flags, "track": False, "cuda": False, "eval_episodes": 0, "resume": str(run_dir)}))
    assert same(weights(whole), weights(run_dir))
