"""Greedy evaluation and its video."""

import contextlib
import functools
import inspect
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from common.args import RANK, RunArgs, beside_training, warn
from common.envs import Envs
from common.internals.resume.random_state import isolated_rng
from common.internals.speed import processes
from common.internals.speed.timing import env_timer
from common.internals.tracking.video import Camera, magnified
from common.internals.vector.make import EnvForm, form_of, make_vector
from common.run import Run

Policy = Callable[..., Any]
PARALLEL_ENVS = 10
ADVICE = "--eval-episodes 0 turns it off"


class Evaluation:
    """Plays `args.eval_episodes` greedy episodes when due, logs eval/*, records the first one, and writes policy.pt.

    policy_best.pt is the policy with the highest mean return of all evaluations, the first of equals.
    It has its own environments, seeds (the same every time) and random generators, so it never changes training.
    A failure is one warning. Under torchrun the first process plays while the others wait.

    Args:
        policy: a method of a network, [n, ...] observations on the network's device to [n, ...] actions. It is also
            given what else it has parameters for:
            action_mask: `Envs.action_mask` at the observations, on the same device.
            memory: what it returned beside the actions at the last step, or None at the first. It then returns
                (actions, memory).
            episode_starts: bool [n], true where `obs` is the first observation of an episode.
    """

    def __init__(self, run: Run, policy: Policy) -> None:
        self.run = run
        self.policy = policy
        self.has_envs = False
        if RANK == 0 and run.args.eval_episodes:
            # This warns if the environment can exist only once (a robot, a simulator at a port). It is then evaluated
            # at the end, after training has closed its own.
            with isolated_rng(run.args.seed), beside_training("evaluation", ADVICE):
                allow_import = run.args.allow_env_import
                make_vector(run.args.env_id, 1, allow_import=allow_import, form=form_of(run.args)).close()
                self.has_envs = True

    def __call__(self, step: int) -> bool:
        """Call it at the start of each iteration and after the last one, with the number of environment steps.

        Returns whether training should end, as the mean return has reached `args.stop_at_return`.
        """
        run, args = self.run, self.run.args
        if not run.evaluation_due(step):
            return False
        run.write_policy()
        began, env_seconds = time.monotonic(), env_timer.seconds
        video = run.dir / "videos" / f"step-{step:09d}.mp4" if args.capture_video else None
        metrics: dict[str, float] = {}
        if RANK == 0 and (self.has_envs or step >= args.total_timesteps):
            with beside_training("evaluation", ADVICE):
                if video is not None:
                    video.unlink(missing_ok=True)  # left by a run that was killed after it
                how: dict[str, Any] = {"env_timeout": args.env_timeout, "max_steps": args.eval_max_steps}
                how |= {"allow_import": args.allow_env_import, "form": form_of(args)}
                how |= {"num_envs": PARALLEL_ENVS if self.has_envs else 1, "stop": lambda: bool(run.signals.number)}
                returns, lengths = play(self.policy, args.env_id, args.eval_episodes, args.seed, video, **how)
                metrics = {
                    "eval/episodic_return": float(returns.mean()),
                    "eval/episodic_return_std": float(returns.std()),
                    "eval/episodic_length": float(lengths.mean()),
                }
        env_timer.seconds = env_seconds
        run.leave_out(time.monotonic() - began)
        if run.must_stop(now=True):
            run.stop(step)
        run.evaluated = step  # set last: a resumed run repeats an evaluation that a signal interrupted
        run.log_evaluation(metrics, step, video if video is not None and video.exists() else None)
        mean = metrics.get("eval/episodic_return", -math.inf)
        if mean > run.best_return:
            run.best_return = mean
            run.write_policy("policy_best.pt")
        limit = args.stop_at_return
        return limit is not None and processes.on_rank_zero(lambda: mean >= limit)


def play(
    policy: Policy,
    env_id: str,
    episodes: int,
    seed: int,
    video: Path | None = None,
    allow_import: bool = False,
    stop: Callable[[], bool] = lambda: False,
    human: bool = False,
    env_timeout: float = RunArgs.env_timeout,
    num_envs: int = PARALLEL_ENVS,
    async_envs: bool = False,
    max_steps: int = RunArgs.eval_max_steps,
    form: EnvForm | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns and lengths of `episodes` episodes, float64 and int64 [episodes]; NaN and 0 if `stop` came before.

    Environment i plays episodes i, i + num_envs, ... Taking the first `episodes` to end, whichever environment they
    come from, would favour short ones. The result depends on `num_envs`, as each environment has its own seed.

    Args:
        human: show the environment on the screen.
        max_steps: cut each episode after so many steps; its return so far counts, with a warning. 0: no limit.
        form: how each environment is made and wrapped.
    """
    form = form or EnvForm()
    name = env_id.rpartition(":")[2]  # make_vector imports the module of module:Env-v0
    num_envs = 1 if human else min(episodes, num_envs)
    returns, lengths = np.full(episodes, np.nan), np.zeros(episodes, np.int64)
    current = np.arange(num_envs)  # the episode that each environment plays
    network = getattr(policy, "__self__", None)
    wanted = inspect.signature(policy).parameters
    device = next(network.parameters()).device if isinstance(network, nn.Module) else torch.device("cpu")
    num_cut = 0

    with isolated_rng(seed, network), contextlib.closing(Camera(video)) as camera:
        first: Callable[[], gym.Env] | None = None
        if human:
            first = functools.partial(gym.make, name, render_mode="human", **form.kwargs)
        elif video is not None:
            first = functools.partial(camera.film, name, form.kwargs)
        limits: dict[str, Any] = {"env_timeout": env_timeout, "max_steps": max_steps, "form": form}
        vector = make_vector(env_id, num_envs, async_envs, allow_import, first=first, **limits)
        with contextlib.closing(Envs(vector, env_timeout=env_timeout)) as envs:
            obs, _ = envs.reset(seed=seed, evaluation=True)
            memory = None
            if envs.action_mask is not None and "action_mask" not in wanted:
                warn("the policy takes no action_mask: it may choose actions that are not allowed", once="no mask")
            while not lengths.all() and not stop():
                if env_id.startswith("ALE/") and lengths[0] == 0 and camera.due():
                    camera.take(magnified(obs[0, -1].numpy()))
                offered: Any = {"action_mask": envs.action_mask, "episode_starts": envs.episode_starts}
                given = {name: x if x is None else x.to(device) for name, x in offered.items() if name in wanted}
                if "memory" in wanted:
                    given["memory"] = memory
                with torch.no_grad():
                    actions = policy(obs.to(device), **given)
                if "memory" in wanted:
                    actions, memory = actions
                obs, _, terminations, _, infos = envs.step(actions)
                for i in np.flatnonzero(infos.get("_episode", ())):
                    if current[i] < episodes:
                        returns[current[i]] = infos["episode"]["r"][i]
                        lengths[current[i]] = infos["episode"]["l"][i]
                        num_cut += int(infos["episode"]["l"][i] == max_steps and not terminations[i])
                        current[i] += num_envs
    if num_cut:
        what = f"{num_cut} of {episodes} evaluation episodes did not end within {max_steps:,} steps"
        warn(f"{what}: their returns so far count (--eval-max-steps)", once="evaluation episodes were cut")
    return returns, lengths
