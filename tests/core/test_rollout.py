"""Rollout storage against plain lists (P4's storage side, P9, P33)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import RolloutStorage


def step_of(t, num_envs):
    return {
        "obs": torch.arange(num_envs * 3, dtype=torch.float32).reshape(num_envs, 3) + 100 * t,
        "image": (torch.arange(num_envs * 4).reshape(num_envs, 2, 2) + t).to(torch.uint8),
        "ids": torch.arange(num_envs) + 1000 * t,
        "terminations": torch.arange(num_envs) % 2 == t % 2,
    }


def filled(num_steps, num_envs, start=0):
    storage = RolloutStorage(num_steps, num_envs)
    for t in range(start, start + num_steps):
        storage.add(**step_of(t, num_envs))
    return storage


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 3))
def test_a_rollout_holds_the_steps_in_order_and_its_memory_is_used_again(num_steps, num_envs, rollouts):
    storage = RolloutStorage(num_steps, num_envs)
    place = None
    for k in range(rollouts):
        for t in range(num_steps):
            assert len(storage) == t
            storage.add(**step_of(k * num_steps + t, num_envs))
        expected = [step_of(k * num_steps + t, num_envs) for t in range(num_steps)]
        for name in expected[0]:
            value = getattr(storage, name)
            assert value.dtype == expected[0][name].dtype
            assert torch.equal(value, torch.stack([step[name] for step in expected]))
        assert place in (None, storage.obs.data_ptr())
        place = storage.obs.data_ptr()
        storage.clear()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 9))
def test_an_epoch_uses_every_sample_once_in_parts_of_nearly_one_size(num_steps, num_envs, parts):
    storage = filled(num_steps, num_envs)
    size = num_steps * num_envs
    extra = torch.arange(size, dtype=torch.float32).reshape(num_steps, num_envs)
    if size < 2 * parts:
        with pytest.raises(ValueError, match="standard deviation"):
            next(storage.minibatches(parts, extra=extra))
        return
    batches = list(storage.minibatches(parts, extra=extra))
    assert len(batches) == parts
    sizes = [len(mb.ids) for mb in batches]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 2
    seen = torch.cat([mb.ids for mb in batches])
    assert sorted(seen.tolist()) == sorted(storage.ids.flatten().tolist())
    for mb in batches:
        for i, key in enumerate(mb.ids.tolist()):
            t, env = key // 1000, key % 1000
            assert torch.equal(mb.obs[i], step_of(t, num_envs)["obs"][env])
            assert torch.equal(mb.image[i], step_of(t, num_envs)["image"][env])
            assert mb.extra[i] == t * num_envs + env


def test_every_order_is_as_likely_as_another():
    storage = RolloutStorage(3, 1)
    for t in range(3):
        storage.add(x=torch.tensor([t]))
    torch.manual_seed(0)
    counts = {}
    for _ in range(6000):
        (mb,) = storage.minibatches(1)
        counts[tuple(mb.x.tolist())] = counts.get(tuple(mb.x.tolist()), 0) + 1
    assert len(counts) == 6
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 20.5  # 99.9 % of chi-square, 5 degrees of freedom


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 7), st.integers(1, 8))
def test_sequences_keep_time_and_split_environments(num_steps, num_envs, parts):
    storage = filled(num_steps, num_envs)
    if parts > num_envs:
        with pytest.raises(ValueError, match="cannot be split"):
            next(storage.sequences(parts))
        return
    envs = []
    for mb in storage.sequences(parts, extra=storage.ids + 7):
        assert mb.obs.shape[0] == num_steps
        mine = mb.ids[0].tolist()
        envs += mine
        assert torch.equal(mb.ids, torch.tensor(mine) + 1000 * torch.arange(num_steps).unsqueeze(1))
        assert torch.equal(mb.extra, mb.ids + 7)
    assert sorted(envs) == list(range(num_envs))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_shorter_sequences_are_each_steps_in_a_row_of_one_environment(length, pieces, num_envs, parts):
    storage = filled(length * pieces, num_envs)
    with pytest.raises(ValueError, match="cannot be split"):
        next(storage.sequences(1, length * pieces + 1))
    if parts > pieces * num_envs:
        with pytest.raises(ValueError, match="cannot be split"):
            next(storage.sequences(parts, length))
        return
    begins = []
    for mb in storage.sequences(parts, length, extra=storage.ids + 7):
        assert mb.obs.shape[0] == length
        assert torch.equal(mb.ids, mb.ids[0] + 1000 * torch.arange(length).unsqueeze(1))
        assert torch.equal(mb.extra, mb.ids + 7)
        begins += mb.ids[0].tolist()
        for i, key in enumerate(mb.ids[-1].tolist()):
            assert torch.equal(mb.image[-1, i], step_of(key // 1000, num_envs)["image"][key % 1000])
    assert sorted(begins) == sorted(1000 * length * k + env for k in range(pieces) for env in range(num_envs))


def test_a_rollout_that_is_not_full_is_not_handed_over():
    storage = RolloutStorage(3, 1)
    storage.add(x=torch.zeros(1))
    for read in (lambda: storage.x, lambda: next(storage.minibatches(1)), lambda: next(storage.sequences(1))):
        with pytest.raises(ValueError, match="1 of its 3 steps"):
            read()
    with pytest.raises(AttributeError, match=r"holds \['x'\], not 'y'"):
        _ = storage.y


def test_a_full_rollout_takes_no_more():
    storage = filled(2, 1)
    with pytest.raises(ValueError, match="clear"):
        storage.add(**step_of(2, 1))


@pytest.mark.parametrize(
    "wrong",
    [{"x": torch.zeros(2, 1)}, {"x": torch.zeros(2, dtype=torch.float64)}, {"x": torch.zeros(2), "y": torch.zeros(2)}],
)
def test_a_step_unlike_the_first_is_refused(wrong):
    storage = RolloutStorage(4, 2)
    storage.add(x=torch.zeros(2))
    with pytest.raises(ValueError):
        storage.add(**wrong)
    assert len(storage) == 1


@pytest.mark.parametrize("name", ["add", "device", "pos", "minibatches"])
def test_names_of_the_storage_itself_are_refused(name):
    with pytest.raises(ValueError, match="uses that name"):
        RolloutStorage(2, 1).add(**{name: torch.zeros(1)})


def test_add_copies_and_keeps_no_graph():
    storage = RolloutStorage(1, 1)
    x = torch.ones(1, requires_grad=True)
    y = x * 1
    storage.add(y=y)
    with torch.no_grad():
        y.fill_(5)
    assert storage.y.tolist() == [[1.0]]
    assert not storage.y.requires_grad
