"""Monte-Carlo policy gradient (REINFORCE) on rollouts. Williams, 1992: https://doi.org/10.1007/BF00992696
Sutton & Barto, 2018, sections 13.3 (without) and 13.4 (with baseline): http://incompleteideas.net/book/the-book-2nd.html

    python algos/reinforce_rollout.py --env-id CartPole-v1 --cuda

Differs from the book:
1. One update per rollout of num_steps x num_envs steps, not per episode; its gradient is the mean over the steps.
2. A return that is cut by a time limit or by the end of the rollout bootstraps from the value of the last observation.
   `--no-baseline` has no value: the return ends at the cut, so late steps look bad; give num_steps several episodes.
3. Adam with an annealed learning rate, orthogonal initialisation, a clipped gradient norm, an optional entropy bonus.
   The factor gamma^t of the book's update is left out, as is usual.
4. Box actions are learned in [-1, 1] and scaled to the bounds of each dimension. A dimension without two finite bounds
   is not scaled. Actions out of bounds are clipped.

Logged: losses/policy_loss, losses/value_loss, losses/entropy, losses/values (mean predicted value),
losses/explained_variance (1: a perfect baseline), charts/learning_rate; all metrics: docs/health.md.
Reference scores: runs/README.md
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

import common


@dataclass
class Args(common.RunArgs):
    total_timesteps: int = 500_000
    """environment steps over all environments, in whole rollouts"""
    num_envs: int = 8
    """parallel environments, in total over all processes"""
    num_steps: int = 128
    """steps of each environment per rollout"""
    learning_rate: float = 2e-3
    """initial learning rate of Adam"""
    anneal_lr: bool = True
    """anneal the learning rate linearly to zero"""
    gamma: float = 0.99
    """discount factor"""
    baseline: bool = True
    """subtract a learned value from the returns, and bootstrap from it"""
    norm_adv: bool = True
    """normalise the advantages of each rollout"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest gradient norm; larger gradients are scaled down"""
    eval_interval: int = 100_000
    """environment steps between evaluations (0: only at the end)"""
    log_interval: int = 2_000
    """environment steps between logged rows"""


def layer_init(layer: nn.Module, std: float = math.sqrt(2)) -> nn.Module:
    weight, bias = layer.parameters()
    nn.init.orthogonal_(weight, std)
    nn.init.zeros_(bias)
    return layer


class Agent(nn.Module):
    """Separate policy and value networks over flat observations [..., obs_dim]."""

    action_scale: Tensor
    action_bias: Tensor
    invalid: Tensor | None  # bool [parts, max n] of a MultiDiscrete action: outputs beyond the n of a part

    def __init__(self, envs: common.Envs, args: Args) -> None:
        super().__init__()
        obs_dim = math.prod(envs.single_observation_space.shape)
        space = envs.single_action_space
        self.discrete = not isinstance(space, Box)
        invalid, num_outputs = None, int(space.n) if isinstance(space, Discrete) else math.prod(space.shape)
        if isinstance(space, MultiDiscrete):  # each part has max n outputs
            nvec = torch.as_tensor(space.nvec).flatten()
            invalid = torch.arange(int(nvec.max())) >= nvec.unsqueeze(1)
            num_outputs = invalid.numel()
        self.register_buffer("invalid", invalid, persistent=False)

        def mlp(out_dim: int, std: float) -> nn.Sequential:
            return nn.Sequential(
                layer_init(nn.Linear(obs_dim, 64)),
                nn.Tanh(),
                layer_init(nn.Linear(64, 64)),
                nn.Tanh(),
                layer_init(nn.Linear(64, out_dim), std),
            )

        self.actor = mlp(num_outputs, std=0.01)
        self.critic = mlp(1, std=1.0)
        self.actor_logstd = nn.Parameter(torch.zeros(0 if self.discrete else num_outputs))
        self.register_buffer("action_scale", envs.action_scale)
        self.register_buffer("action_bias", envs.action_bias)

    def outputs(self, obs: Tensor) -> Tensor:
        """Logits [..., n], or [..., parts, n] with -inf for invalid choices; means [..., n] of a Box action."""
        out = self.actor(obs)
        if self.invalid is None:
            return out
        return out.unflatten(-1, self.invalid.shape).masked_fill(self.invalid, -math.inf)

    def policy(self, obs: Tensor) -> Distribution:
        out = self.outputs(obs)
        if not self.discrete:
            return Independent(Normal(out, self.actor_logstd.exp(), validate_args=False), 1)
        return Independent(Categorical(logits=out, validate_args=False), int(self.invalid is not None))

    def value(self, obs: Tensor) -> Tensor:
        return self.critic(obs).squeeze(-1)

    def sample(self, obs: Tensor) -> Tensor:
        """Actions drawn from the policy; faster than building the distribution."""
        out = self.outputs(obs)
        if self.discrete:  # Gumbel-max trick: a sample of Categorical(logits)
            return (out - torch.empty_like(out).exponential_().log()).argmax(dim=-1)
        return out + self.actor_logstd.exp() * torch.randn_like(out)

    def in_env_units(self, actions: Tensor) -> Tensor:
        """Box actions scaled from [-1, 1] to the bounds of each dimension; without bounds unchanged."""
        if self.discrete:
            return actions
        return actions.view(-1, *self.action_scale.shape) * self.action_scale + self.action_bias

    def greedy(self, obs: Tensor) -> Tensor:
        out = self.outputs(obs)
        return self.in_env_units(out.argmax(dim=-1) if self.discrete else out)


def linear_schedule(start: float, end: float, duration: float, t: int) -> float:
    """Linear from `start` at t = 0 to `end` at t = `duration`, then constant."""
    return end if t >= duration else start + (end - start) * t / duration


def discounted_returns(
    rewards: Tensor, next_values: Tensor, terminations: Tensor, truncations: Tensor, gamma: float
) -> Tensor:
    """G_t = r_t + γ G_{t+1}, [num_steps, num_envs] like every argument.

    At a truncation and at the end of the rollout, V(s_{t+1}) replaces G_{t+1}; after a termination it is 0.
    """
    returns = torch.zeros_like(rewards)
    next_return = next_values[-1]
    for t in reversed(range(len(rewards))):
        next_return = torch.where(truncations[t], next_values[t], next_return) * ~terminations[t]
        next_return = rewards[t] + gamma * next_return
        returns[t] = next_return
    return returns


def reinforce_loss(
    agent: Agent, obs: Tensor, actions: Tensor, returns: Tensor, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """-log π(a|s) (G - V(s)), plus the value's squared error, minus the entropy bonus; means over all steps."""
    policy = agent.policy(obs)
    values = agent.value(obs) if args.baseline else torch.zeros_like(returns)
    advantages = returns - values.detach()
    if args.norm_adv:
        mean, std = common.global_mean_std(advantages)
        advantages = (advantages - mean) / (std + 1e-8)
    pg_loss = -(policy.log_prob(actions) * advantages).mean()
    v_loss = F.mse_loss(values, returns)
    entropy = policy.entropy().mean()
    loss = pg_loss + args.vf_coef * v_loss - args.ent_coef * entropy
    return loss, {
        "losses/policy_loss": pg_loss.detach(),
        "losses/value_loss": v_loss.detach(),
        "losses/entropy": entropy.detach(),
        "losses/values": values.detach().mean(),
        "losses/explained_variance": 1 - (returns - values.detach()).var() / (returns.var() + 1e-8),
    }


def main(args: Args) -> None:
    device = common.setup(args)
    envs = common.make_envs(args, wrap=None)
    if not isinstance(envs.single_action_space, Discrete | MultiDiscrete | Box):
        common.fail(
            f"REINFORCE takes Discrete, MultiDiscrete, MultiBinary or Box actions; not {envs.single_action_space}"
        )
    if len(envs.single_observation_space.shape) != 1:
        common.fail(f"this script takes flat observations; {args.env_id} has {envs.single_observation_space}")
    if args.num_steps * envs.num_envs < 2:
        common.fail("--num-steps times --num-envs must be at least 2: one sample has no standard deviation")

    agent = Agent(envs, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    rollout = common.RolloutStorage(args.num_steps, envs.num_envs, device)
    run = common.track(args, device)
    checkpoint = common.Checkpoint(run, envs, agent=agent, optimizer=optimizer)
    run.save_policy(agent.greedy)
    evaluation = common.Evaluation(run, agent.greedy)

    @common.compile_update(args, optimizer)
    def update(returns: Tensor) -> dict[str, Tensor]:
        loss, metrics = reinforce_loss(agent, rollout.obs, rollout.actions, returns, args)
        optimizer.zero_grad()
        loss.backward()
        common.sync_grads(agent.parameters())  # mean over the processes of torchrun
        nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
        optimizer.step()
        return metrics

    last_lr = 0.0 if args.anneal_lr else args.learning_rate

    obs, _ = envs.reset(seed=args.seed)
    obs, global_step = checkpoint.restore(obs)
    obs = obs.to(device)
    log_due = common.Every(args.log_interval, now=global_step)
    while global_step < args.total_timesteps:
        if evaluation(global_step):
            break
        lr = linear_schedule(args.learning_rate, last_lr, args.total_timesteps, global_step)
        optimizer.param_groups[0]["lr"] = lr

        with torch.no_grad():
            for _ in range(args.num_steps):
                actions = agent.sample(obs)
                next_obs, rewards, terminations, truncations, infos = envs.step(agent.in_env_units(actions))
                global_step += args.num_envs
                run.log_episodes(infos, global_step)
                next_obs = next_obs.to(device)
                rollout.add(
                    obs=obs,
                    actions=actions,
                    rewards=rewards,
                    next_obs=common.final_obs(next_obs, infos),
                    terminations=terminations,
                    truncations=truncations,
                )
                obs = next_obs
            next_values = agent.value(rollout.next_obs) if args.baseline else torch.zeros_like(rollout.rewards)
            returns = discounted_returns(
                rollout.rewards, next_values, rollout.terminations, rollout.truncations, args.gamma
            )

        metrics = update(returns)
        if log_due(global_step):
            health = common.diagnostics(agent.actor, rollout.obs.flatten(0, 1), global_step, optimizer)
            run.log({**metrics, **health, "charts/learning_rate": lr}, global_step)
        rollout.clear()
        checkpoint.save(global_step)

    envs.close()
    evaluation(global_step)
    run.finish()


if __name__ == "__main__":
    main(common.parse(Args, __doc__))
