"""The ring against an unbounded list, byte for byte (P9, P15)."""

import collections

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import ReplayBuffer


def step_of(t, num_envs):
    return {
        "obs": torch.arange(num_envs * 3, dtype=torch.float32).reshape(num_envs, 3) + 100 * t,
        "image": (torch.arange(num_envs * 4).reshape(num_envs, 2, 2) + t).to(torch.uint8),
        "actions": torch.arange(num_envs) + 1000 * t,
        "terminations": torch.arange(num_envs) % 2 == t % 2,
    }


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 60))
def test_it_holds_the_last_transitions_and_nothing_else(capacity, num_envs, steps):
    if capacity < num_envs:
        with pytest.raises(ValueError, match="capacity"):
            ReplayBuffer(capacity, num_envs)
        return
    replay = ReplayBuffer(capacity, num_envs)
    kept = collections.deque(maxlen=capacity // num_envs)
    for t in range(steps):
        replay.add(**step_of(t, num_envs))
        kept.append(step_of(t, num_envs))
    assert len(replay) == len(kept) * num_envs
    if not kept:
        with pytest.raises(ValueError, match="empty"):
            replay.sample(1)
        return
    batch = replay.sample(50 * len(replay))
    expected = {name: torch.cat([step[name] for step in kept]) for name in kept[0]}
    rows = {int(a): i for i, a in enumerate(expected["actions"])}
    where = torch.tensor([rows[int(a)] for a in batch.actions])
    for name, values in expected.items():
        drawn = getattr(batch, name)
        assert drawn.dtype == values.dtype
        assert torch.equal(drawn, values[where]), name


def test_sampling_is_uniform_and_with_replacement():
    replay = ReplayBuffer(12, 2)
    for t in range(9):  # overfull: the ring has turned over
        replay.add(x=torch.tensor([2 * t, 2 * t + 1]))
    torch.manual_seed(0)
    n = 120_000
    counts = np.bincount(replay.sample(n).x.numpy(), minlength=18)
    assert (counts[:6] == 0).all()
    chi2 = ((counts[6:] - n / 12) ** 2 / (n / 12)).sum()
    assert chi2 < 31.3  # 99.9 % quantile of chi-square with 11 degrees of freedom


def test_add_copies():
    replay = ReplayBuffer(4, 1)
    obs = torch.ones(1, 2)
    replay.add(obs=obs)
    obs.fill_(7)
    assert (replay.sample(10).obs == 1).all()
    batch = replay.sample(1)
    batch.obs.fill_(9)
    assert (replay.sample(10).obs == 1).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"obs": torch.zeros(1, 3)},
        {"obs": torch.zeros(1, 2, dtype=torch.float64)},
        {"obs": torch.zeros(1, 2), "extra": torch.zeros(1)},
        {},
    ],
)
def test_a_step_unlike_the_first_is_refused(wrong):
    replay = ReplayBuffer(4, 1)
    replay.add(obs=torch.zeros(1, 2))
    with pytest.raises(ValueError):
        replay.add(**wrong)
    assert len(replay) == 1


def test_the_first_dimension_is_the_environments():
    with pytest.raises(ValueError, match="num_envs"):
        ReplayBuffer(4, 2).add(obs=torch.zeros(3, 2))


def test_a_ring_larger_than_the_memory_is_refused_before_it_is_made(capsys):
    replay = ReplayBuffer(10**9, 2)
    with pytest.raises(SystemExit) as stop:
        replay.add(obs=torch.zeros(2, 84, 84))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"needs {10**9 * 84 * 84 * 4 / 2**30:.1f} GiB" in error
    assert "--buffer-size" in error


def test_the_same_seed_samples_the_same():
    replay = ReplayBuffer(100, 1)
    for t in range(100):
        replay.add(x=torch.tensor([t]))
    torch.manual_seed(5)
    first = replay.sample(64).x
    torch.manual_seed(5)
    assert torch.equal(first, replay.sample(64).x)
