"""Run directories: a new one with its args.json and source/, or that of the run which --resume names."""

import dataclasses
import datetime
import errno
import functools
import json
import os
import re
import secrets
import time
from pathlib import Path
from typing import Any

import torch

from common.args import WORLD_SIZE, RunArgs, fail, say, warn
from common.internals.console.cli import read_config
from common.internals.resume.checkpoint_files import load_latest
from common.internals.resume.files import finished_step, require_no_links, write_atomically
from common.internals.speed import processes
from common.internals.tracking.provenance import is_saved_source, keep_source, places, versions
from common.internals.tracking.redact import REDACTED, redact

RUN_DIR_KEY = "plainrl/run_dir"  # in torchrun's store
# What may differ when a run is resumed; all else would make another run of it.
MAY_CHANGE = {"total_timesteps", "eval_episodes", "eval_interval", "eval_max_steps", "log_interval", "save_interval"}
MAY_CHANGE |= {"stop_at_return", "resume", "runs_dir", "cuda", "torch_threads", "track", "capture_video"}
MAY_CHANGE |= {"allow_env_import", "debug"}


def begin(args: RunArgs, device: torch.device, script: Path) -> tuple[Path, dict[str, Any], Any, dict[str, Any] | None]:
    """The run directory of a new run, or the one that `args.resume` names.

    Returns:
        The directory, what its args.json holds, its lock, and the checkpoint to go on from.

    Ends the process with one line where there can be none.
    """
    lock = None
    if WORLD_SIZE > 1:
        args.resume = processes.on_rank_zero(begun_by_this_launch) or args.resume

    def on_rank_zero() -> tuple[Path, dict[str, Any]]:
        nonlocal lock  # an open file, which only the first process has
        path, config, lock = (create if args.resume is None else reopen)(args, device, script)
        return path, config

    path, config = processes.on_rank_zero(on_rank_zero)
    if args.resume is None:
        return path, config, lock, None
    saved = load_latest(path / "checkpoints")
    if saved is None:
        warn(f"{path} has no checkpoint yet: it starts again from step 0")
    processes.on_rank_zero(functools.partial(_write_again, path, config))
    return path, config, lock, saved


def _write_again(path: Path, config: dict[str, Any]) -> None:
    try:
        write_json(path / "args.json", config)
        (path / "finished.json").unlink(missing_ok=True)
    except OSError as error:
        fail(f"cannot write the run directory {path}: {error.strerror}", code=6)


def begun_by_this_launch() -> str | None:
    """The run directory of this torchrun, where it starts its processes again because one of them died."""
    store = processes.launcher_store()
    return store.get(RUN_DIR_KEY).decode() if store.check([RUN_DIR_KEY]) else None


def create(args: RunArgs, device: torch.device, script: Path) -> tuple[Path, dict[str, Any], Any]:
    """A new run directory, what its args.json holds, and its lock.

    Ends the process with code 6 if it cannot be written.
    """
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{args.env_id}__{script.stem}__{args.seed}__{stamp}-{secrets.token_hex(3)}"
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).lstrip(".-")[-200:]
    path = Path(args.runs_dir) / name
    try:
        path.mkdir(parents=True)
        lock = _lock(path)
        config = {
            **dataclasses.asdict(args),
            "script": script.stem,
            "device": _device_name(device),
            "threads": torch.get_num_threads(),
            "processes": WORLD_SIZE,
            "versions": versions(),
            **keep_source(script, path / "source"),
            **places(script),
            "common": str(Path(__file__).parents[2]),
            "wandb_id": secrets.token_hex(4),
        }
        config = redact(config)
        write_json(path / "args.json", config)
        if WORLD_SIZE > 1:
            processes.launcher_store().set(RUN_DIR_KEY, str(path))
    except OSError as error:
        fail(f"cannot write the run directory {path}: {error.strerror}; choose another with --runs-dir", code=6)
    return path, config, lock


def reopen(args: RunArgs, device: torch.device, script: Path) -> tuple[Path, dict[str, Any], Any]:
    """The run directory that `args.resume` names, what its args.json is to hold now, and its lock.

    Ends the process with code 3 if it is no run of this script with these arguments, and with code 0 if it is complete.
    """
    path = Path(str(args.resume))
    try:
        lock = _lock(path)
        require_no_links(path)
    except OSError as error:
        fail(f"cannot resume {path}: {error.filename}: {error.strerror}", code=3)
    config = read_config(str(path))
    known = {"device", "threads", "versions", "total_timesteps", "script", "wandb_id"} <= config.keys()
    if not known or not re.fullmatch(r"\w{1,64}", config["wandb_id"]):
        fail(f"cannot resume {path}: its args.json is not one of a run", code=3)
    if config["script"] != script.stem:
        fail(f"cannot resume {path}: it is a run of {config['script']}, not of {script.stem}", code=3)
    now = _arguments_now(path, args, config)
    count = config.get("processes", 1)
    if count != WORLD_SIZE:
        how = f"torchrun --nproc-per-node {count}" if count > 1 else "python"
        fail(f"{path} is a run of {count} processes, not {WORLD_SIZE}: start it with {how}", code=3)
    finished, total_before = finished_step(path), config["total_timesteps"]
    # An evaluation that reached --stop-at-return ended it early, and with another limit it goes on.
    other_limit = now["stop_at_return"] != config.get("stop_at_return") and (finished or 0) < total_before
    if finished is not None and args.total_timesteps <= total_before and not other_limit:
        say(f"already complete, at step {finished}: {path}")
        raise SystemExit(0)
    if args.total_timesteps != total_before:
        grown = f"total_timesteps was {total_before:,}, is now {args.total_timesteps:,}"
        warn(f"{grown}: schedules that end there (learning rate, exploration) jump, as they follow the new total")
    if not is_saved_source(script, path):
        warn(f"{script} has changed since the run began; the source it began with is in {path / 'source'}")
    before = {"device": config["device"], "threads": config["threads"], **config["versions"]}
    today = {"device": _device_name(device), "threads": torch.get_num_threads(), **versions()}
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in today.items() if before.get(name) != value]
    if changed:
        warn(f"resumed, but not to the bit: {', '.join(changed)}")
    config |= {name: value for name, value in now.items() if name in MAY_CHANGE} | redact(places(script))
    return path, config, lock


def _arguments_now(path: Path, args: RunArgs, config: dict[str, Any]) -> dict[str, Any]:
    """The arguments as args.json holds them; ends the process with code 3 if they would make another run of it."""
    now = json.loads(json.dumps(dataclasses.asdict(args)))
    # An argument that the script did not have when the run began may have its default only.
    defaults = {f.name: f.default for f in dataclasses.fields(args) if f.default is not dataclasses.MISSING}
    differ = []
    for name, value in now.items():
        flag = "--" + name.replace("_", "-")
        if REDACTED in json.dumps(value) and not name.startswith("wandb_"):
            fail(f"{flag} was not kept, as it is a secret: give it again")
        now[name] = redact(value)
        before = config[name] if name in config else json.loads(json.dumps(defaults.get(name)))
        if name not in MAY_CHANGE and before != now[name]:
            differ.append(f"{name} was {before!r}, is now {now[name]!r}")
            if REDACTED in json.dumps(before):
                fail(f"{flag} is not what an environment variable held when the run began: set that variable as well")
    if differ:
        fail(f"cannot resume {path}: {', '.join(differ)}", code=3)
    return now


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` as a file that is whole or absent; OSError if it cannot be written."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def _lock(path: Path) -> Any:
    """Holds the run directory for this process; the system releases it however the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    deadline = time.monotonic() + (5 if WORLD_SIZE > 1 else 0)  # env workers outlive the process that torchrun replaces
    while True:
        try:
            # Neither emptied nor followed: it may be somebody's link to a file of the user's.
            file = os.fdopen(os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+b", 0)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError as error:
            if error.errno == errno.ELOOP:
                fail(f"cannot resume {path}: its .lock is a link; remove it", code=3)
            if time.monotonic() > deadline:
                fail(f"{path} is in use by another process, or cannot be written ({error.strerror})", code=6)
        time.sleep(0.2)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
