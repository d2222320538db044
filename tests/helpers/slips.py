"""Environments with slips beside training; also as `slips:Name-v0`."""

import sys
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

from common.internals.vector.make import env_seeds


class Steady(gym.Env):
    """Ten steps of reward 1, then a truncation; observations are the step and a number drawn at the reset."""

    observation_space = Box(-100.0, 100.0, (2,), np.float32)
    action_space = Discrete(2)
    length = 10

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        self.draw = float(self.np_random.uniform(-1, 1))
        return self.obs(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return self.obs(), 1.0, False, self.t == self.length, {}

    def obs(self) -> np.ndarray:
        return np.array([self.t, self.draw], np.float32)


class InEvaluation(Steady):
    """Does one thing wrong, in the environments of evaluation alone: their seeds tell them."""

    def __init__(self, slip: str, seed: int = 1) -> None:
        self.slip = slip
        self.seeds = env_seeds(seed, 10, evaluation=True)
        self.evaluating = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.evaluating |= seed in self.seeds
        if self.evaluating and self.slip == "reset raises":
            raise RuntimeError("no seed")
        return super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        if self.evaluating and self.t == 3:
            if self.slip == "step raises":
                raise RuntimeError("no power")
            if self.slip == "sys.exit":
                sys.exit(0)
            if self.slip == "nan":
                obs[0] = np.nan
            if self.slip == "shape":
                obs = np.zeros(3, np.float32)
        return obs, reward, terminated, truncated, info

    def close(self) -> None:
        if self.evaluating and self.slip == "close raises":
            raise AttributeError("'NoneType' object has no attribute 'close'")


class OnlyOne(Steady):
    """Exists once at a time, as a robot does."""

    taken = False

    def __init__(self) -> None:
        if OnlyOne.taken:
            raise OSError("the port is in use")
        OnlyOne.taken = True

    def close(self) -> None:
        OnlyOne.taken = False


class Corridor(gym.Env):
    """Nothing ends it: there is no time limit."""

    observation_space = Box(0.0, 1.0, (1,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(1, np.float32), 1.0, False, False, {}


class Breaks(Steady):
    """Raises once in a process, in its `left`-th step."""

    left = 163

    def step(self, action: Any) -> Any:
        Breaks.left -= 1
        if Breaks.left == 0:
            raise RuntimeError("a wire is loose")
        return super().step(action)


for slip in ("reset raises", "step raises", "sys.exit", "nan", "shape", "close raises"):
    name = "".join(word.capitalize() for word in slip.replace(".", " ").split())
    gym.register(f"InEvaluation-{name}-v0", InEvaluation, kwargs={"slip": slip})
for kind in (Steady, OnlyOne, Corridor, Breaks):
    gym.register(f"{kind.__name__}-v0", kind)
