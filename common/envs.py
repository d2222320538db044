"""Vector environments: gymnasium 1.4 behind torch tensors, with every ending reported as it truly was."""

import atexit
import contextlib
import ctypes.util
import functools
import importlib
import importlib.util
import math
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode
from torch import Tensor

from common.args import RANK, WORLD_SIZE, Failure, RunArgs, beside_training, fail, warn
from common.guard import EnvError, Guarded, HangError, described
from common.memory import require_memory
from common.phases import stepping
from common.replayed import ReplayedAtari, replayable
from common.snapshot import restore, snapshot
from common.spaces import InColumns, in_columns
from common.workers import CLOSING, OVERFLOW, Watchdog, Workers

MAX_ENVS = 4096
ATARI_FRAMES = 108_000  # of an episode, four to a step: ALE's own limit
LARGE_SNAPSHOT = 50e6  # bytes of one environment's state in a checkpoint: more is reported


class Envs:
    """`num_envs` environments stepped together; tensors in host memory, one row an environment.

    An environment that ends begins its next episode within the same step (SAME_STEP autoreset), so each step is
    `num_envs` true transitions. `terminations` say that the task ended (nothing to bootstrap from), `truncations` that
    only the recording did (a time limit). Where an episode ended in a step, `infos` holds
        final_obs: [num_envs, ...], the observation each transition truly ended on (see `final_obs`).
        episode: {"r": float64 [num_envs], "l": int64 [num_envs]}, undiscounted return and length in steps,
            valid where the mask `_episode` (bool [num_envs]) is true; whole games, whatever `life_loss` says.
    and always what the environments say themselves, in the form of `in_columns`.

    An error is one line and the end of the process: code 5 if an environment raises, exits, dies, hands out what has
    another form, or does not answer for `env_timeout` seconds; 4 if an observation, a reward or an action is not finite
    as a float32.

    `obs` [num_envs, ...] is what the last reset, step or load_state_dict led to, the observation to act on next.

    Args:
        vector: with SAME_STEP autoreset.
        life_loss: report a lost life of an Atari game as a termination, without restarting the game.
        env_timeout: 0 waits for ever.
    """

    def __init__(self, vector: gym.vector.VectorEnv, life_loss: bool = False, *, env_timeout: float = 0) -> None:
        if vector.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise ValueError(f"SAME_STEP autoreset is needed, not {vector.metadata.get('autoreset_mode')}")
        self.vector = vector
        self.num_envs = vector.num_envs
        self.single_observation_space: Any = vector.single_observation_space  # Box, as make_envs has seen to
        self.single_action_space: Any = vector.single_action_space
        self.life_loss = life_loss
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
        self._close = weakref.finalize(self, _close, vector, self._watchdog)
        # Before multiprocessing's own handler, which asks workers with SIGTERM and then waits for ever.
        atexit.register(self._close)
        self._seeds: list[int] = []
        self._steps = 0
        self.on_failure: Callable[[], None] | None = None  # called once, before a failure ends the process

    def reset(self, seed: int | None = None, role: int = 0) -> tuple[Tensor, dict[str, Any]]:
        """First observations [num_envs, ...]; `seed` and `role` give every environment a seed of its own."""
        if seed is None:
            return self._reset([])
        first = RANK * self.num_envs if role == 0 else 0  # evaluation is of the first process alone
        return self._reset(env_seeds(seed, first + self.num_envs, role)[first:])

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
            acts = self._in_bounds(acts, self.single_action_space)
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
        if self.life_loss and self._counts_lives:
            # ale-py 0.12's own life_loss_info hands out wrong final observations under SAME_STEP, so a lost
            # life is told from the counter. The game goes on: only the learner sees a termination.
            terminations = terminations | ((infos["lives"] < self._lives) & ~ended)
            self._lives = np.array(infos["lives"])
        self.obs = next_obs
        stepping.seconds += time.monotonic() - began  # `with stepping` would cost 0.2 µs more
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
        states, large = self._snapshots() if snapshots else (None, {})
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
        reason = "they were not saved" if state["snapshots"] is None else self._restore(state)
        self.began_anew = reason is not None
        if self.began_anew:
            warn(f"new episodes begin, as the environments cannot go on with those of the checkpoint: {reason}")
            rng = np.random.default_rng([state["steps"], *state["seeds"]])
            draws = rng.integers(2**31 // WORLD_SIZE, size=2 * self.num_envs) * WORLD_SIZE + RANK
            seeds = [s for s in draws.tolist() if s not in state["seeds"]]
            self._reset(seeds[: self.num_envs])
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
        return hasattr(self.vector, "snapshots") or self._can_be_saved(self._of_each("unsaved"))

    def _of_each(self, what: str) -> Any:
        """What a method of each environment returns."""
        vector: Any = self.vector
        if not isinstance(vector, InTurn | Workers):
            return ["it was not made by make_envs"]
        with self._watched("snapshot()"):
            return vector.call(what)

    def _can_be_saved(self, answers: Any) -> bool:
        reasons = [answer for answer in answers if isinstance(answer, str)]
        if reasons:
            advice = "give the environment get_state() and set_state(state)"
            warn(f"resume will start new episodes: {reasons[0]} ({advice})", once="resume will start new episodes")
        return not reasons

    def _snapshots(self) -> tuple[list[Any] | None, dict[str, Tensor]]:
        """The state of each environment, and of all together the large arrays, each once; None if one has none."""
        vector: Any = self.vector
        if hasattr(vector, "snapshots"):
            return vector.snapshots(), {}
        states = self._of_each("snapshot")
        if not self._can_be_saved(states):
            return None, {}
        largest = max(state[2] for state in states)
        if largest > LARGE_SNAPSHOT:
            warn(f"each checkpoint holds {largest / 1e6:.0f} MB of state for an environment", once="large snapshots")
        # As tensors: torch.save writes bytes at 1.5 times their size.
        arrays = {key: data for _, arrays, *_ in states for key, data in arrays.items()}
        large = {key: torch.frombuffer(bytearray(d), dtype=torch.uint8) for key, d in arrays.items() if d is not None}
        return [[tree, list(arrays)] for tree, arrays, *_ in states], large

    def _restore(self, state: dict[str, Any]) -> str | None:
        """Why the environments cannot be put into the state that was saved; None if they have been."""
        vector: Any = self.vector
        self._watchdog.since = time.monotonic()
        try:
            restore((vector.action_space, self.single_action_space), state["spaces"])
            if hasattr(vector, "restore"):
                if not np.array_equal(vector.restore(state["snapshots"]), state["obs"].numpy()):
                    return "what is restored leads elsewhere: is it another version?"
                return None
            large = {key: data.numpy().tobytes() for key, data in state["large"].items()}
            states = [[tree, {key: large.get(key) for key in keys}] for tree, keys in state["snapshots"]]
            vector.set_attr("restored", states)
            return next(filter(None, vector.get_attr("restored")), None)
        except EnvError as error:
            self._failed("restore()", error)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            self._watchdog.since = 0.0

    def _tensor(self, obs: Any, what: str = "observation") -> Tensor:
        array = np.array(obs, self._obs_dtype)  # a copy: the vector environment reuses its array
        if self._obs_dtype is np.float32:
            flat = array.ravel()
            # The sum of squares is the cheapest question (0.4 µs) that no NaN or infinity passes, and comes first.
            if not math.isfinite(flat.dot(flat)):
                self._must_be_finite(array, what)
        return torch.from_numpy(array)

    def _in_bounds(self, acts: np.ndarray, space: Box) -> np.ndarray:
        """`acts` in the dtype of `space`."""
        flat = acts.ravel()
        if acts.dtype.kind == "f" and not math.isfinite(flat.dot(flat)):
            self._must_be_finite(acts, "next action")
        if np.issubdtype(space.dtype, np.floating):
            return np.clip(acts, space.low, space.high).astype(space.dtype, copy=False)
        # As Python's numbers, which compare exactly: as a float the highest int64 would be beyond the highest int64.
        whole = np.rint(acts) if acts.dtype.kind == "f" else acts
        return np.clip(whole.astype(object), space.low.astype(object), space.high.astype(object)).astype(space.dtype)

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


def _close(vector: Any, watchdog: Watchdog) -> None:
    with beside_training(CLOSING), watchdog:
        try:
            vector.close()
        finally:
            vector.closed = True  # gymnasium would close it again


def action_units(space: gym.Space) -> tuple[np.ndarray, Tensor, Tensor]:
    """Of a Box action: which dimensions have two bounds no further apart than float32 holds, bool, and the scale and
    bias, float32, that stretch [-1, 1] to them; 1 and 0 for the others. Scalars for other spaces."""
    if not isinstance(space, Box):
        return np.zeros((), bool), torch.ones(()), torch.zeros(())
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        bounded = space.bounded_below & space.bounded_above & (high - low < np.finfo(np.float32).max)
        scale, bias = np.where(bounded, (high - low) / 2, 1.0), np.where(bounded, (high + low) / 2, 0.0)
    return bounded, torch.tensor(scale, dtype=torch.float32), torch.tensor(bias, dtype=torch.float32)


def final_obs(next_obs: Tensor, infos: dict[str, Any]) -> Tensor:
    """The observation each transition truly ended on: `next_obs`, but the last one where an episode ended."""
    return infos.get("final_obs", next_obs)


def env_seeds(seed: int, num_envs: int, role: int = 0) -> list[int]:
    """Seeds below 2**31 (ALE takes no more) that no two environments of a run share; `num_envs` at most MAX_ENVS.

    Of several processes the first has the first `num_envs` of them, the second the next, as one process would have all.
    `role` 0 is training, 1 evaluation. Runs share none either while their `seed`s differ by less than 2**18.
    """
    return [((2 * seed + role) * MAX_ENVS + i) % 2**31 for i in range(num_envs)]


def training_envs(args: RunArgs, *, life_loss: bool = False) -> Envs:
    """The environments that the flags of a run describe; see `make_envs`."""
    more: dict[str, Any] = {"native": args.native_envs, "life_loss": life_loss, "env_timeout": args.env_timeout}
    envs = make_envs(args.env_id, args.num_envs, args.async_envs, args.allow_env_import, **more)
    space, buffer_size = envs.single_observation_space, getattr(args, "buffer_size", 0)
    # The replay asks for all that it needs when it has seen a step; a run would have begun by then.
    per_step = math.prod(space.shape[1:]) if space.dtype == np.uint8 else 8 * math.prod(space.shape)
    require_memory(buffer_size * per_step, f"a replay of {buffer_size:,} transitions")
    return envs


def make_envs(
    env_id: str,
    num_envs: int,
    async_envs: bool = False,
    allow_import: bool = False,
    *,
    native: bool = False,
    life_loss: bool = False,
    first: Callable[[], gym.Env] | None = None,
    env_timeout: float = RunArgs.env_timeout,
    max_steps: int = 0,
) -> Envs:
    """`num_envs` copies of a gymnasium environment; Atari games (`ALE/...-v5`) in ALE's native vector environment.

    Atari games have the usual preprocessing of Mnih et al. (2015): 84 x 84 grey frames, the last 4 of them,
    an action repeated for 4 frames (maximum of the last two), up to 30 no-ops and FIRE at the start; no
    sticky actions. Rewards are the true ones: clipping belongs to the learner.

    Args:
        async_envs: a process for each environment (Atari games run in threads of their own either way).
        allow_import: import the module of an id of the form module:Env-v0.
        native: step all in one array operation, where gymnasium can (CartPole; Atari games always are).
        life_loss: report a lost life as a termination, without restarting the game.
        first: makes the first environment, if it is to be another than the rest (one that is filmed, say).
        env_timeout: seconds that a step or reset may take; 0 waits for ever.
        max_steps: truncate episodes after so many steps, beside the environment's own limit; 0: no limit.

    Ends the process with code 2 and one line if the environment is unknown, not installed or unsupported.
    """
    module, _, env_id = env_id.rpartition(":")
    if module and not allow_import:
        fail(f"--env-id {module}:{env_id} would import and run {module!r}; if you trust it, add --allow-env-import")
    if native and async_envs:
        fail("--native-envs steps all in one array operation, --async-envs each in a process: leave one out")
    if num_envs * WORLD_SIZE > MAX_ENVS:
        fail(f"there can be at most {MAX_ENVS} environments, not {num_envs * WORLD_SIZE}: lower --num-envs")
    _draw_in_memory()
    warnings.filterwarnings("ignore", OVERFLOW)
    with Watchdog(env_timeout):
        if module:
            import_env_module(module)
        try:
            if env_id.startswith("ALE/"):
                vector = _atari(env_id, num_envs, max_steps)
            elif native:
                vector = _native(env_id, num_envs)
            else:
                make = functools.partial(_make, gym.spec(env_id), module, max_steps)
                makers = [
                    functools.partial(Guarded, functools.partial(make, first if i == 0 else None), i)
                    for i in range(num_envs)
                ]
                vector = Workers(makers) if async_envs else InTurn(makers)
        except gym.error.UnregisteredEnv as error:
            fail(f"--env-id {env_id}: {error}")
        except (gym.error.DependencyNotInstalled, ImportError) as error:
            fail(f"{env_id} cannot be made: {_what_to_install(env_id, str(error))}")
        except EnvError as error:
            fail(f"{env_id} cannot be made: {error}", code=5)
        except Failure:  # of `fail`
            raise
        except Exception as error:
            fail(f"{env_id} cannot be made: {described(error)}", code=5)
    reason = _unsupported(vector.single_observation_space)
    if reason:
        _close(vector, Watchdog(env_timeout))
        fail(f"{env_id} observes {reason}")
    return Envs(vector, life_loss, env_timeout=env_timeout)


def import_env_module(module: str, folders: Iterable[str] = ()) -> None:
    """Imports the module of an id of the form module:Env-v0, which registers its environments.

    It is also searched in the current folder, beside the script, and in `folders`, after all other places.
    Ends the process with code 2 and one line if it cannot be imported.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    places = [os.path.dirname(os.path.abspath(script))] if script else []
    with contextlib.suppress(OSError):  # the current folder may be gone
        places.insert(0, os.getcwd())
    sys.path += [place for place in dict.fromkeys([*places, *folders]) if place not in sys.path]
    try:
        importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        fail(f"the module {module!r} of --env-id cannot be imported: {described(error)}")


def _unsupported(space: gym.Space) -> str | None:
    """Why the scripts cannot take observations of this space, as `adapted` has made it."""
    if not isinstance(space, Box):
        wrapper = "FlattenObservation" if not isinstance(space, Discrete) else "TransformObservation"
        return f"{space}; these scripts take Box observations: wrap it, for example with gymnasium.wrappers.{wrapper}"
    shape = space.shape
    if len(shape) != 3 or (space.dtype == np.uint8 and shape[0] <= 12 and min(shape[1:]) >= 36):
        return None
    return (
        f"images {shape} of {space.dtype}; these scripts take uint8 images of at most 12 channels, at least 36 x 36: "
        "wrap it with gymnasium.wrappers.ResizeObservation, GrayscaleObservation and FrameStackObservation, or with "
        "FlattenObservation"
    )


def _make(spec: Any, module: str, max_steps: int, maker: Callable[[], gym.Env] | None) -> gym.Env:
    """An environment, in the trainer or in a new process, which may know nothing of what the trainer imported."""
    if module:
        importlib.import_module(module)
    gym.registry.setdefault(spec.id, spec)
    if "mujoco" in str(spec.entry_point) and importlib.util.find_spec("mujoco"):
        import mujoco

        # mujoco 4 prints a harmless warning for gymnasium's models and logs it to a file in the current folder.
        mujoco.set_mju_user_warning(lambda message: None)
    env = replayable(maker() if maker else gym.make(spec.id))
    return gym.wrappers.TimeLimit(env, max_steps) if max_steps else env


class InTurn(InColumns, gym.vector.SyncVectorEnv):
    """SyncVectorEnv with a leaner step: each observation is copied once, into its row of one array."""

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]]) -> None:
        super().__init__(env_fns, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)

    def step(self, actions: np.ndarray) -> Any:
        obs: Any = self._observations
        rewards, terminations, truncations = self._rewards, self._terminations, self._truncations
        infos: dict[int, dict[str, Any]] = {}
        for i, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            env_obs, rewards[i], terminated, truncated, info = env.step(action)
            terminations[i], truncations[i] = terminated, truncated
            if terminated or truncated:
                final = {"final_obs": env_obs, "final_info": info}
                env_obs, info = env.reset()
                info = {**final, **info}
            obs[i] = env_obs
            if info:
                infos[i] = info
        columns = in_columns(infos, self.num_envs) if infos else {}
        return obs, rewards.copy(), terminations.copy(), truncations.copy(), columns

    def close_extras(self, **kwargs: Any) -> None:
        """Closes each environment; raises the first error when all have been asked."""
        errors = []
        for env in self.envs:
            try:
                env.close()
            except HangError:  # as the others may, one after the other
                raise
            except EnvError as error:
                errors.append(error)
        if errors:
            raise errors[0]


class NativeCartPole(CartPoleVectorEnv):
    """gymnasium's CartPole in array operations, with SAME_STEP autoreset in place of its NEXT_STEP.

    One generator draws the starts of all episodes, so they are not those of single environments.
    """

    metadata = {**CartPoleVectorEnv.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        """`seed` is a list, as for other vector environments, of which the first decides."""
        return super().reset(seed=seed[0] if seed else None, options=options)

    def step(self, action: np.ndarray) -> Any:
        obs, rewards, terminations, truncations, infos = super().step(action)
        ended = self.prev_done  # gymnasium's would reset them in the next step, whatever its action
        if np.count_nonzero(ended):
            infos = {"final_obs": obs, "_final_obs": ended}
            state: Any = self.state
            state[:, ended] = self.np_random.uniform(self.low, self.high, (4, np.count_nonzero(ended)))
            self.steps[ended] = 0
            self.prev_done = np.zeros_like(ended)
            obs = state.T.astype(np.float32)
        return obs, rewards, terminations, truncations, infos

    def snapshots(self) -> list[Any]:
        return [snapshot(self)]

    def restore(self, states: list[Any]) -> np.ndarray:
        """Returns the observations."""
        (state,) = states
        self.reset()
        restore(self, state)
        return np.array(self.state).T.astype(np.float32)


def _native(env_id: str, num_envs: int) -> gym.vector.VectorEnv:
    spec = gym.spec(env_id)
    if not str(spec.vector_entry_point).endswith(":CartPoleVectorEnv"):
        fail(f"--native-envs is for CartPole; {env_id} has no vector environment in array operations: leave it out")
    return NativeCartPole(num_envs, max_episode_steps=spec.max_episode_steps or 500)


def has_screen() -> bool:
    """Whether a window can be opened; other systems than Linux are taken to have a screen."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _draw_in_memory() -> None:
    """Lets environments draw their frames without a screen; to be called before pygame and mujoco are imported."""
    if not has_screen():
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        if ctypes.util.find_library("EGL"):
            os.environ.setdefault("MUJOCO_GL", "egl")


def _atari(env_id: str, num_envs: int, max_steps: int = 0) -> gym.vector.VectorEnv:
    import ale_py

    gym.register_envs(ale_py)
    vector = gym.make_vec(
        env_id,
        num_envs=num_envs,
        vectorization_mode="vector_entry_point",
        autoreset_mode=AutoresetMode.SAME_STEP,
        reward_clipping=False,
        repeat_action_probability=0.0,
        max_num_frames_per_episode=min(4 * max_steps, ATARI_FRAMES) if max_steps else ATARI_FRAMES,
    )
    return ReplayedAtari(vector)


def _what_to_install(env_id: str, reason: str) -> str:
    if env_id.startswith("ALE/"):
        return 'pip install -e ".[atari]"'
    for extra, module in (("box2d", "Box2D"), ("mujoco", "mujoco")):
        asked = extra in reason.lower() and "gymnasium-robotics" not in reason
        if asked and not importlib.util.find_spec(module):
            return f'pip install -e ".[{extra}]"'
    return reason
