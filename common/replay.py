"""Experience replay: the last `capacity` transitions of any number of environments."""

import math
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from common.args import fail


class ReplayBuffer:
    """A ring of transitions, allocated by the first `add` from the tensors' own shapes and dtypes.

    A fork that needs one more field adds one keyword to `add` and reads it from the sampled batch.
    Uniform sampling with replacement, as in Mnih et al. (2015), Algorithm 1.

    Args:
        capacity: transitions kept, over all environments; rounded down to a multiple of `num_envs`.
        num_envs: length of the first dimension of every tensor added.
        device: where sampled batches are put. The ring itself lies in host memory.
    """

    def __init__(self, capacity: int, num_envs: int, device: torch.device | str = "cpu") -> None:
        if capacity < num_envs:
            raise ValueError(f"capacity {capacity} holds no step of {num_envs} environments")
        self.rows = capacity // num_envs
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.fields: dict[str, Tensor] = {}
        self.pos = 0
        self.full = False

    def __len__(self) -> int:
        """Transitions that can be sampled."""
        return (self.rows if self.full else self.pos) * self.num_envs

    def add(self, **step: Tensor) -> None:
        """Copies one step of all environments: each tensor is [num_envs, ...].

        Raises:
            ValueError: names, shapes or dtypes differ from the first step's.

        Ends the process with code 2 if the memory that is free does not hold the ring: the system would grant it
        all the same, and kill the process hours later.
        """
        if not self.fields:
            self._allocate(step)
        if step.keys() != self.fields.keys():
            raise ValueError(f"this replay holds {sorted(self.fields)}, not {sorted(step)}")
        for name, value in step.items():
            shape, dtype = self._like[name]
            if value.shape != shape or value.dtype != dtype:
                raise ValueError(f"{name} was {dtype} {list(shape)}, now {value.dtype} {list(value.shape)}")
        for name, value in step.items():
            self._rows[name][self.pos] = value.numpy(force=True)
        self.pos += 1
        if self.pos == self.rows:
            self.pos, self.full = 0, True

    def sample(self, batch_size: int) -> SimpleNamespace:
        """`batch_size` transitions on `device`, each field [batch_size, ...] under the name given to `add`.

        Draws from torch's global generator.

        Raises:
            ValueError: nothing has been added yet.
        """
        if len(self) == 0:
            raise ValueError("the replay is empty: add a step before sampling")
        indices = torch.randint(len(self), (batch_size,))
        return SimpleNamespace(
            **{name: flat.index_select(0, indices).to(self.device) for name, flat in self._flat.items()}
        )

    def _allocate(self, step: dict[str, Tensor]) -> None:
        for name, value in step.items():
            if value.ndim == 0 or value.shape[0] != self.num_envs:
                raise ValueError(f"{name} must be [num_envs={self.num_envs}, ...], not {list(value.shape)}")
        needed = self.rows * sum(value.nbytes for value in step.values())
        available = _available_memory()
        if needed > available:
            fail(
                f"a replay of {self.rows * self.num_envs:,} transitions needs {needed / 2**30:.1f} GiB of memory, and "
                f"{available / 2**30:.1f} GiB are free: lower --buffer-size"
            )
        for name, value in step.items():
            self.fields[name] = torch.zeros((self.rows, *value.shape), dtype=value.dtype)
        self._like = {name: (value.shape, value.dtype) for name, value in step.items()}
        # NumPy views of the same memory: writing a row through them costs a seventh of torch's indexing.
        self._rows = {name: storage.numpy() for name, storage in self.fields.items()}
        self._flat = {name: storage.flatten(0, 1) for name, storage in self.fields.items()}


def _available_memory() -> float:
    """Bytes that can be had without swapping; infinity where the system does not say."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return math.inf
