"""Exact resume from checksummed checkpoints."""

import functools
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common.args import WORLD_SIZE, beside_training, fail, warn
from common.envs import Envs
from common.internals.resume.checkpoint_files import FORMAT, check_weights, own_folder, write_file
from common.internals.resume.commit import write_committed
from common.internals.resume.random_state import random_state, set_random_state
from common.internals.resume.rings import RingFiles
from common.internals.speed import processes
from common.run import Run
from common.schedule import Every

KEEP = 2  # checkpoints; the older one is used if the newer one is damaged


class Checkpoint:
    """Saves and restores a run: the named parts, the environments, all random generators, and the state of the logs.

        checkpoint = common.Checkpoint(run, envs, q_network=q_network, optimizer=optimizer, replay=replay)
        obs, _ = envs.reset(seed=args.seed)
        obs, global_step = checkpoint.restore(obs)
        while global_step < args.total_timesteps:
            ...
            checkpoint.save(global_step)

    A part is a dict or has `state_dict` and `load_state_dict`. Everything learned or accumulated must be a part; what
    follows from the step (schedules, `Every`) need not be. Of the replay, each checkpoint writes only the new steps.

    Files in `checkpoints/` of the run directory are written atomically, end in a SHA-256 checksum (torch.load detects
    almost no flipped bits), and load with `weights_only=True`. Under torchrun each process has its own folder there,
    and a checkpoint counts once `step-*.commit` records that every process has written its file.
    """

    def __init__(self, run: Run, envs: Envs, **parts: Any) -> None:
        self.run = run
        self.envs = envs
        self.parts = parts
        self.commits = run.dir / "checkpoints"
        self.folder = own_folder(self.commits)
        self.due = Every(run.args.save_interval)
        self.rings = RingFiles(self.folder)
        run.resumable = True

    def restore(self, obs: Tensor) -> tuple[Tensor, int]:
        """Restores the run that is resumed, if there is one. Call it after `envs.reset`, with its observations.

        Returns the observations to act on, [num_envs, ...], and the step to start from: `obs` and 0 for a new run.
        Ends the process with code 3 if the checkpoint does not fit the parts.
        """
        if WORLD_SIZE == 1:  # several processes would not fail at the same step
            self.envs.on_failure = self._save_without_envs
        saved = self.run.saved
        if saved is None:
            modules = [part for part in self.parts.values() if isinstance(part, nn.Module)]
            processes.broadcast(tensor for module in modules for tensor in module.state_dict().values())
            if self.run.args.save_interval:
                self.envs.check_snapshots()
            return obs, 0
        step = saved["step"]
        if saved["parts"].keys() != self.parts.keys():
            fail(f"the checkpoint has {sorted(saved['parts'])}, the script has {sorted(self.parts)}", code=3)
        for name, part in self.parts.items():
            try:
                if isinstance(part, dict):
                    part.update(saved["parts"][name])
                    continue
                part.load_state_dict(saved["parts"][name])
                if name in saved["segments"]:
                    self.rings.load(name, part, saved["segments"][name])
            except (RuntimeError, ValueError, KeyError, OSError) as error:
                fail(f"{name} of the checkpoint at step {step} does not fit: {error}", code=3)
        self.envs.load_state_dict(saved["envs"])
        self.due = Every(self.run.args.save_interval, now=step)
        self.run.load_state_dict(saved["run"])
        set_random_state(saved["random"])
        self.run.saved = None
        self.run.checkpointed = step
        if self.envs.began_anew:
            for part in self.parts.values():
                if hasattr(part, "new_episodes"):
                    part.new_episodes()
            self.rings.segments.clear()  # new_episodes changed a step that is on disk: write the ring anew
        return self.envs.obs, step

    def save(self, step: int) -> None:
        """Writes a checkpoint if due: call it at the end of each iteration.

        It is due every `save_interval` steps, before an evaluation, at the last step, and when a signal asks to stop.
        If writing fails, there is one warning and the last checkpoint stays. Ends the process with 128 + n after
        signal n, and with code 4, writing nothing, if weights are not finite.
        """
        must_stop = self.run.must_stop()
        due = self.due(step) or self.run.evaluation_due(step) or step >= self.run.args.total_timesteps
        if due or must_stop:
            began = time.monotonic()
            self.write(step)
            self.run.leave_out(time.monotonic() - began)
        if must_stop:
            self.run.stop(step)

    def _save_without_envs(self) -> None:
        """After an environment has failed: keeps what was learnt; a resumed run starts new episodes."""
        if self.run.step > self.run.checkpointed:
            with beside_training("the last checkpoint"):
                self.write(self.run.step, snapshots=False)

    def write(self, step: int, snapshots: bool = True) -> bool:
        """Writes a checkpoint now, with the environments if `snapshots`; False, with a warning, if that fails."""
        if self.run.args.save_interval == 0:
            return False
        check_weights(self.parts, step)
        path = self.folder / f"step-{step:012d}.pt"
        reason = write_committed(path, self.commits, functools.partial(self._write, path, step, snapshots))
        if reason is not None:
            warn(f"no checkpoint at step {step}: {reason}; the last one is kept")
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
            "segments": {name: self.rings.save(name, part) for name, part in parts if hasattr(part, "rings")},
            "envs": self.envs.state_dict(snapshots),
            "run": self.run.state_dict(),
            "random": random_state(),
        }
        write_file(path, content)

    def _prune(self) -> None:
        """Removes files that the kept checkpoints do not need; called after a new one is on disk."""
        for path in [*sorted(self.commits.glob("*.commit"))[:-KEEP], *sorted(self.folder.glob("step-*.pt"))[:-KEEP]]:
            path.unlink(missing_ok=True)
        self.rings.prune()
