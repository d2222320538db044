"""Finding runs - directories, groups, scripts, W&B projects, committed results - and reading what is asked of them.

A run's arguments are read when it is found, its metrics only when it is compared.
"""

import gzip
import json
import os
import queue
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.args import fail, read_facts, warn
from common.sinks import wandb_service

W_AND_B_TIMEOUT = 60  # seconds; a server that refuses connections takes wandb 20


@dataclass
class Metrics:
    """Of each key, [3, rows]: global steps, seconds since the run began, values; and where the run ended."""

    rows: dict[str, np.ndarray]
    end_step: float = 0.0
    end_seconds: float = 0.0
    broken: int = 0  # lines that could not be read


@dataclass
class Run:
    name: str
    facts: dict[str, Any]  # args.json, or W&B's config
    finished: bool
    read: Callable[[Sequence[str]], Metrics] = field(repr=False)
    path: Path | None = None  # the run directory; results and W&B have none
    url: str | None = None
    word: str = ""  # what it was asked for by, if that can mean several runs
    arm: str | None = None  # NAME of NAME=RUNS

    @property
    def script(self) -> str:
        return str(self.facts["script"])

    @property
    def env_id(self) -> str:
        return str(self.facts["env_id"])

    def seed(self) -> str:
        return str(self.facts.get("seed", "?"))


def find(words: Sequence[str], runs_dir: Path) -> list[Run]:
    """The runs that the words of a command line mean, each once, in the order of the words.

    Ends the process with code 2 or 3 and one line if a word means no run.
    """
    known: list[Run] = []  # below runs_dir, read once for all words

    def below() -> list[Run]:
        if not known:
            if not runs_dir.is_dir():
                fail(f"there is no folder {runs_dir}: say where the runs are with --runs-dir")
            known.extend(walk(runs_dir))
        return known

    stems = [Path(word.rpartition("=")[2]).stem for word in words if word.endswith(".py")]
    twice = {stem for stem in stems if stems.count(stem) > 1}
    if twice:
        fail(f"two scripts are named {twice.pop()}.py: runs know their script by its name, so give the fork another")
    found: dict[Any, Run] = {}
    for word in words:
        arm, equals, meant = word.partition("=")
        if not equals or Path(word).exists():
            arm, meant = "", word
        for run in _meant(meant, below):
            run.arm = run.arm or arm or None
            found.setdefault(run.url or (run.path or Path(run.name)).resolve(), run)
    return list(found.values())


def _meant(word: str, below: Callable[[], list[Run]]) -> list[Run]:
    path = Path(word)
    if word.startswith("wandb:"):
        found = from_wandb(word)
    elif path.suffix == ".py":
        found = [run for run in below() if run.script == path.stem]
        if not found:
            fail(f"there is no run of {path.stem} in the folder of runs: train it first, or give --runs-dir")
    elif (path / "args.json").exists():
        try:
            return [_directory(path, read_facts(word))]
        except (KeyError, TypeError):
            fail(f"{word} is not a run directory: its args.json has no env_id or script", code=3)
    elif path.is_dir():
        found = list(walk(path))
        if not found:
            fail(f"there is no run below {path}", code=3)
    elif path.name.endswith(".jsonl.gz") and path.exists():
        return [run for run in results(path.parent) if run.name == str(path)]
    else:
        found = [run for run in below() if run.facts.get("wandb_group") == word]
        if not found:
            groups = sorted({str(run.facts["wandb_group"]) for run in below() if run.facts.get("wandb_group")})
            there = f"; the groups are: {', '.join(groups[:10])}" if groups else ""
            fail(f"{word} is no folder, script or group of runs{there}")
    for run in found:
        run.word = run.word or word.rstrip("/")
    return found


def walk(folder: Path, seen: set[tuple[int, int]] | None = None) -> Iterator[Run]:
    """Every run directory and every folder of committed results below `folder`; nothing inside of them is opened."""
    seen = set() if seen is None else seen
    here = folder.stat()
    if (here.st_dev, here.st_ino) in seen:  # a link that leads back
        return
    seen.add((here.st_dev, here.st_ino))
    if (folder / "args.json").exists():
        try:
            yield _directory(folder, json.loads((folder / "args.json").read_bytes()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            warn(f"{folder} is left out, its args.json cannot be read: {error}")
    elif (folder / "runs.json").exists():
        yield from results(folder)
    else:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            warn(f"{folder} is left out: {error.strerror}")
            return
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith("."):
                yield from walk(Path(entry.path), seen)


def _directory(path: Path, facts: dict[str, Any]) -> Run:
    facts["env_id"], facts["script"]  # KeyError: it is the args.json of something else
    return Run(
        path.name,
        facts,
        (path / "finished.json").exists(),
        lambda keys: read_lines(path / "metrics.jsonl", keys),
        path,
    )


def results(folder: Path) -> list[Run]:
    """Runs that `runs/collect.py` has made into runs.json and seed*.jsonl.gz."""

    def reader(path: Path) -> Callable[[Sequence[str]], Metrics]:
        return lambda keys: read_lines(path, keys)

    try:
        kept = json.loads((folder / "runs.json").read_bytes())
        files = [folder / f"seed{run['seed']}.jsonl.gz" for run in kept]
        return [Run(str(file), run["args"], True, reader(file)) for file, run in zip(files, kept, strict=True)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{folder} has no results: its runs.json cannot be read ({error})", code=3)


def read_lines(path: Path, keys: Sequence[str]) -> Metrics:
    """What metrics.jsonl, gzipped or not, says of `keys`; of other lines nothing but the last is parsed."""
    wanted = [f'"{key}"'.encode() for key in keys]
    rows: dict[str, list[tuple[float, float, float]]] = {key: [] for key in keys}
    metrics, last = Metrics({}), b""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):  # of a run that is writing it, or was killed
                    break
                last = line
                if any(key in line for key in wanted):
                    try:
                        _take(json.loads(line), rows)
                    except (ValueError, KeyError, TypeError):
                        metrics.broken += 1
    except FileNotFoundError:
        pass
    except (OSError, EOFError, zlib.error) as error:
        fail(f"{path} cannot be read: {error}", code=6)
    try:
        end = json.loads(last)
        metrics.end_step, metrics.end_seconds = float(end["global_step"]), float(end["time"])
    except (ValueError, KeyError, TypeError):
        metrics.broken += bool(last)
    metrics.rows = _arrays(rows)
    return metrics


def _take(row: dict[str, Any], rows: dict[str, list[tuple[float, float, float]]], seconds: str = "time") -> None:
    for key, table in rows.items():
        if row.get(key) is not None:  # null: it was not finite
            table.append((float(row["global_step"]), float(row[seconds]), float(row[key])))


def _arrays(rows: dict[str, list[tuple[float, float, float]]]) -> dict[str, np.ndarray]:
    arrays = {key: np.array(table).T.reshape(3, -1) for key, table in rows.items()}
    return {key: array[:, np.argsort(array[0], kind="stable")] for key, array in arrays.items()}


def from_wandb(word: str) -> list[Run]:
    """Runs of `wandb:[ENTITY/]PROJECT` or `wandb:ENTITY/PROJECT/GROUP`; CleanRL's are understood as well.

    Their rows are W&B's, in which an episodic return is the mean of the episodes since the last row.
    """
    import wandb

    path = word.removeprefix("wandb:").strip("/")
    parts = path.split("/", 2)
    group = {"group": parts[2]} if len(parts) == 3 else {}
    found = []
    for run in _answers(
        lambda: wandb.Api().runs("/".join(parts[:2]), filters=group, per_page=200, lazy=False),
        f"W&B has no answer for {path}",
    ):
        facts = dict(run.config)
        facts.setdefault("script", facts.get("exp_name"))
        if not facts["script"] or not facts.get("env_id"):
            warn(f"{run.name} is left out: its configuration has no env_id, or neither script nor exp_name")
            continue
        facts["wandb_group"] = run.group
        found.append(Run(run.name, facts, run.state == "finished", _history(run), url=run.url))
    if not found:
        fail(f"W&B has no runs in {path}")
    return found


def _answers(ask: Callable[[], Iterable[Any]], otherwise: str) -> Iterator[Any]:
    """What W&B answers, one by one; an error, or no answer for W_AND_B_TIMEOUT seconds, ends the process.

    wandb waits without a limit for its service process in places, its atexit hook among them, and the service does not
    always end: so a thread asks, and this process ends without that hook.
    """
    import wandb

    answers: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def asking() -> None:
        try:
            for answer in ask():
                answers.put(("answer", answer))
            answers.put(("end", None))
        except BaseException as error:
            answers.put(("error", error))

    threading.Thread(target=asking, daemon=True).start()
    try:
        while True:
            try:
                kind, answer = answers.get(timeout=W_AND_B_TIMEOUT)
            except queue.Empty:
                fail(f"{otherwise}: nothing came for {W_AND_B_TIMEOUT} s")
            if kind == "end":
                return
            if kind == "error" and isinstance(answer, wandb.errors.Error | ValueError | OSError):
                fail(f"{otherwise}: {str(answer).splitlines()[0] if str(answer) else type(answer).__name__}")
            if kind == "error":
                raise answer
            yield answer
    except SystemExit as end:
        if service := wandb_service():
            service.kill()  # it holds this process's output open
        sys.stdout.flush()
        os._exit(int(end.code or 0))


def _history(run: Any) -> Callable[[Sequence[str]], Metrics]:
    def read(keys: Sequence[str]) -> Metrics:
        metrics = Metrics({})
        rows: dict[str, list[tuple[float, float, float]]] = {key: [] for key in keys}
        otherwise = f"the history of {run.url} cannot be read from W&B"
        for key in keys:  # a scan for several keys has only the rows that hold all of them
            scan = partial(run.scan_history, keys=["global_step", "_runtime", key], page_size=10_000)
            for row in _answers(scan, otherwise):
                numbers = _numbers(row)
                if {"global_step", "_runtime"} <= numbers.keys():
                    _take(numbers, {key: rows[key]}, seconds="_runtime")
        (end,) = map(_numbers, _answers(lambda: [dict(run.summary)], otherwise))
        metrics.rows = _arrays(rows)
        last = [array[:2, -1] for array in metrics.rows.values() if array.size]
        metrics.end_step = max([end.get("global_step") or 0.0, *(step for step, _ in last)])
        metrics.end_seconds = max([end.get("_runtime") or 0.0, *(seconds for _, seconds in last)])
        return metrics

    return read


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """Without W&B's "NaN" and "Infinity", which are strings."""
    return {key: value for key, value in row.items() if isinstance(value, int | float) and np.isfinite(value)}


def duplicates(runs: Iterable[Run]) -> list[str]:
    """Seeds that occur more than once."""
    seeds = [run.seed() for run in runs]
    return sorted({seed for seed in seeds if seeds.count(seed) > 1})
