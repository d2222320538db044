"""A process for each environment, and the watchdog that ends a call of environments that hangs."""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import CloudpickleWrapper, batch_space

from common.args import say
from common.internals.vector.guard import EnvError, Guarded, HangError, described
from common.internals.vector.spaces import in_columns

OVERFLOW = "overflow encountered in (cast|dot)"  # Envs reports it itself, with the environment's number
CLOSING = "closing the environments"  # for `beside_training`
CLOSE_SECONDS = 2
GRACE_SECONDS = 5  # for a call to end after the watchdog's signal
TICKS = 20  # in which the watchdog counts --env-timeout
INTERRUPT = getattr(signal, "SIGURG", None)  # of no use to environments, and ignored where nobody asks for it
LATE = "has not answered within --env-timeout: it hangs"


class Workers(VectorEnv):
    """Environments in a process each; the trainer itself makes none.

    Workers ignore the signals that ask a run to stop, as those often go to every process of it: the trainer ends them.
    An error is an EnvError that names the worker, but for gymnasium's errors and ImportErrors.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]]) -> None:
        self.num_envs = len(env_fns)
        self.processes: list[Any] = []
        self.pipes: list[Any] = []
        self.waits_for = 0  # the number of an environment
        self.idle = False  # all calls have been answered
        self.hung: str | None = None  # why the workers have been killed
        try:
            for index, make in enumerate(env_fns):
                pipe, other_end = multiprocessing.Pipe()
                words = (index, CloudpickleWrapper(make), other_end)
                process = multiprocessing.Process(target=_work, args=words, daemon=True)
                process.start()
                other_end.close()
                self.processes.append(process)
                self.pipes.append(pipe)
            spaces = self._call()
            if any(other != spaces[0] for other in spaces):
                raise EnvError("its copies differ in their spaces")
            in_memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
            with tempfile.TemporaryDirectory(dir=in_memory, ignore_cleanup_errors=True) as folder:
                path = os.path.join(folder, "observations")  # needed until all have opened it
                self.obs = _shared_rows(path, "w+", self.num_envs, spaces[0][0])
                self.call("share", path, self.num_envs)
        except BaseException:
            self.close_extras()
            raise
        self.single_observation_space, self.single_action_space = spaces[0]
        self.observation_space, self.action_space = (batch_space(space, self.num_envs) for space in spaces[0])

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        results = self._call("reset", [(each,) for each in seed or [None] * self.num_envs])
        return self.obs, in_columns({i: info for i, (info,) in enumerate(results)}, self.num_envs)

    def step(self, actions: Any) -> Any:
        results = self._call("step", [(action,) for action in actions])
        *columns, infos = zip(*results, strict=True)
        return self.obs, *map(np.array, columns), in_columns(dict(enumerate(infos)), self.num_envs)

    def call(self, name: str, *arguments: Any) -> list[Any]:
        """What a method of each environment returns."""
        return self._call(name, [arguments] * self.num_envs)

    def get_attr(self, name: str) -> list[Any]:
        return self.call("__getattribute__", name)

    def set_attr(self, name: str, values: Sequence[Any]) -> None:
        self._call("__setattr__", [(name, value) for value in values])

    def _call(self, name: str = "", arguments: Iterable[tuple[Any, ...]] = ()) -> list[Any]:
        """The answers of all to a call of a method; without a name, to what they have been asked already."""
        self.idle, answers = False, []
        try:
            for self.waits_for, words in enumerate(arguments):
                self.pipes[self.waits_for].send((name, words))
            for self.waits_for, pipe in enumerate(self.pipes):  # noqa: B020
                is_error, answer = pipe.recv()
                if is_error:
                    raise answer
                answers.append(answer)
        except (EOFError, OSError):
            raise self._death() from None
        self.idle = True
        return answers

    def _death(self) -> EnvError:
        """What ended the worker whose pipe is closed."""
        process = self.processes[self.waits_for]
        process.join(2)  # a pipe closes a moment before its process has an exit code
        code = process.exitcode or 0
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return EnvError(self.hung or f"env worker {self.waits_for} died ({how})")

    def end(self, reason: str) -> None:
        """Kills the workers, from another thread; the call that waits for one of them raises an EnvError."""
        self.hung = f"environment {self.waits_for} {reason}"
        for process in self.processes:
            process.kill()

    def close_extras(self, **kwargs: Any) -> None:
        """Workers have two seconds to close their environments; where one has not answered, all are killed at once."""
        late = threading.Timer(CLOSE_SECONDS * self.idle, self.end, [f"did not close within {CLOSE_SECONDS} s"])
        late.start()
        try:
            if self.idle:
                self.call("close")
        finally:
            for process in self.processes:
                process.join()
            late.cancel()


def _work(index: int, make: Callable[[], gym.Env], pipe: Any) -> None:
    """Answers with the spaces of an environment, then every call of it, as (False, result) or (True, error)."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if INTERRUPT:
        signal.signal(INTERRUPT, _interrupt)
    threading.Thread(target=_end_with_trainer, daemon=True).start()
    warnings.filterwarnings("ignore", OVERFLOW)
    name, rows = "", np.empty(0)
    try:
        env = make()
        calls: dict[str, Any] = {"reset": lambda seed: env.reset(seed=seed), "step": functools.partial(_step, env)}
        answer: Any = env.observation_space, env.action_space
        while name != "close":
            pipe.send((False, answer))
            name, words = pipe.recv()
            if name == "share":
                rows, answer = _shared_rows(words[0], "r+", words[1], env.observation_space), None
            elif name in calls:
                rows[index], *answer = calls[name](*words)
            else:
                answer = getattr(env, name)(*words)
        pipe.send((False, answer))
    except (EOFError, OSError):  # the trainer is gone
        return
    except BaseException as error:
        named = isinstance(error, EnvError | ImportError | gym.error.Error)
        answer = error if named else EnvError(f"environment {index} failed: {described(error)}")
        answer.add_note(traceback.format_exc())  # --debug shows it
        pipe.send((True, answer))


def _shared_rows(path: str, mode: Any, num_envs: int, space: gym.Space) -> np.ndarray:
    """An array in memory that all processes share, with a row for the observation of each environment."""
    shape, dtype = space.shape or (), space.dtype or np.float32  # make_envs refuses spaces without them
    return np.memmap(path, dtype, mode, shape=(num_envs, *shape)).view(np.ndarray)


def _step(env: gym.Env, action: Any) -> Any:
    """With SAME_STEP autoreset."""
    obs, reward, terminated, truncated, info = env.step(action)
    if terminated or truncated:
        final = {"final_obs": obs, "final_info": info}
        obs, info = env.reset()
        info = {**final, **info}
    return obs, reward, terminated, truncated, info


def _end_with_trainer() -> None:
    """Ends this worker, in the middle of a step too, when the trainer is gone."""
    trainer: Any = multiprocessing.parent_process()
    trainer.join()
    os._exit(1)


class Watchdog:
    """Ends a call of the environments that takes `timeout` seconds (0: never). A thread, so a step costs nothing.

    A call is watched while `since`, when it began, is not 0, or in a `with` block, with which the watchdog ends.

    The process that hangs gets a signal, whose handler raises a HangError that names the place: in Python code, in
    time.sleep, in system calls. Code in C may not notice: a few seconds later the workers are killed, or the trainer's
    own process ends at once with code 5. A hang in C that keeps Python's lock stops this thread as well: only
    `--async-envs` helps against that.

    It counts its own ticks, not the time, so that a computer asleep or a stopped process is not taken for a hang.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout, self.since, self.stop = timeout, 0.0, threading.Event()
        self.trainer = threading.get_ident()
        if timeout:
            if INTERRUPT and threading.current_thread() is threading.main_thread():
                signal.signal(INTERRUPT, _interrupt)
            threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> None:
        self.since = time.monotonic()

    def __exit__(self, *error: Any) -> None:
        self.since = 0.0
        self.stop.set()

    def _watch(self) -> None:
        since, ticks = 0.0, 0
        while not self.stop.wait(self.timeout / TICKS):
            ticks = ticks + 1 if self.since and self.since == since else 0
            since = self.since
            if ticks < TICKS:
                continue
            ticks = 0
            owner, _ = _at_work(sys._current_frames()[self.trainer])
            pid = owner.processes[owner.waits_for].pid if isinstance(owner, Workers) else os.getpid()
            if INTERRUPT:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, INTERRUPT)
            if self.stop.wait(min(self.timeout, GRACE_SECONDS)) or self.since != since:
                continue
            owner, place = _at_work(sys._current_frames()[self.trainer])
            if isinstance(owner, Workers):
                owner.end(f"{LATE} outside of Python")
                continue
            name = f"environment {owner.index}" if owner else "an environment"
            say(f"error: {name} {LATE} in {place}", sys.stderr)
            os._exit(5)


def _interrupt(number: int, frame: Any) -> None:
    """Handles the watchdog's signal in the process that hangs."""
    owner, place = _at_work(frame)
    if isinstance(owner, Guarded):
        raise HangError(f"environment {owner.index} {LATE} in {place}")


def _at_work(frame: Any) -> tuple[Any, str]:
    """The innermost Guarded or Workers whose method a thread is in, or None, and the place where it is."""
    place = f"{frame.f_code.co_qualname} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
    owner = None
    while frame is not None and not isinstance(owner, Guarded | Workers):
        owner, frame = frame.f_locals.get("self"), frame.f_back
    return owner if isinstance(owner, Guarded | Workers) else None, place
