"""Searches a script's hyperparameters, then compares the winner with the defaults on fresh seeds.

    python -m common sweep algos/ppo.py --env-id CartPole-v1 --search learning_rate=1e-4..1e-2:log gamma=0.95,0.98 \\
        --method tpe --trials 20 --seeds 1-2 --workers 2 -- --total-timesteps 2e4 --no-capture-video

Flags after `--` go to every run. A trial is a set of hyperparameters; its value, to be maximized, is the mean over the
seeds of the last greedy evaluation. `gamma=0.9,0.99` is a list, `1e-4..1e-2` a range, `:log` draws from it evenly in
the logarithm, `:5` makes 5 points of it for a grid.

--prune ends a trial after a seed if the best mean of its scores so far is below the median of earlier trials after as
many seeds (Optuna's MedianPruner; not before 5 trials are complete). A trial with non-finite numbers counts as pruned.

The same command continues a sweep that was stopped or killed: unfinished trials resume their runs.
`optuna-dashboard sqlite:///runs/NAME.sweep/study.db` plots the trials.
"""

import itertools
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from common.args import fail
from common.internals.console.cli import parse
from common.tools import stats
from common.tools.compare.tables import Table, markdown, wrapped
from common.tools.launch import cli
from common.tools.launch.jobs import Job, Pool, locked, make_folder, make_job, write_file
from common.tools.launch.search_space import Dimension, check_method, flags, product, read_space

if TYPE_CHECKING:
    from common.tools.launch.study import Queue

TRIALS = 20


@dataclass
class Args(cli.ToolArgs):
    script: Annotated[Positional[Path], arg(metavar="SCRIPT")]
    """the script; forks too, from any folder"""
    search: tuple[str, ...]
    """what to search: name=low..high, name=low..high:log, name=value,value; for a grid, ranges end in :POINTS"""
    env_id: str | None = None
    """gymnasium environment id (default: the script's)"""
    method: Literal["grid", "random", "tpe", "gp"] = "tpe"
    """grid, random, or Bayesian: tree-structured Parzen estimators (tpe), Gaussian processes (gp)"""
    trials: int | None = None
    """number of trials (default: 20; of a grid, all its points)"""
    seeds: str = "1-3"
    """seeds of each trial: 1-3 or 1,3,7-9"""
    fresh_seeds: str = "1001-1010"
    """seeds of the final runs of the winner and of the defaults"""
    prune: bool = True
    """end trials after a seed if their scores are below the median"""
    retries: int = 2
    """times to retry a trial after a run of it failed"""
    search_seed: int = 0
    """seed of the search methods"""
    name: str | None = None
    """name of the sweep's folder and of its W&B group (default: sweep_SCRIPT_ENV_METHOD)"""
    wandb_tags: tuple[str, ...] = ()
    """W&B tags, besides `sweep` and the trial's"""


def main(argv: list[str]) -> None:
    own, fixed = cli.split_flags(argv)
    args = parse(Args, __doc__, own, prog="python -m common sweep")
    cli.at_least(args, workers=1, trials=1, retries=0, search_seed=0)
    cli.check_folder(args.json)
    seeds, fresh = cli.numbers(args.seeds, "--seeds"), cli.numbers(args.fresh_seeds, "--fresh-seeds")
    if set(seeds) & set(fresh):
        fail("--fresh-seeds must not be among --seeds: the winner was chosen on those")
    if args.env_id is not None:
        fixed = ["--env-id", args.env_id, *fixed]
    types, base = cli.base_arguments(args.script, fixed, cli.OWN_FLAGS)
    if base.get("eval_episodes", 1) == 0:
        fail("--eval-episodes 0 leaves nothing to judge a trial by")
    space = read_space(args.script, fixed, types, args.search)
    check_method(space, args.method)
    if args.method == "grid" and args.trials is not None:
        fail(f"--trials is for random, tpe and gp; this grid has {len(product(space))} points")
    try:
        import optuna  # noqa: F401
        import scipy  # noqa: F401 - for optuna's gp
    except ImportError as error:
        fail(f'sweep needs {error.name}, which is not installed: pip install -e ".[sweep]"')
    group = args.name or cli.sanitized(f"sweep_{args.script.stem}_{base['env_id']}_{args.method}")
    folder = args.runs_dir / f"{cli.component(group, '--name')}.sweep"
    make_folder(folder)
    sweep = Sweep(args, folder, group, fixed, base, space, seeds)
    with locked(folder / "lock", wait=False) as lock:
        if lock is None:
            fail(f"another process works at {folder}")
        search(sweep, fresh, ["python", "-m", "common", "sweep", *argv])


def search(sweep: "Sweep", fresh: list[int], command: list[str]) -> None:
    """The trials, then the winner and the defaults on fresh seeds, then the report."""
    from common.tools.launch.study import Queue

    args, base, space, seeds, group = sweep.args, sweep.base, sweep.space, sweep.seeds, sweep.group
    combinations = product(space) if args.method == "grid" else [{}] * sweep.trials
    tried = Queue(sweep, group, [{"slot": i, "fixed": params, "seeds": seeds} for i, params in enumerate(combinations)])
    sweep.work(tried, command)
    winner = tried.best()
    if winner is None:
        errors = [slot.error for slot in tried.slots() if slot.error]
        code = int(errors[-1].split()[1].rstrip(":")) if errors else 1
        fail(f"no trial was completed; the last: {errors[-1] if errors else 'pruned'}", code)
    defaults_won = all(d.argument(winner.params[d.name]) == base[d.name] for d in space)
    compared: dict[str, Any] = {"defaults": {}} if defaults_won else {"winner": winner.params, "defaults": {}}
    pairs = itertools.product(compared.items(), fresh)
    runs = [
        {"slot": f"{name} {seed}", "fixed": params, "seeds": [seed], "name": name} for (name, params), seed in pairs
    ]
    final = Queue(sweep, f"{group}, trial {winner.user_attrs['slot']} on fresh seeds", runs)
    sweep.work(final, command)
    report(sweep, tried, final, winner, defaults_won)


@dataclass(eq=False)
class Attempt:
    """A trial of this process: one run after the other, one for each seed."""

    trial: Any
    slot: dict[str, Any]
    jobs: list[Job]
    values: list[float] = field(default_factory=list)
    waits: bool = True  # for the current run to be started

    @property
    def job(self) -> Job:
        return self.jobs[len(self.values)]


@dataclass(eq=False)
class Sweep:
    """The settings of a sweep, and the loop that works through a queue of trials."""

    args: Args
    folder: Path
    group: str
    fixed: list[str]  # flags of every run
    base: dict[str, Any]  # the arguments they give the script
    space: list[Dimension]
    seeds: list[int]

    def __post_init__(self) -> None:
        self.trials = self.args.trials or TRIALS

    def work(self, queue: "Queue", command: list[str]) -> None:
        """Runs the trials of a queue until each is completed, pruned or given up."""
        self.pool = Pool(self.args.workers)
        self.pool.listen()
        attempts: list[Attempt] = []
        while True:
            while len(attempts) < self.args.workers and not self.pool.stopping and (trial := queue.take()) is not None:
                attempts.append(self.begin(queue, trial))
            if self.pool.stopping and not self.pool.jobs:
                for attempt in attempts:
                    queue.tell(attempt.trial, "FAIL")
                self.pool.leave(command)
            if not attempts:
                return
            self.step(queue, attempts)
            time.sleep(0.1)

    def begin(self, queue: "Queue", trial: Any) -> Attempt:
        slot = queue.wanted[trial.user_attrs["slot"]]
        name = slot.get("name", f"trial-{slot['slot']}")
        params: dict[str, Any] = {} if name == "defaults" else {d.name: d.suggest(trial) for d in self.space}
        base = self.base | {d.name: d.argument(params[d.name]) for d in self.space if params}
        words, jobs = [*self.fixed, *flags(params)], []
        for seed in slot["seeds"]:
            tags = ["sweep", *self.args.wandb_tags, name]
            own: dict[str, Any] = {"seed": seed, "wandb_group": self.group, "wandb_tags": tags}
            place = self.args.runs_dir, self.folder
            jobs.append(make_job(f"{name}-seed-{seed}", self.args.script, words, base, *place, **own))
        return Attempt(trial, slot, jobs)

    def step(self, queue: "Queue", attempts: list[Attempt]) -> None:
        """Starts, watches and ends the runs of `attempts`, and removes the attempts that are over."""
        ended = self.pool.poll()
        for attempt in list(attempts):
            if attempt.waits:
                if not self.pool.free or self.pool.stopping:
                    continue
                if self.pool.start(attempt.job):
                    attempt.waits = False
                elif not attempt.job.finished():  # the run of a process that was killed, still ending
                    continue
            finished = attempt.waits or attempt.job in ended
            if finished and self.end(queue, attempt):
                attempts.remove(attempt)

    def end(self, queue: "Queue", attempt: Attempt) -> bool:
        """Records the end of a trial's current run. Returns whether the trial is over."""
        job, title = attempt.job, self.title(attempt)
        score = job.score()
        if score is not None:
            attempt.values.append(score)
            value, seeds = sum(attempt.values) / len(attempt.values), len(attempt.values)
            state = "COMPLETE" if seeds == len(attempt.jobs) else "PRUNED"
            if state == "PRUNED":
                attempt.waits = True
                attempt.trial.report(value, seeds)
                if not attempt.trial.should_prune():
                    return False
            queue.tell(attempt.trial, state, value if state == "COMPLETE" else None, values=attempt.values)
            pruned = f", pruned after {seeds} of {len(attempt.jobs)} seeds" if state == "PRUNED" else ""
            print(f"{queue.count()} {title}: {value:.5g}{pruned}", flush=True)
            return True
        if self.pool.stopping:
            return False  # the loop queues it again
        code = job.code or 1
        error = f"exit {code}: {job.error()}"
        if code == 4:  # a learning rate too large is a result
            queue.tell(attempt.trial, "PRUNED", error=error)
        else:
            queue.tell(attempt.trial, "FAIL", error=error, final=code in (2, 3))  # a retry would end the same way
        print(f"{queue.count()} {title}: {'pruned' if code == 4 else 'failed'}, {error}", flush=True)
        return True

    def title(self, attempt: Attempt) -> str:
        if "name" in attempt.slot:
            return attempt.slot["slot"].replace(" ", " seed ")
        return f"trial {attempt.slot['slot']} ({described(attempt.trial.params)})"


def described(params: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in params.items())


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def report(sweep: Sweep, tried: "Queue", final: "Queue", winner: Any, defaults_won: bool) -> None:
    """Prints the result, and writes report.md and results.json."""
    values: dict[str, list[float]] = {"winner": [], "defaults": []}
    for slot in final.slots():
        if slot.value is not None:
            values[final.wanted[slot.number]["name"]].append(slot.value)
    won, plain = values["winner"], values["defaults"]
    lines = [f"Winner: trial {winner.user_attrs['slot']}, {described(winner.params)}: {winner.value:.5g}", ""]
    fresh, verdict = f"On the fresh seeds {sweep.args.fresh_seeds}", {}
    if defaults_won:
        lines += [f"The winner is the defaults. {fresh}: {stats.mean_and_std(plain)}."]
    elif won and plain:
        both = f"winner {stats.mean_and_std(won)} ({len(won)} runs), defaults {stats.mean_and_std(plain)}"
        verdict = stats.significance(won, plain, winner.value)
        lines += [f"{fresh}: {both} ({len(plain)} runs).", verdict["text"]]
    else:
        lines += [f"{fresh} no run of the {'defaults' if won else 'winner'} was completed."]
    slots, names = tried.slots(), [d.name for d in sweep.space]
    table, rows = Table("", ["trial", *names, "value", "seeds", ""], []), []
    for slot in sorted(slots, key=lambda s: -math.inf if s.value is None else s.value, reverse=True):
        trial = slot.trial("COMPLETE", "PRUNED") or slot.trials[-1]
        each = trial.user_attrs.get("values", [])
        note = " ".join(filter(None, ["" if slot.state == "DONE" else slot.state.lower(), slot.error]))
        cells = [slot.number, *(trial.params.get(name) for name in names), "" if slot.value is None else slot.value]
        table.rows.append([*map(_short, cells), ", ".join(map(_short, each)), note])
        row = {"trial": slot.number, "state": slot.state, "params": trial.params, "values": each}
        rows.append({**row, "value": slot.value, "error": slot.error})
    args = sweep.args
    head = f"{args.script.name} on {sweep.base['env_id']}, {args.method}, {len(slots)} trials of seeds {args.seeds}; "
    head += "the value is the mean of the last greedy evaluations."
    text = "\n".join([f"# {sweep.group}", "", head, "", *lines, "", markdown(table), ""])
    write_file(sweep.folder / "report.md", text)
    results = {"plan": tried.plan, "trials": rows, "winner": winner.params, "fresh": values, "verdict": verdict}
    for path in (sweep.folder / "results.json", args.json):
        cli.write_json(path, results)
    lost = [f"failed: trial {slot.number}: {slot.error}" for slot in slots if tried.given_up(slot)]
    lost += [f"failed: {final.wanted[s.number]['name']}: {s.error}" for s in final.slots() if final.given_up(s)]
    print("\n".join(["", wrapped(lines), *lost]))
    print(f"report and results: {sweep.folder}", flush=True)
