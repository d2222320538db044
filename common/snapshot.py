"""Snapshots of an environment and all its wrappers, exact to the bit, that a new process can go on from.

    state = snapshot(env)         # at any moment between two steps
    restore(another_env, state)   # made in the same way; goes on as `env` would have

A snapshot walks through everything reachable from the environment. The type of each object must be one that is known
to be saved and restored exactly; any other is refused by its name. Where the same object is reached twice, it is the
same afterwards; an object that a module or class names stays the one that they name. docs/faults.md has the table of
what is exact, what is refused and what lies outside of an environment. Some types need a word:

Environments with `get_state()` and `set_state(state)`: these two, the random generator and the spaces.
MuJoCo: all of MjData. The state vectors of `mj_getState`, even mjSTATE_INTEGRATION, leave out derived quantities
    of the last step that Ant and Humanoid observe and reward. MjModel must be as it was made.
Box2D: gymnasium's own environments; the running episode is played again: see `common.replayed`.
Atari: ALE's system state, its random generator included; no games with sticky actions, as it leaves out the action
    that may be repeated (in 7 of 40 trials the restored game went another way). Its vector environment has no such
    call, and is played again too.
Windows, fonts, loggers: output only, so they stay what they are in the environment restored to.
Large arrays: those that an environment has as soon as it is made are not saved while they do not change; others are
    saved beside the rest, by their hash, so that a checkpoint holds those that several environments share only once.

Nothing of this is pickled. A snapshot consists of None, bool, int, float, str, bytes, tuple, list and dict, which
`torch.load(weights_only=True)` accepts. Objects that the environment restored to lacks are made without running a
constructor, of Python classes already imported that are not of the standard library and have no `__del__`.
"""

import collections
import copyreg
import datetime
import decimal
import enum
import fractions
import functools
import hashlib
import inspect
import pathlib
import random
import sys
import types
import uuid
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from common.replayed import Replayed, is_box2d

LARGE = 1 << 16  # bytes of an array that is saved by its hash
_MISSING = object()
_ATOMS = {type(None), bool, int, float, str}
_BITS = {np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64}
_MADE = {  # immutable; made from the arguments that they give when asked to be reduced
    *(complex, range, slice, decimal.Decimal, fractions.Fraction, uuid.UUID, torch.device, type(pathlib.Path())),
    *(datetime.date, datetime.time, datetime.datetime, datetime.timedelta, datetime.timezone, pathlib.PurePosixPath),
}
_MADE_BY_NAME = {f"{kind.__module__}:{kind.__qualname__}": kind for kind in _MADE}
_MAPPINGS = (collections.defaultdict, collections.OrderedDict, dict)
_MUTABLE = (*_MAPPINGS, list, set, collections.deque, bytearray)
_BASES: tuple[Any, ...] = (*_MUTABLE, tuple, frozenset, int, float, complex, str, bytes, object)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, np.ufunc, type(np.clip), type(functools.cache(len)))
_OUTPUT = {
    *("pygame.surface:Surface", "pygame.time:Clock", "pygame.font:Font", "pygame.mixer:Sound", "logging:Logger"),
    *("logging:RootLogger", "re:Pattern", "mujoco.renderer:Renderer", "gymnasium.envs.registration:EnvSpec"),
    "gymnasium.envs.mujoco.mujoco_rendering:MujocoRenderer",
}
_OF_GYMNASIUM = ("_np_random", "_np_random_seed", "action_space", "observation_space")
_LIBRARIES = {"gymnasium", "numpy", "torch", "mujoco", "ale_py", "Box2D", "pygame", "common", *sys.stdlib_module_names}


def snapshot(value: Any, constants: Mapping[str, Any] | None = None) -> list[Any]:
    """The state of an environment, or of anything else that has attributes (a space, say), which stays unchanged.

    Args:
        constants: what `large_arrays` found when the environment was made.

    Returns:
        The state, its large arrays by hash (None for a constant, else its bytes), about how many bytes all take, and
        what may differ all the same, or None.

    Raises TypeError, which names attribute and type, where something is found that is not known to be saved exactly.
    """
    writer = _Writer(constants or {})
    state = writer.write(value)
    if writer.problem:
        raise TypeError(writer.problem)
    return [state, writer.large, writer.size, writer.note]


def large_arrays(env: Any) -> dict[str, np.ndarray]:
    """The large arrays that can be reached from `env`, by hash."""
    writer = _Writer(None)
    writer.write(env)
    return writer.arrays


def restore(value: Any, state: list[Any], constants: Mapping[str, Any] | None = None) -> None:
    """Puts `value` into the state that `snapshot` took of one made in the same way.

    Raises ValueError if it was made in another way, before anything but a reset was done to it, or if a replayed
    episode leads elsewhere.
    """
    reader = _Reader(state[1], constants or {})
    for env in value if type(value) is tuple else [value]:
        if isinstance(env, gym.Env):
            env.reset(seed=0)  # what an environment makes at its first reset must exist to be filled
    reader.read(state[0], value)
    for fill in reader.fills:
        fill()


class _Walk:
    """What modules and classes name is looked up in both processes, so that it stays the object that they name."""

    def __init__(self) -> None:
        self.shared: dict[str, Any] = {"torch.default_generator": torch.default_generator}
        self.places = {id(torch.default_generator): "torch.default_generator"}
        self.met: set[Any] = set()
        for kind in (random.Random, np.random.RandomState):
            self.meet(kind, library=True)

    def meet(self, kind: type, library: bool = False) -> None:
        for owner in kind.__mro__ if kind not in self.met else ():
            for named in (owner, sys.modules.get(str(getattr(owner, "__module__", None)))):
                if named is None or named in self.met or (_root(owner) in _LIBRARIES and not library):
                    continue
                self.met.add(named)
                for name, value in list(vars(named).items()):
                    if not name.startswith("__"):
                        self._note(f"{_what(named)}.{name}", value, 3)

    def _note(self, place: str, value: Any, depth: int) -> None:
        if type(value) in _ATOMS or isinstance(value, type | types.ModuleType | types.FunctionType | gym.Env):
            return
        self.shared[place] = value
        self.places.setdefault(id(value), place)
        if depth and type(value) in (list, tuple, dict) and len(value) <= 1000:
            for i, item in enumerate(value.values() if type(value) is dict else value):
                self._note(f"{place}[{i}]", item, depth - 1)


class _Writer(_Walk):
    def __init__(self, constants: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.constants = constants  # None: only look for large arrays
        self.seen: dict[int, tuple[int, Any]] = {}  # id -> number, and the object, lest its id be given away
        self.large: dict[str | None, bytes | None] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self.storages: dict[int, np.ndarray] = {}
        self.replayed: dict[int, Replayed] = {}
        self.classes: set[Any] = set()
        self.size = 0
        self.owner, self.path = "it", [""]
        self.problem: str | None = None
        self.note: str | None = None

    def write(self, value: Any, name: str = "") -> Any:
        kind = type(value)
        self.size += 8
        if kind in _ATOMS:
            return value
        self.path.append(name)
        state = self._write(value, kind)
        self.path.pop()
        return state

    def _write(self, value: Any, kind: Any) -> Any:
        if kind is bytes:
            self.size += len(value)
            return value or ("empty",)  # torch.load refuses b""
        if kind is tuple:
            return ("tuple", self._items(value))
        if isinstance(value, np.generic) and kind.__module__ == "numpy" and not isinstance(value, np.void):
            return ("scalar", _descr(value.dtype), value.tobytes() or None)
        if isinstance(value, enum.Enum):
            return ("enum", _what(kind), value.name, value.value if isinstance(value, enum.Flag) else None)
        if kind in _MADE:
            make, arguments = value.__reduce_ex__(2)[:2]
            return ("made", _what(kind), self.write(arguments[1:] if make is copyreg.__newobj__ else arguments))  # type: ignore[attr-defined]
        if isinstance(value, np.dtype) and not value.hasobject:
            return ("dtype", _descr(value))
        if kind is torch.dtype:
            return ("dtype", str(value))
        if isinstance(value, type | types.ModuleType):
            return ("named", _what(value))
        if isinstance(value, _FUNCTIONS) and _find(_what(value)) is value:
            return ("named", _what(value))
        if id(value) in self.seen:
            return ("same", self.seen[id(value)][0])
        number = len(self.seen)
        self.seen[id(value)] = number, value
        self.meet(kind)
        place = self.places.get(id(value))
        return (*self._parts(value, kind), place, number)

    def _items(self, values: Any) -> list[Any]:
        values = list(values)
        if set(map(type, values)) <= _ATOMS:
            self.size += 8 * len(values)
            return values
        return [self.write(item, "[]") for item in values]

    def _name(self) -> str:
        path = "".join(f".{part}" if part[:1] not in ("", "[") else part for part in self.path)
        return f"attribute `{path.removeprefix('.')}` of {self.owner}"

    def _refuse(self, value: Any, why: str = "") -> tuple[Any, ...]:
        if self.problem is None:
            name = _what(type(value)).removeprefix("builtins:").replace(":", ".")
            an = "an" if name[0] in "aeiouAEIOU" else "a"
            self.problem = f"{self._name()} is {an} {name}{why}, which cannot be saved"
        return ("refused",)

    def _parts(self, value: Any, kind: Any) -> tuple[Any, ...]:
        if kind is np.ndarray:
            return self._array(value)
        if kind in (torch.Tensor, torch.nn.Parameter):
            return self._tensor(value, kind)
        if kind is np.random.Generator:
            return ("generator", self.write(value.bit_generator))
        if kind in _BITS:
            seed = value.seed_seq
            if seed is not None and type(seed) is not np.random.SeedSequence:
                return self._refuse(value)
            parts = seed and (seed.entropy, seed.spawn_key, seed.pool_size, seed.n_children_spawned)
            return ("bits", kind.__name__, self.write(value.state), self.write(parts))
        if kind is np.random.RandomState:
            return ("random", "RandomState", self.write(value.get_state(legacy=False)))
        if kind is random.Random:
            return ("random", "Random", self.write(value.getstate()))
        if kind is torch.Generator and value.device.type == "cpu":
            return ("random", "Generator", self.write(value.get_state().numpy().copy()))
        if kind is types.MethodType and getattr(type(value.__self__), value.__name__, None) is value.__func__:
            return ("method", self.write(value.__self__), value.__name__)
        if kind is types.BuiltinFunctionType and getattr(value.__self__, value.__name__, None) == value:
            return ("method", self.write(value.__self__), value.__name__)
        if kind is functools.partial:
            return ("partial", *(self.write(part) for part in (value.func, value.args, value.keywords)))
        if kind is types.FunctionType:
            names = value.__code__.co_freevars
            try:
                cells = [self.write(c.cell_contents, n) for c, n in zip(value.__closure__ or (), names, strict=True)]
            except ValueError:
                return self._refuse(value, " over a variable without a value")
            rest = self.write((value.__defaults__, value.__kwdefaults__, vars(value)))
            return ("function", _code(value.__code__), cells, rest)
        if _what(kind) in _OUTPUT:
            return ("kept",)
        if kind is Replayed:
            return ("replay", self.write(value.history()), self.write(value.env.unwrapped.action_space))
        if id(value) in self.replayed:
            return ("inner", self.write(self.replayed[id(value)]))
        if kind.__name__ == "MjModel" and kind.__module__.startswith("mujoco"):
            model = _model(value)
            if self.constants is None:
                self.arrays[_hash(model)] = model
            elif self.constants and _hash(model) not in self.constants:
                return self._refuse(value, " that has changed since it was made")
            return ("model", _hash(model))
        if kind.__name__ == "MjData" and kind.__module__.startswith("mujoco"):
            data = zlib.compress(value.__getstate__(), 1)  # 0.7 MB to 50 KB in 2 ms
            return ("mujoco", data, self.write(value.model))
        if kind.__name__ == "ALEInterface":
            if value.getFloat("repeat_action_probability") > 0:
                return self._refuse(value, " with sticky actions")
            return ("ale", value.cloneState(include_rng=True).serialize())
        return self._object(value, kind)

    def _array(self, value: np.ndarray) -> tuple[Any, ...]:
        if value.dtype.hasobject:
            if value.dtype != object or value.base is not None:
                return self._refuse(value, " of objects")
            return ("objects", value.shape, self._items(value.ravel()))
        flags = value.flags.writeable
        if type(value.base) is np.ndarray and _as_in_memory(value.base)[0].flags.c_contiguous:
            # A view goes on seeing what is written to its base.
            offset = value.__array_interface__["data"][0] - value.base.__array_interface__["data"][0]
            return ("view", self.write(value.base), _descr(value.dtype), value.shape, value.strides, offset, flags)
        of_ale = type(getattr(value.base, "obj", None)).__name__ == "nb_ndarray" and "ale_py" in sys.modules  # a copy
        if value.base is not None and type(value.base) is not bytes and not of_ale:
            return self._refuse(value, f" over the memory of a {type(value.base).__name__}")
        inner, axes = _as_in_memory(value)
        data, key = None, None
        if value.nbytes < LARGE:
            data = inner.tobytes() or None
        else:
            key = _hash(inner)
            self.arrays[key] = value
            self.large[key] = None if self.constants is None or key in self.constants else inner.tobytes()
        self.size += len(data or self.large.get(key) or b"")
        return ("array", _descr(value.dtype), inner.shape, axes, data, key, flags)

    def _tensor(self, value: torch.Tensor, kind: type) -> tuple[Any, ...]:
        storage = value.untyped_storage() if value.layout is torch.strided and not value.is_quantized else None
        if storage is None or value.grad_fn is not None or value.is_conj() or value.is_neg() or not storage.resizable():
            return self._refuse(value, " that is part of a graph, not dense or over other memory")
        pointer = storage.data_ptr()
        if pointer not in self.storages:
            self.storages[pointer] = torch.tensor([], dtype=torch.uint8).set_(storage.cpu().clone()).numpy().copy()
        place = value.storage_offset(), tuple(value.shape), value.stride()
        dtype, data = self.write(value.dtype), self.write(self.storages[pointer])
        grad = self.write(value.grad if value.is_leaf else None)
        learns = kind is torch.nn.Parameter, value.requires_grad
        return ("tensor", data, dtype, place, learns, str(value.device), grad)

    def _object(self, value: Any, kind: Any) -> tuple[Any, ...]:
        base = _plain_base(kind)
        if base is None or is_box2d(value):
            return self._refuse(value)
        outside = self.owner, self.path
        if isinstance(value, gym.Env):
            self.owner, self.path = kind.__name__, []
        inner = value
        while isinstance(inner, gym.Wrapper):
            if type(inner) is Replayed:
                self.replayed[id(inner.env)] = inner
            inner = inner.env
        content: Any = None
        attributes = vars(value) if hasattr(value, "__dict__") else {}
        tag, slots = "object", [slot.__get__(value) if _has(slot, value) else _MISSING for slot in _slots(kind)]
        if isinstance(value, gym.Env) and inner is value and _takes(value, get_state=0, set_state=1):
            tag, slots = "own", []
            state_of: Any = value
            content = self.write(state_of.get_state() if self.constants is not None else None, "get_state()")
            attributes = {name: v for name, v in attributes.items() if name in _OF_GYMNASIUM}
        elif issubclass(base, dict):
            pairs = base.items(value)
            content = [(self.write(key, "[]"), self.write(item, "[]")) for key, item in pairs]
            if base is collections.defaultdict:
                content = [self.write(value.default_factory), content]
        elif base is bytearray:
            content = self.write(bytes(value))
        elif base is collections.deque:
            content = [value.maxlen, self._items(value)]
        elif base in (list, tuple, set, frozenset):
            content = self._items(base.__iter__(value))
            if base in (set, frozenset):  # where its items lie depends on which there have been
                items, again = list(base.__iter__(value)), base(base.__iter__(value))
                if list(again) != items or (base is set and again.__sizeof__() != value.__sizeof__()):
                    self.note = (
                        f"{self._name()} is a set that lost items: a resumed run may take the others in another order"
                    )
        elif base is not object:
            content = self.write(base(value) if base is not str else str.__str__(value))
        state = {name: self.write(item, name) for name, item in attributes.items()}
        slot_states = [("unset",) if item is _MISSING else self.write(item, "slot") for item in slots]
        shared = []
        for owner in kind.__mro__:
            if owner not in self.classes and _root(owner) not in _LIBRARIES:
                self.classes.add(owner)
                self.owner, self.path = f"the class {owner.__name__}", []
                shared.append((_what(owner), {name: self.write(item, name) for name, item in _data(owner).items()}))
        self.owner, self.path = outside
        return (tag, _what(kind), content, state, slot_states, shared)


def _find(name: str) -> Any:
    """What is called `name`, "module:a.b", in a module that is imported; None if nothing is."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split(".") if path else ():
        found = getattr(found, part, None)
    return found


def _what(value: Any) -> str:
    if isinstance(value, types.ModuleType):
        return value.__name__
    return f"{getattr(value, '__module__', None)}:{getattr(value, '__qualname__', None)}"


def _root(kind: Any) -> str:
    return str(getattr(kind, "__module__", None)).partition(".")[0]


def _data(kind: Any) -> dict[str, Any]:
    """The attributes of a class that are not code."""
    return {
        name: value
        for name, value in vars(kind).items()
        if not name.startswith(("__", "_abc_"))
        and not hasattr(type(value), "__get__")
        and not isinstance(value, type | types.ModuleType)
    }


def _slots(kind: type) -> list[Any]:
    of_classes = (vars(owner) for owner in kind.__mro__ if "__slots__" in vars(owner))
    return [slot for names in of_classes for slot in names.values() if type(slot) is types.MemberDescriptorType]


def _has(slot: Any, value: Any) -> bool:
    try:
        slot.__get__(value)
    except AttributeError:
        return False
    return True


def _plain_base(kind: Any) -> Any:
    """The built-in type of which `kind` has the content; None if its objects have memory that Python cannot see."""
    base = next(b for b in _BASES if issubclass(kind, b))
    room = len(_slots(kind))
    for offset in ("__dictoffset__", "__weakrefoffset__"):
        at = getattr(kind, offset)
        room += at != 0 == getattr(base, offset) and (at > 0 or kind.__itemsize__ > 0)
    whole = kind.__basicsize__ <= base.__basicsize__ + 8 * room and kind.__itemsize__ == base.__itemsize__
    return base if whole else None


def _takes(env: Any, **methods: int) -> bool:
    """Whether `env` has these methods, and they can be called with so many arguments."""
    try:
        return all(inspect.signature(getattr(env, name)).bind(*[0] * count) for name, count in methods.items())
    except (AttributeError, TypeError, ValueError):
        return False


def _descr(dtype: np.dtype) -> Any:
    return np.lib.format.dtype_to_descr(dtype)


def _hash(array: np.ndarray) -> str:
    return hashlib.sha1(np.ascontiguousarray(array).data.cast("B"), usedforsecurity=False).hexdigest()


def _model(model: Any) -> np.ndarray:
    import mujoco

    data = np.zeros(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, data)
    return data


def _code(code: types.CodeType) -> str:
    """Tells functions apart that have no name to find them by."""
    parts = [
        _code(c) if isinstance(c, types.CodeType) else sorted(map(repr, c)) if isinstance(c, frozenset) else repr(c)
        for c in code.co_consts
    ]
    text = repr((code.co_qualname, code.co_code, code.co_names, code.co_freevars, parts))
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def _as_in_memory(array: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """`array` with its axes from the slowest to the fastest in memory, and which axes of it these were.

    Arrays are saved in this order, which is not always C's: the last bits of a sum or a matrix product depend on it.
    """
    axes = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    return array.transpose(axes), axes


class _Reader(_Walk):
    """Rebuilds values next to their counterparts (`old`) in the environment restored to.

    What is there already is changed at the end, by `fills`, when nothing can fail any more.
    """

    def __init__(self, large: Mapping[str, bytes | None], constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.large = dict(large)
        for key in (key for key, data in large.items() if data is None):
            inner = _as_in_memory(constants.get(key, np.zeros(0)))[0]
            if _hash(inner) != key:
                raise ValueError("a large array that never changed is another one here: is it drawn without a seed?")
            self.large[key] = inner.tobytes()
        self.made: dict[int, Any] = {}
        self.taken: dict[int, Any] = {}  # counterparts in use already: none stands for two objects
        self.fills: list[Callable[[], Any]] = []
        self.roots: set[str] = {"gymnasium"}
        self.storages: dict[Any, Any] = {}

    def read(self, state: Any, old: Any) -> Any:
        if not isinstance(state, tuple):
            return state
        tag, *parts = state
        if tag == "same":
            return self.made[parts[0]]
        if tag in ("empty", "unset"):
            return b"" if tag == "empty" else _MISSING
        if tag in ("tuple", "scalar", "enum", "made", "dtype", "named"):
            return getattr(self, "_" + tag)(*parts, old)
        *parts, place, number = parts
        if tag in ("object", "own"):
            kind = type(old) if _what(type(old)) == parts[0] else self._class(parts[0], number)
            self.roots |= {_root(kind)} - _LIBRARIES
            self.meet(kind)
        if place is not None and place not in self.shared:
            raise ValueError(f"{place} is missing")
        old = self.shared[place] if place is not None else _MISSING if id(old) in self.places else old
        if tag == "kept":
            self.made[number] = old
            return old
        if id(old) in self.taken:
            old = _MISSING
        self.taken[id(old)] = old
        if tag in ("object", "own"):
            return self._object(tag, kind, parts[1:], old, number)
        self.made[number] = old
        self.made[number] = value = getattr(self, "_" + tag)(*parts, old, place)
        return value

    def _items(self, states: list[Any], old: Any) -> list[Any]:
        before = list(old) if isinstance(old, list | tuple | collections.deque) else []
        values = [self.read(state, before[i] if i < len(before) else _MISSING) for i, state in enumerate(states)]
        if any(value is _MISSING for value in values):
            raise ValueError("a container holds objects that cannot be saved")
        return values

    def _tuple(self, states: list[Any], old: Any) -> Any:
        return tuple(self._items(states, old))

    def _scalar(self, dtype: Any, data: bytes | None, old: Any) -> Any:
        array = np.zeros((), np.lib.format.descr_to_dtype(dtype))
        return np.frombuffer(data, array.dtype)[0] if data else array[()]

    def _enum(self, name: str, member: str, flags: Any, old: Any) -> Any:
        kind = type(old) if _what(type(old)) == name else _find(name)
        if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
            _wrong(f"the choice {member}", old)
        return kind[member] if flags is None else kind(flags)

    def _made(self, name: str, arguments: Any, old: Any) -> Any:
        return _MADE_BY_NAME[name](*self.read(arguments, _MISSING))

    def _dtype(self, descr: Any, old: Any) -> Any:
        of_torch = isinstance(descr, str) and descr.startswith("torch.")
        return getattr(torch, descr[6:]) if of_torch else np.lib.format.descr_to_dtype(descr)

    def _named(self, name: str, old: Any) -> Any:
        if isinstance(old, (type, types.ModuleType, *_FUNCTIONS)) and _what(old) == name:
            return old
        found = _find(name)  # only code of the environment's own: it may be called with whatever the file says
        if found is None or name.partition(":")[0].partition(".")[0] not in self.roots:
            _wrong(name, old)
        return found

    def _class(self, name: str, number: int) -> Any:
        kind = _find(name)
        if kind in (*_BASES, collections.Counter, types.SimpleNamespace) and number:
            return kind
        ours = isinstance(kind, type) and _root(kind) not in sys.stdlib_module_names and not issubclass(kind, gym.Env)
        if ours and number and _plain_base(kind) and not hasattr(kind, "__del__"):
            return kind
        raise ValueError(f"there is no {name.replace(':', '.')} here")

    def _objects(self, shape: Any, states: list[Any], old: Any, place: Any) -> Any:
        new = np.empty(shape, object)
        before = list(old.ravel()) if type(old) is np.ndarray and old.dtype == object else ()
        for i, item in enumerate(self._items(states, before)):
            new.reshape(-1)[i] = item
        return self._into(old, new, place)

    def _array(
        self, dtype: Any, shape: Any, axes: Any, data: Any, key: Any, writeable: bool, old: Any, place: Any
    ) -> Any:
        if key is not None:
            if (
                type(old) is np.ndarray
                and old.nbytes >= LARGE
                and _hash(_as_in_memory(old)[0]) == key
                and place is None
            ):
                return old
            data = self.large[key]
        new = np.frombuffer(data or b"", np.lib.format.descr_to_dtype(dtype)).reshape(shape)
        new = new.transpose(np.argsort(axes)).copy(order="K")
        new.flags.writeable = writeable
        return self._into(old, new, place)

    def _into(self, old: Any, new: np.ndarray, place: Any) -> Any:
        """`new`, as it may be a constant of the environment's module; but what a module names is changed in place."""
        if type(old) is not np.ndarray or (old.dtype, old.shape) != (new.dtype, new.shape) or place is None:
            return new
        if new.dtype == object or old.tobytes() != new.tobytes():
            self.fills.append(functools.partial(np.copyto, old, new))
        return old

    def _view(
        self, base: Any, dtype: Any, shape: Any, strides: Any, offset: int, writeable: bool, old: Any, place: Any
    ) -> Any:
        whole = self.read(base, getattr(old, "base", _MISSING))
        new = np.ndarray(shape, np.lib.format.descr_to_dtype(dtype), _as_in_memory(whole)[0], offset, strides)
        new.flags.writeable = writeable
        return new

    def _tensor(
        self, data: Any, dtype: Any, at: Any, kind: tuple[bool, bool], device: str, grad: Any, old: Any, place: Any
    ) -> Any:
        array = self.read(data, _MISSING)
        key = id(array), device
        if key not in self.storages:
            self.storages[key] = array, torch.from_numpy(array).untyped_storage().clone().to(device=device)
        new = torch.empty(0, dtype=self.read(dtype, None), device=device).set_(self.storages[key][1], *at)
        new = torch.nn.Parameter(new, kind[1]) if kind[0] else new.requires_grad_(kind[1])
        new.grad = self.read(grad, _MISSING)
        if place is not None:
            self.fills.append(lambda: old.data.copy_(new.data))
            return old
        return new

    def _generator(self, bits: Any, old: Any, place: Any) -> Any:
        bits = self.read(bits, old.bit_generator if place is not None else _MISSING)
        return old if place is not None else np.random.Generator(bits)

    def _bits(self, name: str, state: Any, seed: Any, old: Any, place: Any) -> Any:
        state, seed = self.read(state, _MISSING), self.read(seed, _MISSING)
        if old is _MISSING:
            entropy, key, pool, children = seed or (None, (), 4, 0)
            sequence = np.random.SeedSequence(entropy, spawn_key=key, pool_size=pool, n_children_spawned=children)
            old = {kind.__name__: kind for kind in _BITS}[name](seed and sequence)
            old.state = state
        self.fills.append(lambda: setattr(old, "state", state))
        return old

    def _random(self, name: str, state: Any, old: Any, place: Any) -> Any:
        state = self.read(state, _MISSING)
        state = torch.from_numpy(state) if name == "Generator" else state
        kind = {"RandomState": np.random.RandomState, "Random": random.Random, "Generator": torch.Generator}[name]
        new: Any = old if type(old) is kind else kind()
        change = functools.partial(new.setstate if name == "Random" else new.set_state, state)
        self.fills.append(change) if new is old else change()
        return new

    def _method(self, owner: Any, name: str, old: Any, place: Any) -> Any:
        owner = self.read(owner, getattr(old, "__self__", _MISSING))
        function = getattr(type(owner), name, None)
        if isinstance(owner, type | types.ModuleType) or not callable(function):
            found = getattr(owner, name, None)
            return found if getattr(found, "__self__", None) is owner else _wrong(name, old)
        return function.__get__(owner)

    def _partial(self, function: Any, arguments: Any, keywords: Any, old: Any, place: Any) -> Any:
        parts = zip((function, arguments, keywords), ("func", "args", "keywords"), strict=True)
        function, arguments, keywords = (self.read(state, getattr(old, name, _MISSING)) for state, name in parts)
        return functools.partial(function, *arguments, **keywords)

    def _function(self, code: str, cells: list[Any], rest: Any, old: Any, place: Any) -> Any:
        if not isinstance(old, types.FunctionType) or _code(old.__code__) != code:
            _wrong("a function without a name", old)
        for cell, state in zip(old.__closure__ or (), cells, strict=True):
            self.fills.append(functools.partial(setattr, cell, "cell_contents", self.read(state, cell.cell_contents)))
        defaults, keywords, attributes = self.read(rest, (old.__defaults__, old.__kwdefaults__, vars(old)))
        for name, value in (("__defaults__", defaults), ("__kwdefaults__", keywords), ("__dict__", attributes)):
            self.fills.append(functools.partial(setattr, old, name, value))
        return old

    def _model(self, key: str, old: Any, place: Any) -> Any:
        if type(old).__name__ != "MjModel" or _hash(_model(old)) != key:
            _wrong("another MjModel", old)
        return old

    def _mujoco(self, data: bytes, model: Any, old: Any, place: Any) -> Any:
        import mujoco

        saved = mujoco.MjData.__new__(mujoco.MjData)
        saved.__setstate__(zlib.decompress(data))
        if type(old) is not mujoco.MjData or self.read(model, old.model) is not old.model:
            _wrong("MjData", old)
        # In place: the environment and its renderer both hold it.
        self.fills.append(lambda: mujoco.mj_copyData(old, old.model, saved))
        return old

    def _ale(self, data: bytes, old: Any, place: Any) -> Any:
        import ale_py

        if not isinstance(old, ale_py.ALEInterface):
            _wrong("a game", old)
        self.fills.append(lambda: old.restoreState(ale_py.ALEState(data)))
        return old

    def _replay(self, history: Any, space: Any, old: Any, place: Any) -> Any:
        if not isinstance(old, Replayed):
            _wrong("a Box2D world", old)
        history = self.read(history, _MISSING)
        self.fills.append(lambda: old.replay(*history))
        self.read(space, old.env.unwrapped.action_space)
        return old

    def _inner(self, replayed: Any, old: Any, place: Any) -> Any:
        return self.read(replayed, _MISSING).env

    def _object(self, tag: str, kind: Any, parts: list[Any], old: Any, number: int) -> Any:
        content, state, slots, shared = parts
        base = _plain_base(kind)
        fresh = type(old) is not kind
        if fresh and number == 0:
            _wrong(f"{kind.__module__}.{kind.__qualname__}", old)
        if base in _MUTABLE or base is object:
            new = base.__new__(kind) if fresh else old
            self.made[number] = new  # it may hold itself
        before = {} if fresh else old
        if tag == "own":
            own = self.read(content, _MISSING)
            self.fills.append(lambda: new.set_state(own))
        elif base in _MAPPINGS:
            if base is collections.defaultdict:
                factory = self.read(content[0], getattr(before, "default_factory", _MISSING))
                content = content[1]
            pairs = []
            for key_state, item in content:
                key = self.read(key_state, _MISSING)
                pairs.append((key, *self._items([item], [base.get(before, key)] if key in before else [])))
        elif base is bytearray or base in (int, float, complex, str, bytes):
            content = self.read(content, _MISSING)
        elif base is collections.deque:
            content = content[0], self._items(content[1], before)
        elif base is not object:
            content = self._items(content, before)
        if base not in _MUTABLE and base is not object:
            new = base.__new__(kind, content)
            self.made[number] = new
        attributes = {} if fresh or not hasattr(old, "__dict__") else vars(old)
        values = {name: self.read(item, attributes.get(name, _MISSING)) for name, item in state.items()}
        members = _slots(kind)
        olds = [s.__get__(old) if not fresh and _has(s, old) else _MISSING for s in members]
        slot_values = [self.read(item, o) for item, o in zip(slots, olds, strict=False)]
        for owner in kind.__mro__:
            names = dict(shared).get(_what(owner), {})
            for name, item in names.items():
                value = self.read(item, vars(owner).get(name, _MISSING))
                if value is not vars(owner).get(name):
                    self.fills.append(functools.partial(type.__setattr__, owner, name, value))

        def fill() -> None:
            if base in _MAPPINGS and tag == "object":
                base.clear(new)
                for key, value in pairs:
                    base.__setitem__(new, key, value)
                if base is collections.defaultdict:
                    new.default_factory = factory
            elif base is collections.deque:
                base.__init__(new, content[1], content[0])
            elif base in _MUTABLE:
                base.__init__(new, content)
            if values or attributes:
                for stale in vars(new).keys() - values.keys() if tag == "object" else ():
                    del vars(new)[stale]
                vars(new).update({name: value for name, value in values.items() if value is not _MISSING})
            for slot, value in zip(members, slot_values, strict=False):
                if value is not _MISSING:
                    slot.__set__(new, value)
                elif _has(slot, new):
                    slot.__delete__(new)

        if fresh:
            fill()  # it may be a key, and its hash may depend on its attributes
        if not fresh or base is set or base in _MAPPINGS:
            self.fills.append(fill)  # once more, in case the hash of an item has changed
        return new


def _wrong(saved: str, old: Any) -> Any:
    there = "nothing" if old is _MISSING else _what(type(old)).replace(":", ".")
    raise ValueError(f"the snapshot has {saved} where this environment has {there}")
