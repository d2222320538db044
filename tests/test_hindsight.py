"""Predicted values against what then came: known values, brute force, and training that does not notice."""

import random

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load, only_run, rows, same, weights
from torch import nn

import common
from common.checkpoint import load_latest
from common.envs import env_seeds
from common.evaluation import play
from common.health import Hindsight
from common.policy import load_policy

GAMMA = 0.9


class Zeros(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def greedy(self, obs):
        return torch.zeros(len(obs), dtype=torch.int64)


def annuity(n):
    """1 + gamma + ... + gamma^(n - 1)"""
    return (1 - GAMMA**n) / (1 - GAMMA)


def of_counter(ends, lengths):
    """Rewards t + 1, t + 2 ..., until the episode terminates; for ever if it is only cut."""

    def value(obs):
        episode, t = int(obs // 1000), int(obs % 1000)
        if ends[episode % len(ends)] == "t":
            return (t + 1) / (1 - GAMMA) + GAMMA / (1 - GAMMA) ** 2
        return sum(GAMMA ** (k - t) * (k + 1) for k in range(t, lengths[episode % len(lengths)]))

    return value


# The world, the episodes, whether a lost life ends the learner's episode, and the value of an observation.
KNOWN = [
    ("Mixed-v0", 7, False, of_counter("Tt", (3, 5, 2))),
    ("Terminating-v0", 12, False, of_counter("T", (3, 5, 2))),
    ("Truncating-v0", 3, False, of_counter("t", (3, 5, 2))),
    ("BothAtOnce-v0", 4, False, of_counter("T", (3, 5, 2))),  # what terminates is not cut
    ("Uneven-v0", 15, False, of_counter("Tt", (1, 30, 4))),  # some environments wait for others
    ("Probe-constant-v0", 3, False, lambda obs: 1.0),
    ("Probe-obs-v0", 25, False, float),
    ("Probe-discount-v0", 2, False, lambda obs: GAMMA if obs == 0 else 1.0),
    ("Lives-v0", 2, False, lambda obs: annuity(12 - obs)),
    ("Lives-v0", 2, True, lambda obs: annuity(4 - obs % 4)),
]


@pytest.mark.parametrize(("world", "episodes", "life_loss", "value"), KNOWN, ids=lambda part: str(part)[:20])
@pytest.mark.parametrize("offset", [0.0, 7.0, -0.5])
def test_true_values_have_no_error_and_shifted_ones_the_shift(world, episodes, life_loss, value, offset):
    def predict(obs):
        return torch.tensor([value(float(x)) + offset for x in obs[:, 0]], dtype=torch.float64)

    hindsight = Hindsight(predict, GAMMA)
    play(Zeros().greedy, world, episodes, seed=1, life_loss=life_loss, hindsight=hindsight)
    assert hindsight.error == pytest.approx(offset, abs=1e-6)


def test_a_world_without_an_end_is_worth_more_than_its_episodes():
    hindsight = Hindsight(lambda obs: torch.full((len(obs),), 1 / (1 - GAMMA) + 3), GAMMA)
    play(Zeros().greedy, "Endless-v0", 12, seed=1, hindsight=hindsight)
    assert hindsight.error == pytest.approx(3, abs=1e-5)


def test_cuts_and_ends_by_chance_leave_no_bias():
    """Each step pays 1 and is the last with probability 0.1: of those known to the end, most pay less than their value.

    A time limit of 8 steps cuts four episodes of ten.
    """
    rng = np.random.default_rng(0)
    n, true = 4000, 1 / (1 - GAMMA * 0.9)
    hindsight = Hindsight(lambda obs: torch.full((len(obs),), true), GAMMA)
    hindsight.MOST = 10**6
    running = np.ones(n, bool)
    for t in range(8):
        ends = rng.random(n) < 0.1
        cuts = np.full(n, t == 7) & ~ends
        obs = torch.zeros(n, 1)
        flags = [torch.from_numpy(flag) for flag in (ends, cuts, running.copy())]
        hindsight.add(obs, torch.ones(n), obs, *flags)
        running &= ~(ends | cuts)
    hindsight.look_back(torch.device("cpu"))
    assert abs(hindsight.error) < 0.15  # 4 standard errors; the values of the terminated ones alone are 2 too high


def by_episode(episodes, value, gamma, scale):
    """The same number, from whole episodes [(observations, rewards, last observation or None if it terminated)]."""
    differences, shares = 0.0, 0.0
    for obs, rewards, last in episodes:
        for t in range(len(rewards)):
            n = len(rewards) - t
            came = sum(gamma**k * scale(rewards[t + k]) for k in range(n))
            share = 1.0
            if last is not None:
                came, share = came + gamma**n * value(last), 1 - gamma**n
            differences, shares = differences + value(obs[t]) - came, shares + share
    return differences / shares


@pytest.mark.parametrize("gamma", [0.0, 0.7, 0.99, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_against_brute_force(seed, gamma):
    rng = np.random.default_rng(seed)
    n, share = 3, 4
    hindsight = Hindsight(lambda obs: obs[:, 0].sin() * 5, gamma, None, torch.sign, lambda r: r * 3)
    episodes, running = [], [([], []) for _ in range(n)]
    done = [0] * n
    while min(done) < share:
        obs, last, rewards = rng.normal(size=(n, 2)), rng.normal(size=(n, 2)), rng.normal(size=n)
        ends, cuts = rng.random(n) < 0.15, rng.random(n) < 0.15
        counts = np.array(done) < share
        tensors = [torch.tensor(array) for array in (obs, rewards.astype(np.float32), last, ends, cuts, counts)]
        hindsight.add(*tensors)
        for i in range(n):
            running[i][0].append(obs[i, 0])
            running[i][1].append(rewards[i])
            if ends[i] or cuts[i]:
                if counts[i]:
                    episodes.append((*running[i], None if ends[i] else last[i, 0]))
                running[i], done[i] = ([], []), done[i] + 1
    hindsight.look_back(torch.device("cpu"))
    expected = by_episode(episodes, lambda x: 5 * np.sin(x), gamma, lambda r: 3 * np.sign(r))
    assert len(episodes) == n * share
    assert hindsight.error == pytest.approx(expected, rel=1e-6)


def test_nothing_is_known_of_an_endless_sum():
    hindsight = Hindsight(lambda obs: torch.zeros(len(obs)), 1.0)
    play(Zeros().greedy, "Endless-v0", 2, seed=1, hindsight=hindsight)
    assert np.isnan(hindsight.error)


@pytest.mark.parametrize("n", [1, 10, 3000])
def test_of_long_episodes_observations_at_even_distances_are_kept(n):
    asked = []

    def value(obs):
        asked.extend(obs[:, 0].tolist())
        assert len(obs) <= Hindsight.CHUNK
        return torch.zeros(len(obs), 1)

    hindsight = Hindsight(value, 0.5)
    no, yes = torch.zeros(n, dtype=torch.bool), torch.ones(n, dtype=torch.bool)
    steps = 9001 if n < 100 else 3
    most = 0
    for t in range(steps):
        obs = torch.full((n, 1), float(t))
        hindsight.add(obs, torch.ones(n), obs, yes if t == steps - 1 else no, no, yes)
        most = max(most, len(hindsight.kept) * n)
    hindsight.look_back(torch.device("cpu"))
    assert most <= max(Hindsight.MOST, n)
    times = sorted(set(asked))
    assert len(asked) == len(times) * n >= min(Hindsight.MOST / 2 - n, steps * n)
    assert times[0] == 0
    assert len(set(np.diff(times))) <= 1
    came = np.mean([2 - 2 * 0.5 ** (steps - t) for t in times])  # 1 + 1/2 + 1/4 ...
    assert hindsight.error == pytest.approx(-came)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.dropout, self.frozen = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4)
        self.frozen.eval()

    def forward(self, obs):
        return self.frozen(self.dropout(self.norm(obs))).sum(1)


def test_a_value_that_draws_or_counts_leaves_no_trace():
    torch.manual_seed(0)
    critic = Mixture()
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    drawn = []

    def value(obs):
        drawn.append(torch.rand(1))
        return critic(obs)

    found = []
    for _ in range(2):
        hindsight = Hindsight(value, 0.9)
        play(Zeros().greedy, "CartPole-v1", 2, seed=1, hindsight=hindsight, networks=[critic])
        found.append(hindsight.error)
    assert found[0] == found[1]
    assert drawn
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert same(before, critic.state_dict())
    assert [module.training for module in critic.modules()] == [True, True, True, False]


def broken(obs):
    raise RuntimeError("a recurrent network")


def wrong_length(obs):
    return torch.zeros(len(obs) + 1)


def nothing(obs):
    return None


@pytest.mark.parametrize("value", [broken, wrong_length, nothing])
def test_a_value_that_cannot_be_asked_is_one_warning(value, capsys, monkeypatch):
    monkeypatch.setattr("common.args._warned", set())
    for _ in range(2):
        hindsight = Hindsight(value, 0.9)
        returns, _ = play(Zeros().greedy, "Mixed-v0", 3, seed=1, hindsight=hindsight)
        assert len(returns) == 3
        assert np.isnan(hindsight.error)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: measuring health/value_error failed")


def test_half_a_step_bends_no_sum(capsys, monkeypatch):
    monkeypatch.setattr("common.args._warned", set())
    hindsight = Hindsight(lambda obs: torch.zeros(len(obs)), 0.9)
    no, yes = torch.zeros(1, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    hindsight.add(torch.zeros(1, 1), torch.ones(1), None, no, yes, yes)  # the last observation is missing
    hindsight.add(torch.zeros(1, 1), torch.ones(1), torch.zeros(1, 1), yes, no, yes)
    hindsight.look_back(torch.device("cpu"))
    assert np.isnan(hindsight.error)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_episodes_are_those_of_an_evaluation_without_it():
    policy = Zeros().greedy
    for world, life_loss in (("CartPole-v1", False), ("Lives-v0", True)):
        with_it = play(policy, world, 13, 3, life_loss=life_loss, hindsight=Hindsight(lambda o: o[:, 0], 0.9))
        assert all(np.array_equal(a, b) for a, b in zip(with_it, play(policy, world, 13, 3), strict=True))


FLAGS = {
    "dqn": {"env_id": "Truncating-v0", "learning_starts": 100, "total_timesteps": 400, "clip_rewards": True},
    "dqn_lightning": {"env_id": "Acrobot-v1", "learning_starts": 100, "total_timesteps": 300, "gamma": 0.95},
    "ppo": {"env_id": "Pendulum-v1", "total_timesteps": 1024, "norm_obs": True, "norm_reward": True},
    "reinforce_rollout": {"env_id": "CartPole-v1", "num_envs": 2, "num_steps": 32, "total_timesteps": 640},
    # the step size drives actions to where the tanh matters
    "sac": {"env_id": "Pendulum-v1", "learning_starts": 100, "total_timesteps": 300, "policy_lr": 0.03, "q_lr": 0.01},
}


def what_it_predicts(script, module, run_dir, network):
    """The value function that the paper has, of the saved networks, and what it makes of rewards."""
    if script.startswith("dqn"):
        return lambda obs: network(obs).max(), np.sign if script == "dqn" else float
    if script == "reinforce_rollout":
        return network.value, float
    parts = load_latest(run_dir / "checkpoints")["parts"]
    if script == "sac":
        args = module.Args(**FLAGS["sac"])
        critic = module.Critic(common.make_envs("Pendulum-v1", 1), args)
        critic.load_state_dict(parts["critic"])
        return lambda obs: torch.cat(critic(obs, network.greedy(obs) / 2)).min(), float  # the bound is 2
    std = float(parts["reward_scaler"]["returns.var"]) ** 0.5
    return network.value, lambda r: np.clip(r / std, -10, 10)


@pytest.mark.parametrize("script", FLAGS)
def test_each_script_logs_the_error_of_its_own_value(script, tmp_path):
    if script == "dqn_lightning":
        pytest.importorskip("lightning")
    module = load(script)
    flags = {**FLAGS[script], "eval_episodes": 2, "track": False, "capture_video": False, "log_interval": 100}
    module.main(module.Args(runs_dir=str(tmp_path), seed=5, **flags))
    run_dir = only_run(tmp_path)
    (row,) = [row for row in rows(run_dir) if "health/value_error" in row]
    assert "eval/episodic_return" in row

    policy, facts = load_policy(run_dir)
    network = policy.__self__
    value, scale = what_it_predicts(script, module, run_dir, network)
    episodes = []
    with torch.no_grad():
        for seed in env_seeds(5, 2, role=1):
            env = gym.make(facts["env_id"])
            seen, rewards, terminated, truncated = [env.reset(seed=seed)[0]], [], False, False
            while not (terminated or truncated):
                action = policy(torch.as_tensor(seen[-1], dtype=torch.float32)[None])[0].numpy()
                obs, reward, terminated, truncated, _ = env.step(action)
                seen.append(obs)
                rewards.append(float(reward))
            episodes.append((seen[:-1], rewards, None if terminated else seen[-1]))
        expected = by_episode(
            episodes, lambda obs: float(value(torch.as_tensor(obs)[None].float())), facts["gamma"], scale
        )
    assert row["health/value_error"] == pytest.approx(expected, rel=1e-5)


def test_what_has_no_value_logs_none_and_none_of_it_changes_training(tmp_path, monkeypatch):
    module = load("reinforce_rollout")
    flags = {**FLAGS["reinforce_rollout"], "eval_episodes": 1, "track": False, "capture_video": False}
    module.main(module.Args(runs_dir=str(tmp_path / "none"), baseline=False, **flags))
    assert not any("health/value_error" in row for row in rows(only_run(tmp_path / "none")))
    module.main(module.Args(runs_dir=str(tmp_path / "with"), eval_interval=64, **flags))
    monkeypatch.setattr(common.Run, "watch_value", lambda *_: None)
    module.main(module.Args(runs_dir=str(tmp_path / "without"), eval_interval=64, **flags))
    assert same(weights(only_run(tmp_path / "with")), weights(only_run(tmp_path / "without")))
