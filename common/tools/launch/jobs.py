"""Scripts as processes: what `benchmark` and `sweep` share.

A run is one process of a script, with real arguments, in a session of its own so that a terminal's Ctrl-C reaches it
only through the tool, once. It is found again by what its run directory says of it, so that a tool that was killed at
any moment can be started again and knows what is finished, what goes on, and what has yet to begin.
"""

import contextlib
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from common import files
from common.args import fail
from common.files import finished_step, open_file, write_atomically
from common.redact import REDACTED, redact
from common.redact import __file__ as redaction

# What a tool sets itself for each run.
OWN_FLAGS = {"seed", "runs_dir", "wandb_group", "wandb_tags", "resume"}
# What does not make another experiment of a run.
INCIDENTAL = OWN_FLAGS | {"track", "cuda", "torch_threads", "debug", "wandb_project", "wandb_entity", "wandb_name"}
INCIDENTAL |= {"wandb_notes"}
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1
WRITES_ON = 5  # seconds that the log of a run which has ended is waited for


@dataclass
class Answer:
    """What a script makes of a command line: its arguments, or why it refuses them."""

    args: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def ask(script: Path, command_lines: list[list[str]]) -> tuple[dict[str, str], list[Answer]]:
    """The names and types of a script's arguments, and what its own parser makes of each command line.

    The script itself answers, in a process of its own and before its slow imports. `--help` is for scripts that do not
    read their arguments with `common.parse`: they show it instead of beginning to train.

    Ends the process with code 2 if the script does not answer.
    """
    if not script.is_file():
        fail(f"there is no script {script}")
    try:
        done = subprocess.run(
            [sys.executable, str(script), "--help"],
            input=json.dumps(command_lines),
            env={**os.environ, "PLAINRL_ASKED": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        answer = json.loads(done.stdout.splitlines()[-1])
        return answer["types"], [Answer(**one) for one in answer["answers"]]
    except (OSError, subprocess.SubprocessError) as error:
        fail(f"{script} cannot be asked for its arguments: {error}")
    except (ValueError, IndexError, KeyError, TypeError):
        said = done.stderr.strip().splitlines()
        why = said[-1] if done.returncode and said else "it does not read them with common.parse(Args)"
        fail(f"{script} does not tell its arguments: {why}")


def base_arguments(script: Path, flags: list[str], own: set[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """A script's types and arguments under `flags`; code 2 if it refuses them, or if one is the tool's (`own`)."""
    types, (plain, given) = ask(script, [[], flags])
    if given.error is not None:
        fail(f"{script.name}: {given.error}")
    given_names = {word.partition("=")[0][2:].replace("-", "_") for word in flags if word.startswith("--")}
    for name in sorted(given_names & own):
        fail(f"--{name.replace('_', '-')} cannot be among the script's flags: it is set for each run")
    if plain.error is not None:
        fail(f"{script.name} does not accept its own defaults: {plain.error}")
    return types, given.args


def as_words(flags: dict[str, Any]) -> list[str]:
    """Arguments, as JSON has them, as they are written on a command line."""
    words = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", str(value)]
    return words


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """The tool's own words, and those after `--`, which are the script's."""
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


def numbers(text: str, flag: str) -> list[int]:
    """`1-3,7` as [1, 2, 3, 7]; code 2 if it is not that."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            fail(f"{flag} {text!r} is not of the form 1-5 or 1,3,7-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= 100_000:
            fail(f"{flag}: {part} is no range of seeds")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        fail(f"{flag} {text!r} names a seed twice")
    return found


def component(name: str, flag: str) -> str:
    """`name` if it can be the name of a folder; else code 2."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,150}", name):
        fail(f"{flag} {name!r} names a folder too: letters, digits, '_', '-' and '.' only")
    return name


def sanitized(name: str) -> str:
    """As `common.run.track` does it."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)


def jsonable(value: Any) -> Any:
    """As it reads in args.json."""
    return redact(json.loads(json.dumps(value, default=str)))


def again(flags: list[str]) -> list[str]:
    """Those of a run's flags that resuming it takes anew, as args.json does not have them or is not to decide them."""
    if redact(flags) != flags:
        return flags
    return [word for word in flags if word.replace("_", "-") in ("--allow-env-import", "--no-allow-env-import")]


def find_run(runs_dir: Path, stem: str, wanted: dict[str, Any]) -> Path | None:
    """The run directory of script `stem` whose args.json agrees with `wanted`; of several, the furthest."""
    middle = sanitized(f"__{stem}__{wanted['seed']}__")
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir(runs_dir):
            if middle not in name:
                continue
            facts = read_json(runs_dir / name / "args.json")
            if (
                isinstance(facts, dict)
                and facts.get("script") == stem
                and all(facts.get(key) == wanted[key] for key in wanted)
            ):
                checkpoints = sorted(path.name for path in (runs_dir / name).glob("checkpoints/step-*.pt"))
                found.append((is_finished(runs_dir / name), checkpoints[-1:], name))
    return runs_dir / max(found)[2] if found else None


def is_finished(run_dir: Path) -> bool:
    return finished_step(run_dir) is not None


def read_json(path: Path) -> Any:
    """None if it is not there, cut short, or no file of JSON at all."""
    try:
        return files.read_json(path.parent, path.name)
    except (OSError, ValueError):
        return None


def write_file(path: Path, text: str) -> None:
    """All of it or nothing, whenever the process is killed; without secrets."""
    try:
        write_atomically(path, redact(text).encode("utf-8", "surrogateescape"))
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}", code=6)


def last_error(log: Path) -> str:
    """The error that a run ended with: the last line that begins with `error:`, else the last line."""
    try:
        lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "no output")


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make {path}: {error.strerror}; choose another with --runs-dir", code=6)


def claim(path: Path) -> int | None:
    """A lock on `path`, or None if another holds it. The system lets go of it when its last holder is gone."""
    import fcntl

    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for the lock on `path`, and holds it."""
    import fcntl

    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Progress:
    """What metrics.jsonl of a growing run says so far."""

    PARTS = 10

    def __init__(self, run_dir: Path, total_timesteps: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.total = total_timesteps
        self._clear()

    def _clear(self) -> None:
        self.offset = 0
        self.step = 0
        self.evaluation: float | None = None  # the last eval/episodic_return; None if that is not finite
        self.sums = [0.0] * self.PARTS  # of the returns of the episodes that ended in each tenth of the run
        self.counts = [0] * self.PARTS

    def update(self) -> None:
        """Reads the whole lines that are new. A resumed run cuts the file back to its checkpoint: then all of them."""
        try:
            with open_file(self.path.parent, self.path.name) as file:
                if file.seek(0, os.SEEK_END) < self.offset:
                    self._clear()
                file.seek(self.offset)
                whole = file.read()
        except OSError:
            return
        whole = whole[: whole.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(
                ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError
            ):  # a line that no run wrote
                self._take(json.loads(line))

    def _take(self, row: dict[str, Any]) -> None:
        step, episode = int(row["global_step"]), row.get("charts/episodic_return")
        self.step = max(self.step, step)
        if "eval/episodic_return" in row:
            score = row["eval/episodic_return"]
            self.evaluation = None if score is None else float(score)
        if episode is not None:
            part = min(max(step * self.PARTS - 1, 0) // self.total, self.PARTS - 1)
            self.sums[part] += float(episode)
            self.counts[part] += 1

    @property
    def share(self) -> float:
        return min(self.step / self.total, 1.0)

    def mean_return(self, part: int) -> float | None:
        """Mean return of the episodes that ended in a tenth of the run; None if none did, or it is not over."""
        over = self.step * self.PARTS > (part + 1) * self.total
        return self.sums[part] / self.counts[part] if over and self.counts[part] else None


@dataclass(eq=False)
class Job:
    """A run to make: flags of its script, where it writes what it prints, and how its directory is known."""

    name: str
    script: Path
    flags: list[str]
    wanted: dict[str, Any]  # of its args.json
    runs_dir: Path
    total_timesteps: int
    log: Path
    lock: Path
    process: subprocess.Popen | None = None
    writer: subprocess.Popen | None = None  # of its log
    worker: int = 0
    code: int | None = None
    run_dir: Path | None = None
    progress: Progress | None = None
    started: float = 0.0

    def find(self) -> Path | None:
        """Its run directory, once it has one."""
        if self.run_dir is None:
            self.run_dir = find_run(self.runs_dir, self.script.stem, self.wanted)
        if self.run_dir is not None and self.progress is None:
            self.progress = Progress(self.run_dir, self.total_timesteps)
        return self.run_dir

    def look(self) -> float:
        """How much of it is done, 0 to 1."""
        self.find()
        if self.progress is None:
            return 0.0
        self.progress.update()
        return self.progress.share

    def finished(self) -> bool:
        return self.find() is not None and is_finished(self.run_dir)  # type: ignore[arg-type]

    def score(self) -> float | None:
        """The last greedy evaluation, of a finished run."""
        if not self.finished():
            return None
        self.look()
        return self.progress.evaluation  # type: ignore[union-attr]

    def error(self) -> str:
        if self.process is not None and self.process.returncode == 0:
            return "error: it ended without a finished run directory, or without an evaluation in it"
        return last_error(self.log)


class Pool:
    """At most `workers` runs at a time, each on cores of its own."""

    def __init__(self, workers: int, pin: bool = True) -> None:
        cores = sorted(os.sched_getaffinity(0)) if pin and hasattr(os, "sched_getaffinity") else []
        n = len(cores)
        shares = [cores[i * n // workers : (i + 1) * n // workers] for i in range(workers)]
        self.cores = [share or cores[i % n : i % n + 1] if cores else [] for i, share in enumerate(shares)]
        self.free = list(range(workers))
        self.jobs: list[Job] = []
        self.signals: list[int] = []  # that asked this tool to stop
        self.forwarded = 0

    def listen(self) -> None:
        """From here on a signal that asks this tool to stop asks its runs, which make a checkpoint first."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
            if name == "SIGHUP" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
                continue  # nohup
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), lambda number, frame: self.signals.append(number))

    @property
    def stopping(self) -> bool:
        """Whether a signal has asked this tool to stop."""
        return bool(self.signals)

    def start(self, job: Job) -> bool:
        """Starts a job, or lets it go on from its checkpoint; False if another process has it or it is finished.

        The run inherits the lock, so that it holds it alone should this tool be killed.
        """
        make_folder(job.lock.parent)
        make_folder(job.log.parent)
        lock = claim(job.lock)
        if lock is None:
            return False
        try:
            job.run_dir = job.progress = None  # what was there before may have been another attempt's
            if job.finished():
                return False
            words = job.flags if job.run_dir is None else ["--resume", str(job.run_dir), *again(job.flags)]
            command = [sys.executable, str(job.script), *words]
            if REDACTED in shlex.join(words):
                fail(f"{job.name} has a secret among its flags, which no file keeps: let the script read it itself")
            job.worker = self.free.pop(0)
            # A process of its own leaves secrets out of the log: a run must not lose its output with this tool.
            filtered = [sys.executable, "-I", redaction, str(job.log)]
            job.writer = subprocess.Popen(filtered, stdin=subprocess.PIPE, start_new_session=True)
            with job.writer.stdin as log:  # type: ignore[union-attr]
                log.write(f"$ {shlex.join(command)}\n".encode("utf-8", "surrogateescape"))
                log.flush()
                job.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=[lock],
                    preexec_fn=_Prepare(self.cores[job.worker]),
                )
        except OSError as error:
            fail(f"cannot start {job.script}: {error}", code=6)
        finally:
            os.close(lock)
        job.code, job.started = None, time.monotonic()
        self.jobs.append(job)
        return True

    def poll(self) -> list[Job]:
        """The jobs that have ended since the last call, with their exit codes; passes signals on."""
        for _ in self.signals[self.forwarded :]:
            self.forwarded += 1
            for job in self.jobs:
                stop(job)
        ended = [job for job in self.jobs if job.process.poll() is not None]  # type: ignore[union-attr]
        for job in ended:
            with contextlib.suppress(subprocess.TimeoutExpired):  # a process that the run left behind may write on
                job.writer.wait(WRITES_ON)  # type: ignore[union-attr]
            code = job.process.returncode  # type: ignore[union-attr]
            job.code = code if code >= 0 else 128 - code
            self.jobs.remove(job)
            self.free.append(job.worker)
            self.free.sort()
        return ended

    def wait(self) -> None:
        """Until every run has ended."""
        while self.jobs:
            self.poll()
            time.sleep(0.05)

    def leave(self, command: list[str]) -> NoReturn:
        """After a signal: waits for the checkpoints, says how to go on, and ends with 128 + its number."""
        number = self.signals[0]
        self.wait()
        fail(f"stopped by {signal.Signals(number).name}; go on with {shlex.join(command)}", 128 + number)


def stop(job: Job) -> None:
    """Asks a run to make a checkpoint and end; asked again, it ends at once."""
    if job.process is not None and job.process.poll() is None:
        job.process.send_signal(signal.SIGTERM)


class _Prepare:
    """Runs in the new process before the script.

    Its end is tied to the tool's (Linux; elsewhere a run whose tool was killed plays on, and its lock says so). SLURM
    sends SIGUSR1 and SIGUSR2 to every process of a job: a run would take the tool's SIGTERM for the second request to
    stop, and leave without its checkpoint. So they are blocked.
    """

    def __init__(self, cores: list[int]) -> None:
        self.cores = cores
        self.tool = os.getpid()

    def __call__(self) -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != self.tool:
                os._exit(143)
        if self.cores:
            os.sched_setaffinity(0, self.cores)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})


class Screen:
    """Lines that stay, above a block that renews itself in a terminal. In a redirected log there is no block."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.height = 0
        self.last = 0.0

    def say(self, text: str) -> None:
        self._clear()
        print(text, flush=True)

    def due(self) -> bool:
        return self.terminal and time.monotonic() - self.last > 0.5

    def show(self, lines: list[str]) -> None:
        self._clear()
        self.last = time.monotonic()
        width, height = shutil.get_terminal_size()
        lines = lines[: height - 2]
        sys.stdout.write("".join(line[: width - 1] + "\n" for line in lines))
        sys.stdout.flush()
        self.height = len(lines)

    def _clear(self) -> None:
        if self.height:
            sys.stdout.write(f"\x1b[{self.height}F\x1b[J")
        self.height, self.last = 0, 0.0


def clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
