"""Environments with known answers, each under a `Recorder`. `register()` makes them gymnasium ids.

Values hold for gamma = 0.5 and for every policy.
"""

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import TimeLimit


class ProbeEnv(gym.Env):
    """Counts its episodes and steps. A subclass observes, and advances: reward, terminated, truncated."""

    observe: Callable[[], Any]
    advance: Callable[[Any], tuple[float, bool, bool]]

    def __init__(self, low: float, high: float, size: int, actions: gym.Space | None) -> None:
        self.observation_space = Box(low, high, (size,), np.float32)
        self.action_space = actions or Discrete(2)
        self.episode, self.t = -1, 0

    def begin(self) -> None:
        """Starts an episode."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        self.begin()
        return np.asarray(self.observe(), np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        reward, terminated, truncated = self.advance(action)
        return np.asarray(self.observe(), np.float32), reward, terminated, truncated, {}


class PlannedEpisodes(ProbeEnv):
    """Observes the environment's number, its episode and the time, so that no two steps look alike.

    Episode k of environment n lasts `lengths[(n + k) % len(lengths)]` steps, and ends by termination where
    `ends[(n + k) % len(ends)]` is "T", by truncation where it is "t". Rewards are of both signs and have 8 values, so
    that it shows if equal ones are stored differently. The n-th environment that a process makes has the number n.
    """

    made = itertools.count()
    UNIT = 1 / 64  # a power of two: exact in every floating-point format

    def __init__(self, lengths: tuple[int, ...], ends: str, actions: gym.Space) -> None:
        super().__init__(-np.inf, np.inf, 3, actions)
        self.lengths, self.ends = lengths, ends
        self.number = next(self.made)

    def observe(self) -> Any:
        return np.array([self.number, self.episode, self.t]) * self.UNIT

    def advance(self, action: Any) -> tuple[float, bool, bool]:
        t, turn = self.t - 1, self.number + self.episode
        reward = ((7 * self.number + 5 * self.episode + 3 * t + self.episode * t) % 8 - 3) / 2
        over = self.t >= self.lengths[turn % len(self.lengths)]
        end = self.ends[turn % len(self.ends)]
        return reward, over and end == "T", over and end == "t"


class ElapsedTime(ProbeEnv):
    """Observes the time since the episode began; rewards differ from episode to episode.

    So the value of an observation is one number, and the return that follows it another one each time. Episodes last
    3, 5, 2, 4 steps and end by termination and truncation, two of each in turn.
    """

    def __init__(self, actions: gym.Space) -> None:
        super().__init__(0.0, 1.0, 1, actions)

    def observe(self) -> Any:
        return [self.t / 8]

    def advance(self, action: Any) -> tuple[float, bool, bool]:
        over = self.t == (3, 5, 2, 4)[self.episode % 4]
        terminates = self.episode // 2 % 2 == 0
        return ((5 * self.episode + 3 * self.t) % 7 - 3) / 2, over and terminates, over and not terminates


class Point(ProbeEnv):
    """A point in the plane, which is observed."""

    def begin(self) -> None:
        self.x = self.np_random.uniform(-1, 1, 2)

    def observe(self) -> Any:
        return self.x


class PushedPoint(Point):
    """A point that the action pushes; its place decides the reward. Something to learn, in few steps.

    One step in ten is the last. Of Discrete actions the last pushes forwards, the others backwards.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - as gym.Env has it

    def __init__(self, actions: gym.Space, render_mode: str | None = None) -> None:
        super().__init__(-np.inf, np.inf, 2, actions)
        self.render_mode = render_mode

    def advance(self, action: Any) -> tuple[float, bool, bool]:
        push = 2.0 * action - 1 if isinstance(self.action_space, Discrete) else np.asarray(action, np.float64)
        self.x = 0.7 * self.x + 0.3 * push + 0.1 * self.np_random.normal(size=2)
        return float(3 * self.x[0] - self.x[1] + 0.5), bool(self.np_random.random() < 0.1), False

    def render(self) -> Any:
        return np.full((40, 60, 3), 128, np.uint8)


class OneStep(ProbeEnv):
    """One step: reward 1; with `signed`, reward 1 or -1 by action and observation. Of Box actions the sign counts.

    Two of Andy Jones's probe environments: https://andyljones.com/posts/rl-debugging.html.
    """

    def __init__(self, actions: gym.Space, signed: bool = False) -> None:
        super().__init__(-1.0, 1.0, 1, actions)
        self.signed = signed

    def begin(self) -> None:
        self.x = float(self.np_random.choice((-1.0, 1.0))) if self.signed else 0.0

    def observe(self) -> Any:
        return [self.x]

    def advance(self, action: Any) -> tuple[float, bool, bool]:
        return (self.x if action > 0 else -self.x) if self.signed else 1.0, True, False


class Endless(ProbeEnv):
    """Reward 1 in every step; only a time limit ends it, so the value is 1 / (1 - gamma) whatever the limit."""

    def __init__(self, actions: gym.Space | None = None) -> None:
        super().__init__(-1.0, 1.0, 2, actions)

    def observe(self) -> Any:
        return self.np_random.uniform(-1, 1, 2)

    def advance(self, action: Any) -> tuple[float, bool, bool]:
        return 1.0, False, False


class Ladder(ProbeEnv):
    """The first step (observation 0) pays nothing; every later one (observation 1) pays 1.

    Observation 1 is worth 1 / (1 - gamma) = 2, observation 0 gamma times that. A time limit of two steps makes half of
    all steps first ones: the mean value is 1.5. It is 1.0 if a truncated step bootstraps from the observation after the
    reset, 0.75 if truncation is taken for termination.
    """

    def __init__(self, actions: gym.Space) -> None:
        super().__init__(0.0, 1.0, 1, actions)

    def observe(self) -> Any:
        return [min(self.t, 1)]

    def advance(self, action: Any) -> tuple[float, bool, bool]:
        return float(self.t > 1), False, False


class Push(Point):
    """The action, in [-unit, unit], drags two coordinates, to be kept at (0.5, -0.5). The unit changes nothing else."""

    def __init__(self, unit: float = 1.0) -> None:
        super().__init__(-2.0, 2.0, 2, Box(-unit, unit, (2,), np.float32))
        self.unit = unit

    def advance(self, action: Any) -> tuple[float, bool, bool]:
        self.x = 0.7 * self.x + 0.3 * np.asarray(action, np.float64) / self.unit
        return -float(np.sum((self.x - (0.5, -0.5)) ** 2)), False, False


class Recorder(gym.Wrapper):
    """Records, in `seen`, one entry for each environment ever made.

    An entry holds the seeds of its resets, and of each step: observation, action, reward, terminated, truncated, next
    observation.
    """

    seen: ClassVar[list[dict[str, list[Any]]]] = []
    stop: ClassVar[tuple[int, int] | None] = None  # a signal, and the step of the first environment it comes after

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.number = len(self.seen)
        self.seen.append({"seeds": [], "steps": []})

    def reset(self, **kwargs: Any) -> Any:
        self.obs, info = self.env.reset(**kwargs)
        self.seen[self.number]["seeds"].append(kwargs.get("seed"))
        return self.obs, info

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        self.seen[self.number]["steps"].append((self.obs, np.array(action), *result[1:4], result[0]))
        self.obs = result[0]
        if self.number == 0 and self.stop is not None and self.stop[1] == len(self.seen[0]["steps"]):
            os.kill(os.getpid(), self.stop[0])
        return result


ACTIONS: dict[str, gym.Space] = {"Discrete": Discrete(2), "Box": Box(-1.0, 1.0, (1,), np.float32)}
ENVS: dict[str, tuple[Callable[..., gym.Env], int]] = {  # each with any action space, and its time limit
    "Terminating": (functools.partial(PlannedEpisodes, (3, 5, 2), "T"), 0),
    "Truncating": (functools.partial(PlannedEpisodes, (3, 5, 2), "t"), 0),
    "Mixed": (functools.partial(PlannedEpisodes, (3, 5, 2), "Tt"), 0),
    "Uneven": (functools.partial(PlannedEpisodes, (1, 30, 4), "Tt"), 0),
    "ElapsedTime": (ElapsedTime, 0),
    "PushedPoint": (PushedPoint, 12),
    "Constant": (OneStep, 0),
    "Both": (functools.partial(OneStep, signed=True), 0),
    "Endless": (Endless, 2),
    "Ladder": (Ladder, 2),
}
UNITS = (1.0, 2.0**-6)  # of Push; a power of two changes no digit


def register() -> None:
    """Makes `Check-{name}-{Discrete,Box}-v0` of every environment, and `Check-Push-{0,1}-v0`."""

    def make(env_class: Callable[..., gym.Env], limit: int, **kwargs: Any) -> gym.Env:
        env = env_class(**kwargs)
        return Recorder(TimeLimit(env, limit) if limit else env)

    ids = {f"Push-{i}": functools.partial(make, Push, 20, unit=unit) for i, unit in enumerate(UNITS)}
    for (name, (env_class, limit)), (space, actions) in itertools.product(ENVS.items(), ACTIONS.items()):
        ids[f"{name}-{space}"] = functools.partial(make, env_class, limit, actions=actions)
    for name, entry_point in ids.items():
        gym.register(f"Check-{name}-v0", entry_point=entry_point, disable_env_checker=True)
