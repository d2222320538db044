"""Replay behind a DataLoader: the batches that `sample` gives, always of the replay as it is now."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader

import common


def filled(steps, **how):
    replay = common.ReplayBuffer(100, 2, **how)
    for t in range(steps):
        add(replay, t)
    return replay


def add(replay, t):
    replay.add(
        obs=torch.tensor([[2.0 * t], [2.0 * t + 1]]),
        rewards=torch.full((2,), float(t)),
        terminations=torch.tensor([t % 7 == 6, False]),
        truncations=torch.tensor([False, t % 5 == 4]),
    )


def loader_of(replay, *words, **options):
    data = common.ReplayDataset(replay, *words, **options)
    return DataLoader(data, batch_size=None, generator=torch.Generator())


@pytest.mark.parametrize("how", [{}, {"n_step": 3, "gamma": 0.9}, {"alpha": 0.6, "n_step": 2, "gamma": 0.9}])
def test_batches_are_those_of_sample(how):
    replay = filled(80, **how)
    torch.manual_seed(5)
    batches = [vars(batch) for batch in itertools.islice(loader_of(replay, 16, beta=0.4), 3)]
    torch.manual_seed(5)
    for batch in batches:
        expected = vars(replay.sample(16, 0.4))
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], value) for name, value in expected.items())
        assert len(batch["obs"]) == 16
    assert not torch.equal(batches[0]["obs"], batches[1]["obs"])


def test_a_batch_is_of_the_replay_as_it_is_now():
    torch.manual_seed(0)
    replay = filled(1)
    batches = iter(loader_of(replay, 3000))  # so many that each of 100 transitions is among them
    for t in range(1, 120):  # and beyond the 50 steps that the ring holds
        assert set(next(batches).rewards.tolist()) == set(range(max(t - 50, 0), t))
        add(replay, t)


def test_what_sample_returns_is_handed_on_uncopied(monkeypatch):
    replay = filled(3)
    given = replay.sample(4)
    monkeypatch.setattr(replay, "sample", lambda batch_size, beta: given)
    assert next(iter(loader_of(replay, 4))) is given


def test_new_priorities_and_a_new_beta_hold_from_the_next_batch():
    torch.manual_seed(0)
    replay = filled(10, alpha=1.0, gamma=0.9)
    data = common.ReplayDataset(replay, 64)
    batches = iter(DataLoader(data, batch_size=None))
    next(batches)
    replay.update_priorities(torch.arange(20), torch.tensor([0.0] * 10 + [1.0, 3.0] * 5))
    batch = next(batches)
    assert batch.indices.min() >= 10
    assert batch.weights[batch.indices % 2 == 1].tolist() == pytest.approx([1 / 3] * int((batch.indices % 2).sum()))
    data.beta = 0.0
    assert set(next(batches).weights.tolist()) == {1.0}


def test_an_epoch_is_as_long_as_it_says():
    replay = filled(3)
    loader = loader_of(replay, 4, num_batches=5)
    assert len(loader) == 5
    assert [sum(1 for _ in loader) for _ in range(2)] == [5, 5]
    assert sum(1 for _ in loader_of(replay, 4, num_batches=0)) == 0
    with pytest.raises(TypeError, match="no end"):
        len(loader_of(replay, 4))
    assert sum(1 for _ in itertools.islice(loader_of(replay, 4), 300)) == 300


def test_workers_are_refused_in_one_sentence():
    loader = DataLoader(common.ReplayDataset(filled(3), 4), batch_size=None, num_workers=1)
    with pytest.raises(RuntimeError) as refused:
        next(iter(loader))
    assert str(refused.value) == (
        "a replay that is being filled can be read only where it is filled: use num_workers=0"
    )


def test_an_empty_replay_says_so():
    with pytest.raises(ValueError, match="the replay is empty"):
        next(iter(loader_of(common.ReplayBuffer(10, 1), 4)))
