"""Finds runs (directories, scripts, groups, stored results) and reads their metrics.

A run's arguments are read when it is found, its metrics only when it is compared.
"""

import contextlib
import errno
import gzip
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from common.args import fail, warn
from common.internals.resume.files import finished_step, open_file, read_json, read_object

LINE = 1_000_000  # bytes; a longer line of metrics is none
NO_ROW = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)
EVALUATION = "eval/episodic_return"
unreadable: list[str] = []  # why, for each run that was named or found and cannot be read


@dataclass
class Metrics:
    """Of each key, [3, rows]: global steps, seconds since the run began, values; and where the run ended."""

    rows: dict[str, np.ndarray]
    end_step: float
    end_seconds: float


@dataclass
class Run:
    name: str
    config: dict[str, Any]  # args.json
    finished: bool
    read: Callable[[Sequence[str]], Metrics] = field(repr=False)
    path: Path | None = None  # the run directory; stored results have none
    word: str = ""  # what it was asked for by, if that can mean several runs
    label: str | None = None  # NAME of NAME=RUNS

    @property
    def script(self) -> str:
        return str(self.config["script"])

    @property
    def env_id(self) -> str:
        return str(self.config["env_id"])

    def seed(self) -> str:
        return str(self.config.get("seed", "?"))


def find(words: Sequence[str], runs_dir: Path) -> list[Run]:
    """The runs that the words of a command line mean, each once, in the order of the words.

    A run directory that is named and cannot be read gets a line in `unreadable`.
    Ends the process with code 2 or 3 and one line if a word means no run.
    """
    unreadable.clear()

    @cache  # read once for all words
    def below() -> list[Run]:
        if not runs_dir.is_dir():
            fail(f"there is no folder {runs_dir}: say where the runs are with --runs-dir")
        return list(walk(runs_dir))

    stems = [Path(word.rpartition("=")[2]).stem for word in words if word.endswith(".py")]
    twice = {stem for stem in stems if stems.count(stem) > 1}
    if twice:
        fail(f"two scripts are named {twice.pop()}.py: runs know their script by its name, so give the fork another")
    found: dict[Any, Run] = {}
    for word in words:
        label, equals, meant = word.partition("=")
        if not equals or Path(word).exists():
            label, meant = "", word
        for run in _meant(meant, below):
            run.label = run.label or label or None
            found.setdefault((run.path or Path(run.name)).resolve(), run)
    if unreadable and not found:
        fail(unreadable[0], code=3)
    return list(found.values())


def _meant(word: str, below: Callable[[], list[Run]]) -> list[Run]:
    path = Path(word)
    if path.suffix == ".py":
        found = [run for run in below() if run.script == path.stem]
        if not found:
            fail(f"there is no run of {path.stem} in the folder of runs: train it first, or give --runs-dir")
    elif os.path.lexists(path / "args.json"):
        try:
            return [run_directory(path)]
        except (OSError, ValueError) as error:
            unreadable.append(f"{word} is not a run directory: its args.json cannot be read ({error})")
            return []
    elif path.is_dir():
        found = list(walk(path))
        if not found:
            fail(f"there is no run below {path}", code=3)
    elif path.name.endswith(".jsonl.gz") and path.exists():
        with contextlib.suppress(OSError, ValueError):
            return [run for run in results(path.parent) if run.name == str(path)]
        fail(f"{path.parent} has no results: its runs.json cannot be read", code=3)
    else:
        found = [run for run in below() if run.config.get("wandb_group") == word]
        if not found:
            groups = sorted({str(run.config["wandb_group"]) for run in below() if run.config.get("wandb_group")})
            there = f"; the groups are: {', '.join(groups[:10])}" if groups else ""
            fail(f"{word} is no folder, script or group of runs{there}")
    for run in found:
        run.word = run.word or word.rstrip("/")
    return found


def walk(folder: Path, seen: set[tuple[int, int]] | None = None, stored: bool = True) -> Iterator[Run]:
    """Every run directory and every folder of stored results below `folder`; nothing inside of them is opened.

    Results below a folder `reference` are found only where that folder, or one inside of it, is named.
    """
    seen = set() if seen is None else seen
    here = folder.stat()
    if (here.st_dev, here.st_ino) in seen:  # a link that leads back
        return
    seen.add((here.st_dev, here.st_ino))
    entries: list[os.DirEntry] = []
    name = next((name for name in ("args.json", "runs.json") if os.path.lexists(folder / name)), None)
    try:
        if name == "args.json":
            yield run_directory(folder)
        elif name == "runs.json":
            yield from results(folder) if stored else ()
        else:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (OSError, ValueError) as error:
        warn(f"{folder} is left out" + (f", its {name} cannot be read" if name else "") + f": {error}")
    for entry in entries:
        if entry.is_dir() and not entry.name.startswith("."):
            yield from walk(Path(entry.path), seen, stored and entry.name != "reference")


def run_directory(path: Path) -> Run:
    """Raises OSError or ValueError if its args.json is not that of a run."""
    config = checked(read_object(path, "args.json"))
    return Run(path.name, config, finished_step(path) is not None, partial(read_lines, path / "metrics.jsonl"), path)


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a run, where those that the tools go by are of the right kind; else ValueError."""
    if not isinstance(config, dict) or not all(config.get(key) for key in ("script", "env_id")):
        raise ValueError("it has no env_id or script")
    kinds = {"script": str, "env_id": str, "total_timesteps": int | float, "versions": dict, "parent": dict}
    for key, kind in kinds.items():
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise ValueError(f"its {key} is not what a run writes")
    if config.get("parent") is not None and not {"script", "lines_added", "lines_removed"} <= config["parent"].keys():
        raise ValueError("its parent is not what a run writes")
    return config


def results(folder: Path) -> list[Run]:
    """The runs in a folder that runs/reference/collect.py has written; OSError or ValueError if it has not."""
    try:
        kept = [(f"seed{int(run['seed'])}.jsonl.gz", checked(run["args"])) for run in read_json(folder, "runs.json")]
    except (KeyError, TypeError) as error:
        raise ValueError(f"its runs.json has another form: {error!r}") from None
    return [Run(str(folder / name), config, True, partial(read_lines, folder / name)) for name, config in kept]


def read_lines(path: Path, keys: Sequence[str]) -> Metrics:
    """What metrics.jsonl, gzipped or not, says of `keys`; of other lines nothing but the last is parsed.

    A last line without its end is being written, or was when the run was killed. Other lines that are no rows are left
    out, with one warning.

    Raises:
        OSError: the file is there and cannot be read.
    """
    wanted = [f'"{key}"'.encode() for key in keys]
    rows: dict[str, list[tuple[float, float, float]]] = {key: [] for key in keys}
    number, whole, broken, last = 0, True, set[int](), b""
    try:
        with open_file(path.parent, path.name) as file:
            lines: Any = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            for line in iter(lambda: lines.readline(LINE), b""):
                number, whole = number + whole, line.endswith(b"\n")  # what is longer than LINE comes in parts
                if not whole and len(line) < LINE:
                    break
                try:
                    if not (line.startswith(b"{") and line.rstrip().endswith(b"}")):
                        raise ValueError("no object")
                    if any(key in line for key in wanted):
                        _take(json.loads(line), rows)
                    last = line
                except NO_ROW:
                    broken.add(number)
    except FileNotFoundError:
        pass
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise OSError(errno.EIO, str(error), str(path)) from None
    if broken:
        more = f" and {len(broken) - 1} other lines are no rows" if len(broken) > 1 else " is no row"
        warn(f"{path}: line {min(broken)}{more} of metrics, and left out", once=str(path))
    arrays = {key: np.array(table).T.reshape(3, -1) for key, table in rows.items()}
    arrays = {key: array[:, np.argsort(array[0], kind="stable")] for key, array in arrays.items()}
    ends = [(0.0, 0.0), *((float(array[0, -1]), float(array[1, -1])) for array in arrays.values() if array.size)]
    with contextlib.suppress(*NO_ROW):
        end = json.loads(last)
        ends.append((float(end["global_step"]), float(end["time"])))
    return Metrics(arrays, *map(max, zip(*ends, strict=True)))


def _take(row: dict[str, Any], rows: dict[str, list[tuple[float, float, float]]]) -> None:
    for key, table in rows.items():
        if row.get(key) is not None:  # null: it was not finite
            entry = (float(row["global_step"]), float(row["time"]), float(row[key]))
            if all(map(math.isfinite, entry)):
                table.append(entry)
