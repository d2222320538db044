"""Runs scripts on environments with several seeds, several runs at a time.

    python -m common benchmark algos/dqn.py algos/ppo.py --env-ids CartPole-v1 Acrobot-v1 --seeds 1-5 --workers 2
    python -m common benchmark my_idea.py --env-ids CartPole-v1 --seeds 1-10 -- --total-timesteps 2e5 --gamma 0.98

Flags after `--` go to every script. The same command continues: finished runs are kept, others resume from their last
checkpoint, failed ones are retried. Seeds, environments and scripts may be added. Several such commands at once share
the work, also as the jobs of a SLURM array: sbatch --array=1-8 --wrap "python -m common benchmark ...". The runs form
one W&B group.
"""

import datetime
import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from common.args import fail
from common.internals.console.cli import parse
from common.internals.resume.files import read_object
from common.internals.tracking.provenance import is_saved_source
from common.tools.compare.tables import Table, text
from common.tools.launch import cli
from common.tools.launch.cli import OWN_FLAGS, ToolArgs, sanitized
from common.tools.launch.jobs import Job, Pool, find_run, make_job


@dataclass
class Args(ToolArgs):
    scripts: Annotated[Positional[tuple[Path, ...]], arg(metavar="SCRIPT")]
    """the scripts; forks too, from any folder"""
    env_ids: tuple[str, ...]
    """gymnasium environment ids"""
    seeds: str = "1-5"
    """seeds: 1-5 or 1,3,7-9"""
    name: str | None = None
    """name of the folder of the logs and of the W&B group (default: benchmark_SCRIPTS)"""
    wandb_tags: tuple[str, ...] = ()
    """W&B tags, besides `benchmark`"""


def refuse_other(job: Job) -> None:
    """Code 2 if its group has this run with other arguments, or of another version of the script."""
    named = {name: job.wanted[name] for name in ("env_id", "seed", "wandb_group")}
    if job.find() is None and (other := find_run(job.runs_dir, job.script.stem, named)) is not None:
        config = read_object(other, "args.json")
        differ = [f"{k} was {config.get(k)}, is now {v}" for k, v in job.wanted.items() if config.get(k) != v]
        fail(f"{other} has other arguments: {', '.join(differ)}; choose another --name")
    if job.finished() and not is_saved_source(job.script, job.run_dir):  # type: ignore[arg-type]
        back = f"restore the script from {job.run_dir}/source"
        fail(f"{job.script.name} has changed since {job.run_dir} finished: choose another --name, or {back}")


def main(argv: list[str]) -> None:
    words, flags = cli.split_flags(argv)
    args = parse(Args, __doc__, words, prog="python -m common benchmark")
    cli.at_least(args, workers=1)
    cli.check_folder(args.json)
    seeds = cli.numbers(args.seeds, "--seeds")
    stems = [script.stem for script in args.scripts]
    for names, what in ((stems, "scripts"), (args.env_ids, "--env-ids")):
        if len(set(names)) < len(names):
            fail(f"{what}: two of the same name, whose runs could not be told apart")
    group = cli.component(args.name or sanitized("benchmark_" + "_".join(stems)), "--name")
    folder = args.runs_dir / f"{group}.benchmark"
    jobs: list[Job] = []
    tagged = [*flags, "--wandb-tags", "benchmark", *args.wandb_tags]
    for script in args.scripts:
        base = cli.base_arguments(script, flags, OWN_FLAGS | {"env_id"})[1]
        for env_id, seed in itertools.product(args.env_ids, seeds):
            own = {"env_id": env_id, "seed": seed, "wandb_group": group}
            name = sanitized(f"{script.stem}__{env_id}__{seed}")
            jobs.append(make_job(name, script.resolve(), tagged, base, args.runs_dir, folder, **own))
            refuse_other(jobs[-1])
    try:
        failed = run_all(jobs, args.workers, ["python", "-m", "common", "benchmark", *argv])
    finally:  # after a signal too
        cli.write_json(args.json, [_record(job) for job in jobs])
    _summary(jobs, failed)


def run_all(jobs: list[Job], workers: int, command: list[str]) -> list[Job]:
    """Runs every job once, in this process or another. Returns those that failed.

    Args:
        command: what to run again after a signal, for the message.
    """
    pool = Pool(workers)
    pool.listen()
    failed: list[Job] = []
    done = [job for job in jobs if job.finished()]
    todo = [job for job in jobs if job not in done]
    if done:
        print(f"{len(done)} of {len(jobs)} runs are finished already", flush=True)

    def say(job: Job, event: str) -> None:
        over = len(done) + len(failed)
        print(f"[{over:>{len(str(len(jobs)))}}/{len(jobs)}] {_name(job)}: {event}", flush=True)

    while (todo or pool.jobs) and not (pool.stopping and not pool.jobs):
        for job in list(todo):
            if not pool.free or pool.stopping:
                break
            if pool.start(job):
                todo.remove(job)
                if job.run_dir is not None:
                    say(job, f"resumes {job.run_dir}")
            elif job.finished():  # meanwhile, by another command
                todo.remove(job)
                done.append(job)
        for job in pool.poll():
            if job.code == 0 and job.finished():
                done.append(job)
                score = job.score()
                what = "done" if score is None else f"return {score:.1f}"
                say(job, f"{what} in {datetime.timedelta(seconds=round(time.monotonic() - job.started))}")
            elif pool.stopping:
                job.code = None
            else:
                job.code = job.code or 1
                failed.append(job)
                say(job, f"failed (exit {job.code}): {job.error()}")
        time.sleep(0.1)
    if pool.stopping:
        pool.leave(command)
    return failed


def _name(job: Job) -> str:
    return f"{job.script.stem} {job.wanted['env_id']} seed {job.wanted['seed']}"


def _record(job: Job) -> dict[str, Any]:
    """What --json says of a run."""
    state = "finished" if job.finished() else "failed" if job.code else "unfinished"
    failure = {"exit_code": job.code, "error": job.error()} if state == "failed" else {}
    about = {"script": str(job.script), **{name: job.wanted[name] for name in ("env_id", "seed")}}
    return {**about, "state": state, "score": job.score(), "run_dir": job.run_dir and str(job.run_dir), **failure}


def _summary(jobs: list[Job], failed: list[Job]) -> None:
    """Prints scores and failures; ends the process if a run failed."""
    table = Table("", ["script", "environment", "runs", "final evaluation, mean ± std over seeds"], [])
    for (stem, env_id), row in itertools.groupby(jobs, key=lambda job: (job.script.stem, job.wanted["env_id"])):
        mine = list(row)
        scores = [score for job in mine if (score := job.score()) is not None]
        shown = f"{statistics.fmean(scores):.1f} ± {statistics.pstdev(scores):.1f}" if scores else "none"
        table.rows.append([stem, env_id, str(sum(job.finished() for job in mine)), shown])
    print(text(table))
    for job in failed:
        print(f"failed: {_name(job)} (exit {job.code}): {job.error()}\n        {job.log}")
    sys.stdout.flush()
    if failed:
        fail(f"{len(failed)} of {len(jobs)} runs failed; the same command retries them", failed[0].code or 1)
