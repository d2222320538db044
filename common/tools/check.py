"""Checks that a script, a fork of yours included, handles episodes, time limits, seeds, flags and logging rightly.

    python -m common check my_ppo.py

Runs the script as it is, many times for a moment, in worlds whose right answers are known, and prints one line a check:
PASS and what was seen, FAIL and what that means, or SKIP and why. Exit code 0 if none failed, else 1.
docs/check.md says what each check sees, and what none of them does.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

from tyro.conf import Positional, arg

from common.args import fail, parse
from common.tools import witness
from common.tools.launch import as_words

TIMEOUT = 600  # seconds that one run may take; it takes about one
QUIET: dict[str, Any] = {"track": False, "cuda": False, "capture_video": False, "eval_episodes": 0, "eval_interval": 0}
QUIET |= {"save_interval": 0, "runs_dir": "runs"}
GAMMA = 0.5  # of the worlds whose values are known
RATES = ("learning_rate", "policy_lr", "q_lr")
VALUES = ("losses/q_values", "losses/values", "losses/qf1_values", "losses/qf2_values")
CLOSED_FORMS = {"Constant": 1.0, "Endless": 2.0, "Ladder": 1.5}
MEANING = {
    "Constant": "one step, reward 1, terminated: more than 1 means that values are carried over the end of an episode",
    "Endless": "reward 1 for ever, cut by a time limit: less than 2 means that the cut is taken for the end",
    "Ladder": "1.0 means that a cut episode bootstraps from the observation after the reset, 0.75 from none",
}


@dataclass
class Args:
    script: Annotated[Positional[Path], arg(metavar="SCRIPT")]
    """the script to check"""
    only: tuple[str, ...] = ()
    """names of checks to make (default: all)"""
    debug: bool = False
    """print the whole traceback of an error"""


class Failed(Exception):  # noqa: N818 - a verdict
    """What was seen, and what it means."""


class Skipped(Exception):  # noqa: N818
    """Why there is nothing to see."""


@dataclass
class Verdict:
    word: str  # PASS, FAIL or SKIP
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.word}  {self.name:<13} {self.text}"


@dataclass
class Trace:
    """What one run left behind."""

    code: int
    folder: Path

    @property
    def error(self) -> str:
        lines = [line for line in (self.folder / "err").read_text("utf-8").splitlines() if line.strip()]
        return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "no word")

    @functools.cached_property
    def run_dir(self) -> Path:
        found = list((self.folder / "runs").glob("*"))
        if len(found) != 1:
            raise Failed(f"it left {len(found)} run directories where one is due: common.track makes it")
        return found[0]

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]

    def logged(self, key: str) -> list[tuple[int, float]]:
        return [(row["global_step"], row[key]) for row in self.rows if key in row]

    @functools.cached_property
    def notes(self) -> dict[str, Any]:
        import torch

        if not (self.folder / witness.REPORT).exists():
            raise Failed("it ends its process itself, before anything could be noted")
        return torch.load(self.folder / witness.REPORT, weights_only=True)

    @functools.cached_property
    def weights(self) -> dict[str, Any]:
        import torch

        try:
            return torch.load(self.run_dir / "policy.pt", weights_only=True)["state_dict"]
        except FileNotFoundError:
            raise Failed("it left no policy.pt: run.save_policy(policy) writes it") from None

    @property
    def end(self) -> int:
        """The step at which the run says that it ended."""
        try:
            return json.loads((self.run_dir / "finished.json").read_text())["global_step"]
        except FileNotFoundError:
            raise Failed("it left no finished.json: run.finish() at its end writes it") from None

    @functools.cached_property
    def told(self) -> list[dict[str, Any]]:
        """Its rows but for the clock and for evaluation."""
        left_out = "eval/", "time", "charts/SPS", "health/time_"
        rows = [{k: v for k, v in row.items() if not k.startswith(left_out)} for row in self.rows]
        return [row for row in rows if row.keys() != {"global_step"}]

    def played(self, num_envs: int) -> list[dict[str, Any]]:
        """The environments it trained in: of those that ever took a step, the first."""
        return [world for world in self.notes["worlds"] if len(world["rewards"])][:num_envs]


class Lab:
    """A script, the folder it is run in, and the runs so far: many checks look at the same ones."""

    def __init__(self, script: Path) -> None:
        self.script = script.resolve()
        if not self.script.is_file():
            fail(f"there is no script {script}")
        self.folder = tempfile.TemporaryDirectory(prefix="check-", ignore_cleanup_errors=True)
        self.server = witness.server(self.script)
        self.runs: dict[str, Trace] = {}
        about = self._start(witness.describe)
        if about.code:
            fail(f"{script} cannot be checked: {about.error.removeprefix('error: ')}")
        self.flags: dict[str, dict[str, Any]] = json.loads((about.folder / "flags.json").read_text())
        self.replays = "buffer_size" in self.flags  # so that it learns from each step many times
        tried = {space: self.trial(f"Drift-{space}", **self.small) for space in ("Discrete", "Box")}
        self.spaces = [space for space, trace in tried.items() if trace.code == 0]
        self.refused = {space: trace.error for space, trace in tried.items() if trace.code != 0}
        if not self.spaces:
            why = "; ".join(f"{space}: {error.removeprefix('error: ')}" for space, error in self.refused.items())
            fail(f"{script} runs with neither kind of actions. {why}", code=1)

    @functools.cached_property
    def small(self) -> dict[str, Any]:
        """Flags of a run of a few hundred steps in which as much as possible happens: buffers fill, targets move."""
        wanted: dict[str, Any] = {"total_timesteps": 400 if self.replays else 320, "num_envs": 1 if self.replays else 2}
        wanted |= {"learning_starts": 100, "buffer_size": 200, "batch_size": 16, "num_steps": 16, "log_interval": 40}
        wanted |= {"hidden_sizes": [16, 16], **dict.fromkeys(RATES, 0.01)}
        for name, most in (("target_network_frequency", 20), ("update_epochs", 4)):
            wanted[name] = min(self.default(name, most), most)
        return {name: value for name, value in wanted.items() if name in self.flags}

    def learning(self, steps: int) -> dict[str, Any]:
        """Flags with which `steps` steps suffice to learn a value."""
        wanted: dict[str, Any] = {"total_timesteps": steps, "gamma": GAMMA, "hidden_sizes": [32, 32]}
        wanted |= {"learning_starts": 100, "buffer_size": 10_000, "log_interval": 50, "alpha": 0.0}
        wanted |= {"v_min": -4.0, "v_max": 4.0}
        wanted |= {"tau": max(self.default("tau", 1.0), 0.05)}
        wanted |= {name: max(self.default(name, 0.0), 3e-3) for name in RATES}
        for name, most in (("batch_size", 64), ("target_network_frequency", 20), ("num_steps", 16)):
            wanted[name] = min(self.default(name, most), most)
        return {name: value for name, value in wanted.items() if name in self.flags}

    @property
    def epsilon(self) -> dict[str, Any]:
        """Flags with which it explores by epsilon."""
        return {"noisy": False} if "noisy" in self.flags else {}

    def default(self, name: str, otherwise: Any) -> Any:
        return self.flags[name]["default"] if name in self.flags else otherwise

    def trial(self, world: str, stop: tuple[int, int] | None = None, again: int = 0, **flags: Any) -> Trace:
        """A run, whatever became of it. `again` tells apart runs that ought to be the same."""
        words = ["--env-id", f"Check-{world}-v0", *as_words(QUIET | flags)]
        key = repr((words, stop, again))
        if key not in self.runs:
            self.runs[key] = self._start(witness.play, words, stop)
        return self.runs[key]

    def run(self, world: str, **flags: Any) -> Trace:
        """A run that has to come to its end."""
        trace = self.trial(world, **flags)
        if trace.code:
            raise Failed(f"in {world} it ends with exit code {trace.code}: {trace.error}")
        return trace

    def base(self, **flags: Any) -> Trace:
        return self.run(f"Drift-{self.spaces[0]}", **{**self.small, **flags})

    def resumed(self, stopped: Trace) -> Trace:
        trace = self._start(witness.play, ["--resume", str(stopped.run_dir)], None, folder=stopped.folder)
        if trace.code:
            raise Failed(f"--resume ends with exit code {trace.code}: {trace.error}")
        return trace

    def ledgers(self) -> Iterator[tuple[str, int, Trace]]:
        """Runs in the worlds whose every step is told apart: name, number of environments, run."""
        for world, num_envs in (("Terminating", 1), ("Truncating", 1), ("Mixed", 1), ("Mixed", 3), ("Uneven", 3)):
            flags = {**self.small, "num_envs": num_envs, "total_timesteps": 200}
            yield world, num_envs, self.run(f"{world}-{self.spaces[0]}", **flags)

    def close(self) -> None:
        """Removes what the runs left behind."""
        self.folder.cleanup()

    def _start(self, target: Callable[..., None], *words: Any, folder: Path | None = None) -> Trace:
        if folder is None:
            folder = Path(self.folder.name) / f"{len(list(Path(self.folder.name).iterdir())):03d}"
            folder.mkdir()
        process = self.server.Process(target=target, args=(str(self.script), str(folder), dict(os.environ), *words))
        process.start()
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
            process.join()
            (folder / "err").write_text(f"error: it had not ended after {TIMEOUT} s\n")
        return Trace(process.exitcode, folder)


# --- what happened is what is stored, counted and logged


def transitions(lab: Lab) -> str:
    """Each step of each environment is stored once, as it was, and none leads from one episode into another."""
    count, kinds = 0, set[str]()
    for world, num_envs, trace in lab.ledgers():
        where = f"{world}, {num_envs} environment{'s' * (num_envs > 1)}"
        if not trace.notes["stored"]:
            raise Skipped("it stores nothing in common's ReplayBuffer or RolloutStorage; see values")
        for stored in trace.notes["stored"]:
            if "obs" not in stored:
                raise Skipped(f"it stores {', '.join(stored)}, and no obs")
            count += _compare_stored(stored, trace.played(num_envs), where, lab.default("gamma", 0.99))
            kinds |= stored.keys() & {"actions", "rewards", "next_obs", "terminations", "truncations"}
    return f"{count:,} stored steps of 5 worlds are the ones that happened ({', '.join(['obs', *sorted(kinds)])})"


def _compare_stored(stored: dict[str, Any], played: list[dict[str, Any]], where: str, gamma: float) -> int:
    """Identifies each stored step by its observation, which no other step has, and looks for it in what happened."""
    happened = {_name(world["obs"][t]): (n, t) for n, world in enumerate(played) for t in range(len(world["rewards"]))}
    rewards: dict[float, float] = {}
    seen: set[tuple[int, int]] = set()
    longest = 1
    steps, num_envs = stored["obs"].shape[:2]
    for t, env in itertools.product(range(steps), range(num_envs)):
        step = {name: values[t, env] for name, values in stored.items()}
        place = happened.get(_name(step["obs"]))
        if place is None:
            if not seen:
                raise Skipped("it stores observations that are not the environment's (normalised?); see values")
            ended = _name(step["obs"]) in {_name(obs) for world in played for obs in world["next_obs"]}
            what = "the last one of an episode, on which no action follows" if ended else "none that was seen"
            raise Failed(f"{where}: a stored obs is {what}, at step {t} of environment {env}")
        if place in seen:
            raise Failed(f"{where}: the step from {_say(step['obs'])} is stored twice")
        seen.add(place)
        world, first = played[place[0]], place[1]
        length = 1
        if "next_obs" in step:
            length = _length(world, first, step["next_obs"])
            if length == 0:
                raise Failed(
                    f"{where}: the step from {_say(step['obs'])} is stored as leading to {_say(step['next_obs'])}; it "
                    f"led to {_say(world['next_obs'][first])} (environment, episode, time). At the end of an episode, "
                    "common.final_obs(next_obs, infos) has it"
                )
        longest = max(longest, length)
        last = first + length - 1
        for name in ("terminations", "truncations"):
            if name in step and bool(step[name]) != bool(world[name][last]):
                told = f"{bool(step[name])}, where it was {bool(world[name][last])}"
                means = "a time limit is taken for death" if name == "terminations" and step[name] else "ends are lost"
                raise Failed(f"{where}: of the step from {_say(step['obs'])} {name} is stored as {told}: {means}")
        if "actions" in step and step["actions"].numel() == world["actions"][first].numel():
            kept, sent = (x.double().flatten().tolist() for x in (step["actions"], world["actions"][first]))
            box = world["actions"].is_floating_point()  # a Box action outside its bounds, -1 and 1, arrives clipped
            if not all(
                math.isclose(min(max(x, -1), 1) if box else x, y, abs_tol=1e-6) for x, y in zip(kept, sent, strict=True)
            ):
                raise Failed(
                    f"{where}: for the step from {_say(step['obs'])} action {kept} is stored, {sent} was played"
                )
        if "rewards" in step:
            paid = sum(gamma**i * float(world["rewards"][first + i]) for i in range(length))
            reward = float(step["rewards"])
            usual = rewards.setdefault(paid, reward) if length == 1 else paid  # clipped or scaled is still a function
            if not math.isclose(reward, usual, rel_tol=1e-4, abs_tol=1e-6):
                raise Failed(
                    f"{where}: for the step from {_say(step['obs'])} {paid:g} was paid and {reward:g} is stored"
                    + (f", for others that paid as much {usual:g}" if length == 1 else "")
                )
    if "rewards" in stored and len(rewards) > 1 and len(set(rewards.values())) == 1:
        raise Failed(f"{where}: every reward is stored as {reward:g}, and {len(rewards)} different ones were paid")
    missing = len(happened) - len(seen)
    if missing > len(played) * (longest - 1):
        raise Failed(f"{where}: {missing} of {len(happened)} steps are not stored")
    return len(seen)


def _name(obs: Any) -> bytes:
    return obs.float().numpy().tobytes()


def _say(obs: Any) -> str:
    from common.tools.worlds import Ledger

    return "(" + ", ".join(f"{x:g}" for x in (obs.float() / Ledger.UNIT).tolist()) + ")"


def _length(world: dict[str, Any], first: int, next_obs: Any) -> int:
    """Steps from `first` to `next_obs` within one episode; 0 if it lies in none."""
    for t in range(first, len(world["rewards"])):
        if _name(world["next_obs"][t]) == _name(next_obs):
            return t - first + 1
        if world["terminations"][t] or world["truncations"][t]:
            break
    return 0


def returns(lab: Lab) -> str:
    """Every episode is logged once: its return, its length, and the step at which it ended."""
    count = 0
    for world, num_envs, trace in lab.ledgers():
        paid = []
        for played in trace.played(num_envs):
            begin = 0
            for t in range(len(played["rewards"])):
                if played["terminations"][t] or played["truncations"][t]:
                    paid.append(
                        ((t + 1) * num_envs, round(float(played["rewards"][begin : t + 1].sum()), 3), t + 1 - begin)
                    )
                    begin = t + 1
        logged = [
            (row["global_step"], round(row["charts/episodic_return"], 3), int(row["charts/episodic_length"]))
            for row in trace.rows
            if "charts/episodic_return" in row and "charts/episodic_length" in row
        ]
        where = f"{world}, {num_envs} environment{'s' * (num_envs > 1)}"
        if not logged:
            raise Failed(
                f"{where}: {len(paid)} episodes ended and none is logged: run.log_episodes(infos, global_step)"
            )
        if sorted(x[1:] for x in paid) != sorted(x[1:] for x in logged):
            raise Failed(
                f"{where}: {len(paid)} episodes ended, {len(logged)} are logged; the first returns were "
                f"{[x[1] for x in sorted(paid)[:4]]}, logged are {[x[1] for x in sorted(logged)[:4]]}"
            )
        if sorted(paid) != sorted(logged):
            a, b = next((a, b) for a, b in zip(sorted(paid), sorted(logged), strict=True) if a != b)
            raise Failed(
                f"{where}: an episode that ended at environment step {a[0]} is logged at {b[0]}: the x axis is not the "
                "number of steps of all environments"
            )
        count += len(paid)
    return f"{count} episodes of 1 and 3 environments are logged with the return, length and step they ended with"


def steps(lab: Lab) -> str:
    """As many steps are taken as the budget says, over all environments; rows are in the order of their steps."""
    said = []
    for world, num_envs, trace in lab.ledgers():
        taken = sum(len(played["rewards"]) for played in trace.played(num_envs))
        batch = num_envs * lab.small.get("num_steps", 1)
        where = f"{world}, {num_envs} environment{'s' * (num_envs > 1)}"
        if not 200 <= taken < 200 + batch:
            raise Failed(
                f"{where}: {taken} environment steps were taken for --total-timesteps 200 (up to {200 + batch - 1} are "
                "right, for a whole rollout): global_step has to grow by num_envs a step"
            )
        axis = [row["global_step"] for row in trace.rows]
        if axis != sorted(axis) or (axis and axis[-1] > taken):
            raise Failed(f"{where}: the x axis ends at {axis[-1]} after {taken} steps, or runs backwards")
        if trace.end != taken:
            raise Failed(f"{where}: the run says it ended at step {trace.end}, and {taken} were taken")
        said.append(f"{taken} steps in {num_envs}")
    return f"for --total-timesteps 200: {', '.join(dict.fromkeys(said))} environments; the x axis counts all"


def exploration(lab: Lab) -> str:
    """Each environment is acted in by draws of its own; with an epsilon, it is really used."""
    trace = lab.run(f"Uneven-{lab.spaces[0]}", **{**lab.small, "num_envs": 3, "total_timesteps": 200})
    few = 30 if lab.spaces[0] == "Box" else None  # two real numbers are never equal by chance
    rows = [played["actions"][:few].flatten().tolist() for played in trace.played(3)]
    for a, b in itertools.combinations(range(len(rows)), 2):
        if rows[a] == rows[b]:
            raise Failed(f"environments {a} and {b} get the same {len(rows[a])} actions: they share one draw")
    text = "three environments get three series of actions"
    if not {"start_e", "end_e", "exploration_fraction", "learning_starts"} <= lab.flags.keys():
        return text
    flags = {
        "start_e": 1.0,
        "end_e": 0.0,
        "exploration_fraction": 0.5,
        "total_timesteps": 1000,
        "learning_starts": 1000,
        **lab.epsilon,
    }
    (played,) = lab.run("Constant-Discrete", **{**lab.small, **flags, "num_envs": 1}).played(1)
    actions = played["actions"].float()
    early, late = float(actions[:100].mean()), float(actions[500:].mean())
    if not 0.25 < early < 0.75:
        raise Failed(
            f"with --start-e 1 the first 100 actions are nearly all the same ({100 * early:.0f} % action 1 of 2): they "
            "are not drawn with epsilon"
        )
    if late not in (0.0, 1.0):
        raise Failed(
            f"with --end-e 0, and no learning, the second half still has both actions ({100 * late:.0f} % action 1): "
            "epsilon has not fallen"
        )
    return f"{text}; with epsilon 1 both actions come, with epsilon 0 the greedy one alone"


# --- learning happens, and depends on what it should


def parameters(lab: Lab) -> str:
    """Every parameter of every network moves, target networks too; policy.pt holds the trained one."""
    import torch

    trace = lab.base()
    first, last = trace.notes["first"], trace.notes["last"]
    if not first:
        raise Skipped("it has no common.Checkpoint(run, envs, network=network, ...) that names its networks")
    still = [
        f"{part}.{name}"
        for part in first
        for name, value in first[part].items()
        if value.numel() and torch.equal(value, last[part][name])
    ]
    total = sum(value.numel() > 0 for tensors in first.values() for value in tensors.values())
    if still:
        raise Failed(f"{len(still)} of {total} parameter tensors never change: {', '.join(still[:4])}")
    kept = trace.weights
    if not any(
        kept.keys() >= part.keys() and all(torch.equal(kept[name], value) for name, value in part.items())
        for part in last.values()
        if part
    ):
        raise Failed("policy.pt holds none of the networks as they were at the end")
    networks = ", ".join(part for part, tensors in first.items() if tensors)
    return f"all {total} parameter tensors of {networks} change; policy.pt is the trained policy"


def seed(lab: Lab) -> str:
    """The same seed gives the same run to the bit; another seed reaches networks, environments and actions."""
    one, again, other = lab.base(), lab.base(again=1), lab.base(seed=lab.default("seed", 1) + 1)
    if difference := _difference(one, again):
        raise Failed(f"two runs with the same seed differ: {difference}. Something draws from a generator of its own")
    seeds = [[s for world in trace.notes["worlds"] for s in world["seeds"]] for trace in (one, other)]
    if not seeds[0] or seeds[0][0] is None:
        raise Failed("the environments are reset without a seed")
    if {s for s in seeds[0] if s is not None} & {s for s in seeds[1] if s is not None}:
        raise Failed("with another --seed the environments are reset with the same seeds")
    three = lab.run(f"Uneven-{lab.spaces[0]}", **{**lab.small, "num_envs": 3, "total_timesteps": 200})
    mine = [{s for s in world["seeds"] if s is not None} for world in three.notes["worlds"]]
    if any(a & b for a, b in itertools.combinations(mine, 2)):
        raise Failed("several environments are reset with the same seed: they play the same episodes")
    drawn = [
        part
        for part, tensors in one.notes["first"].items()
        if any(value.numel() and value.std(correction=0) > 0 for value in tensors.values())
    ]
    for part in drawn:
        if _equal(one.notes["first"][part], other.notes["first"][part]):
            raise Failed(f"with another --seed {part} begins with the same weights: the seed does not reach them")
    if all(_equal_actions(one, other)):
        raise Failed("with another --seed the same actions are taken")
    if _equal(one.weights, other.weights):
        raise Failed("with another --seed the same weights are learnt")
    return "twice the same seed: the same weights, metrics and actions, to the bit; another seed: others of each"


def _equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _equal_actions(a: Trace, b: Trace) -> list[bool]:
    import torch

    pairs = zip(a.notes["worlds"], b.notes["worlds"], strict=False)
    return [torch.equal(x["actions"], y["actions"]) for x, y in pairs if len(x["actions"])]


def _difference(a: Trace, b: Trace, skip_actions: bool = False) -> str:
    """The first thing in which two runs differ, in a few words; empty if in none."""
    if not skip_actions and not all(_equal_actions(a, b)):
        return "other actions were taken"
    if not _equal(a.weights, b.weights):
        return "other weights in policy.pt"
    states = a.notes["state"], b.notes["state"]
    for part in states[0]:
        if states[0][part] != states[1].get(part):
            return f"another state of {part}"
    if a.told != b.told:
        return "other rows in metrics.jsonl"
    return ""


def evaluation(lab: Lab) -> str:
    """Evaluating and filming change nothing that is learnt; what is logged is what the policy was paid."""
    plain = lab.base()
    every = lab.small["total_timesteps"] // 3
    evaluated = lab.base(eval_episodes=3, eval_interval=every)
    filmed = lab.base(eval_episodes=2, eval_interval=every, capture_video=True)
    for trace, what in ((evaluated, "evaluation"), (filmed, "evaluation with a film")):
        if difference := _difference(plain, trace):
            raise Failed(f"{what} changes what is learnt ({difference}): it shares generators or environments with it")
    scores = evaluated.logged("eval/episodic_return")
    if not scores:
        raise Failed("nothing is logged as eval/episodic_return: evaluation = common.Evaluation(run, policy)")
    if scores[-1][0] != evaluated.end or len(scores) < 2:
        when = [step for step, _ in scores]
        raise Failed(f"with --eval-interval {every} it is evaluated at {when}, and ended at {evaluated.end}")
    if not list((filmed.run_dir / "videos").glob("*.mp4")):
        raise Failed("--capture-video leaves no film")
    worlds = evaluated.notes["worlds"][lab.small.get("num_envs", 1) :]
    if len(worlds) == 3 * len(scores):
        for k, (at, score) in enumerate(scores):
            paid = sum(_first_return(world) for world in worlds[3 * k : 3 * k + 3]) / 3
            if not math.isclose(paid, score, rel_tol=1e-4, abs_tol=1e-4):
                raise Failed(f"at step {at} three episodes paid {paid:g} on average, and {score:g} is logged")
    return f"evaluated {len(scores)} times, the last at the end, or filmed, or neither: the same weights and actions"


def _first_return(world: dict[str, Any]) -> float:
    ends = (world["terminations"] | world["truncations"]).nonzero()
    return float(world["rewards"][: int(ends[0]) + 1].sum())


def flags(lab: Lab) -> str:
    """Every flag that the script adds to common's changes something: weights, actions, metrics."""
    own = {name: flag["others"] for name, flag in lab.flags.items() if flag["others"] is not None}
    switches = {name: values[0] for name, values in own.items() if isinstance(lab.flags[name]["default"], bool)}
    untried, tried = [], []
    for name, values in own.items():
        # first as it is; then with other actions; then with each switch turned, those of a like name first
        nearest = sorted(switches, key=lambda other: -_alike(name, other))
        settings: list[tuple[str, dict[str, Any]]] = [(space, {}) for space in lab.spaces]
        settings += [(space, {other: switches[other]}) for other in nearest if other != name for space in lab.spaces]
        outcomes: list[bool | None] = []
        while settings and not any(outcomes):
            outcomes.append(_takes_effect(lab, name, values, *settings.pop(0)))
        if any(outcomes):
            tried.append(name)
        elif False in outcomes:
            given = ", ".join(map(str, values))
            raise Failed(f"--{name.replace('_', '-')} changes nothing: the run is the same with {given}")
        else:
            untried.append(name)
    also = f"; of {', '.join(untried)} no other value is known" if untried else ""
    return f"each of its {len(tried)} own flags changes the run{also}"


def _alike(a: str, b: str) -> int:
    """Characters that both names begin with."""
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


def _takes_effect(lab: Lab, name: str, values: list[Any], space: str, switched: dict[str, Any]) -> bool | None:
    """Whether one of the values makes another run; None if none of them is accepted."""
    plain = lab.trial(f"Drift-{space}", **{**lab.small, **switched})
    if plain.code == 2:
        return None
    if plain.code:
        raise Failed(f"{' '.join(as_words(switched))} ends with exit code {plain.code}: {plain.error}")
    accepted = False
    for value in values:
        trace = lab.trial(f"Drift-{space}", **{**lab.small, **switched, name: value})
        if trace.code not in (0, 2):
            given = " ".join(as_words({**switched, name: value}))
            raise Failed(f"{given} ends with exit code {trace.code}: {trace.error}")
        accepted |= trace.code == 0
        if trace.code == 0 and _difference(plain, trace):
            return True
    return False if accepted else None


def resume(lab: Lab) -> str:
    """Killed, or stopped by a signal, and resumed: the same weights, optimizers and metrics as a run left alone."""
    import signal

    total = lab.small["total_timesteps"]
    each = total // lab.small.get("num_envs", 1)  # steps of the first environment
    often = {"save_interval": total // 5}
    whole = lab.base(**often)
    if not list((whole.run_dir / "checkpoints").glob("step-*.pt")):
        raise Failed(
            "with --save-interval it writes no checkpoint: checkpoint.save(global_step) at the end of its loop"
        )
    for number, at in ((signal.SIGKILL, 7 * each // 10), (signal.SIGTERM, 9 * each // 20)):
        world = f"Drift-{lab.spaces[0]}"
        stopped = lab.trial(world, stop=(int(number), at), **{**lab.small, **often})
        right = -number if number == signal.SIGKILL else 128 + number
        if stopped.code != right:
            raise Failed(
                f"{number.name} in mid-run ends it with exit code {stopped.code}, not {right}: {stopped.error}"
            )
        resumed = lab.resumed(stopped)
        if difference := _difference(whole, resumed, skip_actions=True):
            raise Failed(
                f"after {number.name} and --resume it does not go on as it would have: {difference}. All that is "
                "learnt or counted has to be named in common.Checkpoint(run, envs, ...)"
            )
    return "killed at 70 %, stopped by SIGTERM at 45 %, and resumed: weights, optimizers and metrics to the bit"


def schedules(lab: Lab) -> str:
    """Epsilon and the learning rate are logged as their flags say, from their start to their end."""
    total, said = lab.small["total_timesteps"], []
    slack = lab.small.get("num_envs", 1) * lab.small.get("num_steps", 1)
    if "anneal_lr" in lab.flags and (rate := next((name for name in RATES if name in lab.small), None)):
        for annealed in (True, False):
            run = lab.base() if lab.flags["anneal_lr"]["default"] == annealed else lab.base(anneal_lr=annealed)
            lr = lab.small[rate]
            expected = functools.partial(_line, lr, 0.0 if annealed else lr, total)
            said.append(
                _on_line(run, "charts/learning_rate", expected, slack, f"--{'' if annealed else 'no-'}anneal-lr")
            )
    if {"start_e", "end_e", "exploration_fraction"} <= lab.flags.keys():
        start, end, share = (lab.flags[name]["default"] for name in ("start_e", "end_e", "exploration_fraction"))
        trace = lab.base(**lab.epsilon)
        said.append(_on_line(trace, "charts/epsilon", functools.partial(_line, start, end, share * total), slack, ""))
    if not said:
        raise Skipped("it has no --anneal-lr and no --start-e, --end-e, --exploration-fraction")
    return "; ".join(said)


def _line(start: float, end: float, duration: float, step: float) -> float:
    return end if step >= duration else start + (end - start) * max(step, 0.0) / duration


def _on_line(trace: Trace, key: str, expected: Callable[[float], float], slack: int, flag: str) -> str:
    """Each logged value has to be that of its step, or of one up to `slack` steps before."""
    logged = trace.logged(key)
    if len(logged) < 3:
        raise Failed(f"{key} is not logged")
    for step, value in logged:
        bounds = sorted((expected(step - slack), expected(step)))
        if not bounds[0] - 1e-6 <= value <= bounds[1] + 1e-6:
            raise Failed(
                f"{key} {flag} is {value:g} at step {step}, where {bounds[1]:g} is due: the schedule is not used"
            )
    return f"{key.removeprefix('charts/')} {logged[0][1]:g} to {logged[-1][1]:g}{' ' * bool(flag)}{flag}"


# --- what is learnt is what is known


def values(lab: Lab) -> str:
    """Predicted values reach their closed forms: at terminations, at time limits, and across both."""
    return _closed_forms(lab, {})


def n_step(lab: Lab) -> str:
    """With --n-step 3 values reach the same closed forms: no return runs on into the next episode."""
    if "n_step" not in lab.flags:
        raise Skipped("it has no --n-step")
    return _closed_forms(lab, {"n_step": 3})


def _closed_forms(lab: Lab, more: dict[str, Any]) -> str:
    said = []
    for space, (world, expected) in itertools.product(lab.spaces, CLOSED_FORMS.items()):
        found, count = _estimate(lab, f"{world}-{space}", expected, 0.12, more)
        if abs(found - expected) > 0.12:
            raise Failed(f"{world} ({space}): {found:.2f} after {count:,} steps, not {expected:g}. {MEANING[world]}")
        said.append(f"{world} {found:.2f} ({expected:g})")
    return f"with gamma {GAMMA}, {', '.join(said)}"


def _estimate(lab: Lab, world: str, expected: float, within: float, more: dict[str, Any]) -> tuple[float, int]:
    """The mean of the values predicted last, of all that are logged the one furthest off; and the steps it took.

    A script that is not there yet gets more steps once: one that is wrong stays where it is.
    """
    for count in (1_500, 5_000) if lab.replays else (8_000, 32_000):
        trace = lab.run(world, **{**lab.learning(count), **more})
        logged = [[value for _, value in trace.logged(key)[-10:]] for key in VALUES]
        means = [sum(last) / len(last) for last in logged if last]
        if not means:
            raise Skipped(f"it logs no predicted values: none of {', '.join(VALUES)}")
        furthest = max(means, key=lambda mean: abs(mean - expected))
        if abs(furthest - expected) <= within:
            break
    return furthest, count


def policy(lab: Lab) -> str:
    """The policy finds the action that is paid, and it depends on the observation."""
    said = []
    for space in lab.spaces:
        for count in (1_500, 5_000) if lab.replays else (8_000, 32_000):
            trace = lab.run(f"Both-{space}", **{**lab.learning(count), "eval_episodes": 20})
            scores = trace.logged("eval/episodic_return")
            if not scores:
                raise Skipped("it does not evaluate: nothing is logged as eval/episodic_return")
            if scores[-1][1] == 1.0:
                break
        score = scores[-1][1]
        if score != 1.0:
            means = "it learns the opposite: look at the sign of the advantage" if score < -0.5 else "it does not learn"
            raise Failed(f"{space}: paid 1 for the right action and -1 for the wrong, it gets {score:g}: {means}")
        said.append(f"{space} {score:g}")
    return f"paid 1 or -1 by action and observation, in 20 greedy episodes: {', '.join(said)}"


def advantages(lab: Lab) -> str:
    """Advantages handed to minibatches are GAE of each episode alone, by brute force."""
    if not {"gae_lambda", "gamma", "num_steps"} <= lab.flags.keys():
        raise Skipped("it has no --gae-lambda")
    num_envs, size = 2, 64
    wanted = {"num_envs": num_envs, "num_steps": size, "total_timesteps": 4 * num_envs * size}
    trace = lab.run(f"Clockwork-{lab.spaces[0]}", **{**lab.small, **wanted})
    rollouts = trace.notes["minibatches"]
    needed = {"rewards", "terminations", "truncations", "advantages", "values"}
    if not rollouts or not needed <= rollouts[0].keys():
        raise Skipped("it hands no advantages and values to rollout.minibatches")
    gamma, trace_decay = (lab.flags[name]["default"] for name in ("gamma", "gae_lambda"))
    count = 0
    for rollout in rollouts:
        at_cuts: dict[int, float] = {}
        for env in range(num_envs):
            r, v, a = (rollout[name][:, env].double().tolist() for name in ("rewards", "values", "advantages"))
            begin = 0
            for t in range(len(r)):
                terminated, truncated = (bool(rollout[name][t, env]) for name in ("terminations", "truncations"))
                if not terminated and not truncated:
                    continue
                # where a cut episode led is worth what its last advantage says; all that led there have to agree
                after = 0.0 if terminated else (a[t] - r[t] + v[t]) / gamma
                length = t + 1 - begin
                if begin > 0 and truncated and abs(at_cuts.setdefault(length, after) - after) > 1e-3:
                    raise Failed(
                        f"the same observation at a time limit counts as {at_cuts[length]:.3f} in one episode and as "
                        f"{after:.3f} in another: advantages run on into the next episode"
                    )
                deltas = [r[i] + gamma * (v[i + 1] if i < t else after) - v[i] for i in range(begin, t + 1)]
                for i in range(len(deltas)):
                    right = sum((gamma * trace_decay) ** k * delta for k, delta in enumerate(deltas[i:]))
                    if abs(right - a[begin + i]) > 1e-3:
                        raise Failed(
                            f"{len(deltas) - i} steps before {'a termination' if terminated else 'a time limit'} the "
                            f"advantage is {a[begin + i]:.3f}; of that episode alone it is {right:.3f}"
                        )
                count += length
                begin = t + 1
    return f"{count:,} advantages are those of GAE({gamma:g}, {trace_decay:g}), each episode by itself"


def entropy(lab: Lab) -> str:
    """With a fixed temperature the soft value has its closed form: the density is that of the squashed action."""
    if "alpha" not in lab.flags or "Box" not in lab.spaces:
        raise Skipped("it has no --alpha, the weight of the entropy, and Box actions")
    expected = (1 + GAMMA * 0.5 * math.log(2)) / (1 - GAMMA)
    found, count = _estimate(lab, "Endless-Box", expected, 0.12, {"alpha": 0.5})
    if abs(found - expected) > 0.12:
        raise Failed(
            f"Endless, --alpha 0.5: {found:.2f} after {count:,} steps, not {expected:.2f}, the value of uniform "
            "actions in [-1, 1] (log 2 nats). More means a density without the correction for the tanh, 2.00 no entropy"
        )
    return f"--alpha 0.5 where nothing is better than random actions: {found:.2f}, and {expected:.2f} is right"


def units(lab: Lab) -> str:
    """The temperature does not depend on the units of the action."""
    if "Box" not in lab.spaces:
        raise Skipped("it has no Box actions")
    curves = [lab.run(f"Push-{i}", **lab.small).logged("losses/alpha") for i in (0, 1)]
    if not curves[0]:
        raise Skipped("it logs no losses/alpha, a learnt temperature")
    for (step, a), (_, b) in zip(*curves, strict=True):
        if not math.isclose(a, b, rel_tol=1e-4):
            raise Failed(
                f"the same world with actions in 1/64 of the unit has temperature {b:.4g} at step {step}, not {a:.4g}: "
                "the log-probability or the target entropy is taken in the environment's units"
            )
    return f"the same world with actions in 1/64 of the unit: the same temperature, {curves[0][-1][1]:.3f} at the end"


CHECKS: dict[str, Callable[[Lab], str]] = {
    check.__name__: check
    for check in (
        *(transitions, returns, steps, exploration, parameters, seed, evaluation, flags, resume, schedules),
        *(values, n_step, policy, advantages, entropy, units),
    )
}


def examine(lab: Lab, names: tuple[str, ...] = ()) -> Iterator[Verdict]:
    """The verdict of each check, as soon as it is made."""
    for name in names or CHECKS:
        try:
            yield Verdict("PASS", name, CHECKS[name](lab))
        except Failed as failure:
            yield Verdict("FAIL", name, str(failure))
        except Skipped as reason:
            yield Verdict("SKIP", name, str(reason))


def main(argv: list[str]) -> NoReturn:
    args = parse(Args, __doc__, argv, prog="python -m common check")
    for name in args.only:
        if name not in CHECKS:
            fail(f"there is no check {name!r}; there are: {', '.join(CHECKS)}")
    began = time.monotonic()
    with contextlib.closing(Lab(args.script)) as lab:
        verdicts = _report(args, lab)
    words = {"PASS": "passed", "FAIL": "failed", "SKIP": "skipped"}
    counts = [f"{sum(v.word == word for v in verdicts)} {said}" for word, said in words.items()]
    print(f"{', '.join(counts)} in {time.monotonic() - began:.0f} s, {len(lab.runs)} runs")
    raise SystemExit(any(verdict.word == "FAIL" for verdict in verdicts))


def _report(args: Args, lab: Lab) -> list[Verdict]:
    refused = "".join(f" (not {space}: {error.removeprefix('error: ')})" for space, error in lab.refused.items())
    print(f"{args.script}: {' and '.join(lab.spaces)} actions, {len(lab.flags)} flags{refused}", flush=True)
    verdicts = []
    for verdict in examine(lab, args.only):
        verdicts.append(verdict)
        print(verdict, flush=True)
    return verdicts
