"""Replay as data for any PyTorch trainer."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from common.replay import ReplayBuffer


class ReplayDataset(IterableDataset):
    """Endless batches of a live replay, each drawn at the moment it is asked for.

        loader = DataLoader(ReplayDataset(replay, batch_size=64), batch_size=None)

    `batch_size=None` tells the loader that what it gets are whole batches: nothing is collated sample by sample.

    Args:
        how: further arguments of `replay.sample`.
    """

    def __init__(self, replay: ReplayBuffer, batch_size: int, **how: Any) -> None:
        self.replay = replay
        self.batch_size = batch_size
        self.how = how

    def __iter__(self) -> Iterator[SimpleNamespace]:
        """Batches as `replay.sample` makes them.

        Raises:
            RuntimeError: in a worker process, which would draw from its own copy of the replay, as old as the worker.
        """
        if get_worker_info() is not None:
            raise RuntimeError("a replay that is being filled can only be read where it is filled: use num_workers=0")
        while True:
            yield self.replay.sample(self.batch_size, **self.how)
