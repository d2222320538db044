"""Where a script comes from: copies of its code, the repository's commit, and the script it was forked from."""

import contextlib
import difflib
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from common.args import warn
from common.internals.resume.files import read_file
from common.internals.tracking.redact import redact

ALGOS = Path(__file__).parents[3] / "algos"  # of an editable installation, which the README's is
PARENTS = ("dqn.py", "dqn_lightning.py", "ppo.py", "rainbow.py", "reinforce_rollout.py", "sac.py")
GIT_TIMEOUT = 5  # seconds
MOST_CHANGES = 5_000_000  # bytes of uncommitted.diff
ALIKE = 0.4  # of the lines; two of PARENTS share up to 0.5, a new script that has the house's frame 0.3


def keep_source(script: Path, target: Path) -> dict[str, Any]:
    """Fills the new folder `target` with the script as it runs, uncommitted.diff (of the repository that it is in) and,
    if it is a fork of one of ours, parent.diff; byte for byte but for secrets, which are left out of each.

    A script that cannot be read any more costs a warning.

    Returns:
        facts about it: `git_commit` (None outside a repository) and `parent` (None for one of ours, and for a script
        that is not like any of them): the parent's `script`, `sha256`, `git_commit` and the `lines_added` and
        `lines_removed` since.

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
    old, new = (_text(path).splitlines(keepends=True) for path in (source, script))
    diff = list(difflib.unified_diff(old, new, f"algos/{source.name}", script.name))
    diff = [line if line.endswith("\n") else line + "\n" for line in diff]  # a file without a last newline
    (target / "parent.diff").write_bytes(redact("".join(diff)).encode("utf-8", "surrogateescape"))
    parent = {
        "script": source.name,
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "git_commit": _commit(ALGOS),
        "lines_added": sum(line.startswith("+") for line in diff[2:]),
        "lines_removed": sum(line.startswith("-") for line in diff[2:]),
    }
    return {"git_commit": commit, "parent": parent}


def is_saved_source(script: Path, run_dir: Path) -> bool:
    """Whether a run directory has `script` as it is now as the one that ran."""
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
    mine = _lines(script)
    likeness = [(_likeness(mine, _lines(path)), path) for path in ours]
    most, nearest = max(likeness, default=(0.0, None))
    return nearest if most >= ALIKE else None


def _text(path: Path) -> str:
    """Of any encoding: bytes that are not UTF-8 come back as they were."""
    return path.read_bytes().decode("utf-8", "surrogateescape")


def _lines(path: Path) -> Counter[str]:
    return Counter(line.strip() for line in _text(path).splitlines() if line.strip())


def _likeness(a: Counter[str], b: Counter[str]) -> float:
    """Twice the lines in common, over the lines of both (Dice): 1 for the same lines in any order."""
    return 2 * (a & b).total() / max(a.total() + b.total(), 1)


def _commit(folder: Path) -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=GIT_TIMEOUT)
        return done.stdout.decode("ascii").strip()
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _uncommitted(folder: Path) -> bytes | None:
    """What git says has changed since the commit: bytes, as files have any encoding. At most MOST_CHANGES of them.

    None, with a warning, if git fails, or takes more than GIT_TIMEOUT seconds.
    """
    command = ["git", "diff", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD"]
    changes, failed = b"", True
    with (
        contextlib.suppress(OSError),
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as git,
    ):
        assert git.stdout is not None
        watch = threading.Timer(GIT_TIMEOUT, git.kill)
        watch.start()
        changes = git.stdout.read(MOST_CHANGES + 1)
        git.stdout.close()
        failed = git.wait() != 0
        watch.cancel()
    if len(changes) > MOST_CHANGES:
        warn(f"uncommitted.diff has the first {MOST_CHANGES:,} bytes only of the changes in {folder}'s repository")
        return changes[: changes.rfind(b"\n", 0, MOST_CHANGES) + 1] + b"[the rest is left out: it is too long]\n"
    if failed:
        warn(f"uncommitted changes in {folder}'s repository are not kept: git diff failed, or took too long")
        return None
    return changes


def versions() -> dict[str, str]:
    """Of Python and of the libraries that a run's numbers may depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "gymnasium", "numpy", "wandb", "ale-py", "mujoco", "box2d", "lightning"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
