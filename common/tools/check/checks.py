"""Checks a script, such as your fork, for bugs in episodes, time limits, seeds, flags, resuming and logging.

    python -m common check my_ppo.py

Runs the script many times for a moment in environments with known answers, and prints one line a check: PASS with what
was measured, FAIL with what it means, or SKIP with the reason. Exit code 0 if none failed, else 1. docs/check.md says
what each check finds, and what none of them does.
"""

import contextlib
import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import torch
from tyro.conf import Positional, arg

from common.args import fail
from common.internals.console.cli import parse
from common.tools.check.harness import GAMMA, RATES, Failed, Harness, Skipped, Trace, fail_if, skip_if
from common.tools.check.probe_envs import PlannedEpisodes
from common.tools.launch.cli import as_words, check_folder, write_json

VALUES = ("losses/q_values", "losses/values", "losses/qf1_values", "losses/qf2_values")
CLOSED_FORMS = {  # the value, and what another one means
    "Constant": (1.0, "one step, reward 1, terminated: more than 1 means that values bootstrap over terminations"),
    "Endless": (2.0, "reward 1 until a time limit: less than 2 means that truncation is taken for termination"),
    "Ladder": (1.5, "1.0 means that truncated episodes bootstrap from the observation after the reset, 0.75 from none"),
}


@dataclass
class Args:
    script: Annotated[Positional[Path], arg(metavar="SCRIPT")]
    """the script to check"""
    only: tuple[str, ...] = ()
    """names of checks to run (default: all)"""
    json: Path | None = None
    """write the results to this file (-: to the standard output)"""
    debug: bool = False
    """print the whole traceback of an error"""


@dataclass
class Result:
    word: str  # PASS, FAIL or SKIP
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.word}  {self.name:<13} {self.text}"


# --- transitions, returns and steps


def transitions(harness: Harness) -> str:
    """Each step of each environment is stored once, as it was, and none leads from one episode into another."""
    count, kinds = 0, set[str]()
    for where, num_envs, trace in harness.all_planned():
        skip_if(
            not trace.recorded["stored"], "it stores nothing in common's ReplayBuffer or RolloutStorage; see values"
        )
        for stored in trace.recorded["stored"]:
            skip_if("obs" not in stored, f"it stores {', '.join(stored)}, and no obs")
            count += _compare_stored(stored, trace.played(num_envs), where, harness.default("gamma", 0.99))
            kinds |= stored.keys() & {"actions", "rewards", "next_obs", "terminations", "truncations"}
    return f"{count:,} stored steps of 5 runs are the ones that happened ({', '.join(['obs', *sorted(kinds)])})"


def _compare_stored(stored: dict[str, Any], played: list[dict[str, Any]], where: str, gamma: float) -> int:
    """Identifies each stored step by its observation, which no other step has, and looks for it in what happened."""
    happened = {_key(env["obs"][t]): (n, t) for n, env in enumerate(played) for t in range(len(env["rewards"]))}
    rewards: dict[float, float] = {}  # reward of the environment: as it is stored
    seen: set[tuple[int, int]] = set()
    longest = 1
    for t, column in itertools.product(*map(range, stored["obs"].shape[:2])):
        step = {name: values[t, column] for name, values in stored.items()}
        place = happened.get(_key(step["obs"]))
        if place is None:
            skip_if(not seen, "it stores observations that are not the environment's (normalised?); see values")
            ended = _key(step["obs"]) in {_key(obs) for env in played for obs in env["next_obs"]}
            what = "the last one of an episode, on which no action follows" if ended else "unknown to its environment"
            raise Failed(f"{where}: a stored obs is {what}, at step {t} of environment {column}")
        here = f"{where}: the step from {_say(step['obs'])}"
        fail_if(place in seen, f"{here} is stored twice")
        seen.add(place)
        env, first = played[place[0]], place[1]
        length = _length(env, first, step["next_obs"]) if "next_obs" in step else 1
        if length == 0:
            led = f"{_say(step['next_obs'])}; it led to {_say(env['next_obs'][first])} (environment, episode, time)"
            raise Failed(f"{here} is stored as leading to {led}: use common.final_obs(next_obs, infos)")
        longest = max(longest, length)
        last = first + length - 1
        for name in {"terminations", "truncations"} & step.keys():
            kept, true = bool(step[name]), bool(env[name][last])
            means = "a time limit is stored as a termination" if name == "terminations" and kept else "ends are lost"
            fail_if(kept != true, f"{here} has {name} stored as {kept}, where it was {true}: {means}")
        if "actions" in step and step["actions"].numel() == env["actions"][first].numel():
            kept, sent = (x.double().flatten() for x in (step["actions"], env["actions"][first]))
            arrives = kept.clip(-1, 1) if env["actions"].is_floating_point() else kept  # the bounds of a Box action
            same = torch.allclose(arrives, sent, rtol=0, atol=1e-6)
            fail_if(not same, f"{here} has action {kept.tolist()} stored, {sent.tolist()} was played")
        if "rewards" in step:
            paid = sum(gamma**i * float(env["rewards"][first + i]) for i in range(length))
            reward = float(step["rewards"])
            usual = rewards.setdefault(paid, reward) if length == 1 else paid  # clipped or scaled is still a function
            others = f", for others that paid as much {usual:g}" if length == 1 else ""
            same = math.isclose(reward, usual, rel_tol=1e-4, abs_tol=1e-6)
            fail_if(not same, f"{here}: {paid:g} was paid and {reward:g} is stored{others}")
    constant = "rewards" in stored and len(rewards) > 1 and len(set(rewards.values())) == 1
    fail_if(constant, f"{where}: {len(rewards)} different rewards were paid, and all are stored as the same number")
    missing = len(happened) - len(seen)
    fail_if(missing > len(played) * (longest - 1), f"{where}: {missing} of {len(happened)} steps are not stored")
    return len(seen)


def _key(obs: Any) -> bytes:
    return obs.float().numpy().tobytes()


def _say(obs: Any) -> str:
    return "(" + ", ".join(f"{x:g}" for x in (obs.float() / PlannedEpisodes.UNIT).tolist()) + ")"


def _length(env: dict[str, Any], first: int, next_obs: Any) -> int:
    """Steps from `first` to `next_obs` within one episode; 0 if it lies in none."""
    for t in range(first, len(env["rewards"])):
        if _key(env["next_obs"][t]) == _key(next_obs):
            return t - first + 1
        if env["terminations"][t] or env["truncations"][t]:
            break
    return 0


def _episodes(steps: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """The first step of each episode that ended, and the one after its last."""
    begin = 0
    for t in (steps["terminations"] | steps["truncations"]).nonzero().flatten().tolist():
        yield begin, t + 1
        begin = t + 1


def returns(harness: Harness) -> str:
    """Every episode is logged once: its return, its length, and the step at which it ended."""
    count = 0
    keys = ("global_step", "charts/episodic_return", "charts/episodic_length")
    for where, num_envs, trace in harness.all_planned():
        paid = sorted(
            (end * num_envs, round(float(played["rewards"][begin:end].sum()), 3), end - begin)
            for played in trace.played(num_envs)
            for begin, end in _episodes(played)
        )
        logged = sorted(tuple(round(row[key], 3) for key in keys) for row in trace.rows if row.keys() >= set(keys))
        means = "none is logged: call run.log_episodes(infos, global_step)"
        fail_if(not logged, f"{where}: {len(paid)} episodes ended, {means}")
        if sorted(x[1:] for x in paid) != sorted(x[1:] for x in logged):
            first = f"the first returns were {[x[1] for x in paid[:4]]}, logged are {[x[1] for x in logged[:4]]}"
            raise Failed(f"{where}: {len(paid)} episodes ended, {len(logged)} are logged; {first}")
        for ended, row in zip(paid, logged, strict=True):
            means = "global_step does not count the steps of all environments"
            fail_if(ended != row, f"{where}: an episode that ended at step {ended[0]} is logged at {row[0]}: {means}")
        count += len(paid)
    return f"{count} episodes of 1 and 3 environments are logged with the return, length and step they ended with"


def steps(harness: Harness) -> str:
    """As many steps are taken as the budget says, over all environments; rows are in the order of their steps."""
    said = []
    for where, num_envs, trace in harness.all_planned():
        taken = sum(len(played["rewards"]) for played in trace.played(num_envs))
        most = 199 + num_envs * harness.small.get("num_steps", 1)
        budget = f"--total-timesteps 200 (a whole rollout: up to {most})"
        right = 200 <= taken <= most
        fail_if(not right, f"{where}: {taken} steps were taken for {budget}: global_step has to grow by num_envs")
        axis = [row["global_step"] for row in trace.rows]
        wrong = axis != sorted(axis) or max(axis, default=0) > taken
        fail_if(wrong, f"{where}: the x axis ends at {max(axis, default=0)} after {taken} steps, or runs backwards")
        fail_if(trace.end != taken, f"{where}: the run says it ended at step {trace.end}, and {taken} were taken")
        said.append(f"{taken} steps in {num_envs}")
    return f"for --total-timesteps 200: {', '.join(dict.fromkeys(said))} environments; the x axis counts all"


def exploration(harness: Harness) -> str:
    """Each environment gets actions drawn for it alone; with an epsilon, it is really used."""
    few = 30 if harness.spaces[0] == "Box" else None  # two real numbers are never equal by chance
    rows = [played["actions"][:few].flatten().tolist() for played in harness.planned("Uneven", 3).played(3)]
    for a, b in itertools.combinations(range(len(rows)), 2):
        fail_if(rows[a] == rows[b], f"environments {a} and {b} get the same {len(rows[a])} actions: they share a draw")
    text = "three environments get three series of actions"
    if not {"start_e", "end_e", "exploration_fraction", "learning_starts"} <= harness.flags.keys():
        return text
    flags = {"start_e": 1.0, "end_e": 0.0, "exploration_fraction": 0.5}
    flags |= {"total_timesteps": 1000, "learning_starts": 1000, "num_envs": 1, **harness.epsilon}
    (played,) = harness.run("Constant-Discrete", **{**harness.small, **flags}).played(1)
    early, late = (100 * float(part.float().mean()) for part in (played["actions"][:100], played["actions"][500:]))
    means = f"{early:.0f} % of the first 100 actions are 1: they are not drawn with epsilon"
    fail_if(not 25 < early < 75, f"with --start-e 1, {means}")
    means = f"{late:.0f} % of the second half's actions are 1: epsilon has not fallen"
    fail_if(late not in (0.0, 100.0), f"with --end-e 0, {means}")
    return f"{text}; with epsilon 1 both actions come, with epsilon 0 the greedy one alone"


# --- learning, seeds, flags and resuming


def parameters(harness: Harness) -> str:
    """Every parameter of every network moves, target networks too; policy.pt holds the trained one."""
    trace = harness.base()
    first, last = trace.recorded["first"], trace.recorded["last"]
    skip_if(not first, "it has no common.Checkpoint(run, envs, network=network, ...) that names its networks")
    moved = {
        f"{part}.{name}": not torch.equal(value, last[part][name])
        for part in first
        for name, value in first[part].items()
        if value.numel()
    }
    still = [name for name, moves in moved.items() if not moves]
    fail_if(still, f"{len(still)} of {len(moved)} parameter tensors never change: {', '.join(still[:4])}")
    kept = trace.weights
    held = any(
        part and kept.keys() >= part.keys() and _equal({k: kept[k] for k in part}, part) for part in last.values()
    )
    fail_if(not held, "policy.pt holds none of the networks as they were at the end")
    networks = ", ".join(part for part, tensors in first.items() if tensors)
    return f"all {len(moved)} parameter tensors of {networks} change; policy.pt is the trained policy"


def seed(harness: Harness) -> str:
    """The same seed gives the same run to the bit; another seed reaches networks, environments and actions."""
    one, again, other = harness.base(), harness.base(again=1), harness.base(seed=harness.default("seed", 1) + 1)
    difference = _difference(one, again)
    fail_if(difference, f"two runs with the same seed differ: {difference}. Something draws from an unseeded generator")
    seeds = [[s for env in trace.recorded["envs"] for s in env["seeds"]] for trace in (one, other)]
    fail_if(not seeds[0] or seeds[0][0] is None, "the environments are reset without a seed")
    fail_if({*seeds[0]} & {*seeds[1]} - {None}, "with another --seed the environments are reset with the same seeds")
    mine = [{*env["seeds"]} - {None} for env in harness.planned("Uneven", 3).recorded["envs"]]
    shared = any(a & b for a, b in itertools.combinations(mine, 2))
    fail_if(shared, "several environments are reset with the same seed: they play the same episodes")
    for part, tensors in one.recorded["first"].items():
        drawn = any(value.numel() and value.std(correction=0) > 0 for value in tensors.values())
        same = drawn and _equal(tensors, other.recorded["first"][part])
        fail_if(same, f"with another --seed {part} starts with the same weights: the seed does not reach them")
    fail_if(all(_equal_actions(one, other)), "with another --seed the same actions are taken")
    fail_if(_equal(one.weights, other.weights), "with another --seed the same weights are learnt")
    return "twice the same seed: the same weights, metrics and actions, to the bit; another seed: others of each"


def _equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _equal_actions(a: Trace, b: Trace) -> list[bool]:
    pairs = zip(a.recorded["envs"], b.recorded["envs"], strict=False)
    return [torch.equal(x["actions"], y["actions"]) for x, y in pairs if len(x["actions"])]


def _difference(a: Trace, b: Trace, skip_actions: bool = False) -> str:
    """The first thing in which two runs differ, in a few words; empty if in none."""
    if not skip_actions and not all(_equal_actions(a, b)):
        return "other actions were taken"
    if not _equal(a.weights, b.weights):
        return "other weights in policy.pt"
    for part, state in a.recorded["state"].items():
        if state != b.recorded["state"].get(part):
            return f"another state of {part}"
    return "other rows in metrics.jsonl" if a.training_rows != b.training_rows else ""


def evaluation(harness: Harness) -> str:
    """Evaluation and video change nothing that is learnt; what is logged is what the policy was paid."""
    plain = harness.base()
    every = harness.small["total_timesteps"] // 3
    evaluated = harness.base(eval_episodes=3, eval_interval=every)
    filmed = harness.base(eval_episodes=2, eval_interval=every, capture_video=True)
    for trace, what in ((evaluated, "evaluation"), (filmed, "evaluation with a video")):
        difference = _difference(plain, trace)
        fail_if(difference, f"{what} changes training ({difference}): it shares generators or environments with it")
    scores = evaluated.logged("eval/episodic_return")
    fail_if(not scores, "nothing is logged as eval/episodic_return: evaluation = common.Evaluation(run, policy)")
    when = f"at {[step for step, _ in scores]}, and training ended at {evaluated.end}"
    fail_if(scores[-1][0] != evaluated.end or len(scores) < 2, f"with --eval-interval {every} it is evaluated {when}")
    fail_if(not list((filmed.run_dir / "videos").glob("*.mp4")), "--capture-video leaves no video")
    envs = evaluated.played()[harness.small.get("num_envs", 1) :]  # three for each evaluation
    if len(envs) == 3 * len(scores):
        paid = [float(env["rewards"][: next(_episodes(env))[1]].sum()) for env in envs]
        for k, (at, score) in enumerate(scores):
            mean = sum(paid[3 * k : 3 * k + 3]) / 3
            same = math.isclose(mean, score, rel_tol=1e-4, abs_tol=1e-4)
            fail_if(not same, f"at step {at} three episodes paid {mean:g} on average, and {score:g} is logged")
    return f"weights and actions are the same with {len(scores)} evaluations, with video, and without"


def flags(harness: Harness) -> str:
    """Every flag that the script adds to common's changes weights, actions or metrics."""
    tried_here = {name: flag for name, flag in harness.flags.items() if name != "terminal_on_life_loss"}  # Atari's
    own = {name: flag["others"] for name, flag in tried_here.items() if flag["others"] is not None}
    switches = {name: values[0] for name, values in own.items() if isinstance(harness.flags[name]["default"], bool)}
    untried, tried = [], 0
    for name, values in own.items():
        # with the defaults; then with other actions; then with each switch flipped, those of a similar name first
        nearest = sorted(switches, key=lambda x: (-len(os.path.commonprefix([name, x])), x not in harness.epsilon))  # noqa: RUF071
        settings: list[dict[str, Any]] = [{}, *({other: switches[other]} for other in nearest if other != name)]
        outcomes: list[bool | None] = []
        for switched, space in itertools.product(settings, harness.spaces):
            outcomes.append(_takes_effect(harness, name, values, space, switched))
            if outcomes[-1]:
                break
        if not outcomes[-1] and False in outcomes:
            given = ", ".join(map(str, values))
            raise Failed(f"--{name.replace('_', '-')} changes nothing: the run is the same with {given}")
        tried += bool(outcomes[-1])
        untried += [] if outcomes[-1] else [name]
    also = f"; of {', '.join(untried)} no other value is known" if untried else ""
    return f"each of its {tried} own flags changes the run{also}"


def _takes_effect(harness: Harness, name: str, values: list[Any], space: str, switched: dict[str, Any]) -> bool | None:
    """Whether one of the values makes another run; None if none of them is accepted."""
    plain, accepted = None, False
    for given in (switched, *({**switched, name: value} for value in values)):
        trace = harness.trial(f"PushedPoint-{space}", **{**harness.small, **given})
        if trace.code not in (0, 2):
            raise Failed(f"{' '.join(as_words(given))} ends with exit code {trace.code}: {trace.error}")
        if plain is None:
            if trace.code == 2:
                return None
            plain = trace
        elif trace.code == 0:
            accepted = True
            if _difference(plain, trace):
                return True
    return False if accepted else None


def resume(harness: Harness) -> str:
    """Killed, or stopped by a signal, and resumed: the same weights, optimizers and metrics as a run left alone."""
    total = harness.small["total_timesteps"]
    each = total // harness.small.get("num_envs", 1)  # steps of the first environment
    often = {"save_interval": total // 5}
    whole = harness.base(**often)
    saved = list((whole.run_dir / "checkpoints").glob("step-*.pt"))
    fail_if(not saved, "it writes no checkpoint: call checkpoint.save(global_step) at the end of the loop")
    for number, at in ((signal.SIGKILL, 7 * each // 10), (signal.SIGTERM, 9 * each // 20)):
        env = f"PushedPoint-{harness.spaces[0]}"
        stopped = harness.trial(env, stop=(int(number), at), **{**harness.small, **often})
        right = -number if number == signal.SIGKILL else 128 + number
        means = f"{number.name} ends it with exit code {stopped.code}, not {right}: {stopped.error}"
        fail_if(stopped.code != right, means)
        difference = _difference(whole, harness.resumed(stopped), skip_actions=True)
        means = "Name all that is learnt or counted in common.Checkpoint(run, envs, ...)"
        fail_if(difference, f"resumed after {number.name}, the run differs: {difference}. {means}")
    return "killed at 70 %, stopped by SIGTERM at 45 %, and resumed: weights, optimizers and metrics to the bit"


def schedules(harness: Harness) -> str:
    """Epsilon and the learning rate are logged as their flags say, from their start to their end."""
    total, said = harness.small["total_timesteps"], []
    slack = harness.small.get("num_envs", 1) * harness.small.get("num_steps", 1)
    if "anneal_lr" in harness.flags and (rate := next((name for name in RATES if name in harness.small), None)):
        for annealed in (True, False):
            given = {} if harness.flags["anneal_lr"]["default"] == annealed else {"anneal_lr": annealed}
            line = harness.small[rate], harness.small[rate] * (not annealed), total
            logged = harness.base(**given).logged("charts/learning_rate")
            said.append(_on_line(logged, f"learning_rate {'--' if annealed else '--no-'}anneal-lr", line, slack))
        both = [
            harness.base(**given).weights for given in ({}, {"anneal_lr": not harness.flags["anneal_lr"]["default"]})
        ]
        fail_if(_equal(*both), "--anneal-lr changes no weight: the optimizer does not use the rate that is logged")
    if {"start_e", "end_e", "exploration_fraction"} <= harness.flags.keys():
        start, end, share = (harness.flags[name]["default"] for name in ("start_e", "end_e", "exploration_fraction"))
        logged = harness.base(**harness.epsilon).logged("charts/epsilon")
        said.append(_on_line(logged, "epsilon", (start, end, share * total), slack))
    skip_if(not said, "it has no --anneal-lr and no --start-e, --end-e, --exploration-fraction")
    return "; ".join(said)


def _line(start: float, end: float, duration: float, step: float) -> float:
    return float(np.interp(step, [0, duration], [start, end]))


def _on_line(logged: list[tuple[int, float]], name: str, line: tuple[float, float, float], slack: int) -> str:
    """Each logged value has to be that of its step, or of one up to `slack` steps before."""
    fail_if(len(logged) < 3, f"charts/{name.split()[0]} is not logged")
    for step, value in logged:
        low, high = sorted((_line(*line, step - slack), _line(*line, step)))
        wrong = not low - 1e-6 <= value <= high + 1e-6
        fail_if(wrong, f"{name} is {value:g} at step {step}, where {high:g} is due: the schedule is not used")
    return f"{name} {logged[0][1]:g} to {logged[-1][1]:g}"


# --- values and policies with known answers


def values(harness: Harness) -> str:
    """Predicted values reach their closed forms: at terminations, at time limits, and across both."""
    return _closed_forms(harness, {})


def n_step(harness: Harness) -> str:
    """With --n-step 3 values reach the same closed forms: no return runs on into the next episode."""
    skip_if("n_step" not in harness.flags, "it has no --n-step")
    return _closed_forms(harness, {"n_step": 3})


def _closed_forms(harness: Harness, more: dict[str, Any]) -> str:
    said, forms = [], dict(CLOSED_FORMS)
    if any("memory" in stored for stored in harness.base().recorded["stored"]):
        del forms["Ladder"]  # to a memory the observation at the time limit is a third step, which no action follows
    for space, (env, (expected, means)) in itertools.product(harness.spaces, forms.items()):
        said.append(f"{env} {_value(harness, env, space, expected, more, means):.2f} ({expected:g})")
    return f"with gamma {GAMMA}, {', '.join(said)}"


def _value(harness: Harness, env: str, space: str, expected: float, more: dict[str, Any], means: str) -> float:
    """The mean of the values predicted last, of all that are logged the one furthest off; it has to be as expected.

    A script that is not there yet gets more steps once: one that is wrong stays where it is.
    """
    for count in harness.budgets:
        trace = harness.run(f"{env}-{space}", **{**harness.learning(count), **more})
        logged = [[value for _, value in trace.logged(key)[-10:]] for key in VALUES]
        found = [sum(last) / len(last) for last in logged if last]
        skip_if(not found, f"it logs no predicted values: none of {', '.join(VALUES)}")
        furthest = max(found, key=lambda mean: abs(mean - expected))
        if abs(furthest - expected) <= 0.12:
            return furthest
    raise Failed(f"{env} ({space}): {furthest:.2f} after {count:,} steps, not {expected:.3g}. {means}")


def policy(harness: Harness) -> str:
    """The policy finds the action that is paid, and it depends on the observation."""
    for space in harness.spaces:
        for count in harness.budgets:
            trace = harness.run(f"Both-{space}", **{**harness.learning(count), "eval_episodes": 20})
            scores = trace.logged("eval/episodic_return")
            skip_if(not scores, "it does not evaluate: nothing is logged as eval/episodic_return")
            if (score := scores[-1][1]) == 1.0:
                break
        else:
            means = "it learns the opposite: look at the sign of the advantage" if score < -0.5 else "it does not learn"
            raise Failed(f"{space}: paid 1 for the right action and -1 for the wrong, it gets {score:g}: {means}")
    return f"paid 1 or -1 by action and observation, 20 greedy episodes are all right: {', '.join(harness.spaces)}"


def advantages(harness: Harness) -> str:
    """Advantages handed to minibatches are GAE of each episode alone, by brute force."""
    skip_if(not {"gae_lambda", "gamma", "num_steps"} <= harness.flags.keys(), "it has no --gae-lambda")
    num_envs, size = 2, 64
    wanted: dict[str, Any] = {"num_envs": num_envs, "num_steps": size, "total_timesteps": 4 * num_envs * size}
    wanted = {**harness.small, **wanted, **({"norm_reward": False} if "norm_reward" in harness.flags else {})}
    rollouts = harness.run(f"ElapsedTime-{harness.spaces[0]}", **wanted).recorded["minibatches"]
    needed = ("rewards", "values", "advantages", "terminations", "truncations")
    has = rollouts and rollouts[0].keys() >= {*needed}
    skip_if(not has, "it passes no advantages and values to rollout.minibatches or rollout.sequences")
    gamma, trace_decay = (harness.flags[name]["default"] for name in ("gamma", "gae_lambda"))
    count = 0
    for rollout in rollouts:
        at_cuts: dict[int, float] = {}
        for env in range(num_envs):
            columns = {name: rollout[name][:, env] for name in needed}
            r, v, a = (columns[name].double().tolist() for name in needed[:3])
            for begin, end in _episodes(columns):
                t, length = end - 1, end - begin
                # where a cut episode led is worth what its last advantage says; all that led there have to agree
                cut = not columns["terminations"][t]
                after = (a[t] - r[t] + v[t]) / gamma if cut else 0.0
                if begin > 0 and cut and abs(at_cuts.setdefault(length, after) - after) > 1e-3:
                    both = f"{at_cuts[length]:.3f} in one episode and {after:.3f} in another"
                    raise Failed(f"one observation at a time limit is worth {both}: advantages run on into the next")
                next_values = [*v[begin + 1 : end], after]
                deltas = [r[begin + i] + gamma * next_values[i] - v[begin + i] for i in range(length)]
                for i in range(length):
                    right = sum((gamma * trace_decay) ** k * delta for k, delta in enumerate(deltas[i:]))
                    if abs(right - a[begin + i]) > 1e-3:
                        place = f"{length - i} steps before a {'time limit' if cut else 'termination'}"
                        of = f"is {a[begin + i]:.3f}; of that episode alone it is {right:.3f}"
                        raise Failed(f"{place} the advantage {of}")
                count += length
    return f"{count:,} advantages are those of GAE({gamma:g}, {trace_decay:g}), each episode by itself"


def entropy(harness: Harness) -> str:
    """With a fixed temperature the soft value has its closed form: the density is that of the squashed action."""
    has = "alpha" in harness.flags and "Box" in harness.spaces
    skip_if(not has, "it has no --alpha, the weight of the entropy, and Box actions")
    expected = (1 + GAMMA * 0.5 * math.log(2)) / (1 - GAMMA)  # uniform actions in [-1, 1] have log 2 nats
    means = "--alpha 0.5: more means a density without the correction for the tanh, 2.00 no entropy"
    found = _value(harness, "Endless", "Box", expected, {"alpha": 0.5}, means)
    return f"--alpha 0.5 where nothing is better than random actions: {found:.2f}, and {expected:.2f} is right"


def units(harness: Harness) -> str:
    """The temperature does not depend on the units of the action."""
    skip_if("Box" not in harness.spaces, "it has no Box actions")
    curves = [harness.run(f"Push-{i}", **harness.small).logged("losses/alpha") for i in (0, 1)]
    skip_if(not curves[0], "it logs no losses/alpha, a learnt temperature")
    for (step, a), (_, b) in zip(*curves, strict=True):
        means = "the log-probability or the target entropy is in the environment's units"
        text = f"actions in 1/64 of the unit give temperature {b:.4g} at step {step}, not {a:.4g}: {means}"
        fail_if(not math.isclose(a, b, rel_tol=1e-4), text)
    return f"with actions in 1/64 of the unit: the same temperature, {curves[0][-1][1]:.3f} at the end"


CHECKS: dict[str, Callable[[Harness], str]] = {
    check.__name__: check
    for check in (
        *(transitions, returns, steps, exploration, parameters, seed, evaluation, flags, resume, schedules),
        *(values, n_step, policy, advantages, entropy, units),
    )
}


def examine(harness: Harness, names: tuple[str, ...] = ()) -> Iterator[Result]:
    """The result of each check, as soon as it is known."""
    for name in names or CHECKS:
        try:
            yield Result("PASS", name, CHECKS[name](harness))
        except Failed as failure:
            yield Result("FAIL", name, str(failure))
        except Skipped as reason:
            yield Result("SKIP", name, str(reason))


def main(argv: list[str]) -> NoReturn:
    args = parse(Args, __doc__, argv, prog="python -m common check")
    for name in args.only:
        if name not in CHECKS:
            fail(f"there is no check {name!r}; there are: {', '.join(CHECKS)}")
    began = time.monotonic()
    check_folder(args.json)
    counts, results = {"PASS": 0, "FAIL": 0, "SKIP": 0}, []
    with contextlib.closing(Harness(args.script)) as harness:
        refused = f" (not {harness.refused})" if harness.refused else ""
        print(f"{args.script}: {' and '.join(harness.spaces)} actions, {len(harness.flags)} flags{refused}", flush=True)
        for result in examine(harness, args.only):
            counts[result.word] += 1
            print(result, flush=True)
            passed = None if result.word == "SKIP" else result.word == "PASS"
            results.append({"name": result.name, "passed": passed, "reason": result.text})
    said = "{PASS} passed, {FAIL} failed, {SKIP} skipped".format(**counts)
    print(f"{said} in {time.monotonic() - began:.0f} s, {len(harness.runs)} runs")
    write_json(args.json, results)
    raise SystemExit(counts["FAIL"] > 0)
