"""The state of all environments of a vector environment, as a checkpoint holds it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.args import warn
from common.internals.resume.env_state import restore
from common.internals.vector.guard import EnvError

LARGE_SNAPSHOT = 50e6  # bytes of one environment's state in a checkpoint: more is reported


def can_be_saved(vector: Any, call: Callable[[str], Any]) -> bool:
    """Whether the environments, as they are now, can be saved exactly; one warning if not.

    Args:
        call: what a method of each environment returns, in a list.
    """
    return hasattr(vector, "snapshots") or _all_saved(call("unsaved"))


def _all_saved(answers: Any) -> bool:
    reasons = [answer for answer in answers if isinstance(answer, str)]
    if reasons:
        advice = "give the environment get_state() and set_state(state)"
        warn(f"resume will start new episodes: {reasons[0]} ({advice})", once="resume will start new episodes")
    return not reasons


def save(vector: Any, call: Callable[[str], Any]) -> tuple[list[Any] | None, dict[str, Tensor]]:
    """The state of each environment, and the large arrays of all, each once; None if one cannot be saved."""
    if hasattr(vector, "snapshots"):
        return vector.snapshots(), {}
    states = call("snapshot")
    if not _all_saved(states):
        return None, {}
    largest = max(state[2] for state in states)
    if largest > LARGE_SNAPSHOT:
        warn(f"each checkpoint holds {largest / 1e6:.0f} MB of state for an environment", once="large snapshots")
    # As tensors: torch.save writes bytes at 1.5 times their size.
    arrays = {key: data for _, arrays, *_ in states for key, data in arrays.items()}
    large = {key: torch.frombuffer(bytearray(d), dtype=torch.uint8) for key, d in arrays.items() if d is not None}
    return [[tree, list(arrays)] for tree, arrays, *_ in states], large


def load(vector: Any, spaces: tuple[Any, ...], state: dict[str, Any]) -> str | None:
    """Puts the environments and action spaces into a saved state; why that cannot be done, None if it is.

    Raises:
        EnvError: an environment failed.
    """
    try:
        restore(spaces, state["spaces"])
        if hasattr(vector, "restore"):
            same = np.array_equal(vector.restore(state["snapshots"]), state["obs"].numpy())
            return None if same else "what is restored leads elsewhere: is it another version?"
        large = {key: data.numpy().tobytes() for key, data in state["large"].items()}
        states = [[tree, {key: large.get(key) for key in keys}] for tree, keys in state["snapshots"]]
        vector.set_attr("restored", states)
        return next(filter(None, vector.get_attr("restored")), None)
    except EnvError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
