"""Vector environments: gymnasium 1.4 behind torch tensors, with every ending reported as it truly was."""

import ctypes.util
import functools
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode
from torch import Tensor

from common.args import fail

MAX_ENVS = 4096


class Envs:
    """`num_envs` environments stepped together; tensors in host memory, one row an environment.

    An environment that ends starts its next episode within the same step (SAME_STEP autoreset), so each
    step is `num_envs` true transitions: there is no step whose action is ignored. `terminations` say that
    the task ended (nothing to bootstrap from), `truncations` that only the recording did (a time limit).

    What `infos` holds where an episode ended in this step:
        final_obs: [num_envs, ...], the observation each transition truly ended on (see `final_obs`).
        episode: {"r": float64 [num_envs], "l": int64 [num_envs]}, undiscounted return and length in steps,
            valid where the mask `_episode` (bool [num_envs]) is true. Whole games of an Atari game, whatever
            `life_loss` says.
    """

    def __init__(self, vector: gym.vector.VectorEnv, life_loss: bool = False) -> None:
        if vector.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise ValueError(f"SAME_STEP autoreset is needed, not {vector.metadata.get('autoreset_mode')}")
        self.vector = vector
        self.num_envs = vector.num_envs
        self.single_observation_space: Any = vector.single_observation_space  # Box, as make_envs has seen to
        self.single_action_space: Any = vector.single_action_space
        self.life_loss = life_loss
        dtype = self.single_observation_space.dtype
        self._obs_dtype = np.uint8 if dtype == np.uint8 else np.float32
        self._bounds = None
        if isinstance(self.single_action_space, Box):
            self._bounds = self.single_action_space.low, self.single_action_space.high
        first = getattr(self.single_action_space, "start", 0)  # Discrete and MultiDiscrete have one
        self._first_action = first if np.any(first) else None
        self._action_shape = (self.num_envs, *(self.single_action_space.shape or ()))
        self._returns = np.zeros(self.num_envs, np.float64)
        self._lengths = np.zeros(self.num_envs, np.int64)
        self._lives = np.zeros(self.num_envs, np.int64)

    def reset(self, seed: int | None = None, role: int = 0) -> tuple[Tensor, dict[str, Any]]:
        """First observations [num_envs, ...]; `seed` and `role` give every environment a seed of its own."""
        seeds = None if seed is None else env_seeds(seed, self.num_envs, role)
        vector: Any = self.vector
        native = not hasattr(vector, "env_fns")  # ALE's own vector environment takes an array of seeds
        obs, infos = vector.reset(seed=np.array(seeds) if native and seeds else seeds)
        self._returns[:] = 0
        self._lengths[:] = 0
        if "lives" in infos:
            self._lives = np.array(infos["lives"])
        return self._tensor(obs), infos

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """One step of every environment.

        Args:
            actions: [num_envs] integers from 0 for Discrete; for MultiDiscrete and Box [num_envs, ...], or flat
                [num_envs, n]. A Box action outside its bounds is clipped to them. On any device.

        Returns:
            next_obs [num_envs, ...] (of the new episode where one ended), rewards float32 [num_envs],
            terminations and truncations bool [num_envs], infos.
        """
        acts = actions.numpy(force=True).reshape(self._action_shape)
        if self._bounds is not None:
            acts = np.clip(acts, *self._bounds)
        elif self._first_action is not None:
            acts = acts + self._first_action
        try:
            obs, rewards, terminations, truncations, infos = self.vector.step(acts)
        except Exception as error:
            fail(f"the environment failed in step(): {type(error).__name__}: {error}", code=5)
        self._returns += rewards
        self._lengths += 1
        next_obs = self._tensor(obs)
        ended = terminations | truncations
        if ended.any():
            final = next_obs.clone()
            for i in np.flatnonzero(ended):
                final[i] = torch.as_tensor(np.asarray(infos["final_obs"][i], self._obs_dtype))
            infos["final_obs"] = final
            infos["episode"] = {"r": np.where(ended, self._returns, 0.0), "l": np.where(ended, self._lengths, 0)}
            infos["_episode"] = ended
            self._returns[ended] = 0
            self._lengths[ended] = 0
        if self.life_loss and "lives" in infos:
            # ale-py 0.12's own life_loss_info hands out wrong final observations under SAME_STEP, so a lost
            # life is told from the counter. The game goes on: only the learner sees a termination.
            terminations = terminations | ((infos["lives"] < self._lives) & ~ended)
            self._lives = np.array(infos["lives"])
        return (
            next_obs,
            torch.from_numpy(rewards.astype(np.float32)),
            torch.from_numpy(terminations),
            torch.from_numpy(truncations),
            infos,
        )

    def close(self) -> None:
        self.vector.close()

    def _tensor(self, obs: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(obs, self._obs_dtype))  # a copy: the vector environment reuses its array


def final_obs(next_obs: Tensor, infos: dict[str, Any]) -> Tensor:
    """The observation each transition truly ended on: `next_obs`, but the last one where an episode ended."""
    return infos.get("final_obs", next_obs)


def env_seeds(seed: int, num_envs: int, role: int = 0) -> list[int]:
    """Seeds below 2**31 (ALE takes no more) that no two environments of a run share; `num_envs` at most MAX_ENVS.

    `role` 0 is training, 1 evaluation. Runs share none either while their `seed`s differ by less than 2**18.
    """
    return [((2 * seed + role) * MAX_ENVS + i) % 2**31 for i in range(num_envs)]


def make_envs(
    env_id: str,
    num_envs: int,
    async_envs: bool = False,
    allow_import: bool = False,
    *,
    life_loss: bool = False,
    first: Callable[[], gym.Env] | None = None,
) -> Envs:
    """`num_envs` copies of a gymnasium environment; Atari games (`ALE/...-v5`) in ALE's native vector environment.

    Atari games have the usual preprocessing of Mnih et al. (2015): 84 x 84 grey frames, the last 4 of them,
    an action repeated for 4 frames (maximum of the last two), up to 30 no-ops and FIRE at the start; no
    sticky actions. Rewards are the true ones: clipping belongs to the learner.

    Args:
        async_envs: a process for each environment (Atari games run in threads of their own either way).
        allow_import: import the module of an id of the form module:Env-v0.
        life_loss: report a lost life as a termination, without restarting the game.
        first: makes the first environment, if it is to be another than the rest (one that is filmed, say).

    Ends the process with code 2 and one line if the environment is unknown, not installed or unsupported.
    """
    if ":" in env_id and not allow_import:
        fail(
            f"--env-id {env_id} would import and run {env_id.split(':')[0]!r}; if you trust it, add --allow-env-import"
        )
    if num_envs > MAX_ENVS:
        fail(f"--num-envs can be at most {MAX_ENVS}, not {num_envs}")
    _draw_in_memory()
    try:
        module, _, env_id = env_id.rpartition(":")
        if module:
            importlib.import_module(module)
        if env_id.startswith("ALE/"):
            vector = _atari(env_id, num_envs)
        else:
            vector = _gymnasium(env_id, num_envs, async_envs, first)
    except gym.error.UnregisteredEnv as error:
        fail(f"--env-id {env_id}: {error}")
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        fail(f"{env_id} cannot be made: {_what_to_install(env_id, str(error))}")
    except SystemExit:
        raise
    except Exception as error:
        fail(f"{env_id} cannot be made: {type(error).__name__}: {error}", code=5)
    space = vector.single_observation_space
    if not isinstance(space, Box):
        vector.close()
        fail(
            f"{env_id} observes {space}; these scripts take Box observations: wrap it, for example with "
            f"gymnasium.wrappers.{'FlattenObservation' if not isinstance(space, Discrete) else 'TransformObservation'}"
        )
    if len(space.shape) == 3 and (space.dtype != np.uint8 or space.shape[0] > 12 or min(space.shape[1:]) < 36):
        vector.close()
        fail(
            f"{env_id} observes images {space.shape} of {space.dtype}; these scripts take uint8 images with the "
            "channels first, at least 36 x 36: wrap it with gymnasium.wrappers.ResizeObservation, "
            "GrayscaleObservation and FrameStackObservation"
        )
    return Envs(vector, life_loss=life_loss)


def _gymnasium(
    env_id: str, num_envs: int, async_envs: bool, first: Callable[[], gym.Env] | None
) -> gym.vector.VectorEnv:
    if "mujoco" in str(gym.spec(env_id).entry_point) and importlib.util.find_spec("mujoco"):
        import mujoco

        # mujoco 4 prints a harmless warning for gymnasium's models and logs it to a file in the current folder.
        mujoco.set_mju_user_warning(lambda message: None)

    env_fns: list[Callable[[], gym.Env]] = [functools.partial(gym.make, env_id)] * num_envs
    if first is not None:
        env_fns[0] = first
    env_fns = [functools.partial(_finished, make, async_envs) for make in env_fns]
    if async_envs:
        return gym.vector.AsyncVectorEnv(env_fns, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
    return gym.vector.SyncVectorEnv(env_fns, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)


def _finished(make: Callable[[], gym.Env], in_worker: bool) -> gym.Env:
    if in_worker:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to every process; the trainer decides
    return _OwnArrays(make())


class _OwnArrays(gym.Wrapper):
    """Copies each observation: an environment that fills the same array anew in `reset` would change its final_obs."""

    def step(self, action: Any) -> Any:
        obs, *rest = self.env.step(action)
        return np.array(obs), *rest


def has_screen() -> bool:
    """Whether a window can be opened; other systems than Linux are taken to have a screen."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _draw_in_memory() -> None:
    """Lets environments draw their frames without a screen; to be called before pygame and mujoco are imported."""
    if not has_screen():
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        if ctypes.util.find_library("EGL"):
            os.environ.setdefault("MUJOCO_GL", "egl")


def _atari(env_id: str, num_envs: int) -> gym.vector.VectorEnv:
    import ale_py

    gym.register_envs(ale_py)
    return gym.make_vec(
        env_id,
        num_envs=num_envs,
        vectorization_mode="vector_entry_point",
        autoreset_mode=AutoresetMode.SAME_STEP,
        reward_clipping=False,
        repeat_action_probability=0.0,
    )


def _what_to_install(env_id: str, reason: str) -> str:
    if env_id.startswith("ALE/"):
        return 'pip install -e ".[atari]"'
    for extra in ("box2d", "mujoco"):
        if (
            "gymnasium-robotics" not in reason
            and extra in reason.lower()
            and not importlib.util.find_spec({"box2d": "Box2D"}.get(extra, extra))
        ):
            return f'pip install -e ".[{extra}]"'
    return reason
