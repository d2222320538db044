"""Greedy evaluation and its film: beside training, never inside it."""

import contextlib
import functools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from common.args import RANK, RunArgs
from common.envs import final_obs, make_envs
from common.health import Hindsight
from common.phases import stepping
from common.run import Run
from common.video import Camera, magnified

PARALLEL_ENVS = 10


def evaluate(policy: Callable[[Tensor], Tensor], args: RunArgs, run: Run, step: int) -> None:
    """Plays `args.eval_episodes` episodes with `policy` and logs eval/*; the first is filmed.

    With `run.watch_value(...)` before, health/value_error as well, of the same episodes.

    Environments, seeds and random generators are its own, so that training goes on as if it had not happened.
    The same episodes (the same seeds) are played every time. policy.pt is written too. Nothing but that
    happens with `--eval-episodes 0`. Under torchrun the first process plays, and the others wait for it.

    Args:
        policy: a method of a network, [n, ...] observations on the network's device to [n, ...] actions.
        step: environment steps so far, the x axis.
    """
    run.save_policy(policy)
    if args.eval_episodes == 0:
        return
    began, stepped = time.monotonic(), stepping.seconds
    video = run.dir / "videos" / f"step-{step:09d}.mp4" if args.capture_video else None
    metrics: dict[str, float] = {}
    if RANK == 0:
        hindsight = run.hindsight() if run.hindsight is not None else None
        parts = run.checkpoint.parts.values() if run.checkpoint is not None else ()
        returns, lengths = play(
            policy,
            args.env_id,
            args.eval_episodes,
            args.seed,
            video,
            args.allow_env_import,
            stop=lambda: run.stop_requested,
            env_timeout=args.env_timeout,
            life_loss=run.checkpoint is not None and run.checkpoint.envs.life_loss,  # as the value has learnt it
            hindsight=hindsight,
            networks=[part for part in parts if isinstance(part, nn.Module)],
        )
        metrics = {
            "eval/episodic_return": float(returns.mean()),
            "eval/episodic_return_std": float(returns.std()),
            "eval/episodic_length": float(lengths.mean()),
        }
        if hindsight is not None:
            metrics["health/value_error"] = hindsight.error
    stepping.seconds = stepped
    if run.must_stop(now=True):
        run.leave_out(time.monotonic() - began)
        run.stop(step, run.checkpoint is not None and run.checkpoint.write(step, evaluation_missed=True))
    filmed = video if video is not None and video.exists() else None
    run.log_evaluation(metrics, step, time.monotonic() - began, filmed)


def play(
    policy: Callable[[Tensor], Tensor],
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
    life_loss: bool = False,
    hindsight: Hindsight | None = None,
    networks: Sequence[nn.Module] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Returns and lengths of `episodes` episodes, float64 and int64 [episodes], in a fixed order.

    Each of `num_envs` parallel environments plays a share of the episodes that is fixed beforehand. Taking the first
    `episodes` to end, whichever environment they come from, would count short ones too often. Which episodes are
    played depends on `num_envs`, as each environment has a seed of its own.

    Args:
        life_loss: a lost life is a termination to `hindsight`; the game goes on.
        hindsight: sees the episodes that count, and has its error afterwards.
        networks: in evaluation mode meanwhile, as that of the policy is.
    """
    name = env_id.rpartition(":")[2]  # make_envs imports the module of module:Env-v0
    num_envs = 1 if human else min(episodes, num_envs)
    share = [len(range(i, episodes, num_envs)) for i in range(num_envs)]
    played: list[list[tuple[float, int]]] = [[] for _ in range(num_envs)]
    network = getattr(policy, "__self__", None)
    device = next(network.parameters()).device if isinstance(network, nn.Module) else torch.device("cpu")

    with _aside(seed, network, *networks), contextlib.closing(Camera(video)) as camera:
        first: Callable[[], gym.Env] | None = None
        if human:
            first = functools.partial(gym.make, name, render_mode="human")
        elif video is not None:
            first = functools.partial(camera.film, name)
        envs = make_envs(
            env_id, num_envs, async_envs, allow_import, life_loss=life_loss, first=first, env_timeout=env_timeout
        )
        obs, _ = envs.reset(seed=seed, role=1)
        while any(len(done) < n for done, n in zip(played, share, strict=True)) and not stop():
            if env_id.startswith("ALE/") and not played[0] and camera.due():
                camera.take(magnified(obs[0, -1].numpy()))
            with torch.no_grad():
                actions = policy(obs.to(device))
            next_obs, rewards, terminations, truncations, infos = envs.step(actions)
            if hindsight is not None:
                counts = torch.tensor([len(done) < n for done, n in zip(played, share, strict=True)])
                hindsight.add(obs, rewards, final_obs(next_obs, infos), terminations, truncations, counts)
            obs = next_obs
            for i in np.flatnonzero(infos.get("_episode", ())):
                if len(played[i]) < share[i]:
                    played[i].append((float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i])))
        envs.close()
        if hindsight is not None:
            hindsight.look_back(device)
    order = [played[i % num_envs][i // num_envs] for i in range(episodes) if i // num_envs < len(played[i % num_envs])]
    returns, lengths = zip(*order, strict=True) if order else ((math.nan,), (0,))
    return np.array(returns), np.array(lengths)


@contextlib.contextmanager
def _aside(seed: int, *networks: Any) -> Iterator[None]:
    """Puts random generators and the networks' training modes back afterwards; inside, draws depend on `seed` alone."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    found = [network for network in networks if isinstance(network, nn.Module)]
    modes = [(module, module.training) for network in found for module in network.modules()]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        for network in found:
            network.eval()
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
            for module, training in modes:  # train() would wake up the layers that a fork has frozen
                module.training = training
