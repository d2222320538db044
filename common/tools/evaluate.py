"""Plays the trained policy of a run, greedily, in seeded environments.

    python -m common evaluate runs/CartPole-v1__dqn__1__... --episodes 100
    python -m common evaluate runs/CartPole-v1__dqn__1__... --render human

With the episodes and the seed of the run (the defaults) it plays the run's own last evaluation again.
Runs the script saved in RUN_DIR/source: only for runs you trust.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from common.args import fail, parse


@dataclass
class Args:
    run_dir: Annotated[Positional[Path], arg(metavar="RUN_DIR")]
    """the run directory"""
    episodes: int | None = None
    """episodes to play (default: the run's --eval-episodes)"""
    seed: int | None = None
    """seed of the environments (default: the run's)"""
    render: Literal["none", "human"] = "none"
    """human shows the episodes in a window, one after the other"""
    video: Path | None = None
    """film the first episode into this mp4 file"""
    debug: bool = False
    """print the whole traceback of an error"""


def main(argv: list[str]) -> None:
    args = parse(Args, __doc__, argv, prog="python -m common evaluate")
    import numpy as np

    from common.envs import has_screen
    from common.evaluation import play
    from common.policy import load_policy

    if args.render == "human" and not has_screen():
        fail("there is no screen here (DISPLAY is not set); --video FILE.mp4 films instead")
    policy, run = load_policy(args.run_dir)
    episodes = run["eval_episodes"] or 10 if args.episodes is None else args.episodes
    if episodes < 1:
        fail("--episodes must be at least 1")
    returns, lengths = play(
        policy,
        run["env_id"],
        episodes,
        run["seed"] if args.seed is None else args.seed,
        args.video,
        run["allow_env_import"],
        human=args.render == "human",
    )
    np.set_printoptions(suppress=True, threshold=100)
    print(f"{run['env_id']}  {run['script']}  {episodes} episodes")
    print(f"returns {returns}")
    print(f"episodic_return {returns.mean():.6g} ± {returns.std():.6g}  episodic_length {lengths.mean():.6g}")
