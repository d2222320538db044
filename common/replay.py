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
from common.internals.storage.n_step import n_step_returns
from common.internals.storage.sum_tree import Priorities, SumTree

OF_LAST_STEP = ("next_obs", "next_mask", "terminations", "truncations")  # of an n-step return; others: its first step


class ReplayBuffer:
    """A ring of transitions in host memory. The first `add` allocates it, from the shapes and dtypes of the tensors.

    Each keyword of `add` becomes a field of the sampled batch. Sampling is uniform with replacement, as in Mnih et al.
    (2015), Algorithm 1, or prioritized. All options can be combined:

        replay = ReplayBuffer(1_000_000, num_envs, device, n_step=3, gamma=0.99, frame_stack=4, alpha=0.6)
        replay.add(obs=..., actions=..., rewards=..., next_obs=..., terminations=..., truncations=...)
        batch = replay.sample(256, beta=0.4)
        replay.update_priorities(batch.indices, td_errors)

    Args:
        capacity: transitions over all environments; rounded down to a multiple of `num_envs`.
        num_envs: first dimension of every tensor added.
        device: device of the sampled batches.
        n_step: rewards in a return (Sutton, 1988), or fewer: it stops at a termination, and stops and bootstraps at a
            truncation and at the newest step. Needs rewards (floating point), terminations and truncations (bool).
        gamma: discount factor. With it, batches have the field `discounts`.
        frame_stack: number k of frames in obs and next_obs, [num_envs, k, ...], newest last. Each frame is stored once,
            which takes an eighth of the memory for k = 4. 0 stores observations as they are.
        alpha: exponent of proportional prioritized replay (Schaul et al., 2016: https://arxiv.org/abs/1511.05952).
            None samples uniformly.
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
            raise ValueError(f"capacity {capacity} is less than one step of {num_envs} environments")
        if n_step < 1 or (n_step > 1 and gamma is None):
            raise ValueError(f"n_step must be at least 1, and needs gamma above 1: n_step is {n_step}, gamma {gamma}")
        if frame_stack < 0 or (alpha is not None and alpha < 0):
            raise ValueError(f"frame_stack and alpha must be at least 0, not {frame_stack} and {alpha}")
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

    def add(self, **given: Tensor | None) -> None:
        """Copies one step of all environments: each tensor is [num_envs, ...]. Fields that are None are left out.

        Raises:
            ValueError: names, shapes or dtypes differ from the first step's; a field that `n_step` or `frame_stack`
                needs is missing or has the wrong type; next_obs is not obs moved on by one frame.

        Ends the process with code 2 if there is not enough memory for the ring.
        """
        step = {name: value for name, value in given.items() if value is not None}
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
        """`batch_size` transitions on `device`, each field [batch_size, ...], drawn with torch's global generator.

        ValueError if the replay is empty.

        With `gamma`, where m is the number of rewards in each return:
            rewards: sum of gamma^i r_i for i < m.
            next_obs, terminations, truncations: of the m-th step. All other fields are of the first step.
            discounts: gamma^m. The target is rewards + discounts * value(next_obs) * ~terminations.

        With `alpha`, transition i is drawn with probability P(i) = p_i^alpha / sum_j p_j^alpha, one transition from
        each of batch_size equal parts of the sum, and the batch also has:
            weights: float32, (N P(i))^-beta, divided by the largest in the batch.
            indices: int64 in host memory, for `update_priorities`.

        Args:
            beta: exponent of the importance weights; 1 corrects the bias of prioritized sampling fully.
        """
        self._require_steps()
        if self.priorities is None:
            return self._batch(torch.randint(len(self), (batch_size,)).numpy(), {})
        indices, weights = self.priorities.draw(batch_size, beta)
        return self._batch(indices, {"weights": weights})

    def newest(self, batch_size: int) -> SimpleNamespace:
        """The newest transitions, up to `batch_size`, newest first, without weights; ValueError if it is empty."""
        self._require_steps()
        indices = self.steps * self.num_envs - 1 - np.arange(min(batch_size, len(self)))
        return self._batch(indices % (self.rows * self.num_envs), {})

    def spread(self, batch_size: int) -> SimpleNamespace:
        """`batch_size` transitions, evenly spaced and not random, without weights; ValueError if it is empty."""
        self._require_steps()
        return self._batch(np.arange(batch_size) * len(self) // batch_size, {})

    def _require_steps(self) -> None:
        if len(self) == 0:
            raise ValueError("the replay is empty: add a step first")

    def mean_age(self) -> float:
        """Mean age of a sampled transition, in environment steps since it was added; NaN if the replay is empty."""
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
            newest = (self.steps - 1) % self.rows
            returns = n_step_returns(self._flat, indices, newest, self.num_envs, self.discounts)
            batch["rewards"], batch["discounts"], last = returns
        for name, flat in self._flat.items():
            if name not in batch:
                batch[name] = flat.take(last if name in OF_LAST_STEP else indices, 0)
        if self.frames is not None:
            batch["obs"], batch["next_obs"] = self.frames.obs(indices), self.frames.next_obs(last)
        tensors = {name: torch.from_numpy(values).to(self.device) for name, values in batch.items()}
        if self.priorities is not None:
            tensors["indices"] = torch.from_numpy(indices)
        return SimpleNamespace(**tensors)

    def update_priorities(self, indices: Tensor, td_errors: Tensor) -> None:
        """Sets priorities to |TD error| + 1e-6; new transitions have the highest priority so far.

        Args:
            indices: [B], from a batch sampled since the last `add`.
            td_errors: [B], of either sign, on any device. If one is not finite, no priority changes.

        Raises:
            ValueError: the replay is uniform or empty, or an index is out of range.
        """
        if self.priorities is None:
            raise ValueError("there are priorities only with alpha, and after the first add")
        places = indices.numpy(force=True)
        if not 0 <= places.min() <= places.max() < len(self):
            raise ValueError(f"indices must be from 0 to {len(self) - 1}")
        self.priorities.update(places, td_errors.numpy(force=True))

    def new_episodes(self) -> None:
        """Ends the newest step's returns, as a truncation; a resumed run calls it when its environments restart."""
        if self.steps and "truncations" in self.fields:
            self.fields["truncations"][(self.steps - 1) % self.rows] = True

    def state_dict(self) -> dict[str, Any]:
        """Everything except `rings`."""
        return {
            "steps": self.steps,
            "like": {name: (list(shape), str(dtype)) for name, (shape, dtype) in self._like.items()},
            "frames": None if self.frames is None else self.frames.state_dict(),
            "priorities": None if self.priorities is None else self.priorities.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores everything except the rings, which the caller fills; ValueError if the arguments were others."""
        if state["like"]:
            step = {}
            for name, (shape, dtype) in state["like"].items():
                step[name] = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
            self._allocate(step)
        for name, part in (("frames", self.frames), ("priorities", self.priorities)):
            if (part is None) != (state[name] is None):
                raise ValueError(f"the saved replay has {'no ' * (state[name] is None)}{name}")
            if part is not None:
                part.load_state_dict(state[name])
        self.steps = state["steps"]

    def rings(self) -> tuple[dict[str, np.ndarray], int]:
        """The large arrays, and the number of steps ever added; step t is in row t % len(array)."""
        return {**self.fields, **({} if self.frames is None else self.frames.rings())}, self.steps

    def _allocate(self, step: dict[str, Tensor]) -> None:
        like = fields.check_first(step, self.num_envs)
        computed = ["discounts"] * (self.gamma is not None) + ["weights", "indices"] * (self.alpha is not None)
        if step.keys() & set(computed):
            raise ValueError(f"a field cannot be called {' or '.join(computed)}: batches have their own")
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
