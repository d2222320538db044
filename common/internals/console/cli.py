"""The command line of a script: its flags, its --help, and errors of one line."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import json
import os
import re
import shutil
import sys
import textwrap
import traceback
import types
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

from common import args as arguments
from common.args import RunArgs, fail, say
from common.internals.console.checks import fits, from_json, type_hints, type_name
from common.internals.resume.files import read_object

T = TypeVar("T", bound="HasDebug")
ELSEWHERE = {  # flags of CleanRL and others, and what they are here
    "env": "--env-id",
    "exp-name": "the script's file name; in W&B also --wandb-name and --wandb-group",
    "wandb-project-name": "--wandb-project",
    "save-model": "policy.pt, which is always written",
    "lr": "--learning-rate, in sac.py --policy-lr and --q-lr",
    "device": "--cuda or --no-cuda",
    "log-dir": "--runs-dir",
    "autotune": "the default; --alpha 0.2 is a fixed temperature",
}
# The groups of --help, each with its first field in RunArgs; what RunArgs does not have comes before them.
GROUPS = {"environment": "env_id", "run": "seed", "evaluation": "eval_episodes", "Weights & Biases": "track"}


class HasDebug(Protocol):
    debug: bool


def parse(args_class: type[T], doc: str | None = None, argv: list[str] | None = None, prog: str | None = None) -> T:
    """The command line as an `args_class`; `--help` shows `doc` and the docstring of every field.

    Ends the process with code 2 and one line on stderr if a flag is unknown or a value does not fit.
    From here on an uncaught exception is one line as well, unless `--debug` is given.
    """
    import tyro

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process; libraries expect a stream
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    with contextlib.suppress(Exception):  # a character that an environment prints must not end a run
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    if os.environ.pop("PLAINRL_ASKED", None):
        _answer(args_class)
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        say(help_text(args_class, doc or ""))
        raise SystemExit(0)
    resumed = _resumed(args_class, argv)
    default: dict[str, Any] = {} if resumed is None else {"default": resumed}
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_integer)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            args = tyro.cli(args_class, prog=prog, description=doc, args=argv, **default, registry=registry)
    except OSError:  # --help | head
        say("")
        raise SystemExit(0) from None
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        if "error: " in printed.getvalue():  # a field's own check
            say(printed.getvalue(), sys.stderr, end="")
            raise
        line = _one_line(printed.getvalue()) or "the arguments could not be read; see --help"
        unknown = re.search(r"Unrecognized options: ([^\s,]+)", line)
        fail(_unknown(args_class, argv, unknown[1]) if unknown else line)
    say(printed.getvalue(), sys.stderr, end="")
    arguments.show_tracebacks = args.debug
    if not args.debug:
        sys.excepthook = _report
    return args


def help_text(args_class: type, doc: str) -> str:
    """`doc` and the flags; those of a script in groups, the algorithm's own first, then those of RunArgs."""
    import tyro

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tyro offers no other way to groups
        actions: Any = tyro.extras.get_parser(args_class)._actions
    width = max(min(shutil.get_terminal_size().columns, 100), 60)
    parser = argparse.ArgumentParser(add_help=False, formatter_class=functools.partial(_HelpFormatter, width=width))
    titles, title = {}, ""
    for name in RunArgs.__dataclass_fields__ if issubclass(args_class, RunArgs) else ():
        titles[name] = title = {field: group for group, field in GROUPS.items()}.get(name, title)
    groups = {title: parser.add_argument_group(title) for title in ("arguments", "algorithm", *GROUPS, "options")}
    for action in actions:
        name = action.dest.replace("-", "_")
        if not action.option_strings:
            groups["arguments"].add_argument(name, help=_help(action), metavar=_metavar(action))
        elif name != "help":
            group = groups[titles.get(name, "algorithm") if titles else "options"]
            group.add_argument(*action.option_strings, help=_help(action), metavar=_metavar(action))
    _, _, flags = parser.format_help().partition("\n\n")  # without argparse's own usage line
    return f"{_wrapped(doc, width)}\n\n{flags}"


def _wrapped(doc: str, width: int) -> str:
    """`doc` with its paragraphs and list items wrapped; indented commands are kept."""
    blocks: list[list[str]] = []
    before = ""
    for line in doc.strip().splitlines():
        begins = not line.strip() or line.startswith("    ") or re.match(r"\d+\. ", line)
        if begins or not before.strip() or before.startswith("    "):
            blocks.append([])
        blocks[-1].append(line if line.startswith("    ") else line.strip())
        before = line
    filled = []
    for block in blocks:
        text = " ".join(block)
        indent = "   " if re.match(r"\d+\. ", text) else ""
        command = text.startswith("    ")
        filled.append(text if command else textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False))
    return "\n".join(filled)


def _help(action: Any) -> str:
    text, found, default = action.help.replace("%", "%%").rpartition(" (default: ")
    if not found:  # a required argument
        return default
    default = default[:-1]
    return text if default in ("", "None", "False") or "(default" in text else f"{text} (default: {default})"


def _metavar(action: Any) -> str | None:
    return action.metavar and action.metavar.removeprefix("{None}|")


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str, width: int) -> None:
        super().__init__(prog, max_help_position=30, width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return str(action.metavar or action.dest)
        *_, flag = action.option_strings
        return f"--[no-]{flag[5:]}" if flag.startswith("--no-") else f"{flag} {action.metavar or ''}".rstrip()


def _caught(make: Callable[[], Any]) -> tuple[Any, str]:
    """What `make` returns and "", or None and the error's text."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return make(), ""
    except (Exception, SystemExit) as error:
        return None, printed.getvalue().strip().removeprefix("error: ") or f"{type(error).__name__}: {error}"


def similar(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean KNOWN?` where a known name is like `name`."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _unknown(args_class: type, argv: list[str], word: str) -> str:
    """Why `word` is no argument, and what to type instead."""
    hints = type_hints(args_class)
    for before, here in itertools.pairwise(["", *argv]):
        flag, _, value = here.rpartition("=") if "=" in here else (before, "", here)
        ((no, name),) = re.findall("(?s)^(?:--(no-)?)?(.*)$", flag.replace("_", "-"))
        if value == word and flag.startswith("--") and hints.get(name.replace("-", "_")) is bool:
            negated = bool(no) != (value.lower() in ("false", "0", "no", "off"))
            return f"--{no}{name} takes no value: use --{'no-' * negated}{name}"
    if not word.startswith("-"):
        return f"{word!r} belongs to no flag; --help lists the flags"
    name = word.partition("=")[0].lstrip("-").replace("_", "-")
    names = [field.replace("_", "-") for field in args_class.__dataclass_fields__]  # type: ignore[attr-defined]
    if name in ELSEWHERE and issubclass(args_class, RunArgs):
        return f"there is no --{name}: here it is {ELSEWHERE[name]}"
    return f"there is no --{name}{similar(name, names, '--') or '; --help lists the flags'}"


def _answer(args_class: type[T]) -> NoReturn:
    """For tools: parses each command line on stdin, prints the arguments or the error as JSON, and exits."""
    parsed = [_caught(functools.partial(parse, args_class, argv=argv)) for argv in json.load(sys.stdin)]
    answers = [{"error": error} if error else {"args": dataclasses.asdict(args)} for args, error in parsed]
    names = args_class.__dataclass_fields__  # type: ignore[attr-defined]
    types_ = {name: type_name(hint) for name, hint in type_hints(args_class).items() if name in names}
    say(json.dumps({"types": types_, "answers": answers}, default=str))
    raise SystemExit(0)


def _resumed(args_class: type[T], argv: list[str]) -> T | None:
    """With `--resume RUN_DIR`, the arguments of that run: flags that are not given are as they were.

    All but --allow-env-import: who made the directory does not decide what is imported here.
    Ends the process with code 3 and one line if they are no arguments of this script.
    """
    for i, word in enumerate(argv):
        flag, _, folder = word.partition("=")
        if flag == "--resume":
            folder = folder or "".join(argv[i + 1 : i + 2])
            config, script = read_config(folder), Path(sys.argv[0])
            if args_class.__module__ == "__main__" and (began := config.get("script", script.stem)) != script.stem:
                fail(f"{folder} is a run of {began}: python {script.parent / began}.py --resume {folder}", code=3)
            names = {field.name for field in dataclasses.fields(args_class) if field.init} - {"allow_env_import"}  # type: ignore[arg-type]
            values = {name: value for name, value in config.items() if name in names} | {"resume": folder}
            args, error = _caught(lambda: args_class(**values))  # noqa: B023 - called at once
            if error:
                fail(f"{os.path.join(folder, 'args.json')}: {error}", code=3)
            return args
    return None


def read_config(run_dir: str) -> dict[str, Any]:
    """args.json of a run directory: the fields of RunArgs and what `track` has added have their types.

    Ends the process with code 3 and one line if there is none, or it holds something else.
    """
    hints = {**type_hints(RunArgs), **dict.fromkeys(("script", "device", "common", "wandb_id"), str)}
    hints |= {"threads": int, "processes": int, "versions": dict}
    try:
        config = read_object(Path(run_dir), "args.json")
        for name, hint in hints.items():
            if name in config and not fits(from_json(config[name], hint), hint):
                raise ValueError(f"{name} must be {type_name(hint)}, not {config[name]!r:.60}")
        return config
    except (OSError, ValueError) as error:
        if not run_dir:
            fail("--resume takes a run directory", code=3)
        path = Path(run_dir)
        why = f"its args.json cannot be read ({error})" if path.is_dir() else "there is no such folder"
        runs = [f"; did you mean {folder}?" for folder in path.parents if (folder / "args.json").exists()]
        fail(f"{run_dir} is not a run directory: {why}{''.join(runs[:1])}", code=3)


def _integer(type_info: Any) -> Any:
    """Integers may be written 1e6 or 1_000_000."""
    from tyro.constructors import PrimitiveConstructorSpec

    def read(words: list[str]) -> int:
        try:
            return int(words[0])
        except ValueError:
            with contextlib.suppress(ValueError):
                if (number := float(words[0])).is_integer():
                    return int(number)
            raise ValueError(f"{words[0]!r} is not a whole number") from None

    if type_info.type is not int:
        return None
    return PrimitiveConstructorSpec(1, "INT", read, lambda value: type(value) is int, lambda value: [str(value)])


def _one_line(panel: str) -> str:
    """tyro's boxed message without its frame, its help texts and its footer."""
    lines = [re.sub(r"^[│╭╰][─ ]*|[─ ]*[│╮╯]$", "", line).strip() for line in panel.splitlines()]
    lines = [line for line in lines[1:-1] if line.strip("-─")]
    text = " ".join(line for line in lines if not re.match(r"For full helptext|\(default|.*\(default: ", line))
    text = re.sub(r"Argument helptext:.*", "", text).strip()
    return f"{text} (--help lists the flags)" if text else ""


def _report(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        say("error: interrupted", sys.stderr)
        os._exit(130)
    frames = traceback.extract_tb(trace)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    say(f"error: {kind.__name__}: {text}{where}; --debug shows the traceback", sys.stderr)
