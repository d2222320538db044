"""Deep Q-learning (Mnih et al., 2015: https://doi.org/10.1038/nature14236) with PyTorch Lightning as the trainer.

    pip install -e ".[lightning]"
    python algos/dqn_lightning.py --env-id CartPole-v1 --cuda

It shows how a trainer of your own meets this project's storage and runs: Lightning's Trainer takes batches from a
DataLoader over the live replay, calls `training_step`, and steps optimizer and schedule; the module plays in between.
The algorithm is that of dqn.py: double Q-learning, Adam with its step size annealed to zero, squared error, and a
bootstrap where a time limit cut an episode. It differs in one thing:
1. Lightning asks for each batch one update ahead, so a batch lacks the newest train_frequency transitions.

Logged: losses/td_loss and losses/q_values (mean Q of the actions taken) of the last update, charts/epsilon,
charts/learning_rate, charts/SPS, and the mean of the episodes since the last row as charts/episodic_return and
charts/episodic_length; eval/episodic_return, eval/episodic_return_std, eval/episodic_length, videos/eval.
Reference scores and the commands that made them: runs/README.md
"""

import copy
import logging
import math
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import common


@dataclass
class Args(common.RunArgs):
    total_timesteps: int = 50_000
    """environment steps to take, over all environments (rounded up to a multiple of num_envs)"""
    eval_interval: int = 25_000
    """environment steps between evaluations (0: only at the end, where there is always one)"""
    buffer_size: int = 100_000
    """transitions kept for replay"""
    learning_starts: int = 1_000
    """environment steps before the first update"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """units of the hidden layers"""
    learning_rate: float = 2.3e-3
    """Adam step size at the start"""
    anneal_lr: bool = True
    """let the step size fall linearly to zero at total_timesteps"""
    batch_size: int = 64
    """transitions per update"""
    gamma: float = 0.99
    """discount factor"""
    train_frequency: int = 2
    """environment steps per update"""
    target_network_frequency: int = 128
    """environment steps between copies of the online network into the target network"""
    start_e: float = 1.0
    """exploration rate at the start"""
    end_e: float = 0.1
    """exploration rate at the end"""
    exploration_fraction: float = 0.3
    """share of total_timesteps over which the exploration rate falls"""
    log_interval: int = 500
    """environment steps between logged rows"""


if __name__ == "__main__":
    args = common.parse(Args, __doc__)  # before the slow imports: --help and a mistyped flag answer at once

import torch
import torch.nn.functional as F
from gymnasium.spaces import Discrete
from torch import Tensor, nn
from torch.utils.data import DataLoader

try:
    import lightning
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

    def greedy(self, obs: Tensor) -> Tensor:
        return self(obs).argmax(dim=1)


def linear_schedule(start: float, end: float, duration: float, t: int) -> float:
    """`start` at t = 0, `end` from t = `duration` on, a straight line between."""
    return end if t >= duration else start + (end - start) * t / duration


class DQN(lightning.LightningModule):
    """Plays until an update is due, and learns from the batch it is given."""

    def __init__(self, envs: common.Envs, args: Args, run: common.Run, device: torch.device) -> None:
        super().__init__()
        self.envs, self.args, self.run = envs, args, run
        self.q_network = QNetwork(envs, args).to(device)
        self.target_network = copy.deepcopy(self.q_network).requires_grad_(False)
        self.replay = common.ReplayBuffer(args.buffer_size, args.num_envs, device)
        self.target_due = common.Every(args.target_network_frequency, start=args.learning_starts)
        self.log_due, self.eval_due = common.Every(args.log_interval), common.Every(args.eval_interval)
        self.metrics: dict[str, float | Tensor] = {}
        self.env_step = 0  # `global_step` is Lightning's name for the number of updates
        self.obs, _ = envs.reset(seed=args.seed)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(common.ReplayDataset(self.replay, self.args.batch_size), batch_size=None)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.q_network.parameters(), lr=self.args.learning_rate, fused=True)
        last = 0.0 if self.args.anneal_lr else 1.0

        def factor(_: int) -> float:
            return linear_schedule(1.0, last, self.args.total_timesteps, self.env_step)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: SimpleNamespace, batch_idx: int) -> Tensor:
        """Squared TD error of Q(s, a) towards r + γ Q_target(s', argmax_a' Q(s', a'))."""
        with torch.no_grad():
            best = self.q_network(batch.next_obs).argmax(dim=1, keepdim=True)
            next_q = self.target_network(batch.next_obs).gather(1, best).squeeze(1)
            td_target = batch.rewards + self.args.gamma * next_q * ~batch.terminations
        q = self.q_network(batch.obs).gather(1, batch.actions.unsqueeze(1)).squeeze(1)
        loss = F.mse_loss(q, td_target)
        self.metrics |= {"losses/td_loss": loss.detach(), "losses/q_values": q.detach().mean()}
        return loss

    def on_train_batch_end(self, outputs: object, batch: SimpleNamespace, batch_idx: int) -> None:
        self.metrics["charts/learning_rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.play(self.args.learning_starts + (batch_idx + 1) * self.args.train_frequency)

    @torch.no_grad()
    def play(self, until: int) -> None:
        """Acts epsilon-greedily and stores what happens, until `until` environment steps have been taken."""
        args = self.args
        while self.env_step < min(until, args.total_timesteps):
            exploration_steps = args.exploration_fraction * args.total_timesteps
            epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, self.env_step)
            explore = torch.rand(args.num_envs) < epsilon
            actions = torch.randint(self.envs.single_action_space.n, (args.num_envs,))
            actions = torch.where(explore, actions, self.q_network.greedy(self.obs.to(self.device)).cpu())
            next_obs, rewards, terminations, truncations, infos = self.envs.step(actions)
            self.env_step += args.num_envs
            self.run.log_episodes(infos, self.env_step)
            self.replay.add(
                obs=self.obs,
                actions=actions,
                rewards=rewards,
                next_obs=common.final_obs(next_obs, infos),
                terminations=terminations,
            )
            self.obs = next_obs

            if self.target_due(self.env_step):
                self.target_network.load_state_dict(self.q_network.state_dict())
            if self.log_due(self.env_step):
                self.run.log({**self.metrics, "charts/epsilon": epsilon}, self.env_step)
            if self.eval_due(self.env_step) and self.env_step < args.total_timesteps:
                common.evaluate(self.q_network.greedy, args, self.run, self.env_step)


def main(args: Args) -> None:
    device = common.setup(args)
    envs = common.make_envs(
        args.env_id, args.num_envs, args.async_envs, args.allow_env_import, env_timeout=args.env_timeout
    )
    if not isinstance(envs.single_action_space, Discrete):
        common.fail(f"DQN needs a Discrete action space; {args.env_id} has {envs.single_action_space}")
    if len(envs.single_observation_space.shape) == 3:
        common.fail(f"this script takes flat observations; {args.env_id} has images, for which there is dqn.py")
    run = common.track(args, device)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips between our lines
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # they would read an old replay
    dqn = DQN(envs, args, run, device)
    run.save_policy(dqn.q_network.greedy)
    trainer = lightning.Trainer(
        max_steps=max((args.total_timesteps - args.learning_starts) // args.train_frequency, 0),
        accelerator=device.type,
        devices=1,
        logger=False,  # the module logs to `run`
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    dqn.play(args.learning_starts)
    trainer.fit(dqn)
    dqn.play(args.total_timesteps)

    common.evaluate(dqn.q_network.greedy, args, run, dqn.env_step)
    envs.close()
    run.finish()


if __name__ == "__main__":
    main(args)
