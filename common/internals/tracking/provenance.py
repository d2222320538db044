"""Where a script comes from: copies of its code, the repository's commit, and the script it was forked from."""

import contextlib
import difflib
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from common.args import warn
from common.internals.resume.files import read_file
from common.internals.tracking.redact import redact

ALGOS = Path(__file__).parents[3] / "algos"  # of an editable installation, which the README's is
PARENTS = ["crossq.py", "dqn.py", "dqn_lightning.py", "pqn.py", "ppo.py", "ppo_recurrent.py", "rainbow.py"]
PARENTS += ["reinforce_rollout.py", "sac.py"]
GIT_TIMEOUT = 5  # seconds
MOST_CHANGES = 5_000_000  # bytes of uncommitted.diff
ALIKE = 0.4  # share of the lines; two of PARENTS share up to 0.8, a new script on the same frame 0.3


def keep_source(script: Path, target: Path) -> dict[str, Any]:
    """Fills the new folder `target` with the script as it runs, uncommitted.diff (of its repository) and, for a fork
    of one of our scripts, parent.diff. All are kept byte for byte, except that secrets are left out.

    A script that cannot be read costs a warning.

    Returns:
        facts about it: `git_commit` (None outside a repository) and `parent` (None for one of ours, and for a script
        like none of them): the parent's `script`, `sha256`, `git_commit` and the `lines_added` and `lines_removed`.

    Raises:
        OSError: if they cannot be written.
    """
    target.mkdir()
    commit = _commit(script.parent)
    try:
        code = script.read_bytes()
    except OSError as error:
        warn(f"the source of this run is not kept: {script} cannot be read ({error.strerror})")
        return {"git_commit": commit, "parent": None}
    (target / script.name).write_bytes(redact(code))
    if commit is not None and (changes := _uncommitted(script.parent)) is not None:
        (target / "uncommitted.diff").write_bytes(redact(changes))
    source = parent_of(script)
    if source is None:
        return {"git_commit": commit, "parent": None}
    diff = list(difflib.unified_diff(_lines(source), _lines(script), f"algos/{source.name}", script.name, lineterm=""))
    (target / "parent.diff").write_bytes(redact("\n".join([*diff, ""])).encode("utf-8", "surrogateescape"))
    parent = {
        "script": source.name,
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "git_commit": _commit(ALGOS),
        "lines_added": sum(line.startswith("+") for line in diff[2:]),
        "lines_removed": sum(line.startswith("-") for line in diff[2:]),
    }
    return {"git_commit": commit, "parent": parent}


def is_saved_source(script: Path, run_dir: Path) -> bool:
    """Whether `script` is still what ran in `run_dir`."""
    try:
        return read_file(run_dir, f"source/{script.name}") == redact(script.read_bytes())
    except (OSError, ValueError):
        return False


def places(script: Path) -> dict[str, str | None]:
    """Where a run's modules may be: `folder`, the script's, and `cwd`, the current one (None if it was removed)."""
    cwd = None
    with contextlib.suppress(OSError):
        cwd = os.getcwd()
    return {"folder": str(script.parent), "cwd": cwd}


def parent_of(script: Path) -> Path | None:
    """The script of ours that shares the most lines with `script`; None if it is one of ours, or like none of them."""
    ours = [ALGOS / name for name in PARENTS if (ALGOS / name).exists()]
    if script.resolve() in [path.resolve() for path in ours]:
        return None

    def code(path: Path) -> list[str]:
        return [line.strip() for line in _lines(path) if line.strip()]

    mine = code(script)
    # quick_ratio: lines in common, in any order, over the mean number of lines
    likeness = [(difflib.SequenceMatcher(None, mine, code(path)).quick_ratio(), path) for path in ours]
    most, nearest = max(likeness, default=(0.0, None))
    return nearest if most >= ALIKE else None


def _lines(path: Path) -> list[str]:
    """Of any encoding: bytes that are not UTF-8 come back as they were."""
    return path.read_bytes().decode("utf-8", "surrogateescape").removesuffix("\n").split("\n")


def _git(folder: Path, *words: str) -> bytes | None:
    """What git prints, at most MOST_CHANGES + 1 bytes; None if it fails or takes more than GIT_TIMEOUT seconds."""
    try:
        with tempfile.TemporaryFile() as file:
            command = ["git", *words]
            subprocess.run(command, cwd=folder, stdout=file, stderr=subprocess.DEVNULL, check=True, timeout=GIT_TIMEOUT)
            file.seek(0)
            return file.read(MOST_CHANGES + 1)
    except (OSError, subprocess.SubprocessError):
        return None


def _commit(folder: Path) -> str | None:
    commit = _git(folder, "rev-parse", "HEAD")
    return None if commit is None else commit.decode().strip()


def _uncommitted(folder: Path) -> bytes | None:
    """What git says has changed since the commit, the first MOST_CHANGES bytes; None, after a warning, if it fails."""
    changes = _git(folder, "diff", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD")
    if changes is None:
        warn(f"uncommitted changes in {folder}'s repository are not kept: git diff failed or took too long")
    elif len(changes) > MOST_CHANGES:
        warn(f"uncommitted.diff has only the first {MOST_CHANGES:,} bytes of the changes in {folder}'s repository")
        return changes[: changes.rfind(b"\n", 0, MOST_CHANGES) + 1] + b"[the rest is left out: it is too long]\n"
    return changes


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a run's numbers may depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "gymnasium", "numpy", "wandb", "ale-py", "mujoco", "box2d", "lightning"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
