"""Runs Python in new processes that need no time to import torch: forks of one process that has imported it.

    process = Warm([script, *flags])        # as subprocess.Popen([sys.executable, script, *flags]) with pipes

A fork has its own arguments, folder, environment, standard streams, signals and exit code. It shares with the others
what `PRELOAD` has imported: what reads the environment while it is imported needs a new interpreter (`cold`).
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

PRELOAD = ["common.run", "gymnasium", "wandb"]  # in addition to what `python -m common check` preloads
READ_AT_START = ("PYTHON", "OMP_", "MKL_", "CUDA_", "TORCH", "RANK", "WORLD_SIZE", "LOCAL_")


def cold(environment):
    """Whether `environment`, in addition to that of the tests, holds what Python or torch reads once, at its start."""
    return any(name.startswith(READ_AT_START) for name in environment)


class Warm:
    """What the tests use of `subprocess.Popen`, with text in both streams; or both go to the descriptor `terminal`."""

    def __init__(self, words, cwd=None, env=None, start_new_session=False, terminal=None):
        self.returncode = None
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read at the end
        reading, writing = os.pipe()
        self.stdout = os.fdopen(reading)
        request = [[str(word) for word in words], str(cwd or os.getcwd()), dict(env or os.environ), start_new_session]
        with socket.socket(socket.AF_UNIX) as connection, open(os.devnull) as nothing:
            connection.connect(server())
            streams = (writing, self.errors.fileno()) if terminal is None else (terminal, terminal)
            socket.send_fds(connection, [b"."], [nothing.fileno(), *streams])
            connection.sendall(json.dumps(request).encode() + b"\n")
            self.answers = connection.makefile("r")
        os.close(writing)
        self.pid = int(self.answers.readline())
        self.waiting = threading.Thread(target=self._wait, daemon=True)
        self.waiting.start()

    def _wait(self):
        answer = self.answers.readline()
        self.answers.close()
        self.returncode = int(answer) if answer else -signal.SIGKILL

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self.waiting.join(timeout)
        if self.waiting.is_alive():
            raise subprocess.TimeoutExpired("a warm process", timeout)
        return self.returncode

    def send_signal(self, number):
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """What is left of its output, and all its errors; as `subprocess.run`, it kills what has not ended by then."""
        late = threading.Event()
        timer = threading.Timer(timeout or 600, lambda: (late.set(), self.kill()))
        timer.start()
        out = self.stdout.read()
        self.wait()
        timer.cancel()
        if late.is_set():
            raise subprocess.TimeoutExpired("a warm process", timeout)
        self.errors.seek(0)
        return out, self.errors.read()


def run(words, cwd=None, env=None, timeout=None):
    """As `subprocess.run([sys.executable, *words], capture_output=True, text=True)`."""
    process = Warm(words, cwd, env)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


_server = []


def server():
    """Where the process listens that has all imported; started by the first who asks, and again if it was killed."""
    if not _server or _server[1].poll() is not None:
        folder = tempfile.mkdtemp(prefix="warm-", dir="/tmp")  # the name of a socket has at most 107 characters
        path = f"{folder}/socket"
        process = subprocess.Popen([sys.executable, __file__, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        _server[:] = [path, process]
        atexit.register(lambda: (process.stdin.close(), process.wait(), shutil.rmtree(folder, ignore_errors=True)))
    return _server[0]


# --- in the server


def serve(path):
    checks = importlib.import_module("common.tools.check.recorder").PRELOAD
    for name in [*checks, *PRELOAD]:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal of the tests is for pytest
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        threading.Thread(target=lambda: (sys.stdin.buffer.read(), os.unlink(path), os._exit(0)), daemon=True).start()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                watch(connection)
            connection.close()


def watch(connection):
    """Starts what is asked for, and answers with its number, and at its end with its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("r") as file:
        words, cwd, env, new_session = json.loads(file.readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if new_session:
            os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        become(words, cwd, env)
    connection.sendall(f"{pid}\n".encode())
    for stream in streams:
        os.close(stream)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


def become(words, cwd, env):
    """What `python WORDS...` does, from the reading of the environment to the exit."""
    before = {str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    installed = [entry for entry in sys.path if entry not in before]
    first = {"-m": cwd, "-c": ""}.get(words[0], os.path.dirname(os.path.abspath(words[0])))
    sys.path[:] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *installed]
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    code = 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    serve(sys.argv[1])
