"""One form for what environments return: arrays, numbers and infos.

Conversions go by type. What cannot be converted is a ValueError of a few words.
"""

import math
import reprlib
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch

from common.args import warn

# Keys that Envs and gymnasium's vector environments write. An environment's own would be taken for theirs:
# RecordEpisodeStatistics writes `episode`, and many games count `lives` of their own.
RESERVED = frozenset(mask + key for key in ("final_obs", "final_info", "episode", "lives") for mask in ("", "_"))
NUMBERS = {float, bool, np.float64, np.float32, np.int64, np.bool_}  # those that NumPy holds as they are


def as_array(value: Any, what: str) -> np.ndarray:
    """Numbers, a nested list of them, an array or a tensor on any device, as an array of bool, integers or floats."""
    try:
        array = np.asarray(value.numpy(force=True) if isinstance(value, torch.Tensor) else value)
    except Exception:
        array = np.empty(0, object)
    if array.dtype.kind not in "biuf" or isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"{what} is no array of numbers but {shown(value)}")
    return array


def as_number(value: Any, what: str) -> float:
    """A number, or an array or a tensor of one."""
    try:
        return float(value if isinstance(value, int | float) else as_array(value, what).item())
    except OverflowError:  # a Python int has no limit
        return math.inf if value > 0 else -math.inf
    except ValueError:
        raise ValueError(f"{what} is not one number but {shown(value)}") from None


def as_flag(value: Any, what: str) -> bool:
    """True or false, 1 or 0, or an array or a tensor of one of them."""
    number = as_number(value, what)
    if number not in (0, 1):
        raise ValueError(f"{what} is neither true nor false but {shown(value)}")
    return bool(number)


def as_info(value: Any, to_send: bool = False) -> dict[Any, Any]:
    """A copy of an info without RESERVED keys, and with `to_send` without what cannot be pickled, after one warning.

    Of what is no dict it is an empty one.
    """
    if not isinstance(value, dict) or not value:
        return {}
    if not to_send and RESERVED.isdisjoint(value):
        return value.copy()
    return {k: v for k, v in value.items() if k not in RESERVED and not (to_send and _cannot_be_sent(k, v))}


def _cannot_be_sent(key: Any, value: Any) -> bool:
    try:
        if not isinstance(value, bool | int | float | str | np.number | np.bool_ | None):
            ForkingPickler.dumps(value)
        return False
    except Exception:
        warn(f"what infos[{key!r}] holds cannot leave its process, and is left out", once=f"infos[{key!r}]")
        return True


def shown(value: Any) -> str:
    """`value` in a few words, whatever it is."""
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def in_columns(infos: dict[int, dict[Any, Any]], num_envs: int, depth: int = 0) -> dict[Any, Any]:
    """The infos of some of `num_envs` environments as gymnasium's vector environments report them.

    Each key has an array with a row for each environment, and "_" + key a bool array that is true where the environment
    has it. Dicts become dicts of columns. Numbers of one type, and arrays of one dtype and shape, are in an array of
    it, with 0 where there is none; everything else is in an array of objects, as it is. (gymnasium takes the dtype of
    the first: 1 and then 1.5 become 1 and 1.)
    """
    columns: dict[Any, Any] = {}
    masks: dict[Any, Any] = {}
    everywhere = ~np.zeros(num_envs, np.bool_) if len(infos) == num_envs else None
    for key in dict.fromkeys([key for info in infos.values() for key in info]):
        values = {i: info[key] for i, info in infos.items() if key in info}
        kinds = set(map(type, values.values()))
        forms = kinds if kinds <= NUMBERS else set(map(_form, values.values()))
        form: Any = forms.pop() if len(forms) == 1 and key != "final_obs" else object
        if len(values) < num_envs:
            masks[f"_{key}"] = mask = np.zeros(num_envs, np.bool_)
            for i in values:
                mask[i] = True
        else:
            masks[f"_{key}"] = everywhere
        if form in NUMBERS and len(values) == num_envs:  # the most frequent case, in half the time
            columns[key] = np.fromiter(values.values(), form, num_envs)
        elif form is dict and depth < 8:  # one may hold itself
            columns[key] = in_columns(values, num_envs, depth + 1)
        else:
            dtype, shape = form if type(form) is tuple else (form, ())
            numbers = form is not dict and form is not object
            columns[key] = column = np.zeros((num_envs, *shape), dtype) if numbers else np.full(num_envs, None)
            for i, value in values.items():
                column[i] = value
    return {**columns, **masks}


def _form(value: Any) -> Any:
    """dict for a dict, (dtype, shape) for a number or an array of numbers, object for anything else."""
    kind = type(value)
    if issubclass(kind, dict):
        return dict
    if kind is np.ndarray or issubclass(kind, int | float | np.generic):
        array = np.asarray(value)
        if array.dtype.kind in "biufc":
            return array.dtype, array.shape
    return object
