"""Rainbow. Hessel et al., 2018: https://arxiv.org/abs/1710.02298

    python algos/rainbow.py --env-id CartPole-v1 --cuda

DQN with six parts, each a flag. All are on by default; with all off, the weights equal those of dqn.py to the bit.
1. `--double` Q-learning (van Hasselt et al., 2016: https://arxiv.org/abs/1509.06461).
2. `--dueling` networks (Wang et al., 2016: https://arxiv.org/abs/1511.06581), from the last hidden layer on.
3. `--n-step 3`: returns of three rewards (Sutton, 1988), without off-policy correction; `--n-step 1` is DQN's.
4. `--prioritized-replay` (Schaul et al., 2016: https://arxiv.org/abs/1511.05952): priorities are the KL divergence, or
   the absolute TD error with `--no-distributional`.
5. `--distributional`: C51 (Bellemare et al., 2017: https://arxiv.org/abs/1707.06887). Set `--v-min` and `--v-max` to
   the smallest and largest discounted return: for CartPole 0 and 1 / (1 - gamma) = 100.
6. `--noisy` layers instead of epsilon, from the last hidden layer on (Fortunato et al., 2018:
   https://arxiv.org/abs/1706.10295), with new noise for each environment and each forward pass of an update.

Differs from the paper: layers, learning rate and target updates suit small tasks; Adam's learning rate is annealed to
zero (`--no-anneal-lr` keeps it); rewards are clipped only with `--clip-rewards`.

Logged: losses/td_loss (KL divergence or squared TD error), losses/q_values (mean Q of the actions taken),
losses/clipped_return (mean distance of targets from the support; above 0 it is too narrow), charts/epsilon,
charts/learning_rate; all metrics: docs/health.md. Reference scores: runs/README.md
"""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from gymnasium.spaces import Discrete
from torch import Tensor, nn

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
    """units of the hidden layers (flat observations)"""
    learning_rate: float = 2e-3
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
    """epsilon at the start (--no-noisy)"""
    end_e: float = 0.1
    """epsilon at the end (--no-noisy)"""
    exploration_fraction: float = 0.3
    """fraction of total_timesteps over which epsilon falls (--no-noisy)"""
    double: bool = True
    """double DQN"""
    dueling: bool = True
    """dueling network: value and advantage streams"""
    n_step: int = 3
    """rewards in each return"""
    prioritized_replay: bool = True
    """prioritized replay, by the last loss or |TD error|"""
    prioritized_replay_alpha: float = 0.5
    """exponent of the priorities (0: uniform)"""
    prioritized_replay_beta: float = 0.4
    """initial exponent of the importance weights; rises to 1"""
    distributional: bool = True
    """C51: learn the distribution of the return"""
    v_min: float = 0.0
    """lowest atom of the return"""
    v_max: float = 100.0
    """highest atom of the return"""
    num_atoms: int = 51
    """atoms of the distribution"""
    noisy: bool = True
    """noisy layers instead of epsilon"""
    terminal_on_life_loss: bool = True
    """treat a lost life as a termination (Atari)"""
    clip_rewards: bool = False
    """learn from the sign of each reward (Atari)"""
    log_interval: int = 500
    """environment steps between logged rows"""


class NoisyLinear(nn.Linear):
    """(μ_w + σ_w ∘ ε_w) x + μ_b + σ_b ∘ ε_b, with ε_w = f(ε_out) f(ε_in)ᵀ, ε_b = f(ε_out) and f(x) = sign(x) √|x|.

    Fortunato et al. (2018), equations 9 to 11. Each call draws ε_in and ε_out once for the whole batch; in evaluation
    mode they are 0. `weight` and `bias` are the means μ.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)  # uniform within 1 / √in_features, as in the paper
        self.weight_sigma = nn.Parameter(torch.full((out_features, in_features), 0.5 / in_features**0.5))
        self.bias_sigma = nn.Parameter(torch.full((out_features,), 0.5 / in_features**0.5))

    def forward(self, x: Tensor) -> Tensor:
        mean = super().forward(x)
        if not self.training:
            return mean
        noise_in, noise_out = torch.randn_like(x[0]), torch.randn_like(mean[0])
        noise_in, noise_out = (noise.sign() * noise.abs().sqrt() for noise in (noise_in, noise_out))
        return mean + noise_out * F.linear(noise_in * x, self.weight_sigma, self.bias_sigma)


class Dueling(nn.Module):
    """V(s) + A(s, a) - mean_a' A(s, a') for each atom, [B, num_actions, num_atoms]: Hessel et al., section 3."""

    def __init__(self, width: int, hidden: int, num_actions: int, num_atoms: int, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.value = nn.Sequential(linear(width, hidden), nn.ReLU(), linear(hidden, num_atoms))
        self.advantage = nn.Sequential(linear(width, hidden), nn.ReLU(), linear(hidden, num_actions * num_atoms))

    def forward(self, features: Tensor) -> Tensor:
        value = self.value(features).unsqueeze(1)
        advantages = self.advantage(features).unflatten(1, (-1, value.shape[2]))
        return value + advantages - advantages.mean(dim=1, keepdim=True)


class QNetwork(nn.Module):
    """Logits of the return's distribution [B, num_actions, num_atoms], or Q(s, ·) [B, num_actions, 1] without one.

    Hidden layers over flat observations, or the convolutions of DQN over uint8 images [C, H, W].
    """

    support: Tensor  # returns of the atoms [num_atoms]

    def __init__(self, envs: common.Envs, args: Args) -> None:
        super().__init__()
        shape = envs.single_observation_space.shape
        self.pixels = len(shape) == 3
        self.distributional = args.distributional
        self.register_buffer("support", torch.linspace(args.v_min, args.v_max, args.num_atoms), persistent=False)
        linear = NoisyLinear if args.noisy else nn.Linear
        layers: list[nn.Module] = []
        if self.pixels:
            for c_in, c_out, kernel, stride in ((shape[0], 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)):
                layers += [nn.Conv2d(c_in, c_out, kernel, stride), nn.ReLU()]
        layers.append(nn.Flatten())
        width = nn.Sequential(*layers)(torch.zeros(1, *shape)).shape[1]
        sizes = (512,) if self.pixels else args.hidden_sizes
        num_actions, num_atoms = int(envs.single_action_space.n), args.num_atoms if args.distributional else 1
        for size in sizes[:-1]:
            layers += [nn.Linear(width, size), nn.ReLU()]
            width = size
        if args.dueling:
            layers.append(Dueling(width, sizes[-1], num_actions, num_atoms, linear))
        else:
            for size in sizes[-1:]:  # none if there are no hidden layers
                layers += [linear(width, size), nn.ReLU()]
                width = size
            layers += [linear(width, num_actions * num_atoms), nn.Unflatten(1, (num_actions, num_atoms))]
        self.network = nn.Sequential(*layers)

    def forward(self, obs: Tensor) -> Tensor:
        return self.network(obs / 255.0 if self.pixels else obs)

    def expectation(self, out: Tensor) -> Tensor:
        """Q-values [...] of outputs [..., num_atoms]."""
        return (out.softmax(dim=-1) * self.support).sum(dim=-1) if self.distributional else out.squeeze(-1)

    def q_values(self, obs: Tensor) -> Tensor:
        return self.expectation(self(obs))

    def greedy(self, obs: Tensor, action_mask: Tensor | None = None) -> Tensor:
        return allowed(self.q_values(obs), action_mask).argmax(dim=1)


def allowed(q: Tensor, action_mask: Tensor | None) -> Tensor:
    """Q-values [B, num_actions], -inf for the actions that the mask does not allow."""
    return q if action_mask is None else q.masked_fill(~action_mask.to(q.device), -torch.inf)


def linear_schedule(start: float, end: float, duration: float, t: int) -> float:
    """Linear from `start` at t = 0 to `end` at t = `duration`, then constant."""
    return end if t >= duration else start + (end - start) * t / duration


def project(probs: Tensor, returns: Tensor, support: Tensor) -> Tensor:
    """The categorical projection Φ of Bellemare et al. (2017), equation 7: probabilities [B, N] of the support's atoms.

    Each return is clipped to the support and its probability is split between the two nearest atoms:
    (Φp)_j = Σ_i p_i max(0, 1 - |clip(returns_i) - z_j| / Δz). Within the support this keeps the mean.

    Args:
        probs: [B, N], the probabilities of `returns` [B, N].
        support: [N], N >= 2, in equal steps Δz.
    """
    returns = returns.clamp(support[0], support[-1])
    distance = (returns.unsqueeze(1) - support.unsqueeze(1)).abs() / (support[1] - support[0])  # [B, j, i]
    return ((1 - distance).clamp(min=0) * probs.unsqueeze(1)).sum(dim=2)


def rainbow_loss(
    q_network: QNetwork, target_network: QNetwork, batch: SimpleNamespace, args: Args
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss towards r + γ Z_target(s', a*), the error of each transition [B] as its priority, and metrics.

    The loss is the KL divergence of the two distributions (its gradient is that of the cross-entropy), or without
    distributions the squared TD error. With n steps, r is r_0 + ... + γ^(n-1) r_(n-1), γ is γ^n, and s' is n steps on.
    """

    def of_actions(out: Tensor, actions: Tensor) -> Tensor:
        return out.take_along_dim(actions.view(-1, 1, 1), dim=1).squeeze(1)  # [B, num_atoms]

    discounts = batch.discounts * ~batch.terminations
    next_mask = getattr(batch, "next_mask", None)  # only of environments that report action masks
    with torch.no_grad():
        next_out = target_network(batch.next_obs)
        next_q = q_network.expectation(q_network(batch.next_obs) if args.double else next_out)
        next_out = of_actions(next_out, allowed(next_q, next_mask).argmax(dim=1))
    out = of_actions(q_network(batch.obs), batch.actions)
    q = q_network.expectation(out)
    metrics = {"losses/q_values": q.detach().mean()}
    if args.distributional:
        probs, support = next_out.softmax(dim=1), q_network.support
        returns = batch.rewards.unsqueeze(1) + discounts.unsqueeze(1) * support
        clipped = (returns - returns.clamp(support[0], support[-1])).abs()
        metrics["losses/clipped_return"] = (probs * clipped).sum(dim=1).mean()
        target = project(probs, returns, support)
        losses = errors = F.kl_div(out.log_softmax(dim=1), target, reduction="none").sum(dim=1)
    else:
        td_target = batch.rewards + discounts * next_out.squeeze(1)
        losses, errors = F.mse_loss(q, td_target, reduction="none"), q - td_target
    loss = (batch.weights * losses if args.prioritized_replay else losses).mean()
    return loss, errors.detach(), {"losses/td_loss": loss.detach(), **metrics}


@torch.no_grad()
def polyak_update(network: nn.Module, target: nn.Module, tau: float) -> None:
    """target ← (1 - τ) target + τ network."""
    for param, target_param in zip(network.parameters(), target.parameters(), strict=True):
        target_param.lerp_(param, tau)


def main(args: Args) -> None:
    device = common.setup(args)
    envs = common.make_envs(args, wrap=None, terminal_on_life_loss=args.terminal_on_life_loss)
    if not isinstance(envs.single_action_space, Discrete):
        common.fail(f"Rainbow needs a Discrete action space; {args.env_id} has {envs.single_action_space}")
    if args.dueling and not args.hidden_sizes:
        common.fail("--dueling needs a hidden layer to split: give --hidden-sizes")
    if args.distributional and not (args.num_atoms > 1 and args.v_min < args.v_max):
        common.fail("--distributional needs --v-min below --v-max and at least 2 --num-atoms")

    q_network = QNetwork(envs, args).to(device)
    target_network = copy.deepcopy(q_network).requires_grad_(False)
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, fused=True)
    replay = common.ReplayBuffer(
        args.buffer_size,
        envs.num_envs,
        device,
        n_step=args.n_step,
        gamma=args.gamma,
        frame_stack=envs.frame_stack,
        alpha=args.prioritized_replay_alpha if args.prioritized_replay else None,
    )
    run = common.track(args, device)
    parts = {"q_network": q_network, "target_network": target_network, "optimizer": optimizer, "replay": replay}
    checkpoint = common.Checkpoint(run, envs, **parts)
    run.save_policy(q_network.greedy)
    evaluation = common.Evaluation(run, q_network.greedy)

    @torch.no_grad()
    def act(obs: Tensor, action_mask: Tensor | None, epsilon: float) -> Tensor:
        explore = torch.rand(len(obs)) < epsilon
        if action_mask is None:
            actions = torch.randint(envs.single_action_space.n, (len(obs),))
        else:
            actions = action_mask.float().multinomial(1).squeeze(1)
        if not explore.all():
            groups = obs.to(device).split(1 if args.noisy else len(obs))  # each environment has its own noise
            q = torch.cat([q_network.q_values(group) for group in groups]).cpu()
            actions = torch.where(explore, actions, allowed(q, action_mask).argmax(dim=1))
        return actions

    @common.compile_update(args, optimizer)
    def update(batch: SimpleNamespace) -> tuple[Tensor, dict[str, Tensor]]:
        loss, priorities, metrics = rainbow_loss(q_network, target_network, batch, args)
        optimizer.zero_grad()
        loss.backward()
        common.sync_grads(q_network.parameters())  # mean over the processes of torchrun
        optimizer.step()
        return priorities, metrics

    obs, _ = envs.reset(seed=args.seed)
    obs, global_step = checkpoint.restore(obs)
    train_due = common.Every(args.train_frequency, start=args.learning_starts, now=global_step)
    target_due = common.Every(args.target_network_frequency, start=args.learning_starts, now=global_step)
    log_due = common.Every(args.log_interval, now=global_step)
    exploration_steps = args.exploration_fraction * args.total_timesteps
    while global_step < args.total_timesteps:
        if evaluation(global_step):
            break
        epsilon = 0.0 if args.noisy else linear_schedule(args.start_e, args.end_e, exploration_steps, global_step)
        actions = act(obs, envs.action_mask, epsilon)
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        global_step += args.num_envs
        run.log_episodes(infos, global_step)
        replay.add(
            obs=obs,
            actions=actions,
            rewards=rewards.sign() if args.clip_rewards else rewards,
            next_obs=common.final_obs(next_obs, infos),
            next_mask=common.final_mask(envs.action_mask, infos),
            terminations=terminations,
            truncations=truncations,
        )
        obs = next_obs

        last_lr = 0.0 if args.anneal_lr else args.learning_rate
        lr = linear_schedule(args.learning_rate, last_lr, args.total_timesteps, global_step)
        optimizer.param_groups[0]["lr"] = lr
        beta = linear_schedule(args.prioritized_replay_beta, 1.0, args.total_timesteps, global_step)
        for _ in range(train_due(global_step)):
            batch = replay.sample(args.batch_size, beta)
            priorities, metrics = update(batch)
            run.note(metrics)
            if args.prioritized_replay:
                replay.update_priorities(batch.indices, priorities)
        for _ in range(target_due(global_step)):
            polyak_update(q_network, target_network, args.tau)
        if log_due(global_step):
            health = common.diagnostics(q_network.eval(), replay.spread(256).obs, global_step, optimizer)
            q_network.train()  # in evaluation mode no noise is drawn from the training's generator
            health["health/replay_age"] = replay.mean_age()
            run.log({**health, "charts/epsilon": epsilon, "charts/learning_rate": lr}, global_step)
        checkpoint.save(global_step)

    envs.close()
    evaluation(global_step)
    run.finish()


if __name__ == "__main__":
    main(common.parse(Args, __doc__))
