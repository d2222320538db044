"""The arguments that every script has, and how errors and warnings are reported. Imports nothing heavy."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn

from common.internals.console.checks import check_arguments
from common.internals.console.output import say as say

show_tracebacks = False  # --debug
_beside = 0  # how many `beside_training` are open
_warned: set[str] = set()

# Other launchers (Slurm, MPI) set RANK too, for processes that do not train together.
_TORCHRUN = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK, WORLD_SIZE = int(_TORCHRUN.get("RANK", 0)), int(_TORCHRUN.get("WORLD_SIZE", 1))


@dataclass
class RunArgs:
    """The arguments that every script has; a script's `Args` adds its hyperparameters.

    Ends the process with code 2 and one line if a value has the wrong type or is out of range.
    """

    env_id: str = "CartPole-v1"
    """gymnasium environment id"""
    total_timesteps: int = 500_000
    """environment steps over all environments"""
    num_envs: int = 1
    """parallel environments, in total over all processes"""
    async_envs: bool = False
    """run each environment in its own process"""
    native_envs: bool = False
    """step CartPole as one array; worth it from 8 environments up"""
    env_timeout: float = 600.0
    """longest reset or step, in seconds (0: no limit)"""
    allow_env_import: bool = False
    """allow importing the module of an id module:Env-v0"""
    env_kwargs: tuple[str, ...] = ()
    """arguments of the environment, for example continuous=True"""
    grayscale: bool = False
    """make colour images grey"""
    resize: int = 0
    """width and height that images are scaled to (0: as they are)"""
    frame_stack: int = 0
    """observations that are stacked into one (0: no stack)"""
    seed: int = 1
    """random seed"""
    cuda: bool = True
    """train on a GPU if there is one"""
    compile: bool = False
    """compile the updates (takes up to 30 s, then faster)"""
    torch_deterministic: bool = True
    """use deterministic GPU kernels"""
    torch_threads: int = 1
    """PyTorch CPU threads (more help with images and wide layers)"""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """float32 matrix products: full, TF32 (high), bfloat16 (medium)"""
    save_interval: int = 50_000
    """environment steps between checkpoints (0: no checkpoints)"""
    resume: str | None = None
    """run directory to resume"""
    runs_dir: str = "runs"
    """folder for run directories"""
    debug: bool = False
    """print tracebacks"""
    eval_episodes: int = 10
    """episodes per evaluation (0: no evaluation, no video)"""
    eval_interval: int = 50_000
    """environment steps between evaluations (0: only at the end)"""
    eval_max_steps: int = 27_000
    """longest evaluation episode, in steps (0: no limit)"""
    stop_at_return: float | None = None
    """end the run when an evaluation reaches this mean return"""
    capture_video: bool = True
    """record the first episode of each evaluation"""
    track: bool = True
    """log to Weights & Biases (offline if not logged in)"""
    wandb_project: str = "plainrl"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team or user (default: that of the login)"""
    wandb_group: str | None = None
    """W&B group of the run"""
    wandb_name: str | None = None
    """W&B run name (default: name of the run directory)"""
    wandb_tags: tuple[str, ...] = ()
    """W&B tags"""
    wandb_notes: str | None = None
    """W&B notes"""

    wrap: ClassVar[Any] = None
    """the wrap of make_envs, which evaluation uses as well; not a flag"""

    def __post_init__(self) -> None:
        try:
            check_arguments(self)
        except ValueError as error:
            fail(str(error))
        learning_starts = getattr(self, "learning_starts", 0)
        if isinstance(learning_starts, int) and learning_starts >= self.total_timesteps:
            warn(f"nothing will be learnt: --learning-starts is not below --total-timesteps {self.total_timesteps}")


def fail(message: str, code: int = 2) -> NoReturn:
    """Prints one line to stderr and ends the process; with --debug, the current traceback comes first.

    Codes: 2 arguments, 3 checkpoint or policy, 4 non-finite numbers, 5 environment, 6 storage, 128 + n signal n.
    Inside `beside_training` it raises Failure instead.
    """
    if _beside:
        raise Failure(" ".join(message.split()))
    if show_tracebacks and sys.exc_info()[0] is not None:
        traceback.print_exc()
    process = f"process {RANK}: " if WORLD_SIZE > 1 else ""
    say("error: " + process + " ".join(message.split()), sys.stderr)
    raise SystemExit(code)


def warn(message: str, once: str | None = None) -> None:
    """Prints one line to stderr, from the first process only; with `once`, only the first warning with that key."""
    if RANK > 0 or once in _warned:
        return
    if once is not None:
        _warned.add(once)
    say("warning: " + " ".join(message.split()), sys.stderr)


class Failure(Exception):  # noqa: N818 - it carries the message of `fail`
    """Raised by `fail` inside `beside_training`."""


@contextlib.contextmanager
def beside_training(what: str, advice: str = "") -> Iterator[None]:
    """Turns any failure inside, `sys.exit()` too, into one warning that names `what`; training goes on.

    KeyboardInterrupt passes through.
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
