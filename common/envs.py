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
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode
from torch import Tensor

from common.args import RANK, WORLD_SIZE, RunArgs, fail, warn
from common.internals.resume import vector_state
from common.internals.resume.action_log import ReplayedAtari
from common.internals.resume.env_state import snapshot
from common.internals.speed.timing import env_timer
from common.internals.storage.memory import require_memory
from common.internals.vector.actions import action_units, in_bounds
from common.internals.vector.guard import EnvError, described
from common.internals.vector.make import InTurn, close, env_seeds, make_vector, new_seeds
from common.internals.vector.workers import Watchdog, Workers


class Envs:
    """`num_envs` environments stepped together; tensors in host memory, one row an environment.

    An environment that ends begins its next episode within the same step (SAME_STEP autoreset), so each step is
    `num_envs` true transitions. `terminations` say that the task ended (nothing to bootstrap from), `truncations` that
    only the recording did (a time limit). Where an episode ended in a step, `infos` holds
        final_obs: [num_envs, ...], the observation each transition truly ended on (see `final_obs`).
        episode: {"r": float64 [num_envs], "l": int64 [num_envs]}, undiscounted return and length in steps,
            valid where the mask `_episode` (bool [num_envs]) is true; of whole games, lives or not.
    and always what the environments say themselves, in the form of `in_columns`.

    An error is one line and the end of the process: code 5 if an environment raises, exits, dies, hands out what has
    another form, or does not answer for `env_timeout` seconds; 4 if an observation, a reward or an action is not finite
    as a float32.

    `obs` [num_envs, ...] is what the last reset, step or load_state_dict led to, the observation to act on next.

    Args:
        vector: with SAME_STEP autoreset.
        terminal_on_life_loss: report a lost life of an Atari game as a termination, without restarting the game.
        env_timeout: 0 waits for ever.
    """

    def __init__(
        self, vector: gym.vector.VectorEnv, terminal_on_life_loss: bool = False, *, env_timeout: float = 0
    ) -> None:
        if vector.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise ValueError(f"SAME_STEP autoreset is needed, not {vector.metadata.get('autoreset_mode')}")
        self.vector = vector
        self.num_envs = vector.num_envs
        self.single_observation_space: Any = vector.single_observation_space  # Box, as make_envs has seen to
        self.single_action_space: Any = vector.single_action_space
        self.terminal_on_life_loss = terminal_on_life_loss
        shape: Any = self.single_observation_space.shape
        self.frame_stack = shape[0] if isinstance(vector, ReplayedAtari) else 0  # frames in an observation; 0: unknown
        self._obs_dtype = np.uint8 if self.single_observation_space.dtype == np.uint8 else np.float32
        self._counts_lives = isinstance(vector, ReplayedAtari)  # `lives` in the infos of others are something else
        first = getattr(self.single_action_space, "start", 0)  # Discrete and MultiDiscrete have one
        self._first_action = first if np.any(first) else None
        self._action_shape = (self.num_envs, *(self.single_action_space.shape or ()))
        bounded, self.action_scale, self.action_bias = action_units(self.single_action_space)
        self.bounded_actions = bool(bounded.all())
        self._returns = np.zeros(self.num_envs, np.float64)
        self._began = np.zeros(self.num_envs, np.int64)  # steps before the running episode
        self._lives = np.zeros(self.num_envs, np.int64)
        self.obs = torch.zeros(0)
        self.began_anew = False  # the last load_state_dict could not go on with the episodes that were saved
        self._watchdog = Watchdog(env_timeout)
        self._close = weakref.finalize(self, close, vector, self._watchdog)
        # Before multiprocessing's own handler, which asks workers with SIGTERM and then waits for ever.
        atexit.register(self._close)
        self._seeds: list[int] = []
        self._steps = 0
        self.on_failure: Callable[[], None] | None = None  # called once, before a failure ends the process

    def reset(self, seed: int | None = None, evaluation: bool = False) -> tuple[Tensor, dict[str, Any]]:
        """First observations [num_envs, ...] and infos; each environment has a seed of its own, made of `seed`."""
        if seed is None:
            return self._reset([])
        first = 0 if evaluation else RANK * self.num_envs  # the first process alone evaluates
        return self._reset(env_seeds(seed, first + self.num_envs, evaluation)[first:])

    def _reset(self, seeds: list[int]) -> tuple[Tensor, dict[str, Any]]:
        vector: Any = self.vector
        self._seeds, self._steps = seeds, 0
        with self._watched("reset()"):
            obs, infos = vector.reset(seed=seeds or None)
        self._returns[:] = 0
        self._began[:] = 0
        if self._counts_lives:
            self._lives = np.array(infos["lives"])
        self.obs = self._tensor(obs)
        return self.obs, infos

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """One step of every environment.

        Args:
            actions: [num_envs] integers from 0 for Discrete; for MultiDiscrete and Box [num_envs, ...], or flat
                [num_envs, n]. Box actions are clipped to the bounds, and rounded where the space has integers. On any
                device.

        Returns:
            next_obs [num_envs, ...] (of the new episode where one ended), rewards float32 [num_envs],
            terminations and truncations bool [num_envs], infos.
        """
        acts = actions.numpy(force=True).reshape(self._action_shape)
        if isinstance(self.single_action_space, Box):
            flat = acts.ravel()
            if acts.dtype.kind == "f" and not math.isfinite(flat.dot(flat)):
                self._must_be_finite(acts, "next action")
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
            self._must_be_finite(rewards, "reward")
        ended = terminations | truncations
        if np.count_nonzero(ended):  # any() takes 1.5 µs longer
            final = np.array(next_obs)
            for i in np.flatnonzero(ended):
                final[i] = infos["final_obs"][i]
            infos["final_obs"] = self._tensor(final, "last observation")
            infos["episode"] = {
                "r": np.where(ended, self._returns, 0.0),
                "l": np.where(ended, self._steps - self._began, 0),
            }
            infos["_episode"] = ended
            self._returns[ended] = 0
            self._began[ended] = self._steps
        if self.terminal_on_life_loss and self._counts_lives:
            # ale-py 0.12's own life_loss_info hands out wrong final observations under SAME_STEP, so a lost
            # life is told from the counter. The game goes on: only the learner sees a termination.
            terminations = terminations | ((infos["lives"] < self._lives) & ~ended)
            self._lives = np.array(infos["lives"])
        self.obs = next_obs
        env_timer.seconds += time.monotonic() - began  # `with env_timer` would cost 0.2 µs more
        tensor = torch.from_numpy
        return next_obs, tensor(rewards), tensor(terminations), tensor(truncations), infos

    def close(self) -> None:
        """Closes the environments; what goes wrong in it is one warning. Closed environments stay closed."""
        self._close()

    def state_dict(self, snapshots: bool = True) -> dict[str, Any]:
        """Everything that decides what comes next, between two steps; `torch.load(weights_only=True)` accepts it.

        Of environments that cannot be saved it has the statistics only, after one warning.

        Args:
            snapshots: False leaves the environments alone, as they may have failed; a resumed run begins new episodes.
        """
        states, large = vector_state.save(self.vector, self._of_each) if snapshots else (None, {})
        return {
            "snapshots": states,
            "large": large,
            "spaces": snapshot((self.vector.action_space, self.single_action_space)),
            "obs": self.obs.clone(),
            "returns": torch.tensor(self._returns),
            "began": torch.tensor(self._began),
            "lives": torch.tensor(self._lives),
            "seeds": self._seeds,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`, in place of `reset`; the observation to act on is `self.obs` afterwards.

        Where the environments were not saved or cannot be restored, new episodes begin, with seeds that are not those
        of the first ones; one warning says why, and `began_anew` is true. Ends the process with code 3 if `state` is of
        other environments.
        """
        shape = (self.num_envs, *self.single_observation_space.shape)
        if state["obs"].shape != shape:
            fail(f"the checkpoint has observations {list(state['obs'].shape)}, not {list(shape)}", code=3)
        reason = "they were not saved" if state["snapshots"] is None else self._restored(state)
        self.began_anew = reason is not None
        if self.began_anew:
            warn(f"new episodes begin, as the environments cannot go on with those of the checkpoint: {reason}")
            self._reset(new_seeds(state["seeds"], state["steps"]))
            self._steps = state["steps"]
            self._began[:] = self._steps
            return
        self.obs = state["obs"].clone()
        self._returns = np.array(state["returns"])
        self._began = np.array(state["began"])
        self._lives = np.array(state["lives"])
        self._seeds, self._steps = state["seeds"], state["steps"]

    def check_snapshots(self) -> bool:
        """Whether the environments, as they are now, can be saved exactly; one warning if not."""
        return vector_state.can_be_saved(self.vector, self._of_each)

    def _of_each(self, method: str) -> Any:
        """What `method` of each environment returns."""
        vector: Any = self.vector
        if not isinstance(vector, InTurn | Workers):
            return ["it was not made by make_envs"]
        with self._watched("snapshot()"):
            return vector.call(method)

    def _restored(self, state: dict[str, Any]) -> str | None:
        with self._watched("restore()"):
            return vector_state.load(self.vector, (self.vector.action_space, self.single_action_space), state)

    def _tensor(self, obs: Any, what: str = "observation") -> Tensor:
        array = np.array(obs, self._obs_dtype)  # a copy: the vector environment reuses its array
        if self._obs_dtype is np.float32:
            flat = array.ravel()
            # The sum of squares is the cheapest question (0.4 µs) that no NaN or infinity passes, and comes first.
            if not math.isfinite(flat.dot(flat)):
                self._must_be_finite(array, what)
        return torch.from_numpy(array)

    def _must_be_finite(self, values: np.ndarray, what: str) -> None:
        """`values` [num_envs, ...]; the square of a large number overflows, so it may well be finite."""
        for i, *place in np.argwhere(~np.isfinite(values)):
            bad = values[(i, *place)]
            fail(f"environment {i}: its {what} is {bad} at step {self._steps} (as float32)", code=4)

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
        if isinstance(self.vector, Workers):
            error = self.vector.explained(error)
        on_failure, self.on_failure = self.on_failure, None
        if on_failure is not None:
            on_failure()
        self.close()
        named = isinstance(error, EnvError)
        fail(str(error) if named else f"the environment failed in {where}: {described(error)}", code=5)


def final_obs(next_obs: Tensor, infos: dict[str, Any]) -> Tensor:
    """The observation each transition truly ended on: `next_obs`, but the last one where an episode ended."""
    return infos.get("final_obs", next_obs)


def make_envs(args: RunArgs, *, terminal_on_life_loss: bool = False) -> Envs:
    """The environments that the arguments of a run describe: `args.num_envs`, shared equally by torchrun's processes.

    Atari games (`ALE/...-v5`) have the usual preprocessing of Mnih et al. (2015): 84 x 84 grey frames, the last 4 of
    them, an action repeated for 4 frames (maximum of the last two), up to 30 no-ops and FIRE at the start; no sticky
    actions. Rewards are the true ones: clipping belongs to the learner.

    Args:
        terminal_on_life_loss: in Atari games, a lost life is a termination, and the game goes on.

    Ends the process with code 2 and one line if the environment is unknown, not installed or unsupported, or if there
    is no memory for a replay of `args.buffer_size` transitions.
    """
    if args.num_envs % WORLD_SIZE:
        fail(f"--num-envs {args.num_envs} cannot be shared equally by {WORLD_SIZE} processes")
    vector = make_vector(
        args.env_id,
        args.num_envs // WORLD_SIZE,
        args.async_envs,
        args.allow_env_import,
        native=args.native_envs,
        env_timeout=args.env_timeout,
    )
    envs = Envs(vector, terminal_on_life_loss, env_timeout=args.env_timeout)
    space, buffer_size = envs.single_observation_space, getattr(args, "buffer_size", 0)
    # The replay asks for all that it needs when it has seen a step; a run would have begun by then.
    per_step = math.prod(space.shape[1:]) if space.dtype == np.uint8 else 8 * math.prod(space.shape)
    require_memory(buffer_size * per_step, f"a replay of {buffer_size:,} transitions")
    return envs
