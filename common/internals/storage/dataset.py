"""Replay as data for any PyTorch trainer."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info


class WorkersNotSupportedError(RuntimeError):
    """A loader with worker processes was asked for a live replay."""

    def __init__(self, *_: object) -> None:  # a DataLoader would put the worker's traceback into the message
        super().__init__("a replay that is being filled can be read only where it is filled: use num_workers=0")


class ReplayDataset(IterableDataset):
    """Batches of a live replay, each drawn at the moment it is asked for.

        data = ReplayDataset(replay, batch_size=64)
        for batch in DataLoader(data, batch_size=None):
            ...

    `batch_size=None` tells the loader that what it gets are whole batches: nothing is collated or copied again.
    `beta` may be assigned at any time. A trainer that asks for batches ahead of time gets them without what is added
    in between, and must not update priorities with them; Lightning does not, if it is told `num_batches`.

    Args:
        replay: a ReplayBuffer.
        num_batches: batches in an epoch, the dataset's length; None is endless.
        beta: how far the weights of prioritized replay make up for its draws.
    """

    def __init__(self, replay: Any, batch_size: int, num_batches: int | None = None, beta: float = 1.0) -> None:
        self.replay = replay
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.beta = beta

    def __len__(self) -> int:
        """Batches in an epoch; TypeError if there is no end to them."""
        if self.num_batches is None:
            raise TypeError("a replay without num_batches has no end")
        return self.num_batches

    def __iter__(self) -> Iterator[SimpleNamespace]:
        """Batches as `replay.sample` makes them; WorkersNotSupportedError in a worker process, whose copy is old."""
        if get_worker_info() is not None:
            raise WorkersNotSupportedError
        drawn = 0
        while self.num_batches is None or drawn < self.num_batches:
            yield self.replay.sample(self.batch_size, self.beta)
            drawn += 1
