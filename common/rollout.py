"""Rollout storage for on-policy algorithms."""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from common.internals.storage import fields


class RolloutStorage:
    """`num_steps` steps of `num_envs` environments, allocated by the first `add` from the tensors' shapes and dtypes.

    Each keyword of `add` becomes an attribute, [num_steps, num_envs, ...] on `device`: `rollout.rewards`.
    Tensors in host memory are copied to a GPU asynchronously.

        for _ in range(args.num_steps):
            ...
            rollout.add(obs=obs, actions=actions, rewards=rewards)
        for mb in rollout.minibatches(args.num_minibatches, advantages=advantages):
            update(mb)
        rollout.clear()
    """

    def __init__(self, num_steps: int, num_envs: int, device: torch.device | str = "cpu") -> None:
        if num_steps < 1 or num_envs < 1:
            raise ValueError(f"a rollout needs at least one step of one environment, not {num_steps} x {num_envs}")
        self.num_steps = num_steps
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.fields: dict[str, Tensor] = {}
        self.pos = 0

    def __len__(self) -> int:
        """Steps added since the last `clear`."""
        return self.pos

    def __getattr__(self, name: str) -> Tensor:
        held = self.__dict__.get("fields", {})
        if name not in held:
            raise AttributeError(f"this rollout holds {sorted(held)}, not {name!r}")
        self._assert_full()
        return held[name]

    def add(self, **given: Tensor | None) -> None:
        """Copies one step of all environments: each tensor is [num_envs, ...]. Fields that are None are left out.

        Raises:
            ValueError: the rollout is full, or names, shapes or dtypes differ from the first step's.
        """
        if self.pos == self.num_steps:
            raise ValueError(f"the rollout is full after {self.num_steps} steps: clear() it first")
        step = {name: value for name, value in given.items() if value is not None}
        if not self.fields:
            self._allocate(step)
        fields.check(step, self._like, "rollout")
        for name, value in step.items():
            if self._rows is not None:
                self._rows[name][self.pos] = value.detach().numpy(force=True)
            else:
                self.fields[name][self.pos].copy_(value.detach(), non_blocking=True)
        self.pos += 1

    def clear(self) -> None:
        """Starts the next rollout, in the same memory."""
        self.pos = 0

    def minibatches(self, num_minibatches: int, **extra: Tensor) -> Iterator[SimpleNamespace]:
        """One epoch: every sample once, shuffled, in `num_minibatches` batches whose sizes differ by at most one.

        A batch has the fields and the `extra` tensors [num_steps, num_envs, ...], advantages for example, as
        [batch, ...]. ValueError if a batch would have fewer than two samples, and so no standard deviation.
        """
        self._assert_full()
        size = self.num_steps * self.num_envs
        if num_minibatches < 1 or size < 2 * num_minibatches:
            what = f"{num_minibatches} minibatches of {size} samples"
            raise ValueError(f"{what}: each needs at least 2 samples, as one has no standard deviation")
        flat = {name: value.flatten(0, 1) for name, value in {**self.fields, **extra}.items()}
        for indices in torch.randperm(size, device=self.device).tensor_split(num_minibatches):
            yield SimpleNamespace(**{name: value.index_select(0, indices) for name, value in flat.items()})

    def sequences(self, num_minibatches: int, length: int = 0, **extra: Tensor) -> Iterator[SimpleNamespace]:
        """As `minibatches`, for recurrent policies: batches of whole sequences, [length, batch, ...].

        A sequence is `length` steps of one environment, 0: all its steps. ValueError if `length` does not divide the
        number of steps, or if there are fewer sequences than minibatches.
        """
        self._assert_full()
        length = length or self.num_steps
        count = self.num_envs * self.num_steps // length
        if self.num_steps % length or not 1 <= num_minibatches <= count:
            what = f"{self.num_steps} steps of {self.num_envs} environments cannot be split into"
            raise ValueError(f"{what} sequences of {length} steps in {num_minibatches} minibatches")
        named = {**self.fields, **extra}.items()
        views = {name: value.unflatten(0, (-1, length)).transpose(0, 1) for name, value in named}
        for indices in torch.randperm(count, device=self.device).tensor_split(num_minibatches):
            piece, env = indices // self.num_envs, indices % self.num_envs
            yield SimpleNamespace(**{name: view[:, piece, env] for name, view in views.items()})

    def _assert_full(self) -> None:
        if self.pos != self.num_steps:
            raise ValueError(f"the rollout has {self.pos} of its {self.num_steps} steps: call add() for each first")

    def _allocate(self, step: dict[str, Tensor]) -> None:
        self._like = fields.check_first(step, self.num_envs)
        for name in step:
            if hasattr(type(self), name) or name in self.__dict__:
                raise ValueError(f"a field cannot be called {name}: the storage itself uses that name")
        for name, value in step.items():
            self.fields[name] = torch.zeros((self.num_steps, *value.shape), dtype=value.dtype, device=self.device)
        # In host memory a NumPy view is written: seven times faster than torch's indexing.
        on_host = self.device.type == "cpu"
        self._rows = {name: storage.numpy() for name, storage in self.fields.items()} if on_host else None
