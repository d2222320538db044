"""The arguments of a script, read by its own parser, and helpers for command lines."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.args import fail
from common.internals.tracking.redact import redact

# Arguments that a tool sets for each run.
OWN_FLAGS = {"seed", "runs_dir", "wandb_group", "wandb_tags", "resume"}
# Arguments that make no other experiment.
INCIDENTAL = OWN_FLAGS | {"track", "cuda", "torch_threads", "debug", "wandb_project", "wandb_entity", "wandb_name"}
INCIDENTAL |= {"wandb_notes"}
STDOUT = Path("-")  # of --json


@dataclass(kw_only=True)
class ToolArgs:
    """Arguments of every tool that starts runs."""

    workers: int = 1
    """runs at a time; the cores are divided among them"""
    runs_dir: Path = Path("runs")
    """folder of the run directories"""
    json: Path | None = None
    """write the results to this file (-: to the standard output)"""
    debug: bool = False
    """print the whole traceback of an error"""


@dataclass
class Answer:
    """A script's arguments under a command line, or its error."""

    args: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def ask(script: Path, command_lines: list[list[str]]) -> tuple[dict[str, str], list[Answer]]:
    """The types of a script's arguments by name, and the result of its own parser for each command line.

    Code 2 if the script does not answer. --help keeps a script without `common.parse` from training.
    """
    if not script.is_file():
        fail(f"there is no script {script}")
    try:
        command, lines = [sys.executable, str(script), "--help"], json.dumps(command_lines)
        env = {**os.environ, "PLAINRL_ASKED": "1"}
        done = subprocess.run(command, input=lines, env=env, capture_output=True, text=True, timeout=300)
        answer = json.loads(done.stdout.splitlines()[-1])
        return answer["types"], [Answer(**one) for one in answer["answers"]]
    except (OSError, subprocess.SubprocessError) as error:
        fail(f"the arguments of {script} cannot be read: {error}")
    except (ValueError, IndexError, KeyError, TypeError):
        said = done.stderr.strip().splitlines()
        why = said[-1] if done.returncode and said else "it does not read them with common.parse(Args)"
        fail(f"the arguments of {script} cannot be read: {why}")


def base_arguments(script: Path, flags: list[str], own: set[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """A script's types and arguments under `flags`; code 2 if it refuses them, or if one is in `own`, the tool's."""
    types, (plain, given) = ask(script, [[], flags])
    if given.error is not None:
        fail(f"{script.name}: {given.error}")
    for name in sorted(flag_names(flags) & own):
        fail(f"--{name.replace('_', '-')} cannot be among the script's flags: it is set for each run")
    if plain.error is not None:
        fail(f"{script.name} does not accept its own defaults: {plain.error}")
    return types, given.args


def flag_names(words: list[str]) -> set[str]:
    """The arguments named in a command line."""
    return {word.partition("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}


def as_words(flags: dict[str, Any]) -> list[str]:
    """Arguments, as in JSON, written as a command line."""
    words = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", str(value)]
    return words


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """The tool's own words, and the script's, which are after `--`."""
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


def at_least(args: Any, **bounds: int) -> None:
    """Code 2 if an argument is below its bound."""
    for name, least in bounds.items():
        value = getattr(args, name)
        if value is not None and value < least:
            fail(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


def check_folder(path: Path | None) -> None:
    """Code 6 if the folder of a file to write is missing. With --json -, everything else goes to stderr."""
    if path is not None and not path.parent.is_dir():
        fail(f"there is no folder {path.parent} for {path.name}", code=6)
    if path == STDOUT:
        sys.stdout = sys.stderr


def write_json(path: Path | None, value: Any) -> None:
    """Writes `value`, of dicts, lists, numbers, arrays and text; what is not finite as null. Code 6 if it cannot."""
    if path is None:
        return
    text = redact(json.dumps(_plain(value), indent=1) + "\n")
    try:
        sys.__stdout__.write(text) if path == STDOUT else path.write_text(text, "utf-8")  # type: ignore[union-attr]
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}", code=6)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers(text: str, flag: str) -> list[int]:
    """`1-3,7` as [1, 2, 3, 7]; code 2 if it is not that."""
    found: list[int] = []
    for part in text.split(","):
        if not (match := re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)):
            fail(f"{flag} {text!r} is not of the form 1-5 or 1,3,7-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= 100_000:
            fail(f"{flag}: {part} is no range of seeds")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        fail(f"{flag} {text!r} names a seed twice")
    return found


def component(name: str, flag: str) -> str:
    """`name`, if it can name a folder; else code 2."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,150}", name):
        fail(f"{flag} {name!r} names a folder too: letters, digits, '_', '-' and '.' only")
    return name


def sanitized(name: str) -> str:
    """As `common.run.track` does it."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)


def jsonable(value: Any) -> Any:
    """As it reads in args.json."""
    return redact(json.loads(json.dumps(value, default=str)))


def again(flags: list[str]) -> list[str]:
    """The flags to repeat when a run is resumed: those that its args.json does not keep, or must not decide."""
    if redact(flags) != flags:
        return flags
    return [word for word in flags if word.replace("_", "-") in ("--allow-env-import", "--no-allow-env-import")]
