"""What test_distributed.py looks at, done by each process of torchrun, or by one that has the data of both.

torchrun --nproc-per-node 2 tests/helpers/ranks.py FOLDER
python tests/helpers/ranks.py FOLDER

Both train every script for some fifty updates. Environments have the seeds that they always have; every other random
draw is made anew here, by one generator for each half of the data: so the one process draws what the two draw.
"""

import atexit
import contextlib
import sys
from pathlib import Path

import conftest
import numpy as np
import torch

import common
import common.checkpoint
from common.args import RANK, WORLD_SIZE
from common.internals.resume import checkpoint_files, signals
from common.internals.speed import processes
from common.internals.tracking.run_dir import RUN_DIR_KEY

HALVES = [RANK] if WORLD_SIZE > 1 else [0, 1]
ENVS = 4 // WORLD_SIZE
QUIET = {"track": False, "cuda": False, "eval_episodes": 0, "num_envs": 4, "log_interval": 100}
PENDULUM = {"env_id": "Pendulum-v1", "learning_rate": 1e-2, "norm_obs": True, "norm_reward": True}
TRAINED = {
    "ppo": {**PENDULUM, "total_timesteps": 384, "num_steps": 32, "num_minibatches": 4, "update_epochs": 5},
    "ppo_recurrent": {**PENDULUM, "total_timesteps": 384, "num_steps": 32, "num_minibatches": 2, "update_epochs": 7},
    "reinforce_rollout": {"total_timesteps": 1600, "num_steps": 10},
    "dqn": {"total_timesteps": 400, "learning_starts": 100, "train_frequency": 6, "start_e": 1.0, "end_e": 1.0},
    "pqn": {"total_timesteps": 600, "num_steps": 30, "num_minibatches": 3, "start_e": 1.0, "end_e": 1.0},
    "sac": {"total_timesteps": 160, "learning_starts": 100, "target_network_frequency": 2},
    "crossq": {"total_timesteps": 160, "learning_starts": 100},
}
BATCH = 64 // WORLD_SIZE


class Draws:
    """torch's random functions, from a generator for each half of the rows."""

    def __init__(self, minibatches):
        self.minibatches = minibatches
        self.generators = [torch.Generator().manual_seed(100 + half) for half in HALVES]

    def rows(self, number, draw):
        return torch.cat([draw(number // len(HALVES), generator) for generator in self.generators])

    def rand(self, number, *rest, device=None):
        return self.rows(number, lambda n, g: REAL["rand"](n, *rest, generator=g))

    def randn_like(self, x):
        return self.rows(len(x), lambda n, g: REAL["randn"](n, *x.shape[1:], generator=g))

    def randint(self, high, size):
        if high < 10:  # actions
            return self.rows(size[0], lambda n, g: REAL["randint"](high, (n,), generator=g))
        drawn = [REAL["randint"](high // len(HALVES), (size[0] // len(HALVES),), generator=g) for g in self.generators]
        return torch.cat([self.place(places, i) for i, places in enumerate(drawn)])

    def randperm(self, size, device=None):
        orders = [REAL["randperm"](size // len(HALVES), generator=g) for g in self.generators]
        parts = zip(*(order.tensor_split(self.minibatches) for order in orders), strict=True)
        return torch.cat([self.place(places, i) for part in parts for i, places in enumerate(part)])

    def place(self, places, i):
        """Where in [steps, all environments] the place of [steps, environments of half i] is."""
        envs = ENVS // len(HALVES)
        return places // envs * ENVS + i * envs + places % envs

    def actions(self, agent, obs):
        """Not those of the policy: rounding errors would grow into other episodes."""
        n = len(obs)
        return self.randint(2, (n,)) if agent.discrete else self.randn_like(REAL["zeros"](n, 1))


REAL = {name: getattr(torch, name) for name in ("rand", "randn", "randn_like", "randint", "randperm", "zeros")}


@contextlib.contextmanager
def drawn_by(draws):
    for name in ("rand", "randn_like", "randint", "randperm"):
        setattr(torch, name, getattr(draws, name))
    try:
        yield
    finally:
        for name, function in REAL.items():
            setattr(torch, name, function)


def train(script, folder, patch=lambda module: None, **flags):
    """main() of a script; returns its Checkpoint, whose parts are what was learnt."""
    kept = []

    class Kept(common.checkpoint.Checkpoint):
        def __init__(self, *words, **parts):
            super().__init__(*words, **parts)
            kept.append(self)

    module = conftest.load(script)
    patch(module)
    common.Checkpoint = Kept
    module.main(module.Args(**{**QUIET, "runs_dir": str(folder), **flags}))
    if WORLD_SIZE > 1:  # the next is another run, not this one started anew
        processes.on_rank_zero(lambda: processes.launcher_store().delete_key(RUN_DIR_KEY))
    return kept[0]


def learnt(checkpoint):
    return {
        f"{name}.{key}": value.clone()
        for name, part in checkpoint.parts.items()
        if isinstance(part, torch.nn.Module)
        for key, value in part.state_dict().items()
        if "running" not in key  # a return for each environment
    }


def trained(script, folder):
    flags = TRAINED[script]
    draws = Draws(flags.get("num_minibatches", 1))
    updates = []

    def sample(agent, obs, memory=None, episode_starts=None, action_mask=None):
        actions = draws.actions(agent, obs)
        return actions if memory is None else (actions, agent.step(obs, memory, episode_starts)[1])

    def patch(module):
        if hasattr(module, "Agent"):
            module.Agent.sample = sample
        loss = next(
            name
            for name in ("ppo_loss", "reinforce_loss", "dqn_loss", "pqn_loss", "critic_loss", "joint_critic_loss")
            if hasattr(module, name)
        )
        function = getattr(module, loss)
        setattr(module, loss, lambda *words: updates.append(1) or function(*words))

    if script in ("dqn", "sac", "crossq"):
        flags = {**flags, "batch_size": BATCH}
    # Batch statistics make rounding errors grow: to 5e-2 in float32 after 60 updates, to 2e-10 in float64.
    torch.set_default_dtype(torch.float64 if script == "crossq" else torch.float32)
    with drawn_by(draws):
        checkpoint = train(script, folder / script, patch, **flags)
    torch.set_default_dtype(torch.float32)
    return {"weights": learnt(checkpoint), "updates": len(updates), "seeds": checkpoint.envs._seeds}


def stopped_by_kl(folder, kls):
    """Updates of PPO whose approximate KL divergences, one for each process, are `kls`, with target_kl 1."""
    updates = []

    def patch(module):
        function = module.ppo_loss

        def with_kl(*words):
            updates.append(1)
            loss, metrics = function(*words)
            return loss, {**metrics, "losses/approx_kl": torch.tensor(kls[RANK])}

        module.ppo_loss = with_kl

    flags = {"total_timesteps": 128, "num_steps": 16, "update_epochs": 3, "num_minibatches": 2, "target_kl": 1.0}
    checkpoint = train("ppo", folder / f"kl{kls}", patch, **flags)
    return {"updates": len(updates), "weights": learnt(checkpoint)}


def statistics(folder):
    x = torch.from_numpy(np.random.default_rng(5).normal(1000.0, 3.0, (2, 40, 3)))
    mine = x[RANK]
    rms = common.RunningMeanStd((3,))
    for part in mine.split(10):
        rms.update(part)
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    bias = torch.nn.Parameter(torch.zeros(3))
    unused = torch.nn.Parameter(torch.zeros(3))
    weight.grad, bias.grad = torch.full((2, 2), 1.0 + RANK), torch.tensor([5.0, 6.0, 7.0]) * (RANK + 1)
    common.sync_grads([weight, unused, bias])
    return {
        "x": x,
        "mean_std": common.global_mean_std(mine.float()),
        "rms": (rms.mean, rms.var, rms.count),
        "mean": common.global_mean(torch.tensor(float(RANK))),
        "grads": (weight.grad, unused.grad, bias.grad),
        "random": torch.rand(4),
    }


def ended(folder):
    try:
        processes.on_rank_zero(lambda: common.fail("all of them", code=6))
    except SystemExit as stop:
        return stop.code


def different_weights(folder):
    """A script that forgets to average."""
    real = common.sync_grads
    common.sync_grads = lambda params: None
    try:
        train("reinforce_rollout", folder / "forgot", total_timesteps=64, num_steps=8, save_interval=32)
    except SystemExit as stop:
        return stop.code
    finally:
        common.sync_grads = real
        processes.on_rank_zero(lambda: processes.launcher_store().delete_key(RUN_DIR_KEY))


def loaded(folder):
    """Steps of the checkpoints found: all whole, the newest not committed, the one before broken in one process."""
    checkpoints = folder / "loaded" / "checkpoints"
    own = checkpoints / f"process-{RANK}"
    own.mkdir(parents=True, exist_ok=True)
    names = [f"step-{step:012d}" for step in (1, 2, 3, 4)]
    for step, name in enumerate(names, 1):
        checkpoint_files.write_file(own / f"{name}.pt", {"step": step, "segments": {}})
        processes.on_rank_zero(lambda name=name: (checkpoints / f"{name}.commit").write_bytes(b""))
    steps, renamed = [], []
    rename = Path.rename

    def load():
        processes.all_gather_object(None)
        Path.rename = lambda path, target: (renamed.append(path), rename(path, target))[1]
        try:
            steps.append(checkpoint_files.load_latest(checkpoints)["step"])
        finally:
            Path.rename = rename

    load()
    processes.on_rank_zero(lambda: (checkpoints / f"{names[3]}.commit").unlink())
    load()
    if RANK == 1:
        (own / f"{names[2]}.pt").write_bytes(b"cut short")
    load()
    if RANK == 0:
        (own / f"{names[1]}.pt").unlink()
    load()
    processes.all_gather_object(None)
    others = [path.name for path in renamed if path.parent != own]
    return {"steps": steps, "files": sorted(path.name for path in own.iterdir()), "renamed others": others}


def signalled(folder):
    """At which call of `agreed` a process learns that the other was asked to stop."""
    asked = signals.StopSignals()
    heard = []
    for call in range(1000):
        if call == 300 and RANK == 1:
            asked.number = 15
        if asked.agreed():
            heard = [call, asked.number]
            break
    asked.restore_handlers()
    return heard


def threads():
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


def main(folder):
    atexit.register(lambda: (folder / f"threads-{RANK}").write_text(" ".join(threads())))  # the last to be called
    common.setup(common.RunArgs(cuda=False))
    results = {script: trained(script, folder) for script in TRAINED}
    if WORLD_SIZE > 1:
        results["one KL above, mean below"] = stopped_by_kl(folder, [0.0, 1.9])
        results["one KL above, mean above"] = stopped_by_kl(folder, [0.0, 2.1])
        for case in (statistics, ended, different_weights, loaded, signalled):
            results[case.__name__] = case(folder)
    torch.save(results, folder / f"results-{WORLD_SIZE}-{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
