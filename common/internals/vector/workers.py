"""A process for each environment, and the watchdog that ends a call of environments that hangs."""

import contextlib
import faulthandler
import functools
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

import gymnasium as gym
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.vector.async_vector_env import AsyncState, _async_worker

from common import args
from common.internals.vector.guard import EnvError, Guarded, HangError, described
from common.internals.vector.spaces import InColumns

INTERRUPT = getattr(signal, "SIGURG", None)  # of no use to environments, and ignored where nobody asks for it
LATE = "has not answered within --env-timeout"
OVERFLOW = "overflow encountered in (cast|dot)"  # Envs reports it itself, with the environment's number
CLOSING = "closing the environments"  # for `beside_training`
CLOSE_SECONDS = 2
GRACE_SECONDS = 5  # for a call to end after the watchdog's signal


class Workers(InColumns, AsyncVectorEnv):
    """AsyncVectorEnv that says which worker failed or died, and kills those that do not end by themselves.

    Workers ignore the signals by which a run is asked to stop, as they often go to every process of it: the trainer
    decides when they end. They get two seconds to close their environments.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]]) -> None:
        self.processes: list[Any] = []
        self.parent_pipes: list[Any] = []
        self.hung: str | None = None
        first: Any = functools.partial(_first, env_fns[0], os.getpid())
        try:
            super().__init__([first, *env_fns[1:]], copy=False, worker=_work, autoreset_mode=AutoresetMode.SAME_STEP)
        except BaseException as error:
            reason = self.explained(error)
            self._kill()
            raise reason from None

    def explained(self, error: BaseException) -> BaseException:
        """What ended the worker whose pipe raised `error`; other errors as they are."""
        if isinstance(error, EOFError | OSError):
            sentinels = [process.sentinel for process in self.processes if process.pid]
            ended = multiprocessing.connection.wait(sentinels, 2)
            for i, process in enumerate(self.processes):
                if process.pid and process.sentinel in ended:
                    process.join(2)  # a pipe closes a moment before its process has an exit code
                    code = process.exitcode or 0
                    how = f"signal {-code}" if code < 0 else f"exit code {code}"
                    return EnvError(self.hung or f"env worker {i} died ({how})")
        return error

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        asked = not terminate and self._state is AsyncState.DEFAULT
        if asked:
            deadline = time.monotonic() + CLOSE_SECONDS
            for pipe in self.parent_pipes:
                with contextlib.suppress(OSError):  # of a worker that is dead
                    pipe.send(("close", None))
            for process in self.processes:
                process.join(max(deadline - time.monotonic(), 0))
        late = [i for i, process in enumerate(self.processes) if process.is_alive()]
        self._kill()
        if asked and late:
            raise EnvError(f"environment {late[0]} did not close within {CLOSE_SECONDS} s")
        if asked and not self.error_queue.empty():
            self._raise_if_errors([False])

    def _raise_if_errors(self, successes: Iterable[bool]) -> None:
        errors = [self.error_queue.get(timeout=5) for success in successes if not success]
        if errors:
            index, _, error, trace = min(errors, key=lambda failed: failed[0])
            if args.show_tracebacks:
                print(trace, file=sys.stderr)
            raise error if isinstance(error, EnvError) else EnvError(f"environment {index} failed: {described(error)}")

    def _kill(self) -> None:
        self.closed = True  # gymnasium would ask the dead to close their environments
        started = [process for process in self.processes if process.pid]
        for process in started:
            process.kill()
        for process in started:
            process.join()


def _first(make: Callable[[], gym.Env], trainer: int) -> gym.Env:
    """The first environment. gymnasium also makes it in the trainer, looks at its spaces and closes it."""
    env: Any = make()
    if os.getpid() == trainer:
        env.close = args.beside_training(CLOSING)(env.close)
    return env


def _work(index: int, make: Callable[[], gym.Env], pipe: Any, trainers_pipe: Any, memory: Any, *more: Any) -> None:
    """gymnasium's worker, which also reports what fails when its environment is made or closed."""
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
        _async_worker(index, lambda: env, pipe, trainers_pipe, memory, *more)
    except OSError:  # the trainer is gone
        return
    except BaseException as error:
        more[0].put((index, None, error, traceback.format_exc()))
        if env is None:
            pipe.recv()
            pipe.send((None, False))


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
    """Ends a call of the environments that takes `timeout` seconds (0: never). A thread, so a step costs nothing.

    A call is watched from when `since` is its time of beginning until `since` is 0, or in a `with` block, with which
    the watchdog ends.

    The process whose environment hangs is interrupted by a signal, which raises an EnvError that names the place: in
    Python code, in time.sleep, in system calls. Code in C may not notice. A few seconds later the worker is killed, or
    the trainer's own process ends at once with code 5.
    What hangs in C without releasing Python's lock stops this thread as well: only `--async-envs` helps against that.

    It counts its own ticks, not the time, so that a computer asleep or a stopped process is not taken for one.
    """

    TICKS = 20
    asking: Any = None  # the one that has sent the last signal

    def __init__(self, timeout: float) -> None:
        self.timeout, self.since, self.stop = timeout, 0.0, threading.Event()
        self.trainer = threading.get_ident()
        self.in_main_thread = self.trainer == threading.main_thread().ident
        if timeout and INTERRUPT and self.in_main_thread and signal.getsignal(INTERRUPT) is signal.SIG_DFL:
            signal.signal(INTERRUPT, _interrupt)
        if timeout:
            threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> None:
        self.since = time.monotonic()

    def __exit__(self, *error: Any) -> None:
        self.since = 0.0
        self.stop.set()

    def _watch(self) -> None:
        since, ticks = 0.0, 0
        while not self.stop.wait(self.timeout / self.TICKS):
            ticks = ticks + 1 if self.since and self.since == since else 0
            since = self.since
            if ticks >= self.TICKS:
                self._ask()
                if not self.stop.wait(min(self.timeout, GRACE_SECONDS)) and self.since == since:
                    self._end()
                ticks = 0

    def _ask(self) -> None:
        inner, *_ = _at_work(sys._current_frames().get(self.trainer))
        Watchdog.asking = self
        if INTERRUPT and isinstance(inner, Workers):
            for process in inner.processes:
                with contextlib.suppress(OSError, TypeError):
                    os.kill(process.pid, INTERRUPT)
        elif INTERRUPT and self.in_main_thread and signal.getsignal(INTERRUPT) is _interrupt:
            signal.pthread_kill(self.trainer, INTERRUPT)

    def _end(self) -> None:
        inner, name, place = _at_work(sys._current_frames().get(self.trainer))
        if isinstance(inner, Workers):
            inner.hung = f"{name} {LATE}: it hangs outside of Python"
            for process in inner.processes:
                process.kill()
            return
        if args.show_tracebacks:
            faulthandler.dump_traceback()
        args.say(f"error: {name} {LATE}: it hangs in {place}", sys.stderr)
        os._exit(5)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handles the watchdog's signal, in the main thread of the process whose environment hangs."""
    inner, name, place = _at_work(frame)
    if isinstance(inner, Guarded):
        if not inner.interrupted and Watchdog.asking is not None:  # others have their time; one that goes on has not
            Watchdog.asking.since = time.monotonic()
        inner.interrupted = True
        raise HangError(f"{name} {LATE}: it hangs in {place}")


def _at_work(frame: FrameType | None) -> tuple[Any, str, str]:
    """Of a thread: the innermost Guarded or Workers, the environment it waits for, and the place at which it is."""
    pipe: Any = None
    place = "?"
    if frame is not None:
        place = f"{frame.f_code.co_qualname} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
    while frame is not None:
        inner = frame.f_locals.get("self")
        if isinstance(inner, Guarded):
            return inner, f"environment {inner.index}", place
        if isinstance(inner, Workers):
            known = pipe in inner.parent_pipes  # a worker's own pipe is not
            return inner, f"environment {inner.parent_pipes.index(pipe)}" if known else "an environment", place
        if isinstance(inner, multiprocessing.connection._ConnectionBase):
            pipe = inner
        frame = frame.f_back
    return None, "an environment", place
