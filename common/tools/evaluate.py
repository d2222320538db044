"""Plays the trained policies of runs, greedily, in seeded environments.

    python -m common evaluate runs/CartPole-v1__dqn__1__... --episodes 100
    python -m common evaluate runs/CartPole-v1__* --episodes 1000 --num-envs 100 --json scores.json
    python -m common evaluate runs/CartPole-v1__dqn__1__... --render human

With the episodes, environments and seed of the run (the defaults) it plays the run's own last evaluation again.
Each environment plays a fixed share of the episodes: the first to end would be the short ones.
Runs the script saved in RUN_DIR/source: only for runs you trust.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import Positional, arg

from common.args import RunArgs, fail
from common.internals.console.cli import parse
from common.tools.launch.cli import at_least
from common.tools.stats import iqm


@dataclass
class Args:
    run_dirs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN_DIR...")]
    """run directories; several print a table"""
    episodes: int | None = None
    """episodes to play with each policy (default: the run's --eval-episodes)"""
    seed: int | None = None
    """seed of the environments (default: the run's)"""
    max_steps: int | None = None
    """steps after which an episode is cut, its return so far counts; 0: never (default: the run's --eval-max-steps)"""
    num_envs: int = 10
    """environments played at once; which episodes are played depends on it"""
    async_envs: bool = False
    """run each environment in a process of its own: pays off for slow environments on many cores"""
    render: Literal["none", "human"] = "none"
    """human shows the episodes in a window, one after the other"""
    video: Path | None = None
    """record the first episode into this mp4 file; of several runs, into RUN_DIR's name.mp4 in this folder"""
    json: Path | None = None
    """write every return and length, and the table, to this file"""
    allow_env_import: bool = False
    """let an env id of the form module:Env-v0 import (that is, run) that module"""
    debug: bool = False
    """print the whole traceback of an error"""


HEADER = ("episodes", "mean", "std", "IQM", "min", "max", "length", "seconds")


def main(argv: list[str]) -> None:
    args = parse(Args, __doc__, argv, prog="python -m common evaluate")
    from common.internals.vector.make import has_screen

    if not args.run_dirs:
        fail("which run? python -m common evaluate RUN_DIR")
    at_least(args, episodes=1, num_envs=1, max_steps=0, seed=0)
    if args.render == "human" and not has_screen():
        fail("there is no screen here (DISPLAY is not set); use --video FILE.mp4")
    if args.video is not None and args.async_envs:
        fail("--video records in this process: leave --async-envs out")
    several = len(args.run_dirs) > 1
    if several and args.video is not None and args.video.suffix == ".mp4":
        fail(f"--video {args.video}: of several runs, videos go into a folder")
    if args.json is not None and not args.json.parent.is_dir():
        fail(f"there is no folder {args.json.parent} for {args.json.name}", code=6)

    width = max(len(path.resolve().name) for path in args.run_dirs)

    def row(name: str, cells: Iterable[str]) -> None:
        if several:
            print(f"{name:<{width}}" + "".join(f"{cell:>10}" for cell in cells), flush=True)

    row("run", HEADER)
    scores: list[dict[str, Any]] = []
    failed = 0
    for path in args.run_dirs:
        try:
            with modules_of_their_own():
                score = play_run(path, args, several)
        except SystemExit as stop:  # printed why, in one line; the other runs are still worth playing
            if not several:
                raise
            failed = failed or (stop.code if isinstance(stop.code, int) and stop.code else 1)
            continue
        scores.append(score)
        row(score["run"], [_short(score[name]) for name in HEADER])
        if not several:
            np.set_printoptions(suppress=True, threshold=100)
            print("{env_id}  {script}  {episodes} episodes".format(**score))
            print(f"returns {np.array(score['returns'])}")
            text = (
                "episodic_return {mean:.6g} ± {std:.6g}  episodic_length {length:.6g}  IQM {IQM:.6g}  min {min:.6g}  "
            )
            print((text + "max {max:.6g}  {seconds:.1f} s").format(**score))
    if args.json is not None:
        try:
            args.json.write_text(json.dumps(scores, indent=1) + "\n")
        except OSError as error:
            fail(f"cannot write {args.json}: {error.strerror}", code=6)
    if failed:
        fail(f"{len(args.run_dirs) - len(scores)} of {len(args.run_dirs)} runs could not be played", failed)


@contextlib.contextmanager
def modules_of_their_own() -> Iterator[None]:
    """What one run imports from its folders, another does not get: theirs may have the same names."""
    before, known = sys.path[:], set(sys.modules)
    try:
        yield
    finally:
        added = set(sys.path) - set(before)
        sys.path[:] = before
        for name in set(sys.modules) - known:
            file = getattr(sys.modules.get(name.partition(".")[0]), "__file__", None)
            if file and added & {str(Path(file).parent), str(Path(file).parent.parent)}:
                sys.modules.pop(name)


def play_run(path: Path, args: Args, several: bool) -> dict[str, Any]:
    """The returns of one run's policy and what they come to; seconds do not count making the network."""
    from common.evaluation import play
    from common.tools.load_policy import load_policy

    policy, run = load_policy(path, args.allow_env_import)
    name = path.resolve().name
    video = args.video
    if video is not None:  # a folder of the user's may be a link, one of a run may not
        video = video.resolve() / f"{name}.mp4" if several else video.parent.resolve() / video.name
    try:
        episodes = args.episodes or int(run["eval_episodes"]) or 10
        seed = int(run["seed"]) if args.seed is None else args.seed
        max_steps = int(run.get("eval_max_steps", RunArgs.eval_max_steps)) if args.max_steps is None else args.max_steps
    except (KeyError, TypeError, ValueError) as error:
        fail(f"args.json of {path} does not say how its policy was evaluated: {error!r}", code=3)
    began = time.monotonic()
    how: dict[str, Any] = {"num_envs": args.num_envs, "async_envs": args.async_envs, "max_steps": max_steps}
    human = args.render == "human"
    try:
        returns, lengths = play(policy, run["env_id"], episodes, seed, video, args.allow_env_import, human=human, **how)
    except Exception as error:
        fail(f"the policy in {path} cannot be played: {type(error).__name__}: {error}", code=1)
    seconds = round(time.monotonic() - began, 3)
    about = {"run": name, "script": run["script"], "env_id": run["env_id"], "seed": seed, "episodes": episodes}
    statistics = {"mean": returns.mean(), "std": returns.std(), "IQM": iqm([returns])}
    statistics |= {"min": returns.min(), "max": returns.max(), "length": lengths.mean()}
    about |= {"num_envs": min(args.num_envs, episodes), **{key: float(value) for key, value in statistics.items()}}
    return {**about, "seconds": seconds, "returns": returns.tolist(), "lengths": lengths.tolist()}


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if abs(value) >= 100 else f"{value:.2f}"
