"""What is done about environments that raise, hang, die, or hand out nonsense: one line, and no process left behind."""

import atexit
import contextlib
import faulthandler
import multiprocessing.connection
import os
import random
import signal
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from types import FrameType
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.vector.async_vector_env import AsyncState
from gymnasium.vector.utils import write_to_shared_memory

from common import args
from common.snapshot import large_arrays, restore, snapshot
from common.spaces import adapted, as_flag, as_info, as_number, in_columns, observer, shown

INTERRUPT = getattr(signal, "SIGURG", None)  # of no use to environments, and ignored where nobody asks for it
LATE = "has not answered within --env-timeout"
OVERFLOW = "overflow encountered in (cast|dot)"  # Envs reports it itself, with the environment's number
CLOSING = "closing the environments"  # for `beside_training`
CLOSE_SECONDS = 2
GRACE_SECONDS = 5  # for what the watchdog has interrupted


class EnvError(args.Failure):
    """One line that names the environment."""


class HangError(EnvError):
    """The watchdog's interruption."""


class Guarded(gym.Wrapper):
    """The outermost wrapper of every environment: makes it, names it in errors, and checks what it hands out.

    Observations are those of `adapted(space)`, each a copy: an environment that fills the same array anew in `reset`
    would change its final_obs. Rewards are floats, endings are bool, and infos have no keys that Envs uses itself.
    What cannot be made so is an EnvError, as is everything that the environment raises, `sys.exit()` too.

    Args:
        make: makes the environment. gymnasium's errors and an ImportError pass, as make_envs knows what to do.
        index: its number.
    """

    def __init__(self, make: Callable[[], gym.Env], index: int) -> None:
        self.index, self.interrupted = index, False
        try:
            env = make()
            super().__init__(env)
            space = env.observation_space
            self.observation_space, self.observe = adapted(space), observer(space)
            self.constants = large_arrays(env)
            # What most environments hand out, and needs no conversion.
            self.shape, self.dtype = space.shape, space.dtype if self.observation_space is space else None
        except (gym.error.Error, ImportError):
            raise
        except BaseException as error:
            raise self._named("__init__", error) from error
        self.failure: str | None = None

    def reset(self, **kwargs: Any) -> Any:
        try:
            result = self.env.reset(**kwargs)
        except BaseException as error:
            raise self._named("reset", error) from error
        if not isinstance(result, tuple) or len(result) != 2:
            raise self._not_a_tuple("reset", "(observation, info)", result)
        return self._checked("observation", self.observe, result[0]), as_info(result[1])

    def step(self, action: Any) -> Any:
        try:
            result = self.env.step(action)
        except BaseException as error:
            raise self._named("step", error) from error
        if not isinstance(result, tuple) or len(result) != 5:
            raise self._not_a_tuple("step", "(observation, reward, terminated, truncated, info)", result)
        obs, reward, terminated, truncated, info = result
        if type(obs) is np.ndarray and obs.dtype is self.dtype and obs.shape == self.shape:
            obs = obs.copy()
        else:
            obs = self._checked("observation", self.observe, obs)
        if not isinstance(reward, float):
            reward = self._checked("reward", as_number, reward)
        if type(terminated) is not bool:
            terminated = self._checked("terminated", as_flag, terminated)
        if type(truncated) is not bool:
            truncated = self._checked("truncated", as_flag, truncated)
        return obs, reward, terminated, truncated, as_info(info)

    def close(self) -> None:
        try:
            self.env.close()
        except BaseException as error:
            raise self._named("close", error) from error

    def snapshot(self) -> list[Any] | str:
        """The state between two steps; why not, if it cannot be saved."""
        try:
            return snapshot(self._parts(), self.constants)
        except EnvError:
            raise
        except Exception as error:
            return str(error) if isinstance(error, TypeError) else f"{type(error).__name__}: {error}"

    def unsaved(self) -> str | None:
        """Why its state cannot be saved; None if it can."""
        state = self.snapshot()
        return state if isinstance(state, str) else None

    def _restore(self, state: Any) -> None:
        self.failure = None
        try:
            restore(self._parts(), state, self.constants)
        except Exception as error:
            self.failure = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"

    # A vector environment hands each environment a value of its own only by setting an attribute. What is read from
    # this one is why the environment could not be restored, or None.
    restored = property(lambda self: self.failure, _restore)

    def _parts(self) -> tuple[Any, ...]:
        """What decides how it goes on; in a worker also the generators of that process, which nobody else saves."""
        if multiprocessing.parent_process() is None:
            return (self.env,)
        return (self.env, random.random.__self__, np.random.mtrand._rand, torch.default_generator)  # type: ignore[attr-defined]

    def _checked(self, what: str, convert: Callable[[Any], Any], value: Any) -> Any:
        try:
            return convert(value)
        except ValueError as error:
            raise EnvError(f"environment {self.index}: its {what} {error}") from None

    def _not_a_tuple(self, method: str, parts: str, result: Any) -> EnvError:
        got = f"a tuple of {len(result)}" if isinstance(result, tuple) else shown(result)
        return EnvError(f"environment {self.index}: {method}() must return {parts}, not {got}")

    def _named(self, method: str, error: BaseException) -> BaseException:
        """Ctrl-C and the watchdog's interruption as they are; everything else as an EnvError."""
        if isinstance(error, KeyboardInterrupt | EnvError):
            return error
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        return EnvError(f"environment {self.index} failed in {method}(): {described(error)} ({place})")


def described(error: BaseException) -> str:
    name = type(error).__name__
    try:
        return f"{name}: {error}".removesuffix(": ")
    except Exception:
        return name


class ByNumber:
    """Of a vector environment: infos by the number of their environment, until all are there for `in_columns`."""

    def _add_info(self, vector_infos: dict[Any, Any], env_info: dict[str, Any], env_num: int) -> dict[Any, Any]:
        if env_info:
            vector_infos[env_num] = env_info
        return vector_infos


class Workers(ByNumber, AsyncVectorEnv):
    """AsyncVectorEnv that says which worker died or hangs, and of which none survives the trainer.

    Works with each start method of processes. Workers ignore the signals by which a run is asked to stop, as they often
    go to every process of it: the trainer decides when they end. They get two seconds to close their environments, and
    are killed.
    """

    def __init__(self, env_fns: list[Callable[[], gym.Env]]) -> None:
        self.processes: list[Any] = []
        self.awaited = 0
        self.hung: str | None = None
        # Before multiprocessing's own, which asks with SIGTERM and then waits for ever.
        atexit.register(_kill, weakref.ref(self), os.getpid())
        try:
            makers: list[Any] = [_FirstLook(env_fns[0]), *env_fns[1:]]
            super().__init__(makers, copy=False, worker=_work, autoreset_mode=AutoresetMode.SAME_STEP)
        except BaseException:
            _kill(weakref.ref(self), os.getpid())
            raise

    def reset_wait(self, timeout: float | None = None) -> Any:
        obs, infos = super().reset_wait(timeout)
        return obs, in_columns(infos, self.num_envs)  # type: ignore[arg-type]

    def step_wait(self, timeout: float | None = None) -> Any:
        obs, rewards, terminations, truncations, infos = super().step_wait(timeout)
        return obs, rewards, terminations, truncations, in_columns(infos, self.num_envs)  # type: ignore[arg-type]

    def obituary(self, index: int) -> str:
        """How worker `index` ended."""
        process = self.processes[index]
        process.join(2)  # its pipe closes a moment before it has an exit code
        if process.exitcode is None:
            return f"env worker {index} closed its pipe"
        number = -process.exitcode
        return f"env worker {index} died ({f'signal {number}' if number > 0 else f'exit code {-number}'})"

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        errors: list[str] = []
        if not terminate and self._state is AsyncState.DEFAULT:
            deadline = time.monotonic() + CLOSE_SECONDS
            alive = [
                pipe for pipe, process in zip(self.parent_pipes, self.processes, strict=True) if process.is_alive()
            ]
            for part in (lambda pipe: pipe.send(("close", None)), lambda pipe: pipe.closed_by(deadline)):
                for pipe in alive:
                    try:
                        part(pipe)
                    except EnvError as error:
                        errors.append(str(error))
            for process in self.processes:
                process.join(max(deadline - time.monotonic(), 0))
        _kill(weakref.ref(self), os.getpid())
        for pipe in self.parent_pipes:
            pipe.close()
        if errors:
            raise EnvError(errors[0])

    def _check_spaces(self) -> None:
        self.parent_pipes: list[Any] = [_Pipe(pipe, self, i) for i, pipe in enumerate(self.parent_pipes)]
        super()._check_spaces()


class _FirstLook:
    """Makes the first environment in its worker, and before that once in the trainer, to look at its spaces."""

    def __init__(self, make: Callable[[], gym.Env]) -> None:
        self.make, self.pid = make, os.getpid()
        env = make()
        self.metadata, self.render_mode = env.metadata, env.render_mode
        self.observation_space, self.action_space = env.observation_space, env.action_space
        with args.beside_training(CLOSING):
            env.close()

    def __call__(self) -> Any:
        return self if os.getpid() == self.pid else self.make()

    def close(self) -> None:
        pass


class _Pipe:
    """A worker's pipe that notes who is waited for, and raises what its environment raised, or how the worker died."""

    def __init__(self, pipe: Any, workers: Workers, index: int) -> None:
        self.pipe, self.workers, self.index = pipe, weakref.proxy(workers), index

    def send(self, message: Any) -> None:
        try:
            self.pipe.send(message)
        except OSError:
            self.recv()  # its last words

    def recv(self) -> Any:
        self.workers.awaited = self.index
        try:
            answer, success, words = self.pipe.recv()
        except (EOFError, OSError):
            raise EnvError(self.workers.hung or self.workers.obituary(self.index)) from None
        if not success:
            if args.show_tracebacks:
                print(answer, file=sys.stderr)
            raise EnvError(words)
        if words:
            args.warn(words, once="infos that cannot be sent")
        return answer, success

    def closed_by(self, deadline: float) -> None:
        if not self.pipe.poll(max(deadline - time.monotonic(), 0)):
            raise EnvError(f"environment {self.index} did not close within {CLOSE_SECONDS} s")
        self.recv()

    def poll(self, timeout: float | None = None) -> bool:
        return self.pipe.poll(timeout)

    def close(self) -> None:
        self.pipe.close()

    @property
    def closed(self) -> bool:
        return self.pipe.closed


def _kill(workers: Any, pid: int) -> None:
    vector = workers()
    if vector is None or os.getpid() != pid:
        return
    vector.closed = True  # gymnasium would ask the dead to close their environments
    for process in vector.processes:
        process.kill()
    for process in vector.processes:
        process.join()


def _work(
    index: int, make: Callable[[], gym.Env], pipe: Any, trainers_pipe: Any, shared_memory: Any, *unused: Any
) -> None:
    """A worker process: answers (result, True, warning), and ends after its first error, (traceback, False, line)."""
    trainers_pipe.close()
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if INTERRUPT:
        signal.signal(INTERRUPT, _interrupt)
    threading.Thread(target=_end_with_trainer, args=(os.getppid(),), daemon=True).start()
    warnings.filterwarnings("ignore", OVERFLOW)
    env: Any = None
    try:
        env = make()
        while True:
            command, data = pipe.recv()
            answer: Any = None
            if command == "step":
                obs, *answer, info = env.step(data)
                if answer[1] or answer[2]:
                    final = {"final_obs": obs, "final_info": info}
                    obs, info = env.reset()
                    info = {**final, **info}
                write_to_shared_memory(env.observation_space, index, obs, shared_memory)
                answer = [None, *answer, info]
            elif command == "reset":
                obs, info = env.reset(**data)
                write_to_shared_memory(env.observation_space, index, obs, shared_memory)
                answer = [None, info]
            elif command == "_call":
                name, words, more = data
                answer = env.get_wrapper_attr(name)
                answer = answer(*words, **more) if callable(answer) else answer
            elif command == "_setattr":
                env.set_wrapper_attr(*data)
            elif command == "_check_spaces":
                answer = data[1] == env.observation_space, data[2] == env.action_space
            elif command == "close":
                closing, env = env, None
                closing.close()
            try:
                pipe.send((answer, True, None))
            except OSError:
                raise
            except Exception:
                if command not in ("step", "reset"):
                    raise
                unsent: list[str] = []
                answer[-1] = _sendable(answer[-1], unsent)
                pipe.send((answer, True, f"{', '.join(unsent)} of an environment's info cannot be sent by its process"))
            if command == "close":
                return
    except (EOFError, BrokenPipeError):  # the trainer is gone
        return
    except BaseException as error:
        line = str(error) if isinstance(error, EnvError) else f"environment {index} failed: {described(error)}"
        pipe.send((traceback.format_exc(), False, line))
    finally:
        with contextlib.suppress(BaseException):
            if env is not None:
                env.close()


def _sendable(info: dict[Any, Any], unsent: list[str]) -> dict[Any, Any]:
    """`info` without what cannot be pickled, whose keys are added to `unsent`."""
    kept = {}
    for key, value in info.items():
        try:
            ForkingPickler.dumps(value)
            kept[key] = value
        except Exception:
            if isinstance(value, dict):
                kept[key] = _sendable(value, unsent)
            else:
                unsent.append(str(key))
    return kept


def _end_with_trainer(parent: int) -> None:
    """Ends this worker when the trainer is gone.

    Its pipe would tell it too, but not while it is inside a step, and with fork every worker holds the pipes of those
    before it open: one that hangs would keep them all. With fork and spawn the trainer is the parent process; with
    forkserver only multiprocessing knows it.
    """
    trainer: Any = multiprocessing.parent_process()
    while os.getppid() == parent and trainer.is_alive():
        time.sleep(0.5)
    os._exit(1)


class Watchdog:
    """Ends a call of the environments that takes `timeout` seconds. A thread, so a step costs nothing.

    The process whose environment hangs is interrupted by a signal, which raises an EnvError that names the place: in
    Python code, in time.sleep, in system calls. Code in C may not notice. A few seconds later the worker is killed,
    which the trainer reports as it does any death, or the trainer's own process ends at once with code 5.
    What hangs in C without releasing Python's lock stops this thread as well: only `--async-envs` helps against that.

    It counts its own ticks, not the time, so that a computer asleep or a stopped process is not taken for one.

    Args:
        watched: has `waiting_since`, the time at which the call began, 0 outside of calls.
    """

    TICKS = 20
    asking: Any = None  # what the one watches that has sent the last signal

    def __init__(self, watched: Any, timeout: float) -> None:
        self.stop = threading.Event()
        self.trainer = threading.get_ident()
        self.in_main_thread = self.trainer == threading.main_thread().ident
        if INTERRUPT and self.in_main_thread and signal.getsignal(INTERRUPT) is signal.SIG_DFL:
            signal.signal(INTERRUPT, _interrupt)
        threading.Thread(target=self._watch, args=(weakref.ref(watched), timeout), daemon=True).start()

    def _watch(self, reference: Any, timeout: float) -> None:
        since, ticks = 0.0, 0
        while not self.stop.wait(timeout / self.TICKS):
            watched = reference()
            if watched is None:
                return
            ticks = ticks + 1 if watched.waiting_since and watched.waiting_since == since else 0
            since = watched.waiting_since
            if ticks >= self.TICKS:
                self._ask(watched)
                if not self.stop.wait(min(timeout, GRACE_SECONDS)) and watched.waiting_since == since:
                    self._end()
                ticks = 0
            del watched

    def _ask(self, watched: Any) -> None:
        inner, _ = _on_stack(sys._current_frames().get(self.trainer))
        if not INTERRUPT:
            return
        Watchdog.asking = watched
        if isinstance(inner, Workers):
            for process in inner.processes:
                with contextlib.suppress(OSError, TypeError):
                    os.kill(process.pid, INTERRUPT)
        elif self.in_main_thread and signal.getsignal(INTERRUPT) is _interrupt:
            signal.pthread_kill(self.trainer, INTERRUPT)

    def _end(self) -> None:
        inner, place = _on_stack(sys._current_frames().get(self.trainer))
        if isinstance(inner, Workers):
            inner.hung = f"environment {inner.awaited} {LATE}: it hangs outside of Python"
            inner.processes[inner.awaited].kill()
            return
        if args.show_tracebacks:
            faulthandler.dump_traceback()
        name = f"environment {inner.index}" if isinstance(inner, Guarded) else "an environment"
        print(f"error: {name} {LATE}: it hangs in {place}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(5)


@contextlib.contextmanager
def watched(timeout: float) -> Iterator[None]:
    """A Watchdog over what happens inside; 0 waits for ever."""
    call = _Call()
    watchdog = Watchdog(call, timeout) if timeout else None
    try:
        yield
    finally:
        call.waiting_since = 0.0
        if watchdog is not None:
            watchdog.stop.set()


class _Call:
    def __init__(self) -> None:
        self.waiting_since = time.monotonic()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handles the watchdog's signal, in the main thread of the process whose environment hangs."""
    inner, place = _on_stack(frame)
    if isinstance(inner, Guarded):
        if not inner.interrupted and Watchdog.asking is not None:  # others have their time; one that goes on has not
            Watchdog.asking.waiting_since = time.monotonic()
        inner.interrupted = True
        raise HangError(f"environment {inner.index} {LATE}: it hangs in {place}")


def _on_stack(frame: FrameType | None) -> tuple[Any, str]:
    """The innermost Guarded or Workers at work in a thread, and the place at which the thread is."""
    place = "?"
    if frame is not None:
        place = f"{frame.f_code.co_qualname} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
    while frame is not None:
        inner = frame.f_locals.get("self")
        if isinstance(inner, Guarded | Workers):
            return inner, place
        frame = frame.f_back
    return None, place
