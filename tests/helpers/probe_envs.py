"""Environments whose right answers are known. Registered by importing this module (also as `probe_envs:Name-v0`)."""

import faulthandler
import functools
import itertools
import os
import random
import signal
import time
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete

from common.tools.check.probe_envs import Endless, ProbeEnv


class Counter(gym.Env):
    """obs = 1000 * episode + t, so every true transition has next_obs = obs + 1. Ends as its arguments say.

    Episode k lasts `lengths[k % len(lengths)]` steps and ends by termination where `ends[k % len(ends)]` is "T",
    by truncation where it is "t", by both where it is "B". The reward is t + 1 (1, 2, 3 ...).
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, lengths=(3, 5, 2), ends="Tt", dtype=np.float32, actions=None, render_mode=None):
        self.observation_space = Box(-np.inf, np.inf, (1,), dtype)
        self.action_space = actions or Discrete(2)
        self.lengths, self.ends, self.dtype = lengths, ends, dtype
        self.render_mode = render_mode
        self.episode, self.t = -1, 0

    def _obs(self):
        return np.array([1000 * self.episode + self.t], self.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action):
        self.t += 1
        over = self.t >= self.lengths[self.episode % len(self.lengths)]
        end = self.ends[self.episode % len(self.ends)]
        return self._obs(), float(self.t), over and end in "TB", over and end in "tB", {}

    def render(self):
        return np.full((40, 60, 3), min(self.t * 20, 255), np.uint8)


class Probe(ProbeEnv):
    """Andy Jones's probe environments (andyljones.com/posts/rl-debugging.html): each isolates one thing to get right.

    "constant": one step, reward 1. "obs": one step, reward = observation (1 or -1). "discount": two steps, reward 1 at
    the end. "action": one step, reward 1 or -1 by the action. "both": one step, reward 1 or -1 by action and
    observation. Of Box actions the sign counts.
    """

    def __init__(self, kind="constant", actions=None):
        super().__init__(-1.0, 1.0, 1, actions)
        self.kind = kind

    def begin(self):
        self.x = float(self.np_random.choice((-1.0, 1.0))) if self.kind in ("obs", "both") else 0.0

    def observe(self):
        return [self.x]

    def advance(self, action):
        if self.kind == "discount":
            self.x = 1.0
            return float(self.t - 1), self.t == 2, False
        sign = 1.0 if action > 0 else -1.0
        return {"constant": 1.0, "obs": self.x, "action": sign, "both": sign * self.x}[self.kind], True, False


class Push(ProbeEnv):
    """The action drags two coordinates, to be kept at (0.5, -0.5); its bounds are centre ± unit.

    Whatever the centre and the unit, the task is the same: only the units of its actions differ.
    """

    def __init__(self, centre=0.0, unit=1.0):
        super().__init__(-2.0, 2.0, 2, Box(centre - unit, centre + unit, (2,), np.float32))
        self.centre, self.unit = centre, unit

    def begin(self):
        self.x = self.np_random.uniform(-1, 1, 2)

    def observe(self):
        return self.x

    def advance(self, action):
        self.x = 0.7 * self.x + 0.3 * (np.asarray(action, np.float64) - self.centre) / self.unit
        return -float(np.sum((self.x - (0.5, -0.5)) ** 2)), False, False


class Reach(gym.Env):
    """Box actions with different bounds per dimension; the observation is the action that arrived."""

    def __init__(self):
        self.observation_space = Box(-10.0, 10.0, (2,), np.float64)
        self.action_space = Box(np.array([-1.0, -2.0], np.float32), np.array([1.0, 2.0], np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2), {}

    def step(self, action):
        return np.asarray(action, np.float64), 0.0, False, False, {}


class Aim(gym.Env):
    """One step; the reward is minus the squared distance of the action from (2.2, -0.5), out of [-1, 3] x [-2, 1]."""

    GOAL = np.array([2.2, -0.5])

    def __init__(self):
        self.observation_space = Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = Box(np.array([-1.0, -2.0], np.float32), np.array([3.0, 1.0], np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), -float(np.sum((action - self.GOAL) ** 2)), True, False, {}


class Shifted(gym.Env):
    """Discrete actions that start at 3; the observation is the action that arrived."""

    def __init__(self):
        self.observation_space = Box(0.0, 10.0, (1,), np.float32)
        self.action_space = Discrete(2, start=3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return np.array([action], np.float32), 0.0, False, False, {}


class Dials(gym.Env):
    """MultiDiscrete actions of unequal sizes and first values; reward 1 for each dial at its mark; one step.

    The observation is the action that arrived, in a flat world of three dials, or a 2 x 2 board of them.
    """

    def __init__(self, nvec=(2, 5, 3), start=(1, 0, 10), mark=(2, 3, 10)):
        self.action_space = MultiDiscrete(np.array(nvec), start=np.array(start))
        self.observation_space = Box(0.0, 20.0, self.action_space.shape, np.float32)
        self.mark = np.array(mark)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(self.action_space.shape, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        return np.asarray(action, np.float32), float((action == self.mark).sum()), True, False, {}


class Sheet(gym.Env):
    """Box actions and float observations of shape [2, 3], very unlike in scale; reward 1 - |action - 0.5|, one step."""

    def __init__(self):
        self.observation_space = Box(-np.inf, np.inf, (2, 3), np.float32)
        self.action_space = Box(-1.0, 1.0, (2, 3), np.float32)
        self.scale = np.array([[1, 10, 100], [1e3, 1e4, 1e5]], np.float32)

    def _obs(self):
        return (self.scale * (5 + self.np_random.normal(size=(2, 3)))).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action):
        assert action.shape == (2, 3)
        return self._obs(), float(1 - np.abs(action - 0.5).mean()), True, False, {}


class Switches(Dials):
    """Actions that no script takes."""

    def __init__(self):
        super().__init__()
        self.action_space = MultiBinary(3)


class Pixels(gym.Env):
    """uint8 images [2, 36, 40]; the first pixel is bright where action 1 is right."""

    def __init__(self, actions=None):
        self.observation_space = Box(0, 255, (2, 36, 40), np.uint8)
        self.action_space = actions or Discrete(2)

    def _obs(self):
        return np.full((2, 36, 40), 255 * self.bright, np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.bright = int(self.np_random.integers(2))
        return self._obs(), {}

    def step(self, action):
        return self._obs(), 5.0 if action == self.bright else -5.0, True, False, {}


class Lives(gym.Env):
    """A game of three lives, one lost every fourth step; reward 1 a step."""

    def __init__(self):
        self.observation_space = Box(0.0, 100.0, (1,), np.float32)
        self.action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {"lives": 3}

    def step(self, action):
        self.t += 1
        lives = 3 - self.t // 4
        return np.array([self.t], np.float32), 1.0, lives == 0, False, {"lives": lives}


class Broken(gym.Env):
    """Raises in its fifth step."""

    def __init__(self):
        self.observation_space = Box(0.0, 1.0, (1,), np.float32)
        self.action_space = Discrete(2)
        self.t = 0

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        if self.t == 5:
            raise OSError("the simulator\nwent away")
        return np.zeros(1, np.float32), 0.0, False, False, {}


class Stuck(Broken):
    """Its fifth step never returns."""

    def step(self, action):
        while self.t == 4:
            time.sleep(0.1)
        return super().step(action)


class Faulty(gym.Env):
    """Environment 1 of several does what `kind` says in its fifth step; the others are blameless.

    It knows its number from its seed, of which common.envs gives each environment one of its own.
    """

    def __init__(self, kind, dtype=np.float32):
        self.kind, self.dtype = kind, dtype
        self.observation_space = Box(-np.inf, np.inf, (2,), dtype)
        self.action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.number = seed % 4096
        self.t = 0
        return np.zeros(2, self.dtype), {}

    def step(self, action):
        self.t += 1
        obs, reward, over = np.array([self.t, 0], self.dtype), 1.0, False
        if self.t == 5 and self.number == 1:
            if self.kind == "raises":
                raise OSError("the simulator\nwent away")
            if self.kind == "raises what cannot be sent":
                raise type("Odd", (Exception,), {})("no pickle")
            if self.kind == "hangs":
                time.sleep(60)
            if self.kind == "exits":
                os._exit(7)
            if self.kind == "segfaults":
                faulthandler.disable()  # pytest's would print a page
                os.kill(os.getpid(), signal.SIGSEGV)
            obs, reward, over = {
                "nan": (np.array([0, np.nan], self.dtype), 1.0, False),
                "infinite": (np.array([-np.inf, 0], self.dtype), 1.0, False),
                "cancelling": (np.array([np.inf, -np.inf], self.dtype), 1.0, False),
                "too large": (np.array([1e300, 0]).astype(self.dtype), 1.0, False),
                "large": (np.array([3e38, 3e38], self.dtype), 3e38, False),
                "nan at the end": (np.array([0, np.nan], self.dtype), 1.0, True),
                "nan reward": (obs, np.nan, False),
                "too large a reward": (obs, -1e300, False),
                "longer": (np.zeros(3, self.dtype), 1.0, False),
                "shorter": (np.zeros(1, self.dtype), 1.0, False),
                "other type": (np.zeros(2, np.int64), 1.0, False),
            }.get(self.kind, (obs, reward, over))
        return obs, reward, over, False, {}


class Hidden(gym.Env):
    """Keeps its time where nobody can look, in an object without attributes; its first observation is drawn."""

    def __init__(self):
        self.clock = itertools.count()
        self.observation_space = Box(0, np.inf, (1,), np.float64)
        self.action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(size=1), {}

    def step(self, action):
        return np.array([float(next(self.clock))]), 1.0, False, False, {}


class Global(gym.Env):
    """Observes draws of the generators that everything in the process shares."""

    def __init__(self):
        self.observation_space = Box(0, 1, (3,), np.float64)
        self.action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.array([random.random(), np.random.random(), float(torch.rand(()))]), {}  # noqa: NPY002

    def step(self, action):
        return self.reset()[0], 1.0, False, False, {}


class Slow(Counter):
    """A tenth of a second a step."""

    def step(self, action):
        time.sleep(0.1)
        return super().step(action)


class Reusing(Counter):
    """Counter that hands out the same array every time."""

    def _obs(self):
        if not hasattr(self, "array"):
            self.array = np.zeros(1, np.float32)
        self.array[:] = super()._obs()
        return self.array


class Aimed(gym.Env):
    """The reward is minus the distance of the action from 0.4, measured in halves of the range of its bounds."""

    observation_space = Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, low, high):
        self.action_space = Box(low, high, (1,), np.float32)
        self.middle, self.half = (high + low) / 2, (high - low) / 2

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        aimed = (float(action[0]) - self.middle) / self.half
        return np.zeros(1, np.float32), -abs(aimed - 0.4), True, False, {}


class Recall(gym.Env):
    """Shows a bit, 1 or -1, at step 0 and asks for it `steps` steps later: reward 1 if the last action is it, else -1.

    With `carried` it asks for the bit that the episode before showed, at its only step.
    """

    observation_space = Box(-1.0, 1.0, (2,), np.float32)
    action_space = Discrete(2)

    def __init__(self, steps=2, carried=False):
        self.steps, self.carried, self.bit = steps, carried, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.asked = self.bit if self.carried else None
        self.bit, self.t = int(self.np_random.choice((-1, 1))), 0
        return np.array([self.bit, 0], np.float32), {}

    def step(self, action):
        self.t += 1
        over = self.t > self.steps
        bit = self.asked if self.carried else self.bit
        right = (1.0 if action == 1 else -1.0) * bit
        return np.array([0, self.t == self.steps], np.float32), right if over else 0.0, over, False, {}


def _register(name: str, entry: Any, **kwargs: Any) -> None:
    if name not in gym.registry:
        gym.register(name, entry_point=entry, **kwargs)


BOX = Box(-2.0, 2.0, (1,), np.float32)
_register("Mixed-v0", Counter)
_register("Aim-unit-v0", functools.partial(Aimed, -1.0, 1.0))
_register("Aim-wide-v0", functools.partial(Aimed, 0.0, 1000.0))
_register("Mixed-Box-v0", Counter, kwargs={"actions": BOX})
_register("Reusing-v0", Reusing)
_register("Terminating-v0", Counter, kwargs={"ends": "T"})
_register("Truncating-v0", Counter, kwargs={"ends": "t"})
_register("BothAtOnce-v0", Counter, kwargs={"ends": "B"})
_register("Uneven-v0", Counter, kwargs={"lengths": (1, 30, 4)})
_register("Mixed64-v0", Counter, kwargs={"dtype": np.float64})
for _kind in ("constant", "obs", "discount", "action", "both"):
    _register(f"Probe-{_kind}-v0", Probe, kwargs={"kind": _kind})
    _register(f"Probe-{_kind}-Box-v0", Probe, kwargs={"kind": _kind, "actions": BOX})
_register("Endless-v0", Endless, max_episode_steps=5)
_register("Endless-Box-v0", Endless, max_episode_steps=5, kwargs={"actions": BOX})
_register("Unbounded-v0", Endless, kwargs={"actions": Box(-np.inf, np.inf, (1,), np.float32)})
_register("Reach-v0", Reach)
for _steps in (2, 10, 50):
    _register(f"Recall-{_steps}-v0", Recall, kwargs={"steps": _steps})
_register("Carried-v0", Recall, kwargs={"steps": 0, "carried": True})
_register("Aim-v0", Aim)
_register("Push-2-v0", Push, max_episode_steps=20, kwargs={"unit": 2.0})
_register("Push-small-v0", Push, max_episode_steps=20, kwargs={"unit": 2.0**-6})
_register("Push-0.02-v0", Push, max_episode_steps=20, kwargs={"unit": 0.02})
_register("Push-shifted-v0", Push, max_episode_steps=20, kwargs={"centre": 0.5, "unit": 0.25})
_register("Shifted-v0", Shifted)
_register("Dials-v0", Dials)
_register("Board-v0", Dials, kwargs={"nvec": [[2, 3], [4, 2]], "start": [[0, 1], [0, 0]], "mark": [[1, 1], [3, 0]]})
_register("Sheet-v0", Sheet)
_register("Switches-v0", Switches)
_register("Pixels-v0", Pixels)
_register("Pixels-Box-v0", Pixels, kwargs={"actions": BOX})
_register("Lives-v0", Lives)
_register("Broken-v0", Broken)
_register("Stuck-v0", Stuck)
_register("Hidden-v0", Hidden, max_episode_steps=35)
_register("Global-v0", Global)
_register("Slow-v0", Slow)
for _kind in (
    *("raises", "raises what cannot be sent", "hangs", "exits", "segfaults", "nan", "infinite", "cancelling", "large"),
    *("nan at the end", "nan reward", "too large a reward", "longer", "shorter", "other type"),
):
    _register(f"Faulty-{_kind.replace(' ', '-')}-v0", Faulty, kwargs={"kind": _kind})
_register("Faulty-too-large-v0", Faulty, kwargs={"kind": "too large", "dtype": np.float64})
