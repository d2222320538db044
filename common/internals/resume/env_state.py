"""The exact state of an environment and its wrappers, from which another process continues.

    state = snapshot(env)         # between two steps
    restore(another_env, state)   # made in the same way; continues as `env` would have

`snapshot` visits every object that can be reached from the environment. Each must have a type with a rule that
restores it exactly; for any other type, a TypeError names it and the attribute. docs/faults.md lists both, and what is
outside. An object that is reached twice is one object afterwards, and what a global variable or class attribute refers
to remains that object. Environments with `get_state()` and `set_state(state)` are not searched: their state, random
generator and spaces are saved. Large arrays are saved by hash, and only if they changed since the environment was made.

A file cannot run code: nothing is unpickled or imported. An object without a counterpart in the environment restored to
is made without its constructor; its class must be imported, be outside of the standard library and have no `__del__`.
Functions must belong to gymnasium or to the package of an object that the environment has.
"""

import collections
import contextlib
import datetime
import enum
import functools
import hashlib
import inspect
import pathlib
import random
import sys
import types
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch

from common.internals.resume.action_log import ActionLog

LARGE = 1 << 16  # bytes from which an array is saved by its hash
_MISSING: Any = object()
_ATOMS = {type(None), bool, int, float, str}
_LIBRARIES = {"gymnasium", "numpy", "torch", "mujoco", "ale_py", "Box2D", "pygame", "common", *sys.stdlib_module_names}


def snapshot(value: Any, constants: Mapping[str, Any] | None = None) -> list[Any]:
    """The state of an environment, or of another object that has attributes (a space, say).

    Args:
        constants: what `large_arrays` returned when the environment was made.

    Returns:
        [state, its large arrays by hash (bytes; None for a constant), approximate size in bytes].

    Raises TypeError, with attribute and type, if a type is not known to be restored exactly.
    """
    writer = _Writer(constants or {})
    return [writer.write(value), writer.large, writer.size]


def large_arrays(env: Any) -> dict[str, np.ndarray]:
    """The large arrays that can be reached from `env`, by hash."""
    writer = _Writer(None)
    with contextlib.suppress(Exception):  # `snapshot` reports what cannot be saved
        writer.write(env)
    return writer.arrays


def restore(value: Any, state: list[Any], constants: Mapping[str, Any] | None = None) -> None:
    """Puts `value` into the state that `snapshot` took of an object made in the same way.

    Raises ValueError if it was made in another way, before anything but a reset was done to it, or if a replayed
    episode ends in another state.
    """
    reader = _Reader(state[1], constants or {})
    for env in value if type(value) is tuple else [value]:
        if isinstance(env, gym.Env):
            env.reset(seed=0)  # some attributes exist only after the first reset
    if reader.read(state[0], value) is not value:
        raise ValueError("the snapshot is of another kind of environment")
    for change in reader.changes:
        change()


class _Globals:
    """The objects that global variables and class attributes refer to, which have the same names in every process."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.names: dict[int, str] = {}  # by id
        self.packages = set(_LIBRARIES)

    def add_packages(self, kind: Any) -> None:
        """Adds the objects of the packages of the class `kind` and its bases."""
        new = {_package(owner) for owner in getattr(kind, "__mro__", ())} - self.packages
        self.packages |= new
        for name, module in list(sys.modules.items()) if new else ():
            if name.partition(".")[0] in new:
                self._add(name, vars(module), 3)

    def _add(self, prefix: str, values: Mapping[Any, Any], depth: int) -> None:
        for key, value in list(values.items()):
            name, kind = f"{prefix}.{key}", type(value)
            if isinstance(value, type) and name == _name(value).replace(":", "."):
                self._add(name, vars(value), 3)
            other = isinstance(value, type | types.ModuleType | types.FunctionType | gym.Env)
            if other or kind in _ATOMS or str(key).startswith("__"):
                continue
            self.objects[name] = value
            self.names.setdefault(id(value), name)
            if depth and kind in (list, tuple, dict) and len(value) <= 1000:
                self._add(name, dict(enumerate(value.values() if kind is dict else value)), depth - 1)


class _Writer(_Globals):
    def __init__(self, constants: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.constants = constants  # None: only look for large arrays
        self.numbers: dict[int, tuple[int, Any]] = {}  # by id; the object is held, so that its id is not used again
        self.dicts: dict[int, Any] = {}  # by id: the __dict__ of each object
        self.large: dict[str, bytes | None] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self.size, self.owner, self.path = 0, "it", [""]

    def write(self, value: Any, name: str = "") -> Any:
        """None, numbers and text as they are; else (type, states of its parts, number, global name), or a reference."""
        kind = type(value)
        self.size += 8
        if kind in _ATOMS:
            return value
        if (isinstance(value, types.ModuleType) or callable(value)) and _find(_name(value)) is value:
            return ("named", _name(value))
        if id(value) in self.numbers:
            return ("same", self.numbers[id(value)][0])
        number = len(self.numbers)
        self.numbers[id(value)] = number, value
        self.add_packages(kind)
        outside = self.owner, self.path
        self.path = [*self.path, name]
        try:
            parts = self._parts(value, kind)
        except ValueError as error:
            path = ".".join(filter(None, self.path)).replace(".[]", "[]")
            what = f"{_name(kind).removeprefix('builtins:').replace(':', '.')} {error}".strip()
            an = "an" if what[0] in "aeiouAEIOU" else "a"
            raise TypeError(f"attribute `{path}` of {self.owner} is {an} {what}, which cannot be saved") from None
        states: Any
        if isinstance(value, gym.Env):
            self.owner, self.path = kind.__name__, []
        if isinstance(parts, dict):
            states = {key: self.write(part, key if type(key) is str else key[1]) for key, part in parts.items()}
        else:
            states = [self.write(part, "[]" if isinstance(value, tuple) else "") for part in parts]
        self.owner, self.path = outside
        return (_name(kind), states, number, self.names.get(id(value)))

    def _parts(self, value: Any, kind: Any) -> Any:
        rule = _rule(kind)
        if kind is np.ndarray:
            return self._array(value)
        if rule is None or (kind is object and id(value) not in self.names):
            raise ValueError
        attributes = getattr(value, "__dict__", value)
        if id(attributes) in self.dicts:
            raise ValueError("that shares its __dict__")
        self.dicts[id(attributes)] = attributes
        self.size += len(value) if kind is bytes else 0
        parts = rule.parts(value)
        if self.constants is not None and _has_own_state(value):
            parts["get_state()"] = value.get_state()
        return parts

    def _array(self, value: np.ndarray) -> tuple[Any, ...]:
        """dtype, shape, strides, whether it is writeable, offset, and memory: another array, bytes, or their hash."""
        if value.dtype.hasobject or np.dtype(value.dtype.str) != value.dtype:
            raise ValueError(f"of {value.dtype}")
        layout = value.dtype.str, value.shape, value.strides, value.flags.writeable
        base: Any = value.base
        if type(base) is np.ndarray and _in_memory_order(base).flags.c_contiguous:
            return (*layout, value.__array_interface__["data"][0] - base.__array_interface__["data"][0], base)
        of_ale = type(getattr(base, "obj", None)).__name__ == "nb_ndarray" and "ale_py" in sys.modules  # a copy
        block = _in_memory_order(value)
        if not block.flags.c_contiguous or not (base is None or type(base) is bytes or of_ale):
            raise ValueError(f"over the memory of a {type(base).__name__}")
        if value.nbytes < LARGE:
            return (*layout, 0, block.tobytes())
        key = _hash(block)
        self.arrays[key] = value
        self.large[key] = None if self.constants is None or key in self.constants else block.tobytes()
        self.size += len(self.large[key] or b"")
        return (*layout, 0, key)


class _Reader(_Globals):
    """Makes values from their states, given their counterparts (`old`) in the environment restored to.

    A counterpart of the same type becomes the value. It is changed at the end, by `changes`, when nothing can fail.
    """

    def __init__(self, large: Mapping[str, bytes | None], constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.large, self.constants = large, constants
        self.made: dict[int, Any] = {}
        self.taken: dict[int, Any] = {}  # by id: each is the counterpart of one object only
        self.changes: list[Callable[[], Any]] = []
        self.callable_packages = {"gymnasium"}

    def read(self, state: Any, old: Any = _MISSING) -> Any:
        if not isinstance(state, tuple):
            return state
        if state[0] == "same":
            return self.made[state[1]] if state[1] in self.made else _differs("a tuple that holds itself", old)
        if state[0] == "named":
            found = old if _name(old) == state[1] else _find(state[1])
            package = state[1].partition(":")[0].partition(".")[0]
            allowed = found is old or package in self.callable_packages  # it may be called with values from the file
            return found if found is not None and allowed else _differs(state[1], old)
        what, states, number, name = state
        kind = type(old) if _name(type(old)) == what else _find(what)
        self.add_packages(kind)
        if name is not None:
            old = self.objects[name] if name in self.objects else _differs(name, _MISSING)
        elif id(old) in self.names:
            old = _MISSING
        if what not in _OUTPUT and (type(old) is not kind or id(old) in self.taken):
            old = _MISSING
        self.taken[id(old)] = old
        if kind is np.ndarray:
            value = self._array(old, name is not None, states)
        else:
            value = self._object(kind, what, states, number, name, old)
        self.made[number] = value
        return value

    def _object(self, kind: Any, what: str, states: Any, number: int, name: str | None, old: Any) -> Any:
        rule: Any = _RULES[what] if what in _OUTPUT else _rule(kind) if isinstance(kind, type) else None
        if rule is None:
            _differs(what, old)
        if old is not _MISSING:
            self.callable_packages |= {_package(owner) for owner in type(old).__mro__} - _LIBRARIES
        if rule.change is _set_attributes and _hashed_by_value(kind) and name is None and _may_be_made(kind):
            old = _MISSING  # a dict may need its hash before the end, and thus its attributes
        by_name = isinstance(states, dict)
        olds: Any = rule.parts(old) if old is not _MISSING else {} if by_name else ()
        if rule.make is None:
            self.made[number] = new = _new(kind, what) if old is _MISSING else old
        values: Any
        if by_name:
            values = {key: self.read(part, olds.get(key, _MISSING)) for key, part in states.items()}
        else:
            values = [self.read(part, olds[i] if i < len(olds) else _MISSING) for i, part in enumerate(states)]
        if rule.change is None:
            pairs = zip(values, olds, strict=False)
            same = [one is two or (type(one) in _ATOMS and repr(one) == repr(two)) for one, two in pairs]
            if old is not _MISSING and len(values) == len(olds) and all(same):
                return old
            return _differs(f"another {what}", old) if rule.make is None else rule.make(*values)
        change = functools.partial(rule.change, new, *([values] if by_name else values))
        if old is _MISSING:
            change()
        else:
            self.changes.append(change)
        return new

    def _array(self, old: Any, is_global: bool, states: list[Any]) -> Any:
        dtype, shape, strides, writeable, offset, memory = map(self.read, states)
        if isinstance(memory, np.ndarray):
            new = np.ndarray(shape, _dtype(dtype), _in_memory_order(memory), offset, strides)
        else:
            data = self.large[memory] if isinstance(memory, str) else memory
            if data is None:
                data = _in_memory_order(self.constants.get(memory, np.zeros(0))).tobytes()
                if _hash(np.frombuffer(data, np.uint8)) != memory:
                    raise ValueError("a large array that never changed differs here: is it drawn without a seed?")
            new = np.ndarray(shape, _dtype(dtype), bytearray(data), 0, strides).copy(order="K")
        new.flags.writeable = writeable
        if not is_global:
            return new
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            _differs(f"an array {new.shape} of {new.dtype}", old)
        self.changes.append(functools.partial(np.copyto, old, new))
        return old


class _Rule(NamedTuple):
    """How objects of a type are restored. Without `make` and `change`: a counterpart with equal parts is kept."""

    parts: Callable[[Any], Any]  # what determines an object: a tuple, or attributes by name
    make: Callable[..., Any] | None = None  # makes an immutable object of its parts
    change: Callable[..., Any] | None = None  # change(object, *parts) changes an object, to have these parts


@functools.cache
def _rule(kind: Any) -> _Rule | None:
    """The rule for a type; None if it is not known to be restored exactly."""
    if _name(kind) in _RULES:
        return _RULES[_name(kind)]
    if issubclass(kind, enum.Enum):
        return _Rule(lambda member: (member._value_,), make=kind)
    if issubclass(kind, tuple) and hasattr(kind, "_fields") and not kind.__dictoffset__:
        return _Rule(tuple, make=lambda *items: tuple.__new__(kind, items))
    places = len(_slots(kind)) + (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    if kind.__basicsize__ > object.__basicsize__ + 8 * places or kind.__itemsize__:
        return None  # it has memory that Python cannot see
    if _hashed_by_value(kind) and not _may_be_made(kind) and not issubclass(kind, gym.Env):
        return None
    return _Rule(_attributes, change=_set_attributes)


def _attributes(value: Any) -> dict[Any, Any]:
    """The attributes in __dict__ and __slots__ by name, and those of its classes by class and name."""
    attributes: dict[Any, Any] = dict(getattr(value, "__dict__", {}))
    if _has_own_state(value):
        beside = ("_np_random", "_np_random_seed", "action_space", "observation_space")
        return {name: attributes[name] for name in beside if name in attributes}
    for name, slot in _slots(type(value)).items():
        with contextlib.suppress(AttributeError):  # not set
            attributes[name] = slot.__get__(value)
    for owner in type(value).__mro__:
        for name, item in vars(owner).items() if _package(owner) not in _LIBRARIES else ():
            if not (name.startswith(("__", "_abc_")) or hasattr(type(item), "__get__") or isinstance(item, type)):
                attributes[_name(owner), name] = item
    return attributes


def _set_attributes(value: Any, attributes: dict[Any, Any]) -> None:
    if "get_state()" in attributes:
        value.set_state(attributes.pop("get_state()"))
        vars(value).update(attributes)
        return
    for name, slot in _slots(type(value)).items():
        with contextlib.suppress(AttributeError):  # not set
            slot.__set__(value, attributes.pop(name)) if name in attributes else slot.__delete__(value)
    getattr(value, "__dict__", {}).clear()
    owners = {_name(owner): owner for owner in type(value).__mro__ if _package(owner) not in _LIBRARIES}
    for key, item in attributes.items():
        if type(key) is str:
            vars(value)[key] = item
        elif vars(owners[key[0]]).get(key[1], _MISSING) is not item:
            setattr(owners[key[0]], key[1], item)


def _has_own_state(value: Any) -> bool:
    """Whether it is an environment with get_state() and set_state(state); MujocoEnv's takes qpos and qvel."""
    if not isinstance(value, gym.Env) or isinstance(value, gym.Wrapper):
        return False
    try:
        inspect.signature(value.get_state).bind()  # type: ignore[attr-defined]
        inspect.signature(value.set_state).bind(None)  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        return False
    return True


def _find(name: str) -> Any:
    """What is called `name`, "module:a.b", in a module that is imported; None if nothing is."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in filter(None, path.split(".")):
        found = getattr(found, part, None)
    return found


def _name(value: Any) -> str:
    if isinstance(value, types.ModuleType):
        return value.__name__
    return f"{getattr(value, '__module__', None)}:{getattr(value, '__qualname__', None)}"


def _package(kind: Any) -> str:
    return str(getattr(kind, "__module__", None)).partition(".")[0]


def _slots(kind: type) -> dict[str, Any]:
    of_classes = [vars(owner) for owner in kind.__mro__ if "__slots__" in vars(owner)]
    return {k: slot for names in of_classes for k, slot in names.items() if type(slot) is types.MemberDescriptorType}


def _hashed_by_value(kind: Any) -> bool:
    return kind.__hash__ not in (None, object.__hash__)


def _may_be_made(kind: Any) -> bool:
    """Whether objects of a class may be made without its constructor."""
    return not (_package(kind) in sys.stdlib_module_names or issubclass(kind, gym.Env) or hasattr(kind, "__del__"))


def _new(kind: Any, what: str) -> Any:
    if kind is types.SimpleNamespace or (what in _RULES and what not in _IN_PLACE):
        return kind()
    return object.__new__(kind) if what not in _RULES and _may_be_made(kind) else _differs(what, _MISSING)


def _differs(saved: str, old: Any) -> Any:
    there = "nothing of that kind" if old is _MISSING else _name(type(old)).replace(":", ".")
    raise ValueError(f"the snapshot has {saved.replace(':', '.')} where this environment has {there}")


def _hash(array: np.ndarray) -> str:
    return hashlib.sha1(np.ascontiguousarray(array).data.cast("B"), usedforsecurity=False).hexdigest()


def _in_memory_order(array: np.ndarray) -> np.ndarray:
    """`array` with its axes from the slowest to the fastest. The last bits of a sum can depend on their order."""
    return array.transpose(sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis])))


def _dtype(name: str) -> np.dtype:
    dtype = np.dtype(name)
    if dtype.hasobject:
        raise ValueError("an array of objects cannot be made of bytes, which would be their addresses")
    return dtype


def _scalar(dtype: str, data: bytes) -> Any:
    return np.ndarray((), _dtype(dtype), bytearray(data))[()]


def _fill_mapping(mapping: Any, keys: Any, values: Any, *factory: Any) -> None:
    mapping.clear()
    for key, value in zip(keys, values, strict=True):
        mapping[key] = value
    if factory:
        mapping.default_factory = factory[0]


def _parts_of_function(function: Any) -> tuple[Any, ...]:
    """What tells functions apart that cannot be found by name, and what they hold."""
    code = function.__code__
    place = f"{function.__module__} {code.co_qualname} {code.co_firstlineno} {code.co_linetable.hex()}"
    keywords, attributes = function.__kwdefaults__ or {}, vars(function)
    return (place, function.__closure__, function.__defaults__, tuple(keywords.items()), tuple(attributes.items()))


def _parts_of_model(model: Any) -> tuple[str]:
    import mujoco

    data = np.zeros(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, data)
    return (_hash(data),)


def _set_mujoco(data: Any, saved: bytes, model: Any) -> None:
    import mujoco

    new = mujoco.MjData.__new__(mujoco.MjData)
    new.__setstate__(zlib.decompress(saved))
    mujoco.mj_copyData(data, model, new)


def _parts_of_ale(ale: Any) -> tuple[bytes]:
    if ale.getFloat("repeat_action_probability") > 0:
        raise ValueError("with sticky actions")
    return (ale.cloneState(include_rng=True).serialize(),)


def _set_ale(ale: Any, saved: bytes) -> None:
    import ale_py

    ale.restoreState(ale_py.ALEState(saved))


def _set_cell(cell: Any, contents: Any) -> None:
    cell.cell_contents = contents


def _seed_sequence(entropy: Any, spawn_key: Any, pool_size: int, spawned: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(entropy, spawn_key=spawn_key, pool_size=pool_size, n_children_spawned=spawned)


_OUTPUT = {  # of the environment restored to, which keeps it
    *("pygame.surface:Surface", "pygame.time:Clock", "pygame.font:Font", "pygame.mixer:Sound", "logging:Logger"),
    *("logging:RootLogger", "re:Pattern", "mujoco.renderer:Renderer", "gymnasium.envs.registration:EnvSpec"),
    "gymnasium.envs.mujoco.mujoco_rendering:MujocoRenderer",
}
_IN_PLACE = {"builtins:cell", "builtins:function", "mujoco._structs:MjModel", "mujoco._structs:MjData"}
_IN_PLACE |= {"ale_py._ale_py:ALEInterface", _name(ActionLog), *_OUTPUT}
_BIT_GENERATORS = (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
_SCALARS = set(np.sctypeDict.values()) - {np.object_, np.void}
_DATES = (datetime.date, datetime.time, datetime.datetime, datetime.timedelta)
_BITS = _Rule(lambda bits: (bits.state, bits.seed_seq), change=lambda bits, *state: bits.__setstate__(state))
_MAPPING = _Rule(lambda mapping: (tuple(mapping), tuple(mapping.values())), change=_fill_mapping)
_RANGE = _Rule(lambda value: (value.start, value.stop, value.step), make=range)
_SCALAR = _Rule(lambda x: (x.dtype.str, x.tobytes()), make=_scalar)
_RULES = {name: _Rule(lambda value: ()) for name in _OUTPUT}
_RULES |= {_name(kind): _SCALAR for kind in _SCALARS}
_RULES |= {_name(type(np.dtype(kind))): _Rule(lambda dtype: (dtype.str,), make=np.dtype) for kind in _SCALARS}
_RULES |= {_name(kind): _BITS for kind in _BIT_GENERATORS}
_RULES |= {_name(kind): _MAPPING for kind in (dict, collections.OrderedDict, collections.Counter)}
_RULES |= {_name(kind): _Rule(lambda date: date.__reduce__()[1], make=kind) for kind in _DATES}
_RULES |= {
    "builtins:tuple": _Rule(tuple, make=lambda *items: items),
    "builtins:frozenset": _Rule(lambda items: (tuple(items),), make=frozenset),
    "builtins:bytes": _Rule(lambda data: (data.decode("latin1"),), make=lambda text: text.encode("latin1")),
    "builtins:complex": _Rule(lambda number: (number.real, number.imag), make=complex),
    "builtins:range": _RANGE,
    "builtins:slice": _RANGE._replace(make=slice),
    "builtins:list": _Rule(lambda items: (tuple(items),), change=list.__init__),
    "builtins:set": _Rule(lambda items: (tuple(items),), change=set.__init__),
    "builtins:function": _Rule(_parts_of_function),
    "builtins:cell": _Rule(lambda cell: (cell.cell_contents,), change=_set_cell),
    "builtins:method": _Rule(lambda method: (method.__func__, method.__self__), make=types.MethodType),
    "mujoco._structs:MjModel": _Rule(_parts_of_model),
    "mujoco._structs:MjData": _Rule(
        lambda data: (zlib.compress(data.__getstate__(), 1), data.model), change=_set_mujoco
    ),
    "ale_py._ale_py:ALEInterface": _Rule(_parts_of_ale, change=_set_ale),
    _name(type(pathlib.Path())): _Rule(lambda path: (str(path),), make=pathlib.Path),
    _name(collections.deque): _Rule(lambda items: (tuple(items), items.maxlen), change=collections.deque.__init__),
    _name(collections.defaultdict): _Rule(lambda d: (*_MAPPING.parts(d), d.default_factory), change=_fill_mapping),
    _name(np.random.Generator): _Rule(lambda rng: (rng.bit_generator,), make=np.random.Generator),
    _name(np.random.SeedSequence): _Rule(
        lambda seed: (seed.entropy, seed.spawn_key, seed.pool_size, seed.n_children_spawned), make=_seed_sequence
    ),
    _name(random.Random): _Rule(lambda rng: (rng.getstate(),), change=random.Random.setstate),
    _name(np.random.RandomState): _Rule(
        lambda rng: (rng.get_state(legacy=False),), change=np.random.RandomState.set_state
    ),
    _name(torch.Generator): _Rule(
        lambda rng: (rng.get_state().numpy().copy(),), change=lambda rng, state: rng.set_state(torch.from_numpy(state))
    ),
    _name(ActionLog): _Rule(
        lambda env: (env.unwrapped.action_space, *env.history()),
        change=lambda env, space, *history: env.replay(*history),
    ),
}
