"""The guard around every environment: errors that name it, and a check of what it returns."""

import multiprocessing
import os
import random
import traceback
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from common.args import Failure
from common.internals.resume.env_state import large_arrays, restore, snapshot
from common.internals.vector.observations import adapted, observer
from common.internals.vector.spaces import as_flag, as_info, as_number, shown


class EnvError(Failure):
    """One line that names the environment."""


class HangError(EnvError):
    """The watchdog raises it inside a call that takes too long."""


class Guarded(gym.Wrapper):
    """The outermost wrapper of every environment.

    Observations are those of `adapted(space)`, each a copy: an environment that fills the same array anew in `reset`
    would change its final_obs. Rewards are floats, endings bool, infos without keys that Envs uses itself. What cannot
    be converted is an EnvError, and so is whatever the environment raises, `sys.exit()` included; only in the making
    gymnasium's errors and an ImportError pass, as make_envs knows what to advise.
    """

    def __init__(self, make: Callable[[], gym.Env], index: int) -> None:
        self.index = index
        self.failure: str | None = None
        self.in_worker = multiprocessing.parent_process() is not None
        try:
            env = make()
            super().__init__(env)
            self.observation_space, self.observe = adapted(env.observation_space), observer(env.observation_space)
            self.constants = large_arrays(env)
        except (gym.error.Error, ImportError):
            raise
        except BaseException as error:
            raise self._named("__init__", error) from error

    def reset(self, **kwargs: Any) -> Any:
        try:
            result = self.env.reset(**kwargs)
        except BaseException as error:
            raise self._named("reset", error) from error
        if not isinstance(result, tuple) or len(result) != 2:
            raise self._not_a_tuple("reset", "(observation, info)", result)
        try:
            return self.observe(result[0]), as_info(result[1], self.in_worker)
        except ValueError as error:
            raise EnvError(f"environment {self.index}: its {error}") from None

    def step(self, action: Any) -> Any:
        try:
            result = self.env.step(action)
        except BaseException as error:
            raise self._named("step", error) from error
        if not isinstance(result, tuple) or len(result) != 5:
            raise self._not_a_tuple("step", "(observation, reward, terminated, truncated, info)", result)
        obs, reward, terminated, truncated, info = result
        try:
            return (
                self.observe(obs),
                reward if isinstance(reward, float) else as_number(reward, "reward"),
                terminated if type(terminated) is bool else as_flag(terminated, "terminated"),
                truncated if type(truncated) is bool else as_flag(truncated, "truncated"),
                {} if type(info) is dict and not info else as_info(info, self.in_worker),
            )
        except ValueError as error:
            raise EnvError(f"environment {self.index}: its {error}") from None

    def close(self) -> None:
        try:
            self.env.close()
        except BaseException as error:
            raise self._named("close", error) from error

    def snapshot(self) -> list[Any] | str:
        """The state between two steps; why not, if it cannot be saved."""
        try:
            return snapshot(self._parts(), self.constants)
        except EnvError:
            raise
        except Exception as error:
            return str(error) if isinstance(error, TypeError) else described(error)

    def unsaved(self) -> str | None:
        """Why its state cannot be saved; None if it can."""
        state = self.snapshot()
        return state if isinstance(state, str) else None

    def _restore(self, state: Any) -> None:
        self.failure = None
        try:
            restore(self._parts(), state, self.constants)
        except Exception as error:
            self.failure = str(error) if isinstance(error, ValueError) else described(error)

    # Set to a state, it restores it; read, it is why that failed, or None. A property, as a vector environment hands
    # each environment a value of its own only by setting an attribute.
    restored = property(lambda self: self.failure, _restore)

    def _parts(self) -> tuple[Any, ...]:
        """The objects whose state is saved: the environment, and in a worker process its global random generators."""
        if not self.in_worker:
            return (self.env,)
        return (self.env, random.random.__self__, np.random.mtrand._rand, torch.default_generator)  # type: ignore[attr-defined]

    def _not_a_tuple(self, method: str, parts: str, result: Any) -> EnvError:
        got = f"a tuple of {len(result)}" if isinstance(result, tuple) else shown(result)
        return EnvError(f"environment {self.index}: {method}() must return {parts}, not {got}")

    def _named(self, method: str, error: BaseException) -> BaseException:
        """Ctrl-C and the watchdog's HangError as they are; everything else as an EnvError."""
        if isinstance(error, KeyboardInterrupt | EnvError):
            return error
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if f"{os.sep}wandb{os.sep}" not in frame.filename]  # wandb wraps sys.exit
        frame = (own or frames)[-1]
        place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        return EnvError(f"environment {self.index} failed in {method}(): {described(error)} ({place})")


def described(error: BaseException) -> str:
    """Its type and its message, if it has one."""
    name = type(error).__name__
    try:
        return f"{name}: {error}".removesuffix(": ")
    except Exception:
        return name
