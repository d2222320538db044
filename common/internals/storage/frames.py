"""Observations that are stacks of the last frames, with every frame stored once."""

from typing import Any

import numpy as np

from common.internals.storage.memory import require_memory

BLACK = 0  # the place in `aside` of the all-zero frame, with which Atari stacks begin


class FrameStacks:
    """The observations of the last `rows` steps of `num_envs` environments, each a stack of k frames, newest last.

    A step shares k frames with the next one, so one new frame a step is stored, in a ring. Which frames a step is
    made of is looked up in `refs`; nothing is told from episode ends. An observation that is not the next observation
    of the step before, to the byte, starts a new sequence: its frames are set aside, all but black ones and repeated
    ones, which cost nothing. What comes out is therefore what went in, whatever the environment does at a reset.

    State, all in host memory:
        ring: uint8 [(rows + k) * num_envs, bytes of a frame], the newest frame of each next observation. k more rows
            than `refs`, because a stack reaches that far back.
        refs: int32 [rows, num_envs, k + 1], for each step the places of its frames, oldest first: the observation is
            the first k, the next observation the last k. Places from len(ring) on are in `aside`.
        aside: uint8 [any, bytes of a frame], the frames that begin sequences; grows with the number of episodes.
        aside_until: int64, the step from which each of these is needed no more.
        last: uint8 [num_envs, bytes of a stack], the last next observations.
        steps: steps added so far.
    """

    def __init__(self, rows: int, obs: np.ndarray) -> None:
        self.rows = rows
        self.num_envs, self.stack, *frame_shape = obs.shape
        self.shape = (self.stack, *frame_shape)
        self.dtype = obs.dtype
        self.frame_bytes = obs[0, 0].nbytes
        self.ring = np.zeros(((rows + self.stack) * self.num_envs, self.frame_bytes), np.uint8)
        self.refs = np.zeros((rows, self.num_envs, self.stack + 1), np.int32)
        self.aside = np.zeros((1, self.frame_bytes), np.uint8)
        self.aside_until = np.array([np.iinfo(np.int64).max])
        self.last = np.zeros((self.num_envs, obs[0].nbytes), np.uint8)
        self.steps = 0
        self._flat_refs = self.refs.reshape(-1, self.stack + 1)

    @staticmethod
    def nbytes(rows: int, obs: np.ndarray) -> int:
        """Bytes needed, but for the frames set aside: one an episode for Atari games."""
        num_envs, stack = obs.shape[:2]
        return (rows + stack) * num_envs * obs[0, 0].nbytes + rows * num_envs * (stack + 1) * 4 + obs.nbytes

    def add(self, obs: np.ndarray, next_obs: np.ndarray) -> None:
        """Copies one step, [num_envs, k, ...] each.

        Raises:
            ValueError: the next observation is not the observation moved on by one frame.
        """
        old, new = _bytes(obs), _bytes(next_obs)
        if not np.array_equal(old[:, self.frame_bytes :], new[:, : -self.frame_bytes]):
            raise ValueError(
                f"next_obs is not obs moved on by one of its {self.stack} frames (dimension 1, newest last): "
                "without frame_stack, observations are stored as they are"
            )
        row = self.steps % self.rows
        refs = self.refs[row]
        refs[:, :-1] = self.refs[row - 1, :, 1:]
        follows = (old == self.last).all(1) if self.steps else np.zeros(self.num_envs, bool)
        if not follows.all():
            for env in np.flatnonzero(~follows):
                refs[env, :-1] = self._start(old[env].reshape(self.stack, -1))
        place = self.steps % (self.rows + self.stack) * self.num_envs
        self.ring[place : place + self.num_envs] = new[:, -self.frame_bytes :]
        refs[:, -1] = np.arange(place, place + self.num_envs)
        self.last[:] = new
        self.steps += 1

    def obs(self, indices: np.ndarray) -> np.ndarray:
        """Observations [B, k, ...] of the steps with flat indices row * num_envs + env."""
        return self._gather(self._flat_refs.take(indices, 0)[:, :-1])

    def next_obs(self, indices: np.ndarray) -> np.ndarray:
        """Their next observations [B, k, ...]."""
        return self._gather(self._flat_refs.take(indices, 0)[:, 1:])

    def rings(self) -> dict[str, np.ndarray]:
        """Arrays of which each step writes one row and no other."""
        return {"frames": self.ring.reshape(-1, self.num_envs, self.frame_bytes), "frame_refs": self.refs}

    def state_dict(self) -> dict[str, Any]:
        """All but the rings."""
        return {"aside": self.aside, "aside_until": self.aside_until, "last": self.last, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.aside, self.aside_until = state["aside"].copy(), state["aside_until"].copy()
        self.last[:] = state["last"]
        self.steps = state["steps"]

    def _gather(self, refs: np.ndarray) -> np.ndarray:
        frames = self.ring.take(refs, 0, mode="clip")  # what is set aside is clipped here and put in below
        beyond = np.nonzero(refs >= len(self.ring))
        frames[beyond] = self.aside[refs[beyond] - len(self.ring)]
        return frames.view(self.dtype).reshape(-1, *self.shape)

    def _start(self, frames: np.ndarray) -> list[int]:
        refs: list[int] = []  # newest first
        for i in reversed(range(self.stack)):
            if not frames[i].any():
                refs.append(len(self.ring) + BLACK)
            elif refs and np.array_equal(frames[i], frames[i + 1]):
                refs.append(refs[-1])
            else:
                refs.append(len(self.ring) + self._set_aside(frames[i]))
        return refs[::-1]

    def _set_aside(self, frame: np.ndarray) -> int:
        free = np.flatnonzero(self.aside_until <= self.steps)
        if len(free) == 0:
            free = np.arange(len(self.aside), 2 * len(self.aside))
            require_memory(2 * self.aside.nbytes, "a replay that sets aside a frame for each episode")
            grown = np.zeros((2 * len(self.aside), self.frame_bytes), np.uint8)
            grown[: len(self.aside)] = self.aside
            self.aside = grown
            self.aside_until = np.append(self.aside_until, np.zeros(len(free), np.int64))
        place = int(free[0])
        self.aside[place] = frame
        self.aside_until[place] = self.steps + self.rows + self.stack - 1  # then its last user is written over
        return place


def _bytes(obs: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(obs).reshape(len(obs), -1).view(np.uint8)
