"""Vector environments by id: one after the other, in processes, in array operations, or in ALE's own (Atari)."""

import ast
import contextlib
import ctypes.util
import dataclasses
import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AutoresetMode

from common.args import RANK, WORLD_SIZE, Failure, RunArgs, beside_training, fail
from common.internals.resume.action_log import AtariActionLog, with_action_log
from common.internals.resume.env_state import restore, snapshot
from common.internals.vector.guard import EnvError, Guarded, HangError, described
from common.internals.vector.ids import spec_of
from common.internals.vector.observations import UnsupportedSpace, preprocessed
from common.internals.vector.spaces import in_columns
from common.internals.vector.workers import CLOSING, OVERFLOW, Watchdog, Workers

Wrap = Callable[[gym.Env], gym.Env]
MAX_ENVS = 4096
ATARI_FRAMES = 108_000  # of an episode, four to a step: ALE's own limit


@dataclasses.dataclass(frozen=True)
class EnvForm:
    """How each environment is made and wrapped: in training, in evaluation and in the tools alike."""

    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    wrap: Wrap | None = None
    grayscale: bool = False
    resize: int = 0
    frame_stack: int = 0

    def wrapped(self, env: gym.Env) -> gym.Env:
        if self.wrap is not None:
            env = self.wrap(env)
            if not isinstance(env, gym.Env):
                raise TypeError(f"wrap must return the environment, not {env!r:.60}")
        return preprocessed(env, self.grayscale, self.resize, self.frame_stack)


def form_of(args: RunArgs) -> EnvForm:
    """The form of the environments of a run; ends the process with code 2 if --env-kwargs cannot be read."""
    kwargs = {}
    for word in args.env_kwargs:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            fail(f"--env-kwargs takes NAME=VALUE, for example gravity=-9.8, not {word!r}")
        try:
            kwargs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[name] = {"true": True, "false": False}.get(value, value)
    return EnvForm(kwargs, args.wrap, args.grayscale, args.resize, args.frame_stack)


def env_seeds(seed: int, num_envs: int, evaluation: bool = False) -> list[int]:
    """Seeds below 2**31, ALE's limit, one for each of at most MAX_ENVS environments of a run.

    No two environments of a run have the same seed, evaluation included, nor have those of two runs whose `seed`s
    differ by less than 2**18.
    """
    return [((2 * seed + evaluation) * MAX_ENVS + i) % 2**31 for i in range(num_envs)]


def new_seeds(seeds: list[int], steps: int, num_envs: int) -> list[int]:
    """`num_envs` seeds that are not in `seeds`, for episodes from step `steps` on; no two processes share any."""
    rng = np.random.default_rng([steps, *seeds])
    draws = rng.integers(2**31 // WORLD_SIZE, size=2 * num_envs) * WORLD_SIZE + RANK
    return [seed for seed in draws.tolist() if seed not in seeds][:num_envs]


def make_vector(
    env_id: str,
    num_envs: int,
    async_envs: bool = False,
    allow_import: bool = False,
    *,
    native: bool = False,
    first: Callable[[], gym.Env] | None = None,
    env_timeout: float = RunArgs.env_timeout,
    max_steps: int = 0,
    form: EnvForm | None = None,
) -> gym.vector.VectorEnv:
    """`num_envs` copies of a gymnasium environment; Atari games (`ALE/...-v5`) in ALE's native vector environment.

    Args:
        async_envs: a process for each environment (Atari games run in threads of their own either way).
        allow_import: import the module of an id of the form module:Env-v0.
        native: step all in one array operation, where gymnasium can (CartPole; Atari games always are).
        first: makes the first environment, if it is to be another than the rest (one that is filmed, say).
        env_timeout: seconds that a step or reset may take; 0 waits for ever.
        max_steps: truncate episodes after so many steps, beside the environment's own limit; 0: no limit.
        form: how each environment is made and wrapped.

    Ends the process with code 2 and one line if the environment is unknown, not installed or unsupported.
    """
    module, _, env_id = env_id.rpartition(":")
    if module and not allow_import:
        fail(f"--env-id {module}:{env_id} would import and run {module!r}; if you trust it, add --allow-env-import")
    if native and async_envs:
        fail("--native-envs steps all in one array operation, --async-envs each in a process: leave one out")
    form = form or EnvForm()
    if (native or env_id.startswith("ALE/")) and (form.wrap or form.grayscale or form.resize or form.frame_stack):
        what = "--native-envs cannot be" if native else f"{env_id} is 84 x 84, grey, stacked, and cannot be"
        fail(f"{what} wrapped: leave out wrap, --grayscale, --resize and --frame-stack")
    _draw_in_memory()
    warnings.filterwarnings("ignore", OVERFLOW)
    with Watchdog(env_timeout):
        if module:
            import_env_module(module)
        try:
            if env_id.startswith("ALE/"):
                vector = _atari(env_id, num_envs, max_steps, form.kwargs)
            elif native:
                vector = _native(env_id, num_envs, form.kwargs)
            else:
                make = functools.partial(_make, spec_of(env_id, module), module, max_steps, form)
                makers = [
                    functools.partial(Guarded, functools.partial(make, first if i == 0 else None), i)
                    for i in range(num_envs)
                ]
                vector = Workers(makers) if async_envs else InTurn(makers)
        except (gym.error.DependencyNotInstalled, ImportError) as error:
            fail(f"{env_id} cannot be made: {_what_to_install(env_id, str(error))}")
        except UnsupportedSpace as error:
            fail(f"{env_id} observes {error}")
        except Exception as error:
            if isinstance(error, Failure) and not isinstance(error, EnvError):  # of `fail`
                raise
            why = str(error) if isinstance(error, EnvError) else described(error)
            if form.kwargs and "keyword argument" in why:
                fail(f"{env_id} does not take these --env-kwargs: {why}")
            fail(f"{env_id} cannot be made: {why}", code=5)
    reason = _unsupported(vector.single_observation_space)
    if reason:
        close(vector, Watchdog(env_timeout))
        fail(f"{env_id} observes {reason}")
    return vector


def close(vector: Any, watchdog: Watchdog) -> None:
    """Closes the environments; what goes wrong in it is one warning."""
    with beside_training(CLOSING), watchdog:
        try:
            vector.close()
        finally:
            vector.closed = True  # gymnasium would close it again


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
    shape: Any = space.shape
    if len(shape) != 3 or (space.dtype == np.uint8 and shape[0] <= 12 and min(shape[1:]) >= 36):
        return None
    return (
        f"images {shape} of {space.dtype}; these scripts take uint8 images of at most 12 channels, at least 36 x 36: "
        "try --resize 84, --grayscale, or gymnasium.wrappers.FlattenObservation as `wrap` of make_envs"
    )


def _make(spec: Any, module: str, max_steps: int, form: EnvForm, maker: Callable[[], gym.Env] | None) -> gym.Env:
    """An environment, in the trainer or in a new process, which may know nothing of what the trainer imported."""
    if module:
        importlib.import_module(module)
    gym.registry.setdefault(spec.id, spec)
    if "mujoco" in str(spec.entry_point) and importlib.util.find_spec("mujoco"):
        import mujoco

        # mujoco 4 prints a harmless warning for gymnasium's models and logs it to a file in the current folder.
        mujoco.set_mju_user_warning(lambda message: None)
    env = form.wrapped(with_action_log(maker() if maker else gym.make(spec.id, **form.kwargs)))
    return gym.wrappers.TimeLimit(env, max_steps) if max_steps else env


class InTurn(gym.vector.SyncVectorEnv):
    """SyncVectorEnv with a leaner step: each observation is copied once, into its row of one array."""

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]]) -> None:
        super().__init__(env_fns, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)

    def reset(self, **kwargs: Any) -> Any:
        obs, infos = super().reset(**kwargs)
        by_env: Any = infos
        return obs, in_columns(by_env, self.num_envs)

    def _add_info(self, vector_infos: Any, env_info: dict[str, Any], env_num: int) -> Any:
        return {**vector_infos, env_num: env_info} if env_info else vector_infos  # for `in_columns`

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


def _native(env_id: str, num_envs: int, kwargs: dict[str, Any]) -> gym.vector.VectorEnv:
    spec = spec_of(env_id)
    if not str(spec.vector_entry_point).endswith(":CartPoleVectorEnv"):
        fail(f"--native-envs is for CartPole; {env_id} has no vector environment in array operations: leave it out")
    return NativeCartPole(num_envs, **{"max_episode_steps": spec.max_episode_steps or 500, **kwargs})


def has_screen() -> bool:
    """Whether a window can be opened; other systems than Linux are taken to have a screen."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _draw_in_memory() -> None:
    """Lets environments draw their frames without a screen; to be called before pygame and mujoco are imported."""
    if not has_screen():
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        if ctypes.util.find_library("EGL"):
            os.environ.setdefault("MUJOCO_GL", "egl")


def _atari(env_id: str, num_envs: int, max_steps: int, kwargs: dict[str, Any]) -> gym.vector.VectorEnv:
    import ale_py

    gym.register_envs(ale_py)
    spec_of(env_id)
    fixed: dict[str, Any] = {  # what AtariActionLog, rewards and limits of steps rely on
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "grayscale": True,
        "frameskip": 4,
        **dict.fromkeys(("repeat_action_probability", "batch_size"), 0),
        **dict.fromkeys(("reward_clipping", "continuous", "episodic_life", "life_loss_info"), False),
        "max_num_frames_per_episode": min(4 * max_steps, ATARI_FRAMES) if max_steps else ATARI_FRAMES,
    }
    if taken := sorted(fixed.keys() & kwargs.keys()):
        fail(f"--env-kwargs cannot change {', '.join(taken)} of an Atari game")
    vector = gym.make_vec(env_id, num_envs, "vector_entry_point", **fixed, **kwargs)
    return AtariActionLog(vector)


def _what_to_install(env_id: str, reason: str) -> str:
    if env_id.startswith("ALE/"):
        return 'pip install -e ".[atari]"'
    for extra, module in (("box2d", "Box2D"), ("mujoco", "mujoco")):
        asked = extra in reason.lower() and "gymnasium-robotics" not in reason
        if asked and not importlib.util.find_spec(module):
            return f'pip install -e ".[{extra}]"'
    return reason
