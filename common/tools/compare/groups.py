"""Which runs are seeds of one method: groups, and the names that tell them apart."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.args import fail
from common.tools.find_runs import Run

# What may differ between runs of one method: how and where it ran, what else was written down.
NOT_THE_METHOD = {"seed", "cuda", "torch_deterministic", "torch_threads", "track", "capture_video", "resume", "debug"}
NOT_THE_METHOD |= {"eval_episodes", "eval_interval", "log_interval", "save_interval", "async_envs", "env_timeout"}
NOT_THE_METHOD |= {"runs_dir", "allow_env_import", "env_id", "script", "device", "threads", "versions", "git_commit"}
NOT_THE_METHOD |= {"common", "exp_name", "parent", "folder", "cwd"}
MOST = 60  # characters of a label that is made of hyperparameters


def group(runs: list[Run], by: Sequence[str]) -> dict[str, list[Run]]:
    """Groups by their labels, in the order in which their first runs were named."""
    by = [key.replace("-", "_").lstrip("_") for key in by]
    known = {key for run in runs for key in run.config}
    for key in by:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            fail(f"--by {key}: no run has an argument of this name" + (f"; there is {near[0]}" if near else ""))
    keys = [] if by else differing(runs)
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        mine = [run.config.get(key) for key in by] if by else [run.script, *(_said(run).get(key) for key in keys)]
        groups.setdefault((run.label,) if run.label else (None, *map(repr, mine)), []).append(run)
    return dict(zip(labels(list(groups.values()), by, keys), groups.values(), strict=True))


def _said(run: Run) -> dict[str, Any]:
    """What may make another method of it: hyperparameters, and the word of the command line that it was found by."""
    method = {k: v for k, v in run.config.items() if k not in NOT_THE_METHOD and not k.startswith("wandb_")}
    return {**method, "": run.word}


def differing(runs: list[Run]) -> list[str]:
    """Hyperparameters that differ between runs of one script on one task; between tasks, tuning is part of a method.

    An argument that some runs do not have, because the script got it later, is no difference by itself.
    """
    seen: dict[tuple[str, str, str], set[str]] = {}
    for run in runs:
        if run.label is None:
            for key, value in _said(run).items():
                seen.setdefault((run.script, run.env_id, key), set()).add(repr(value))
    return sorted({key for (_, _, key), values in seen.items() if len(values) > 1})


def labels(groups: list[list[Run]], by: Sequence[str], keys: Sequence[str]) -> list[str]:
    """The shortest of these kinds of names that tells all groups apart: script, word, hyperparameters, numbers."""
    firsts = [mine[0] for mine in groups]

    def pairs(run: Run, names: Sequence[str]) -> str:
        return ", ".join(
            str(run.config[k]) if k == "script" else f"{k}={run.config[k]}" for k in names if k in run.config
        )

    def differ(run: Run) -> list[str]:
        others = [other for other in firsts if other.script == run.script and other.label is None]
        return [k for k in keys if k and len({repr(other.config.get(k)) for other in others}) > 1]

    if by:
        kinds = [[pairs(run, by) for run in firsts]]
    else:
        words = [Path(mine[0].word).name if len({run.word for run in mine}) == 1 else "" for mine in groups]
        full = [" ".join([run.script, pairs(run, differ(run))]).strip() for run in firsts]
        kinds = [[run.script for run in firsts], words, [run.word for run in firsts], full]
    for kind in kinds:
        named = [run.label or name for run, name in zip(firsts, kind, strict=True)]
        if len(set(named)) == len(named) and all(named) and all(len(name) <= MOST for name in named):
            return named
    return [run.label or f"{run.script} #{i}" for i, run in enumerate(firsts, 1)]
