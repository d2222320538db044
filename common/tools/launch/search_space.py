"""The search space of a sweep, as `--search` describes it.

    learning_rate=1e-4..1e-2:log     a range, sampled log-uniformly
    gamma=0.9,0.95,0.99              a list
    num_steps=16..256:log:5          a range of integers; in a grid, 5 points of it
    "hidden_sizes=64 64,128 128"     values of several words

The script's own parser reads every value, so that errors come before any run.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.args import fail
from common.internals.console.cli import similar
from common.tools.launch.cli import OWN_FLAGS, as_words, ask, flag_names

NOT_SEARCHED = OWN_FLAGS | {"debug", "env_id", "track", "capture_video", "eval_episodes", "allow_env_import"}
Value = bool | int | float | str | None  # of one argument; what takes several words is their text


@dataclass(frozen=True)
class Dimension:
    """An argument and its possible values: a list, or the range from `low` to `high`."""

    name: str
    values: tuple[Value, ...] = ()
    arguments: tuple[Any, ...] = ()  # the values as they read in args.json
    low: float | int = 0
    high: float | int = 0
    log: bool = False
    points: int | None = None

    @property
    def integer(self) -> bool:
        return isinstance(self.low, int)

    def grid(self) -> list[Value]:
        """Its values, or the points of its range: evenly spaced with both ends, integers each once."""
        if self.values:
            return list(self.values)
        assert self.points is not None
        inner = (np.geomspace if self.log else np.linspace)(self.low, self.high, self.points)[1:-1].tolist()
        return list(dict.fromkeys([self.low, *(map(round, inner) if self.integer else inner), self.high]))

    def argument(self, value: Value) -> Any:
        """A value as in args.json."""
        return self.arguments[self.values.index(value)] if self.values else value

    def suggest(self, trial: Any) -> Value:
        """The value for a trial of Optuna; in a grid, the point that the trial has already."""
        if self.values or self.points is not None:
            return trial.suggest_categorical(self.name, self.grid())
        draw = trial.suggest_int if self.integer else trial.suggest_float
        return draw(self.name, self.low, self.high, log=self.log)


def flags(params: Mapping[str, Value]) -> list[str]:
    """The words that give arguments their values."""
    return as_words({name: value.split() if isinstance(value, str) else value for name, value in params.items()})


def product(space: list[Dimension]) -> list[dict[str, Value]]:
    """Every combination."""
    names = [d.name for d in space]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(d.grid() for d in space))]


def read_space(script: Path, fixed: list[str], types: Mapping[str, str], search: tuple[str, ...]) -> list[Dimension]:
    """The dimensions that `--search` describes; code 2 if one is wrong.

    Args:
        fixed: the script's other flags.
        types: of the script's arguments, by name.
    """
    found: dict[str, tuple[tuple[Value, ...], re.Match | None]] = {}
    for word in search:
        name, values, a_range = _split(script, types, word)
        if name in found:
            fail(f"--search names {name} twice")
        found[name] = values, a_range
    for name in sorted({name.removeprefix("no_") for name in flag_names(fixed)} & found.keys()):
        fail(f"{name} is searched, and fixed by the script's flag --{name.replace('_', '-')}: drop one of them")
    lines = [[*fixed, *flags({name: value})] for name, (values, _) in found.items() for value in values]
    answers = iter(ask(script, lines)[1])
    space = []
    for name, (values, a_range) in found.items():
        arguments: list[Any] = []
        for value in values:
            answer = next(answers)
            if answer.error is not None:
                fail(f"--search {name}: {script.name} does not accept {value}: {answer.error}")
            arguments.append(answer.args[name])
        space.append(_range(name, a_range, *arguments) if a_range else _list(name, values, arguments))
    return space


def _split(script: Path, types: Mapping[str, str], word: str) -> tuple[str, tuple[Value, ...], re.Match | None]:
    """The name, its values (of a range, both ends), and the match of a range."""
    name, equals, text = word.partition("=")
    name = name.removeprefix("--").replace("-", "_")
    if not equals or not text:
        fail(f"--search {word!r} is not of the form name=low..high, name=low..high:log or name=value,value")
    if name not in types:
        fail(f"--search {name}: {script.name} has no such argument{similar(name, types)}")
    if name in NOT_SEARCHED:
        fail(f"--search {name}: that is no hyperparameter")
    if ".." not in text:
        values = tuple(" ".join(value.split()) for value in text.split(","))
        if not all(values):
            fail(f"--search {word!r}: an empty value")
        if types[name] != "bool":
            return name, values, None
        known = {"true": True, "false": False}
        if bad := [value for value in values if value.lower() not in known]:
            fail(f"--search {name}: {bad[0]!r} is neither true nor false")
        return name, tuple(known[value.lower()] for value in values), None
    match = re.fullmatch(r"([^:]+?)\.\.([^:]+?)(:log)?(?::(\d+))?", text)
    if not match:
        fail(f"--search {word!r}: a range is low..high, low..high:log, or with a number of points low..high:5")
    if types[name].removesuffix(" | None") not in ("int", "float"):
        fail(f"--search {name}: a range of {types[name]} has no meaning; list the values")
    if match[4] is not None and int(match[4]) < 2:
        fail(f"--search {word!r}: a range has at least 2 points")
    return name, (match[1].strip(), match[2].strip()), match


def _list(name: str, values: tuple[Value, ...], arguments: list[Any]) -> Dimension:
    if len({str(argument) for argument in arguments}) < len(arguments):
        fail(f"--search {name} lists a value twice")
    pairs = zip(values, arguments, strict=True)
    simple = tuple(text if isinstance(argument, list | dict) else argument for text, argument in pairs)
    return Dimension(name, simple, tuple(arguments))


def _range(name: str, match: re.Match, low: Any, high: Any) -> Dimension:
    if low is None or high is None or not low < high:
        fail(f"--search {name}: the range from {low} to {high} is empty")
    if match[3] and low <= 0:
        fail(f"--search {name}: a logarithmic range begins above 0, not at {low}")
    points = None if match[4] is None else int(match[4])
    return Dimension(name, low=low, high=high, log=bool(match[3]), points=points)


def check_method(space: list[Dimension], method: str) -> None:
    """A grid needs a number of points of each range; the others draw from all of it."""
    for d in space:
        if method == "grid" and not d.values and d.points is None:
            fail(f"--search {d.name}: a grid needs a number of points, as in {d.low}..{d.high}{':log' * d.log}:5")
        if method != "grid" and d.points is not None:
            fail(f"--search {d.name}: {method} draws from the whole range; leave out :{d.points}, or list the values")
