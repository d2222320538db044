"""Experience replay: the last `capacity` transitions of any number of environments."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.internals.storage import fields
from common.internals.storage.frames import FrameStacks
from common.internals.storage.memory import require_memory
from common.internals.storage.sum_tree import Priorities, SumTree

AT_THE_END = ("next_obs", "terminations", "truncations")  # of a return; other fields are those of its first step


class ReplayBuffer:
    """A ring of transitions, allocated by the first `add` from the tensors' own shapes and dtypes.

    A fork that needs one more field adds one keyword to `add` and reads it from the sampled batch.
    Sampling is uniform and with replacement, as in Mnih et al. (2015), Algorithm 1, or prioritized. The keywords
    combine in any way:

        replay = ReplayBuffer(1_000_000, num_envs, device, n_step=3, gamma=0.99, frame_stack=4, alpha=0.6)
        replay.add(obs=..., actions=..., rewards=..., next_obs=..., terminations=..., truncations=...)
        batch = replay.sample(256, beta=0.4)
        replay.update_priorities(batch.indices, td_errors)

    Args:
        capacity: transitions kept, over all environments; rounded down to a multiple of `num_envs`.
        num_envs: length of the first dimension of every tensor added.
        device: where sampled batches are put. The ring itself lies in host memory.
        n_step: steps of the returns (Sutton, 1988), computed at sampling. A return stops at a termination; at a
            truncation, and at the newest step stored, it stops and bootstraps from the observation there. So each
            step is the start of a return, of m <= n_step rewards. Needs the fields rewards (floating point),
            terminations and truncations (bool), [num_envs] each.
        gamma: discount factor per step; given with n_step = 1 too, batches hold `discounts`.
        frame_stack: the number k of frames that obs and next_obs, [num_envs, k, ...] with the newest last, are stacks
            of: each frame is then stored once, an eighth of the memory for k = 4. 0 stores observations as they are,
            which is faster for small ones.
        alpha: prioritized replay (Schaul et al., 2016: https://arxiv.org/abs/1511.05952), the proportional variant
            with this exponent. None samples uniformly; 0 does so too, by priorities.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        device: torch.device | str = "cpu",
        *,
        n_step: int = 1,
        gamma: float | None = None,
        frame_stack: int = 0,
        alpha: float | None = None,
    ) -> None:
        if capacity < num_envs:
            raise ValueError(f"capacity {capacity} holds no step of {num_envs} environments")
        if n_step < 1 or (n_step > 1 and gamma is None):
            raise ValueError(f"n_step must be 1 or more, and above 1 it needs gamma: not {n_step}, gamma {gamma}")
        if frame_stack < 0 or (alpha is not None and alpha < 0):
            raise ValueError(f"frame_stack and alpha cannot be negative: {frame_stack}, {alpha}")
        self.rows = capacity // num_envs
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.n_step = n_step
        self.gamma = gamma
        self.discounts = (1.0 if gamma is None else gamma) ** np.arange(n_step + 1)
        self.frame_stack = frame_stack
        self.alpha = alpha
        self.fields: dict[str, np.ndarray] = {}
        self._like: fields.Like = {}
        self.frames: FrameStacks | None = None
        self.priorities: Priorities | None = None
        self.steps = 0

    def __len__(self) -> int:
        """Transitions that can be sampled."""
        return min(self.steps, self.rows) * self.num_envs

    def add(self, **step: Tensor) -> None:
        """Copies one step of all environments: each tensor is [num_envs, ...].

        Raises:
            ValueError: names, shapes or dtypes differ from the first step's; a field that `n_step` or `frame_stack`
                needs is missing or of the wrong kind; next_obs is not obs moved on by one frame.

        Ends the process with code 2 if the memory that is free does not hold the ring: the system would grant it
        all the same, and kill the process hours later.
        """
        if not self._like:
            self._allocate(step)
        fields.check(step, self._like, "replay")
        if self.frames is not None:
            self.frames.add(step["obs"].numpy(force=True), step["next_obs"].numpy(force=True))
        row = self.steps % self.rows
        for name, field in self.fields.items():
            field[row] = step[name].numpy(force=True)
        if self.priorities is not None:
            self.priorities.add(np.arange(row * self.num_envs, (row + 1) * self.num_envs))
        self.steps += 1

    def sample(self, batch_size: int, beta: float = 1.0) -> SimpleNamespace:
        """`batch_size` transitions on `device`, each field [batch_size, ...] under the name given to `add`.

        Draws from torch's global generator. Where `gamma` is given, with m the number of steps of each return:
            rewards: sum of gamma^i r_i over i < m.
            next_obs, terminations, truncations: those of the m-th step. All other fields are those of the first.
            discounts: gamma^m, in the dtype of the rewards, so that the target is
                rewards + discounts * value(next_obs) * ~terminations.

        Where `alpha` is given, transition i is drawn with probability P(i) = p_i^alpha / sum_j p_j^alpha, one from
        each of batch_size equal parts of the sum (so a batch is in the order of the ring), and there are also:
            weights: float32, (N P(i))^-beta divided by the largest of the batch, so that they only scale down.
            indices: int64 in host memory, for `update_priorities`.

        Args:
            beta: how far the weights make up for the prioritized draws: 0 not at all, 1 fully.

        Raises:
            ValueError: nothing has been added yet.
        """
        if len(self) == 0:
            raise ValueError("the replay is empty: add a step before sampling")
        if self.priorities is None:
            return self._batch(torch.randint(len(self), (batch_size,)).numpy(), {})
        indices, weights = self.priorities.draw(batch_size, beta)
        return self._batch(indices, {"weights": weights})

    def newest(self, batch_size: int) -> SimpleNamespace:
        """The transitions added last, up to `batch_size`, newest first; without weights. Draws nothing.

        Raises:
            ValueError: nothing has been added yet.
        """
        if len(self) == 0:
            raise ValueError("the replay is empty: add a step first")
        places = self.steps * self.num_envs - 1 - np.arange(min(batch_size, len(self)))
        return self._batch(places % (self.rows * self.num_envs), {})

    def spread(self, batch_size: int) -> SimpleNamespace:
        """`batch_size` transitions at even distances over all that are held, the same ones at each call.

        Without weights. Draws nothing.

        Raises:
            ValueError: nothing has been added yet.
        """
        if len(self) == 0:
            raise ValueError("the replay is empty: add a step first")
        return self._batch(np.arange(batch_size) * len(self) // batch_size, {})

    def mean_age(self) -> float:
        """Environment steps since a transition was added, on average over those that `sample` would draw now."""
        rows = len(self) // self.num_envs
        if rows == 0:
            return math.nan
        ages = (self.steps - 1 - np.arange(rows)) % self.rows * self.num_envs
        if self.priorities is None:
            return float(ages.mean())
        weights = self.priorities.tree.levels[0][: len(self)].reshape(rows, self.num_envs).sum(1)
        return float(ages @ weights / weights.sum())

    def _batch(self, indices: np.ndarray, batch: dict[str, np.ndarray]) -> SimpleNamespace:
        last = indices
        if self.gamma is not None:
            batch["rewards"], batch["discounts"], last = self._returns(indices)
        for name, flat in self._flat.items():
            if name not in batch:
                batch[name] = flat.take(last if name in AT_THE_END else indices, 0)
        if self.frames is not None:
            batch["obs"], batch["next_obs"] = self.frames.obs(indices), self.frames.next_obs(last)
        tensors = {name: torch.from_numpy(values).to(self.device) for name, values in batch.items()}
        if self.priorities is not None:
            tensors["indices"] = torch.from_numpy(indices)
        return SimpleNamespace(**tensors)

    def update_priorities(self, indices: Tensor, td_errors: Tensor) -> None:
        """Gives transitions the priorities |TD error| + 1e-6; what is added gets the highest one seen so far.

        Args:
            indices: [B], of a batch sampled since the last `add`.
            td_errors: [B], of either sign, on any device. If one is not finite, nothing changes.

        Raises:
            ValueError: the replay is uniform or empty, or there is no transition at an index.
        """
        if self.priorities is None:
            raise ValueError("there are priorities only with alpha, and after the first add")
        places = indices.numpy(force=True)
        if not 0 <= places.min() <= places.max() < len(self):
            raise ValueError(f"indices must be from 0 to {len(self) - 1}")
        self.priorities.update(places, td_errors.numpy(force=True))

    def new_episodes(self) -> None:
        """No step to come continues the newest one: returns of n steps end there, as at a truncation."""
        if self.steps and "truncations" in self.fields:
            self.fields["truncations"][(self.steps - 1) % self.rows] = True

    def state_dict(self) -> dict[str, Any]:
        """All but the `rings`."""
        return {
            "steps": self.steps,
            "like": {name: (list(shape), str(dtype)) for name, (shape, dtype) in self._like.items()},
            "frames": None if self.frames is None else self.frames.state_dict(),
            "priorities": None if self.priorities is None else self.priorities.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Into a replay made with the same arguments; its rings are to be filled afterwards.

        Raises:
            ValueError: it was made with others.
        """
        like = {
            name: (shape, getattr(torch, dtype.removeprefix("torch.")))
            for name, (shape, dtype) in state["like"].items()
        }
        if like:
            self._allocate({name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in like.items()})
        for name, part in (("frames", self.frames), ("priorities", self.priorities)):
            if (part is None) != (state[name] is None):
                raise ValueError(f"the other replay had {'no ' * (state[name] is None)}{name}")
            if part is not None:
                part.load_state_dict(state[name])
        self.steps = state["steps"]

    def rings(self) -> tuple[dict[str, np.ndarray], int]:
        """The large arrays, and the number of steps ever added: step t is in row t % len of each."""
        rings = dict(self.fields)
        if self.frames is not None:
            rings |= self.frames.rings()
        return rings, self.steps

    def _returns(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns and gamma^m, [B] each, and the indices [B] of the steps they end with."""
        rewards = self._flat["rewards"]
        if self.n_step == 1:
            return rewards.take(indices), np.full(len(indices), self.gamma, rewards.dtype), indices
        steps = (indices[:, None] + self.num_envs * np.arange(self.n_step)) % len(rewards)
        newest = (self.steps - 1) % self.rows
        ended = self._flat["terminations"].take(steps) | self._flat["truncations"].take(steps)
        ended |= steps // self.num_envs == newest  # what lies behind the newest step is the oldest one
        ended[:, -1] = True
        more = ended.argmax(1)  # steps after the first
        within = np.arange(self.n_step) <= more[:, None]
        returns = (rewards.take(steps) * self.discounts[:-1]).sum(1, where=within)
        last = (indices + more * self.num_envs) % len(rewards)
        return returns.astype(rewards.dtype), self.discounts[more + 1].astype(rewards.dtype), last

    def _allocate(self, step: dict[str, Tensor]) -> None:
        like = fields.check_first(step, self.num_envs)
        computed = ["discounts"] * (self.gamma is not None) + ["weights", "indices"] * (self.alpha is not None)
        if step.keys() & set(computed):
            raise ValueError(f"no field can be called {' or '.join(computed)}: the batch has its own")
        if self.gamma is not None:
            fields.check_returns(step, self.n_step)
        arrays = {name: value.numpy(force=True) for name, value in step.items()}
        stacks = fields.check_stacks(arrays, self.frame_stack) if self.frame_stack else None
        plain = {name: value for name, value in arrays.items() if stacks is None or name not in ("obs", "next_obs")}
        size = self.rows * self.num_envs
        require_memory(
            self.rows * sum(value.nbytes for value in plain.values())
            + (0 if stacks is None else FrameStacks.nbytes(self.rows, stacks))
            + (0 if self.alpha is None else SumTree.nbytes(size)),
            f"a replay of {size:,} transitions",
        )
        if stacks is not None:
            self.frames = FrameStacks(self.rows, stacks)
        if self.alpha is not None:
            self.priorities = Priorities(size, self.alpha)
        self.fields = {name: np.zeros((self.rows, *value.shape), value.dtype) for name, value in plain.items()}
        self._flat = {name: field.reshape(size, *field.shape[2:]) for name, field in self.fields.items()}
        self._like = like
