"""Parallelised Q-networks (PQN): Q(λ) on rollouts. Gallici et al., 2024: https://arxiv.org/abs/2407.04811

    python algos/pqn.py --env-id CartPole-v1 --cuda

Layer normalisation replaces DQN's target network, and parallel environments its replay. Differs from the paper:
1. A truncated episode bootstraps from its last observation; a terminated one does not. Both cut the trace of Q(λ).
2. Adam instead of RAdam, as `--compile` makes Adam's step a part of the graph. RAdam was not compared.
3. Layer normalisation is over all of [C, H, W] after a convolution. Rewards are clipped only with `--clip-rewards`.

Logged: losses/td_loss, losses/q_values (mean Q of the actions taken), both of the last minibatch; charts/epsilon,
charts/learning_rate; all metrics: docs/health.md. Reference scores: runs/README.md
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from gymnasium.spaces import Discrete
from torch import Tensor, nn

import common


@dataclass
class Args(common.RunArgs):
    total_timesteps: int = 250_000
    """environment steps over all environments, in whole rollouts"""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """units of the hidden layers (flat observations)"""
    num_envs: int = 32
    """parallel environments, in total over all processes"""
    num_steps: int = 64
    """steps of each environment per rollout"""
    learning_rate: float = 1e-3
    """initial learning rate of Adam"""
    anneal_lr: bool = True
    """anneal the learning rate linearly to zero"""
    gamma: float = 0.99
    """discount factor"""
    q_lambda: float = 0.95
    """lambda of the Q(lambda) returns (0: one step; 1: until the end of the episode or rollout)"""
    num_minibatches: int = 8
    """minibatches per epoch"""
    update_epochs: int = 4
    """epochs over each rollout"""
    max_grad_norm: float = 10.0
    """largest gradient norm; larger gradients are scaled down"""
    start_e: float = 1.0
    """epsilon at the start"""
    end_e: float = 0.05
    """epsilon at the end"""
    exploration_fraction: float = 0.3
    """fraction of total_timesteps over which epsilon falls"""
    terminal_on_life_loss: bool = True
    """treat a lost life as a termination (Atari)"""
    clip_rewards: bool = False
    """learn from the sign of each reward (Atari)"""
    log_interval: int = 5_000
    """environment steps between logged rows"""


class QNetwork(nn.Module):
    """Q(s, ·): hidden layers over flat observations, or DQN's convolutions over uint8 images [C, H, W]; normalised."""

    def __init__(self, envs: common.Envs, args: Args) -> None:
        super().__init__()
        shape = envs.single_observation_space.shape
        self.pixels = len(shape) == 3
        layers = nn.Sequential()
        if self.pixels:
            for c_in, c_out, kernel, stride in ((shape[0], 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)):
                layers.append(nn.Conv2d(c_in, c_out, kernel, stride))
                layers.extend([nn.LayerNorm(layers(torch.zeros(1, *shape)).shape[1:]), nn.ReLU()])
        layers.append(nn.Flatten())
        width = layers(torch.zeros(1, *shape)).shape[1]
        for size in (512,) if self.pixels else args.hidden_sizes:
            layers.extend([nn.Linear(width, size), nn.LayerNorm(size), nn.ReLU()])
            width = size
        self.network = layers.append(nn.Linear(width, int(envs.single_action_space.n)))

    def forward(self, obs: Tensor) -> Tensor:
        return self.network(obs / 255.0 if self.pixels else obs)

    def greedy(self, obs: Tensor, action_mask: Tensor | None = None) -> Tensor:
        return allowed(self(obs), action_mask).argmax(dim=1)

    def sample(self, obs: Tensor, action_mask: Tensor | None, epsilon: float) -> Tensor:
        """Each environment's greedy action or, with probability epsilon, a random one of those allowed."""
        q, explore = self(obs), torch.rand(len(obs), 1, device=obs.device) < epsilon
        return allowed(torch.where(explore, torch.rand(*q.shape, device=q.device), q), action_mask).argmax(dim=1)


def allowed(q: Tensor, action_mask: Tensor | None) -> Tensor:
    """Q-values [B, num_actions], -inf for the actions that the mask does not allow."""
    return q if action_mask is None else q.masked_fill(~action_mask.to(q.device), -torch.inf)


def linear_schedule(start: float, end: float, duration: float, t: int) -> float:
    """Linear from `start` at t = 0 to `end` at t = `duration`, then constant."""
    return end if t >= duration else start + (end - start) * t / duration


def q_lambda_returns(rollout: common.RolloutStorage, next_values: Tensor, args: Args) -> Tensor:
    """Q(λ) returns [num_steps, num_envs]; λ is 0 where an episode or the rollout ends. next_values: max_a Q(s', a)."""
    lambdas = args.q_lambda * ~(rollout.terminations | rollout.truncations)
    lambdas[-1] = 0.0
    returns = rollout.rewards + args.gamma * (1 - lambdas) * next_values.masked_fill(rollout.terminations, 0.0)
    for t in reversed(range(len(returns) - 1)):
        returns[t] += args.gamma * lambdas[t] * returns[t + 1]
    return returns


def pqn_loss(q_network: nn.Module, mb: SimpleNamespace) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error of Q(s, a) towards its Q(λ) return."""
    q = q_network(mb.obs).gather(1, mb.actions.unsqueeze(1)).squeeze(1)
    loss = nn.functional.mse_loss(q, mb.returns)
    return loss, {"losses/td_loss": loss.detach(), "losses/q_values": q.detach().mean()}


def main(args: Args) -> None:
    device = common.setup(args)
    envs = common.make_envs(args, wrap=None, terminal_on_life_loss=args.terminal_on_life_loss)
    if not isinstance(envs.single_action_space, Discrete):
        common.fail(f"PQN needs a Discrete action space; {args.env_id} has {envs.single_action_space}")
    if args.num_steps * envs.num_envs < 2 * args.num_minibatches:
        common.fail("--num-minibatches must leave at least 2 samples each")
    q_network = QNetwork(envs, args).to(device)
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, fused=True)
    rollout = common.RolloutStorage(args.num_steps, envs.num_envs, device)
    run = common.track(args, device)
    checkpoint = common.Checkpoint(run, envs, q_network=q_network, optimizer=optimizer)
    run.save_policy(q_network.greedy)
    evaluation = common.Evaluation(run, q_network.greedy)

    @common.compile_update(args, optimizer)
    def update(mb: SimpleNamespace) -> dict[str, Tensor]:
        loss, metrics = pqn_loss(q_network, mb)
        optimizer.zero_grad()
        loss.backward()
        common.sync_grads(q_network.parameters())  # mean over the processes of torchrun
        nn.utils.clip_grad_norm_(q_network.parameters(), args.max_grad_norm)
        optimizer.step()
        return metrics

    last_lr = 0.0 if args.anneal_lr else args.learning_rate
    exploration_steps = args.exploration_fraction * args.total_timesteps
    obs, _ = envs.reset(seed=args.seed)
    obs, global_step = checkpoint.restore(obs)
    log_due = common.Every(args.log_interval, now=global_step)
    while global_step < args.total_timesteps:
        if evaluation(global_step):
            break
        lr = linear_schedule(args.learning_rate, last_lr, args.total_timesteps, global_step)
        optimizer.param_groups[0]["lr"] = lr
        with torch.no_grad():
            for _ in range(args.num_steps):
                epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, global_step)
                actions = q_network.sample(obs.to(device), envs.action_mask, epsilon)
                next_obs, rewards, terminations, truncations, infos = envs.step(actions)
                global_step += args.num_envs
                run.log_episodes(infos, global_step)
                rollout.add(
                    obs=obs,
                    actions=actions,
                    rewards=rewards.sign() if args.clip_rewards else rewards,
                    next_obs=common.final_obs(next_obs, infos),
                    next_mask=common.final_mask(envs.action_mask, infos),
                    terminations=terminations,
                    truncations=truncations,
                )
                obs = next_obs
            next_q = q_network(rollout.next_obs.flatten(0, 1)).unflatten(0, rollout.rewards.shape)
            next_actions = allowed(next_q, getattr(rollout, "next_mask", None)).argmax(dim=2, keepdim=True)
            returns = q_lambda_returns(rollout, next_q.gather(2, next_actions).squeeze(2), args)

        for _ in range(args.update_epochs):
            for mb in rollout.minibatches(args.num_minibatches, returns=returns):
                metrics = update(mb)
        rollout.clear()
        if log_due(global_step):
            health = common.diagnostics(q_network, mb.obs, global_step, optimizer)
            run.log({**metrics, **health, "charts/epsilon": epsilon, "charts/learning_rate": lr}, global_step)
        checkpoint.save(global_step)
    envs.close()
    evaluation(global_step)
    run.finish()


if __name__ == "__main__":
    main(common.parse(Args, __doc__))
