"""Environments that raise, hang, die or hand out nonsense: one line, the right code, in time, and nobody left over."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import probe_envs
import pytest
import torch
from conftest import envs_of

from common import args

BOTH = pytest.mark.parametrize("async_envs", [False, True])


def play(envs, steps=8):
    envs.reset(seed=1)
    for _ in range(steps):
        envs.step(torch.zeros(envs.num_envs, dtype=torch.int64))


def fails(capfd, env_id, async_envs, num_envs=3, **more):
    """Code, the one line on stderr (the processes' own too), and seconds to the end of a run."""
    envs = envs_of(env_id, num_envs, async_envs, **more)
    capfd.readouterr()
    began = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        play(envs)
    seconds = time.monotonic() - began
    envs.close()
    if async_envs:
        assert not any(process.is_alive() for process in envs.vector.processes)
    (line,) = capfd.readouterr().err.splitlines()
    return stop.value.code, line, seconds


def places(text):
    """The lines of probe_envs.py that hold `text`."""
    return [i for i, line in enumerate(Path(probe_envs.__file__).read_text().splitlines(), 1) if text in line]


@BOTH
def test_an_environment_that_raises_is_named_and_its_line_too(capfd, async_envs):
    code, line, _ = fails(capfd, "Faulty-raises-v0", async_envs)
    where = places('raise OSError("the simulator')[1]
    assert code == 5
    assert line == (f"error: environment 1 failed in step(): OSError: the simulator went away (probe_envs.py:{where})")
    code, line, _ = fails(capfd, "Faulty-raises-what-cannot-be-sent-v0", async_envs)
    assert code == 5
    assert line.startswith("error: environment 1 failed in step(): Odd: no pickle")


@BOTH
def test_debug_shows_where_an_environment_raised(capfd, monkeypatch, async_envs):
    monkeypatch.setattr(args, "show_tracebacks", True)
    envs = envs_of("Faulty-raises-v0", 2, async_envs)
    with pytest.raises(SystemExit):
        play(envs)
    envs.close()
    assert 'raise OSError("the simulator' in capfd.readouterr().err


@BOTH
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("nan", "observation is nan"),
        ("infinite", "observation is -inf"),
        ("cancelling", "observation is inf"),
        ("too-large", "observation is inf"),
        ("nan-at-the-end", "last observation is nan"),
        ("nan-reward", "reward is nan"),
        ("too-large-a-reward", "reward is -inf"),
    ],
)
def test_a_number_that_is_not_finite_is_exit_4(capfd, kind, says, async_envs):
    code, line, _ = fails(capfd, f"Faulty-{kind}-v0", async_envs)
    assert code == 4
    assert line == f"error: environment 1: its {says} at step 5 (as float32)"


@BOTH
def test_large_numbers_are_no_fault(async_envs):
    envs = envs_of("Faulty-large-v0", 3, async_envs)
    play(envs)
    envs.close()


@BOTH
@pytest.mark.parametrize(("kind", "shape"), [("longer", "(3,)"), ("shorter", "(1,)")])
def test_an_observation_that_changes_its_shape_is_exit_5(capfd, kind, shape, async_envs):
    code, line, _ = fails(capfd, f"Faulty-{kind}-v0", async_envs)
    assert (code, line) == (5, f"error: environment 1: its observation has shape {shape}, its space (2,)")


@pytest.mark.parametrize(("kind", "how"), [("exits", "exit code 7"), ("segfaults", "signal 11")])
def test_a_worker_that_dies_is_named(capfd, kind, how):
    code, line, seconds = fails(capfd, f"Faulty-{kind}-v0", True)
    assert (code, line) == (5, f"error: env worker 1 died ({how})")
    assert seconds < 5


def test_a_worker_killed_between_two_steps_is_named(capfd):
    envs = envs_of("Mixed-v0", 4, async_envs=True)
    play(envs)
    os.kill(envs.vector.processes[3].pid, signal.SIGKILL)
    time.sleep(0.2)
    began = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        envs.step(torch.zeros(4, dtype=torch.int64))
    envs.close()
    assert time.monotonic() - began < 5
    assert stop.value.code == 5
    assert capfd.readouterr().err == "error: env worker 3 died (signal 9)\n"
    assert not any(process.is_alive() for process in envs.vector.processes)


def test_workers_ignore_the_signals_that_ask_a_run_to_stop():
    envs = envs_of("Mixed-v0", 2, async_envs=True)
    envs.reset(seed=1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        assert signal.getsignal(number) is not signal.SIG_IGN, "the trainer itself must not"
        for process in envs.vector.processes:
            os.kill(process.pid, number)
    play(envs)
    began = time.monotonic()
    envs.close()
    assert time.monotonic() - began < 1.5
    assert [process.exitcode for process in envs.vector.processes] == [0, 0]  # they closed their environments


HANGS = (
    "error: environment 1 has not answered within --env-timeout: it hangs in Faulty.step "
    f"(probe_envs.py:{places('time.sleep(60)')[0]})"
)


def test_a_worker_that_hangs_is_named(capfd):
    code, line, seconds = fails(capfd, "Faulty-hangs-v0", True, env_timeout=1)
    assert (code, line) == (5, HANGS)
    assert 1 <= seconds < 3


RUN = """
import multiprocessing, sys, time, torch, probe_envs
from conftest import envs_of

multiprocessing.set_start_method(sys.argv[5])

env_id, num_envs, async_envs, timeout = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "async", float(sys.argv[4])
envs = envs_of(env_id, num_envs, async_envs, env_timeout=timeout)
envs.reset(seed=1)
if async_envs:
    print(*(process.pid for process in envs.vector.processes), flush=True)
for t in range(8):
    print(t, flush=True)
    envs.step(torch.zeros(num_envs, dtype=torch.int64))
raise RuntimeError("a bug of the trainer")
"""


def start(*words, method="fork", **more):
    path = os.pathsep.join([os.environ["PYTHONPATH"], os.path.dirname(os.path.dirname(args.__file__))])
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *map(str, words), method],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        **more,
    )


def test_an_environment_that_hangs_in_the_trainers_own_process_is_named():
    process = start("Faulty-hangs-v0", 3, "sync", 1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 5
    assert err == HANGS + "\n"
    assert out.split() == ["0", "1", "2", "3", "4"]


@BOTH
def test_a_slow_environment_does_not_hang(async_envs):
    envs = envs_of("Slow-v0", 2, async_envs, env_timeout=0.6)
    play(envs, 6)  # a second in all
    time.sleep(0.8)  # between two steps it is the learner that takes its time
    envs.step(torch.zeros(2, dtype=torch.int64))
    envs.close()


def alive(pids):
    def state(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "gone"

    return [pid for pid in pids if state(pid) not in ("gone", "Z")]


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks at /proc")
@pytest.mark.parametrize(
    ("env_id", "method"),
    [
        ("Faulty-hangs-v0", "fork"),
        pytest.param("Slow-v0", "fork", marks=pytest.mark.slow),
        pytest.param("Faulty-hangs-v0", "forkserver", marks=pytest.mark.slow),
    ],
)
def test_no_worker_survives_a_trainer_that_is_killed(env_id, method):
    process = start(env_id, 3, "async", 0, method=method)
    pids = process.stdout.readline().split()
    while process.stdout.readline().strip() != "4":
        pass
    time.sleep(0.3)  # into the step: worker 1 hangs in it, or all are at work
    assert len(alive(pids)) == 3
    process.kill()
    process.wait()  # communicate() would wait for the workers too, which hold its pipes
    deadline = time.monotonic() + 3
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = alive(pids)
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    process.communicate()
    assert left == []


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks at /proc")
def test_no_worker_survives_a_trainer_that_raises():
    process = start("Mixed-v0", 3, "async", 0)
    pids = process.stdout.readline().split()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert re.search("RuntimeError: a bug of the trainer", err)
    assert alive(pids) == []
