"""The trials of a sweep, in an Optuna study that outlives the process. Needs optuna."""

import hashlib
import warnings
from dataclasses import dataclass, field
from typing import Any

import optuna
import sqlalchemy
from optuna import pruners, samplers
from optuna.trial import TrialState

from common.args import fail
from common.tools.launch.cli import INCIDENTAL, jsonable

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)


def sampler(method: str, search_seed: int, trials: int, slot: int | str) -> Any:
    """Seeded by the slot, so that the draws do not depend on how often the sweep was stopped."""
    seed = int.from_bytes(hashlib.sha256(f"{search_seed} {slot}".encode()).digest()[:4], "big")
    startup = max(1, min(10, trials // 4))  # random ones, before there is anything to model
    if method == "tpe":
        return samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)
    if method == "gp":
        return samplers.GPSampler(seed=seed, n_startup_trials=startup)
    return samplers.RandomSampler(seed=seed)


@dataclass
class Slot:
    """A set of hyperparameters to evaluate once, and every attempt at it, first to last: trials of Optuna."""

    number: int | str
    trials: list[Any] = field(default_factory=list)

    def trial(self, *states: str) -> Any:
        return next((trial for trial in self.trials if trial.state.name in states), None)

    @property
    def state(self) -> str:
        """DONE, PRUNED, RUNNING, WAITING or FAIL."""
        found = next((s for s in ("COMPLETE", "PRUNED", "RUNNING", "WAITING") if self.trial(s)), "FAIL")
        return "DONE" if found == "COMPLETE" else found

    @property
    def value(self) -> float | None:
        """Of the completed trial."""
        done = self.trial("COMPLETE")
        return None if done is None else done.value

    @property
    def errors(self) -> list[str]:
        """Errors of its runs; a sweep that was killed or interrupted left none."""
        return [t.user_attrs["error"] for t in self.trials if t.state.name == "FAIL" and "error" in t.user_attrs]

    @property
    def error(self) -> str | None:
        pruned = self.trial("PRUNED")
        if pruned is not None:
            return pruned.user_attrs.get("error")
        return self.errors[-1] if self.state == "FAIL" and self.errors else None


class Queue:
    """An Optuna study with a trial for each slot, waiting from the start; a failed trial is queued again."""

    def __init__(self, sweep: Any, name: str, wanted: list[dict[str, Any]]) -> None:
        self.sweep = sweep
        self.wanted = {slot["slot"]: slot for slot in wanted}
        self.plan = {  # must be the same whenever the sweep is continued
            "script": sweep.args.script.name,
            "source": hashlib.sha256(sweep.args.script.read_bytes()).hexdigest(),
            "arguments": {name: value for name, value in sweep.base.items() if name not in INCIDENTAL},
            "search": [[d.name, d.values, d.low, d.high, d.log, d.points] for d in sweep.space],
            **{name: getattr(sweep.args, name) for name in ("method", "search_seed", "prune")},
            "seeds": sweep.seeds,
        }
        plan = jsonable({**self.plan, "slots": wanted if sweep.args.method == "grid" else None})
        median = pruners.MedianPruner(n_startup_trials=5)
        options: dict[str, Any] = {"pruner": median if sweep.args.prune else pruners.NopPruner()}
        options["storage"] = f"sqlite:///{(sweep.folder / 'study.db').resolve()}"
        try:
            self.study = optuna.create_study(study_name=name, direction="maximize", load_if_exists=True, **options)
        except sqlalchemy.exc.SQLAlchemyError as error:
            fail(f"cannot open the database in {sweep.folder}: {str(error).splitlines()[0]}", code=6)
        then = self.study.user_attrs.get("plan", plan)
        if differ := [key for key in plan if then.get(key) != plan[key]]:
            was = f"({then.get(differ[0])!r}, now {plan[differ[0]]!r})"
            fail(f"{name} was begun with another {', '.join(differ)} {was}; choose another --name")
        self.study.set_user_attr("plan", plan)
        present = {slot.number for slot in self.slots()}
        for number, slot in self.wanted.items():
            if number not in present:  # those of a larger --trials, or all, or those a kill prevented
                self.study.enqueue_trial(slot["fixed"], user_attrs={"slot": number})
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):  # of a process that was killed
            self.study.tell(trial.number, state=TrialState.FAIL)
        self.requeue()

    def slots(self) -> list[Slot]:
        """As they are now, in order."""
        found: dict[int | str, Slot] = {}
        for trial in self.study.get_trials(deepcopy=False):
            number = trial.user_attrs["slot"]
            found.setdefault(number, Slot(number)).trials.append(trial)
        return [found[number] for number in sorted(found)]

    def take(self) -> Any:
        """The next waiting trial; None if there is none."""
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting:
            return None
        args = self.sweep.args
        self.study.sampler = sampler(args.method, args.search_seed, self.sweep.trials, waiting[0].user_attrs["slot"])
        return self.study.ask()

    def tell(self, trial: Any, state: str, value: float | None = None, **notes: Any) -> None:
        """Ends a trial."""
        for name, note in notes.items():
            trial.set_user_attr(name, note)
        self.study.tell(trial, value, TrialState[state])
        self.requeue()

    def requeue(self) -> None:
        """Queues failed slots again, with the hyperparameters they had."""
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

    def best(self) -> Any:
        """The completed trial of the highest value; None if there is none."""
        done = [slot.trial("COMPLETE") for slot in self.slots() if slot.state == "DONE"]
        return max(done, key=lambda trial: trial.value, default=None)
