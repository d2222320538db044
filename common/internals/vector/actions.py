"""Box actions: the units that a network learns them in, and the form that an environment takes."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor


def action_units(space: gym.Space) -> tuple[np.ndarray, Tensor, Tensor]:
    """Of a Box action: which dimensions have two bounds no further apart than float32 holds, bool, and the scale and
    bias, float32, that stretch [-1, 1] to them; 1 and 0 for the others. Scalars for other spaces."""
    if not isinstance(space, Box):
        return np.zeros((), bool), torch.ones(()), torch.zeros(())
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        bounded = space.bounded_below & space.bounded_above & (high - low < np.finfo(np.float32).max)
        scale, bias = np.where(bounded, (high - low) / 2, 1.0), np.where(bounded, (high + low) / 2, 0.0)
    return bounded, torch.tensor(scale, dtype=torch.float32), torch.tensor(bias, dtype=torch.float32)


def in_bounds(acts: np.ndarray, space: Any) -> np.ndarray:
    """Finite `acts` clipped to the bounds of a Box, and rounded where it has integers; in its dtype."""
    if np.issubdtype(space.dtype, np.floating):
        return np.clip(acts, space.low, space.high).astype(space.dtype, copy=False)
    # As Python's numbers, which compare exactly: as a float the highest int64 would be beyond the highest int64.
    rounded = np.rint(acts) if acts.dtype.kind == "f" else acts
    return np.clip(rounded.astype(object), space.low.astype(object), space.high.astype(object)).astype(space.dtype)
