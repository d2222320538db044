"""The episodes that have ended since the last row."""

import collections
import itertools
from typing import Any

import numpy as np

from common.args import RANK, WORLD_SIZE
from common.internals.speed import processes

Episode = tuple[float, int, int, float]  # return, length, and the step and the seconds at its end


class Episodes:
    """Collects episodes from infos. `mean_over_processes` gives those of all processes to the first one."""

    def __init__(self) -> None:
        self.ended: list[Episode] = []
        self.recent: collections.deque[float] = collections.deque(maxlen=100)  # returns

    def add(self, infos: dict[str, Any], step: int, seconds: float) -> list[Episode]:
        """Adds the episodes that ended in a step. Returns those to be logged now: under torchrun none yet."""
        if "episode" not in infos:
            return []
        ended = np.flatnonzero(infos["_episode"])
        new = [(float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i]), step, seconds) for i in ended]
        self.ended += new
        return new if WORLD_SIZE == 1 else []

    def mean_over_processes(self, values: dict[str, float]) -> tuple[dict[str, float], list[Episode]]:
        """The means of `values` over all processes, and under torchrun the gathered episodes, to be logged now."""
        if WORLD_SIZE == 1:
            return values, []
        everyone = processes.all_gather_object((values, self.ended))
        self.ended = []
        if RANK == 0:
            self.ended = sorted(itertools.chain(*(theirs for _, theirs in everyone)), key=lambda episode: episode[2])
        # A metric that one process could not measure is left out.
        shared = [key for key in values if all(key in theirs for theirs, _ in everyone)]
        means = {key: sum(theirs[key] for theirs, _ in everyone) / WORLD_SIZE for key in shared}
        return means, self.ended

    def take_means(self) -> dict[str, float]:
        """Mean return and length of the episodes since the last call."""
        if not self.ended:
            return {}
        returns, lengths, _, _ = zip(*self.ended, strict=True)
        self.ended = []
        return {
            "charts/episodic_return": sum(returns) / len(returns),
            "charts/episodic_length": sum(lengths) / len(lengths),
        }
