"""Where a script comes from: copies of its code, the repository's commit, and the script it was forked from."""

import difflib
import hashlib
import importlib.metadata
import platform
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from common.redact import redact

ALGOS = Path(__file__).parent.parent / "algos"  # of an editable installation, which the README's is
PARENTS = ("dqn.py", "dqn_lightning.py", "ppo.py", "rainbow.py", "reinforce_rollout.py", "sac.py")
ALIKE = 0.4  # of the lines; two of PARENTS share up to 0.5, a new script that has the house's frame 0.3


def keep_source(script: Path, target: Path) -> dict[str, Any]:
    """Fills the new folder `target` with the script as it runs, uncommitted.diff (of the repository that it is in) and,
    if it is a fork of one of ours, parent.diff; secrets written into the code are left out of each.

    Returns:
        facts about it: `git_commit` (None outside a repository) and `parent` (None for one of ours, and for a script
        that is not like any of them): the parent's `script`, `sha256`, `git_commit` and the `lines_added` and
        `lines_removed` since.

    Raises:
        OSError: if they cannot be written.
    """
    target.mkdir()
    code = script.read_text("utf-8")
    (target / script.name).write_text(redact(code), "utf-8")
    commit = _git(script.parent, "rev-parse", "HEAD")
    if commit is not None and (changes := _git(script.parent, "diff", "HEAD")) is not None:
        (target / "uncommitted.diff").write_text(redact(changes), "utf-8")
    source = parent_of(script)
    if source is None:
        return {"git_commit": commit and commit.strip(), "parent": None}
    old = source.read_text("utf-8")
    diff = list(
        difflib.unified_diff(
            old.splitlines(keepends=True), code.splitlines(keepends=True), f"algos/{source.name}", script.name
        )
    )
    diff = [line if line.endswith("\n") else line + "\n" for line in diff]  # a file without a last newline
    (target / "parent.diff").write_text(redact("".join(diff)), "utf-8")
    base = _git(ALGOS, "rev-parse", "HEAD")
    parent = {
        "script": source.name,
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "git_commit": base and base.strip(),
        "lines_added": sum(line.startswith("+") for line in diff[2:]),
        "lines_removed": sum(line.startswith("-") for line in diff[2:]),
    }
    return {"git_commit": commit and commit.strip(), "parent": parent}


def parent_of(script: Path) -> Path | None:
    """The script of ours that shares the most lines with `script`; None if it is one of ours, or like none of them."""
    ours = [ALGOS / name for name in PARENTS if (ALGOS / name).exists()]
    if script.resolve() in [path.resolve() for path in ours]:
        return None
    mine = _lines(script)
    likeness = {path: _likeness(mine, _lines(path)) for path in ours}
    nearest = max(likeness, key=lambda path: likeness[path], default=None)
    return nearest if nearest is not None and likeness[nearest] >= ALIKE else None


def _lines(path: Path) -> Counter[str]:
    return Counter(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())


def _likeness(a: Counter[str], b: Counter[str]) -> float:
    """Twice the lines in common, over the lines of both (Dice): 1 for the same lines in any order."""
    return 2 * (a & b).total() / max(a.total() + b.total(), 1)


def _git(folder: Path, *words: str) -> str | None:
    try:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Of Python and of the libraries that a run's numbers may depend on."""
    names = ("torch", "gymnasium", "numpy", "wandb", "ale-py", "mujoco", "box2d", "lightning")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
