"""Runs a script as it is, in a process of its own, and records its environments and what it passes to `common`.

Every run is forked from one server process that has done the slow imports (multiprocessing's forkserver; where the
system has none, each run imports again).
"""

import ast
import atexit
import contextlib
import hashlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

PRELOAD = [
    "common.checkpoint",
    "common.internals.speed.compile",
    "common.evaluation",
    "common.replay",
    "common.rollout",
]
PRELOAD += ["common.normalize", "common.tools.check.recorder", "common.tools.check.probe_envs", "imageio_ffmpeg"]
PRELOAD += ["torch._dynamo", "torch.utils.tensorboard", "tyro", "typeguard"]  # torch._dynamo: Adam's 2 s
REPORT = "recorded.pt"  # what a run writes at its end


def server(script: Path) -> Any:
    """The multiprocessing context that starts the runs, with the imports of `script` already done."""
    # The server's socket is in the temporary folder, and the name of a socket has at most 107 characters.
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
    """Runs `python script argv` in `folder`, with its output in files there, and exits with its code.

    Args:
        stop: a signal, and the step of the first environment after which the process sends it to itself.
    """
    _enter(script, folder, environ, argv)
    from common.tools.check.probe_envs import Recorder, register

    register()
    recording = Recording()
    if stop is not None:
        Recorder.stop = stop
    code: Any = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    recording.write()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


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


class Recording:
    """Records what a script passes to `common`, from here on."""

    def __init__(self) -> None:
        from common.checkpoint import Checkpoint
        from common.replay import ReplayBuffer
        from common.rollout import RolloutStorage

        self.stored: dict[int, list[dict[str, Any]]] = {}  # of each storage: its steps
        self.minibatches: list[dict[str, Any]] = []  # whole rollouts, when they are first split
        self.parts: dict[str, Any] = {}  # of the checkpoint
        self.first: dict[str, dict[str, Any]] = {}  # its parameters at the start
        split: dict[int, int] = {}  # steps that each storage had when it was last split
        restore = Checkpoint.restore

        def recorded(add: Any) -> Any:
            def record_add(storage: Any, **step: Any) -> None:
                self.stored.setdefault(id(storage), []).append(copies(step))
                add(storage, **step)

            return record_add

        def recorded_whole(minibatches: Any) -> Any:
            def record_minibatches(storage: Any, *words: int, **more: Any) -> Any:
                added = len(self.stored.get(id(storage), ()))
                if split.get(id(storage)) != added:
                    split[id(storage)] = added
                    self.minibatches.append(copies({**storage.fields, **more}))
                return minibatches(storage, *words, **more)

            return record_minibatches

        def record_restore(checkpoint: Any, obs: torch.Tensor) -> Any:
            result = restore(checkpoint, obs)
            self.parts, self.first = checkpoint.parts, parameters(checkpoint.parts)
            return result

        ReplayBuffer.add = recorded(ReplayBuffer.add)  # type: ignore[method-assign]
        RolloutStorage.add = recorded(RolloutStorage.add)  # type: ignore[method-assign]
        RolloutStorage.minibatches = recorded_whole(RolloutStorage.minibatches)  # type: ignore[method-assign]
        RolloutStorage.sequences = recorded_whole(RolloutStorage.sequences)  # type: ignore[method-assign]
        Checkpoint.restore = record_restore  # type: ignore[method-assign, assignment]

    def write(self) -> None:
        from common.tools.check.probe_envs import Recorder

        names = ("obs", "actions", "rewards", "terminations", "truncations", "next_obs")
        envs = []
        for seen in Recorder.seen:
            columns = {name: np.array([step[i] for step in seen["steps"]]) for i, name in enumerate(names)}
            envs.append({"seeds": seen["seeds"], **{name: torch.from_numpy(x) for name, x in columns.items()}})
        report = {
            "envs": envs,
            "stored": [
                {k: torch.stack([step[k] for step in steps]) for k in steps[0]} for steps in self.stored.values()
            ],
            "minibatches": self.minibatches,
            "first": self.first,
            "last": parameters(self.parts),
            "state": {name: digest(part) for name, part in self.parts.items() if not hasattr(part, "rings")},
        }
        torch.save(report, REPORT)


def copies(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().cpu().clone() for name, value in tensors.items() if value is not None}


def parameters(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Copies of the parameters of every network among the parts of a checkpoint."""
    networks = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    return {name: copies(dict(network.named_parameters())) for name, network in networks.items()}


def digest(part: Any) -> str:
    """A hash of all numbers in the state of a network, an optimizer or a dict."""
    sha = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, dict):
            value = [item for key in sorted(value, key=str) for item in (repr(key), value[key])]
        if isinstance(value, list | tuple):
            for item in value:
                take(item)
        else:
            array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
            sha.update(array.tobytes() if isinstance(array, np.ndarray) else repr(value).encode())

    take(part if isinstance(part, dict) else part.state_dict())
    return sha.hexdigest()
