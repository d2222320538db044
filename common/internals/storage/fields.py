"""What a storage takes: the first step says which fields there are, and every later one must have the same."""

import numpy as np
import torch
from torch import Tensor

Like = dict[str, tuple[torch.Size, torch.dtype]]


def check_first(step: dict[str, Tensor], num_envs: int) -> Like:
    """The shapes and dtypes of the first step; ValueError if a field is not [num_envs, ...]."""
    for name, value in step.items():
        if value.ndim == 0 or value.shape[0] != num_envs:
            raise ValueError(f"{name} must be [num_envs={num_envs}, ...], not {list(value.shape)}")
    return {name: (value.shape, value.dtype) for name, value in step.items()}


def check(step: dict[str, Tensor], like: Like, storage: str) -> None:
    """ValueError if names, shapes or dtypes differ from the first step's."""
    if step.keys() != like.keys():
        raise ValueError(f"this {storage} holds {sorted(like)}, not {sorted(step)}")
    for name, value in step.items():
        shape, dtype = like[name]
        if value.shape != shape or value.dtype != dtype:
            raise ValueError(f"{name} was {dtype} {list(shape)}, now {value.dtype} {list(value.shape)}")


def check_returns(step: dict[str, Tensor], n_step: int) -> None:
    """ValueError if a field that returns of `n_step` steps need is missing or of the wrong kind."""
    needed = ["rewards"] + (["terminations", "truncations"] if n_step > 1 else [])
    for name in needed:
        if name not in step or step[name].ndim != 1:
            raise ValueError(f"returns of {n_step} steps need {name} [num_envs]")
    if not step["rewards"].is_floating_point():
        raise ValueError(f"returns need floating-point rewards, not {step['rewards'].dtype}")
    if any(step[name].dtype != torch.bool for name in needed[1:]):
        raise ValueError("terminations and truncations must be bool")


def check_stacks(step: dict[str, np.ndarray], frame_stack: int) -> np.ndarray:
    """obs; ValueError if obs and next_obs are not stacks of `frame_stack` frames."""
    obs, next_obs = step.get("obs"), step.get("next_obs")
    if obs is None or next_obs is None or obs.ndim < 2 or obs.shape[1] != frame_stack:
        raise ValueError(f"frame_stack {frame_stack} needs obs and next_obs [num_envs, {frame_stack}, ...]")
    if obs.shape != next_obs.shape or obs.dtype != next_obs.dtype:
        raise ValueError("obs and next_obs must be of one shape and dtype")
    return obs
