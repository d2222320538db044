"""Deep Q-learning (Mnih et al., 2015: https://doi.org/10.1038/nature14236) with PyTorch Lightning as the trainer.

    pip install -e ".[lightning]"
    python algos/dqn_lightning.py --env-id CartPole-v1 --cuda

This shows how to use the replay and the runs of this project with another trainer. Lightning's Trainer draws batches
from a DataLoader over the replay and steps the optimizer; after each update a callback steps the environments until
the next update is due. The algorithm is that of dqn.py, and the same flags give the same weights to the bit. Images and
clipped rewards are left out.

Logged: losses/td_loss, losses/q_values (mean Q of the actions taken), charts/epsilon, charts/learning_rate; all
metrics: docs/health.md. Reference scores: runs/README.md
"""

import copy
import logging
import math
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from gymnasium.spaces import Discrete
from torch import Tensor, nn
from torch.utils.data import DataLoader

import common


@dataclass
class Args(common.RunArgs):
    total_timesteps: int = 50_000
    """environment steps over all environments"""
    eval_interval: int = 25_000
    """environment steps between evaluations (0: only at the end)"""
    buffer_size: int = 100_000
    """transitions in the replay"""
    learning_starts: int = 1_000
    """environment steps before the first update"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """units of the hidden layers"""
    learning_rate: float = 2.3e-3
    """initial learning rate of Adam"""
    anneal_lr: bool = True
    """anneal the learning rate linearly to zero"""
    batch_size: int = 64
    """transitions per update"""
    gamma: float = 0.99
    """discount factor"""
    train_frequency: int = 2
    """environment steps per update"""
    target_network_frequency: int = 128
    """environment steps between target network updates"""
    tau: float = 1.0
    """weight of the online network in a target update (1: copy)"""
    start_e: float = 1.0
    """epsilon at the start"""
    end_e: float = 0.1
    """epsilon at the end"""
    exploration_fraction: float = 0.3
    """fraction of total_timesteps over which epsilon falls"""
    double: bool = True
    """double DQN; --no-double is the target of 2015"""
    log_interval: int = 500
    """environment steps between logged rows"""


try:
    import lightning
    from lightning.pytorch.utilities.exceptions import SIGTERMException
except ImportError:
    common.fail('PyTorch Lightning is not installed: pip install -e ".[lightning]"')


class QNetwork(nn.Module):
    """Q(s, ·) of flat observations."""

    def __init__(self, envs: common.Envs, args: Args) -> None:
        super().__init__()
        width = math.prod(envs.single_observation_space.shape)
        layers: list[nn.Module] = [nn.Flatten()]
        for size in args.hidden_sizes:
            layers += [nn.Linear(width, size), nn.ReLU()]
            width = size
        self.network = nn.Sequential(*layers, nn.Linear(width, int(envs.single_action_space.n)))

    def forward(self, obs: Tensor) -> Tensor:
        return self.network(obs)

    def greedy(self, obs: Tensor, action_mask: Tensor | None = None) -> Tensor:
        return allowed(self(obs), action_mask).argmax(dim=1)


def allowed(q: Tensor, action_mask: Tensor | None) -> Tensor:
    """Q-values [B, num_actions], -inf for the actions that the mask does not allow."""
    return q if action_mask is None else q.masked_fill(~action_mask.to(q.device), -torch.inf)


def linear_schedule(start: float, end: float, duration: float, t: int) -> float:
    """Linear from `start` at t = 0 to `end` at t = `duration`, then constant."""
    return end if t >= duration else start + (end - start) * t / duration


def dqn_loss(
    q_network: nn.Module, target_network: nn.Module, batch: SimpleNamespace, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared TD error of Q(s, a) towards r + γ max_a' Q_target(s', a'), over the actions a' that are allowed."""
    next_mask = getattr(batch, "next_mask", None)  # only of environments that report action masks
    with torch.no_grad():
        next_q = target_network(batch.next_obs)
        best = allowed(q_network(batch.next_obs) if args.double else next_q, next_mask).argmax(dim=1, keepdim=True)
        next_q = next_q.gather(1, best).squeeze(1)
        td_target = batch.rewards + args.gamma * next_q * ~batch.terminations
    q = q_network(batch.obs).gather(1, batch.actions.unsqueeze(1)).squeeze(1)
    loss = F.mse_loss(q, td_target)
    return loss, {"losses/td_loss": loss.detach(), "losses/q_values": q.detach().mean()}


@torch.no_grad()
def polyak_update(network: nn.Module, target: nn.Module, tau: float) -> None:
    """target ← (1 - τ) target + τ network."""
    for param, target_param in zip(network.parameters(), target.parameters(), strict=True):
        target_param.lerp_(param, tau)


class DQN(lightning.LightningModule):
    """Learns from Lightning's batches, and steps the environments between them."""

    def __init__(self, envs: common.Envs, args: Args, run: common.Run, device: torch.device) -> None:
        super().__init__()
        self.envs, self.args, self.run = envs, args, run
        self.q_network = QNetwork(envs, args)
        self.target_network = copy.deepcopy(self.q_network).requires_grad_(False)
        self.to(device)  # Lightning does so in fit(), after the first environment steps
        self.optimizer = torch.optim.Adam(self.q_network.parameters(), lr=args.learning_rate, fused=True)
        self.replay = common.ReplayBuffer(args.buffer_size, envs.num_envs, device)
        self.data = common.ReplayDataset(self.replay, args.batch_size)
        self.checkpoint = common.Checkpoint(
            run,
            envs,
            q_network=self.q_network,
            target_network=self.target_network,
            optimizer=self.optimizer,
            replay=self.replay,
        )
        run.save_policy(self.q_network.greedy)
        self.evaluation = common.Evaluation(run, self.q_network.greedy)
        self.env_step = 0  # `global_step` is Lightning's name for the number of updates
        self.playing = self.play()
        self.on_sigterm = signal.getsignal(signal.SIGTERM)  # the handler of `run`

    def train_dataloader(self) -> DataLoader:
        # with its own generator the loader draws no seed for workers from the global one
        return DataLoader(self.data, batch_size=None, generator=torch.Generator())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer

    def on_train_start(self) -> None:
        signal.signal(signal.SIGTERM, self.on_sigterm)  # Lightning's handler would stop without a checkpoint

    def training_step(self, batch: SimpleNamespace, batch_idx: int) -> Tensor:
        loss, metrics = dqn_loss(self.q_network, self.target_network, batch, self.args)
        self.run.note(metrics)
        return loss

    def on_train_batch_end(self, outputs: object, batch: SimpleNamespace, batch_idx: int) -> None:
        next(self.playing, None)

    @torch.no_grad()
    def act(self, obs: Tensor, action_mask: Tensor | None, epsilon: float) -> Tensor:
        explore = torch.rand(len(obs)) < epsilon
        if action_mask is None:
            actions = torch.randint(self.envs.single_action_space.n, (len(obs),))
        else:
            actions = action_mask.float().multinomial(1).squeeze(1)
        if not explore.all():
            actions = torch.where(explore, actions, self.q_network.greedy(obs.to(self.device), action_mask).cpu())
        return actions

    def play(self) -> Iterator[None]:
        """The loop of dqn.py; it yields when an update is due."""
        args, run, envs = self.args, self.run, self.envs
        obs, _ = envs.reset(seed=args.seed)
        obs, self.env_step = self.checkpoint.restore(obs)
        train_due = common.Every(args.train_frequency, start=args.learning_starts, now=self.env_step)
        target_due = common.Every(args.target_network_frequency, start=args.learning_starts, now=self.env_step)
        log_due = common.Every(args.log_interval, now=self.env_step)
        exploration_steps = args.exploration_fraction * args.total_timesteps
        env_steps = math.ceil(args.total_timesteps / args.num_envs) * args.num_envs
        updates = max((env_steps - args.learning_starts) // args.train_frequency, 0)
        self.data.num_batches = updates - train_due.passed

        while self.env_step < args.total_timesteps:
            self.evaluation(self.env_step)
            epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, self.env_step)
            actions = self.act(obs, envs.action_mask, epsilon)
            next_obs, rewards, terminations, truncations, infos = envs.step(actions)
            self.env_step += args.num_envs
            run.log_episodes(infos, self.env_step)
            self.replay.add(
                obs=obs,
                actions=actions,
                rewards=rewards,
                next_obs=common.final_obs(next_obs, infos),
                next_mask=common.final_mask(envs.action_mask, infos),
                terminations=terminations,
            )
            obs = next_obs

            last_lr = 0.0 if args.anneal_lr else args.learning_rate
            lr = linear_schedule(args.learning_rate, last_lr, args.total_timesteps, self.env_step)
            self.optimizer.param_groups[0]["lr"] = lr
            for _ in range(train_due(self.env_step)):
                with common.update_timer:
                    yield
            for _ in range(target_due(self.env_step)):
                polyak_update(self.q_network, self.target_network, args.tau)
            if log_due(self.env_step):
                health = common.diagnostics(self.q_network, self.replay.spread(256).obs, self.env_step, self.optimizer)
                health["health/replay_age"] = self.replay.mean_age()
                charts = {"charts/epsilon": epsilon, "charts/learning_rate": lr}
                run.log({**health, **charts}, self.env_step)
            self.checkpoint.save(self.env_step)


def main(args: Args) -> None:
    device = common.setup(args, torchrun=False)
    envs = common.make_envs(args, wrap=None)
    if not isinstance(envs.single_action_space, Discrete):
        common.fail(f"DQN needs a Discrete action space; {args.env_id} has {envs.single_action_space}")
    if len(envs.single_observation_space.shape) == 3:
        common.fail(f"this script takes flat observations; {args.env_id} has images: use dqn.py")
    if args.compile:
        common.fail("this script has no --compile: Lightning runs the update; use dqn.py")
    if args.stop_at_return is not None:
        common.fail("this script has no --stop-at-return: Lightning runs a fixed number of updates; use dqn.py")
    run = common.track(args, device)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`")  # a warning about Lightning's own code
    # The next two are about worker processes, which a replay cannot have.
    warnings.filterwarnings("ignore", "Your `IterableDataset` has `__len__`")
    warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
    dqn = DQN(envs, args, run, device)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator=device.type,
        devices=1,
        logger=False,  # rows go to `run`
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    next(dqn.playing, None)  # until the first update is due
    try:
        trainer.fit(dqn)
    except SIGTERMException:  # Lightning would exit with code 0
        run.stop(dqn.env_step)

    envs.close()
    dqn.evaluation(dqn.env_step)
    run.finish()


if __name__ == "__main__":
    main(common.parse(Args, __doc__))
