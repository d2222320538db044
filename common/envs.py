"""Vector environments as torch tensors: termination and truncation kept apart, final observations correct."""

import atexit
import contextlib
import math
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, MultiBinary, MultiDiscrete
from gymnasium.vector import AutoresetMode
from torch import Tensor

from common.args import RANK, WORLD_SIZE, RunArgs, fail, warn
from common.internals.resume import vector_state
from common.internals.resume.action_log import AtariActionLog
from common.internals.resume.env_state import snapshot
from common.internals.speed.timing import env_timer
from common.internals.storage.memory import require_memory
from common.internals.vector.actions import action_units, in_bounds
from common.internals.vector.guard import EnvError, described
from common.internals.vector.make import InTurn, Wrap, close, env_seeds, form_of, make_vector, new_seeds
from common.internals.vector.masks import MaskReader
from common.internals.vector.workers import Watchdog, Workers


class Envs:
    """`num_envs` environments stepped together; tensors in host memory, the first dimension is the environment.

    A step that ends an episode also resets that environment (SAME_STEP autoreset). `terminations`: the task ended.
    `truncations`: the episode was cut, for example by a time limit. If an episode ended, `infos` also holds
        final_obs: [num_envs, ...], the observation each transition led to (see `final_obs`).
        episode: {"r": float64 [num_envs], "l": int64 [num_envs]}, undiscounted return and length in steps of the
            whole game, valid where `_episode` (bool [num_envs]) is true.

    If the infos of `reset` have an `action_mask` (gymnasium's convention), `action_mask` says which actions are allowed
    at `obs`: bool [num_envs, n] for Discrete, [num_envs, parts, largest n] for MultiDiscrete actions. Else it is None.
    MultiBinary actions are reported as MultiDiscrete with two choices each.

    Errors end the process: with code 5 if an environment raises, exits, dies, returns something malformed, or exceeds
    `env_timeout`; with code 4 if an observation, reward or action is not finite as float32.

    Args:
        vector: a gymnasium vector environment with SAME_STEP autoreset.
        terminal_on_life_loss: report a lost life of an Atari game as a termination, without resetting the game.
        frame_stack: number of frames in each observation, [frame_stack, ...]; known for Atari games.
        env_timeout: longest reset or step in seconds; 0: no limit.
    """

    def __init__(
        self,
        vector: gym.vector.VectorEnv,
        terminal_on_life_loss: bool = False,
        *,
        env_timeout: float = 0,
        frame_stack: int = 0,
    ) -> None:
        if vector.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise ValueError(f"SAME_STEP autoreset is needed, not {vector.metadata.get('autoreset_mode')}")
        self.vector = vector
        self.num_envs = vector.num_envs
        obs_space: Any = vector.single_observation_space
        self.single_observation_space = obs_space  # a Box if make_envs made it
        self.single_action_space: Any = vector.single_action_space
        if isinstance(self.single_action_space, MultiBinary):
            self.single_action_space = MultiDiscrete(np.full(self.single_action_space.shape, 2))
        self._masks = MaskReader(self.single_action_space)
        self.action_mask: Tensor | None = None
        is_atari = isinstance(vector, AtariActionLog)
        self.terminal_on_life_loss = terminal_on_life_loss
        self._uses_lives = terminal_on_life_loss and is_atari  # elsewhere infos["lives"] may mean anything
        self.frame_stack = obs_space.shape[0] if is_atari else frame_stack
        self._obs_dtype = np.uint8 if obs_space.dtype == np.uint8 else np.float32
        first_action = getattr(self.single_action_space, "start", 0)  # of Discrete and MultiDiscrete
        self._first_action = first_action if np.any(first_action) else None
        self._action_shape = (self.num_envs, *(self.single_action_space.shape or ()))
        bounded, self.action_scale, self.action_bias = action_units(self.single_action_space)
        self.bounded_actions = bool(bounded.all())
        self._returns = np.zeros(self.num_envs, np.float64)
        self._began = np.zeros(self.num_envs, np.int64)  # the step at which each running episode began
        self._lives = np.zeros(self.num_envs, np.int64)
        self._steps = 0
        self._seeds: list[int] = []
        self.obs = torch.zeros(0)  # the observations to act on next, [num_envs, ...]
        self.began_anew = False  # whether the last load_state_dict had to start new episodes
        self.on_failure: Callable[[], None] | None = None  # called once, before a failure ends the process
        self._watchdog = Watchdog(env_timeout)
        self.close = weakref.finalize(self, close, vector, self._watchdog)  # callable, once; an error is a warning
        # It must run before multiprocessing's own exit handler, which waits for workers without a limit.
        atexit.register(self.close)

    def reset(self, seed: int | None = None, evaluation: bool = False) -> tuple[Tensor, dict[str, Any]]:
        """First observations [num_envs, ...] and infos. Each environment's seed is derived from `seed`."""
        if seed is None:
            return self._reset([])
        first = 0 if evaluation else RANK * self.num_envs  # only the first process evaluates
        return self._reset(env_seeds(seed, first + self.num_envs, evaluation)[first:])

    def _reset(self, seeds: list[int]) -> tuple[Tensor, dict[str, Any]]:
        vector: Any = self.vector
        self._seeds, self._steps = seeds, 0
        with self._watched("reset()"):
            obs, infos = vector.reset(seed=seeds or None)
        self._returns[:] = 0
        self._began[:] = 0
        if self._uses_lives:
            self._lives = np.array(infos["lives"])
        self.obs = self._tensor(obs)
        self.action_mask = self._read_mask(infos)
        return self.obs, infos

    @property
    def episode_starts(self) -> Tensor:
        """bool [num_envs]: whether `obs` is the first observation of an episode."""
        return torch.from_numpy(self._began == self._steps)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """One step of every environment.

        Args:
            actions: on any device, [num_envs, ...] or flat [num_envs, n]. Discrete ones count from 0. Box ones are
                clipped to the bounds, and rounded for an integer Box.

        Returns:
            next_obs [num_envs, ...] (the first of a new episode where one ended), rewards float32 [num_envs],
            terminations and truncations bool [num_envs], infos.
        """
        acts = actions.numpy(force=True).reshape(self._action_shape)
        if isinstance(self.single_action_space, Box):
            flat = acts.ravel()
            if acts.dtype.kind == "f" and not math.isfinite(flat.dot(flat)):
                self._require_finite(acts, "next action")
            acts = in_bounds(acts, self.single_action_space)
        elif self._first_action is not None:
            acts = acts + self._first_action
        began = self._watchdog.since = time.monotonic()
        try:
            obs, rewards, terminations, truncations, infos = self.vector.step(acts)
            self._watchdog.since = 0.0
        except Exception as error:
            self._failed("step()", error)
        self._steps += 1
        self._returns += rewards
        next_obs = self._tensor(obs)
        rewards = rewards.astype(np.float32)
        if not math.isfinite(rewards.dot(rewards)):
            self._require_finite(rewards, "reward")
        ended = terminations | truncations
        if np.count_nonzero(ended):  # any() takes 1.5 µs longer
            final = np.array(next_obs)
            for i in np.flatnonzero(ended):
                final[i] = infos["final_obs"][i]
            infos["final_obs"] = self._tensor(final, "last observation")
            lengths = np.where(ended, self._steps - self._began, 0)
            infos["episode"] = {"r": np.where(ended, self._returns, 0.0), "l": lengths}
            infos["_episode"] = ended
            self._returns[ended] = 0
            self._began[ended] = self._steps
        if self._uses_lives:
            # Counted here because the life_loss_info of ale-py 0.12 returns wrong final observations under SAME_STEP.
            terminations = terminations | ((infos["lives"] < self._lives) & ~ended)
            self._lives = np.array(infos["lives"])
        if self.action_mask is not None or "action_mask" in infos:
            self._update_mask(infos)
        self.obs = next_obs
        env_timer.seconds += time.monotonic() - began  # `with env_timer` would cost 0.2 µs more
        tensor = torch.from_numpy
        return next_obs, tensor(rewards), tensor(terminations), tensor(truncations), infos

    def state_dict(self, snapshots: bool = True) -> dict[str, Any]:
        """The state between two steps, for `torch.load(weights_only=True)`.

        Without `snapshots`, and with one warning if an environment cannot be saved, it has no environments.
        """
        states, large = vector_state.save(self.vector, self._call_each) if snapshots else (None, {})
        return {
            "snapshots": states,
            "large": large,
            "spaces": snapshot((self.vector.action_space, self.single_action_space)),
            "obs": self.obs.clone(),
            "action_mask": self.action_mask,
            "returns": torch.tensor(self._returns),
            "began": torch.tensor(self._began),
            "lives": torch.tensor(self._lives),
            "seeds": self._seeds,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state`, in place of `reset`; `self.obs` is then the observation to act on.

        If the environments cannot be restored, new episodes start, with new seeds and one warning.
        Ends the process with code 3 if the observations had another shape.
        """
        shape = (self.num_envs, *self.single_observation_space.shape)
        if state["obs"].shape != shape:
            fail(f"the checkpoint has observations {list(state['obs'].shape)}, not {list(shape)}", code=3)
        reason: str | None = "they were not saved"
        if state["snapshots"] is not None:
            with self._watched("restore()"):
                reason = vector_state.load(self.vector, (self.vector.action_space, self.single_action_space), state)
        self.began_anew = reason is not None
        if self.began_anew:
            warn(f"new episodes begin, as the environments cannot go on with those of the checkpoint: {reason}")
            self._reset(new_seeds(state["seeds"], state["steps"], self.num_envs))
            self._steps = state["steps"]
            self._began[:] = self._steps
            return
        self.obs, self.action_mask = state["obs"].clone(), state.get("action_mask")
        self._returns, self._began = np.array(state["returns"]), np.array(state["began"])
        self._lives, self._seeds, self._steps = np.array(state["lives"]), state["seeds"], state["steps"]

    def check_snapshots(self) -> bool:
        """Whether the environments can be saved exactly in their present state; one warning if not."""
        return vector_state.can_be_saved(self.vector, self._call_each)

    def _call_each(self, method: str) -> Any:
        """The results of `method` of each environment."""
        vector: Any = self.vector
        if not isinstance(vector, InTurn | Workers):
            return ["it was not made by make_envs"]
        with self._watched("snapshot()"):
            return vector.call(method)

    def _tensor(self, obs: Any, what: str = "observation") -> Tensor:
        array = np.array(obs, self._obs_dtype)  # a copy: the vector environment reuses its array
        if self._obs_dtype is np.float32:
            flat = array.ravel()
            # The sum of squares is the cheapest test (0.4 µs) that NaN and infinity always fail.
            if not math.isfinite(flat.dot(flat)):
                self._require_finite(array, what)
        return torch.from_numpy(array)

    def _require_finite(self, values: np.ndarray, what: str) -> None:
        """The exact test of `values` [num_envs, ...]: finite numbers can have a sum of squares that overflows."""
        for i, *place in np.argwhere(~np.isfinite(values)):
            fail(f"environment {i}: its {what} is {values[(i, *place)]} at step {self._steps} (as float32)", code=4)

    def _read_mask(self, infos: dict[str, Any], required: bool = True) -> Tensor | None:
        try:
            mask = self._masks.read(infos, self.num_envs)
        except ValueError as error:
            self._failed("step()", EnvError(str(error)))
        if mask is None:
            return None
        if required and not (allowed := mask.any(-1).reshape(self.num_envs, -1).all(1)).all():
            i = int(np.argmin(allowed))
            self._failed("step()", EnvError(f"environment {i}: its action_mask allows no action at step {self._steps}"))
        return torch.from_numpy(mask)

    def _update_mask(self, infos: dict[str, Any]) -> None:
        """`action_mask` at the next observations, and final_mask in `infos` at those of `final_obs`."""
        mask = self._read_mask(infos)
        if self.action_mask is None:
            if mask is not None:
                warn("infos have an action_mask after step() but not after reset(): it is ignored", once="action_mask")
            return
        self.action_mask = torch.ones_like(self.action_mask) if mask is None else mask
        if "final_info" in infos:
            final = self._read_mask(infos["final_info"], required=False)
            ended = torch.from_numpy(infos["_episode"]).view(-1, *[1] * (self.action_mask.ndim - 1))
            final = torch.ones_like(self.action_mask) if final is None else final
            infos["final_mask"] = torch.where(ended, final, self.action_mask)

    @contextlib.contextmanager
    def _watched(self, where: str) -> Iterator[None]:
        self._watchdog.since = time.monotonic()
        try:
            yield
        except Exception as error:
            self._failed(where, error)
        finally:
            self._watchdog.since = 0.0

    def _failed(self, where: str, error: BaseException) -> NoReturn:
        self._watchdog.since = 0.0
        on_failure, self.on_failure = self.on_failure, None
        if on_failure is not None:
            on_failure()
        self.close()
        named = isinstance(error, EnvError)
        fail(str(error) if named else f"the environment failed in {where}: {described(error)}", code=5)


def final_mask(action_mask: Tensor | None, infos: dict[str, Any]) -> Tensor | None:
    """The action mask at `final_obs`: `action_mask`, or the episode's last one where an episode ended."""
    return infos.get("final_mask", action_mask)


def final_obs(next_obs: Tensor, infos: dict[str, Any]) -> Tensor:
    """The observation each transition led to: `next_obs`, or the episode's last one where an episode ended."""
    return infos.get("final_obs", next_obs)


def make_envs(args: RunArgs, wrap: Wrap | None = None, *, terminal_on_life_loss: bool = False) -> Envs:
    """The `args.num_envs` environments of a run, divided equally among the processes of torchrun.

    Atari games (`ALE/...-v5`) get the preprocessing of Mnih et al. (2015): grey frames of 84 x 84 pixels, stacks of 4,
    each action repeated for 4 frames (maximum of the last two), up to 30 no-ops and FIRE at the start; no sticky
    actions. Rewards are not clipped. `terminal_on_life_loss` is that of `Envs`.

    Args:
        wrap: wrap(env) -> env puts wrappers around each environment; evaluation and the tools use the same. It is a
            function at the top level of the script. Not for Atari games and --native-envs.

    Ends the process with code 2 if the environment is unknown, not installed or unsupported, or if the memory is too
    small for a replay of `args.buffer_size` transitions.
    """
    if args.num_envs % WORLD_SIZE:
        fail(f"--num-envs {args.num_envs} cannot be shared equally by {WORLD_SIZE} processes")
    num_envs, timeout = args.num_envs // WORLD_SIZE, args.env_timeout
    if wrap is not args.wrap:
        vars(args)["wrap"] = wrap
    options: dict[str, Any] = {"native": args.native_envs, "env_timeout": timeout, "form": form_of(args)}
    vector = make_vector(args.env_id, num_envs, args.async_envs, args.allow_env_import, **options)
    # A stack of colour images has their channels in one dimension, and is stored whole.
    stacked = len(shape := vector.single_observation_space.shape or ()) > 1 and shape[0] == args.frame_stack
    frame_stack = args.frame_stack if stacked else 0
    envs = Envs(vector, terminal_on_life_loss, env_timeout=timeout, frame_stack=frame_stack)
    space, buffer_size = envs.single_observation_space, getattr(args, "buffer_size", 0)
    # The replay itself allocates at its first step, when the run directory already exists.
    per_step = math.prod(space.shape[1:]) if space.dtype == np.uint8 else 8 * math.prod(space.shape)
    require_memory(buffer_size * per_step, f"a replay of {buffer_size:,} transitions")
    return envs
