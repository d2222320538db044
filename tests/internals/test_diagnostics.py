"""The signs of trouble against computations of their own; they leave training as it is."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, load, only_run, rows, weights
from torch import nn

import common
from common.internals.tracking.diagnostics import Alarms, dead_units, diagnostics, grad_norm

SHORT = {
    "dqn": {"learning_starts": 200, "total_timesteps": 900},
    "pqn": {"num_envs": 2, "num_steps": 32, "num_minibatches": 2, "update_epochs": 2, "total_timesteps": 640},
    "ppo": {"num_envs": 2, "num_steps": 32, "num_minibatches": 2, "update_epochs": 2, "total_timesteps": 640},
    "ppo_recurrent": {"num_envs": 2, "num_steps": 32, "num_minibatches": 2, "update_epochs": 2, "total_timesteps": 640},
    "reinforce_rollout": {"num_envs": 2, "num_steps": 32, "total_timesteps": 640},
    "sac": {"env_id": "Pendulum-v1", "learning_starts": 200, "total_timesteps": 500, "hidden_sizes": (16,)},
    "crossq": {"env_id": "Pendulum-v1", "learning_starts": 200, "total_timesteps": 500, "hidden_sizes": (16,)},
}


def by_gradient(network, x):
    """Share of hidden units whose input gets no gradient from any sample: what dead means, found by autograd."""
    inputs = []

    def keep(module, words):
        words[0].retain_grad()
        inputs.append(words[0])

    hooks = [m.register_forward_pre_hook(keep) for m in network.modules() if isinstance(m, nn.ReLU)]
    network(x).square().sum().backward()
    for hook in hooks:
        hook.remove()
    units = [p.grad.transpose(0, 1).flatten(1) for p in inputs]
    return torch.cat([(u == 0).all(1) for u in units]).float().mean().item()


@pytest.mark.parametrize("bias", [0.0, -1.0, -2.0])
def test_dead_relus_are_those_that_no_gradient_passes(bias):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 2))
    network[0].bias.data += bias
    x = torch.randn(50, 3)
    share = dead_units(network, x)
    # Before the last layer a gradient is 0 for a live unit too if all units behind it are dead, which these are not.
    assert share == pytest.approx(by_gradient(network, x))
    assert (bias == 0.0) == (share < 0.05)


def test_a_channel_of_a_convolution_is_one_unit():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.rand(5, 1, 6, 6)
    network(x)
    network[0].weight.data.fill_(0.1)
    network[0].bias.data.copy_(torch.tensor([0.0, -9.0, 0.0, -9.0]))
    x[:] = 0
    x[3, 0, 0, 0] = 1.0  # one place of one sample keeps channels 0 and 2 alive
    assert dead_units(network, x) == 0.5


def test_a_tanh_unit_is_dead_where_it_stays_at_one_end():
    # always high; always low; at both ends, which is a switch and not dead; in the middle; one sample in the middle
    x = torch.tensor([[9.0, -9.0, 9.0, 0.0, 9.0], [9.0, -9.0, -9.0, 0.1, 1.0]])
    assert dead_units(nn.Tanh(), x) == pytest.approx(0.4)
    just_inside = torch.full((3, 1), math.atanh(0.989))
    just_outside = torch.full((3, 1), math.atanh(0.991))
    assert dead_units(nn.Tanh(), torch.cat([just_inside, just_outside], 1)) == 0.5


def test_a_network_without_such_units_has_no_share():
    assert math.isnan(dead_units(nn.Linear(2, 2), torch.zeros(4, 2)))


@pytest.mark.parametrize("compile", [False, True])
def test_the_gradient_norm_is_that_of_the_gradients_adam_saw(compile):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.8), fused=True)
    if compile:  # the optimizer of a graph keeps its moments in the same place; called here without one
        from common.internals.speed.compile import _TracedAdam

        _TracedAdam(optimizer).read_lr()
    assert math.isnan(grad_norm(optimizer))
    mean, count = 0.0, 0
    for scale in (1.0, 5.0, 0.2, 3.0):
        optimizer.zero_grad()
        (scale * network(torch.randn(6, 3))).square().mean().backward()
        squares = sum(float((p.grad.double() ** 2).sum()) for p in network.parameters())
        mean, count = 0.8 * mean + 0.2 * squares, count + 1
        optimizer.step()
        assert grad_norm(optimizer) == pytest.approx(math.sqrt(mean / (1 - 0.8**count)), rel=1e-5)
    other = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    other.param_groups[0]["params"][0].grad = torch.tensor([3.0, 4.0])
    other.step()
    assert grad_norm(other) == pytest.approx(5.0, rel=1e-5)
    both = math.sqrt(mean / (1 - 0.8**count) + 25)
    assert grad_norm(optimizer, other) == pytest.approx(both, rel=1e-5)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))


def stepped(kind, network, **more):
    """An optimizer of that kind after one update."""
    optimizer = kind(network.parameters(), lr=1e-3, **more)
    network(torch.randn(6, 3)).square().mean().backward()
    optimizer.step()
    return optimizer


class TakesMore(nn.Module):
    def forward(self, obs, state):
        return obs


class Broken(nn.Module):
    def forward(self, obs):
        raise RuntimeError("CUDA error")


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU())

    def forward(self, obs):
        return self.body(obs), None


HEALTH = {"health/grad_norm", "health/dead_units", "health/updates_per_step"}
ADAM = torch.optim.Adam
KINDS = [
    (mlp(), ADAM, torch.randn(4, 3), set()),
    (mlp(), torch.optim.AdamW, torch.randn(4, 3), set()),
    (Pair(), ADAM, torch.randn(4, 3), set()),  # what comes out does not matter
    (TakesMore(), ADAM, torch.randn(4, 3), {"health/dead_units"}),
    (Broken(), ADAM, torch.randn(4, 3), {"health/dead_units"}),
    (mlp(), ADAM, torch.randn(4, 9), {"health/dead_units"}),
    (mlp(), ADAM, torch.randn(4, 3, device="meta"), {"health/dead_units"}),
    (mlp(), ADAM, None, {"health/dead_units"}),
    (mlp(), torch.optim.RMSprop, torch.randn(4, 3), {"health/grad_norm"}),
    (mlp(), torch.optim.SGD, torch.randn(4, 3), {"health/grad_norm", "health/updates_per_step"}),
]


@pytest.mark.parametrize(("network", "kind", "inputs", "missing"), KINDS)
def test_what_cannot_be_measured_is_left_out_after_one_warning(network, kind, inputs, missing, capsys, monkeypatch):
    monkeypatch.setattr("common.args._warned", set())
    optimizer = stepped(kind, mlp())
    found = [diagnostics(network, inputs, 10, optimizer) for _ in range(3)]
    assert all(row.keys() == HEALTH - missing for row in found)
    if "health/updates_per_step" not in missing:
        assert found[0]["health/updates_per_step"] == 0.1
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == len(missing)
    assert all(any(line.startswith(f"warning: measuring {name} failed") for line in warnings) for name in missing)
    assert not any(module._forward_hooks for module in network.modules())


def test_nothing_to_measure_ends_nothing():
    frozen = mlp().requires_grad_(False)
    for network, optimizers in ((nn.Sequential(), ()), (frozen, (ADAM(frozen.parameters()),)), (None, (None,))):
        diagnostics(network, torch.zeros(2, 3), 0, *optimizers)


def test_measuring_changes_nothing():
    network = mlp()
    optimizer = stepped(ADAM, network)
    network[2].eval()

    def everything():
        parts = [*network.state_dict().values(), *(p.grad for p in network.parameters()), torch.get_rng_state()]
        return [part.clone() for part in parts]

    before, held = everything(), len(optimizer.state)
    modes = [module.training for module in network.modules()]
    assert (
        0
        <= diagnostics(network, torch.randn(4, 3, generator=torch.Generator()), 10, optimizer)["health/dead_units"]
        <= 1
    )
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert [module.training for module in network.modules()] == modes
    assert len(optimizer.state) == held


@pytest.mark.parametrize(
    ("num_envs", "n_step", "alpha", "stack"),
    [(1, 1, None, 0), (3, 1, None, 0), (2, 3, 0.6, 0), (2, 2, None, 2), (1, 1, 0.5, 3)],
)
@pytest.mark.parametrize("steps", [1, 7, 12, 31])
def test_newest_and_mean_age_against_a_list(num_envs, n_step, alpha, stack, steps):
    replay = common.ReplayBuffer(12 * num_envs, num_envs, n_step=n_step, gamma=0.9, frame_stack=stack, alpha=alpha)
    assert math.isnan(replay.mean_age())
    with pytest.raises(ValueError, match="empty"):
        replay.newest(4)
    frames = torch.zeros(num_envs, max(stack, 1), 2)
    for t in range(steps):
        frame = torch.tensor([[float(t), e] for e in range(num_envs)])
        before, frames = frames, torch.cat([frames[:, 1:], frame[:, None]], 1) if stack else frame[:, None]
        obs, next_obs = (before, frames) if stack else (before[:, 0], frames[:, 0])
        replay.add(
            obs=obs,
            next_obs=next_obs,
            rewards=torch.zeros(num_envs),
            terminations=torch.zeros(num_envs, dtype=torch.bool),
            truncations=torch.zeros(num_envs, dtype=torch.bool),
            born=torch.full((num_envs,), t),
            env=torch.arange(num_envs),
        )
    held = list(itertools.product(range(max(steps - 12, 0), steps), range(num_envs)))
    for count in (1, 5, 100):
        batch = replay.newest(count)
        assert list(zip(batch.born.tolist(), batch.env.tolist(), strict=True)) == held[::-1][:count]
    for count in (1, 5, 100):
        batch = replay.spread(count)
        ring = sorted(held, key=lambda at: (at[0] % 12, at[1]))
        assert list(zip(batch.born.tolist(), batch.env.tolist(), strict=True)) == [
            ring[int(k * len(ring) / count)] for k in range(count)
        ]
    if alpha is not None and len(held) > 3:
        rng = np.random.default_rng(0)
        replay.update_priorities(torch.arange(len(replay)), torch.from_numpy(rng.exponential(size=len(replay))))
    state = torch.random.get_rng_state()
    drawn = replay.sample(200_000)
    age = ((steps - 1 - drawn.born) * num_envs).double()
    torch.random.set_rng_state(state)
    expected = replay.mean_age()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert expected == pytest.approx(age.mean().item(), abs=5 * age.std(correction=0).item() / math.sqrt(200_000))


@pytest.mark.parametrize("script", SHORT)
def test_the_signs_are_logged_and_leave_training_as_it_is(script, tmp_path):
    module = load(script)
    hashes = []
    for interval in (100, 10_000):
        runs = tmp_path / str(interval)
        flags = {**SHORT[script], "log_interval": interval, "eval_episodes": 0, "track": False}
        module.main(module.Args(runs_dir=str(runs), **flags))
        hashes.append(weights(only_run(runs)))
    assert all(torch.equal(hashes[0][name], hashes[1][name]) for name in hashes[0])
    table = rows(only_run(tmp_path / "100"))
    last = [row for row in table if "health/grad_norm" in row][-1]
    assert last["health/grad_norm"] > 0
    assert 0 <= last["health/dead_units"] <= 1
    steps = last["global_step"]
    if script in ("dqn", "sac", "crossq"):
        args = module.Args()
        updates = (steps - 200) // args.train_frequency
        assert last["health/updates_per_step"] == pytest.approx(updates / steps, abs=1 / steps)
        assert last["health/replay_age"] == pytest.approx((steps - 1) / 2)
    else:
        per_rollout = 1 if script == "reinforce_rollout" else 4
        assert last["health/updates_per_step"] == per_rollout / 64
    assert ("health/action_saturation" in last) == (script in ("sac", "crossq"))


def test_each_alarm_is_raised_once_and_survives_a_resume():
    alarms = Alarms(total_timesteps=100_000, num_envs=2)
    assert alarms.look({"losses/entropy": 0.7}, 9_998) == []
    (line,) = alarms.look({"losses/entropy": 0.5}, 10_000)
    assert line.startswith("no episode has ended in 10,000 steps")
    (line,) = alarms.look({"losses/entropy": 0.006}, 12_000)
    assert "its entropy fell from 0.7 to 0.006 at step 12,000" in line
    (line,) = alarms.look({"losses/entropy": 0.006, "health/dead_units": 0.91}, 14_000)
    assert line.startswith("91% of the hidden units")
    again = Alarms(total_timesteps=100_000, num_envs=2)
    again.load_state_dict(alarms.state_dict())
    bad = {"losses/entropy": 0.001, "health/dead_units": 0.95, "health/action_saturation": 0.95}
    (line,) = again.look(bad, 16_000)
    assert line == "the policy no longer chooses: 95% of its actions sit at the bounds at step 16,000"
    assert again.look(bad, 18_000) == []


@pytest.mark.parametrize("name", ["losses/q_values", "losses/values", "losses/qf1_values", "losses/qf2_values"])
def test_values_far_beyond_any_return_are_an_alarm(name):
    alarms = Alarms(total_timesteps=100_000, num_envs=1)
    assert alarms.look({name: 1e9}, 500) == []  # no return is known yet
    alarms.note(0.0)
    assert alarms.look({name: 1000.0}, 1000) == []
    for episodic_return in (-30.0, 20.0):
        alarms.note(episodic_return)
    again = Alarms(total_timesteps=100_000, num_envs=1)
    again.load_state_dict(alarms.state_dict())
    assert again.look({name: -3000.0}, 2000) == []
    (line,) = again.look({name: -3001.0}, 2000)
    assert "values diverge: 3e+03 at step 2,000" in line and "exceeded 30" in line


@pytest.mark.parametrize(
    "row",
    [
        {"losses/entropy": -0.3},  # of a Box action
        {"losses/entropy": 0.02},
        {"health/dead_units": 0.9, "health/action_saturation": 0.9},
        {"health/dead_units": math.nan},
        {},
    ],
)
def test_no_alarm_without_reason(row):
    alarms = Alarms(total_timesteps=100_000, num_envs=1)
    alarms.episodes = True
    assert alarms.look({"losses/entropy": 1.4}, 500) == []
    assert alarms.look(row, 20_000) == []


def test_numbers_that_are_none_hide_no_alarm_and_raise_none():
    alarms = Alarms(total_timesteps=100_000, num_envs=1)
    for episodic_return in (math.inf, math.nan, 5.0):
        alarms.note(episodic_return)
    assert alarms.look({"losses/entropy": math.inf, "losses/q_values": math.nan}, 100) == []
    assert alarms.look({"losses/entropy": 0.7}, 200) == []
    (line,) = alarms.look({"losses/q_values": math.nan, "losses/values": 1e9}, 300)
    assert "predicted values diverge: 1e+09" in line
    again = Alarms(total_timesteps=100_000, num_envs=1)
    again.load_state_dict({})
    assert again.look({}, 100) == []


def test_a_policy_that_has_learnt_may_be_certain():
    alarms = Alarms(total_timesteps=100_000, num_envs=1)
    alarms.episodes = True
    alarms.look({"losses/entropy": 1.4}, 500)
    assert alarms.look({"losses/entropy": 0.001}, 50_000) == []


def test_an_alarm_is_one_warning_of_the_run(tmp_path, capfd):
    module = load("dqn")
    args = module.Args(track=False, total_timesteps=1000, runs_dir=str(tmp_path), eval_episodes=0)
    run = common.track(args, common.setup(args))
    for step in range(100, 1001, 100):
        run.log({"health/dead_units": 0.92}, step)
    run.finish()
    assert capfd.readouterr().err.count("warning: 92% of the hidden units pass no gradient on at step 100") == 1


def test_every_metric_of_the_scripts_is_on_the_page():
    page = (ROOT / "docs" / "health.md").read_text()
    common = [*(ROOT / "common").glob("*.py"), *(ROOT / "common" / "internals").rglob("*.py")]
    for path in [*(ROOT / "algos").glob("*.py"), *common]:
        for key in re.findall(r'"((?:charts|losses|health|eval)/\w+)"', path.read_text()):
            assert f"`{key}`" in page, key
    for key in re.findall(r"`((?:charts|losses|health|eval)/\w+)`", page):
        assert any(
            f'"{key}"' in path.read_text() for folder in ("algos", "common") for path in (ROOT / folder).rglob("*.py")
        )
