"""CrossQ: SAC without target networks, with batch normalisation. Bhatt et al., 2024: https://arxiv.org/abs/1902.05605

    python algos/crossq.py --env-id Pendulum-v1 --cuda

One forward pass of (s, a) and (s', a') gives both Q, so that the batch statistics are of both. Layers are batch
renormalisation (Ioffe, 2017: https://arxiv.org/abs/1702.03275). Acting, a' and the critics of the policy's update use
running statistics. Actions are in [-1, 1]; they are scaled to their bounds just before the environment's step.

Differs from the paper:
1. Critics are as wide as the policy, for CPUs; `--critic-hidden-sizes 2048 2048` is the paper's.
2. The policy's log standard deviation is squashed into [-5, 2] by a tanh; the authors' code clamps it to [-20, 2].
3. A truncated episode bootstraps from its last observation; a terminated one does not bootstrap.
Logged: losses/qf1_loss, losses/qf2_loss, losses/qf1_values, losses/qf2_values (mean Q of the actions taken),
losses/actor_loss, losses/alpha, losses/alpha_loss, charts/learning_rate (the policy's); all metrics: docs/health.md.
Reference scores: runs/README.md
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from gymnasium.spaces import Box
from torch import Tensor, nn

import common


@dataclass
class Args(common.RunArgs):
    env_id: str = "Pendulum-v1"
    """gymnasium environment id"""
    total_timesteps: int = 20_000
    """environment steps over all environments"""
    buffer_size: int = 1_000_000
    """transitions in the replay"""
    learning_starts: int = 1_000
    """environment steps with random actions, before the first update"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """units of the hidden layers"""
    critic_hidden_sizes: tuple[int, ...] = ()
    """units of the critics' hidden layers (default: those of --hidden-sizes)"""
    policy_lr: float = 1e-3
    """initial learning rate of the policy"""
    q_lr: float = 1e-3
    """initial learning rate of critics and temperature"""
    anneal_lr: bool = False
    """anneal the learning rates linearly to zero"""
    batch_size: int = 256
    """transitions per update"""
    gamma: float = 0.99
    """discount factor"""
    alpha: float | None = None
    """temperature, the weight of the entropy (default: learned)"""
    train_frequency: int = 1
    """environment steps per critic update"""
    policy_frequency: int = 3
    """critic updates per policy update"""
    bf16: bool = False
    """compute hidden layers of updates in bfloat16"""
    log_interval: int = 500
    """environment steps between logged rows"""


LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
MOMENTUM, EPSILON, WARM_UP, R_MAX, D_MAX = 0.01, 1e-3, 100_000, 3.0, 5.0  # of BatchRenorm, in the authors' code


class Head(nn.Linear):
    """An output layer, in float32 even with --bf16: bfloat16 would round a Q-value of 1,000 to a multiple of 4."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class GlobalMean(torch.autograd.Function):
    """The mean over the processes of torchrun, whose losses are averaged: its gradient is the mean of theirs."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return common.global_mean(x)

    backward = forward


class BatchRenorm(nn.Module):
    """Batch renormalisation of [B, width] (Ioffe, 2017, algorithm 1); batch normalisation for WARM_UP updates."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.mean, self.var = nn.Buffer(torch.zeros(width)), nn.Buffer(torch.ones(width))
        self.num_updates = nn.Buffer(torch.tensor(0))

    def forward(self, x: Tensor, train: bool = False) -> Tensor:
        """Normalises by the running statistics, or, with `train`, by those of the batch, which it adds to them."""
        x = x.to(self.weight.dtype)  # float32 even with --bf16
        if train:
            mean = GlobalMean.apply(x.mean(dim=0))
            var = GlobalMean.apply((x - mean).square().mean(dim=0))
            std = (var + EPSILON).sqrt()
            with torch.no_grad():
                warm, running_std = self.num_updates >= WARM_UP, (self.var + EPSILON).sqrt()
                r = torch.where(warm, (std / running_std).clamp(1 / R_MAX, R_MAX), 1.0)
                d = torch.where(warm, ((mean - self.mean) / running_std).clamp(-D_MAX, D_MAX), 0.0)
                self.mean.lerp_(mean, MOMENTUM)
                self.var.lerp_(var, MOMENTUM)
                self.num_updates.add_(1)
            return ((x - mean) / std * r + d) * self.weight + self.bias
        return (x - self.mean) / (self.var + EPSILON).sqrt() * self.weight + self.bias


class MLP(nn.Sequential):
    """Batch renormalisation before each linear layer (figure 2 of the paper)."""

    def __init__(self, width: int, hidden_sizes: tuple[int, ...], out_dim: int) -> None:
        layers: list[nn.Module] = [BatchRenorm(width)]
        for size in hidden_sizes:
            layers += [nn.Linear(width, size), nn.ReLU(), BatchRenorm(size)]
            width = size
        super().__init__(*layers, Head(width, out_dim))

    def forward(self, x: Tensor, train: bool = False) -> Tensor:
        for layer in self:
            x = layer(x, train) if isinstance(layer, BatchRenorm) else layer(x)
        return x


class Critic(nn.Module):
    """Q1(s, a) and Q2(s, a), two separate networks; actions in [-1, 1]."""

    def __init__(self, envs: common.Envs, args: Args) -> None:
        super().__init__()
        width = envs.single_observation_space.shape[0] + math.prod(envs.single_action_space.shape)
        hidden_sizes = args.critic_hidden_sizes or args.hidden_sizes
        self.qf1, self.qf2 = MLP(width, hidden_sizes, 1), MLP(width, hidden_sizes, 1)

    def forward(self, obs: Tensor, actions: Tensor, train: bool = False) -> tuple[Tensor, Tensor]:
        x = torch.cat([obs, actions], dim=1)
        return self.qf1(x, train).squeeze(1), self.qf2(x, train).squeeze(1)


class Actor(nn.Module):
    """The policy: a diagonal Gaussian squashed into [-1, 1] by a tanh."""

    action_scale: Tensor
    action_bias: Tensor

    def __init__(self, envs: common.Envs, args: Args) -> None:
        super().__init__()
        space = envs.single_action_space
        self.network = MLP(envs.single_observation_space.shape[0], args.hidden_sizes, 2 * math.prod(space.shape))
        self.register_buffer("action_scale", envs.action_scale)
        self.register_buffer("action_bias", envs.action_bias)

    def forward(self, obs: Tensor, train: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation before the tanh."""
        mean, log_std = self.network(obs, train).chunk(2, dim=1)
        return mean, LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(log_std) + 1)

    def sample(self, obs: Tensor, train: bool = False) -> tuple[Tensor, Tensor]:
        """Reparametrised actions in [-1, 1], and their log-probabilities."""
        mean, log_std = self(obs, train)
        return squashed_gaussian(mean, log_std, torch.randn_like(mean))

    def in_env_units(self, actions: Tensor) -> Tensor:
        """Actions scaled from [-1, 1] to the bounds of each dimension."""
        return actions.view(-1, *self.action_scale.shape) * self.action_scale + self.action_bias

    def greedy(self, obs: Tensor) -> Tensor:
        mean, _ = self(obs)
        return self.in_env_units(torch.tanh(mean))


class Temperature(nn.Module):
    """The temperature α, the weight of the entropy."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(initial).log())

    def forward(self) -> Tensor:
        return self.log_alpha.exp()


def squashed_gaussian(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """tanh(mean + std noise), [B, dim], and its log-density on [-1, 1]^dim, [B], for standard normal noise."""
    x = mean + log_std.exp() * noise
    normal_log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_det = 2 * (math.log(2) - x - F.softplus(-2 * x))  # log(1 - tanh(x)^2)
    return torch.tanh(x), (normal_log_prob - log_det).sum(dim=1)


def joint_critic_loss(
    critic: Critic, actor: Actor, alpha: Tensor, batch: SimpleNamespace, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error of both Q(s, a) towards r + γ (min Q(s', a') - α log π(a'|s')), all Q of one batch."""
    with torch.no_grad():
        next_actions, next_log_prob = actor.sample(batch.next_obs)
    obs, actions = torch.cat([batch.obs, batch.next_obs], dim=0), torch.cat([batch.actions, next_actions], dim=0)
    (qf1, next_qf1), (qf2, next_qf2) = (qf.chunk(2, dim=0) for qf in critic(obs, actions, train=True))
    next_value = torch.min(next_qf1, next_qf2).detach() - alpha * next_log_prob
    td_target = batch.rewards + args.gamma * next_value * ~batch.terminations
    qf1_loss, qf2_loss = F.mse_loss(qf1, td_target), F.mse_loss(qf2, td_target)
    return qf1_loss + qf2_loss, {
        "losses/qf1_loss": qf1_loss.detach(),
        "losses/qf2_loss": qf2_loss.detach(),
        "losses/qf1_values": qf1.detach().mean(),
        "losses/qf2_values": qf2.detach().mean(),
    }


def actor_loss(
    critic: Critic, alpha: Tensor, obs: Tensor, actions: Tensor, log_prob: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """α log π(a|s) - min Q(s, a) for reparametrised actions of the policy (equation 9)."""
    loss = (alpha * log_prob - torch.min(*critic(obs, actions))).mean()
    return loss, {"losses/actor_loss": loss.detach(), "losses/alpha": alpha}


def alpha_loss(alpha: Tensor, log_prob: Tensor, target_entropy: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Raises α while the entropy is below its target and lowers it above (equation 18)."""
    loss = -(alpha * (log_prob + target_entropy)).mean()
    return loss, {"losses/alpha_loss": loss.detach()}


def linear_schedule(start: float, end: float, duration: float, t: int) -> float:
    """Linear from `start` at t = 0 to `end` at t = `duration`, then constant."""
    return end if t >= duration else start + (end - start) * t / duration


def main(args: Args) -> None:
    device = common.setup(args)
    envs = common.make_envs(args, wrap=None)
    space = envs.single_action_space
    if not (isinstance(space, Box) and envs.bounded_actions):
        common.fail(f"CrossQ needs a Box action space with finite bounds; {args.env_id} has {space}")
    if len(envs.single_observation_space.shape) != 1:
        common.fail(f"this script takes flat observations; {args.env_id} has {envs.single_observation_space}")
    if args.alpha is not None and args.alpha < 0:
        common.fail(f"--alpha must be at least 0, not {args.alpha}")

    actor, critic = Actor(envs, args).to(device), Critic(envs, args).to(device)
    temperature = Temperature(1.0 if args.alpha is None else args.alpha).to(device).requires_grad_(args.alpha is None)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=args.policy_lr, betas=(0.5, 0.999), fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.q_lr, betas=(0.5, 0.999), fused=True)
    alpha_optimizer = torch.optim.Adam(temperature.parameters(), lr=args.q_lr, betas=(0.5, 0.999), fused=True)
    replay = common.ReplayBuffer(args.buffer_size, envs.num_envs, device)
    run = common.track(args, device)
    networks = {"actor": actor, "critic": critic, "temperature": temperature}
    optimizers = {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
    checkpoint = common.Checkpoint(run, envs, **networks, **optimizers, alpha_optimizer=alpha_optimizer, replay=replay)
    run.save_policy(actor.greedy)
    evaluation = common.Evaluation(run, actor.greedy)
    action_dim = math.prod(space.shape)

    @torch.no_grad()
    def act(obs: Tensor, explore: bool) -> Tensor:
        """Actions in [-1, 1]."""
        if explore:
            return 2 * torch.rand(len(obs), action_dim, device=device) - 1
        return actor.sample(obs.to(device))[0]

    @common.compile_update(args, critic_optimizer)
    def update_critic(batch: SimpleNamespace) -> dict[str, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss, metrics = joint_critic_loss(critic, actor, temperature().detach(), batch, args)
        critic_optimizer.zero_grad()
        loss.backward()
        common.sync_grads(critic.parameters())  # mean over the processes of torchrun
        critic_optimizer.step()
        return metrics

    @common.compile_update(args, actor_optimizer, alpha_optimizer)
    def update_actor(batch: SimpleNamespace) -> dict[str, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            actions, log_prob = actor.sample(batch.obs, train=True)
            loss, metrics = actor_loss(critic, temperature().detach(), batch.obs, actions, log_prob)
        actor_optimizer.zero_grad()
        loss.backward(inputs=list(actor.parameters()))  # no gradients for the critics
        common.sync_grads(actor.parameters())
        actor_optimizer.step()
        if args.alpha is None:
            loss, alpha_metrics = alpha_loss(temperature(), log_prob.detach(), target_entropy=-action_dim)
            alpha_optimizer.zero_grad()
            loss.backward()
            common.sync_grads(temperature.parameters())
            alpha_optimizer.step()
            metrics |= alpha_metrics
        return metrics

    obs, _ = envs.reset(seed=args.seed)
    obs, global_step = checkpoint.restore(obs)
    train_due = common.Every(args.train_frequency, start=args.learning_starts, now=global_step)
    num_updates = train_due.passed
    policy_due = common.Every(args.policy_frequency, now=num_updates)
    log_due = common.Every(args.log_interval, now=global_step)
    while global_step < args.total_timesteps:
        if evaluation(global_step):
            break
        actions = act(obs, explore=global_step < args.learning_starts)
        next_obs, rewards, terminations, truncations, infos = envs.step(actor.in_env_units(actions))
        global_step += args.num_envs
        run.log_episodes(infos, global_step)
        replay.add(
            obs=obs,
            actions=actions,
            rewards=rewards,
            next_obs=common.final_obs(next_obs, infos),
            terminations=terminations,
        )
        obs = next_obs

        lr_left = linear_schedule(1.0, 0.0 if args.anneal_lr else 1.0, args.total_timesteps, global_step)
        actor_optimizer.param_groups[0]["lr"] = lr_left * args.policy_lr
        critic_optimizer.param_groups[0]["lr"] = alpha_optimizer.param_groups[0]["lr"] = lr_left * args.q_lr
        for _ in range(train_due(global_step)):
            batch = replay.sample(args.batch_size)
            run.note(update_critic(batch))
            num_updates += 1
            if policy_due(num_updates):
                run.note(update_actor(batch))
        if log_due(global_step):
            sample, newest = replay.spread(256), replay.newest(256)
            inputs = sample.obs, sample.actions
            health = common.diagnostics(critic, inputs, global_step, critic_optimizer, actor_optimizer, alpha_optimizer)
            health["health/replay_age"] = replay.mean_age()
            health["health/action_saturation"] = (newest.actions.abs() > 0.99).float().mean().item()
            run.log({**health, "charts/learning_rate": lr_left * args.policy_lr}, global_step)
        checkpoint.save(global_step)

    envs.close()
    evaluation(global_step)
    run.finish()


if __name__ == "__main__":
    main(common.parse(Args, __doc__))
