"""Groups: which runs are seeds of one method, and the labels that tell groups apart."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.args import fail
from common.internals.console.cli import similar
from common.tools.find_runs import Run

# What may differ between seeds of one method: how and where they ran, and what was logged.
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
            fail(f"--by {key}: no run has an argument of this name{similar(key, known)}")
    keys = [] if by else differing(runs)
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        mine = [run.config.get(key) for key in by] if by else [run.script, *(_method(run).get(key) for key in keys)]
        groups.setdefault((run.label,) if run.label else (None, *map(repr, mine)), []).append(run)
    return dict(zip(labels(list(groups.values()), by, keys), groups.values(), strict=True))


def _method(run: Run) -> dict[str, Any]:
    """Its hyperparameters, and as "" the word of the command line that it was found by."""
    method = {k: v for k, v in run.config.items() if k not in NOT_THE_METHOD and not k.startswith("wandb_")}
    return {**method, "": run.word}


def differing(runs: list[Run]) -> list[str]:
    """Hyperparameters that differ between runs of one script on one task; between tasks, tuning is part of a method.

    An argument that some runs do not have, because the script got it later, is no difference by itself.
    """
    seen: dict[tuple[str, str, str], set[str]] = {}
    for run in runs:
        if run.label is None:
            for key, value in _method(run).items():
                seen.setdefault((run.script, run.env_id, key), set()).add(repr(value))
    return sorted({key for (_, _, key), values in seen.items() if len(values) > 1})


def labels(groups: list[list[Run]], by: Sequence[str], keys: Sequence[str]) -> list[str]:
    """The first of these that tells all groups apart: script, word of the command line, hyperparameters that differ."""
    firsts = [runs[0] for runs in groups]
    if by:
        kinds = [[_pairs(run, by) for run in firsts]]
    else:
        words = [Path(runs[0].word).name if len({run.word for run in runs}) == 1 else "" for runs in groups]
        kinds = [[run.script for run in firsts], words, [run.word for run in firsts]]
    for kind in kinds:
        names = [run.label or name for run, name in zip(firsts, kind, strict=True)]
        if by or (len(set(names)) == len(names) and all(names) and all(len(name) <= MOST for name in names)):
            return names
    telling = {
        run.script: _telling([r for r in firsts if r.script == run.script and not r.label], keys) for run in firsts
    }
    return [run.label or " ".join([run.script, _pairs(run, telling[run.script])]).strip() for run in firsts]


def _pairs(run: Run, names: Iterable[str]) -> str:
    found = {"": run.word or run.name, "script": run.script}
    return ", ".join(found.get(name) or f"{name}={run.config[name]}" for name in names if name in found | run.config)


def _telling(runs: list[Run], keys: Sequence[str]) -> list[str]:
    """What tells one script's groups apart: all hyperparameters that differ, or as few as it takes if that is long."""
    values = {key: [repr(_method(run).get(key)) for run in runs] for key in keys}

    def distinct(names: list[str]) -> int:
        return len(set(zip(*(values[name] for name in names), strict=True))) if names else 1

    differ = [key for key in keys if len(set(values[key])) > 1]
    shown = [key for key in differ if key]
    if distinct(shown) == len(runs) and all(len(_pairs(run, shown)) <= MOST for run in runs):
        return shown
    chosen: list[str] = []
    while distinct(chosen) < len(runs):
        chosen.append(max(differ, key=lambda key: distinct([*chosen, key])))
    return chosen
