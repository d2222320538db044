"""Runs a row of the reference results again, and tests whether its scores have dropped.

    python -m common check-results                                  # list the rows
    python -m common check-results ppo/CartPole-v1 --workers 2      # run one again, with new seeds
    python -m common check-results ppo/CartPole-v1 --same-seeds     # the stored seeds: equal to the bit?
    python -m common check-results ppo/CartPole-v1 --script my_ppo.py

A row is a folder with a runs.json, which runs/reference/collect.py writes. Its stored arguments are used; arguments
that the script got later have their defaults. The same command continues where it was stopped, and starts again when
the script, `common` or a library has changed.

FAIL: the new scores are lower, by a one-sided permutation test of the difference of means with p at most --level, the
probability with which an unchanged script FAILs. PASS: no drop was found; the interval shows how large a drop could
have been missed. Four times in five the test finds a drop of 2.7 standard deviations with five runs beside five stored
ones, 2.0 with five beside ten or ten beside five, 3.0 with seven beside three. With --same-seeds, PASS means that every
return is equal. Exit code: 0 PASS, 1 FAIL, 2 bad input, or that of a run that failed.
"""

import hashlib
import itertools
import json
import math
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from common.args import fail
from common.internals.console.cli import parse, similar
from common.internals.resume.files import read_json
from common.internals.tracking.provenance import ALGOS, versions
from common.tools.compare.compare import differences
from common.tools.compare.tables import Table, number, text, wrapped
from common.tools.find_runs import read_lines, results, run_directory
from common.tools.launch import cli
from common.tools.launch.benchmark import run_all
from common.tools.launch.cli import INCIDENTAL, OWN_FLAGS, as_words, ask, jsonable
from common.tools.launch.jobs import Job, make_job
from common.tools.stats import LEVEL, permutation, runs_needed, too_few

COMMON = Path(__file__).parents[2]
FRESH, MOST = 5, 10  # fresh seeds that are run without being asked for: more than 5 beside few stored ones
# Keys of args.json that are no arguments.
NOT_ARGUMENTS = {"script", "device", "threads", "processes", "versions", "git_commit", "parent", "common", "wandb_id"}
NOT_ARGUMENTS |= {"folder", "cwd"}
# Arguments that are not repeated: videos change no score, and the user decides which modules may be imported.
NOT_REPEATED = (INCIDENTAL - {"cuda", "torch_threads"}) | {"capture_video", "allow_env_import"}
# Options that left dqn.py for rainbow.py, and the values with which they were off.
LEFT_DQN = {"dueling": False, "n_step": 1, "prioritized_replay": False}


@dataclass
class Args(cli.ToolArgs):
    rows: Annotated[Positional[tuple[str, ...]], arg(metavar="ROW")] = ()
    """rows to run again, as ppo/CartPole-v1; none lists them"""
    results: Path = ALGOS.parent / "runs" / "reference" / "results"
    """the folder they are in"""
    seeds: str | None = None
    """seeds to run, 101-105 or 101,103 (default: five from 101 on, more beside fewer than five stored)"""
    same_seeds: bool = False
    """run the row's own seeds (or --seeds of them), and compare every return with the stored one, to the bit"""
    level: float = LEVEL
    """probability with which an unchanged script FAILs, for each row"""
    script: Path | None = None
    """run this script, a fork, instead of the row's"""
    track: bool = False
    """track the runs with W&B, as a group"""
    allow_env_import: bool = False
    """let an env id module:Env-v0 import (that is, run) that module"""


@dataclass
class Row:
    name: str
    folder: Path
    scores: dict[int, float]  # the last greedy evaluation of each seed
    args: dict[str, Any]  # of all runs: older ones may lack an argument
    training: str  # how long one took, as it is shown


def read_row(folder: Path, name: str) -> Row:
    """Raises ValueError, with the reason, if it cannot be run again."""
    try:
        kept = read_json(folder, "runs.json")
        scores = {int(run["seed"]): float(run["eval_return"]) for run in kept}
        configs = [run["args"] for run in kept]
        if not kept:
            raise ValueError("no run")
        seconds = statistics.fmean(float(run["training_seconds"]) for run in kept)
        for said in configs:
            str(said["script"]), str(said["env_id"]), int(said["total_timesteps"])
    except (OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"its runs.json cannot be read: {error!r}") from None
    if len(scores) < len(kept) or not all(map(math.isfinite, scores.values())):
        raise ValueError("its runs.json has a seed twice, or a score that is not finite")
    for key in sorted(set().union(*configs) - NOT_ARGUMENTS - NOT_REPEATED | {"script"}):
        if len({repr(said[key]) for said in configs if key in said}) > 1:
            raise ValueError(f"its runs differ in {key}: no single command repeats them")
    if any(said.get("processes", 1) != 1 for said in configs):
        raise ValueError("its runs used several processes, under torchrun")
    args = {key: value for said in configs for key, value in said.items()}
    return Row(name, folder, scores, args, f"{seconds:,.1f} s")


def listing(rows: dict[str, Row | str]) -> str:
    header = ["row", "script", "environment", "steps", "seeds", "mean ± std", "training"]
    table, broken = Table("Greedy evaluation, and training time of a seed", header, []), []
    for name, row in rows.items():
        if isinstance(row, str):
            broken.append(f"{name} cannot be run again: {row}")
        else:
            what = [name, row.args["script"], row.args["env_id"], f"{int(row.args['total_timesteps']):,}"]
            table.rows.append([*what, str(len(row.scores)), _spread([*row.scores.values()]), row.training])
    return "\n".join(filter(None, [text(table), wrapped(broken)]))


def _spread(scores: Sequence[float]) -> str:
    return f"{statistics.fmean(scores):.1f} ± {statistics.pstdev(scores):.1f}"


def choose_seeds(row: Row, args: Args) -> list[int]:
    """Code 2 if --seeds cannot be compared with the row's."""
    given, stored = cli.numbers(args.seeds, "--seeds") if args.seeds else [], ", ".join(map(str, row.scores))
    if args.same_seeds:
        if strange := set(given) - set(row.scores):
            fail(f"{row.name} has no seed {min(strange)}: with --same-seeds they are among {stored}")
        return given or [*row.scores]
    if known := set(given) & set(row.scores):
        fail(f"{row.name} has seed {min(known)} itself: give others, or --same-seeds")
    least = runs_needed(len(row.scores), args.level)
    fresh = (seed for seed in itertools.count(101) if seed not in row.scores)
    given = given or [*itertools.islice(fresh, min(max(FRESH, least), MOST))]
    if few := too_few(len(given), len(row.scores), args.level):
        fail(f"{row.name}: {few}, and beside {len(row.scores)} stored ones it takes {least} new --seeds")
    return given


def as_today(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of dqn.py and dqn_lightning.py when they had more options, as those of the script that has them now."""
    if arguments["script"] not in ("dqn", "dqn_lightning"):
        return arguments
    if any(arguments.get(name, off) != off for name, off in LEFT_DQN.items()):
        return {**arguments, "script": "rainbow", "distributional": False, "noisy": False}
    gone = {*LEFT_DQN, "prioritized_replay_alpha", "prioritized_replay_beta"}
    return {key: value for key, value in arguments.items() if key not in gone}


def make_jobs(row: Row, args: Args) -> list[Job]:
    """The row's command with each seed; code 2 if the script does not take it any more."""
    arguments = as_today(row.args)
    script = args.script or ALGOS / f"{cli.component(str(arguments['script']), f'{row.name}: its script')}.py"
    has = ask(script, [[]])[1][0].args
    stored = {key: value for key, value in arguments.items() if key not in NOT_ARGUMENTS | NOT_REPEATED}
    if gone := {key: value for key, value in stored.items() if key not in has}:
        fail(f"{row.name} was run with {shlex.join(as_words(gone))}, which {script.name} does not have any more")
    flags = as_words({key: value for key, value in stored.items() if jsonable(has[key]) != value})
    seeds = choose_seeds(row, args)
    print(f"{row.name}: {shlex.join(['python', str(script), *flags])}")
    print(f"      seeds {', '.join(map(str, seeds))}; a stored run trained for {row.training}", flush=True)
    flags += as_words({"track": args.track, "capture_video": False, "allow_env_import": args.allow_env_import})
    base = cli.base_arguments(script, flags, OWN_FLAGS)[1]
    if other := {key: value for key, value in stored.items() if jsonable(base[key]) != value}:
        fail(f"{row.name}: {script.name} does not make of {shlex.join(as_words(other))} what its runs.json has")
    # All that the runs depend on is in their name: those of other code are not taken for finished ones.
    code = hashlib.sha256(json.dumps([str(script.resolve()), base, versions()], sort_keys=True).encode())
    for path in (script, *sorted(COMMON.glob("*.py")), *sorted(COMMON.glob("internals/**/*.py"))):
        code.update(path.read_bytes())
    group = cli.sanitized(f"check_{row.name}_{code.hexdigest()[:12]}")
    folder, own = args.runs_dir / f"{group}.check", {"wandb_group": group}
    return [make_job(str(seed), script, flags, base, args.runs_dir, folder, seed=seed, **own) for seed in seeds]


def same_to_the_bit(row: Row, job: Job, run_dir: Path) -> bool:
    """Whether a run's training returns and evaluations, and their steps, equal those of the stored run of its seed."""
    keys = ("charts/episodic_return", "eval/episodic_return")
    paths = row.folder / f"seed{job.wanted['seed']}.jsonl.gz", run_dir / "metrics.jsonl"
    try:
        then, now = (read_lines(path, keys).rows for path in paths)
    except OSError as error:
        fail(f"{error.filename} cannot be read: {error.strerror}", code=6)
    return all(np.array_equal(then[key][[0, 2]], now[key][[0, 2]]) for key in keys)


def changes(row: Row, run_dirs: list[Path]) -> str:
    """Arguments, commit, device and versions in which the new runs differ from the stored ones."""
    table = differences({"stored": results(row.folder), "new": [run_directory(path) for path in run_dirs]})
    diff = run_dirs[0] / "source" / "uncommitted.diff"
    edited = ["uncommitted changes"] if diff.exists() and diff.stat().st_size else []
    return ", ".join([*(f"{name} {then} -> {now}" for name, then, now in table.rows), *edited]) or "nothing"


def report(row: Row, jobs: list[Job], args: Args) -> dict[str, Any]:
    """Prints the result of a row whose runs are finished, and returns it for --json."""
    run_dirs = [path for job in jobs if (path := job.find()) is not None]
    new = {job.wanted["seed"]: score for job in jobs if (score := job.score()) is not None}
    if len(new) < len(jobs):
        return failed_row(row, f"{len(jobs) - len(new)} of {len(jobs)} runs have no finite evaluation")
    stored, scores = row.scores, [*new.values()]
    if args.same_seeds:
        stored = {seed: row.scores[seed] for seed in new}
        same = [same_to_the_bit(row, *pair) for pair in zip(jobs, run_dirs, strict=True)]
        passed, better, numbers = all(same), False, dict[str, Any](equal=sum(same))
        result = f"every return is equal to the stored one in {sum(same)} of {len(same)} runs"
    else:
        shift = permutation([*stored.values()], scores, args.level)
        passed, better = shift.worse > args.level, shift.better <= args.level
        numbers = {"difference": shift.difference, "interval": [shift.low, shift.high], "p": shift.worse}
        interval = f"{100 - 200 * args.level:g} % interval {number(shift.low)} to {number(shift.high)}"
        result = f"difference {shift.difference:+.4g}, {interval}; "
        result += f"one-sided permutation test p = {shift.worse:.2g}, FAIL up to {args.level:g}"
    verdict, changed = "PASS" if passed else "FAIL", changes(row, run_dirs)
    print(f"{verdict}  {row.name}{' (better)' * better}")
    for name, shown in (("stored", [*stored.values()]), ("new", scores)):
        each = " ".join(f"{score:.1f}" for score in shown)
        print(f"      {name:<6}  {_spread(shown)}, {len(shown)} seeds: {each}")
    print(wrapped([result, f"changed since: {changed}"], indent=" " * 6))
    about = {"row": row.name, "verdict": verdict, "better": better, "reason": result, "changed": changed}
    return {**about, **numbers, "level": args.level, "reference": stored, "scores": new}


def failed_row(row: Row, reason: str) -> dict[str, Any]:
    print(f"FAIL  {row.name}: {reason}")
    return {"row": row.name, "verdict": "FAIL", "reason": reason, "reference": row.scores}


def main(argv: list[str]) -> None:
    args = parse(Args, __doc__, argv, prog="python -m common check-results")
    cli.at_least(args, workers=1)
    cli.check_folder(args.json)
    if not 0 < args.level < 0.5:
        fail("--level must be between 0 and 0.5")
    rows: dict[str, Row | str] = {}
    for path in sorted(args.results.rglob("runs.json")):
        name = path.parent.relative_to(args.results).as_posix()
        try:
            rows[name] = read_row(path.parent, name)
        except ValueError as error:
            rows[name] = str(error)
    if not rows:
        fail(f"there are no results (runs.json) below {args.results}: say where they are with --results")
    if not args.rows:
        print(listing(rows))
        known = [row for row in rows.values() if isinstance(row, Row)]
        cli.write_json(args.json, [{"row": row.name, "args": row.args, "reference": row.scores} for row in known])
        return
    jobs: dict[str, tuple[Row, list[Job]]] = {}
    for name in dict.fromkeys(word.rstrip("/") for word in args.rows):
        row = rows.get(name)
        if row is None:
            fail(f"there is no row {name}{similar(name, rows)}")
        if isinstance(row, str):
            fail(f"{name} cannot be run again: {row}")
        jobs[name] = row, make_jobs(row, args)
    every = [job for _, mine in jobs.values() for job in mine]
    failed = run_all(every, args.workers, ["python", "-m", "common", "check-results", *argv])
    results = []
    for row, mine in jobs.values():
        if broken := [job for job in mine if job in failed]:
            reason = f"{len(broken)} of {len(mine)} runs ended with an error: {broken[0].error()}"
            results.append(failed_row(row, reason))
        else:
            results.append(report(row, mine, args))
    sys.stdout.flush()
    cli.write_json(args.json, results)
    if failed:
        fail(f"{len(failed)} of {len(every)} runs failed; the same command retries them", failed[0].code or 1)
    raise SystemExit(any(result["verdict"] == "FAIL" for result in results))
