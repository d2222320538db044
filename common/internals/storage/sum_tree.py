"""Prioritized experience replay, proportional. Schaul et al., 2016: https://arxiv.org/abs/1511.05952"""

from typing import Any

import numpy as np
import torch

# Measured at 100,000 leaves and 256 draws: 32 children cost less than 8, 16 or 64, and one running sum over a top of
# 4,096 nodes less than one more level.
CHILDREN = 32
TOP = 4096

BELOW_ONE = 1 - 2.0**-52  # a positive float64 times this is strictly smaller

EPSILON = 1e-6  # added to |TD error|, so that a transition learnt by heart is still drawn (the paper's section 3.3)


class Priorities:
    """The priorities p = |TD error| + EPSILON of `size` transitions, drawn with P(i) = p_i^alpha / sum_j p_j^alpha.

    State: `tree`, whose leaves are p^alpha, 0 for places not filled yet, and `highest`, the largest p seen.
    """

    def __init__(self, size: int, alpha: float) -> None:
        self.alpha = alpha
        self.tree = SumTree(size)
        self.highest = 1.0

    def add(self, indices: np.ndarray) -> None:
        """New transitions have the highest priority seen so far, so that each is likely to be drawn soon."""
        self.tree.update(indices, self.highest**self.alpha)

    def update(self, indices: np.ndarray, td_errors: np.ndarray) -> None:
        """Sets the priorities of transitions [B] from their TD errors [B].

        Changes nothing if one is not finite: nor is the loss then, which is what stops a run.
        """
        priorities = np.abs(td_errors.astype(np.float64)) + EPSILON
        highest = float(priorities.max())
        if not highest < np.inf:
            return
        self.highest = max(self.highest, highest)
        self.tree.update(indices, priorities**self.alpha)

    def draw(self, batch_size: int, beta: float) -> tuple[np.ndarray, np.ndarray]:
        """Indices [batch_size], one from each of batch_size equal parts of the sum, and their weights, float32.

        The weights are (N P(i))^-beta over the largest of the batch; N and the sum cancel out.
        """
        shares = (np.arange(batch_size) + torch.rand(batch_size, dtype=torch.float64).numpy()) / batch_size
        indices = self.tree.find(shares)
        drawn = self.tree.levels[0].take(indices)
        return indices, ((drawn / drawn.min()) ** -beta).astype(np.float32)

    def state_dict(self) -> dict[str, Any]:
        return {"leaves": self.tree.levels[0], "highest": self.highest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tree.fill(state["leaves"])
        self.highest = state["highest"]


class SumTree:
    """`size` leaves of weight 0 or more, at first 0, under nodes that hold the sum of their children (appendix B.2.1).

    A node is always summed anew from its children, never changed by a difference, so that rounding does not add up.

    State: `levels`, float64 arrays from the leaves [at least `size`] up to the top nodes.
    """

    def __init__(self, size: int) -> None:
        self.levels = [np.zeros(length) for length in _lengths(size)]
        self._families = [level.reshape(-1, CHILDREN) for level in self.levels]  # views

    @staticmethod
    def nbytes(size: int) -> int:
        """Bytes needed."""
        return sum(8 * length for length in _lengths(size))

    def update(self, leaves: np.ndarray, weights: np.ndarray | float) -> None:
        """Sets the weights of leaves [B]; of a leaf named twice, the last one counts."""
        self.levels[0][leaves] = weights
        nodes = leaves
        for families, parents in zip(self._families, self.levels[1:], strict=False):
            nodes = nodes // CHILDREN
            parents[nodes] = families.take(nodes, 0).sum(1)

    def fill(self, weights: np.ndarray) -> None:
        """Sets the weights of all leaves."""
        self.levels[0][:] = weights
        for families, parents in zip(self._families, self.levels[1:], strict=False):
            parents[: len(families)] = families.sum(1)

    def find(self, shares: np.ndarray) -> np.ndarray:
        """The leaves [B] at `shares` [B] of the way, from 0 to 1, through the sum of all weights.

        A leaf of weight 0 is never found, not even at 0, at 1, or where rounding leads out of a node.
        """
        weights = self.levels[-1]
        ends = torch.from_numpy(weights).cumsum(0).numpy()  # a fourth of the time of NumPy's
        left = np.minimum(shares * ends[-1], ends[-1] * BELOW_ONE)
        nodes = flat = ends.searchsorted(left, side="right")
        for families in self._families[-2::-1]:
            left -= ends.take(flat) - weights.take(flat)  # what lies before the node
            weights = families.take(nodes, 0)
            ends = torch.from_numpy(weights).cumsum(1).numpy()
            left = np.maximum(np.minimum(left, ends[:, -1] * BELOW_ONE), 0.0)
            child = (ends <= left[:, None]).argmin(1)  # the first whose end lies beyond; one does, by the line above
            flat = child + np.arange(0, ends.size, CHILDREN)
            nodes = nodes * CHILDREN + child
        return nodes


def _lengths(size: int) -> list[int]:
    lengths = [-(-size // CHILDREN) * CHILDREN]  # rounded up: each node has all its children
    while lengths[-1] > TOP:
        lengths.append(-(-lengths[-1] // CHILDREN**2) * CHILDREN)
    return lengths
