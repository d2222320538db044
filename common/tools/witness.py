"""Runs a script as it is, in a process of its own, and notes what it did: the side of `check` that is watched.

Every run is a fork of one server process in which the slow imports are done (multiprocessing's forkserver; where the
system has none, each run imports anew). Nothing of the script is changed. Noted are what its environments answered,
and, at the doors of `common`, what it stored, handed to its minibatches and put into its checkpoint.
"""

import ast
import atexit
import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import types
import typing
from pathlib import Path
from typing import Any

PRELOAD = ["common.checkpoint", "common.compilation", "common.evaluation", "common.replay", "common.rollout"]
PRELOAD += [
    "common.normalize",
    "common.tools.witness",
    "common.tools.worlds",
    "imageio_ffmpeg",
    "torch._dynamo",
]  # Adam's 2 s
PRELOAD += ["torch.utils.tensorboard", "tyro", "typeguard"]
REPORT = "witness.pt"  # what a run leaves behind, unless it was killed


def server(script: Path) -> Any:
    """Where processes are started, with what `script` imports already there."""
    # The server's socket lies in the temporary folder, and the name of a socket has at most 107 characters.
    forkserver = "forkserver" in multiprocessing.get_all_start_methods() and len(tempfile.gettempdir()) < 70
    context: Any = multiprocessing.get_context("forkserver" if forkserver else "spawn")
    if forkserver:
        with contextlib.suppress(SyntaxError):
            for node in ast.walk(ast.parse(script.read_text("utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                PRELOAD.extend([node.module] if isinstance(node, ast.ImportFrom) and node.module else names)
        context.set_forkserver_preload(PRELOAD)
    return context


def play(script: str, folder: str, environ: dict[str, str], argv: list[str], stop: tuple[int, int] | None) -> None:
    """Runs `python script argv` in `folder`; its output goes to files there, its exit code is this process's.

    Args:
        stop: a signal, and the step of the first environment after which the process sends it to itself.
    """
    _enter(script, folder, environ, argv)
    from common.tools import worlds

    worlds.register()
    notes = Notes()
    if stop is not None:
        number, at = stop
        steps = itertools.count(1)

        def after_step() -> None:
            if next(steps) == at:
                os.kill(os.getpid(), number)

        worlds.Witness.after_step = staticmethod(after_step)
    code: Any = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    notes.write()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def describe(script: str, folder: str, environ: dict[str, str]) -> None:
    """Leaves the flags of a script in `folder`: each field of its Args with its default and other values to try."""
    _enter(script, folder, environ, [])
    from common.args import RunArgs

    script_globals = runpy.run_path(script, run_name="described_by_check")
    found = [x for x in script_globals.values() if isinstance(x, type) and issubclass(x, RunArgs) and x is not RunArgs]
    if not found:
        print("error: it has no Args(common.RunArgs)", file=sys.stderr)
        os._exit(2)
    args = found[-1]
    hints = typing.get_type_hints(args, globalns=script_globals)
    inherited = {field.name for field in dataclasses.fields(RunArgs)}
    flags = {}
    for field in dataclasses.fields(args):
        value = None if field.default is dataclasses.MISSING else field.default
        own = field.name not in inherited
        flags[field.name] = {"default": value, "others": others(field.name, hints[field.name], value) if own else None}
    Path("flags.json").write_text(json.dumps(flags))


def others(name: str, kind: Any, value: Any) -> list[Any]:
    """Values near `value` that a flag of this type can have as well; none for a type that is not known."""
    options = typing.get_args(kind)
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(option for option in options if option is not type(None))
        if value is None:
            known: dict[Any, list[Any]] = {float: [1e-6, 0.1, 1.0], int: [1, 2, 10], bool: [True, False]}
            return known.get(kind, [])
    if typing.get_origin(kind) is typing.Literal:
        return [option for option in options if option != value]
    if kind is bool:
        return [not value]
    if kind is int:
        return [value + 1, 2 * value + 1, max(value // 2, 1)]
    if kind is float:
        return [0.1 * value, (1 + value) / 2, 0.5 * value, 2 * value + 0.1]
    if typing.get_origin(kind) is tuple and options[:1] in ((int,), (float,)):
        return [[*value, value[-1] + 1], [*value[:-1], value[-1] + 1]] if value else [[8]]
    return []


def _enter(script: str, folder: str, environ: dict[str, str], argv: list[str]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [script, *argv]
    sys.path.insert(0, os.path.dirname(script))


class Notes:
    """What passes the doors of `common`."""

    def __init__(self) -> None:
        from common.checkpoint import Checkpoint
        from common.replay import ReplayBuffer
        from common.rollout import RolloutStorage

        self.stored: dict[int, list[dict[str, Any]]] = {}  # of each storage: its steps
        self.minibatches: list[dict[str, Any]] = []  # whole rollouts, as they are split up first
        self.checkpoint: Any = None
        self.first: dict[str, dict[str, Any]] = {}
        self.epochs: dict[int, int] = {}  # storage: steps ever added when it was split up last
        notes = self

        def noted(add: Any) -> Any:
            def note_add(storage: Any, **step: Any) -> None:
                mine = notes.stored.setdefault(id(storage), [])
                mine.append({name: value.detach().cpu().clone() for name, value in step.items()})
                add(storage, **step)

            return note_add

        ReplayBuffer.add = noted(ReplayBuffer.add)  # type: ignore[method-assign]
        RolloutStorage.add = noted(RolloutStorage.add)  # type: ignore[method-assign]

        minibatches, start = RolloutStorage.minibatches, Checkpoint.start

        def note_minibatches(storage: Any, num_minibatches: int, **more: Any) -> Any:
            added = len(notes.stored.get(id(storage), ()))
            if notes.epochs.get(id(storage)) != added:
                notes.epochs[id(storage)] = added
                rollout = {**storage.fields, **more}
                notes.minibatches.append({k: v.detach().cpu().clone() for k, v in rollout.items()})
            return minibatches(storage, num_minibatches, **more)

        def note_start(checkpoint: Any, seed: int) -> Any:
            result = start(checkpoint, seed)
            notes.checkpoint, notes.first = checkpoint, parameters(checkpoint.parts)
            return result

        RolloutStorage.minibatches = note_minibatches  # type: ignore[method-assign, assignment]
        Checkpoint.start = note_start  # type: ignore[method-assign, assignment]

    def write(self) -> None:
        import numpy as np
        import torch

        from common.tools.worlds import Witness

        def column(steps: list[Any], i: int) -> Any:
            return torch.from_numpy(np.array([step[i] for step in steps]))

        names = ("obs", "actions", "rewards", "terminations", "truncations", "next_obs")
        worlds = [
            {"seeds": seen["seeds"], **{name: column(seen["steps"], i) for i, name in enumerate(names)}}
            for seen in Witness.seen
        ]
        stored = [
            {name: torch.stack([step[name] for step in steps]) for name in steps[0]} for steps in self.stored.values()
        ]
        parts = {} if self.checkpoint is None else self.checkpoint.parts
        torch.save(
            {
                "worlds": worlds,
                "stored": stored,
                "minibatches": self.minibatches,
                "first": self.first,
                "last": parameters(parts),
                "state": {name: digest(part) for name, part in parts.items() if not hasattr(part, "rings")},
            },
            REPORT,
        )


def parameters(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Copies of the parameters of every network among the parts of a checkpoint."""
    from torch import nn

    return {
        name: {key: value.detach().cpu().clone() for key, value in part.named_parameters()}
        for name, part in parts.items()
        if isinstance(part, nn.Module)
    }


def digest(part: Any) -> str:
    """A hash of all numbers in the state of a network, an optimizer or a dict."""
    import numpy as np
    import torch

    sha = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                sha.update(repr(key).encode())
                take(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                take(item)
        elif isinstance(value, torch.Tensor):
            sha.update(value.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, np.ndarray):
            sha.update(value.tobytes())
        else:
            sha.update(repr(value).encode())

    take(part if isinstance(part, dict) else part.state_dict())
    return sha.hexdigest()
