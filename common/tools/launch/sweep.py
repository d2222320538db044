"""Searches a script's hyperparameters, and tries the best ones on fresh seeds against the defaults.

    python -m common sweep algos/ppo.py --env-id CartPole-v1 --search learning_rate=1e-4..1e-2:log gamma=0.95,0.98 \\
        --method tpe --trials 20 --seeds 1-2 --workers 2 -- --total-timesteps 2e4 --no-capture-video

What stands after `--` goes to every run. A trial is a set of hyperparameters; its value is the mean over the seeds of
the last greedy evaluation (eval/episodic_return), to be maximized. Lists and ranges: gamma=0.9,0.99 for a list,
1e-4..1e-2 for a range, :log for one in the logarithm, :5 for the number of points of a range in a grid.

--prune ends a trial early when its best mean training return so far is below the median of what the earlier trials had
at the same tenth of the run of the same seed (Optuna's MedianPruner; not among the first 5 trials, nor in the first
three tenths). A trial whose numbers are not finite counts as pruned.

The same command again goes on; the same command started several times, or with one PostgreSQL --storage on several
machines, shares the work. A trial whose worker is gone is queued again, and goes on from the checkpoint of its run.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from common.args import fail, parse
from common.tools.launch.jobs import (
    INCIDENTAL,
    OWN_FLAGS,
    Job,
    Pool,
    Progress,
    Screen,
    base_arguments,
    component,
    jsonable,
    locked,
    make_folder,
    numbers,
    sanitized,
    split_flags,
    stop,
    write_file,
)
from common.tools.launch.search_space import Dimension, check_method, flags, product, read_space, wandb_sweep

TRIALS = 20


@dataclass
class Args:
    script: Annotated[Positional[Path], arg(metavar="SCRIPT")]
    """the script; forks too, from any folder"""
    search: tuple[str, ...]
    """what to search: name=low..high, name=low..high:log, name=value,value (a grid's ranges end in their points, :5)"""
    env_id: str | None = None
    """gymnasium environment id (default: the script's)"""
    method: Literal["grid", "random", "tpe", "gp"] = "tpe"
    """every combination, random ones, or Bayesian search by tree-structured Parzen estimators or Gaussian processes"""
    trials: int | None = None
    """sets of hyperparameters to try (default: 20; a grid has its own number)"""
    seeds: str = "1-3"
    """seeds of each trial: 1-3 or 1,3,7-9"""
    fresh_seeds: str = "1001-1010"
    """seeds on which the winner and the defaults are run at the end"""
    prune: bool = True
    """end trials early that do worse than the median"""
    retries: int = 2
    """times a trial is tried again after a run of it failed"""
    workers: int = 1
    """runs at a time; the cores this process may use are divided among them"""
    search_seed: int = 0
    """seed of what random, tpe and gp draw"""
    storage: str | None = None
    """where trials are kept (default: SQLite, in the sweep's folder); postgresql+psycopg://... for many machines"""
    heartbeat: int = 15
    """seconds between a worker's signs of life; after four times as long without one its trials are queued again"""
    wandb_group: str | None = None
    """W&B group, and the name of the sweep (default: sweep_, the script, the environment and the method)"""
    wandb_tags: tuple[str, ...] = ()
    """W&B tags, besides `sweep` and the trial"""
    runs_dir: Path = Path("runs")
    """where run directories are made, and the sweep's own folder"""
    wandb_sweep: Path | None = None
    """write the same search into this file for W&B's own agents, and run nothing"""
    debug: bool = False
    """print the whole traceback of an error"""


def main(argv: list[str]) -> None:
    own, fixed = split_flags(argv)
    args = parse(Args, __doc__, own, prog="python -m common sweep")
    for name, least in (("workers", 1), ("trials", 1), ("heartbeat", 1), ("retries", 0), ("search_seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            fail(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    seeds, fresh = numbers(args.seeds, "--seeds"), numbers(args.fresh_seeds, "--fresh-seeds")
    if set(seeds) & set(fresh):
        fail("--fresh-seeds must not be among --seeds: the winner was chosen on those")
    if args.env_id is not None:
        fixed = ["--env-id", args.env_id, *fixed]
    types, base = base_arguments(args.script, fixed, OWN_FLAGS)
    if base.get("eval_episodes", 1) == 0:
        fail("--eval-episodes 0 leaves nothing to judge a trial by")
    space = read_space(args.script, fixed, types, args.search)
    check_method(space, args.method)
    if args.method == "grid" and args.trials is not None:
        fail(f"--trials is for random, tpe and gp; this grid has {len(product(space))} points")
    if args.wandb_sweep is not None:
        _write_wandb_sweep(args, fixed, space, base)
        return
    _require_optuna(args.method)
    group = args.wandb_group or sanitized(f"sweep_{args.script.stem}_{base['env_id']}_{args.method}")
    folder = args.runs_dir / f"{component(group, '--wandb-group')}.sweep"
    make_folder(folder)
    sweep = Sweep(args, folder, group, fixed, base, space, seeds)
    command = ["python", "-m", "common", "sweep", *argv]
    combinations = product(space) if args.method == "grid" else [{}] * (args.trials or TRIALS)
    trials = [{"slot": i, "fixed": fixed_params, "seeds": seeds} for i, fixed_params in enumerate(combinations)]
    tried = Queue(sweep, group, trials)
    sweep.work(tried, command)
    winner = tried.best()
    if winner is None:
        errors = [slot.error for slot in tried.slots() if slot.error]
        code = int(errors[-1].split()[1].rstrip(":")) if errors else 1
        fail(f"no trial came to its end; the last: {errors[-1] if errors else 'pruned'}", code)
    defaults = all(space[i].argument(winner.params[d.name]) == base[d.name] for i, d in enumerate(space))
    runs = [
        {"slot": f"{name} {seed}", "fixed": winner.params if name == "winner" else {}, "seeds": [seed], "name": name}
        for name in ("winner", "defaults")
        for seed in fresh
        if not (defaults and name == "winner")
    ]
    final = Queue(sweep, f"{group}, trial {winner.user_attrs['slot']} on fresh seeds", runs)
    sweep.work(final, command)
    report(sweep, tried, final, winner, defaults)


def _require_optuna(method: str) -> None:
    try:
        import matplotlib
        import optuna
        import scipy  # noqa: F401 - for optuna's gp
    except ImportError as error:
        fail(f'sweep needs {error.name}, which is not installed: pip install -e ".[sweep]"')
    matplotlib.use("Agg")
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def _write_wandb_sweep(args: Args, fixed: list[str], space: list[Dimension], base: dict[str, Any]) -> None:
    import yaml  # a dependency of wandb

    sweep = wandb_sweep(args.script, fixed, space, args.method, base)
    write_file(args.wandb_sweep, yaml.safe_dump(sweep, sort_keys=False))  # type: ignore[arg-type]
    print(f"wrote {args.wandb_sweep}: wandb sweep {args.wandb_sweep}")


@dataclass
class Slot:
    """A trial that is to be done once, whatever happens to those who do it: Optuna's trials of it, first to last."""

    number: int | str
    trials: list[Any] = field(default_factory=list)

    def one_that_is(self, *states: str) -> Any:
        return next((trial for trial in self.trials if trial.state.name in states), None)

    @property
    def state(self) -> str:
        """DONE, PRUNED, RUNNING, WAITING, or FAIL, which may be tried again."""
        for state in ("COMPLETE", "PRUNED", "RUNNING", "WAITING"):
            if self.one_that_is(state):
                return "DONE" if state == "COMPLETE" else state
        return "FAIL"

    @property
    def errors(self) -> list[str]:
        """Of its runs; a worker that was killed or interrupted left none."""
        return [t.user_attrs["error"] for t in self.trials if t.state.name == "FAIL" and "error" in t.user_attrs]

    @property
    def error(self) -> str | None:
        pruned = self.one_that_is("PRUNED")
        if pruned is not None:
            return pruned.user_attrs.get("error")
        return self.errors[-1] if self.state == "FAIL" and self.errors else None


class Queue:
    """An Optuna study as a queue that processes on several machines share.

    Every slot is a waiting trial from the start, so that there are neither more nor fewer, however many work at it.
    """

    def __init__(self, sweep: "Sweep", name: str, wanted: list[dict[str, Any]]) -> None:
        import optuna

        self.sweep = sweep
        self.wanted = {slot["slot"]: slot for slot in wanted}
        plan = {**sweep.plan, "slots": None if sweep.args.method != "grid" else jsonable(wanted)}
        with sweep.lock():
            self.study = optuna.create_study(
                study_name=name,
                storage=sweep.storage,
                direction="maximize",
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=3)
                if sweep.args.prune
                else optuna.pruners.NopPruner(),
            )
            then = self.study.user_attrs.get("plan", plan)
            if differ := [key for key in plan if then.get(key) != plan[key]]:
                fail(
                    f"{name} was begun with another {', '.join(differ)} "
                    f"({then.get(differ[0])!r}, now {plan[differ[0]]!r}); choose another --wandb-group"
                )
            self.study.set_user_attr("plan", plan)
            present = {slot.number for slot in self.slots()}
            for number, slot in self.wanted.items():
                if number not in present:  # those of a larger --trials, or all, or those a kill prevented
                    self._enqueue(number, slot["fixed"])

    def _enqueue(self, number: int | str, params: dict[str, Any]) -> None:
        self.study.enqueue_trial(params, user_attrs={"slot": number})

    def slots(self) -> list[Slot]:
        """As they are now, in order."""
        found: dict[int | str, Slot] = {}
        for trial in self.study.get_trials(deepcopy=False):
            number = trial.user_attrs.get("slot")
            if number is not None:
                found.setdefault(number, Slot(number)).trials.append(trial)
        return [found[number] for number in sorted(found)]

    def take(self) -> Any:
        """The next waiting trial, now this process's; None if there is none."""
        import optuna

        storage = self.sweep.storage
        with self.sweep.lock():
            for waiting in self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)):
                storage.record_heartbeat(waiting._trial_id)  # before it runs: one without would never be missed
                with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                    if storage.set_trial_state_values(waiting._trial_id, optuna.trial.TrialState.RUNNING):
                        break
            else:
                return None
        # A study of its own for each: one that is asked again remembers the trials that there were the first time.
        study = optuna.load_study(
            study_name=self.study.study_name,
            storage=storage,
            sampler=self.sweep.sampler(waiting.user_attrs["slot"]),
            pruner=self.study.pruner,
        )
        study.get_trials(deepcopy=False)  # its storage knows no trial that it has not read
        return optuna.trial.Trial(study, waiting._trial_id)

    def tell(self, trial: Any, state: str, value: float | None = None, **notes: Any) -> bool:
        """False if it is no longer ours: this process was silent for so long that another took it for dead."""
        import optuna

        try:
            for name, note in notes.items():
                trial.set_user_attr(name, note)
            values = None if value is None else [value]
            self.sweep.storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState[state], values)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        return True

    def requeue(self) -> None:
        """Queues again what failed or lost its worker. Whatever is killed when, the next call makes up for it."""
        import optuna

        with self.sweep.lock():
            optuna.storages.fail_stale_trials(self.study)
            for slot in self.slots():
                if slot.state == "FAIL" and not self.given_up(slot):
                    params = next((t.params for t in reversed(slot.trials) if t.params), None)
                    if params is None or len(params) < len(self.sweep.space):  # killed before it had drawn them all
                        params = self.wanted[slot.number]["fixed"]
                    self._enqueue(slot.number, params)

    def given_up(self, slot: Slot) -> bool:
        last = slot.trials[-1].user_attrs
        return slot.state == "FAIL" and (len(slot.errors) > self.sweep.args.retries or bool(last.get("final")))

    def open(self) -> bool:
        """Whether any slot is still to be done, by whomever."""
        return any(slot.state in ("RUNNING", "WAITING", "FAIL") and not self.given_up(slot) for slot in self.slots())

    def best(self) -> Any:
        done = [slot.one_that_is("COMPLETE") for slot in self.slots() if slot.state == "DONE"]
        return max(done, key=lambda trial: trial.value, default=None)


@dataclass(eq=False)
class Attempt:
    """A trial that this process works at: one run after the other, a seed each."""

    trial: Any
    slot: dict[str, Any]
    jobs: list[Job]
    values: list[float] = field(default_factory=list)
    reported: int = 0  # tenths of the current run
    pruned: bool = False
    waits: bool = True  # for the current run to be started
    lost: bool = False

    @property
    def job(self) -> Job:
        return self.jobs[len(self.values)]


class Sweep:
    """What every queue of a sweep shares, and the loop that works at one."""

    def __init__(
        self,
        args: Args,
        folder: Path,
        group: str,
        fixed: list[str],
        base: dict[str, Any],
        space: list[Dimension],
        seeds: list[int],
    ) -> None:
        self.args, self.folder, self.group, self.fixed = args, folder, group, fixed
        self.base, self.space, self.seeds = base, space, seeds
        self.url = args.storage or f"sqlite:///{(folder / 'study.db').resolve()}"
        self.screen = Screen()
        self.plan = self._plan()
        self.storage = self._connect()

    def _plan(self) -> dict[str, Any]:
        """What must be the same for all that work at it."""
        source = self.args.script.read_bytes()
        hyperparameters = {name: value for name, value in self.base.items() if name not in INCIDENTAL}
        searched = [[d.name, d.values, d.low, d.high, d.log, d.points] for d in self.space]
        return jsonable(
            {
                "script": self.args.script.name,
                "source": hashlib.sha256(source).hexdigest(),
                "arguments": hyperparameters,
                "search": searched,
                "method": self.args.method,
                "search_seed": self.args.search_seed,
                "seeds": self.seeds,
                "prune": self.args.prune,
            }
        )

    def _connect(self) -> Any:
        import warnings

        import optuna
        import sqlalchemy

        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # the heartbeat
        kind = self.url.partition(":")[0].partition("+")[0]
        if kind not in ("sqlite", "postgresql"):
            fail("--storage is sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE")
        beat = self.args.heartbeat
        try:
            self.engine = sqlalchemy.create_engine(self.url)
            with self.lock():
                waits = {"timeout": 60} if kind == "sqlite" else {}
                return optuna.storages.RDBStorage(
                    self.url,
                    engine_kwargs={"connect_args": waits},
                    heartbeat_interval=beat,
                    grace_period=4 * beat,
                )
        except ModuleNotFoundError as error:
            fail(f"--storage {kind} needs {error.name}: pip install {error.name}")
        except sqlalchemy.exc.ArgumentError:
            fail("--storage is no address of a database")
        except sqlalchemy.exc.OperationalError as error:
            fail(f"the storage cannot be opened: {str(error.orig).splitlines()[0]}", code=6)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time, on all machines. SQLite's own would let two take the same trial."""
        import sqlalchemy

        if self.url.startswith("sqlite"):
            with locked(self.folder / "lock"):
                yield
            return
        key = int.from_bytes(hashlib.sha256(self.group.encode()).digest()[:8], "big", signed=True)
        with self.engine.connect() as connection:  # closed, and so unlocked, however this process ends
            connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:key)"), {"key": key})
            try:
                yield
            finally:
                connection.execute(sqlalchemy.text("SELECT pg_advisory_unlock(:key)"), {"key": key})

    def sampler(self, slot: int | str) -> Any:
        """Seeded by the slot: workers that began with one seed would all draw the same."""
        from optuna import samplers

        seed = int.from_bytes(hashlib.sha256(f"{self.args.search_seed} {slot}".encode()).digest()[:4], "big")
        startup = max(1, min(10, (self.args.trials or TRIALS) // 4))  # random ones, before there is anything to model
        if self.args.method == "tpe":
            return samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)
        if self.args.method == "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=startup)
        return samplers.RandomSampler(seed=seed)

    def work(self, queue: Queue, command: list[str]) -> None:
        """Until every slot of the queue is done, by this process or another."""
        self.pool = Pool(self.args.workers)
        self.pool.listen()
        attempts: list[Attempt] = []
        looked = beaten = -math.inf
        queue.requeue()
        while True:
            now = time.monotonic()
            if now - beaten > self.args.heartbeat:
                beaten = now
                for attempt in attempts:
                    self.storage.record_heartbeat(attempt.trial._trial_id)
                queue.requeue()
            while len(attempts) < self.args.workers and not self.pool.stopping:
                trial = queue.take()
                if trial is None:
                    break
                attempts.append(self.begin(queue, trial))
            self.step(queue, attempts)
            if self.pool.stopping and not self.pool.jobs:
                for attempt in attempts:
                    queue.tell(attempt.trial, "FAIL")
                queue.requeue()
                self.pool.leave(command)
            if not attempts and now - looked > 1:
                looked = now
                if not queue.open():
                    return
            if self.screen.due():
                self.screen.show(self.lines(queue, attempts))
            time.sleep(0.1 if attempts else 0.5)

    def begin(self, queue: Queue, trial: Any) -> Attempt:
        number = trial.user_attrs["slot"]
        slot = queue.wanted[number]
        name = slot.get("name")
        if name == "defaults":
            params: dict[str, Any] = {}
        else:
            params = {d.name: d.suggest(trial) for d in self.space}
        arguments = {d.name: d.argument(params[d.name]) for d in self.space if d.name in params}
        tags = ["sweep", *self.args.wandb_tags, name or f"trial-{number}"]
        jobs = []
        for seed in slot["seeds"]:
            own = ["--seed", str(seed), "--runs-dir", str(self.args.runs_dir), "--wandb-group", self.group]
            wanted = {key: value for key, value in self.base.items() if key not in INCIDENTAL}
            wanted |= {**arguments, "seed": seed, "wandb_group": self.group, "wandb_tags": tags}
            job_name = f"{name or f'trial-{number}'}-seed-{seed}"
            jobs.append(
                Job(
                    name=job_name,
                    script=self.args.script,
                    flags=[*self.fixed, *flags(params), *own, "--wandb-tags", *tags],
                    wanted=jsonable(wanted),
                    runs_dir=self.args.runs_dir,
                    total_timesteps=wanted["total_timesteps"],
                    log=self.folder / "logs" / f"{job_name}.log",
                    lock=self.folder / "locks" / job_name,
                )
            )
        return Attempt(trial, slot, jobs)

    def step(self, queue: Queue, attempts: list[Attempt]) -> None:
        """Starts, watches and ends the runs of `attempts`; those that are over leave the list."""
        ended = self.pool.poll()
        for attempt in list(attempts):
            if attempt.waits:
                if not self.pool.free or self.pool.stopping:
                    continue
                if self.pool.start(attempt.job):
                    attempt.waits = False
                elif not attempt.job.finished():  # the run of a worker that was killed, not yet ended
                    continue
            self.report(queue, attempt)
            finished = attempt.waits or attempt.job in ended
            if finished and self.end(queue, attempt):
                attempts.remove(attempt)

    def report(self, queue: Queue, attempt: Attempt) -> None:
        """Tells Optuna the mean training return of each tenth of a run, and ends a trial that is to be pruned."""
        attempt.job.look()
        progress = attempt.job.progress
        while progress is not None and attempt.reported < Progress.PARTS - 1 and not attempt.pruned:
            step, value = attempt.reported, progress.mean_return(attempt.reported)
            if value is None:
                over = progress.step * Progress.PARTS > (step + 1) * progress.total
                if not over:
                    return
            attempt.reported += 1
            if value is not None and "name" not in attempt.slot:
                if not self._tell_optuna(attempt.trial, value, len(attempt.values) * Progress.PARTS + step):
                    attempt.lost = True
                elif self.args.prune and not attempt.waits and attempt.trial.should_prune():
                    attempt.pruned = True
                    stop(attempt.job)

    def _tell_optuna(self, trial: Any, value: float, step: int) -> bool:
        import optuna

        try:
            trial.report(value, step)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        return True

    def end(self, queue: Queue, attempt: Attempt) -> bool:
        """What the end of its current run means for a trial; whether the trial is over."""
        job, title = attempt.job, self.title(attempt)
        score = job.score()
        if attempt.lost:
            self.screen.say(f"{title}: another worker has it")
            return True
        if attempt.pruned and (score is None or len(attempt.values) + 1 < len(attempt.jobs)):
            queue.tell(attempt.trial, "PRUNED")
            self.screen.say(f"{self.count(queue)} {title}: pruned at {job.look():.0%} of seed {job.wanted['seed']}")
            return True
        if score is not None:
            attempt.values.append(score)
            attempt.reported, attempt.waits = 0, True
            if len(attempt.values) < len(attempt.jobs):
                return False
            value = sum(attempt.values) / len(attempt.values)
            if queue.tell(attempt.trial, "COMPLETE", value, values=attempt.values):
                self.screen.say(f"{self.count(queue)} {title}: {value:.5g}")
            return True
        if self.pool.stopping:
            return False  # the loop gives it back
        code = job.code or 1
        error = f"exit {code}: {job.error()}"
        if code == 4:  # a step size too large is an answer
            queue.tell(attempt.trial, "PRUNED", error=error)
        else:
            queue.tell(attempt.trial, "FAIL", error=error, final=code in (2, 3))  # another try would change nothing
            queue.requeue()
        self.screen.say(f"{self.count(queue)} {title}: {'pruned' if code == 4 else 'failed'}, {error}")
        return True

    def title(self, attempt: Attempt) -> str:
        name = attempt.slot.get("name")
        if name is not None:
            return f"{name} seed {attempt.slot['seeds'][0]}"
        return f"trial {attempt.slot['slot']} ({described(attempt.trial.params)})"

    def count(self, queue: Queue) -> str:
        slots = queue.slots()
        over = sum(slot.state in ("DONE", "PRUNED") or queue.given_up(slot) for slot in slots)
        return f"[{over:>{len(str(len(slots)))}}/{len(slots)}]"

    def lines(self, queue: Queue, attempts: list[Attempt]) -> list[str]:
        slots = queue.slots()
        states = [slot.state for slot in slots]
        best = queue.best()
        said = [f"{states.count(state)} {state.lower()}" for state in dict.fromkeys(states)]
        lines = [f"{queue.study.study_name}: {len(slots)} trials, {', '.join(said)}"]
        if best is not None and best.params:
            lines.append(f"best so far {best.value:.5g} (trial {best.user_attrs['slot']}: {described(best.params)})")
        for a in attempts:
            lines.append(f"  {self.title(a)}: seed {a.job.wanted['seed']} {a.job.look():.0%}")
        return lines


def described(params: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())


def report(sweep: Sweep, tried: Queue, final: Queue, winner: Any, defaults_won: bool) -> None:
    """Prints and writes what was found: report.md, results.json, history.png, importance.png."""
    from common.tools.launch import verdict

    values: dict[str, list[float]] = {"winner": [], "defaults": []}
    for slot in final.slots():
        done = slot.one_that_is("COMPLETE")
        if done is not None:
            values[final.wanted[slot.number]["name"]].append(done.value)
    slots = tried.slots()
    lines = [f"# {sweep.group}", ""]
    lines += [f"{sweep.args.script.name} on {sweep.base['env_id']}, {sweep.args.method}, {len(slots)} trials of seeds"]
    lines[-1] += f" {sweep.args.seeds}; the value is the mean of the last greedy evaluations."
    lines += ["", f"Winner: trial {winner.user_attrs['slot']}, {described(winner.params)}: {winner.value:.5g}", ""]
    fresh = f"On the fresh seeds {sweep.args.fresh_seeds}"
    if defaults_won:
        lines += [f"The winner is the defaults. {fresh}: {verdict.summary(values['defaults'])}."]
    elif values["winner"] and values["defaults"]:
        lines += [f"{fresh}: winner {verdict.summary(values['winner'])} ({len(values['winner'])} runs),"]
        lines[-1] += f" defaults {verdict.summary(values['defaults'])} ({len(values['defaults'])} runs)."
        lines += [verdict.sentence(values["winner"], values["defaults"], winner.value)]
    else:
        lines += [f"{fresh} no run of the {'winner' if not values['winner'] else 'defaults'} came to its end."]
    shown = list(lines[4:])
    names = [d.name for d in sweep.space]
    lines += ["", f"| trial | {' | '.join(names)} | value | seeds | |", "|---" * (len(names) + 4) + "|"]
    ranked = sorted(slots, key=lambda s: -(s.one_that_is("COMPLETE").value if s.state == "DONE" else -math.inf))
    rows = []
    for slot in ranked:
        trial = slot.one_that_is("COMPLETE", "PRUNED") or slot.trials[-1]
        cells = [
            f"{trial.params.get(n):.4g}" if isinstance(trial.params.get(n), float) else str(trial.params.get(n))
            for n in names
        ]
        each = trial.user_attrs.get("values", [])
        value = f"{trial.value:.5g}" if slot.state == "DONE" else ""
        note = " ".join(filter(None, ["" if slot.state == "DONE" else slot.state.lower(), slot.error or ""]))
        cells += [value, ", ".join(f"{v:.5g}" for v in each), note.replace("|", "/")]
        lines.append(f"| {slot.number} | {' | '.join(cells)} |")
        rows.append({"trial": slot.number, "state": slot.state, "params": trial.params, "values": each})
        rows[-1] |= {"value": trial.value if slot.state == "DONE" else None, "error": slot.error}
    results = {"plan": sweep.plan, "trials": rows, "winner": winner.params, "fresh": values}
    write_file(sweep.folder / "report.md", "\n".join(lines) + "\n")
    write_file(sweep.folder / "results.json", json.dumps(results, indent=1, sort_keys=True) + "\n")
    lost = [f"trial {slot.number}: {slot.error}" for slot in slots if tried.given_up(slot)]
    lost += [f"{final.wanted[s.number]['name']}: {s.error}" for s in final.slots() if final.given_up(s)]
    print("\n" + "\n".join([*shown, *(f"failed: {line}" for line in lost)]))
    print(f"report, results and plots: {sweep.folder}", flush=True)
    _plots(sweep, tried)


def _plots(sweep: Sweep, tried: Queue) -> None:
    import warnings

    import matplotlib.pyplot as plt
    from optuna.exceptions import ExperimentalWarning
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.visualization import matplotlib as plots

    warnings.simplefilter("ignore", ExperimentalWarning)
    done = [slot.one_that_is("COMPLETE") for slot in tried.slots() if slot.state == "DONE"]
    plots.plot_optimization_history(tried.study)
    plt.savefig(sweep.folder / "history.png", dpi=120, bbox_inches="tight")
    plt.close("all")
    if len(done) < 4 or len({trial.value for trial in done}) < 2:
        print("no plot of the hyperparameters' importance: that takes 4 trials of different values")
        return
    plots.plot_param_importances(tried.study, evaluator=PedAnovaImportanceEvaluator())
    plt.savefig(sweep.folder / "importance.png", dpi=120, bbox_inches="tight")
    plt.close("all")
