"""Exact resume: all that a run needs to go on as if it had never stopped, in files that tell when they are broken."""

import functools
import hashlib
import io
import os
import pickle
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from common.args import RANK, WORLD_SIZE, beside_training, fail, warn
from common.envs import Envs
from common.internals.resume.files import opened_atomically
from common.internals.speed import processes as distributed
from common.run import Run
from common.schedule import Every

FORMAT = 2  # 1: Box actions of ppo.py and reinforce_rollout.py were in the environment's units
KEEP = 2  # checkpoints; the older one is for the day the newer one is broken
MAGIC = b"SHA256:"


class Checkpoint:
    """Saves and restores a run: the named parts, the environments, all random generators, and what the run has logged.

        checkpoint = common.Checkpoint(run, envs, q_network=q_network, optimizer=optimizer, replay=replay)
        obs, global_step = checkpoint.start(args.seed)
        train_due = common.Every(args.train_frequency, now=global_step)
        while global_step < args.total_timesteps:
            ...
            checkpoint.save(global_step)

    A part has `state_dict` and `load_state_dict`, or is a dict. Everything learned or accumulated has to be one; what
    follows from the step (schedules, `Every`) has not. A part with large rings, the replay, has `rings` too: of those,
    a checkpoint writes only what is new since the last one, to a file of its own.

    Files, in `checkpoints/` of the run directory: written atomically, with a SHA-256 at the end, because torch.load
    notices next to no flipped bits; loadable with `weights_only=True`. Under torchrun each process has a folder of its
    own there, and a checkpoint counts once `step-*.commit` says that all of them have written theirs.
    """

    def __init__(self, run: Run, envs: Envs, **parts: Any) -> None:
        self.run = run
        self.envs = envs
        self.parts = parts
        self.commits = run.dir / "checkpoints"
        self.folder = _own(self.commits)
        self.due = Every(run.args.save_interval)
        self.segments: dict[str, list[tuple[str, int, int]]] = {}  # part: files, with the first and last slot of each
        self.older_files: set[str] = set()  # segments of the older one of the kept checkpoints
        run.resumable = True

    def start(self, seed: int) -> tuple[Tensor, int]:
        """The observations to begin with, [num_envs, ...], and the step: those of a new run, or of the one resumed.

        Ends the process with code 3 if what was saved does not fit the parts.
        """
        saved = self.run.saved
        if saved is None:
            modules = [part for part in self.parts.values() if isinstance(part, nn.Module)]
            distributed.broadcast(tensor for module in modules for tensor in module.state_dict().values())
            obs, _ = self.envs.reset(seed=seed)
            if self.run.args.save_interval:
                self.envs.check_snapshots()
            self._guard()
            return obs, 0
        step = saved["step"]
        if saved["parts"].keys() != self.parts.keys():
            fail(f"the checkpoint holds {sorted(saved['parts'])}, the script {sorted(self.parts)}", code=3)
        for name, part in self.parts.items():
            try:
                if isinstance(part, dict):
                    part.update(saved["parts"][name])
                    continue
                part.load_state_dict(saved["parts"][name])
                if name in saved["segments"]:
                    self._load_rings(name, saved["segments"][name])
            except (RuntimeError, ValueError, KeyError, OSError) as error:
                fail(f"{name} of the checkpoint at step {step} does not fit: {error}", code=3)
        self.envs.load_state_dict(saved["envs"])
        self.due = Every(self.run.args.save_interval, now=step)
        self.run.load_state_dict(saved["run"])
        _set_random_state(saved["random"])
        self.run.saved = None
        self._guard()
        self.run.checkpointed = step
        if self.envs.began_anew:  # episodes that ran when the checkpoint was written end there
            for part in self.parts.values():
                if hasattr(part, "new_episodes"):
                    part.new_episodes()
            self.segments.clear()  # the replay is written whole the next time: its newest step is not what was saved
        return self.envs.obs, step

    def save(self, step: int) -> None:
        """Call it at the end of each iteration: writes when due, before an evaluation, at the last step, and when a
        signal asks to stop.

        A checkpoint that cannot be written is one warning: training goes on, the last one is kept. It ends the process
        with 128 + n after signal n, and with code 4 instead of writing weights that are not finite.
        """
        must_stop = self.run.must_stop()
        due = self.due(step) or self.run.evaluation_due(step) or step >= self.run.args.total_timesteps
        if due or must_stop:
            began = time.monotonic()
            self.write(step)
            self.run.leave_out(time.monotonic() - began)
        if must_stop:
            self.run.stop(step)

    def _guard(self) -> None:
        if WORLD_SIZE == 1:  # several would have to fail at the same step
            self.envs.on_failure = self._save_without_envs

    def _save_without_envs(self) -> None:
        """An environment has failed: what was learnt until then is kept, and a resumed run begins new episodes."""
        if self.run.step > self.run.checkpointed:
            with beside_training("the last checkpoint"):
                self.write(self.run.step, snapshots=False)

    def write(self, step: int, snapshots: bool = True) -> bool:
        """Writes a checkpoint now; False, and a warning, if the disk does not take it. Nothing with save_interval 0.

        Args:
            snapshots: with the state of the environments.
        """
        if self.run.args.save_interval == 0:
            return False
        bad, weights = None, hashlib.sha256()
        for name, part in self.parts.items():
            for p in part.parameters() if isinstance(part, nn.Module) else ():
                if p.requires_grad and not bool(p.isfinite().all()):
                    bad = name
                if p.requires_grad and WORLD_SIZE > 1:
                    weights.update(p.detach().numpy(force=True).tobytes())
        states = distributed.gather((bad, weights.digest()))
        what, code = "", 4
        if names := [name for name, _ in states if name]:
            what = f"{names[0]} is not finite at step {step}; the last checkpoint is kept"
        elif len(set(states)) > 1:
            code = 1
            what = f"the processes have different weights at step {step}: does each update call common.sync_grads?"
        if what:
            distributed.on_first(functools.partial(fail, what, code=code))
        path = self.folder / f"step-{step:012d}.pt"
        reason = _failure(functools.partial(self._write, path, step, snapshots))
        reasons = [text for text in distributed.gather(reason) if text]
        if WORLD_SIZE > 1 and not reasons:  # the files that all processes have written count from here on
            content = {"format": FORMAT, "processes": WORLD_SIZE}
            commit = functools.partial(write_file, self.commits / f"{path.stem}.commit", content)
            reasons = list(filter(None, [distributed.on_first(functools.partial(_failure, commit))]))
        if reasons:
            if WORLD_SIZE > 1:
                path.unlink(missing_ok=True)  # one that not all have written
            warn(f"no checkpoint at step {step}: {reasons[0]}; the last one is kept")
            return False
        self._prune()
        self.run.checkpointed = step
        return True

    def _write(self, path: Path, step: int, snapshots: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = self.parts.items()
        content = {
            "format": FORMAT,
            "step": step,
            "parts": {name: part if isinstance(part, dict) else part.state_dict() for name, part in parts},
            "segments": {name: self._save_rings(name) for name, part in parts if hasattr(part, "rings")},
            "envs": self.envs.state_dict(snapshots),
            "run": self.run.state_dict(),
            "random": _random_state(),
        }
        write_file(path, content)

    def _save_rings(self, name: str) -> list[tuple[str, int, int]]:
        """Writes the slots filled since the last time; returns all files that together hold the ring."""
        rings: dict[str, np.ndarray]
        rings, written = self.parts[name].rings()
        kept = [s for s in self.segments.get(name, []) if s[2] > written - max(map(len, rings.values()))]
        first = kept[-1][2] if kept else 0
        if written > first:
            content = {}
            for key, ring in rings.items():
                slots = np.arange(max(first, written - len(ring)), written) % len(ring)
                content[key] = torch.from_numpy(ring[slots])
            file = f"{name}-{first:012d}-{written:012d}.pt"
            write_file(self.folder / file, content)
            kept.append((file, first, written))
        self.segments[name] = kept
        return kept

    def _load_rings(self, name: str, segments: list[tuple[str, int, int]]) -> None:
        rings, _ = self.parts[name].rings()
        for file, first, last in segments:
            content = read_file(self.folder / file)
            for key, ring in rings.items():
                slots = np.arange(max(first, last - len(content[key])), last) % len(ring)
                ring[slots] = content[key].numpy()
        self.segments[name] = segments
        self.older_files |= {file for file, _, _ in segments}

    def _prune(self) -> None:
        """Removes what the kept checkpoints do not need; only after a new one is safely on the disk."""
        for path in [*sorted(self.commits.glob("*.commit"))[:-KEEP], *sorted(self.folder.glob("step-*.pt"))[:-KEEP]]:
            path.unlink(missing_ok=True)
        files = {file for segments in self.segments.values() for file, _, _ in segments}
        for path in self.folder.glob("*.pt"):
            if not path.name.startswith("step-") and path.name not in files | self.older_files:
                path.unlink(missing_ok=True)
        self.older_files = files


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, with one warning for each that is not; None if there has been none yet.

    Under torchrun it is whole if it is committed, and the files of all processes are.
    Files that a killed process left half written are removed, broken checkpoints are renamed to *.broken.
    Ends the process with code 3 if there are checkpoints and none is whole.
    """
    own = _own(folder)
    for path in own.glob("*.tmp"):
        path.unlink()
    found = sorted(own.glob("step-*.pt"), reverse=True)
    if WORLD_SIZE > 1:
        committed = distributed.on_first(lambda: sorted((path.stem for path in folder.glob("*.commit")), reverse=True))
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
        problems = [text for text in distributed.gather(problem) if text]
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
        distributed.on_first(functools.partial(fail, what, code=3))
    return None


def _own(folder: Path) -> Path:
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


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy_state = np.random.get_state()  # noqa: NPY002
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def _failure(write: Callable[[], None]) -> str | None:
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
