"""The arguments that every script has, and how errors and warnings are reported. Imports nothing heavy."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NoReturn, TextIO

from common.internals.console.checks import check_arguments

show_tracebacks = False  # --debug
_beside = 0  # how many `beside_training` are open
_warned: set[str] = set()

# Set by torchrun. Other launchers (Slurm, MPI) set RANK too, for processes that have nothing to do with one another.
_TORCHRUN = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK, WORLD_SIZE = int(_TORCHRUN.get("RANK", 0)), int(_TORCHRUN.get("WORLD_SIZE", 1))


@dataclass
class RunArgs:
    """The arguments of a run, whatever the algorithm; a script's `Args` adds its hyperparameters.

    Ends the process with code 2 and one line if a value does not fit its type or its range.
    """

    env_id: str = "CartPole-v1"
    """gymnasium environment id"""
    total_timesteps: int = 500_000
    """environment steps in total, over all environments"""
    num_envs: int = 1
    """parallel environments in total, over all processes of torchrun"""
    async_envs: bool = False
    """a process for each environment: faster for slow environments on many cores"""
    native_envs: bool = False
    """one array operation for all environments (CartPole; Atari always): worth it from 8 environments up"""
    env_timeout: float = 600.0
    """seconds that a step or reset may take before the run ends (0: no limit)"""
    allow_env_import: bool = False
    """import, and so run, the module of an id of the form module:Env-v0"""
    seed: int = 1
    """seed of all random numbers: environments, exploration, initialisation, sampling"""
    cuda: bool = True
    """train on the GPU where there is one"""
    compile: bool = False
    """compile each update into one graph: faster, after up to half a minute the first time"""
    torch_deterministic: bool = True
    """deterministic GPU kernels rather than the fastest"""
    torch_threads: int = 1
    """CPU threads of torch: more are worth it for images or layers wider than about 512 units"""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """float32 matrix products: exact, TF32 on GPUs (high), or bfloat16 where the hardware has it (medium)"""
    save_interval: int = 50_000
    """environment steps between checkpoints; there is also one before each evaluation (0: no checkpoints)"""
    resume: str | None = None
    """run directory to continue from its last checkpoint, with its arguments"""
    runs_dir: str = "runs"
    """folder for run directories"""
    debug: bool = False
    """print the whole traceback of an error"""
    eval_episodes: int = 10
    """episodes of each evaluation (0: no evaluation and no video)"""
    eval_interval: int = 50_000
    """environment steps between evaluations (0: only at the end)"""
    eval_max_steps: int = 27_000
    """steps after which an evaluation episode is cut; its return so far counts (0: never)"""
    capture_video: bool = True
    """record the first episode of each evaluation"""
    track: bool = True
    """log to Weights & Biases: online if logged in and the server answers, else offline"""
    wandb_project: str = "plainrl"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team or user (default: that of the login)"""
    wandb_group: str | None = None
    """W&B group of the run"""
    wandb_name: str | None = None
    """W&B display name (default: the name of the run directory)"""
    wandb_tags: tuple[str, ...] = ()
    """W&B tags"""
    wandb_notes: str | None = None
    """W&B notes"""

    def __post_init__(self) -> None:
        try:
            check_arguments(self)
        except ValueError as error:
            fail(str(error))
        learning_starts = getattr(self, "learning_starts", 0)
        if isinstance(learning_starts, int) and learning_starts >= self.total_timesteps:
            warn(f"nothing will be learnt: --learning-starts is not below --total-timesteps {self.total_timesteps}")


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the process with one line on stderr; with --debug, below the traceback of the exception in hand.

    Codes: 2 arguments, 3 checkpoint or policy, 4 non-finite numbers, 5 environment, 6 storage, 128 + n signal n.
    Inside `beside_training` it raises a Failure instead, which becomes a warning there.
    """
    if _beside:
        raise Failure(" ".join(message.split()))
    if show_tracebacks and sys.exc_info()[0] is not None:
        traceback.print_exc()
    of_several = f"process {RANK}: " if WORLD_SIZE > 1 else ""
    say("error: " + of_several + " ".join(message.split()), sys.stderr)
    raise SystemExit(code)


def warn(message: str, once: str | None = None) -> None:
    """One line on stderr; of several processes the first alone warns.

    Args:
        once: only the first warning with this key is printed.
    """
    if RANK > 0 or once in _warned:
        return
    if once is not None:
        _warned.add(once)
    say("warning: " + " ".join(message.split()), sys.stderr)


class Failure(Exception):  # noqa: N818 - it carries what `fail` was told
    """What `fail` raises inside `beside_training`."""


@contextlib.contextmanager
def beside_training(what: str, advice: str = "") -> Iterator[None]:
    """Whatever fails inside is one warning that names `what`, the first time, and training goes on.

    An environment's `sys.exit()` is a failure as well. KeyboardInterrupt passes.
    """
    global _beside
    _beside += 1
    try:
        yield
    except (Exception, SystemExit) as error:
        if show_tracebacks:
            traceback.print_exc()
        reason = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
        warn(f"{what} failed, training goes on: {reason}{advice and '; '}{advice}", once=f"{what} failed")
    finally:
        _beside -= 1


def say(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Prints, and never raises: what the stream's encoding lacks becomes "?", and where nobody reads any more
    (`| head`), the disk is full or the stream is closed, nothing is printed from here on.
    """
    stream = stream or sys.stdout
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), end=end, file=stream, flush=True)
    except OSError:
        with contextlib.suppress(Exception), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())  # or Python would try again, and fail, when the process ends
    except Exception:  # the stream is no stream: where could that be said?
        return
