"""The ring against an unbounded list, byte for byte, in every combination of what it can do (P5-P9, P15)."""

import collections
import copy
import importlib.util
import itertools

import numpy as np
import pytest
import torch
from conftest import envs_of
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from common import ReplayBuffer
from common.internals.storage.sum_tree import EPSILON, SumTree


def step_of(t, num_envs):
    return {
        "obs": torch.arange(num_envs * 3, dtype=torch.float32).reshape(num_envs, 3) + 100 * t,
        "image": (torch.arange(num_envs * 4).reshape(num_envs, 2, 2) + t).to(torch.uint8),
        "actions": torch.arange(num_envs) + 1000 * t,
        "terminations": torch.arange(num_envs) % 2 == t % 2,
    }


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 60))
def test_replay_holds_the_last_transitions_and_nothing_else(capacity, num_envs, steps):
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


class Story:
    """Random environments, and all that they ever handed out; `stack` 0 makes flat observations.

    Of four steps about one ends something: by a termination, a truncation or both, each with a reset, or by a
    termination without one (a lost life). A reset fills the older frames of a stack with black, with the first
    frame, or with frames of their own.
    """

    def __init__(self, rng, num_envs, stack, dtype=np.uint8):
        self.rng, self.num_envs, self.stack, self.dtype = rng, num_envs, stack, dtype
        self.steps = []
        self.obs = np.stack([self.reset() for _ in range(num_envs)])

    def frame(self):
        pixels = self.rng.integers(1, 200, (2, 3))
        return pixels.astype(self.dtype) if self.dtype == np.uint8 else (pixels + self.rng.random()).astype(self.dtype)

    def reset(self):
        if not self.stack:
            return self.frame()
        first, kind = self.frame(), self.rng.integers(3)
        older = [[np.zeros_like(first), first, self.frame()][kind] for _ in range(self.stack - 1)]
        return np.stack([*older, first])

    def step(self):
        n, t = self.num_envs, len(self.steps)
        kind = self.rng.choice(5, n, p=[0.7, 0.1, 0.1, 0.04, 0.06])  # on, termination, truncation, both, lost life
        next_obs = np.stack(
            [np.concatenate([o[1:], self.frame()[None]]) if self.stack else self.frame() for o in self.obs]
        )
        step = {
            "obs": self.obs.copy(),
            "actions": np.arange(n) + t * n,
            "rewards": self.rng.integers(-8, 9, n).astype(np.float32),
            "next_obs": next_obs,
            "terminations": np.isin(kind, (1, 3, 4)),
            "truncations": np.isin(kind, (2, 3)),
            "mine": self.rng.integers(2**62, size=(n, 2)),
        }
        self.steps.append(step)
        self.obs = next_obs.copy()
        for env in np.flatnonzero(np.isin(kind, (1, 2, 3))):
            self.obs[env] = self.reset()
        return {name: torch.from_numpy(value.copy()) for name, value in step.items()}

    def transition(self, number, n_step, gamma):
        """What the definition says of the transition that starts with action `number`: one step after another."""
        t, env = divmod(number, self.num_envs)
        out = {name: value[env] for name, value in self.steps[t].items()}
        rewards, discount = 0.0, 1.0
        for step in self.steps[t : t + n_step]:  # the list ends with the newest step
            rewards += discount * step["rewards"][env]
            discount *= gamma
            out |= {name: step[name][env] for name in ("next_obs", "terminations", "truncations")}
            if step["terminations"][env] or step["truncations"][env]:
                break
        return out | {"rewards": np.float32(rewards), "discounts": np.float32(discount)}


def assert_true(batch, story, n_step, gamma):
    """Every sampled transition is what the story says, in value, shape and dtype."""
    numbers = batch.actions.tolist()
    truth = {number: story.transition(number, n_step, gamma) for number in set(numbers)}
    for name in truth[numbers[0]]:
        expected = np.stack([truth[number][name] for number in numbers])
        drawn = getattr(batch, name).numpy()
        assert drawn.dtype == expected.dtype and drawn.shape == expected.shape, name
        assert drawn.tobytes() == expected.tobytes(), name


def restored(replay, other):
    """`other`, given what a checkpoint saves of `replay`."""
    other.load_state_dict(copy.deepcopy(replay.state_dict()))
    rings, steps = replay.rings()
    for (name, ring), (other_name, other_ring) in zip(rings.items(), other.rings()[0].items(), strict=True):
        assert name == other_name
        assert not np.shares_memory(ring, other_ring)
        rows = np.arange(max(0, steps - len(ring)), steps) % len(ring)
        other_ring[rows] = ring[rows]
    return other


def test_a_restored_replay_draws_the_same():
    story, replay, again = Story(np.random.default_rng(1), 3, 2), prioritized_replay(), prioritized_replay()
    for _ in range(100):
        replay.add(**story.step())
        torch.manual_seed(1)
        batch = replay.sample(8)
        replay.update_priorities(batch.indices, torch.arange(8.0))
    again = restored(replay, again)
    for one, other in zip(replay.priorities.tree.levels, again.priorities.tree.levels, strict=True):
        assert one.tobytes() == other.tobytes()
    step = story.step()
    for r in (replay, again):
        r.add(**step)
    torch.manual_seed(2)
    batch = replay.sample(500, 0.5)
    torch.manual_seed(2)
    for name, value in vars(again.sample(500, 0.5)).items():
        assert torch.equal(value, getattr(batch, name)), name


def prioritized_replay():
    return ReplayBuffer(30_000, 3, n_step=3, gamma=0.9, frame_stack=2, alpha=0.6)


def test_a_replay_made_with_other_arguments_is_refused():
    story, replay = Story(np.random.default_rng(1), 3, 2), prioritized_replay()
    replay.add(**story.step())
    state = replay.state_dict()
    for other, missing in (
        (ReplayBuffer(30_000, 3, n_step=3, gamma=0.9, frame_stack=2), "priorities"),
        (ReplayBuffer(30_000, 3, n_step=3, gamma=0.9, alpha=0.6), "frames"),
    ):
        with pytest.raises(ValueError, match=missing):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="num_envs=1"):
        ReplayBuffer(30_000, 1, n_step=3, gamma=0.9, frame_stack=2, alpha=0.6).load_state_dict(state)
    with pytest.raises(ValueError, match="shape"):
        ReplayBuffer(3_000, 3, n_step=3, gamma=0.9, frame_stack=2, alpha=0.6).load_state_dict(state)


@settings(max_examples=250, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_envs=st.integers(1, 4),
    rows=st.integers(1, 12),
    steps=st.integers(1, 40),
    stack=st.integers(0, 4),
    n_step=st.integers(1, 5),
    prioritized=st.booleans(),
    dtype=st.sampled_from([np.uint8, np.float32, np.float64]),
    saved_at=st.sets(st.integers(0, 39), max_size=3),
)
def test_every_combination_gives_what_an_unbounded_list_gives(
    seed, num_envs, rows, steps, stack, n_step, prioritized, dtype, saved_at
):
    story = Story(np.random.default_rng(seed), num_envs, stack, dtype)
    capacity = rows * num_envs + seed % num_envs  # does not always divide
    gamma = 0.5  # with whole rewards, exact in float32
    alpha, beta = (0.7, 0.3) if prioritized else (None, 1.0)

    def new():
        return ReplayBuffer(capacity, num_envs, n_step=n_step, gamma=gamma, frame_stack=stack, alpha=alpha)

    replay = new()
    torch.manual_seed(seed)
    priorities, highest = {}, 1.0
    for t in range(steps):
        step = story.step()
        replay.add(**step)
        for value in step.values():
            value.fill_(1)  # the caller may use its memory again
        priorities |= dict.fromkeys(range(t * num_envs, (t + 1) * num_envs), highest)
        alive = range(max(0, t + 1 - rows) * num_envs, (t + 1) * num_envs)
        assert len(replay) == len(alive)
        if t in saved_at:
            replay = restored(replay, new())
        if t % 3 and t != steps - 1:
            continue
        batch = replay.sample(30 * len(alive), beta)
        numbers = batch.actions.tolist()
        assert set(numbers) <= set(alive)
        assert_true(batch, story, n_step, gamma)
        if not prioritized:
            assert set(numbers) == set(alive)
            continue
        p = np.array([priorities[number] for number in numbers])
        assert np.allclose(batch.weights.numpy(), (p.min() / p) ** (alpha * beta), rtol=1e-5)
        assert batch.weights.dtype == torch.float32
        td_errors = story.rng.normal(size=5) * 3
        td_errors[0] = 0.0
        replay.update_priorities(batch.indices[:5], torch.from_numpy(td_errors))
        for number, td_error in zip(numbers[:5], td_errors, strict=True):
            priorities[number] = abs(td_error) + EPSILON
        highest = max(highest, abs(td_errors).max() + EPSILON)


@pytest.mark.parametrize("prioritized", [False, True])
def test_each_step_is_the_start_of_a_return(prioritized):
    replay = ReplayBuffer(30, 3, n_step=4, gamma=0.5, alpha=1.0 if prioritized else None)
    story = Story(np.random.default_rng(0), 3, 0)
    for t in range(25):
        replay.add(**story.step())
        drawn = set(replay.sample(900).actions.tolist())
        assert drawn == set(range(max(0, t - 9) * 3, 3 * t + 3))


def test_without_gamma_a_batch_holds_what_was_added_and_nothing_else():
    replay = ReplayBuffer(4, 1)
    replay.add(rewards=torch.ones(1), weights=torch.ones(1))
    assert set(vars(replay.sample(2))) == {"rewards", "weights"}


def test_stacks_of_frames_are_not_the_memory_of_the_ring():
    replay = ReplayBuffer(6, 1, frame_stack=2)
    story = Story(np.random.default_rng(0), 1, 2)
    for _ in range(6):
        replay.add(**story.step())
    before = replay.sample(100)
    copies = {name: value.clone() for name, value in vars(before).items()}
    before.obs.fill_(0)
    assert torch.equal(before.next_obs, copies["next_obs"])
    assert (replay.sample(100).obs != 0).any()


def test_frames_are_stored_once_and_those_set_aside_are_written_over():
    rows, n = 50, 4
    replay = ReplayBuffer(rows * n, n, frame_stack=4, n_step=3, gamma=0.9, alpha=0.5)
    obs = torch.zeros(n, 4, 84, 84, dtype=torch.uint8)

    def frames():
        return torch.randint(1, 255, (n, 1, 84, 84), dtype=torch.uint8)

    obs[:, -1:] = frames()
    for t in range(10 * rows):
        next_obs = torch.cat([obs[:, 1:], frames()], dim=1)
        over = torch.full((n,), t % 25 == 24)
        zeros = torch.zeros(n)
        replay.add(
            obs=obs, actions=zeros.long(), rewards=zeros, next_obs=next_obs, terminations=over, truncations=~over
        )
        obs = next_obs.clone()
        next_obs.fill_(7)  # the caller may use its memory again
        if over.any():
            obs = torch.cat([torch.zeros_like(obs[:, 1:]), frames()], dim=1)
    episodes_alive = n * (rows // 25 + 1)
    assert len(replay.frames.aside) <= 2 * (episodes_alive + 1)
    pixels = rows * n * 84 * 84
    assert replay.frames.ring.nbytes <= 1.1 * pixels  # (50 + 4) / 50
    others = [*replay.fields.values(), replay.frames.refs, *replay.priorities.tree.levels]
    assert sum(array.nbytes for array in others) <= 60 * rows * n + 8 * 32 * 2


def test_next_obs_that_does_not_continue_the_frame_stack_is_refused():
    replay = ReplayBuffer(4, 1, frame_stack=2)
    obs = torch.arange(8.0).reshape(1, 2, 4)
    with pytest.raises(ValueError, match="moved on"):
        replay.add(obs=obs, next_obs=obs)
    with pytest.raises(ValueError, match="frame_stack 2 needs"):
        ReplayBuffer(4, 1, frame_stack=2).add(obs=obs[:, :1], next_obs=obs[:, :1])
    with pytest.raises(ValueError, match="frame_stack 2 needs"):
        ReplayBuffer(4, 1, frame_stack=2).add(obs=obs)
    with pytest.raises(ValueError, match="one shape and dtype"):
        ReplayBuffer(4, 1, frame_stack=2).add(obs=obs, next_obs=obs.double())


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        ({"n_step": 2, "gamma": 0.9}, {"truncations": None}, "need truncations"),
        ({"n_step": 2, "gamma": 0.9}, {"terminations": torch.zeros(1)}, "must be bool"),
        ({"n_step": 2, "gamma": 0.9}, {"rewards": torch.zeros(1, 1)}, "need rewards"),
        ({"gamma": 0.9}, {"rewards": torch.zeros(1).long()}, "floating"),
        ({"gamma": 0.9}, {"discounts": torch.zeros(1)}, "discounts"),
        ({"alpha": 0.5}, {"weights": torch.zeros(1)}, "weights"),
        ({"alpha": 0.5}, {"indices": torch.zeros(1)}, "indices"),
    ],
)
def test_invalid_fields_are_refused(options, changed, message):
    step = {
        "rewards": torch.zeros(1),
        "terminations": torch.zeros(1, dtype=torch.bool),
        "truncations": torch.zeros(1, dtype=torch.bool),
    } | changed
    replay = ReplayBuffer(4, 1, **options)
    with pytest.raises(ValueError, match=message):
        replay.add(**{name: value for name, value in step.items() if value is not None})
    assert len(replay) == 0


def test_invalid_options_are_refused():
    for options in ({"n_step": 0, "gamma": 0.9}, {"n_step": 2}, {"alpha": -0.1}, {"frame_stack": -1}):
        with pytest.raises(ValueError):
            ReplayBuffer(4, 1, **options)
    uniform = ReplayBuffer(4, 1)
    uniform.add(x=torch.zeros(1))
    with pytest.raises(ValueError, match="alpha"):
        uniform.update_priorities(torch.tensor([0]), torch.tensor([1.0]))


@pytest.mark.parametrize("stack", [0, 3])
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_the_memory_announced_is_the_memory_taken(stack, alpha, monkeypatch, capsys):
    def make():
        replay = ReplayBuffer(3000, 2, frame_stack=stack, alpha=alpha)
        replay.add(**Story(np.random.default_rng(0), 2, stack).step())
        return replay

    replay = make()
    arrays = [*replay.fields.values()]
    if stack:
        arrays += [replay.frames.ring, replay.frames.refs, replay.frames.last]
    if alpha:
        arrays += replay.priorities.tree.levels
    needed = sum(array.nbytes for array in arrays)
    monkeypatch.setattr("common.internals.storage.memory.available_memory", lambda: needed)
    make()
    monkeypatch.setattr("common.internals.storage.memory.available_memory", lambda: needed - 1)
    with pytest.raises(SystemExit) as stop:
        make()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "3,000 transitions needs" in error and "are free" in error


def test_frames_set_aside_are_asked_for_too(monkeypatch, capsys):
    replay = ReplayBuffer(1000, 1, frame_stack=2)
    story = Story(np.random.default_rng(0), 1, 2)
    replay.add(**story.step())
    monkeypatch.setattr("common.internals.storage.memory.available_memory", lambda: 10)
    with pytest.raises(SystemExit):
        for _ in range(200):
            replay.add(**story.step())
    assert "sets aside" in capsys.readouterr().err


# Prioritized replay ---------------------------------------------------------------------------------------------------


def prioritized(size, alpha, td_errors):
    replay = ReplayBuffer(size, 1, alpha=alpha)
    for i in range(size):
        replay.add(x=torch.tensor([float(i)], dtype=torch.float64))
    replay.update_priorities(torch.arange(len(td_errors)), torch.as_tensor(td_errors))
    return replay


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_draws_follow_the_priorities_to_the_power_of_alpha_once(alpha):
    size = 50  # no power of two, and of 50 transitions the last 10 keep the priority they were added with
    td_errors = np.random.default_rng(0).exponential(size=40) * np.where(np.arange(40) % 2, 1, -1)
    replay = prioritized(size, alpha, td_errors)
    p = np.concatenate([abs(td_errors) + EPSILON, np.ones(10)]) ** alpha
    torch.manual_seed(0)
    draws, batch = 120_000, 4  # small batches: their parts of the sum are wide, the draws close to independent
    counts = sum(np.bincount(replay.sample(batch).x.long(), minlength=size) for _ in range(draws // batch))
    expected = draws * p / p.sum()
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 85.4  # 99.9 % quantile with 49 degrees of freedom


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_at_beta_1_the_weighted_mean_is_the_uniform_mean(alpha):
    rng = np.random.default_rng(1)
    size, n = 777, 100_000
    replay = prioritized(size, alpha, rng.exponential(size=size) + 0.05)
    torch.manual_seed(2)
    batch = replay.sample(n, beta=1.0)
    weights, x = batch.weights.double().numpy(), batch.x.numpy()
    mean = (weights * x).mean() / weights.mean()
    standard_error = (weights * (x - mean)).std() / weights.mean() / np.sqrt(n)
    assert abs(mean - (size - 1) / 2) < 3 * standard_error
    assert abs(x.mean() - (size - 1) / 2) > 3 * standard_error  # without the weights it is not
    assert weights.max() == 1.0
    assert (replay.sample(100, beta=0.0).weights == 1).all()


def test_new_transitions_have_the_highest_priority_seen():
    replay = ReplayBuffer(6, 2, alpha=0.5)
    replay.add(x=torch.zeros(2))
    replay.update_priorities(torch.tensor([0]), torch.tensor([-9.0]))
    replay.update_priorities(torch.tensor([0]), torch.tensor([0.25]))  # seen is seen
    replay.add(x=torch.zeros(2))
    leaves = replay.priorities.tree.levels[0][:6]
    assert leaves == pytest.approx([0.5, 1, 3, 3, 0, 0], abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_td_error_that_is_not_finite_changes_nothing(bad):
    replay = prioritized(4, 1.0, [1.0, 2.0, 3.0, 4.0])
    before = replay.priorities.tree.levels[0].copy(), replay.priorities.highest
    replay.update_priorities(torch.tensor([0, 1]), torch.tensor([5.0, bad]))
    assert np.array_equal(replay.priorities.tree.levels[0], before[0])
    assert replay.priorities.highest == before[1]


@pytest.mark.parametrize("index", [-1, 3])
def test_only_transitions_that_are_there_get_priorities(index):
    replay = ReplayBuffer(10, 1, alpha=1.0)
    for _ in range(3):
        replay.add(x=torch.zeros(1))
    with pytest.raises(ValueError, match="from 0 to 2"):
        replay.update_priorities(torch.tensor([0, index]), torch.tensor([5.0, 5.0]))


SIZES = [1, 2, 31, 32, 33, 1000, 4096, 4097, 5000, 131_073, 140_000]


@pytest.mark.parametrize("size", SIZES)
def test_the_tree_finds_what_one_running_sum_finds(size):
    rng = np.random.default_rng(size)
    weights = rng.integers(0, 4, size).astype(float)  # whole numbers: sums are exact, and a quarter are zero
    weights[rng.integers(size)] = 5
    tree = SumTree(size)
    for part in np.array_split(rng.permutation(size), 7):
        tree.update(part, weights[part])
    total = int(weights.sum())
    values = rng.integers(0, total, 2000)
    found = tree.find((values + 0.5) / total)
    assert np.array_equal(found, weights.cumsum().searchsorted(values + 0.5, side="right"))
    again = rng.integers(0, size, 300)
    weights[again] = 7.0
    tree.update(again, np.full(300, 7.0))
    for level, parents in itertools.pairwise(tree.levels):
        assert np.array_equal(parents[: len(level) // 32], level.reshape(-1, 32).sum(1))
    assert np.array_equal(tree.levels[0][:size], weights)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SIZES), st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(-12, 12))
def test_no_leaf_of_weight_zero_is_found_at_any_edge(size, seed, filled, scale):
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=size) * 10.0**scale
    weights[rng.random(size) > filled] = 0.0
    weights[rng.integers(size)] = 1.0
    tree = SumTree(size)
    tree.update(np.arange(size), weights)
    cuts = np.concatenate([[0.0], weights.cumsum() / weights.sum(), [1.0]]).clip(0, 1)  # where leaves meet
    shares = np.unique(np.concatenate([cuts, np.nextafter(cuts, 0), np.nextafter(cuts, 1)]))
    found = tree.find(shares)
    assert (found < size).all()
    assert (weights[found] > 0).all()
    positive = np.flatnonzero(weights)
    assert tree.find(np.array([0.0]))[0] == positive[0]
    assert tree.find(np.array([1.0]))[0] == positive[-1]


# A real stream --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("ale_py") is None, reason="needs ale-py")
@pytest.mark.parametrize("n_step", [1, 3])
def test_stacks_of_a_real_atari_stream(n_step):
    num_envs, rows, gamma = 2, 150, 0.5
    envs = envs_of("ALE/Breakout-v5", num_envs, terminal_on_life_loss=True)
    replay = ReplayBuffer(rows * num_envs, num_envs, n_step=n_step, gamma=gamma, frame_stack=4, alpha=0.5)
    story = Story(np.random.default_rng(0), num_envs, 4)
    torch.manual_seed(0)
    obs, _ = envs.reset(seed=1)
    ends = 0
    for t in range(600):
        moves = torch.randint(4, (num_envs,))
        next_obs, rewards, terminations, truncations, infos = envs.step(moves)
        step = {
            "obs": obs,
            "actions": torch.arange(num_envs) + t * num_envs,
            "rewards": rewards,
            "next_obs": common.final_obs(next_obs, infos),
            "terminations": terminations,
            "truncations": truncations,
        }
        story.steps.append({name: value.numpy().copy() for name, value in step.items()})
        replay.add(**step)
        ends += "final_obs" in infos
        obs = next_obs
        if t % 60 == 59:
            assert_true(replay.sample(600), story, n_step, gamma)
    envs.close()
    assert ends >= 3
    assert len(replay.frames.aside) <= 16  # one frame a game: the black ones that a game begins with cost nothing
