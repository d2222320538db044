"""Exact resume: all that a run needs to go on as if it had never stopped, in files that tell when they are broken."""

import functools
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common.args import WORLD_SIZE, beside_training, fail, warn
from common.envs import Envs
from common.internals.resume.checkpoint_files import FORMAT, check_weights, failure, own_folder, write_file
from common.internals.resume.random_state import random_state, set_random_state
from common.internals.resume.rings import RingFiles
from common.internals.speed import processes
from common.run import Run
from common.schedule import Every

KEEP = 2  # checkpoints; the older one is for the day the newer one is broken


class Checkpoint:
    """Saves and restores a run: the named parts, the environments, all random generators, and what the run has logged.

        checkpoint = common.Checkpoint(run, envs, q_network=q_network, optimizer=optimizer, replay=replay)
        obs, _ = envs.reset(seed=args.seed)
        obs, global_step = checkpoint.restore(obs)
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
        self.folder = own_folder(self.commits)
        self.due = Every(run.args.save_interval)
        self.rings = RingFiles(self.folder)
        run.resumable = True

    def restore(self, obs: Tensor) -> tuple[Tensor, int]:
        """Puts everything into the state of the run that is resumed. Call it after `envs.reset`, before training.

        Args:
            obs: the first observations, [num_envs, ...].

        Returns:
            The observations to go on with and the step: of a new run, `obs` and 0.

        Ends the process with code 3 if what was saved does not fit the parts.
        """
        if WORLD_SIZE == 1:  # several processes would have to fail at the same step
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
            fail(f"the checkpoint holds {sorted(saved['parts'])}, the script {sorted(self.parts)}", code=3)
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
        if self.envs.began_anew:  # episodes that ran when the checkpoint was written end there
            for part in self.parts.values():
                if hasattr(part, "new_episodes"):
                    part.new_episodes()
            self.rings.segments.clear()  # the next checkpoint has it whole: its newest step is not what was saved
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
        check_weights(self.parts, step)
        path = self.folder / f"step-{step:012d}.pt"
        reason = failure(functools.partial(self._write, path, step, snapshots))
        reasons = [text for text in processes.all_gather_object(reason) if text]
        if WORLD_SIZE > 1 and not reasons:  # the files that all processes have written count from here on
            content = {"format": FORMAT, "processes": WORLD_SIZE}
            commit = functools.partial(write_file, self.commits / f"{path.stem}.commit", content)
            reasons = list(filter(None, [processes.on_rank_zero(functools.partial(failure, commit))]))
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
            "segments": {name: self.rings.save(name, part) for name, part in parts if hasattr(part, "rings")},
            "envs": self.envs.state_dict(snapshots),
            "run": self.run.state_dict(),
            "random": random_state(),
        }
        write_file(path, content)

    def _prune(self) -> None:
        """Removes what the kept checkpoints do not need; only after a new one is safely on the disk."""
        for path in [*sorted(self.commits.glob("*.commit"))[:-KEEP], *sorted(self.folder.glob("step-*.pt"))[:-KEEP]]:
            path.unlink(missing_ok=True)
        self.rings.prune()
