"""The flags that every script has, and the command line they come from. Imports nothing heavy."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, TextIO, TypeVar, Union, get_args, get_origin, get_type_hints

from common.internals.resume.files import read_object

T = TypeVar("T", bound="HasDebug")
show_tracebacks = False  # --debug
_beside = 0  # how many `beside_training` are open
_warned: set[str] = set()

# Which of how many processes this is, where torchrun started it. Other launchers set RANK too: not meant for this.
_TORCHRUN = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK, WORLD_SIZE = int(_TORCHRUN.get("RANK", 0)), int(_TORCHRUN.get("WORLD_SIZE", 1))

# This project's names and CleanRL's mean the same in every script, so they are checked here for all. Of a name that is
# not here nothing is known, and any number is allowed.
_ABOVE_0, _FINITE = 5e-324, sys.float_info.max
_MOST = 2**53 - 1  # beyond it float64 has gaps
_BOUNDS = {
    name: (low, high)
    for low, high, names in (
        (1, _MOST, "total_timesteps buffer_size batch_size num_steps num_minibatches update_epochs n_step n_atoms"),
        (1, _MOST, "train_frequency policy_frequency target_network_frequency"),
        (1, 4096, "num_envs"),
        (1, 1024, "torch_threads"),
        (1, 65536, "hidden_sizes"),
        (0, _MOST, "eval_episodes eval_max_steps eval_interval save_interval log_interval learning_starts"),
        (0, _FINITE, "alpha ent_coef vf_coef exploration_noise policy_noise noise_clip"),
        (0, 4_000_000, "env_timeout"),  # seconds; a wait can be no longer on Windows
        (_ABOVE_0, _FINITE, "learning_rate policy_lr q_lr clip_coef max_grad_norm target_kl"),
        (0, 1, "gamma gae_lambda start_e end_e exploration_fraction"),
        (0, 1, "prioritized_replay_alpha prioritized_replay_beta"),
        (_ABOVE_0, 1, "tau"),
        (0, 2**32 - 1, "seed"),  # what numpy.random.seed takes
        (-20, 20, "logstd_init"),  # exp(20) is 5e8
    )
    for name in names.split()
}
_NAMES = {"env_id", "runs_dir", "resume", "wandb_project", "wandb_entity", "wandb_group", "wandb_name"}
_NOT_IN_NAMES = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")  # control characters and ends of lines


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
        hints = _hints(type(self))
        for field in dataclasses.fields(self):
            name, value, hint = field.name, getattr(self, field.name, None), hints.get(field.name)
            flag = "--" + name.replace("_", "-")
            if isinstance(value, list):
                value = _as_saved(value, hint)
                setattr(self, name, value)
            # target_kl: float = None
            as_default = type(value) is type(field.default) and not _fits(field.default, hint)
            if field.init and not as_default and not _fits(value, hint):
                fail(f"{flag} must be {_type_name(hint)}, not {value!r:.60}")
            for number in value if isinstance(value, list | tuple) else (value,):
                if name in _BOUNDS and isinstance(number, int | float) and not isinstance(number, bool):
                    low, high = _BOUNDS[name]
                    least = "above 0" if low == _ABOVE_0 else f"at least {low}"
                    if not abs(number) <= _FINITE:
                        fail(f"{flag} must be a finite number, not {number}")
                    if not low <= number <= high:
                        both = "between 0 and 1" if high == 1 and number != 0 else least
                        fail(f"{flag} must be {both if number < low or high == 1 else f'at most {high}'}, not {number}")
            if name in _NAMES and value is not None and (not value.strip() or _NOT_IN_NAMES.search(value)):
                fail(f"{flag} must be a name on one line, not {value!r:.60}")
        buffer_size: Any = getattr(self, "buffer_size", None)  # None in a fork that sizes it later
        batch_size: Any = getattr(self, "batch_size", 1)
        sized = isinstance(buffer_size, int) and isinstance(batch_size, int)
        if sized and buffer_size < max(self.num_envs, batch_size):
            fail(f"--buffer-size {buffer_size} holds no batch of {batch_size} from {self.num_envs} environments")
        learning_starts = getattr(self, "learning_starts", 0)
        if isinstance(learning_starts, int) and learning_starts >= self.total_timesteps:
            warn(f"nothing will be learnt: --learning-starts is not below --total-timesteps {self.total_timesteps}")


def _hints(args_class: type) -> dict[str, Any]:
    """The types of its fields; none, if a fork names one that only a type checker sees."""
    try:
        return get_type_hints(args_class)
    except Exception:
        return {}


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`. An int is a float too, and a bool neither; what is not known fits."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    if kind is tuple and parts and isinstance(value, tuple):
        each = parts[:1] * len(value) if parts[1:] == (...,) else parts
        return len(each) == len(value) and all(map(_fits, value, each))
    if kind is list and parts and isinstance(value, list):
        return all(_fits(item, parts[0]) for item in value)
    with contextlib.suppress(TypeError):  # of a protocol
        return not isinstance(kind, type) or kind is Any or isinstance(value, kind)
    return True


def _as_saved(value: Any, hint: Any) -> Any:
    """What JSON has made a list of was a tuple, unless `hint` says that it was a list."""
    if not isinstance(value, list) or _fits(value, hint):
        return value
    return tuple(_as_saved(item, tuple) for item in value)


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


def parse(args_class: type[T], doc: str | None = None, argv: list[str] | None = None, prog: str | None = None) -> T:
    """The command line as an `args_class`; `--help` shows `doc` and every field's docstring.

    Ends the process with code 2 and one line on stderr if a flag is unknown or a value does not fit.
    From here on an uncaught exception is one line as well, unless `--debug` is given.
    """
    import tyro

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started the process; what prints elsewhere expects a stream
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    with contextlib.suppress(Exception):  # an environment's print as well ends no run for a character
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
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
    except OSError:  # --help | head
        say("")
        raise SystemExit(0) from None
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        if "error: " in shown.getvalue():  # a field's own check
            say(shown.getvalue(), sys.stderr, end="")
            raise
        fail(_one_line(shown.getvalue()) or "the arguments could not be read; see --help")
    say(shown.getvalue(), sys.stderr, end="")
    global show_tracebacks
    show_tracebacks = args.debug
    if not show_tracebacks:
        sys.excepthook = _report
    return args


def _tried(make: Callable[[], Any]) -> tuple[Any, str]:
    """What `make` returns and "", or None and why not."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return make(), ""
    except (Exception, SystemExit) as error:
        return None, said.getvalue().strip().removeprefix("error: ") or f"{type(error).__name__}: {error}"


def _answer(args_class: type[T]) -> NoReturn:
    """Instead of a run: what the script makes of each command line on stdin, as JSON, for the tools that start it."""
    tried = [_tried(functools.partial(parse, args_class, argv=argv)) for argv in json.load(sys.stdin)]
    answers = [{"error": error} if error else {"args": dataclasses.asdict(args)} for args, error in tried]
    names = args_class.__dataclass_fields__  # type: ignore[attr-defined]
    types_ = {name: _type_name(hint) for name, hint in _hints(args_class).items() if name in names}
    say(json.dumps({"types": types_, "answers": answers}, default=str))
    raise SystemExit(0)


def _resumed(args_class: type[T], argv: list[str]) -> T | None:
    """With `--resume RUN_DIR`, the arguments of that run: flags that are not given are as they were.

    All but --allow-env-import: who made the directory does not decide what is imported here.
    Ends the process with code 3 and one line if they are no arguments of this script.
    """
    for i, word in enumerate(argv):
        flag, _, folder = word.partition("=")
        if flag == "--resume":
            folder = folder or "".join(argv[i + 1 : i + 2])
            names = {field.name for field in dataclasses.fields(args_class) if field.init} - {"allow_env_import"}  # type: ignore[arg-type]
            values = {name: value for name, value in read_facts(folder).items() if name in names} | {"resume": folder}
            args, error = _tried(lambda: args_class(**values))  # noqa: B023 - called at once
            if error:
                fail(f"{os.path.join(folder, 'args.json')}: {error}", code=3)
            return args
    return None


def read_facts(run_dir: str) -> dict[str, Any]:
    """args.json of a run directory: the fields of RunArgs and what `track` has added have their types.

    Ends the process with code 3 and one line if there is none, or it is no such thing.
    """
    hints = {**_hints(RunArgs), **dict.fromkeys(("script", "device", "common", "wandb_id"), str)}
    hints |= {"threads": int, "processes": int, "versions": dict}
    try:
        facts = read_object(Path(run_dir), "args.json")
        for name, hint in hints.items():
            if name in facts and not _fits(_as_saved(facts[name], hint), hint):
                raise ValueError(f"{name} must be {_type_name(hint)}, not {facts[name]!r:.60}")
        return facts
    except (OSError, ValueError) as error:
        fail(f"{run_dir or '--resume'} is not a run directory: its args.json cannot be read ({error})", code=3)


def _integer(type_info: Any) -> Any:
    """Integers may be written 1e6 or 1_000_000."""
    from tyro.constructors import PrimitiveConstructorSpec

    def read(words: list[str]) -> int:
        try:
            return int(words[0])
        except ValueError:
            if not (number := float(words[0])).is_integer():
                raise ValueError(f"{words[0]} is not a whole number") from None
            return int(number)

    if type_info.type is not int:
        return None
    return PrimitiveConstructorSpec(1, "INT", read, lambda value: type(value) is int, lambda value: [str(value)])


def _one_line(panel: str) -> str:
    """tyro's boxed message without its frame, its help texts and its footer."""
    lines = [re.sub(r"^[│╭╰][─ ]*|[─ ]*[│╮╯]$", "", line).strip() for line in panel.splitlines()]
    lines = [line for line in lines[1:-1] if line.strip("-─")]
    text = " ".join(line for line in lines if not re.match(r"For full helptext|\(default|.*\(default: ", line))
    text = re.sub(r"Argument helptext:.*", "", text).strip()
    return f"{text} (--help lists the flags)" if text else ""


def _report(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        say("error: interrupted", sys.stderr)
        os._exit(130)
    frames = traceback.extract_tb(trace)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    say(f"error: {kind.__name__}: {text}{where}; --debug shows the traceback", sys.stderr)
