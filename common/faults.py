"""What is done about environments that raise, hang, die, or hand out nonsense: one line, and no process left behind."""

import atexit
import faulthandler
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from queue import Empty
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.vector.async_vector_env import AsyncState

from common import args
from common.snapshot import large_arrays, restore, snapshot


class EnvError(Exception):
    """One line that names the environment. A string alone, because it has to pass from a worker to the trainer."""


class Guarded(gym.Wrapper):
    """The outermost wrapper of every environment: errors with its number, observations that keep their form.

    Each observation is a copy: an environment that fills the same array anew in `reset` would change its final_obs.
    """

    def __init__(self, env: gym.Env, index: int) -> None:
        super().__init__(env)
        self.index = index
        self.constants = large_arrays(env)
        self.failure: str | None = None
        self.shape = env.observation_space.shape
        self.dtype: Any = None  # that of the first observation: the space's is often not what comes

    def reset(self, **kwargs: Any) -> Any:
        try:
            obs, info = self.env.reset(**kwargs)
        except Exception as error:
            raise self._named("reset()", error) from error
        obs = np.array(obs)
        if self.dtype is None:
            self.dtype = obs.dtype
        if obs.shape != self.shape or obs.dtype != self.dtype:
            self._refuse(obs)
        return obs, info

    def step(self, action: Any) -> Any:
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
        except Exception as error:
            raise self._named("step()", error) from error
        obs = np.array(obs)
        if obs.shape != self.shape or obs.dtype != self.dtype:
            self._refuse(obs)
        return obs, reward, terminated, truncated, info

    def snapshot(self) -> list[Any] | str:
        """The state between two steps; why not, if it cannot be saved."""
        try:
            return [None if self.dtype is None else self.dtype.str, *snapshot(self._parts(), self.constants)]
        except Exception as error:
            return str(error) if isinstance(error, TypeError) else f"{type(error).__name__}: {error}"

    def unsaved(self) -> str | None:
        """Why its state cannot be saved; None if it can."""
        state = self.snapshot()
        return state if isinstance(state, str) else None

    def _restore(self, state: Any) -> None:
        self.failure = None
        try:
            restore(self._parts(), state[1:], self.constants)
            self.dtype = None if state[0] is None else np.dtype(state[0])
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

    def _named(self, where: str, error: Exception) -> EnvError:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        return EnvError(f"environment {self.index} failed in {where}: {type(error).__name__}: {error} ({place})")

    def _refuse(self, obs: np.ndarray) -> None:
        raise EnvError(
            f"environment {self.index} changed its observation: {obs.shape} of {obs.dtype}, "
            f"not {self.shape} of {self.dtype}"
        )


class Workers(AsyncVectorEnv):
    """AsyncVectorEnv that says which worker died or hangs, and of which none survives the trainer.

    Workers ignore the signals by which a run is asked to stop, as they often go to every process of it: the trainer
    decides when they end. They get two seconds to close their environments, and are killed.
    """

    def __init__(self, env_fns: list[Callable[[], gym.Env]]) -> None:
        self.processes: list[Any] = []
        self.awaited = 0
        self.hung: str | None = None
        # Before multiprocessing's own, which asks with SIGTERM and then waits for ever.
        atexit.register(_kill, weakref.ref(self), os.getpid())
        try:
            super().__init__(env_fns, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
        except BaseException as error:
            _kill(weakref.ref(self), os.getpid())
            if isinstance(error, EOFError | OSError):
                raise EnvError(self.obituary(None)) from None
            raise
        self.parent_pipes: list[Any] = [_Pipe(pipe, self, i) for i, pipe in enumerate(self.parent_pipes)]

    def obituary(self, index: int | None) -> str:
        """How worker `index` ended, or the first that did."""
        deadline = time.monotonic() + 2  # its pipe closes a moment before it has an exit code
        while time.monotonic() < deadline:
            for i, process in enumerate(self.processes):
                if process.exitcode is not None and index in (i, None):
                    number = -process.exitcode
                    return f"env worker {i} died ({f'signal {number}' if number > 0 else f'exit code {-number}'})"
            time.sleep(0.01)
        return f"env worker {index} closed its pipe"

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        if not terminate and self._state is AsyncState.DEFAULT:
            for pipe, process in zip(self.parent_pipes, self.processes, strict=True):
                if process.is_alive():
                    pipe.send(("close", None))
            deadline = time.monotonic() + 2
            for process in self.processes:
                process.join(max(deadline - time.monotonic(), 0))
        _kill(weakref.ref(self), os.getpid())
        for pipe in self.parent_pipes:
            pipe.close()

    def _raise_if_errors(self, successes: Any) -> None:
        if all(successes):
            return
        try:
            index, kind, value, trace = self.error_queue.get(timeout=5)
        except Empty:
            raise EnvError("an environment failed, and its error could not be sent") from None
        if args.show_tracebacks:
            print(trace, file=sys.stderr)
        raise EnvError(str(value) if kind is EnvError else f"environment {index} failed: {kind.__name__}: {value}")


class _Pipe:
    """A worker's pipe that notes who is waited for, and names the worker at its other end when that has died."""

    def __init__(self, pipe: Any, workers: Workers, index: int) -> None:
        self.pipe, self.workers, self.index = pipe, weakref.proxy(workers), index

    def send(self, message: Any) -> None:
        try:
            self.pipe.send(message)
        except OSError:
            raise EnvError(self.workers.obituary(self.index)) from None

    def recv(self) -> Any:
        self.workers.awaited = self.index
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            raise EnvError(self.workers.hung or self.workers.obituary(self.index)) from None

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
    for process in vector.processes:
        process.kill()
    for process in vector.processes:
        process.join()


def prepare_worker(trainer: int) -> None:
    """Nothing in the trainer itself, which makes one environment to look at its spaces."""
    if os.getpid() == trainer:
        return
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(trainer,), daemon=True).start()


def _end_with(trainer: int) -> None:
    """Ends this worker when the trainer is gone.

    Its pipe would tell it too, but not while it is inside a step, and with fork every worker holds the pipes of
    those before it open: one that hangs would keep them all.
    """
    while os.getppid() == trainer:
        time.sleep(0.5)
    os._exit(1)


class Watchdog:
    """Ends the run if one call of the vector environment takes `timeout` seconds. A thread, so a step costs nothing.

    A worker that hangs is killed, which the trainer reports as it does any death. In the trainer's own process
    nothing can be stopped, so the process ends at once with code 5. An environment that hangs in C without releasing
    Python's lock stops this thread as well: only `--async-envs` helps against those.

    It counts its own ticks, not the time, so that a computer asleep or a stopped process is not taken for one.
    """

    TICKS = 20

    def __init__(self, envs: Any, timeout: float) -> None:
        self.stop = threading.Event()
        self.trainer = threading.get_ident()
        threading.Thread(target=self._watch, args=(weakref.ref(envs), timeout), daemon=True).start()

    def _watch(self, reference: Any, timeout: float) -> None:
        since, ticks = 0.0, 0
        while not self.stop.wait(timeout / self.TICKS):
            envs = reference()
            if envs is None:
                return
            ticks = ticks + 1 if envs.waiting_since and envs.waiting_since == since else 0
            since = envs.waiting_since
            if ticks >= self.TICKS:
                self._end(envs.vector, f"has not answered for {timeout:g} s (--env-timeout)")
                return
            del envs

    def _end(self, vector: Any, what: str) -> None:
        if isinstance(vector, Workers):
            vector.hung = f"environment {vector.awaited} {what}"
            vector.processes[vector.awaited].kill()
            return
        frame, name = sys._current_frames().get(self.trainer), "an environment"
        while frame is not None:
            inner = frame.f_locals.get("self")
            if isinstance(inner, Guarded):
                name = f"environment {inner.index}"
            frame = frame.f_back
        if args.show_tracebacks:
            faulthandler.dump_traceback()
        print(f"error: {name} {what}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(5)
