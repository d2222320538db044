"""What environments hand out, as one form: observations, numbers and infos; and what they are handed: actions.

Everything is known by type. What is not known is refused with a ValueError of a few words.
"""

import math
import reprlib
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Space

from common.args import warn

# What Envs and the vector environments report themselves. An environment's own keys of these names would be taken for
# theirs: RecordEpisodeStatistics writes `episode`, and many a game counts `lives` of its own.
RESERVED = frozenset(mask + key for key in ("final_obs", "final_info", "episode", "lives") for mask in ("", "_"))
NUMBERS = {float, bool, np.float64, np.float32, np.int64, np.bool_}  # those that NumPy holds as they are


def adapted(space: Space) -> Space:
    """The space of the observations that a script sees, of an environment that declares `space`.

    Images are uint8 with three dimensions, and become [channels, height, width]; every other Box becomes float32 with
    at least one dimension. Values stay as they are. Spaces of other kinds are not adapted: make_envs refuses them.
    """
    if not isinstance(space, Box):
        return space
    image = space.dtype == np.uint8 and len(space.shape) == 3
    dtype: Any = np.uint8 if image else np.float32
    if not image:
        low, high = np.atleast_1d(space.low, space.high)
    elif space.shape[2] in (1, 3, 4) and space.shape[0] not in (1, 3, 4):
        low, high = space.low.transpose(2, 0, 1), space.high.transpose(2, 0, 1)
    else:
        return space
    if low.shape == space.shape and dtype == space.dtype:
        return space
    with np.errstate(over="ignore"):  # bounds beyond float32 become infinite
        return Box(low.astype(dtype), high.astype(dtype), dtype=dtype)


def observer(space: Space) -> Callable[[Any], np.ndarray]:
    """A function that makes of an observation of `space` one of `adapted(space)`: always a copy.

    It raises ValueError for another shape, and for what would not keep its value: 0.5 or 300 in uint8, objects,
    strings. (Rounding to float32 passes, and what is too large for it becomes infinite, which Envs reports.)
    """
    if not isinstance(space, Box):
        return np.array
    shape, target = space.shape, adapted(space)
    dtype: Any = target.dtype

    def observe(obs: Any) -> np.ndarray:
        given = as_array(obs)
        if given.shape != shape:
            raise ValueError(f"has shape {given.shape}, its space {shape}")
        if given.dtype != np.uint8 and dtype == np.uint8:
            wrong = given[given != np.clip(np.rint(given), 0, 255)]
            if wrong.size:
                raise ValueError(f"holds {wrong[0]} of {given.dtype}, which uint8 cannot hold")
        array = given.astype(dtype)
        if shape == target.shape:
            return array
        return array.transpose(2, 0, 1) if shape else array.reshape(1)

    return observe


def as_array(value: Any) -> np.ndarray:
    """Numbers, a nested list of them, an array or a tensor on any device, as an array of bool, integers or floats."""
    if type(value) is np.ndarray and value.dtype.kind in "biuf":
        return value
    try:
        array = np.asarray(value.numpy(force=True) if isinstance(value, torch.Tensor) else value)
    except Exception:
        array = np.empty(0, object)
    if array.dtype.kind not in "biuf" or isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"is no array of numbers but {shown(value)}")
    return array


def as_number(value: Any) -> float:
    """A number, or an array or a tensor of one."""
    try:
        return float(value if isinstance(value, int | float) else as_array(value).item())
    except OverflowError:  # a Python int has no limit
        return math.inf if value > 0 else -math.inf
    except ValueError:
        raise ValueError(f"is not one number but {shown(value)}") from None


def as_flag(value: Any) -> bool:
    """True or false, 1 or 0, or an array or a tensor of one of them."""
    number = as_number(value)
    if number not in (0, 1):
        raise ValueError(f"is neither true nor false but {shown(value)}")
    return bool(number)


def as_info(value: Any, to_send: bool = False) -> dict[Any, Any]:
    """A dict of what an environment says beside, without RESERVED keys; of what is not a dict, an empty one.

    Args:
        to_send: also without what cannot be pickled, after one warning: a worker process sends its infos.
    """
    if not isinstance(value, dict) or not value:
        return {}
    return {k: v for k, v in value.items() if k not in RESERVED and not (to_send and _stays_here(k, v))}


def _stays_here(key: Any, value: Any) -> bool:
    if isinstance(value, bool | int | float | str | np.number | np.bool_ | None):
        return False
    try:
        ForkingPickler.dumps(value)
    except Exception:
        warn(f"what infos[{key!r}] holds cannot leave its process, and is left out", once=f"infos[{key!r}]")
        return True
    return False


def shown(value: Any) -> str:
    """`value` in a few words, whatever it is."""
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def in_columns(infos: dict[int, dict[Any, Any]], num_envs: int, depth: int = 0) -> dict[Any, Any]:
    """The infos of some of `num_envs` environments as gymnasium's vector environments report them.

    Each key has an array with a row for each environment, and beside it, with "_" before its name, a bool array that is
    true where the environment has this key. Dicts become dicts of columns. Numbers of one type, and arrays of one dtype
    and shape, are in an array of it, with 0 where there is none; everything else is in an array of objects, as it is.
    (gymnasium takes the dtype of the first: 1 and then 1.5 become 1 and 1.)
    """
    columns: dict[Any, Any] = {}
    masks = {}
    if len(infos) == num_envs:  # the most frequent case, in a third of the time: numbers of one type from all
        rows, all_have_it = [infos[i] for i in range(num_envs)], np.ones(num_envs, np.bool_)
        for key, value in rows[0].items():
            kind = type(value)
            if kind in NUMBERS and (num_envs == 1 or all(type(row.get(key)) is kind for row in rows)):
                columns[key], masks[f"_{key}"] = np.array([row[key] for row in rows], kind), all_have_it
    for key in {key: None for info in infos.values() for key in info if key not in columns}:
        values = {i: info[key] for i, info in infos.items() if key in info}
        kinds = set(map(type, values.values()))
        masks[f"_{key}"] = mask = np.zeros(num_envs, np.bool_)
        for i in values:
            mask[i] = True
        forms = {(kind, ()) for kind in kinds} if kinds <= NUMBERS else set(map(_form, values.values()))
        dtype, shape = forms.pop() if len(forms) == 1 and key != "final_obs" else (object, ())
        if dtype is dict and depth < 8:  # one may hold itself
            columns[key] = in_columns(values, num_envs, depth + 1)
            continue
        holds = dtype is not dict and dtype is not object
        columns[key] = column = np.zeros((num_envs, *shape), dtype) if holds else np.full(num_envs, None, object)
        for i, value in values.items():
            column[i] = value
    return {**columns, **masks}


def _form(value: Any) -> tuple[Any, tuple[int, ...]]:
    """The dtype and shape of a row of a column that holds `value`; dict for dicts."""
    kind = type(value)
    if issubclass(kind, dict):
        return dict, ()
    if kind is np.ndarray or issubclass(kind, int | float | np.generic):
        array = np.asarray(value)
        if array.dtype.kind in "biufc":
            return array.dtype, array.shape
    return object, ()


class InColumns:
    """Of a vector environment: its infos in the form of `in_columns`."""

    def _add_info(self, vector_infos: dict[Any, Any], env_info: dict[str, Any], env_num: int) -> dict[Any, Any]:
        return {**vector_infos, env_num: env_info} if env_info else vector_infos

    def reset(self, **kwargs: Any) -> Any:
        obs, infos = super().reset(**kwargs)  # type: ignore[misc]
        return obs, in_columns(infos, self.num_envs)  # type: ignore[attr-defined]

    def step(self, actions: Any) -> Any:
        *result, infos = super().step(actions)  # type: ignore[misc]
        return *result, in_columns(infos, self.num_envs)  # type: ignore[attr-defined]
