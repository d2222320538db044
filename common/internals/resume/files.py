"""Files of a run directory: written whole or not at all, read as data of somebody else's, no link followed."""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MOST = 64_000_000  # bytes that `read_file` takes into memory
MOST_JSON = 16_000_000
WANDB_LINKS = {"latest-run", "debug.log", "debug-internal.log"}  # wandb makes them new for every run
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # Windows has neither of these
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)


@contextlib.contextmanager
def opened_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write beside `path`, renamed in the end: a killed process leaves the old file or all of the new one.

    A link at `path` is replaced and not followed.

    Raises:
        OSError: the file cannot be written; the old one is unchanged.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` as `opened_atomically` does."""
    with opened_atomically(path) as file:
        file.write(data)


def data_file(folder: Path, name: str) -> Path:
    """`folder / name`, where that is a regular file that no link leads to; `folder` itself may be a link.

    Raises:
        OSError: it is missing, a link, or a device or pipe, or `name` leads out of the folder.
    """
    parts = name.split("/")
    path = folder.joinpath(*parts)
    if set(parts) & {"", ".", ".."} or any(os.sep in part or "\0" in part for part in parts):
        raise OSError(errno.EINVAL, "this is no name inside the folder", str(path))
    for depth in range(1, len(parts) + 1):
        at = folder.joinpath(*parts[:depth])
        if at.is_symlink():
            raise OSError(errno.ELOOP, "this is a link, and links in a run directory are not followed", str(at))
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "this is no regular file", str(path))
    return path


def open_file(folder: Path, name: str) -> BinaryIO:
    """Opens a `data_file` to read bytes; raises OSError as that does."""
    return os.fdopen(os.open(data_file(folder, name), os.O_RDONLY | _NO_LINK | _NO_WAIT), "rb")


def read_file(folder: Path, name: str, most: int = MOST) -> bytes:
    """All bytes of a `data_file`.

    Raises:
        OSError: as `data_file` does.
        ValueError: it has more than `most` bytes.
    """
    with open_file(folder, name) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{name} has more than {most:,} bytes")
    return data


def read_json(folder: Path, name: str) -> Any:
    """What a JSON file in `folder` holds.

    Raises:
        OSError: as `data_file` does.
        ValueError: it is too large, or no JSON.
    """
    try:
        return json.loads(read_file(folder, name, MOST_JSON))
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """As `read_json`, of a file that holds an object; ValueError if it holds something else."""
    value = read_json(folder, name)
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds no JSON object")
    return value


def finished_step(run_dir: Path) -> int | None:
    """The environment step at which a run finished; None if it did not, or if its finished.json is cut short."""
    try:
        return int(read_object(run_dir, "finished.json").get("global_step", 0))
    except (OSError, ValueError, TypeError, OverflowError):
        return None


def require_no_links(run_dir: Path) -> None:
    """Refuses a run directory in which a write could end elsewhere: one with a link, a pipe or a device in it.

    wandb's links to its latest run are fine where they stay in wandb/; into the folders of earlier W&B runs, which
    are full of links, nothing is written any more, and they are not looked at.

    Raises:
        OSError: names the first link, pipe or device, or a folder that cannot be read.
    """

    def raise_it(error: OSError) -> None:
        raise error

    for at, folders, files in os.walk(run_dir, onerror=raise_it):
        in_wandb = Path(at) == run_dir / "wandb"
        for name in [*folders, *files]:
            path = Path(at, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                if not (in_wandb and name in WANDB_LINKS and path.resolve().is_relative_to(Path(at).resolve())):
                    raise OSError(errno.ELOOP, "a run directory with links is not resumed: remove this link", str(path))
            elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise OSError(errno.EINVAL, "this is neither a file nor a folder: remove it", str(path))
        if in_wandb:
            folders.clear()
