"""Environments that cannot be saved and are replayed: Box2D worlds and ALE's vector environment.

The random state at the start of the running episode and its actions are recorded. To restore the environment, the
episode is re-run from them. The last observation must then be the same to the bit.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper


def with_action_log(env: gym.Env) -> gym.Env:
    """`env`; if its innermost part is gymnasium's and of Box2D, with an `ActionLog` around that part."""
    base, outer = env.unwrapped, env
    if not type(base).__module__.startswith("gymnasium.envs.box2d."):
        return env
    if env is base:
        return ActionLog(env)
    while isinstance(outer, gym.Wrapper) and outer.env is not base:
        outer = outer.env
    outer.env = ActionLog(base)  # type: ignore[attr-defined]
    return env


class ActionLog(gym.Wrapper):
    """Records what an episode of a Box2D environment depends on: the random state at its reset, and the actions.

    A step takes 0.5 µs longer. A restore takes as long as the episode did so far (30 µs a step in LunarLander).

    BipedalWalker and CarRacing get a new world at each reset, as LunarLander does since
    https://github.com/Farama-Foundation/Gymnasium/issues/728: in 26 of 40 episodes of BipedalWalker the last bits
    depended on the episodes before, which had the same world.

    A wrapper that draws from the environment's generator between steps (StickyAction) gets it from `np_random` here.
    From then on, the random state before each step is recorded too.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.start: tuple[Any, ...] = (None, None, None)  # seed and options of the reset, random state before it
        self.actions: list[np.ndarray] = []
        self.last_obs: Any = None
        self.drawn_from = False
        self.random_states: dict[int, Any] = {}  # by step

    @property
    def np_random(self) -> np.random.Generator:
        self.drawn_from = True
        return self.env.np_random

    @np_random.setter
    def np_random(self, value: np.random.Generator) -> None:
        self.drawn_from = True
        self.env.np_random = value

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        base: Any = self.env.unwrapped
        if type(base).__name__ in ("BipedalWalker", "CarRacing"):
            import Box2D

            base._destroy()
            if type(base).__name__ == "BipedalWalker":
                base.world = Box2D.b2World()
            else:
                base.world = Box2D.b2World((0, 0), contactListener=base.contactListener_keepref)
        self.start = (seed, options, base.np_random.bit_generator.state if seed is None else None)
        self.actions, self.random_states = [], {}
        self.last_obs, info = self.env.reset(seed=seed, options=options)
        return self.last_obs, info

    def step(self, action: Any) -> Any:
        if self.drawn_from:
            self.random_states[len(self.actions)] = self.env.np_random.bit_generator.state
        self.actions.append(np.array(action))
        result = self.env.step(action)
        self.last_obs = result[0]
        return result

    def history(self) -> tuple[Any, ...]:
        """The arguments of `replay`."""
        actions = np.stack(self.actions) if self.actions else None
        last_obs = None if self.last_obs is None else np.array(self.last_obs)
        return (*self.start, actions, self.random_states, last_obs, self.env.np_random.bit_generator.state)

    def replay(self, seed: Any, options: Any, start: Any, actions: Any, states: Any, last_obs: Any, end: Any) -> None:
        base: Any = self.env.unwrapped
        if start is not None:
            base.np_random.bit_generator.state = start
        self.reset(seed=seed, options=options)
        for t, action in enumerate(() if actions is None else actions):
            if t in states:
                base.np_random.bit_generator.state = states[t]
            self.step(action if action.ndim else action[()])
        self.random_states = states
        base.np_random.bit_generator.state = end
        if last_obs is not None and np.asarray(self.last_obs).tobytes() != last_obs.tobytes():
            raise ValueError("the replayed episode ends in another state: is this another version of Box2D?")


class AtariActionLog(VectorWrapper):
    """ALE's vector environment, with a record of the running episode of each game.

    Its emulators have no state to save. But a seeded reset loads the game anew, and without sticky actions the start of
    the k-th episode after it depends on the seed and k alone. Recorded are the seed, k and the actions. A restore takes
    k resets (5 ms each) and the actions (0.4 ms each) of each game.
    """

    EPISODES_PER_SEED = 64  # then a game gets another seed (0.1 s), which bounds k

    def __init__(self, env: VectorEnv) -> None:
        super().__init__(env)
        self.seeds = [0] * env.num_envs
        self.resets = [0] * env.num_envs
        self.actions = [bytearray() for _ in range(env.num_envs)]  # ALE has 18 actions

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        if seed is None:
            seed = np.random.default_rng().integers(2**31, size=self.num_envs)
        self.seeds, self.resets = [int(one) for one in seed], [0] * self.num_envs
        self.actions = [bytearray() for _ in range(self.num_envs)]
        vector: Any = self.env  # takes an array of seeds
        return vector.reset(seed=np.array(seed))

    def step(self, actions: Any) -> Any:
        for recorded, action in zip(self.actions, actions.tolist(), strict=True):
            recorded.append(action)
        obs, rewards, terminations, truncations, infos = self.env.step(actions)
        for i in np.flatnonzero(terminations | truncations):
            self.actions[i].clear()
            self.resets[i] += 1
            if self.resets[i] >= self.EPISODES_PER_SEED:
                seed = int(np.random.default_rng(self.seeds[i]).integers(2**31))
                infos["final_obs"] = np.array(infos["final_obs"])
                obs, begun = self._reset_one(int(i), seed)
                infos["lives"] = begun["lives"]
        return obs, rewards, terminations, truncations, infos

    def _reset_one(self, i: int, seed: int | None) -> Any:
        """Observations and infos of all games, of which only the `i`-th has changed."""
        self.resets[i] += 1
        if seed is not None:
            self.seeds[i], self.resets[i] = seed, 0
        options = {"reset_mask": np.arange(self.num_envs) == i}
        vector: Any = self.env
        return vector.reset(seed=None if seed is None else np.array([seed]), options=options)

    def snapshots(self) -> list[Any]:
        return [list(state) for state in zip(self.seeds, self.resets, map(list, self.actions), strict=True)]

    def restore(self, states: list[Any]) -> np.ndarray:
        """Observations [num_envs, ...] of the restored games, which all end their actions at the same step."""
        longest = max(len(actions) for _, _, actions in states)
        obs, _ = self.reset(seed=np.zeros(self.num_envs, np.int64))
        for t in range(longest + 1):
            for i, (seed, resets, actions) in enumerate(states):
                if t == longest - len(actions):
                    self.actions[i].clear()
                    obs, _ = self._reset_one(i, seed)
                    for _ in range(resets):
                        obs, _ = self._reset_one(i, None)
            if t < longest:
                waiting = [len(actions) < longest - t for _, _, actions in states]
                row = [0 if wait else game[2][t - longest] for wait, game in zip(waiting, states, strict=True)]
                obs = self.step(np.array(row))[0]
        return obs
