"""Environments that need a memory: gymnasium's without velocities, as in RL Baselines3 Zoo, and MiniGrid's as vectors.

    python algos/ppo_recurrent.py --env-id memory_envs:CartPoleNoVel-v1 --allow-env-import

in this folder, or with it in PYTHONPATH.
"""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box


class WithoutVelocities(gym.ObservationWrapper):
    """Leaves the entries `keep` of vector observations."""

    def __init__(self, env: gym.Env, keep: tuple[int, ...]) -> None:
        super().__init__(env)
        self.keep = np.array(keep)
        space = env.observation_space
        assert isinstance(space, Box)
        self.observation_space = Box(space.low[self.keep], space.high[self.keep], dtype=np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[self.keep]


def without_velocities(env_id: str, keep: tuple[int, ...], **kwargs) -> gym.Env:
    return WithoutVelocities(gym.make(env_id, **kwargs), keep)


def minigrid(env_id: str, **kwargs) -> gym.Env:
    """The agent's view of 7 x 7 fields as one vector, each field one-hot; without the mission."""
    from minigrid.wrappers import ImgObsWrapper, OneHotPartialObsWrapper

    return gym.wrappers.FlattenObservation(ImgObsWrapper(OneHotPartialObsWrapper(gym.make(env_id, **kwargs))))


for name, env_id, keep in (
    ("CartPoleNoVel-v1", "CartPole-v1", (0, 2)),  # position, angle
    ("PendulumNoVel-v1", "Pendulum-v1", (0, 1)),  # cosine and sine of the angle
    ("MountainCarContinuousNoVel-v0", "MountainCarContinuous-v0", (0,)),  # position
):
    gym.register(name, without_velocities, kwargs={"env_id": env_id, "keep": keep})
for name in ("MemoryS7", "DoorKey-5x5"):
    gym.register(f"{name}-v0", minigrid, kwargs={"env_id": f"MiniGrid-{name}-v0"})
