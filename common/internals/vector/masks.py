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
        self.counts: list[int] = []
        if isinstance(space, Discrete):
            self.counts = [int(space.n)]
        elif isinstance(space, MultiDiscrete):
            self.counts = np.ravel(space.nvec).tolist()
        self.squeeze = isinstance(space, Discrete)

    def read(self, infos: dict[str, Any], num_envs: int) -> np.ndarray | None:
        """The masks in infos, bool: [num_envs, n] for Discrete, [num_envs, parts, largest n] for MultiDiscrete, false
        beyond the n of a part. True where an environment reports none; None if no environment does.

        Raises:
            ValueError: a mask has another size, or holds something else than 0 and 1.
        """
        masks = infos.get("action_mask")
        if masks is None or not self.counts:
            return None
        columns = np.arange(max(self.counts)) < np.array(self.counts)[:, None]
        read = np.repeat(columns[None], num_envs, 0)
        for i in np.flatnonzero(infos["_action_mask"]):
            parts = masks[i] if isinstance(masks[i], tuple | list) else [masks[i]]
            what = f"environment {i}: its action_mask"
            flat = np.concatenate([np.ravel(as_array(part, what)) for part in parts])
            if flat.size != sum(self.counts) or not np.isin(flat, (0, 1)).all():
                raise ValueError(
                    f"{what} must hold 0 or 1 for each of {sum(self.counts)} choices, not {masks[i]!r:.60}"
                )
            read[i, columns] = flat != 0
        return read[:, 0] if self.squeeze else read
