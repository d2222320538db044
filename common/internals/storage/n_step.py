"""Returns of n steps (Sutton, 1988), computed from single transitions in a ring."""

import numpy as np


def n_step_returns(
    fields: dict[str, np.ndarray], indices: np.ndarray, newest: int, num_envs: int, discounts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns and gamma^m, [B] each, and the indices [B] of the last step of each return.

    Args:
        fields: rewards, terminations and truncations [rows * num_envs], flat, a row for each step of all environments.
        indices: [B], the first step of each return.
        newest: the row of the newest step.
        discounts: gamma^0 to gamma^n.
    """
    rewards, n_step = fields["rewards"], len(discounts) - 1
    if n_step == 1:
        return rewards.take(indices), np.full(len(indices), discounts[1], rewards.dtype), indices
    steps = (indices[:, None] + num_envs * np.arange(n_step)) % len(rewards)
    ended = fields["terminations"].take(steps) | fields["truncations"].take(steps)
    ended |= steps // num_envs == newest  # in the ring, the newest step is followed by the oldest
    ended[:, -1] = True
    last = ended.argmax(1)  # position of the last step, 0 to n_step - 1
    included = np.arange(n_step) <= last[:, None]
    returns = (rewards.take(steps) * discounts[:-1]).sum(1, where=included)
    return returns.astype(rewards.dtype), discounts[last + 1].astype(rewards.dtype), steps[np.arange(len(last)), last]
