"""Observations as the scripts see them: one Box, whatever space an environment declares."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Tuple
from gymnasium.wrappers import FrameStackObservation, GrayscaleObservation
from torch.nn.functional import interpolate

from common.internals.vector.spaces import as_array, shown


class UnsupportedSpace(gym.error.Error):
    """Observations that no script can take."""


def adapted(space: Space) -> Box:
    """The space of the observations that a script sees, of an environment that declares `space`.

    Images (uint8, three dimensions, or four if they are stacked) become [channels, height, width]. Any other Box
    becomes float32 with at least one dimension. Values are not rescaled. Discrete becomes one-hot, MultiDiscrete the
    one-hot vectors of its parts, MultiBinary 0 and 1. Dict and Tuple become one flat vector of all these.

    Raises:
        UnsupportedSpace: the space or a part of it is of another kind, or an image is a part.
    """
    if isinstance(space, MultiBinary):
        return Box(0, 1, (math.prod(space.shape),), np.float32)
    if isinstance(space, Discrete | MultiDiscrete):
        return Box(0, 1, (int(np.sum(space.n if isinstance(space, Discrete) else space.nvec)),), np.float32)
    if isinstance(space, Dict | Tuple):
        boxes = [_adapted_part(key, part) for key, part in _parts(space)]
        lows, highs = [box.low.ravel() for box in boxes], [box.high.ravel() for box in boxes]
        return Box(np.concatenate(lows), np.concatenate(highs))
    if not isinstance(space, Box):
        raise UnsupportedSpace(f"{space}: remove or convert it in a wrapper")
    image = is_image(space)
    dtype: Any = np.uint8 if image else np.float32
    low, high = (_channels_first(bound) if image else np.atleast_1d(bound) for bound in (space.low, space.high))
    if dtype == space.dtype and low.shape == space.shape:
        return space
    with np.errstate(over="ignore"):  # bounds beyond float32 become infinite
        return Box(low.astype(dtype), high.astype(dtype), dtype=dtype)


def is_image(space: Space) -> bool:
    return isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) in (3, 4)


def _parts(space: Dict | Tuple) -> Iterable[tuple[Any, Space]]:
    return space.spaces.items() if isinstance(space, Dict) else enumerate(space.spaces)


def _adapted_part(key: Any, space: Space) -> Box:
    if is_image(space):
        raise UnsupportedSpace(f"an image beside other parts (at {key!r}): keep one of them with a wrapper")
    try:
        return adapted(space)
    except UnsupportedSpace as error:
        raise UnsupportedSpace(f"{error} (at {key!r})") from None


def _channels_first(image: np.ndarray) -> np.ndarray:
    """[H, W, C] or [C, H, W], or a stack [k, ...] of them, as [C, H, W] or [k C, H, W]."""
    channels_last = image.shape[-1] in (1, 3, 4) and image.shape[-3] not in (1, 3, 4)
    image = np.moveaxis(image, -1, -3) if channels_last else image
    return image.reshape(-1, *image.shape[-2:])


def observer(space: Space) -> Callable[[Any], np.ndarray]:
    """A function that converts an observation of `space` to one of `adapted(space)`: always a copy.

    It raises ValueError for another shape, and for what would not keep its value: 0.5 or 300 in uint8, 4 in
    Discrete(4), objects, strings. (Rounding to float32 passes, and what is too large for it becomes infinite, which
    Envs reports.)
    """
    if isinstance(space, Dict | Tuple):
        return _observer_of_parts({key: observer(part) for key, part in _parts(space)})
    if isinstance(space, Discrete | MultiDiscrete):
        return _one_hot(space)
    given_dtype, shape = space.dtype, space.shape or ()
    image = is_image(space)
    dtype: Any = np.uint8 if image else np.float32
    keeps_shape = adapted(space).shape == shape

    def observe(obs: Any) -> np.ndarray:
        if not (type(obs) is np.ndarray and obs.dtype is given_dtype and obs.shape == shape):  # it nearly always is
            obs = as_array(obs, "observation")
            if obs.shape != shape:
                raise ValueError(f"observation has shape {obs.shape}, its space {shape}")
            if dtype == np.uint8 and (wrong := obs[obs != np.clip(np.rint(obs), 0, 255)]).size:
                raise ValueError(f"observation holds {wrong[0]} of {obs.dtype}, which uint8 cannot hold")
        array = obs.copy() if obs.dtype is dtype else obs.astype(dtype)
        if keeps_shape:
            return array
        return _channels_first(array) if image else array.ravel()

    return observe


def _observer_of_parts(observers: dict[Any, Callable[[Any], np.ndarray]]) -> Callable[[Any], np.ndarray]:
    def observe(obs: Any) -> np.ndarray:
        flat = []
        for key, convert in observers.items():
            try:
                flat.append(convert(obs[key]).ravel())
            except (KeyError, IndexError, TypeError):
                raise ValueError(f"observation has no part {key!r}: {shown(obs)}") from None
            except ValueError as error:
                raise ValueError(f"{error} (at {key!r})") from None
        return np.concatenate(flat)

    return observe


def _one_hot(space: Discrete | MultiDiscrete) -> Callable[[Any], np.ndarray]:
    counts = np.ravel(space.n if isinstance(space, Discrete) else space.nvec)
    first, offsets = np.ravel(space.start), np.cumsum(counts) - counts

    def observe(obs: Any) -> np.ndarray:
        values = as_array(obs, "observation")
        if values.shape != space.shape or not space.contains(values.astype(space.dtype)) or (values % 1).any():
            raise ValueError(f"observation {shown(obs)} is not in {space}")
        one_hot = np.zeros(counts.sum(), np.float32)
        one_hot[offsets + np.ravel(values).astype(np.int64) - first] = 1
        return one_hot

    return observe


def preprocessed(env: gym.Env, grayscale: bool, resize: int, frame_stack: int) -> gym.Env:
    """`env` with grey images, with images of `resize` x `resize` pixels, and with its last `frame_stack` observations.

    0 and False change nothing. A stack is filled with the first observation of an episode.

    Raises:
        UnsupportedSpace: the observations are not the images that this needs.
    """
    space = env.observation_space
    channels = space.shape[-1] if is_image(space) and space.shape and len(space.shape) == 3 else 0
    if (grayscale and channels != 3) or (resize and channels not in (1, 3, 4)):
        flag, last = ("--grayscale", "3") if grayscale else ("--resize", "channels")
        raise UnsupportedSpace(f"{space}: {flag} is for images, uint8 [height, width, {last}]; leave it out")
    if grayscale:
        env = GrayscaleObservation(env, keep_dim=True)
    if resize:  # after it, as one channel takes a third of the time
        env = Resize(env, resize)
    return FrameStackObservation(env, frame_stack) if frame_stack else env


class Resize(gym.ObservationWrapper):
    """Images [height, width, channels] as [size, size, channels], with Pillow's antialiased bilinear filter."""

    def __init__(self, env: gym.Env, size: int) -> None:
        super().__init__(env)
        self.size = size
        shape: Any = env.observation_space.shape
        self.observation_space = Box(0, 255, (size, size, shape[2]), np.uint8)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        image = torch.from_numpy(np.ascontiguousarray(observation)).permute(2, 0, 1)[None]
        small = interpolate(image, (self.size, self.size), mode="bilinear", antialias=True)
        return small[0].permute(1, 2, 0).numpy()
