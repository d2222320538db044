"""Running statistics against all samples at once, and the discounted returns behind reward scaling one by one (P25)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import RewardScaler, RunningMeanStd


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 2**31))
def test_statistics_are_those_of_all_samples_at_once(sizes, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(1e4, [1.0, 30.0], (size, 2, 2)) for size in sizes]
    rms = RunningMeanStd((2,))
    for part in parts:
        rms.update(torch.tensor(part))
    seen = np.concatenate(parts).reshape(-1, 2)
    assert rms.count.item() == len(seen)
    assert np.allclose(rms.mean, seen.mean(0), rtol=1e-12)
    assert np.allclose(rms.var, seen.var(0), rtol=1e-6)
    x = rng.normal(1e4, [1.0, 30.0], (5, 2))
    expected = np.clip((x - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-8), -10, 10)
    out = rms(torch.tensor(x))
    assert out.dtype == torch.float32
    assert np.allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_before_the_first_update_only_the_clip_acts():
    out = RunningMeanStd((3,))(torch.tensor([[0.5, -3.0, 1e6]]))
    assert torch.allclose(out, torch.tensor([[0.5, -3.0, 10.0]]))


def test_a_constant_does_not_divide_by_zero():
    rms = RunningMeanStd((1,))
    rms.update(torch.full((100, 1), 7.0))
    assert rms(torch.tensor([[7.0], [7.1]])).tolist() == [[0.0], [10.0]]


def test_a_billion_samples_still_count():
    rms = RunningMeanStd()
    rms.count.fill_(1e9)
    rms.update(torch.ones(1))
    assert rms.count.item() == 1e9 + 1


def test_the_state_is_restored_to_the_bit():
    rms, copy = RunningMeanStd((4,)), RunningMeanStd((4,))
    rms.update(torch.randn(1000, 4) * 3 + 2)
    copy.load_state_dict(rms.state_dict())
    x = torch.randn(1000, 4)
    assert torch.equal(rms(x), copy(x))
    rms.update(x)
    copy.update(x)
    assert torch.equal(rms.var, copy.var)


def returns_seen(monkeypatch, scaler, *rollouts):
    seen = []
    monkeypatch.setattr(scaler.returns, "update", lambda x: seen.append(x.clone()))
    for rewards, ends in rollouts:
        scaler.update(rewards, ends)
    return torch.cat(seen)


def test_the_return_starts_anew_after_an_end_and_goes_on_across_rollouts(monkeypatch):
    # Episodes of 3 steps, reward 1, no discount: 1, 2, 3 each, whichever way they end and wherever the rollout is cut.
    scaler = RewardScaler(1, gamma=1.0)
    ends = torch.tensor([[False], [False], [True]] * 2)
    ones = torch.ones(6, 1)
    seen = returns_seen(monkeypatch, scaler, (ones[:2], ends[:2]), (ones[2:], ends[2:]))
    assert seen.flatten().tolist() == [1, 2, 3, 1, 2, 3]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 15), st.integers(1, 3), st.integers(0, 2**31))
def test_rewards_are_divided_by_the_deviation_of_the_discounted_return(num_steps, num_envs, seed):
    rng = np.random.default_rng(seed)
    rewards, ends = rng.normal(3, 2, (num_steps, num_envs)), rng.random((num_steps, num_envs)) < 0.3
    scaler = RewardScaler(num_envs, gamma=0.9)
    scaler.update(torch.tensor(rewards), torch.tensor(ends))
    returns = []
    for env in range(num_envs):
        for t in range(num_steps):
            start = max([k + 1 for k in range(t) if ends[k, env]], default=0)
            returns.append(sum(0.9 ** (t - k) * rewards[k, env] for k in range(start, t + 1)))
    expected = np.clip(rewards / np.sqrt(np.var(returns) + 1e-8), -10, 10)
    assert np.allclose(scaler(torch.tensor(rewards)), expected, rtol=1e-5)


def test_the_state_of_the_scaler_is_restored_to_the_bit():
    scaler, copy = RewardScaler(3, gamma=0.99), RewardScaler(3, gamma=0.99)
    scaler.update(torch.randn(50, 3), torch.rand(50, 3) < 0.1)
    copy.load_state_dict(scaler.state_dict())
    more = torch.randn(50, 3), torch.rand(50, 3) < 0.1
    scaler.update(*more)
    copy.update(*more)
    assert torch.equal(scaler(more[0]), copy(more[0]))


@pytest.mark.parametrize("module", [RunningMeanStd((2,)), RewardScaler(2, 0.9)])
def test_using_it_changes_no_statistics(module):
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.train()(torch.randn(10, 2))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
