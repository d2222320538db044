"""Checksummed checkpoint files: written atomically, read as data, the newest whole one found."""

import functools
import hashlib
import io
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from common.args import RANK, WORLD_SIZE, fail, warn
from common.internals.resume.files import opened_atomically
from common.internals.speed import processes

FORMAT = 3  # 2: before the environments' state had its present types
MAGIC = b"SHA256:"


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, with one warning for each that is not; None if there has been none yet.

    Under torchrun it is whole if it is committed, and the files of all processes are.
    Files that a killed process left half written are removed, broken checkpoints are renamed to *.broken.
    Ends the process with code 3 if there are checkpoints and none is whole.
    """
    own = own_folder(folder)
    for path in own.glob("*.tmp"):
        path.unlink()
    found = sorted(own.glob("step-*.pt"), reverse=True)
    if WORLD_SIZE > 1:
        committed = processes.on_rank_zero(
            lambda: sorted((path.stem for path in folder.glob("*.commit")), reverse=True)
        )
        for path in found:
            if path.stem not in committed:
                path.unlink()  # killed before all had written theirs
        found = [own / f"{stem}.pt" for stem in committed]
    for path in found:
        problem = None
        try:
            content = read_file(path)
            for segments in content["segments"].values():
                for file, _, _ in segments:
                    read_file(own / file)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            problem = f"{path}: {str(error).splitlines()[0]}"
        problems = [text for text in processes.all_gather_object(problem) if text]
        if problems:
            warn(f"skipping the broken checkpoint {problems[0]}")
            continue
        for broken in found[: found.index(path)]:
            # The commit file is everybody's: if two processes renamed it, the second would find it gone.
            for file in [broken] + [folder / f"{broken.stem}.commit"] * (RANK == 0):
                if file.exists():
                    file.rename(file.with_suffix(".broken"))
        return content
    if found:
        what = f"no checkpoint in {folder} is whole; {len(found)} are broken"
        processes.on_rank_zero(functools.partial(fail, what, code=3))
    return None


def own_folder(folder: Path) -> Path:
    """Where this process keeps its files."""
    return folder / f"process-{RANK}" if WORLD_SIZE > 1 else folder


def write_file(path: Path, content: Any) -> None:
    """Writes so that at any moment either the old file or the whole new one is at `path`, also after a power cut."""
    with opened_atomically(path) as file:
        hashed: Any = _Hashed(file)
        torch.save(_plain(content), hashed)
        file.write(MAGIC + hashed.sha256.digest())
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except PermissionError:  # Windows opens no folder
        return
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_file(path: Path) -> Any:
    """What `write_file` wrote.

    Raises:
        ValueError: the file is cut short or changed.

    Ends the process with code 3 if it is whole, and of another format.
    """
    data = path.read_bytes()
    end = len(data) - len(MAGIC) - hashlib.sha256().digest_size
    if end < 0 or data[end : end + len(MAGIC)] != MAGIC:
        raise ValueError("it is cut short")
    view = memoryview(data)
    if hashlib.sha256(view[:end]).digest() != view[end + len(MAGIC) :]:
        raise ValueError("its checksum does not match")
    content = _unplain(torch.load(io.BytesIO(view[:end]), map_location="cpu", weights_only=True))
    if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
        reason = f"has checkpoint format {content['format']}, and this version reads {FORMAT}"
        fail(f"{path} {reason}: resume it with the version that made it (args.json has the commit)", code=3)
    return content


class _Hashed:
    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _plain(value: Any) -> Any:
    """What `weights_only=True` loads: NumPy arrays and numbers become tagged tensors, the rest stays."""
    if isinstance(value, np.ndarray | np.generic):
        return {"numpy": torch.from_numpy(np.array(value)), "scalar": isinstance(value, np.generic)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return (tuple if isinstance(value, tuple) else list)(map(_plain, value))
    if value is None or isinstance(value, bool | int | float | str | bytes | Tensor):
        return value
    raise TypeError(f"a checkpoint takes tensors, arrays, numbers and text, not {type(value).__name__}")


def _unplain(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"numpy", "scalar"}:
        return value["numpy"].numpy()[()] if value["scalar"] else value["numpy"].numpy()
    if isinstance(value, dict):
        return {key: _unplain(item) for key, item in value.items()}
    return type(value)(map(_unplain, value)) if isinstance(value, tuple | list) else value


def failure(write: Callable[[], None]) -> str | None:
    """Why `write` failed, in the system's words; None if it did not. What is not the disk's is raised."""
    try:
        write()
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        return str(cause.strerror)
    return None


def check_weights(parts: dict[str, Any], step: int) -> None:
    """Ends all processes where weights are not finite (code 4), or not the same in each (code 1)."""
    networks = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    learnt = {name: [p for p in part.parameters() if p.requires_grad] for name, part in networks.items()}
    bad = next((name for name, params in learnt.items() if not all(p.isfinite().all() for p in params)), None)
    weights = hashlib.sha256()
    for p in [p for params in learnt.values() for p in params] if WORLD_SIZE > 1 else []:
        weights.update(p.detach().numpy(force=True).tobytes())
    states = processes.all_gather_object((bad, weights.digest()))
    what, code = "", 4
    if names := [name for name, _ in states if name]:
        what = f"{names[0]} is not finite at step {step}; the last checkpoint is kept"
    elif len(set(states)) > 1:
        code = 1
        what = f"the processes have different weights at step {step}: does each update call common.sync_grads?"
    if what:
        processes.on_rank_zero(functools.partial(fail, what, code=code))
