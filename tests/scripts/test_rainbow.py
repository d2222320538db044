"""The six parts against computations of their own, alone and together, and environments whose Q-values are known."""

import functools
import importlib.util
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import envs_of, load, network_of, only_run, rows, same, train_with, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import common

rainbow = load("rainbow")
train = functools.partial(train_with, rainbow)
PARTS = {
    "double": False,
    "dueling": False,
    "n_step": 1,
    "prioritized_replay": False,
    "distributional": False,
    "noisy": False,
}
TINY = {"total_timesteps": 60, "learning_starts": 20, "hidden_sizes": (8, 8), "batch_size": 8, "log_interval": 20}
SMALL = {"total_timesteps": 250, "learning_starts": 100, "hidden_sizes": (16, 16), "log_interval": 100}


def q_values(run_dir, obs):
    network = network_of(run_dir)
    with torch.no_grad():
        return network.expectation(network(torch.as_tensor(np.asarray(obs, np.float32))))


def projection_by_loop(probs, returns, support):
    """Bellemare et al. (2017), algorithm 1, for one distribution; a return on an atom is that atom's alone."""
    step = (support[-1] - support[0]) / (len(support) - 1)
    target = [0.0] * len(support)
    for p, value in zip(probs, returns, strict=True):
        b = min((min(max(value, support[0]), support[-1]) - support[0]) / step, len(support) - 1)  # not rounded beyond
        low, high = math.floor(b), math.ceil(b)
        if low == high:
            target[low] += p
        else:
            target[low] += p * (high - b)
            target[high] += p * (b - low)
    return target


@settings(max_examples=200, deadline=None)
@given(
    num_atoms=st.integers(2, 9),
    v_min=st.floats(-20, 20),
    width=st.floats(0.5, 40),
    reward=st.floats(-60, 60),
    discount=st.sampled_from([0.0, 0.5, 0.99**3, 1.0]),  # 0 is a termination
    seed=st.integers(0, 99),
)
def test_the_projection_against_a_loop_over_atoms(num_atoms, v_min, width, reward, discount, seed):
    support = torch.linspace(v_min, v_min + width, num_atoms, dtype=torch.float64)
    probs = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.full(num_atoms, 0.5), 2))
    returns = torch.stack([reward + discount * support, reward - discount * support])
    found = rainbow.project(probs, returns, support)
    for i in range(2):
        expected = projection_by_loop(probs[i].tolist(), returns[i].tolist(), support.tolist())
        assert found[i].tolist() == pytest.approx(expected, abs=1e-9)


def test_the_projection_at_its_edges():
    support = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.4]])

    def project(*returns):
        return rainbow.project(probs, torch.tensor([returns]), support)[0].tolist()

    assert project(-1.0, 0.0, 1.0, 2.0) == pytest.approx([0.1, 0.2, 0.3, 0.4])  # each on its atom
    assert project(0.5, 0.5, 0.5, 0.5) == pytest.approx([0, 0.5, 0.5, 0])  # a terminated one
    assert project(-9.0, -1.0, 2.0, 9.0) == pytest.approx([0.3, 0, 0, 0.7])  # outside of the support
    assert project(1.75, 1.75, 1.75, 1.75) == pytest.approx([0, 0, 0.25, 0.75])  # the nearer atom gets more


class Table(nn.Module):
    """Outputs [B, A, N] are table[s] for obs [B, 1] that hold s."""

    def __init__(self, table, support):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table, dtype=torch.float64))
        self.support = torch.tensor(support, dtype=torch.float64)
        self.distributional = len(support) > 1

    expectation = rainbow.QNetwork.expectation

    def forward(self, obs):
        return self.table[obs[:, 0].long()]


# Four transitions: an ordinary one, a terminated one, one whose two networks disagree on the best action, and one whose
# return was cut after two of three steps.
S, A, R, S2 = [0, 1, 0, 2], [1, 0, 0, 1], [3.0, -4.0, 0.25, 1.5], [1, 2, 2, 0]
TERMINATED = [False, True, False, False]
DISCOUNTS = [0.9**3, 0.9, 0.9**3, 0.9**2]
WEIGHTS = [1.0, 0.5, 0.2, 0.7]


def hand_batch():
    return SimpleNamespace(
        obs=torch.tensor(S).unsqueeze(1),
        actions=torch.tensor(A),
        rewards=torch.tensor(R, dtype=torch.float64),
        discounts=torch.tensor(DISCOUNTS, dtype=torch.float64),
        next_obs=torch.tensor(S2).unsqueeze(1),
        terminations=torch.tensor(TERMINATED),
        weights=torch.tensor(WEIGHTS, dtype=torch.float64),
    )


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("prioritized", [False, True])
def test_td_loss_and_gradient_against_a_hand_computation(double, prioritized):
    q, target = [[1.0, 2.0], [5.0, 3.0], [0.5, 9.0]], [[4.0, 3.0], [2.0, 8.0], [7.0, 6.0]]
    gradient, losses, errors = np.zeros((3, 2, 1)), [], []
    for i in range(4):
        best = int(np.argmax((q if double else target)[S2[i]]))
        y = R[i] if TERMINATED[i] else R[i] + DISCOUNTS[i] * target[S2[i]][best]
        weight = WEIGHTS[i] if prioritized else 1.0
        errors.append(q[S[i]][A[i]] - y)
        losses.append(weight * errors[i] ** 2)
        gradient[S[i], A[i]] += weight * 2 * errors[i] / 4
    network, frozen = (Table(np.array(table)[:, :, None].tolist(), [0.0]) for table in (q, target))
    args = rainbow.Args(double=double, prioritized_replay=prioritized, distributional=False)
    loss, priorities, metrics = rainbow.rainbow_loss(network, frozen, hand_batch(), args)
    loss.backward()
    assert loss.item() == pytest.approx(np.mean(losses), abs=1e-6)
    assert priorities.tolist() == pytest.approx(errors, abs=1e-6)
    assert not priorities.requires_grad
    assert metrics.keys() == {"losses/td_loss", "losses/q_values"}
    assert metrics["losses/td_loss"].item() == loss.item()
    assert metrics["losses/q_values"].item() == pytest.approx(np.mean([q[i][j] for i, j in zip(S, A, strict=True)]))
    assert np.allclose(network.table.grad.numpy(), gradient, atol=1e-6)
    assert frozen.table.grad is None


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("prioritized", [False, True])
def test_distributional_loss_and_gradient_against_a_hand_computation(double, prioritized):
    support = [-2.0, 0.0, 2.0, 4.0]
    # An action is not chosen by its most likely atom: (9, 0, 0, 8) has a smaller mean than (0, 0, 1, 0).
    rng = np.random.default_rng(3)
    logits, target_logits = rng.normal(size=(3, 2, 4)) * 2, rng.normal(size=(3, 2, 4)) * 2
    logits[1] = [[9, 0, 0, 8.0], [0, 0, 1, 0]]
    target_logits[2] = [[9, 0, 0, 8.0], [0, 0, 1, 0]]

    def softmax(row):
        return [math.exp(x) / sum(math.exp(y) for y in row) for x in row]

    def mean(row):
        return sum(p * z for p, z in zip(softmax(row), support, strict=True))

    gradient, losses, clipped = np.zeros((3, 2, 4)), [], 0.0
    for i in range(4):
        best = int(np.argmax([mean(row) for row in (logits if double else target_logits)[S2[i]]]))
        probs = softmax(target_logits[S2[i]][best])
        returns = [R[i] if TERMINATED[i] else R[i] + DISCOUNTS[i] * z for z in support]
        clipped += sum(p * abs(z - min(max(z, -2), 4)) for p, z in zip(probs, returns, strict=True)) / 4
        m, p = projection_by_loop(probs, returns, support), softmax(logits[S[i]][A[i]])
        # the divergence is the cross-entropy less the entropy of the target, which has no gradient
        losses.append(sum(a * (math.log(a) - math.log(b)) for a, b in zip(m, p, strict=True) if a > 0))
        weight = WEIGHTS[i] if prioritized else 1.0
        gradient[S[i], A[i]] += weight * (np.array(p) - np.array(m)) / 4
    network, frozen = Table(logits, support), Table(target_logits, support)
    args = rainbow.Args(double=double, prioritized_replay=prioritized, v_min=-2.0, v_max=4.0, num_atoms=4)
    loss, priorities, metrics = rainbow.rainbow_loss(network, frozen, hand_batch(), args)
    loss.backward()
    weighted = np.array(losses) * (WEIGHTS if prioritized else 1.0)
    assert loss.item() == pytest.approx(weighted.mean(), abs=1e-9)
    assert priorities.tolist() == pytest.approx(losses, abs=1e-9)
    assert not priorities.requires_grad
    assert metrics["losses/td_loss"].item() == loss.item()
    taken = [mean(logits[i][j]) for i, j in zip(S, A, strict=True)]
    assert metrics["losses/q_values"].item() == pytest.approx(np.mean(taken))
    assert metrics["losses/clipped_return"].item() == pytest.approx(clipped)
    assert np.allclose(network.table.grad.numpy(), gradient, atol=1e-9)
    assert frozen.table.grad is None


def test_no_return_is_clipped_by_the_default_support_on_cartpole():
    args = rainbow.Args()
    support = torch.linspace(args.v_min, args.v_max, args.num_atoms)
    for m in (1, 2, 3):
        returns = sum(args.gamma**i for i in range(m)) + args.gamma**m * support
        assert support[0] <= returns.min() and returns.max() <= support[-1] + 1e-4


@pytest.mark.parametrize("num_atoms", [1, 5])
def test_a_dueling_head_is_value_plus_centred_advantages_of_each_atom(num_atoms):
    torch.manual_seed(0)
    head = rainbow.Dueling(6, 7, 3, num_atoms, nn.Linear).double()
    x = torch.randn(4, 6, dtype=torch.float64)

    def stream(layers, features):
        first, _, second = (layer for layer in layers if not isinstance(layer, nn.Unflatten))
        return np.maximum(features @ first.weight.T.numpy() + first.bias.numpy(), 0) @ second.weight.T.numpy() + (
            second.bias.numpy()
        )

    with torch.no_grad():
        value, advantage = stream(head.value, x.numpy()), stream(head.advantage, x.numpy())
        out = head(x).numpy()
    assert out.shape == (4, 3, num_atoms)
    for b, action, atom in itertools.product(range(4), range(3), range(num_atoms)):
        centred = advantage[b, action * num_atoms + atom] - sum(advantage[b, atom::num_atoms]) / 3
        assert out[b, action, atom] == pytest.approx(value[b, atom] + centred)
    # the mean over actions is the value's: that is what makes the two streams identifiable
    assert np.allclose(out.mean(axis=1), value)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pixels-v0"])
@pytest.mark.parametrize(("flags", "num_atoms"), [({}, 51), ({"distributional": False}, 1), ({"num_atoms": 7}, 7)])
def test_the_last_hidden_layer_is_the_one_that_splits(flags, num_atoms, env_id):
    envs = envs_of(env_id, 1)
    base = {"hidden_sizes": (24, 48), **flags}
    plain, dueling = (rainbow.QNetwork(envs, rainbow.Args(**base, dueling=on)) for on in (False, True))
    envs.close()

    def linear(module, num_noisy):
        layers = [m for m in module.modules() if isinstance(m, nn.Linear)]
        noisy = [isinstance(m, rainbow.NoisyLinear) for m in layers]
        assert noisy == [False] * (len(layers) - num_noisy) + [True] * num_noisy
        return [(m.in_features, m.out_features) for m in layers]

    *before, (width, hidden), (_, both) = linear(plain, num_noisy=2)
    assert both == 2 * num_atoms
    split = [(width, hidden), (hidden, num_atoms), (width, hidden), (hidden, both)]
    assert linear(dueling, num_noisy=4) == [*before, *split]
    obs = torch.zeros(3, *envs.single_observation_space.shape, dtype=torch.uint8 if env_id == "Pixels-v0" else None)
    assert dueling(obs).shape == plain(obs).shape == (3, 2, num_atoms)
    assert dueling.greedy(obs).shape == (3,)


def test_a_noisy_layer_begins_with_the_sigmas_of_the_paper_and_is_its_means_in_evaluation():
    torch.manual_seed(0)
    layer = rainbow.NoisyLinear(16, 3)
    assert torch.all(layer.weight_sigma == 0.5 / 4) and layer.weight_sigma.shape == (3, 16)
    assert torch.all(layer.bias_sigma == 0.5 / 4) and layer.bias_sigma.shape == (3,)
    for mean in (layer.weight, layer.bias):
        assert mean.abs().max() <= 1 / 4
    assert layer.weight.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.25)  # uniform from -1/4 to 1/4
    x = torch.randn(5, 16)
    before = torch.get_rng_state()
    assert torch.equal(layer.eval()(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_noise_is_factorised_shared_by_a_batch_and_new_at_each_call():
    torch.manual_seed(1)
    layer = rainbow.NoisyLinear(2, 2).double().requires_grad_(False)
    layer.weight_sigma.copy_(torch.tensor([[0.5, 1.0], [2.0, 0.3]]))
    layer.bias_sigma.copy_(torch.tensor([0.7, 0.1]))
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, -3.0]], dtype=torch.float64)
    noise = torch.stack([layer(x) for _ in range(20_000)]) - layer.eval()(x)
    # By hand: f(x)² = |x|, whose mean is √(2/π) for a normal x, and f(x) has mean 0. So
    # var y_j = √(2/π) (√(2/π) Σ_i σ_ji² x_i² + σ_j²), and two outputs are not correlated.
    share = math.sqrt(2 / math.pi)
    for row, j in itertools.product(range(4), range(2)):
        weight_part = sum(float(layer.weight_sigma[j, i]) ** 2 * float(x[row, i]) ** 2 for i in range(2))
        expected = share * (share * weight_part + float(layer.bias_sigma[j]) ** 2)
        seen = noise[:, row, j]
        assert seen.var().item() == pytest.approx(expected, rel=0.1)
        assert abs(seen.mean().item()) < 5 * math.sqrt(expected / 20_000)
        assert abs(torch.corrcoef(torch.stack([seen[1:], seen[:-1]]))[0, 1].item()) < 5 / 20_000**0.5
    assert abs(torch.corrcoef(noise[:, 3].T)[0, 1].item()) < 0.05
    # One draw for all rows: the noise is linear in x. Outer product: ε_w of two inputs and two outputs has rank 1.
    bias, weight = noise[:, 0], noise[:, 1:3] - noise[:, :1]
    assert torch.allclose(noise[:, 3], bias + 2 * weight[:, 0] - 3 * weight[:, 1])
    eps = weight / layer.weight_sigma.T
    assert torch.allclose(eps[:, 0, 0] * eps[:, 1, 1], eps[:, 0, 1] * eps[:, 1, 0])
    assert torch.allclose(
        eps[:, 0, 0] * (bias / layer.bias_sigma)[:, 1], eps[:, 0, 1] * (bias / layer.bias_sigma)[:, 0]
    )


def test_the_noise_has_a_gradient_of_its_own():
    torch.manual_seed(2)
    layer = rainbow.NoisyLinear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    assert torch.allclose(layer.weight.grad, x.sum(0).expand(2, 3))  # as of a layer without noise


@pytest.mark.parametrize("noisy", [False, True])
def test_environments_do_not_share_their_noise(noisy, tmp_path, spied):
    """Three environments whose observations are the same all along."""
    flags = {"start_e": 0.0, "end_e": 0.0, "learning_starts": 60, "num_envs": 3}
    train(tmp_path, **{**TINY, **flags}, env_id="Probe-constant-v0", noisy=noisy)
    (replay,) = spied
    actions = torch.from_numpy(replay.fields["actions"][:20])
    obs = replay.fields["obs"][:20]
    assert (obs == obs[:, :1]).all()
    assert (actions == actions[:, :1]).all() == (not noisy)


def test_noise_takes_the_place_of_epsilon(tmp_path):
    run = train(tmp_path, **TINY)
    assert {row["charts/epsilon"] for row in rows(run) if "charts/epsilon" in row} == {0.0}
    other = train(tmp_path, **TINY, start_e=0.3, end_e=0.1, exploration_fraction=0.9)
    assert same(weights(run), weights(other))
    plain = train(tmp_path, **TINY, noisy=False)
    assert [row["charts/epsilon"] for row in rows(plain) if "charts/epsilon" in row][-1] == pytest.approx(0.1)


class SpiedReplay(common.ReplayBuffer):
    made: list = []  # noqa: RUF012

    def __init__(self, *words, **options):
        super().__init__(*words, **options)
        self.options, self.betas, self.updates, self.rewards = options, [], [], []
        self.made.append(self)

    def add(self, **step):
        self.rewards.append(step["rewards"].clone())
        super().add(**step)

    def sample(self, batch_size, beta=1.0):
        self.betas.append(beta)
        self.batch = super().sample(batch_size, beta)
        return self.batch

    def update_priorities(self, indices, td_errors):
        assert indices is self.batch.indices
        self.updates.append(td_errors.clone())
        super().update_priorities(indices, td_errors)


@pytest.fixture
def spied(monkeypatch):
    SpiedReplay.made.clear()
    monkeypatch.setattr(common, "ReplayBuffer", SpiedReplay)
    return SpiedReplay.made


@pytest.mark.parametrize("num_envs", [1, 4])
def test_beta_grows_to_exactly_1_and_every_update_sets_priorities(num_envs, tmp_path, spied):
    flags = {"total_timesteps": 1000, "learning_starts": 100, "train_frequency": 4, "hidden_sizes": (16,)}
    options = {"prioritized_replay_alpha": 0.7, "prioritized_replay_beta": 0.3, "n_step": 2, "gamma": 0.9}
    train(tmp_path, **flags, **options, num_envs=num_envs)
    (replay,) = spied
    assert replay.options == {"n_step": 2, "gamma": 0.9, "frame_stack": 0, "alpha": 0.7}
    assert replay.betas == pytest.approx([0.3 + 0.7 * t / 1000 for t in range(104, 1001, 4)])
    assert replay.betas[-1] == 1.0
    assert len(replay.updates) == len(replay.betas)
    assert len(np.unique(replay.priorities.tree.levels[0][:1000])) > 100


def test_without_the_flags_replay_is_plain(tmp_path, spied):
    train(tmp_path, **TINY, n_step=1, prioritized_replay=False)
    (replay,) = spied
    assert replay.options == {"n_step": 1, "gamma": 0.99, "frame_stack": 0, "alpha": None}
    assert not replay.updates
    assert replay.priorities is None


@pytest.mark.parametrize("clip_rewards", [False, True])
def test_each_reward_is_clipped_before_returns_are_made_of_it(clip_rewards, tmp_path, spied):
    # of a sum of three, the sign would be another thing than the sum of three signs
    train(tmp_path, **{**TINY, "learning_starts": 50}, env_id="Uneven-v0", clip_rewards=clip_rewards)
    (replay,) = spied
    lengths = itertools.cycle((1, 30, 4))
    rewards = itertools.chain.from_iterable(range(1, length + 1) for length in lengths)
    expected = [1.0 if clip_rewards else float(reward) for reward in itertools.islice(rewards, 60)]
    assert torch.cat(replay.rewards).tolist() == expected


@pytest.mark.skipif(importlib.util.find_spec("ale_py") is None, reason="needs ale-py")
def test_atari_frames_are_stored_once(tmp_path, spied):
    flags = {"total_timesteps": 60, "learning_starts": 40, "buffer_size": 100, "batch_size": 4, "train_frequency": 10}
    train(tmp_path, env_id="ALE/Pong-v5", **flags)
    (replay,) = spied
    assert replay.options["frame_stack"] == 4
    assert "obs" not in replay.fields and len(replay.frames.ring) == 104
    assert replay.batch.obs.shape == (4, 4, 84, 84) and replay.batch.obs.dtype == torch.uint8


def test_with_every_part_off_it_learns_what_dqn_learns_to_the_bit(tmp_path):
    for more in ({}, {"double": True, "num_envs": 3, "clip_rewards": True}):
        flags = {**SMALL, "learning_rate": 1e-3, "double": False, **more}
        ours = weights(train(tmp_path, **{**PARTS, **flags}))
        theirs = weights(train_with(load("dqn"), tmp_path, **flags))
        assert same(ours, theirs)


EVERY_COMBINATION = [
    pytest.param(on, id="".join("01"[x] for x in on), marks=() if sum(on) in (0, 1, 5, 6) else pytest.mark.slow)
    for on in itertools.product([True, False], repeat=6)
]


@pytest.mark.parametrize("on", EVERY_COMBINATION)
def test_every_combination_runs_and_moves_every_parameter(on, tmp_path):
    flags = {name: off for (name, off), is_on in zip(PARTS.items(), on, strict=True) if not is_on}
    moved = weights(train(tmp_path, **TINY, **flags))
    torch.manual_seed(1)
    envs = envs_of("CartPole-v1", 1)
    initial = rainbow.QNetwork(envs, rainbow.Args(**TINY, **flags)).state_dict()
    envs.close()
    assert moved.keys() == initial.keys()
    for name in initial:
        assert moved[name].isfinite().all()
        assert not torch.equal(moved[name], initial[name]), name


PROBES = {
    # world: (gamma, {observation: Q(s, 0), Q(s, 1)}); the limit is the closed form, not what came out
    "Probe-constant-v0": {0.0: (1.0, 1.0)},
    "Probe-obs-v0": {-1.0: (-1.0, -1.0), 1.0: (1.0, 1.0)},
    "Probe-discount-v0": {0.0: (0.5, 0.5), 1.0: (1.0, 1.0)},
    "Probe-action-v0": {0.0: (-1.0, 1.0)},
    "Probe-both-v0": {-1.0: (1.0, -1.0), 1.0: (-1.0, 1.0)},
}
PROBE = {"total_timesteps": 3000, "learning_starts": 100, "train_frequency": 2, "target_network_frequency": 20}
PROBE |= {"hidden_sizes": (32, 32), "learning_rate": 3e-3, "gamma": 0.5, "v_min": -2.0, "v_max": 2.0, "num_atoms": 21}


@pytest.mark.slow  # `python -m common check` asks this of all parts together
@pytest.mark.parametrize("env_id", PROBES)
@pytest.mark.parametrize("off", [None, *PARTS])
def test_without_any_one_part_it_reaches_the_values_of_probe_environments(off, env_id, tmp_path):
    flags = {} if off is None else {off: PARTS[off]}
    run = train(tmp_path, env_id=env_id, **PROBE, **flags, end_e=0.5)
    for obs, expected in PROBES[env_id].items():
        assert q_values(run, [[obs]])[0].tolist() == pytest.approx(expected, abs=0.05)


def test_images_are_seen_by_convolutions_without_noise_and_linear_layers_with_it(tmp_path):
    run = train(tmp_path, env_id="Pixels-v0", **{**TINY, "train_frequency": 10, "buffer_size": 60})
    kinds = [type(m).__name__ for m in network_of(run).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert kinds == ["Conv2d"] * 3 + ["NoisyLinear"] * 4
    assert q_values(run, np.zeros((2, 2, 36, 40))).shape == (2, 2)


def test_logging_draws_no_noise_from_the_generator_of_training(tmp_path):
    plain = weights(train(tmp_path, **SMALL))
    assert same(plain, weights(train(tmp_path, **{**SMALL, "log_interval": 7})))


def test_an_evaluation_plays_the_mean_network(tmp_path, monkeypatch):
    """Two policies that are asked twice are one and the same; a noisy one would not be."""
    run = train(tmp_path, **TINY)
    network = network_of(run)
    obs = torch.randn(50, 4)
    assert torch.equal(network(obs), network(obs))
    assert not torch.equal(network.train()(obs), network(obs))
    modes = []
    q_values = rainbow.QNetwork.q_values
    spy = lambda self, obs: modes.append((self.training, len(obs))) or q_values(self, obs)  # noqa: E731
    monkeypatch.setattr(rainbow.QNetwork, "q_values", spy)
    train(tmp_path, **TINY, eval_episodes=2, capture_video=False)
    assert {training for training, size in modes if size == 2} == {False}  # two environments at once
    assert modes[0] == (True, 1)


def test_returns_beyond_the_support_are_logged(tmp_path):
    inside, outside = (
        [row["losses/clipped_return"] for row in rows(run) if "losses/clipped_return" in row]
        for run in (train(tmp_path, **SMALL), train(tmp_path, **SMALL, v_max=2.0))
    )
    assert inside and max(inside) < 1e-4
    assert min(outside) > 0.1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"env_id": "Pendulum-v1"}, "Rainbow needs a Discrete action space"),
        ({"hidden_sizes": ()}, "--hidden-sizes"),
        ({"num_atoms": 1}, "at least 2 --num-atoms"),
        ({"v_min": 3.0, "v_max": 3.0}, "--v-min below --v-max"),
    ],
)
def test_a_wrong_argument_is_one_line(flags, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, **flags)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert says in line


@pytest.mark.parametrize("distributional", [False, True])
def test_a_loss_that_is_not_finite_ends_the_run(distributional, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, **{**SMALL, "learning_rate": 1e30}, distributional=distributional)
    assert stop.value.code == 4
    assert "losses/td_loss is" in capsys.readouterr().err
    for value in weights(only_run(next(tmp_path.iterdir()))).values():
        assert value.isfinite().all()  # the last good policy was not written over
