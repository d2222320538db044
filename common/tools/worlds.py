"""Environments whose right answers are known. `register()` makes them ids of gymnasium's, under a `Witness`.

Values hold for gamma = 0.5 and for every policy, unless said otherwise.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import TimeLimit


class Ledger(gym.Env):
    """Each observation tells the environment's number, its episode and the time, so that no two steps look alike.

    Episode k of environment n lasts `lengths[(n + k) % len(lengths)]` steps, and ends by termination where
    `ends[(n + k) % len(ends)]` is "T", by truncation where it is "t". Rewards are of both signs, and there are so few
    different ones that a table of what each of them is stored as has to be a function.

    The n-th environment that a process makes has the number n.
    """

    made = itertools.count()
    UNIT = 1 / 64  # a power of two: exact in every floating-point format

    def __init__(self, lengths: tuple[int, ...], ends: str, actions: gym.Space) -> None:
        self.observation_space = Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = actions
        self.lengths, self.ends = lengths, ends
        self.number = next(self.made)
        self.episode, self.t = -1, 0

    def _obs(self) -> np.ndarray:
        return np.array([self.number, self.episode, self.t], np.float32) * np.float32(self.UNIT)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        reward = ((7 * self.number + 5 * self.episode + 3 * self.t + self.episode * self.t) % 8 - 3) / 2
        self.t += 1
        turn = self.number + self.episode
        over = self.t >= self.lengths[turn % len(self.lengths)]
        end = self.ends[turn % len(self.ends)]
        return self._obs(), reward, over and end == "T", over and end == "t", {}


class Clockwork(gym.Env):
    """The observation is the time since the episode began; rewards differ from episode to episode.

    So the value of an observation is one number, while what followed it is another one each time. Episodes last 3, 5,
    2, 4 steps and end by termination and truncation, two of each in turn.
    """

    def __init__(self, actions: gym.Space) -> None:
        self.observation_space = Box(0.0, 1.0, (1,), np.float32)
        self.action_space = actions
        self.episode = -1

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        over = self.t == (3, 5, 2, 4)[self.episode % 4]
        terminates = self.episode // 2 % 2 == 0
        reward = ((5 * self.episode + 3 * self.t) % 7 - 3) / 2
        return np.array([self.t / 8], np.float32), reward, over and terminates, over and not terminates, {}


class Drift(gym.Env):
    """A point that the action pushes about; where it is decides the reward. Something to learn, in few steps.

    One step in ten is the last. Of Discrete actions the last pushes forwards, the others backwards.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - as gym.Env has it

    def __init__(self, actions: gym.Space, render_mode: str | None = None) -> None:
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = actions
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1, 2)
        return self.x.astype(np.float32), {}

    def step(self, action: Any) -> Any:
        push = 2.0 * action - 1 if isinstance(self.action_space, Discrete) else np.asarray(action, np.float64)
        self.x = 0.7 * self.x + 0.3 * push + 0.1 * self.np_random.normal(size=2)
        reward = 3 * self.x[0] - self.x[1] + 0.5
        return self.x.astype(np.float32), float(reward), bool(self.np_random.random() < 0.1), False, {}

    def render(self) -> Any:
        return np.full((40, 60, 3), 128, np.uint8)


class Probe(gym.Env):
    """Andy Jones's probe environments (andyljones.com/posts/rl-debugging.html): each isolates one thing to get right.

    "constant": one step, reward 1. "obs": one step, reward = observation (±1). "discount": two steps, reward 1 at
    the end. "action": one step, reward ±1 by the action. "both": one step, reward ±1 by action and observation.
    Of Box actions the sign counts.
    """

    def __init__(self, kind: str = "constant", actions: gym.Space | None = None) -> None:
        self.kind = kind
        self.observation_space = Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = actions or Discrete(2)

    def _obs(self) -> np.ndarray:
        return np.array([self.x], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x = 0.0
        if self.kind in ("obs", "both"):
            self.x = float(self.np_random.choice((-1.0, 1.0)))
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        sign = 1.0 if action > 0 else -1.0
        if self.kind == "discount":
            if self.x == 0.0:
                self.x = 1.0
                return self._obs(), 0.0, False, False, {}
            return self._obs(), 1.0, True, False, {}
        reward = {"constant": 1.0, "obs": self.x, "action": sign, "both": sign * self.x}[self.kind]
        return self._obs(), reward, True, False, {}


class Endless(gym.Env):
    """Reward 1 for ever; only a time limit cuts it, so the value is 1 / (1 - gamma) whatever the limit."""

    def __init__(self, actions: gym.Space | None = None) -> None:
        self.observation_space = Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = actions or Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action: Any) -> Any:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), 1.0, False, False, {}


class Ladder(gym.Env):
    """Below (0) nothing is paid and a step leads above (1), where each step pays 1 and leads nowhere.

    Above is worth 1 / (1 - gamma) = 2, below gamma times that. A time limit of two steps cuts it, so that half of all
    steps begin below: their mean value is 1.5. Who takes the observation after the reset for the one the episode ended
    on gets 1.0, who takes the cut for the end of the world 0.75.
    """

    def __init__(self, actions: gym.Space) -> None:
        self.observation_space = Box(0.0, 1.0, (1,), np.float32)
        self.action_space = actions

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.above = 0.0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        reward, self.above = self.above, 1.0
        return np.ones(1, np.float32), reward, False, False, {}


class Push(gym.Env):
    """The action drags two coordinates about, to be kept at (0.5, -0.5); bounds are centre ± unit.

    Whatever the centre and the unit, the world is the same: only the units of its actions differ.
    """

    def __init__(self, centre: float = 0.0, unit: float = 1.0) -> None:
        self.centre, self.unit = centre, unit
        self.observation_space = Box(-2.0, 2.0, (2,), np.float32)
        self.action_space = Box(centre - unit, centre + unit, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1, 2)
        return self.x.astype(np.float32), {}

    def step(self, action: Any) -> Any:
        drag = (np.asarray(action, np.float64) - self.centre) / self.unit
        self.x = 0.7 * self.x + 0.3 * drag
        return self.x.astype(np.float32), -float(np.sum((self.x - (0.5, -0.5)) ** 2)), False, False, {}


class Witness(gym.Wrapper):
    """Notes what an environment was asked and what it answered, in `seen`, one entry an environment ever made.

    An entry holds the seeds of its resets, and of each step: observation, action, reward, terminated, truncated, next
    observation.
    """

    seen: ClassVar[list[dict[str, list[Any]]]] = []
    after_step: ClassVar[Callable[[], None] | None] = None  # called after each step of the first environment

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.number = len(self.seen)
        self.seen.append({"seeds": [], "steps": []})

    def reset(self, **kwargs: Any) -> Any:
        obs, info = self.env.reset(**kwargs)
        self.seen[self.number]["seeds"].append(kwargs.get("seed"))
        self.obs = obs
        return obs, info

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        self.seen[self.number]["steps"].append((self.obs, np.array(action), *result[1:4], result[0]))
        self.obs = result[0]
        if self.number == 0 and Witness.after_step is not None:
            Witness.after_step()
        return result


ACTIONS: dict[str, gym.Space] = {"Discrete": Discrete(2), "Box": Box(-1.0, 1.0, (1,), np.float32)}
WORLDS: dict[str, tuple[Callable[..., gym.Env], int]] = {  # each of any action space, with its time limit
    "Terminating": (functools.partial(Ledger, (3, 5, 2), "T"), 0),
    "Truncating": (functools.partial(Ledger, (3, 5, 2), "t"), 0),
    "Mixed": (functools.partial(Ledger, (3, 5, 2), "Tt"), 0),
    "Uneven": (functools.partial(Ledger, (1, 30, 4), "Tt"), 0),
    "Clockwork": (Clockwork, 0),
    "Drift": (Drift, 12),
    "Constant": (functools.partial(Probe, "constant"), 0),
    "Both": (functools.partial(Probe, "both"), 0),
    "Endless": (Endless, 2),
    "Ladder": (Ladder, 2),
}
UNITS = (1.0, 2.0**-6)  # of Push; a power of two changes no digit


def register() -> None:
    """Makes `Check-{world}-{Discrete,Box}-v0` of every world, and `Check-Push-{0,1}-v0`."""

    def make(world: Callable[..., gym.Env], limit: int, **kwargs: Any) -> gym.Env:
        env = world(**kwargs)
        return Witness(TimeLimit(env, limit) if limit else env)

    for name, (world, limit) in WORLDS.items():
        for space, actions in ACTIONS.items():
            entry = functools.partial(make, world, limit, actions=actions)
            gym.register(f"Check-{name}-{space}-v0", entry_point=entry, disable_env_checker=True)
    for i, unit in enumerate(UNITS):
        entry = functools.partial(make, Push, 20, unit=unit)
        gym.register(f"Check-Push-{i}-v0", entry_point=entry, disable_env_checker=True)
