"""Action masks: `infos["action_mask"]`, as gymnasium's own environments report which actions are allowed."""

from typing import Any

import numpy as np
from gymnasium.spaces import Discrete, MultiDiscrete, Space

from common.internals.vector.spaces import as_array


class MaskReader:
    """Reads action masks in the forms that gymnasium's spaces take: [n] for Discrete(n); for MultiDiscrete a tuple with
    an array for each part, or all of them in one flat array. Masks for Box actions are not read.
    """

    def __init__(self, space: Space) -> None:
        self.size, self.places = 0, None
        if isinstance(space, Discrete):
            self.size = int(space.n)
        elif isinstance(space, MultiDiscrete):
            counts = np.ravel(space.nvec)
            self.size, self.places = int(counts.sum()), np.arange(counts.max()) < counts[:, None]

    def read(self, infos: dict[str, Any], num_envs: int) -> np.ndarray | None:
        """The masks in infos, bool: [num_envs, n] for Discrete, [num_envs, parts, largest n] for MultiDiscrete, false
        beyond the n of a part. True where an environment reports none; None if no environment does.

        Raises:
            ValueError: a mask has another size, or holds something else than 0 and 1.
        """
        masks = infos.get("action_mask")
        if masks is None or not self.size:
            return None
        given = infos["_action_mask"]
        alike = masks.shape == (num_envs, self.size)
        if alike and ((masks == 0) | (masks == 1)).all():  # 5 µs for 8 of Taxi-v4, not 228
            allowed = (masks != 0) | ~given[:, None]
        else:
            allowed = np.ones((num_envs, self.size), np.bool_)
            for i in np.flatnonzero(given):
                allowed[i] = self._one(masks[i], f"environment {i}: its action_mask")
        if self.places is None:
            return allowed
        padded = np.zeros((num_envs, *self.places.shape), np.bool_)
        padded[:, self.places] = allowed
        return padded

    def _one(self, mask: Any, what: str) -> np.ndarray:
        parts = mask if isinstance(mask, tuple | list) else [mask]
        flat = np.concatenate([np.ravel(as_array(part, what)) for part in parts])
        if flat.size != self.size or not np.isin(flat, (0, 1)).all():
            raise ValueError(f"{what} must hold 0 or 1 for each of {self.size} choices, not {mask!r:.60}")
        return flat != 0
