"""Deep Q-learning (DQN). Mnih et al., 2015: https://doi.org/10.1038/nature14236

    python algos/dqn.py --env-id CartPole-v1 --cuda

Differs from the paper:
1. Double Q-learning (van Hasselt et al., 2016: https://arxiv.org/abs/1509.06461); `--no-double` is the paper's target.
2. Adam instead of RMSProp, its learning rate annealed to zero (`--no-anneal-lr` keeps it), and the squared error.
3. A truncated episode bootstraps from its last observation; a terminated one does not bootstrap.
4. Rewards are clipped only with `--clip-rewards`. In Atari games a lost life is a termination, but the game goes on.

rainbow.py has five more parts. Logged: losses/td_loss, losses/q_values (mean Q of the actions taken), charts/epsilon,
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
    terminal_on_life_loss: bool = True
    """treat a lost life as a termination (Atari)"""
    clip_rewards: bool = False
    """learn from the sign of each reward (Atari)"""
    log_interval: int = 500
    """environment steps between logged rows"""


class QNetwork(nn.Module):
    """Q(s, ·): hidden layers over flat observations, or the paper's convolutions over uint8 images [C, H, W]."""

    def __init__(self, envs: common.Envs, args: Args) -> None:
        super().__init__()
        shape = envs.single_observation_space.shape
        self.pixels = len(shape) == 3
        layers: list[nn.Module] = []
        if self.pixels:
            for c_in, c_out, kernel, stride in ((shape[0], 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)):
                layers += [nn.Conv2d(c_in, c_out, kernel, stride), nn.ReLU()]
        layers.append(nn.Flatten())
        width = nn.Sequential(*layers)(torch.zeros(1, *shape)).shape[1]
        for size in (512,) if self.pixels else args.hidden_sizes:
            layers += [nn.Linear(width, size), nn.ReLU()]
            width = size
        self.network = nn.Sequential(*layers, nn.Linear(width, int(envs.single_action_space.n)))

    def forward(self, obs: Tensor) -> Tensor:
        return self.network(obs / 255.0 if self.pixels else obs)

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


def main(args: Args) -> None:
    device = common.setup(args)
    envs = common.make_envs(args, wrap=None, terminal_on_life_loss=args.terminal_on_life_loss)
    if not isinstance(envs.single_action_space, Discrete):
        common.fail(f"DQN needs a Discrete action space; {args.env_id} has {envs.single_action_space}")

    q_network = QNetwork(envs, args).to(device)
    target_network = copy.deepcopy(q_network).requires_grad_(False)
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, fused=True)
    replay = common.ReplayBuffer(args.buffer_size, envs.num_envs, device, frame_stack=envs.frame_stack)
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
            actions = torch.where(explore, actions, q_network.greedy(obs.to(device), action_mask).cpu())
        return actions

    @common.compile_update(args, optimizer)
    def update(batch: SimpleNamespace) -> dict[str, Tensor]:
        loss, metrics = dqn_loss(q_network, target_network, batch, args)
        optimizer.zero_grad()
        loss.backward()
        common.sync_grads(q_network.parameters())  # mean over the processes of torchrun
        optimizer.step()
        return metrics

    obs, _ = envs.reset(seed=args.seed)
    obs, global_step = checkpoint.restore(obs)
    train_due = common.Every(args.train_frequency, start=args.learning_starts, now=global_step)
    target_due = common.Every(args.target_network_frequency, start=args.learning_starts, now=global_step)
    log_due = common.Every(args.log_interval, now=global_step)
    exploration_steps = args.exploration_fraction * args.total_timesteps
    while global_step < args.total_timesteps:
        if evaluation(global_step):
            break
        epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, global_step)
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
        )
        obs = next_obs

        last_lr = 0.0 if args.anneal_lr else args.learning_rate
        lr = linear_schedule(args.learning_rate, last_lr, args.total_timesteps, global_step)
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(train_due(global_step)):
            run.note(update(replay.sample(args.batch_size)))
        for _ in range(target_due(global_step)):
            polyak_update(q_network, target_network, args.tau)
        if log_due(global_step):
            health = common.diagnostics(q_network, replay.spread(256).obs, global_step, optimizer)
            health["health/replay_age"] = replay.mean_age()
            run.log({**health, "charts/epsilon": epsilon, "charts/learning_rate": lr}, global_step)
        checkpoint.save(global_step)

    envs.close()
    evaluation(global_step)
    run.finish()


if __name__ == "__main__":
    main(common.parse(Args, __doc__))
