"""Snapshots of an environment and all its wrappers, exact to the bit, that a new process can go on from.

    state = snapshot(env)         # at any moment between two steps
    restore(another_env, state)   # made in the same way; goes on as `env` would have

All that can be reached from the environment is walked through. Each object must be of a type that is known to be
restored exactly; any other is refused by its name. What is reached twice is one object afterwards, and what a module or
class names stays that object. docs/faults.md lists what is exact, refused, and outside. Some types need a word:

Environments with `get_state()` and `set_state(state)`: these two, the random generator and the spaces.
MuJoCo: all of MjData. The state vectors of `mj_getState`, even mjSTATE_INTEGRATION, leave out derived quantities
    of the last step that Ant and Humanoid observe and reward. MjModel must be as it was made.
Box2D of gymnasium, and ALE's vector environment: the running episode is played again: see action_log.
Atari: ALE's system state, its random generator included; no games with sticky actions, as it leaves out the action
    that may be repeated (in 7 of 40 trials the restored game went another way).
Windows, fonts, loggers: output only, so they stay what they are in the environment restored to.
Large arrays: what was there when the environment was made and has not changed is not saved; others by their hash.

A file cannot run code: nothing is pickled or imported. Missing objects are made without a constructor, `__setstate__`
or `__reduce__`, of imported classes outside of the standard library that have no `__del__`; functions and classes are
looked up by name in the environment's own packages only.
"""

import collections
import contextlib
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
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from common.internals.resume.action_log import Replayed

LARGE = 1 << 16  # bytes of an array that is saved by its hash
_MISSING: Any = object()
_ATOMS = {type(None), bool, int, float, str}
_MUTABLE = (collections.defaultdict, collections.OrderedDict, dict, list, set, collections.deque, bytearray)
_BASES: tuple[Any, ...] = (*_MUTABLE, tuple, frozenset, object)  # the built-in types that a class may extend
_LIBRARIES = {"gymnasium", "numpy", "torch", "mujoco", "ale_py", "Box2D", "pygame", "common", *sys.stdlib_module_names}
_MADE = {complex, range, slice, decimal.Decimal, fractions.Fraction, type(pathlib.Path()), pathlib.PurePosixPath}
_MADE |= {datetime.date, datetime.time, datetime.datetime, datetime.timedelta, datetime.timezone}  # from arguments


def snapshot(value: Any, constants: Mapping[str, Any] | None = None) -> list[Any]:
    """The state of an environment, or of anything else that has attributes (a space, say), which stays unchanged.

    Args:
        constants: what `large_arrays` found when the environment was made.

    Returns:
        The state, its large arrays by hash (None for a constant, else its bytes), and about how many bytes all take.

    Raises TypeError, which names attribute and type, where something is found that is not known to be saved exactly.
    """
    writer = _Writer(constants or {})
    return [writer.write(value), writer.large, writer.size]


def large_arrays(env: Any) -> dict[str, np.ndarray]:
    """The large arrays that can be reached from `env`, by hash."""
    writer = _Writer(None)
    with contextlib.suppress(Exception):  # what cannot be saved is reported when a snapshot is taken
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
    """Knows the objects that modules and classes name: they are looked up by name in both processes."""

    def __init__(self) -> None:
        python: Any = random.random
        self.named = {"random": python.__self__, "numpy": np.random.mtrand._rand, "torch": torch.default_generator}
        self.places = {id(value): place for place, value in self.named.items()}
        self.met = set(_LIBRARIES)

    def meet(self, kind: Any) -> None:
        """Notes what is named in the packages that the class `kind` and its bases are from."""
        new = {_root(owner) for owner in getattr(kind, "__mro__", ())} - self.met
        self.met |= new
        for name, module in list(sys.modules.items()) if new else ():
            if name.partition(".")[0] in new:
                self._note(name, vars(module), 3)

    def _note(self, place: str, names: Mapping[Any, Any], depth: int) -> None:
        for name, value in list(names.items()):
            path, kind = f"{place}.{name}", type(value)
            if isinstance(value, type) and path == _what(value).replace(":", "."):
                self._note(path, vars(value), 3)
            skipped = isinstance(value, type | types.ModuleType | types.FunctionType | gym.Env)
            if skipped or kind in _ATOMS or str(name).startswith("__"):
                continue
            self.named[path] = value
            self.places.setdefault(id(value), path)
            if depth and kind in (list, tuple, dict) and len(value) <= 1000:
                self._note(path, dict(enumerate(value.values() if kind is dict else value)), depth - 1)


class _Writer(_Walk):
    def __init__(self, constants: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.constants = constants  # None: only look for large arrays
        self.seen: dict[int, tuple[int, Any]] = {}  # id -> number, and the object, lest its id be given away
        self.large: dict[Any, bytes | None] = {}
        self.arrays: dict[str, Any] = {}
        self.size, self.owner, self.path = 0, "it", [""]

    def write(self, value: Any, name: str = "") -> Any:
        self.size += 8
        if type(value) in _ATOMS:
            return value
        self.path.append(name)
        state = self._write(value, type(value), _what(type(value)))
        self.path.pop()
        return state

    def _write(self, value: Any, kind: Any, what: str) -> tuple[Any, ...]:
        if kind is bytes:  # as text, which torch.save writes in the same way
            self.size += len(value)
            return ("bytes", value.decode("latin1"))
        if kind is tuple:
            return ("tuple", self._items(value, "[]"))
        if kind in _MADE:
            arguments = value.__reduce_ex__(2)[1]
            return ("made", kind.__qualname__, self.write(arguments[arguments[:1] == (kind,) :]))
        if isinstance(value, enum.Enum):
            return ("enum", what, self.write(value._value_))
        if isinstance(value, np.generic) and kind.__module__ == "numpy" and _plain(value.dtype):
            return ("scalar", value.dtype.str, self.write(value.tobytes()))
        if isinstance(value, np.dtype) and _plain(value):
            return ("dtype", value.str)
        if (isinstance(value, types.ModuleType) or callable(value)) and _find(_what(value)) is value:
            return ("named", _what(value))
        if id(value) in self.seen:
            return ("same", self.seen[id(value)][0])
        number = len(self.seen)
        self.seen[id(value)] = number, value
        self.meet(kind)
        try:
            parts = self._parts(value, kind, what)
        except ValueError as error:
            self.refuse(value, str(error))
        return (what, parts, self.places.get(id(value)), number)

    def _items(self, values: Iterable[Any], name: str = "") -> list[Any]:
        values = list(values)
        if set(map(type, values)) <= _ATOMS:
            self.size += 8 * len(values)
            return values
        return [self.write(item, name) for item in values]

    def refuse(self, value: Any, why: str) -> Any:
        name = _what(type(value)).removeprefix("builtins:").replace(":", ".")
        an = "an" if name[0] in "aeiouAEIOU" else "a"
        path = ".".join(filter(None, self.path)).replace(".[]", "[]")
        raise TypeError(f"attribute `{path}` of {self.owner} is {an} {name}{why and ' '}{why}, which cannot be saved")

    def _parts(self, value: Any, kind: Any, what: str) -> Any:
        if what in _KINDS:
            return self._items(_KINDS[what][0](value))
        if kind is np.ndarray:
            return self._items(self._array(value))
        if what == "mujoco._structs:MjModel":
            self.arrays[key := _model(value)] = value
            if self.constants and key not in self.constants:
                raise ValueError("that has changed since it was made")
            return [key]
        if _base(kind) is None or (kind is object and id(value) not in self.places):
            raise ValueError
        outside = self.owner, self.path
        if isinstance(value, gym.Env):
            self.owner, self.path = kind.__name__, []
        content, attributes = _split(value, ask=self.constants is not None)
        items = self._items(content, "get_state()" if _base(kind) is object else "")
        states = {key: self.write(item, str(key[1] if type(key) is tuple else key)) for key, item in attributes.items()}
        self.owner, self.path = outside
        return [items, states]

    def _array(self, value: np.ndarray) -> tuple[Any, ...]:
        base: Any = value.base
        if not _plain(value.dtype):
            raise ValueError(f"of {value.dtype}")
        if type(base) is np.ndarray and _as_in_memory(base)[0].flags.c_contiguous:
            offset = value.__array_interface__["data"][0] - base.__array_interface__["data"][0]
            return (value.dtype.str, value.shape, value.flags.writeable, value.strides, offset, base)
        of_ale = type(getattr(base, "obj", None)).__name__ == "nb_ndarray" and "ale_py" in sys.modules  # a copy
        if base is not None and type(base) is not bytes and not of_ale:
            raise ValueError(f"over the memory of a {type(base).__name__}")
        inner, axes = _as_in_memory(value)
        key, data = None, inner.tobytes() if value.nbytes < LARGE else None
        if data is None:
            self.arrays[key := _hash(inner)] = value
            self.large[key] = None if self.constants is None or key in self.constants else inner.tobytes()
            self.size += len(self.large[key] or b"")
        return (value.dtype.str, inner.shape, value.flags.writeable, axes, key, data)


class _Reader(_Walk):
    """Rebuilds values next to their counterparts (`old`) in the environment restored to.

    What is there already is changed at the end, by `fills`, when nothing can fail any more.
    """

    def __init__(self, large: Mapping[str, bytes | None], constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.large: dict[Any, Any] = dict(large)
        for key in (key for key, data in large.items() if data is None):
            inner = _as_in_memory(constants.get(key, np.zeros(0)))[0]
            if _hash(inner) != key:
                raise ValueError("a large array that never changed is another one here: is it drawn without a seed?")
            self.large[key] = inner.tobytes()
        self.made: dict[int, Any] = {}
        self.taken: dict[int, Any] = {}  # counterparts in use already: none stands for two objects
        self.fills: list[Callable[[], Any]] = []
        self.roots: set[str] = {"gymnasium"}  # packages of which functions and classes may be named

    def read(self, state: Any, old: Any = _MISSING) -> Any:
        if not isinstance(state, tuple):
            return state
        what, *parts = state
        if what == "same":
            return self.made[parts[0]]
        if what == "tuple":
            return self._items(parts[0], old)
        if what == "bytes":
            return parts[0].encode("latin1")
        if what == "made":
            return {kind.__qualname__: kind for kind in _MADE}[parts[0]](*self.read(parts[1]))
        if what == "scalar":
            return np.ndarray((), parts[0], bytearray(self.read(parts[1])))[()]
        if what == "dtype":
            return np.dtype(parts[0])
        if what == "enum":
            kind = type(old) if _what(type(old)) == parts[0] else _find(parts[0])
            if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
                _wrong(parts[0], old)
            return kind(self.read(parts[1]))
        if what == "named":  # it may be called with whatever the file says
            found = old if _what(old) == parts[0] else _find(parts[0])
            if found is None or (found is not old and parts[0].partition(":")[0].partition(".")[0] not in self.roots):
                _wrong(parts[0], old)
            return found
        content, place, number = parts
        kind = type(old) if _what(type(old)) == what else _find(what)
        self.meet(kind)
        if place is not None and place not in self.named:
            raise ValueError(f"{place} is missing")
        old = self.named[place] if place is not None else _MISSING if id(old) in self.places else old
        if what not in _OUTPUT and (_what(type(old)) != what or id(old) in self.taken):
            old = _MISSING
        self.taken[id(old)] = old
        if what in _IN_PLACE:
            self.made[number] = old if old is not _MISSING else _wrong(what, old)
        if what == "mujoco._structs:MjModel":
            return old if _model(old) == content[0] else _wrong("another MjModel", old)
        if kind is np.ndarray:
            value = self._array(old, *self._items(content))
        elif what in _KINDS:
            before, join = _KINDS[what]
            value = join(self, old, *self._items(content, before(old) if old is not _MISSING else ()))
        else:
            value = self._object(kind, content[0], content[1], old, number)
        self.made[number] = value
        return value

    def _items(self, states: list[Any], old: Any = ()) -> tuple[Any, ...]:
        olds = old if type(old) is tuple else ()
        return tuple(self.read(state, olds[i] if i < len(olds) else _MISSING) for i, state in enumerate(states))

    def later(self, value: Any, change: Callable[..., Any], *arguments: Any) -> Any:
        self.fills.append(functools.partial(change, *arguments))
        return value

    def _array(self, old: Any, dtype: str, shape: Any, writeable: bool, axes: Any, key: Any, data: Any) -> Any:
        if isinstance(data, np.ndarray):
            new = np.ndarray(shape, dtype, _as_in_memory(data)[0], offset=key, strides=axes)
        elif key and old is not _MISSING and old.nbytes >= LARGE and _hash(_as_in_memory(old)[0]) == key:
            return old
        else:
            new = np.ndarray(shape, dtype, bytearray(self.large[key] if key else data))
            new = new.transpose(np.argsort(axes)).copy(order="K")
        new.flags.writeable = writeable
        # A new one, as the old one may be a constant; but what a module names is changed in place.
        if id(old) not in self.places:
            return new
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            _wrong(f"an array {new.shape} of {new.dtype}", old)
        return old if old.tobytes() == new.tobytes() else self.later(old, np.copyto, old, new)

    def _object(self, kind: Any, content: Any, attributes: Any, old: Any, number: int) -> Any:
        mine = isinstance(kind, type) and number > 0 and _may_be_made(kind)
        named = old if id(old) in self.places else None
        if old is _MISSING and not mine:
            raise ValueError(f"there is no {kind and _what(kind).replace(':', '.')} to change, and it cannot be made")
        olds: Any = ((), {}) if old is _MISSING else _split(old, ask=False)
        if old is not _MISSING:
            self.roots |= {_root(owner) for owner in kind.__mro__} - _LIBRARIES
        if mine and named is None and kind.__hash__ not in (None, object.__hash__):
            old = _MISSING  # it may be a key, and its hash depends on its attributes: they must be there at once
        base = _base(kind)
        if mutable := base in _MUTABLE or base is object:
            self.made[number] = base.__new__(kind) if old is _MISSING else old  # it may hold itself
        content = self._items(content, olds[0])
        self.made[number] = new = self.made[number] if mutable else base.__new__(kind, *content)
        values = {key: self.read(state, olds[1].get(key, _MISSING)) for key, state in attributes.items()}
        if named is not None and named is not new:  # it cannot be changed
            return named if named == new else _wrong(f"another {kind.__name__}", old)
        self.later(new, _fill, new, base, content, values)
        if old is _MISSING:
            self.fills.pop()()
        return new


def _fill(new: Any, base: Any, content: tuple[Any, ...], values: dict[Any, Any]) -> None:
    if issubclass(base, dict):
        base.clear(new)
        for key, value in zip(*content[:2], strict=True):
            base.__setitem__(new, key, value)
        if base is collections.defaultdict:
            new.default_factory = content[2]
    elif base in _MUTABLE:
        base.__init__(new, *content)
    own = base is object and content
    if own:
        new.set_state(*content)
    for i, slot in enumerate(() if own else _slots(type(new))):
        with contextlib.suppress(AttributeError):
            slot.__set__(new, values[i]) if i in values else slot.__delete__(new)
    if hasattr(new, "__dict__"):
        for stale in () if own else vars(new).keys() - values.keys():
            del vars(new)[stale]
        vars(new).update({name: value for name, value in values.items() if type(name) is str})
    owners = {_what(owner): owner for owner in type(new).__mro__ if _root(owner) not in _LIBRARIES}
    for key in (key for key in values if type(key) is tuple):
        if vars(owners[key[0]]).get(key[1], _MISSING) is not values[key]:
            type.__setattr__(owners[key[0]], key[1], values[key])


def _split(value: Any, ask: bool) -> tuple[tuple[Any, ...], dict[Any, Any]]:
    """The content of an object, as its built-in base takes it, and its attributes; slots by number, those of classes by
    class and name.

    Args:
        ask: whether an environment's own get_state() is called.
    """
    base, attributes = _base(type(value)), dict(getattr(value, "__dict__", {}))
    for owner in type(value).__mro__:
        for name, item in vars(owner).items() if _root(owner) not in _LIBRARIES else ():
            if not (name.startswith(("__", "_abc_")) or hasattr(type(item), "__get__") or isinstance(item, type)):
                attributes[_what(owner), name] = item
    own = isinstance(value, gym.Env) and not isinstance(value, gym.Wrapper)
    if own and _takes(getattr(value, "get_state", None)) and _takes(getattr(value, "set_state", None), None):
        names = attributes.keys() & {"_np_random", "_np_random_seed", "action_space", "observation_space"}
        return (value.get_state() if ask else None,), {name: attributes[name] for name in sorted(names)}
    for i, slot in enumerate(_slots(type(value))):
        with contextlib.suppress(AttributeError):
            attributes[i] = slot.__get__(value)
    if issubclass(base, dict):
        factory = (value.default_factory,) if base is collections.defaultdict else ()
        return (tuple(base.keys(value)), tuple(base.values(value)), *factory), attributes
    items = () if base is object else (bytes(memoryview(value)) if base is bytearray else tuple(base.__iter__(value)),)
    return (*items, value.maxlen) if base is collections.deque else items, attributes


def _find(name: str) -> Any:
    """What is called `name`, "module:a.b", in a module that is imported; None if nothing is."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in filter(None, path.split(".")):
        found = getattr(found, part, None)
    return found


def _what(value: Any) -> str:
    if isinstance(value, types.ModuleType):
        return value.__name__
    return f"{getattr(value, '__module__', None)}:{getattr(value, '__qualname__', None)}"


def _root(kind: Any) -> str:
    return str(getattr(kind, "__module__", None)).partition(".")[0]


def _slots(kind: type) -> list[Any]:
    of_classes = (vars(owner) for owner in kind.__mro__ if "__slots__" in vars(owner))
    return [slot for names in of_classes for slot in names.values() if type(slot) is types.MemberDescriptorType]


def _base(kind: Any) -> Any:
    """The built-in type of which `kind` has the content; None if its objects have memory that Python cannot see."""
    base = next(b for b in _BASES if issubclass(kind, b))
    room = len(_slots(kind))
    for offset in ("__dictoffset__", "__weakrefoffset__"):
        at = getattr(kind, offset)
        room += at != 0 == getattr(base, offset) and (at > 0 or kind.__itemsize__ > 0)
    whole = kind.__basicsize__ <= base.__basicsize__ + 8 * room and kind.__itemsize__ == base.__itemsize__
    return base if whole else None


def _may_be_made(kind: Any) -> bool:
    """Whether a file may ask for objects of this class that are not there."""
    library = _root(kind) in sys.stdlib_module_names or issubclass(kind, gym.Env) or hasattr(kind, "__del__")
    plain = kind in (*_BASES[:-1], collections.Counter, types.SimpleNamespace)
    return plain or (not library and _base(kind) is not None)


def _takes(function: Any, *arguments: Any) -> bool:
    try:
        return bool(inspect.signature(function).bind(*arguments))
    except (TypeError, ValueError):
        return False


def _plain(dtype: np.dtype) -> bool:
    return not dtype.hasobject and np.dtype(dtype.str) == dtype


def _hash(array: np.ndarray) -> str:
    return hashlib.sha1(np.ascontiguousarray(array).data.cast("B"), usedforsecurity=False).hexdigest()


def _as_in_memory(array: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """`array` with its axes from the slowest to the fastest in memory, and which axes of it these were.

    Arrays are saved in this order, which is not always C's: the last bits of a sum or a matrix product depend on it.
    """
    axes = tuple(sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis])))
    return array.transpose(axes), axes


def _model(model: Any) -> str:
    import mujoco

    data = np.zeros(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, data)
    return _hash(data)


def _wrong(saved: str, old: Any) -> Any:
    there = "nothing of that kind" if old is _MISSING else _what(type(old)).replace(":", ".")
    raise ValueError(f"the snapshot has {saved.replace(':', '.')} where this environment has {there}")


def _method(owner: Any, name: str, value: Any = None) -> Any:
    """The method `name` of the type of `owner`, bound; ValueError if there is none, or `value` is another."""
    found = getattr(type(owner), name, None)
    if isinstance(owner, type | types.ModuleType) or found is None or value not in (None, found.__get__(owner)):
        raise ValueError
    return found.__get__(owner)


def _parts_of_method(value: Any) -> tuple[Any, ...]:
    _method(value.__self__, value.__name__, value)
    return value.__self__, value.__name__


def _parts_of_bits(value: Any) -> tuple[Any, ...]:
    seed = value.seed_seq
    return value.state, seed and (seed.entropy, seed.spawn_key, seed.pool_size, seed.n_children_spawned)


def _join_bits(kind: Any, reader: _Reader, old: Any, state: Any, seed: Any) -> Any:
    new, (entropy, *rest) = kind() if old is _MISSING else old, seed or (None, (), 4, 0)
    names = dict(zip(("spawn_key", "pool_size", "n_children_spawned"), rest, strict=True))
    return reader.later(new, new.__setstate__, (state, seed and np.random.SeedSequence(entropy, **names)))


def _random(kind: Any, get: Callable[[Any], Any], change: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    def join(reader: _Reader, old: Any, state: Any) -> Any:
        new = kind() if old is _MISSING else old
        return reader.later(new, change, new, state)

    return lambda value: (get(value),), join


def _parts_of_function(value: Any) -> tuple[Any, ...]:
    """What tells functions apart that have no name to find them by, and what they hold."""
    code = value.__code__
    atoms = [constant for constant in code.co_consts if type(constant) in _ATOMS]
    text = repr((code.co_qualname, code.co_firstlineno, code.co_linetable, code.co_code, code.co_names, atoms))
    return (
        _hash(np.frombuffer(text.encode(), np.uint8)),
        value.__closure__,
        value.__defaults__,
        value.__kwdefaults__,
        vars(value),
    )


def _join_function(reader: _Reader, old: Any, code: str, cells: Any, *rest: Any) -> Any:
    if code != _parts_of_function(old)[0] or [*map(id, cells or ())] != [*map(id, old.__closure__ or ())]:
        _wrong("another function without a name", old)
    for name, value in zip(("__defaults__", "__kwdefaults__", "__dict__"), rest, strict=True):
        reader.later(old, setattr, old, name, value)
    return old


def _join_mujoco(reader: _Reader, old: Any, data: bytes, model: Any) -> Any:
    import mujoco

    saved = mujoco.MjData.__new__(mujoco.MjData)
    saved.__setstate__(zlib.decompress(data))
    return reader.later(old, mujoco.mj_copyData, old, model, saved)  # in place: the renderer holds it too


def _parts_of_ale(value: Any) -> tuple[bytes]:
    if value.getFloat("repeat_action_probability") > 0:
        raise ValueError("with sticky actions")
    return (value.cloneState(include_rng=True).serialize(),)


def _join_ale(reader: _Reader, old: Any, data: bytes) -> Any:
    import ale_py

    return reader.later(old, old.restoreState, ale_py.ALEState(data))


_BITS = [np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64]
_OUTPUT = {
    *("pygame.surface:Surface", "pygame.time:Clock", "pygame.font:Font", "pygame.mixer:Sound", "logging:Logger"),
    *("logging:RootLogger", "re:Pattern", "mujoco.renderer:Renderer", "gymnasium.envs.registration:EnvSpec"),
    "gymnasium.envs.mujoco.mujoco_rendering:MujocoRenderer",
}
# Name of a type -> its parts, and how they are put together, near to `old` or as `old`.
_KINDS: dict[str, tuple[Callable[[Any], Any], Callable[..., Any]]] = {
    "builtins:cell": (lambda v: (v.cell_contents,), lambda r, old, c: r.later(old, setattr, old, "cell_contents", c)),
    "builtins:function": (_parts_of_function, _join_function),
    "builtins:method": (_parts_of_method, lambda r, old, owner, name: _method(owner, name)),
    "builtins:builtin_function_or_method": (_parts_of_method, lambda r, old, owner, name: _method(owner, name)),
    "functools:partial": (
        lambda v: (v.func, v.args, v.keywords, vars(v)),
        lambda r, old, *parts: r.later(new := functools.partial(parts[0]), new.__setstate__, parts),  # type: ignore[attr-defined]
    ),
    _what(np.random.Generator): (
        lambda v: (v.bit_generator,),
        lambda r, old, bits: old if getattr(old, "bit_generator", None) is bits else np.random.Generator(bits),
    ),
    **{_what(kind): (_parts_of_bits, functools.partial(_join_bits, kind)) for kind in _BITS},
    _what(random.Random): _random(random.Random, random.Random.getstate, random.Random.setstate),
    _what(np.random.RandomState): _random(
        np.random.RandomState, lambda v: v.get_state(legacy=False), np.random.RandomState.set_state
    ),
    _what(torch.Generator): _random(
        torch.Generator, lambda v: v.get_state().numpy().copy(), lambda v, state: v.set_state(torch.from_numpy(state))
    ),
    "mujoco._structs:MjData": (lambda v: (zlib.compress(v.__getstate__(), 1), v.model), _join_mujoco),
    "ale_py._ale_py:ALEInterface": (_parts_of_ale, _join_ale),
    _what(Replayed): (
        lambda v: (v.history(), v.env.unwrapped.action_space),
        lambda r, old, history, space: r.later(old, old.replay, *history),
    ),
    **{name: (lambda v: (), lambda r, old: old) for name in _OUTPUT},
}
_IN_PLACE = {"builtins:cell", "builtins:function", "mujoco._structs:MjModel", "mujoco._structs:MjData"}
_IN_PLACE |= {"ale_py._ale_py:ALEInterface", _what(Replayed), *_OUTPUT}
