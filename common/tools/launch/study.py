"""The trials of a sweep, in a database: a queue that several processes share. Needs optuna."""

import contextlib
import hashlib
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import sqlalchemy
from optuna import pruners, samplers
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from common.args import fail
from common.tools.launch.cli import INCIDENTAL, jsonable
from common.tools.launch.jobs import locked

if TYPE_CHECKING:
    from common.tools.launch.sweep import Sweep

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # the heartbeat, and plots


def open_storage(folder: Path, heartbeat: int) -> Any:
    """The database of a sweep; code 6 if it cannot be opened."""
    options = {"heartbeat_interval": heartbeat, "grace_period": 4 * heartbeat}
    try:
        with locked(folder / "lock"):
            url = f"sqlite:///{(folder / 'study.db').resolve()}"
            return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}}, **options)
    except sqlalchemy.exc.OperationalError as error:
        fail(f"cannot open the database in {folder}: {str(error.orig).splitlines()[0]}", code=6)


def sampler(method: str, search_seed: int, trials: int, slot: int | str) -> Any:
    """Seeded by the slot: workers that began with one seed would all draw the same."""
    seed = int.from_bytes(hashlib.sha256(f"{search_seed} {slot}".encode()).digest()[:4], "big")
    startup = max(1, min(10, trials // 4))  # random ones, before there is anything to model
    if method == "tpe":
        return samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)
    if method == "gp":
        return samplers.GPSampler(seed=seed, n_startup_trials=startup)
    return samplers.RandomSampler(seed=seed)


@dataclass
class Slot:
    """A trial that is to be done once, whatever happens to those who do it: Optuna's trials of it, first to last."""

    number: int | str
    trials: list[Any] = field(default_factory=list)

    def trial(self, *states: str) -> Any:
        return next((trial for trial in self.trials if trial.state.name in states), None)

    @property
    def state(self) -> str:
        """DONE, PRUNED, RUNNING, WAITING, or FAIL, which may be tried again."""
        found = next((s for s in ("COMPLETE", "PRUNED", "RUNNING", "WAITING") if self.trial(s)), "FAIL")
        return "DONE" if found == "COMPLETE" else found

    @property
    def value(self) -> float | None:
        """Of the trial that is done."""
        done = self.trial("COMPLETE")
        return None if done is None else done.value

    @property
    def errors(self) -> list[str]:
        """Of its runs; a worker that was killed or interrupted left none."""
        return [t.user_attrs["error"] for t in self.trials if t.state.name == "FAIL" and "error" in t.user_attrs]

    @property
    def error(self) -> str | None:
        pruned = self.trial("PRUNED")
        if pruned is not None:
            return pruned.user_attrs.get("error")
        return self.errors[-1] if self.state == "FAIL" and self.errors else None


class Queue:
    """An Optuna study in which every slot is a waiting trial from the start: there are neither more nor fewer."""

    def __init__(self, sweep: "Sweep", name: str, wanted: list[dict[str, Any]]) -> None:
        self.sweep, self.storage = sweep, sweep.storage
        self.wanted = {slot["slot"]: slot for slot in wanted}
        self.plan = {  # what must be the same for all that work at it
            "script": sweep.args.script.name,
            "source": hashlib.sha256(sweep.args.script.read_bytes()).hexdigest(),
            "arguments": {name: value for name, value in sweep.base.items() if name not in INCIDENTAL},
            "search": [[d.name, d.values, d.low, d.high, d.log, d.points] for d in sweep.space],
            **{name: getattr(sweep.args, name) for name in ("method", "search_seed", "prune")},
            "seeds": sweep.seeds,
        }
        plan = jsonable({**self.plan, "slots": wanted if sweep.args.method == "grid" else None})
        median = pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=3)
        self.pruner = median if sweep.args.prune else pruners.NopPruner()
        with self.lock():
            self.study = optuna.create_study(
                study_name=name, storage=self.storage, direction="maximize", load_if_exists=True, pruner=self.pruner
            )
            then = self.study.user_attrs.get("plan", plan)
            if differ := [key for key in plan if then.get(key) != plan[key]]:
                was = f"({then.get(differ[0])!r}, now {plan[differ[0]]!r})"
                fail(f"{name} was begun with another {', '.join(differ)} {was}; choose another --wandb-group")
            self.study.set_user_attr("plan", plan)
            present = {slot.number for slot in self.slots()}
            for number, slot in self.wanted.items():
                if number not in present:  # those of a larger --trials, or all, or those a kill prevented
                    self.study.enqueue_trial(slot["fixed"], user_attrs={"slot": number})

    def lock(self) -> AbstractContextManager[Any]:
        """One process at a time: SQLite's own lock would let two take the same trial."""
        return locked(self.sweep.folder / "lock")

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
        with self.lock():
            for waiting in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                self.storage.record_heartbeat(waiting._trial_id)  # before it runs: one without would never be missed
                with contextlib.suppress(UpdateFinishedTrialError):
                    if self.storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):
                        break
            else:
                return None
        args, name = self.sweep.args, self.study.study_name
        draws = sampler(args.method, args.search_seed, self.sweep.trials, waiting.user_attrs["slot"])
        # A study of its own for each: one that is asked again remembers the trials that there were the first time.
        study = optuna.load_study(study_name=name, storage=self.storage, sampler=draws, pruner=self.pruner)
        study.get_trials(deepcopy=False)  # its storage knows no trial that it has not read
        return optuna.trial.Trial(study, waiting._trial_id)

    def tell(self, trial: Any, state: str, value: float | None = None, **notes: Any) -> bool:
        """Ends a trial. False if another process has taken it, because this one was silent for so long."""
        with contextlib.suppress(UpdateFinishedTrialError):
            for name, note in notes.items():
                trial.set_user_attr(name, note)
            values = None if value is None else [value]
            self.storage.set_trial_state_values(trial._trial_id, TrialState[state], values)
            return True
        return False

    def report(self, trial: Any, value: float, step: int) -> bool:
        """Takes an intermediate value; whether the trial is to be pruned."""
        with contextlib.suppress(UpdateFinishedTrialError):
            trial.report(value, step)
            return trial.should_prune()
        return False

    def requeue(self) -> None:
        """Queues again what failed or lost its worker. If this is killed, the next call makes up for it."""
        with self.lock():
            optuna.storages.fail_stale_trials(self.study)
            for slot in self.slots():
                if slot.state == "FAIL" and not self.given_up(slot):
                    params: dict[str, Any] = next((t.params for t in reversed(slot.trials) if t.params), {})
                    if len(params) < len(self.sweep.space):  # killed before it had drawn them all
                        params = self.wanted[slot.number]["fixed"]
                    self.study.enqueue_trial(params, user_attrs={"slot": slot.number})

    def given_up(self, slot: Slot) -> bool:
        final = bool(slot.trials[-1].user_attrs.get("final"))
        return slot.state == "FAIL" and (final or len(slot.errors) > self.sweep.args.retries)

    def count(self) -> str:
        """How many slots are over, of how many."""
        slots = self.slots()
        over = sum(slot.state in ("DONE", "PRUNED") or self.given_up(slot) for slot in slots)
        return f"[{over:>{len(str(len(slots)))}}/{len(slots)}]"

    def open(self) -> bool:
        """Whether any slot is still to be done, by whomever."""
        return any(slot.state not in ("DONE", "PRUNED") and not self.given_up(slot) for slot in self.slots())

    def best(self) -> Any:
        """The trial of the highest value, if one is done."""
        done = [slot.trial("COMPLETE") for slot in self.slots() if slot.state == "DONE"]
        return max(done, key=lambda trial: trial.value, default=None)
