"""An environment for each kind of state: what it observes and is rewarded with depends on that state and changes it.

Each kind has a name, what is promised ("exact", or the words of the warning), what makes `env.x`, and what uses it.
"""

import collections
import ctypes
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import io
import itertools
import logging
import operator
import pathlib
import random
import socket
import threading
import types
import weakref
from typing import Any, ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete

COUNT = 0


class Pair(NamedTuple):
    a: int
    b: list


@dataclasses.dataclass
class Data:
    n: int = 0
    seen: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Frozen:
    n: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots:
    n: int = 0


class Base:
    __slots__ = ("n",)


class Slots(Base):
    __slots__ = ("__weakref__", "more")


class Enemy:
    def __init__(self, n):
        self.n, self.friends = n, []

    def roar(self):
        self.n += 1
        return self.n


class Mood(enum.Enum):
    CALM = 1
    ANGRY = 2


class Buttons(enum.Flag):
    A = enum.auto()
    B = enum.auto()


class Stack(list):
    name = "stack"

    def push(self, item):
        self.pushed = getattr(self, "pushed", 0) + 1
        self.append(item)


class Lookup(dict):
    def __missing__(self, key):
        self.misses = getattr(self, "misses", 0) + 1
        return self.misses


class AttrDict(dict):
    def __init__(self, **items):
        super().__init__(**items)
        self.__dict__ = self


class Recent(collections.deque):
    pass


class Celsius(float):
    pass


class Matrix(np.ndarray):
    pass


class OwnError(Exception):
    pass


ITEMS = [Enemy(10), Enemy(20), Enemy(30)]
TABLE = np.arange(5.0)
WINDOW = np.zeros((2, 4))[:, ::2]
EMPTY, FULL = object(), object()
CALM, ANGRY = Frozen(1), Pair(2, [])


def flee(n):
    return n - 1


def chase(n):
    return n + 2


def walk():
    n = 0
    while True:
        n += 1
        yield n


def counter():
    n = 0

    def count():
        nonlocal n
        n += 1
        return n

    return count


def over_a_generator(generator):
    return lambda: next(generator)


def twins(one, two):
    one.__dict__ = two.__dict__
    return [one, two]


def two_counters():
    n = [0]
    return (lambda: n.append(1) or sum(n)), (lambda: n.append(2) or sum(n))


def put(env, **values):
    for name, value in values.items():
        setattr(env, name, value)


def after(env, start, use, step=8):
    """State that shows late, in the middle of an episode."""
    if env.t + 20 * env.episode < step:
        return 0
    if env.x is None:
        env.x = start()
    return use(env.x)


def replaced(env, value):
    env.x = value
    return value


def numbers(env, make):
    env.x = make(env)
    return float(np.sum(np.asarray(env.x, np.float64)))


def add(array, n=1):
    array += n
    return float(array.sum())


def views(env):
    env.x[0] += 1
    return float(env.y[0] + env.y[1])


def spawn(env):
    env.x.append(Enemy(env.t))
    env.x[-1].friends.append(env.x[len(env.x) // 2])
    env.x[len(env.x) // 2].n += 1
    return sum(e.n + sum(f.n for f in e.friends) for e in env.x)


def choose(env):
    env.y += 1
    env.x = ITEMS[env.y % 3]
    return env.x.n + (env.x is ITEMS[1])


def keyed(env):
    env.x[Frozen(env.y)] = env.x.get(Frozen(env.y - 1), 0) + 1
    env.y += 1
    return len(env.x) + env.x[Frozen(env.y - 1)]


def of_class(env):
    type(env).made += 1
    env.visits.append(1)
    return type(env).made + len(env.visits)


def slash_attribute(env):
    env.__dict__["a/b"] = env.__dict__.get("a/b", 0) + 1
    return env.__dict__["a/b"]


def late_attribute(env):
    env.__dict__.setdefault("late", []).append(env.t)
    return sum(env.late)


def with_self(env):
    env.x["n"] += 1
    return env.x["me"]["me"]["n"]


EXACT: dict[str, tuple[Any, Any]] = {
    "number": (lambda env: 0, lambda env: replaced(env, env.x + 1)),
    "complex number": (lambda env: 1j, lambda env: replaced(env, env.x * (1 + 1j) / 2 + 1).real),
    "text and bytes": (
        lambda env: ("a", b""),
        lambda env: len("".join(map(str, replaced(env, (env.x[0] + "b", env.x[1] + b"c"))))),
    ),
    "list, dict, tuple": (
        lambda env: {"a": [1, (2, [3])]},
        lambda env: env.x["a"][1][1].append(env.t) or sum(env.x["a"][1][1]),
    ),
    "dict that holds itself": (lambda env: put(env, x={"n": 0}) or env.x.update(me=env.x) or env.x, with_self),
    "set": (lambda env: {1}, lambda env: env.x.add(env.t % 9) or len(env.x) + sum(env.x)),
    "frozenset": (lambda env: frozenset({(0, 0)}), lambda env: len(replaced(env, env.x | {(env.t % 5, 1)}))),
    "deque": (lambda env: collections.deque([0], maxlen=4), lambda env: env.x.append(env.x[-1] + 1) or sum(env.x)),
    "OrderedDict": (
        lambda env: collections.OrderedDict(a=1, b=2, c=3),
        lambda env: env.x.move_to_end(next(iter(env.x))) or ord(next(iter(env.x))),
    ),
    "defaultdict, Counter": (
        lambda env: (collections.defaultdict(int), collections.Counter()),
        lambda env: env.x[1].update("ab") or operator.iadd(env.x[0]["k"], 1) + env.x[1]["a"],
    ),
    "range, slice": (
        lambda env: (range(3), slice(1)),
        lambda env: sum(replaced(env, (range(env.x[0].stop + 1), slice(env.t)))[0]),
    ),
    "date, time span": (
        lambda env: [datetime.datetime(2026, 1, 1), datetime.date(2026, 1, 1), datetime.timedelta(1)],
        lambda env: (
            put(env, x=[env.x[0] + env.x[2], env.x[1] + env.x[2], env.x[2] * 1.25])
            or env.x[0].day + env.x[1].day + env.x[2].total_seconds() / 1e6
        ),
    ),
    "path": (lambda env: pathlib.Path("a"), lambda env: len(str(replaced(env, env.x / "b")))),
    "enum member": (
        lambda env: [Mood.CALM, Buttons.A],
        lambda env: put(env, x=[Mood(3 - env.x[0].value), env.x[1] ^ Buttons.B]) or env.x[0].value + env.x[1].value,
    ),
    "NamedTuple": (
        lambda env: Pair(0, []),
        lambda env: replaced(env, env.x._replace(a=env.x.a + 1)).b.append(1) or env.x.a + len(env.x.b),
    ),
    "dataclass": (
        lambda env: Data(),
        lambda env: env.x.seen.append(env.t) or setattr(env.x, "n", env.x.n + 1) or env.x.n + sum(env.x.seen),
    ),
    "frozen dataclass": (lambda env: Frozen(), lambda env: replaced(env, dataclasses.replace(env.x, n=env.x.n + 1)).n),
    "frozen dataclass with __slots__": (
        lambda env: FrozenSlots(),
        lambda env: replaced(env, dataclasses.replace(env.x, n=env.x.n + 1)).n,
    ),
    "__slots__": (
        lambda env: put(env, x=Slots()) or put(env.x, n=0) or env.x,
        lambda env: put(env.x, n=env.x.n + 1, more=env.t) or env.x.n + env.x.more,
    ),
    "object": (lambda env: Enemy(0), lambda env: env.x.roar()),
    "objects that are made in an episode": (lambda env: [], spawn),
    "SimpleNamespace": (lambda env: types.SimpleNamespace(n=0), lambda env: put(env.x, n=env.x.n + 1) or env.x.n),
    "object as a key": (lambda env: put(env, y=1) or {}, keyed),
    "one of a module's objects": (lambda env: put(env, y=0) or ITEMS[0], choose),
    "object() that a module names": (
        lambda env: EMPTY,
        lambda env: (env.x is FULL) + (replaced(env, FULL if env.x is EMPTY else EMPTY) is FULL),
    ),
    "frozen object that a module names": (
        lambda env: CALM,
        lambda env: (env.x is ANGRY) + 2 * (replaced(env, ANGRY if env.x is CALM else CALM) is CALM),
    ),
    "view that a module names": (lambda env: WINDOW, lambda env: add(WINDOW) + float(env.x.sum())),
    "array": (lambda env: np.zeros((2, 3)), lambda env: add(env.x)),
    "array that is replaced": (lambda env: TABLE, lambda env: float(replaced(env, env.x * 0.5 + 1).sum())),
    "view of an array": (lambda env: put(env, y=np.zeros(4)) or env.y[:2], views),
    "array of dates": (
        lambda env: np.array(["2026-01-01"], "M8[D]"),
        lambda env: float(replaced(env, env.x + np.timedelta64(1, "D")).astype(int)[0] % 100),
    ),
    "large array that changes": (lambda env: np.zeros(10_000), lambda env: add(env.x)),
    "NumPy scalar, dtype": (
        lambda env: (np.float32(0.1), np.dtype("f4")),
        lambda env: float(replaced(env, (env.x[0] * np.float32(1.1), env.x[1]))[0]),
    ),
    "NumPy generator": (lambda env: np.random.default_rng(3), lambda env: env.x.normal()),
    "NumPy generator that spawns": (
        lambda env: np.random.default_rng(3),
        lambda env: env.x.spawn(1)[0].normal() + env.x.normal(),
    ),
    "two generators over one BitGenerator": (
        lambda env: put(env, y=np.random.Generator(np.random.Philox(1))) or np.random.Generator(env.y.bit_generator),
        lambda env: env.x.normal() - env.y.normal(),
    ),
    "RandomState": (lambda env: np.random.RandomState(3), lambda env: env.x.randn()),
    "random.Random": (lambda env: random.Random(3), lambda env: env.x.gauss(0, 1)),
    "torch generator": (
        lambda env: torch.Generator().manual_seed(3),
        lambda env: float(torch.rand((), generator=env.x)),
    ),
    "space": (
        lambda env: put(env, x=Discrete(9)) or (env.x.seed(1) and env.x),
        lambda env: env.x.sample() + int(env.action_space.sample()),
    ),
    "function of a module": (
        lambda env: put(env, y=9) or flee,
        lambda env: put(env, y=env.x(env.y), x=chase if env.y < 5 else flee if env.y > 9 else env.x) or env.y,
    ),
    "closure": (lambda env: counter(), lambda env: env.x()),
    "two closures over one variable": (lambda env: two_counters(), lambda env: env.x[env.t % 2]()),
    "lambda with a default": (lambda env: lambda n, seen=[]: seen.append(n) or sum(seen), lambda env: env.x(1)),
    "method of a NumPy generator": (lambda env: np.random.default_rng(3).normal, lambda env: env.x()),
    "bound method": (lambda env: Enemy(0).roar, lambda env: env.x()),
    "class attribute": (lambda env: None, of_class),
    "attribute that shows late": (lambda env: None, late_attribute),
    "attribute with any name": (lambda env: None, slash_attribute),
    "logger beside the state": (
        lambda env: put(env, y=logging.getLogger("kinds")) or 0,
        lambda env: replaced(env, env.x + 1),
    ),
    "property of the time": (lambda env: None, lambda env: env.t + 10 * env.episode),
}
NAMED: dict[str, tuple[str, Any, Any]] = {
    "Python generator": ("generator", lambda env: walk(), lambda env: next(env.x)),
    "Python generator that shows late": ("generator", lambda env: None, lambda env: after(env, walk, next)),
    "itertools": ("itertools.count", lambda env: itertools.count(), lambda env: next(env.x)),
    "iterator of a list": ("list_iterator", lambda env: iter(list(range(99))), lambda env: next(env.x)),
    "open file": ("_io.BytesIO", lambda env: io.BytesIO(bytes(range(99))), lambda env: env.x.read(1)[0]),
    "socket": ("socket.socket", lambda env: socket.socket(), lambda env: 0),
    "lock": ("_thread.lock", lambda env: threading.Lock(), lambda env: env.x.acquire(blocking=False)),
    "thread": ("_thread.lock", lambda env: threading.Thread(target=print), lambda env: 0),
    "thread-local data": ("_thread._local", lambda env: threading.local(), lambda env: 0),
    "weak reference": ("weakref.ReferenceType", lambda env: weakref.ref(env), lambda env: 0),
    "ctypes": ("ctypes.c_long", lambda env: ctypes.c_long(0), lambda env: env.x.value),
    "memoryview": ("memoryview", lambda env: memoryview(bytearray(8)), lambda env: env.x[0]),
    "array over other memory": (
        "numpy.ndarray over the memory of a memoryview",
        lambda env: np.frombuffer(bytearray(8)),
        lambda env: add(env.x),
    ),
    "array subclass": ("kinds_of_state.Matrix", lambda env: np.zeros(3).view(Matrix), lambda env: 0),
    "closure over a generator": ("generator", lambda env: over_a_generator(walk()), lambda env: env.x()),
    "partial": ("functools.partial", lambda env: functools.partial(add, np.zeros(2)), lambda env: env.x()),
    "method of a random.Random": (
        "builtin_function_or_method",
        lambda env: random.Random(3).random,
        lambda env: env.x(),
    ),
    "method of a list": (
        "builtin_function_or_method",
        lambda env: put(env, y=[]) or env.y.append,
        lambda env: env.x(env.t) or sum(env.y),
    ),
    "list subclass": ("kinds_of_state.Stack", lambda env: Stack(), lambda env: env.x.push(env.t) or sum(env.x)),
    "dict subclass": ("kinds_of_state.Lookup", lambda env: Lookup(), lambda env: env.x["nothing"]),
    "dict that is its own __dict__": (
        "kinds_of_state.AttrDict",
        lambda env: AttrDict(n=0),
        lambda env: put(env.x, n=env.x["n"] + 1) or env.x["n"],
    ),
    "objects with one __dict__": (
        "kinds_of_state.Enemy that shares its __dict__",
        lambda env: twins(Enemy(0), Enemy(1)),
        lambda env: env.x[0].roar() + env.x[1].n,
    ),
    "deque subclass": ("kinds_of_state.Recent", lambda env: Recent(), lambda env: env.x.append(1) or len(env.x)),
    "bytearray": ("bytearray", lambda env: bytearray(1), lambda env: env.x.append(env.t) or sum(env.x)),
    "Decimal": ("decimal.Decimal", lambda env: decimal.Decimal("0.1"), lambda env: replaced(env, env.x * 3)),
    "Fraction": ("fractions.Fraction", lambda env: fractions.Fraction(1, 3), lambda env: replaced(env, env.x + 1)),
    "time zone": ("datetime.timezone", lambda env: datetime.datetime.now(datetime.UTC), lambda env: env.x.year),
    "exception": ("kinds_of_state.OwnError", lambda env: OwnError(1), lambda env: 0),
    "tensor": ("torch.Tensor", lambda env: torch.zeros(4), lambda env: float(env.x.add_(1).sum())),
    "torch module": ("torch.nn.parameter.Parameter", lambda env: torch.nn.Linear(1, 1), lambda env: 0),
    "structured array": (
        "numpy.ndarray of [('a', '<i4'), ('b', '<f8')]",
        lambda env: np.zeros(2, [("a", "i4"), ("b", "f8")]),
        lambda env: float(add(env.x["a"])),
    ),
    "array of objects": (
        "numpy.ndarray of object",
        lambda env: np.array([Enemy(0), None, 1]),
        lambda env: env.x[0].roar(),
    ),
    "float subclass": ("kinds_of_state.Celsius", lambda env: Celsius(1), lambda env: replaced(env, Celsius(env.x + 1))),
    "object without attributes or a name": ("object", lambda env: [object()], lambda env: len(env.x)),
    "generator in a list of objects": (
        "generator",
        lambda env: [put(e := Enemy(0), path=walk()) or e],
        lambda env: next(env.x[0].path),
    ),
}


class Kind(gym.Env):
    made = 0
    visits: ClassVar[list[int]] = []

    def __init__(self, start, use):
        self.observation_space, self.action_space = Box(-np.inf, np.inf, (1,), np.float64), Discrete(2)
        self.use = use
        self.episode, self.t = -1, 0
        self.x = start(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.array([self.np_random.normal()]), {}

    def step(self, action):
        self.t += 1
        seen = float(self.use(self))
        return np.array([seen]), seen / 2, False, self.t == 7 + self.episode, {}


class Owned(Kind):
    """Brings get_state() and set_state(state); its generator is walked no more."""

    def __init__(self, state=None, **kwargs):
        super().__init__(lambda env: walk(), lambda env: env.n + float(env.np_random.normal()))
        self.n, self.state = 0, state

    def step(self, action):
        self.n += next(self.x) > 0
        return super().step(action)

    def get_state(self):
        if self.state is not None:
            return self.state(self)
        return {"n": self.n, "t": self.t, "episode": self.episode, "array": np.array([self.n])}

    def set_state(self, state):
        self.n, self.t, self.episode = int(state["array"][0]), state["t"], state["episode"]


class Table(gym.Env):
    """Reads a large table, which it draws anew each time it is made if `seed` is None, and may change."""

    def __init__(self, seed=0, changes=False):
        self.observation_space, self.action_space = Box(-np.inf, np.inf, (1,), np.float64), Discrete(2)
        self.table, self.changes = np.random.default_rng(seed).normal(size=200_000), changes
        self.window = self.table[:100]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1), {}

    def step(self, action):
        self.t += 1
        if self.changes:
            self.window += 1
        return self.table[self.t : self.t + 1].copy(), 0.0, False, self.t == 9, {}


def number(name):
    return [*EXACT, *NAMED].index(name)


for _name, _rest in [*EXACT.items(), *NAMED.items()]:
    gym.register(f"Kind{number(_name)}-v0", Kind, kwargs={"start": _rest[-2], "use": _rest[-1]})

gym.register("Owned-v0", Owned)
gym.register("Owned-raises-v0", Owned, kwargs={"state": lambda env: 1 / 0})
gym.register("Owned-unsaved-v0", Owned, kwargs={"state": lambda env: {"x": env.x}})
gym.register("Table-v0", Table)
gym.register("Table-changes-v0", Table, kwargs={"changes": True})
gym.register("Table-unseeded-v0", Table, kwargs={"seed": None})
