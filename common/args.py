"""The flags that every script has, and the command line they come from. Imports nothing heavy."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import sys
import traceback
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, TextIO, TypeVar, get_type_hints

from common.files import read_object

T = TypeVar("T", bound="HasDebug")
show_tracebacks = False  # --debug
_beside = 0  # how many `beside_training` are open
_warned: set[str] = set()

# Which of how many processes this is, where torchrun started it. Other launchers set RANK too: not meant for this.
_TORCHRUN = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK, WORLD_SIZE = int(_TORCHRUN.get("RANK", 0)), int(_TORCHRUN.get("WORLD_SIZE", 1))

# CleanRL's names mean the same in every script, so their bounds are checked here for all of them.
ZERO_MEANS_SOMETHING = {"seed", "eval_episodes", "eval_max_steps", "learning_starts"}
SHARES = {"gamma", "gae_lambda", "tau", "start_e", "end_e", "exploration_fraction"}
SHARES |= {"prioritized_replay_alpha", "prioritized_replay_beta"}


class HasDebug(Protocol):
    debug: bool


@dataclass
class RunArgs:
    """What a run needs, whatever the algorithm; a script's `Args` adds its hyperparameters."""

    env_id: str = "CartPole-v1"
    """gymnasium environment id"""
    total_timesteps: int = 500_000
    """environment steps to take, over all environments (rounded up to a multiple of num_envs)"""
    num_envs: int = 1
    """parallel environments of each process"""
    async_envs: bool = False
    """run each environment in a process of its own: pays off for slow environments on many cores"""
    native_envs: bool = False
    """step all environments in one array operation (CartPole; Atari games always are): pays off from 8 on"""
    env_timeout: float = 600.0
    """seconds that one step or reset of an environment may take before the run ends (0: for ever)"""
    seed: int = 1
    """seed of every random draw: environments, exploration, network initialisation, sampling"""
    cuda: bool = True
    """train on the GPU; where there is none, say so and train on the CPU"""
    torch_deterministic: bool = True
    """choose deterministic GPU kernels over the fastest ones"""
    torch_threads: int = 1
    """CPU threads of torch; more pay off for images or layers wider than about 512 units"""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """highest: exact float32 products; high: TF32 on GPUs; medium: bfloat16 on GPUs and AMX, else oneDNN's float32"""
    compile: bool = False
    """make one compiled graph of each update: faster, after a start that takes up to half a minute the first time"""
    track: bool = True
    """log to Weights & Biases: online when logged in and the server answers, else offline"""
    wandb_project: str = "plainrl"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team or user (default: that of the login)"""
    wandb_group: str | None = None
    """W&B group, to compare runs side by side"""
    wandb_name: str | None = None
    """W&B display name (default: the run directory's name)"""
    wandb_tags: tuple[str, ...] = ()
    """W&B tags"""
    wandb_notes: str | None = None
    """W&B notes"""
    capture_video: bool = True
    """film the first episode of every evaluation"""
    eval_episodes: int = 10
    """episodes per greedy evaluation; 0 turns evaluation and video off"""
    eval_interval: int = 50_000
    """environment steps between evaluations (0: only at the end, where there is always one)"""
    eval_max_steps: int = 27_000
    """steps after which an evaluation episode is cut, its return so far counts (0: never; 27,000 is Atari's limit)"""
    save_interval: int = 50_000
    """environment steps between checkpoints to resume from, one before each evaluation as well; 0 makes none"""
    resume: str | None = None
    """go on with the run in this directory, from its last checkpoint, with its arguments"""
    runs_dir: str = "runs"
    """where run directories are made"""
    allow_env_import: bool = False
    """let an env id of the form module:Env-v0 import (that is, run) that module"""
    debug: bool = False
    """print the whole traceback of an error"""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            flag = "--" + field.name.replace("_", "-")
            if isinstance(value, float) and not math.isfinite(value):
                fail(f"{flag} must be a finite number, not {value}")
            if isinstance(value, int) and not isinstance(value, bool):
                least = 0 if field.name in ZERO_MEANS_SOMETHING or field.name.endswith("_interval") else 1
                if value < least:
                    fail(f"{flag} must be at least {least}, not {value}")
            if field.name == "env_timeout" and value < 0:
                fail(f"{flag} must be at least 0, not {value}")
            if field.name in SHARES and not 0 <= value <= 1:
                fail(f"{flag} must be between 0 and 1, not {value}")
        buffer_size, batch_size = getattr(self, "buffer_size", None), getattr(self, "batch_size", 1)
        if buffer_size is not None and buffer_size < max(self.num_envs, batch_size):
            fail(f"--buffer-size {buffer_size} holds no batch of {batch_size} from {self.num_envs} environments")
        if getattr(self, "learning_starts", 0) >= self.total_timesteps:
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
    """Prints, and goes on where nobody reads any more (`| head`) or the disk is full: that ends no run."""
    stream = stream or sys.stdout
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def parse(args_class: type[T], doc: str | None = None, argv: list[str] | None = None, prog: str | None = None) -> T:
    """The command line as an `args_class`; `--help` shows `doc` and every field's docstring.

    Ends the process with code 2 and one line on stderr if a flag is unknown or a value does not fit.
    From here on an uncaught exception is one line as well, unless `--debug` is given.
    """
    import tyro

    if os.environ.pop("PLAINRL_ASKED", None):
        _answer(args_class)
    argv = sys.argv[1:] if argv is None else argv
    resumed = _resumed(args_class, argv)
    default: dict[str, Any] = {} if resumed is None else {"default": resumed}
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_integer)
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            args = tyro.cli(args_class, prog=prog, description=doc, args=argv, **default, registry=registry)
    except BrokenPipeError:  # --help | head
        say("")
        raise SystemExit(0) from None
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        if "error: " in shown.getvalue():  # a field's own check
            sys.stderr.write(shown.getvalue())
            raise
        fail(_one_line(shown.getvalue()) or "the arguments could not be read; see --help")
    sys.stderr.write(shown.getvalue())
    global show_tracebacks
    show_tracebacks = args.debug
    if not show_tracebacks:
        sys.excepthook = _report
    return args


def _answer(args_class: type[T]) -> NoReturn:
    """Instead of a run: what the script makes of each command line on stdin, as JSON, for the tools that start it."""
    answers: list[dict[str, Any]] = []
    for argv in json.load(sys.stdin):
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                answers.append({"args": dataclasses.asdict(parse(args_class, argv=argv))})  # type: ignore[call-overload]
        except SystemExit:
            answers.append({"error": said.getvalue().strip().removeprefix("error: ")})
    hints = {name: hint for name, hint in get_type_hints(args_class).items() if name in args_class.__dataclass_fields__}  # type: ignore[attr-defined]
    types_ = {name: hint.__name__ if isinstance(hint, type) else str(hint) for name, hint in hints.items()}
    print(json.dumps({"types": types_, "answers": answers}, default=str))
    raise SystemExit(0)


def _resumed(args_class: type[T], argv: list[str]) -> T | None:
    """With `--resume RUN_DIR`, the arguments of that run: flags that are not given are as they were."""
    for i, word in enumerate(argv):
        flag, _, folder = word.partition("=")
        if flag == "--resume":
            folder = folder or "".join(argv[i + 1 : i + 2])
            saved = read_facts(folder)
            names = {field.name for field in dataclasses.fields(args_class)}  # type: ignore[arg-type]
            # JSON has no tuples, and no argument is a list.
            values = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items() if name in names}
            return args_class(**{**values, "resume": folder})
    return None


def read_facts(run_dir: str) -> dict[str, Any]:
    """args.json of a run directory; ends the process with code 3 and one line if there is none."""
    try:
        return read_object(Path(run_dir), "args.json")
    except (OSError, ValueError) as error:
        fail(f"{run_dir or '--resume'} is not a run directory: its args.json cannot be read ({error})", code=3)


def _integer(type_info: Any) -> Any:
    """Integers may be written 1e6 or 1_000_000."""
    from tyro.constructors import PrimitiveConstructorSpec

    def read(words: list[str]) -> int:
        try:
            return int(words[0])
        except ValueError:
            number = float(words[0])
            if not number.is_integer():
                raise ValueError(f"{words[0]} is not a whole number") from None
            return int(number)

    if type_info.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def _one_line(panel: str) -> str:
    """tyro's boxed message without its frame, its help texts and its footer."""
    lines = [re.sub(r"^[│╭╰][─ ]*|[─ ]*[│╮╯]$", "", line).strip() for line in panel.splitlines()]
    lines = [line for line in lines[1:-1] if line]
    text = " ".join(line for line in lines if not re.match(r"For full helptext|\(default|.*\(default: ", line))
    text = re.sub(r"Argument helptext:.*", "", text).strip()
    return f"{text} (--help lists the flags)" if text else ""


def _report(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
        sys.stderr.flush()
        os._exit(130)
    frames = traceback.extract_tb(trace)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    print(f"error: {kind.__name__}: {text}{where}; --debug shows the traceback", file=sys.stderr)
