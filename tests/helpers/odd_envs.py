"""Environments with slips of their own, made by `odd(...)`, and a vector environment with lives, as ALE's has."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from common.internals.resume.action_log import AtariActionLog

LINE = Box(-10.0, 10.0, (1,), np.float32)


class Odd(gym.Env):
    """An episode of four steps. Each argument replaces a part: a value, or a function of the time t."""

    def __init__(self, obs=None, reward=1.0, end=False, info=None, result=None, begin=None, shut=None, **spaces):
        self.observation_space = spaces.get("space", LINE)
        self.action_space = spaces.get("actions", Discrete(2))
        self.parts = {"reward": reward, "end": end, "info": info or {}, "result": result, "begin": begin}
        self.obs, self.shut = obs, shut
        self.t = 0

    def part(self, name):
        value = self.parts[name]
        return value(self.t) if callable(value) else value

    def see(self):
        if self.obs is None:
            return np.full(self.observation_space.shape, self.t, self.observation_space.dtype)
        return self.obs(self.t) if callable(self.obs) else self.obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.actions = 0, []
        begun = self.part("begin")
        return (self.see(), self.part("info")) if begun is None else begun

    def step(self, action):
        self.t += 1
        self.actions.append(action)
        result = self.part("result")
        if result is not None:
            return result
        return self.see(), self.part("reward"), self.part("end"), self.t == 4, self.part("info")

    def close(self):
        if self.shut is not None:
            self.shut()


def odd(name="Odd-v0", **parts):
    """Registers an `Odd` with these parts, without gymnasium's wrappers that check it; returns its id."""
    gym.registry.pop(name, None)
    gym.register(name, Odd, kwargs=parts, disable_env_checker=True, order_enforce=False)
    return name


class Game(SyncVectorEnv):
    """What AtariActionLog expects of ALE's vector environment: arrays of seeds, and `lives` in its infos."""

    def __init__(self, make):
        super().__init__([make], autoreset_mode=AutoresetMode.SAME_STEP)

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=None if seed is None else [int(s) for s in seed], options=options)


def game(env_id):
    """One environment whose lives count."""
    return AtariActionLog(Game(lambda: gym.make(env_id)))
