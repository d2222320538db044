"""Snapshots of vector environments, and the trial that tells whether they can be relied on."""

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from common.replayed import ReplayedAtari


def snapshots(vector: Any) -> list[Any]:
    """The state of each environment; a vector environment with SAME_STEP autoreset has none of its own."""
    return vector.snapshots() if hasattr(vector, "snapshots") else list(vector.call("snapshot"))


def restore_all(vector: Any, states: list[Any], obs: np.ndarray) -> None:
    """Puts the environments into the states that `snapshots` took when the last observations were `obs`.

    Raises ValueError if that is impossible.
    """
    if not hasattr(vector, "restore"):
        vector.set_attr("restored", states)
    elif not np.array_equal(vector.restore(states), obs):
        raise ValueError("what is restored leads elsewhere: is it another version?")


def first_difference(make: Callable[[], VectorEnv]) -> str:
    """How two environments differ after one was restored from the other, in a few words; empty if they do not.

    Both are new ones that `make` makes, and the global random generators are put back, so that training goes on as
    if this had not happened.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    vectors: list[VectorEnv] = []
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say, they have said when they were made
            vectors += [make(), make()]
            return _compare(*vectors)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for vector in vectors:
            vector.close()
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _compare(saved: Any, other: Any) -> str:
    actions = copy.deepcopy(saved.action_space)
    actions.seed(1)
    saved.reset(seed=[1])
    for _ in range(25):
        saved.step(actions.sample())
    saved.reset()  # the second episode: one that depends on the first is found out
    obs = None
    for _ in range(25):
        obs = saved.step(actions.sample())[0]
    other.reset(seed=[2])
    restore_all(other, snapshots(saved), np.array(obs))
    for t in range(75):
        # Resets of ReplayedAtari without a seed differ on purpose.
        if t == 50 and not isinstance(saved, ReplayedAtari) and _bytes(saved.reset()) != _bytes(other.reset()):
            return "the next episode of a restored one begins otherwise"
        action = actions.sample()
        if _bytes(saved.step(action)) != _bytes(other.step(action)):
            return f"a restored one goes another way after {t + 1} steps"
    return ""


def _bytes(result: Any) -> list[bytes]:
    """What a reset or a step handed out, the last observation of an episode too, to the bit."""
    *arrays, infos = result
    final = [array for array in infos.get("final_obs", ()) if array is not None]
    return [np.asarray(array).tobytes() for array in (*arrays, *final)]
