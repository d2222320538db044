"""Snapshots of an environment and all its wrappers, exact to the bit, that a new process can go on from.

    state = snapshot(env)         # at any moment between two steps
    restore(another_env, state)   # made in the same way; goes on as `env` would have

A snapshot walks through everything reachable from the environment: attributes, containers, random generators.
Where the same object is reached twice it is the same afterwards. What cannot be looked into (functions, windows,
objects of C libraries) stays what it is in the environment restored to, with three exceptions:

MuJoCo: all of MjData. The state vectors of `mj_getState`, even mjSTATE_INTEGRATION, leave out derived quantities
    of the last step that Ant and Humanoid observe and reward. MjModel is taken to be constant.
Box2D: a world cannot be saved, so the running episode is played again: see `common.replayed`.
Atari: ALE's system state, its random generator included; no games with sticky actions, as it leaves out the action
    that may be repeated (in 7 of 40 trials the restored game went another way). Its vector environment has no such
    call, and is played again too.

Nothing of this is pickled. (Pickling or deep-copying MuJoCo and Atari environments raises no error, and silently
starts them over: they pickle as their constructor's arguments.) A snapshot consists of None, bool, int, float, str,
bytes, tuple, list and dict, which `torch.load(weights_only=True)` accepts, and loading one creates no object of a
class that it names. That is also its limit: an object of a class of the environment's own is given back its
attributes, but is not made, so where the number of such objects changes there is a ValueError.
"""

import collections
import copy
import enum
import random
import sys
import zlib
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from common.replayed import Replayed

_MISSING = object()
_PLAIN = (type(None), bool, int, float, str, bytes)
_BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, not by C


def snapshot(env: Any) -> Any:
    """The state of `env`, or of anything else that has attributes (a space, say). Leaves it unchanged.

    Raises TypeError where something is found that is state and cannot be saved.
    """
    return _Writer().write(env)


def restore(env: Any, state: Any) -> None:
    """Puts `env` into the state that `snapshot` took of one made in the same way.

    Raises ValueError if it was made in another way, or if a replayed episode leads elsewhere.
    """
    if isinstance(env, gym.Env):
        env.reset(seed=0)  # what an environment makes at its first reset must exist to be filled
    _Reader().read(state, env)


class _Writer:
    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, Any]] = {}  # id -> number, and the object, lest its id be given away

    def write(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return ("empty",) if kind is bytes and not value else value  # torch.load refuses b""
        if kind is tuple:
            return ("tuple", [self.write(item) for item in value])
        if isinstance(value, np.generic):
            return ("scalar", value.dtype.str, value.tobytes())
        if isinstance(value, enum.Enum):
            return ("enum", value.name)
        if id(value) in self.seen:
            return ("same", self.seen[id(value)][0])
        number = len(self.seen)
        self.seen[id(value)] = number, value
        return (*self._parts(value, kind), number)

    def _parts(self, value: Any, kind: type) -> tuple[Any, ...]:
        if kind is np.ndarray:
            if value.dtype.hasobject or value.dtype.fields:
                raise TypeError(f"an array of {value.dtype} cannot be saved")
            if type(value.base) is np.ndarray and _as_in_memory(value.base)[0].flags.c_contiguous:
                # A view goes on seeing what is written to its base.
                offset = value.__array_interface__["data"][0] - value.base.__array_interface__["data"][0]
                return ("view", self.write(value.base), value.dtype.str, value.shape, value.strides, offset)
            inner, axes = _as_in_memory(value)
            return ("array", value.dtype.str, inner.shape, axes, inner.tobytes() or None)
        if isinstance(value, torch.Tensor):
            return ("tensor", self.write(value.detach().cpu().numpy()))
        if isinstance(value, np.random.Generator):
            return ("generator", self.write(value.bit_generator.state))
        if isinstance(value, np.random.RandomState):
            return ("set_state", self.write(value.get_state(legacy=False)))
        if isinstance(value, random.Random):
            return ("setstate", self.write(value.getstate()))
        if isinstance(value, torch.Generator):
            return ("torch", self.write(value.get_state().numpy()))
        if isinstance(value, gym.Space):  # all else of a space is constant
            return ("space", self.write(vars(value).get("_np_random")), self.write(vars(value).get("spaces")))
        if isinstance(value, dict):
            return ("dict", [(self.write(key), self.write(item)) for key, item in value.items()])
        if isinstance(value, collections.deque):
            return ("deque", value.maxlen, [self.write(item) for item in value])
        if kind in (list, set):
            return (kind.__name__, [self.write(item) for item in value])
        if kind.__module__.startswith("mujoco") and kind.__name__ == "MjData":
            return ("mujoco", zlib.compress(value.__getstate__(), 1))  # level 1: 0.7 MB to 50 KB in 2 ms
        if kind.__name__ == "ALEInterface":
            if value.getFloat("repeat_action_probability") > 0:
                raise TypeError("ALE does not save the action that sticky actions may repeat")
            return ("ale", value.cloneState(include_rng=True).serialize())
        if kind is Replayed:
            return ("replay", self.write(value.history()), self.write(value.env.unwrapped.action_space))
        if _has_state(kind) and hasattr(value, "__dict__"):
            return ("object", _name(kind), {name: self.write(item) for name, item in vars(value).items()})
        return ("kept",)


def _as_in_memory(array: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """`array` with its axes from the slowest to the fastest in memory, and which axes of it these were.

    Arrays are saved in this order, which is not always C's: the last bits of a sum or a matrix product depend on it.
    """
    axes = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    return array.transpose(axes), axes


def _has_state(kind: type) -> bool:
    """Whether objects of this class are looked into: those of Python classes, but not threads, sockets, loggers."""
    module = kind.__module__.partition(".")[0]
    return (
        bool(kind.__flags__ & _HEAP_TYPE)
        and not issubclass(kind, (type, gym.envs.registration.EnvSpec))
        and module != "Box2D"
        and (module not in sys.stdlib_module_names or module == "types")
    )


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class _Reader:
    """Rebuilds values next to their counterparts (`old`) in the environment restored to."""

    def __init__(self) -> None:
        self.made: dict[int, Any] = {}
        self.taken: dict[int, Any] = {}  # counterparts in use already: none stands for two objects

    def read(self, state: Any, old: Any) -> Any:
        if not isinstance(state, tuple):
            return state
        tag, *parts = state
        if tag == "empty":
            return b""
        if tag == "same":
            return self.made[parts[0]]
        if tag == "tuple":
            before = old if isinstance(old, tuple) else ()
            return tuple(self._items(parts[0], before))
        if tag == "scalar":
            return np.frombuffer(parts[1], parts[0])[0]
        if tag == "enum":
            return type(old)[parts[0]] if isinstance(old, enum.Enum) else _wrong(f"the choice {parts[0]}", old)
        *parts, number = parts
        if tag == "kept":
            self.made[number] = old
            return old
        if id(old) in self.taken:
            old = object.__new__(type(old)) if tag == "object" else _MISSING
        elif old is not _MISSING and type(old) not in _PLAIN:
            self.taken[id(old)] = old
        self.made[number] = old  # an object is filled in place, and may hold itself
        value = getattr(self, "_" + tag)(*parts, old, *([number] if tag in ("dict", "list", "deque") else []))
        self.made[number] = value
        return value

    def _items(self, states: list[Any], old: Any) -> list[Any]:
        before = list(old)
        values = [self.read(state, before[i] if i < len(before) else _MISSING) for i, state in enumerate(states)]
        if any(value is _MISSING for value in values):
            raise ValueError("a container holds objects that cannot be saved")
        return values

    def _array(self, dtype: str, shape: tuple[int, ...], axes: list[int], data: bytes | None, old: Any) -> Any:
        new = np.frombuffer(data or b"", dtype).reshape(shape).transpose(np.argsort(axes)).copy(order="K")
        if type(old) is np.ndarray and (old.dtype, old.shape) == (new.dtype, new.shape):
            if old.tobytes() == new.tobytes():
                return old
            if old.base is not None and type(old.base) is not np.ndarray and old.flags.writeable:
                old[...] = new  # the memory of a simulator
                return old
        return new  # never written into: it may be a constant of the environment's module

    def _view(self, base: Any, dtype: str, shape: Any, strides: Any, offset: int, old: Any) -> Any:
        whole = self.read(base, getattr(old, "base", _MISSING))
        return np.ndarray(shape, dtype, _as_in_memory(whole)[0], offset, strides)

    def _tensor(self, array: Any, old: Any) -> Any:
        new = torch.from_numpy(np.array(self.read(array, _MISSING)))
        if isinstance(old, torch.Tensor) and old.shape == new.shape and old.dtype == new.dtype:
            old.data.copy_(new)
            return old
        return new

    def _generator(self, state: Any, old: Any) -> Any:
        state = self.read(state, _MISSING)
        name = state["bit_generator"]
        if name not in _BIT_GENERATORS:
            raise ValueError(f"unknown random generator {name}")
        if not isinstance(old, np.random.Generator) or old.bit_generator.state["bit_generator"] != name:
            old = np.random.Generator(getattr(np.random, name)())
        old.bit_generator.state = state
        return old

    def _set_state(self, state: Any, old: Any) -> Any:
        old = old if isinstance(old, np.random.RandomState) else np.random.RandomState()
        old.set_state(self.read(state, _MISSING))
        return old

    def _setstate(self, state: Any, old: Any) -> Any:
        old = old if isinstance(old, random.Random) else random.Random()
        old.setstate(self.read(state, _MISSING))
        return old

    def _torch(self, state: Any, old: Any) -> Any:
        old = old if isinstance(old, torch.Generator) else torch.Generator()
        old.set_state(torch.from_numpy(self.read(state, _MISSING)))
        return old

    def _space(self, generator: Any, spaces: Any, old: Any) -> Any:
        if not isinstance(old, gym.Space):
            _wrong("a space", old)
        old._np_random = self.read(generator, old._np_random)
        self.read(spaces, getattr(old, "spaces", None))
        return old

    def _dict(self, pairs: list[Any], old: Any, number: int) -> Any:
        new = copy.copy(old) if isinstance(old, dict) else {}  # a copy: defaultdict keeps its default
        new.clear()
        self.made[number] = new
        for key_state, state in pairs:
            key = self.read(key_state, _MISSING)
            before = old.get(key, _MISSING) if isinstance(old, dict) else _MISSING
            (new[key],) = self._items([state], () if before is _MISSING else (before,))
        return new

    def _list(self, states: list[Any], old: Any, number: int) -> Any:
        new: list[Any] = []
        self.made[number] = new
        new += self._items(states, old if isinstance(old, list) else ())
        return new

    def _deque(self, maxlen: int | None, states: list[Any], old: Any, number: int) -> Any:
        new: collections.deque[Any] = collections.deque(maxlen=maxlen)
        self.made[number] = new
        new.extend(self._items(states, old if isinstance(old, collections.deque) else ()))
        return new

    def _set(self, states: list[Any], old: Any) -> Any:
        return set(self._items(states, ()))

    def _mujoco(self, data: bytes, old: Any) -> Any:
        import mujoco

        saved = mujoco.MjData.__new__(mujoco.MjData)
        saved.__setstate__(zlib.decompress(data))
        mujoco.mj_copyData(old, old.model, saved)  # in place: the environment and its renderer both hold it
        return old

    def _ale(self, data: bytes, old: Any) -> Any:
        import ale_py

        old.restoreState(ale_py.ALEState(data))
        return old

    def _replay(self, history: Any, space: Any, old: Any) -> Any:
        old.replay(*self.read(history, _MISSING))
        self.read(space, old.env.unwrapped.action_space)
        return old

    def _object(self, name: str, attributes: dict[str, Any], old: Any) -> Any:
        if old is _MISSING or _name(type(old)) != name:
            _wrong(name, old)
        for stale in vars(old).keys() - attributes.keys():
            del vars(old)[stale]
        for attribute, state in attributes.items():
            value = self.read(state, vars(old).get(attribute, _MISSING))
            if value is not _MISSING:
                vars(old)[attribute] = value
        return old


def _wrong(saved: str, old: Any) -> None:
    there = "nothing" if old is _MISSING else _name(type(old))
    raise ValueError(f"the snapshot has {saved} where this environment has {there}")
