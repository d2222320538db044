"""Evaluates the trained policies of runs: greedy episodes in seeded environments.

    python -m common evaluate runs/CartPole-v1__dqn__1__... --episodes 100
    python -m common evaluate runs/CartPole-v1__* --episodes 1000 --num-envs 100 --json scores.json
    python -m common evaluate runs/CartPole-v1__dqn__1__... --render human

The defaults repeat the run's own last evaluation. Each environment plays a fixed share of the episodes: counting the
first ones to end would favour short ones. It executes the script in RUN_DIR/source: use it for runs you trust.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import Positional, arg

from common.args import fail
from common.internals.console.cli import parse
from common.tools.compare.tables import WIDTH, shortened
from common.tools.launch.cli import at_least, check_folder, write_json
from common.tools.stats import iqm


@dataclass
class Args:
    run_dirs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN_DIR...")]
    """run directories; several are shown as a table"""
    episodes: int | None = None
    """episodes to play with each policy (default: the run's --eval-episodes)"""
    best: bool = False
    """play the policy of the best evaluation (policy_best.pt), not the last one"""
    seed: int | None = None
    """seed of the environments (default: the run's)"""
    max_steps: int | None = None
    """cut episodes after this many steps; 0: never (default: the run's --eval-max-steps)"""
    num_envs: int = 10
    """parallel environments; the episodes depend on this number"""
    async_envs: bool = False
    """run each environment in its own process: faster for slow environments on many cores"""
    render: Literal["none", "human"] = "none"
    """human: show the episodes in a window, one by one"""
    video: Path | None = None
    """record the first episode into this mp4 file; of several runs, into this folder"""
    json: Path | None = None
    """write scores, returns and lengths to this file (-: to the standard output)"""
    allow_env_import: bool = False
    """let an env id module:Env-v0 import (that is, run) that module"""
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
    check_folder(args.json)

    width = min(max(len(path.resolve().name) for path in args.run_dirs), WIDTH - 9 * len(HEADER))
    line = f"{{:<{width}}}" + " {:>8}" * len(HEADER)
    if several:
        print(line.format("run", *HEADER), flush=True)
    scores: list[dict[str, Any]] = []
    failed = 0
    for path in args.run_dirs:
        try:
            with separate_modules():
                scores.append(score := play_run(path, args, several))
        except SystemExit as stop:  # printed why; the other runs are still worth playing
            if not several:
                raise
            failed = failed or (stop.code if isinstance(stop.code, int) and stop.code else 1)
            continue
        if several:
            print(line.format(shortened(score["run"], width), *(_short(score[name]) for name in HEADER)), flush=True)
        else:
            np.set_printoptions(suppress=True, threshold=100)
            print("{env_id}  {script}  {episodes} episodes".format(**score))
            print(f"returns {np.array(score['returns'])}")
            text = "episodic_return {mean:.6g} ± {std:.6g}  episodic_length {length:.6g}  IQM {IQM:.6g}"
            print((text + "  min {min:.6g}  max {max:.6g}  {seconds:.1f} s").format(**score))
    write_json(args.json, scores)
    if failed:
        fail(f"{len(args.run_dirs) - len(scores)} of {len(args.run_dirs)} runs could not be played", failed)


@contextlib.contextmanager
def separate_modules() -> Iterator[None]:
    """Forgets what a run imported from its own folders: modules of another run may have the same names."""
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
    """Returns and statistics of one run's policy; seconds are of the episodes alone."""
    from common.evaluation import play
    from common.internals.vector.make import form_of
    from common.tools.load_policy import load_policy

    policy, run, script = load_policy(path, args.allow_env_import, "policy_best.pt" if args.best else "policy.pt")
    name = path.resolve().name
    video = args.video
    if video is not None:  # a folder of the user's may be a link, one of a run may not
        video = video.resolve() / f"{name}.mp4" if several else video.parent.resolve() / video.name
    episodes = args.episodes or run.eval_episodes or 10
    seed = run.seed if args.seed is None else args.seed
    max_steps = run.eval_max_steps if args.max_steps is None else args.max_steps
    began = time.monotonic()
    how: dict[str, Any] = {"num_envs": args.num_envs, "async_envs": args.async_envs, "max_steps": max_steps}
    how["form"] = form_of(run)
    human = args.render == "human"
    try:
        returns, lengths = play(policy, run.env_id, episodes, seed, video, args.allow_env_import, human=human, **how)
    except Exception as error:
        fail(f"the policy in {path} cannot be played: {type(error).__name__}: {error}", code=1)
    seconds = round(time.monotonic() - began, 3)
    about = {"run": name, "script": script, "env_id": run.env_id, "seed": seed, "episodes": episodes}
    statistics = {"mean": returns.mean(), "std": returns.std(), "IQM": iqm([returns])}
    statistics |= {"min": returns.min(), "max": returns.max(), "length": lengths.mean()}
    about |= {"num_envs": min(args.num_envs, episodes), **{key: float(value) for key, value in statistics.items()}}
    return {**about, "seconds": seconds, "returns": returns.tolist(), "lengths": lengths.tolist()}


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if abs(value) >= 100 else f"{value:.2f}"
