"""Runs scripts on environments with several seeds, several runs at a time.

    python -m common benchmark algos/dqn.py algos/ppo.py --env-ids CartPole-v1 Acrobot-v1 --seeds 1-5 --workers 2
    python -m common benchmark my_idea.py --env-ids CartPole-v1 --seeds 1-10 -- --total-timesteps 2e5 --gamma 0.98

Flags after `--` go to every script. The same command continues: finished runs are kept, others resume from their last
checkpoint, failed ones are retried. Seeds, environments and scripts may be added. Several such commands at once share
the work. The runs form one W&B group.
"""

import itertools
import json
import math
import statistics
import subprocess
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
from common.internals.tracking.redact import REDACTED, redact
from common.tools.compare.tables import Table, text
from common.tools.launch.cli import OWN_FLAGS, at_least, base_arguments, component, numbers, sanitized, split_flags
from common.tools.launch.jobs import Job, Pool, Screen, clock, locked, make_folder, make_job, stop, write_file


@dataclass
class Args:
    scripts: Annotated[Positional[tuple[Path, ...]], arg(metavar="SCRIPT")]
    """the scripts; forks too, from any folder"""
    env_ids: tuple[str, ...]
    """gymnasium environment ids"""
    seeds: str = "1-5"
    """seeds: 1-5 or 1,3,7-9"""
    workers: int = 1
    """runs at a time; the cores are divided among them"""
    wandb_group: str | None = None
    """W&B group, and name of the folder of the plan (default: benchmark_SCRIPTS)"""
    wandb_tags: tuple[str, ...] = ()
    """W&B tags, besides `benchmark` and the git commit"""
    runs_dir: Path = Path("runs")
    """folder of the run directories"""
    slurm: bool = False
    """submit the runs as a SLURM array, at most --workers at a time"""
    slurm_options: tuple[str, ...] = ()
    """options of submitit: timeout_min=240 slurm_partition=gpu; cluster=local runs here, without SLURM"""
    debug: bool = False
    """print the whole traceback of an error"""


def load_plan(folder: Path) -> dict[str, dict[str, Any]]:
    """The planned runs of plan.json, by name; code 3 if it cannot be read."""
    path = folder / "plan.json"
    try:
        plan = read_object(folder, path.name)["jobs"] if path.exists() else {}
        for job in plan.values():
            job["script"], job["flags"] + [], int(job["wanted"]["total_timesteps"])
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        fail(f"{path} is not a plan of a benchmark: remove it, or choose another --wandb-group", code=3)
    return plan


def add_to_plan(folder: Path, jobs: list[Job]) -> list[Job]:
    """Adds jobs to plan.json, and returns them as planned; code 2 if one is planned with other arguments."""
    with locked(folder / "plan.lock"):
        plan = load_plan(folder)
        for job in jobs:
            new: dict[str, Any] = {"script": str(job.script), "flags": job.flags, "wanted": job.wanted}
            known = plan.setdefault(job.name, new)
            then, now = ({"the script": of["script"], **of["wanted"]} for of in (known, new))
            differ = [f"{name} was {then[name]}, now {now.get(name)}" for name in then if now.get(name) != then[name]]
            if differ:
                fail(f"{folder} has another {job.name}: {', '.join(differ)}; choose another --wandb-group")
            if REDACTED in json.dumps(known["flags"]):  # the file does not keep secrets, this command has them
                plan[job.name] = new
        write_file(folder / "plan.json", json.dumps({"jobs": plan}, indent=1) + "\n")
    return [planned(folder, job.name, plan) for job in jobs]


def planned(folder: Path, name: str, plan: dict[str, dict[str, Any]]) -> Job:
    return Job(name, Path(plan[name]["script"]), plan[name]["flags"], plan[name]["wanted"], folder.parent, folder)


def main(argv: list[str]) -> None:
    words, flags = split_flags(argv)
    args = parse(Args, __doc__, words, prog="python -m common benchmark")
    at_least(args, workers=1)
    if args.slurm_options and not args.slurm:
        fail("--slurm-options are for --slurm")
    seeds = numbers(args.seeds, "--seeds")
    stems = [script.stem for script in args.scripts]
    for names, what in ((stems, "scripts"), (args.env_ids, "--env-ids")):
        if len(set(names)) < len(names):
            fail(f"{what}: two of the same name, whose runs could not be told apart")
    group = component(args.wandb_group or sanitized("benchmark_" + "_".join(stems)), "--wandb-group")
    folder = args.runs_dir / f"{group}.benchmark"
    wanted: list[Job] = []
    for script in args.scripts:
        base = base_arguments(script, flags, OWN_FLAGS | {"env_id"})[1]
        words = [*flags, "--wandb-tags", "benchmark", *_commit(script), *args.wandb_tags]
        for env_id, seed in itertools.product(args.env_ids, seeds):
            own = {"env_id": env_id, "seed": seed, "wandb_group": group}
            name = sanitized(f"{script.stem}__{env_id}__{seed}")
            wanted.append(make_job(name, script.resolve(), words, base, args.runs_dir, folder, **own))
    make_folder(folder)
    jobs = add_to_plan(folder, wanted)
    for job in jobs:  # two versions of a script are not seeds of one method
        if job.finished() and not is_saved_source(job.script, job.run_dir):  # type: ignore[arg-type]
            back = f"restore the script from {job.run_dir}/source"
            fail(f"{job.script.name} has changed since {job.run_dir} finished: choose another --wandb-group, or {back}")
    command = ["python", "-m", "common", "benchmark", *argv]
    todo = [job for job in jobs if not job.finished()]
    if args.slurm and todo:
        _submit(folder, todo, args)
    else:
        _summary(jobs, run_all(jobs, args.workers, command))


def run_all(jobs: list[Job], workers: int, command: list[str]) -> list[Job]:
    """Runs every job once, in this process or another. Returns those that failed.

    Args:
        command: what to run again after a signal, for the message.
    """
    pool, screen, began = Pool(workers), Screen(), time.monotonic()
    pool.listen()
    failed: list[Job] = []
    done = [job for job in jobs if job.finished()]
    todo = [job for job in jobs if job not in done]
    if already := len(done):
        screen.say(f"{already} of {len(jobs)} runs are finished already")

    def title(job: Job) -> str:
        over = len(done) + len(failed)
        return f"[{over:>{len(str(len(jobs)))}}/{len(jobs)}] {_name(job)}"

    def status() -> str:
        over = len(done) + len(failed) - already + sum(job.look() for job in pool.jobs)
        left = (time.monotonic() - began) / over * (len(jobs) - already - over) if over else math.inf
        running = [f"{_name(job)} {job.look():.0%}" for job in pool.jobs]
        return f"{', '.join(running)}" + (f"; about {clock(left)} left" if math.isfinite(left) else "")

    while (todo or pool.jobs) and not (pool.stopping and not pool.jobs):
        for job in list(todo):
            if not pool.free or pool.stopping:
                break
            if pool.start(job):
                todo.remove(job)
                if job.run_dir is not None:
                    screen.say(f"{title(job)}: resumes {job.run_dir}")
            elif job.finished():  # meanwhile, by another command
                todo.remove(job)
                done.append(job)
        for job in pool.poll():
            seconds = clock(time.monotonic() - job.started)
            if job.code == 0 and job.finished():
                done.append(job)
                score = job.score()
                what = "done" if score is None else f"return {score:.1f}"
                screen.say(f"{title(job)}: {what} in {seconds}")
            elif not pool.stopping:
                job.code = job.code or 1
                failed.append(job)
                screen.say(f"{title(job)}: failed (exit {job.code}): {job.error()}")
        screen.show(status)
        time.sleep(0.1)
    if pool.stopping:
        pool.leave(command)
    return failed


def _name(job: Job) -> str:
    return f"{job.script.stem} {job.wanted['env_id']} seed {job.wanted['seed']}"


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


def _commit(script: Path) -> list[str]:
    """`git describe` of the script's repository, as a tag."""
    words = ["git", "describe", "--tags", "--always", "--dirty"]
    try:
        done = subprocess.run(words, cwd=script.resolve().parent, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
    return [done.stdout.strip()[:60]]


# --- SLURM, through submitit


class Task:
    """One run as a job of an array. Before SLURM ends it (SIGUSR2), the run makes a checkpoint and is queued again."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.pool = Pool(1, pin=False)  # SLURM has chosen the cores

    def __call__(self) -> None:
        job = planned(self.folder, self.name, load_plan(self.folder))
        while not self.pool.start(job):
            if job.finished():
                return
            time.sleep(1)  # another process has it
        self.pool.wait()
        if job.code != 0:
            raise RuntimeError(f"{self.name}: exit {job.code}: {job.error()}")

    def checkpoint(self) -> Any:
        """For submitit, which calls it in its handler of SIGUSR2."""
        from submitit.helpers import DelayedSubmission

        for job in self.pool.jobs:
            stop(job)
        self.pool.wait()
        return DelayedSubmission(Task(self.folder, self.name))


def _submit(folder: Path, jobs: list[Job], args: Args) -> None:
    try:
        import submitit
    except ImportError:
        fail('--slurm needs submitit: pip install -e ".[slurm]"')
    if any(redact(job.flags) != job.flags for job in jobs):
        fail("--slurm: a secret is among the script's flags, and plan.json keeps none: let the script read it itself")
    options: dict[str, Any] = {"timeout_min": 24 * 60, "name": folder.stem, "slurm_array_parallelism": args.workers}
    for word in args.slurm_options:
        name, equals, value = word.partition("=")
        if not equals:
            fail(f"--slurm-options {word!r} is not of the form name=value")
        options[name] = int(value) if value.isdecimal() else value
    cluster = options.pop("cluster", "slurm")
    times = {f"{cluster}_max_num_timeout": 1000}  # no limit: each time a run gets further
    try:
        executor = submitit.AutoExecutor(folder=folder / "submitit", cluster=cluster, **times)
        executor.update_parameters(**options)
        submitted = executor.submit_array([Task(folder.resolve(), job.name) for job in jobs])
    except Exception as error:  # submitit's own checks raise NameError, AssertionError and others
        fail(f"the runs cannot be submitted: {error}")
    print(f"{len(submitted)} runs submitted: {', '.join(job.job_id for job in submitted)}; logs in {folder}")
