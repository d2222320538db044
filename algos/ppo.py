"""Proximal policy optimisation (PPO). Schulman et al., 2017: https://arxiv.org/abs/1707.06347

    python algos/ppo.py --env-id CartPole-v1 --cuda
    torchrun --nproc-per-node 2 algos/ppo.py --env-id HalfCheetah-v5

Implementation details that matter (Huang et al., 2022:
https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details): orthogonal initialisation with gain 0.01 for
the policy head, Adam with eps 1e-5, advantages normalised per minibatch, learning rate annealed to zero, gradient norm
clipped, optionally the value loss clipped. MuJoCo: `--norm-obs --norm-reward`. Atari: one CNN for policy and value,
`--clip-rewards`.

Differs from the paper and that list:
1. A truncated episode bootstraps from the value of its last observation. The trace of GAE is cut at terminations and
   truncations, the bootstrap only at terminations (Schulman et al., 2016: https://arxiv.org/abs/1506.02438).
2. Values and log-probabilities are computed in one batch after the rollout, with the weights that acted.
3. Box actions are learned in [-1, 1] and scaled to the bounds of each dimension, so they do not depend on the
   environment's units. A dimension without two finite bounds is not scaled. Actions out of bounds are clipped.
4. Actions that `infos["action_mask"]` does not allow have probability 0 (Huang & Ontañón, 2022:
   https://arxiv.org/abs/2006.14171).
5. All environments share one set of observation statistics, updated only between rollouts. Rewards are scaled after
   the rollout. In Atari games a lost life is a termination, but the game goes on.

Logged: losses/policy_loss, losses/value_loss, losses/entropy, losses/approx_kl, losses/old_approx_kl, losses/clipfrac
(of the last minibatch); losses/explained_variance, losses/values (mean predicted value; of the last rollout);
charts/learning_rate; all metrics: docs/health.md. Reference scores: runs/README.md
"""

import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

import common


@dataclass
class Args(common.RunArgs):
    total_timesteps: int = 100_000
    """environment steps over all environments, in whole rollouts"""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """units of the hidden layers (flat observations)"""
    logstd_init: float = 0.0
    """initial log standard deviation of Box actions"""
    num_envs: int = 8
    """parallel environments, in total over all processes"""
    num_steps: int = 32
    """steps of each environment per rollout"""
    learning_rate: float = 1e-3
    """initial learning rate of Adam"""
    anneal_lr: bool = True
    """anneal the learning rate linearly to zero"""
    gamma: float = 0.98
    """discount factor"""
    gae_lambda: float = 0.8
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 1
    """minibatches per epoch"""
    update_epochs: int = 20
    """epochs over each rollout"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    clip_coef: float = 0.2
    """clip range of the probability ratio"""
    clip_vloss: bool = False
    """clip the change of the value to clip_coef"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest gradient norm; larger gradients are scaled down"""
    norm_obs: bool = False
    """normalise flat observations by running statistics"""
    norm_reward: bool = False
    """divide rewards by the running deviation of the return"""
    terminal_on_life_loss: bool = True
    """treat a lost life as a termination (Atari)"""
    clip_rewards: bool = False
    """learn from the sign of each reward (Atari)"""
    target_kl: float | None = None
    """stop the epochs of a rollout above this approximate KL"""
    log_interval: int = 2_000
    """environment steps between logged rows"""


def layer_init(layer: nn.Module, std: float = math.sqrt(2)) -> nn.Module:
    weight, bias = layer.parameters()
    nn.init.orthogonal_(weight, std)
    nn.init.zeros_(bias)
    return layer


class Agent(nn.Module):
    """Policy and value: two networks over flat observations, or two heads on one CNN over uint8 images [C, H, W]."""

    action_scale: Tensor
    action_bias: Tensor
    invalid: Tensor | None  # bool [parts, max n] of a MultiDiscrete action: outputs beyond the n of a part

    def __init__(self, envs: common.Envs, args: Args) -> None:
        super().__init__()
        shape, space = envs.single_observation_space.shape, envs.single_action_space
        self.pixels, self.discrete = len(shape) == 3, not isinstance(space, Box)
        self.obs_rms = common.RunningMeanStd(shape) if args.norm_obs else None
        if self.pixels:  # Mnih et al., 2015: https://doi.org/10.1038/nature14236
            convs = nn.Sequential()
            for c_in, c_out, kernel, stride in ((shape[0], 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)):
                convs.extend([layer_init(nn.Conv2d(c_in, c_out, kernel, stride)), nn.ReLU()])
            width = convs(torch.zeros(1, *shape)).numel()
            self.trunk = nn.Sequential(convs, nn.Flatten(), layer_init(nn.Linear(width, 512)), nn.ReLU())
            sizes: tuple[int, ...] = (512,)
        else:
            self.trunk, sizes = nn.Sequential(nn.Flatten()), (math.prod(shape), *args.hidden_sizes)

        def head(out_dim: int, std: float) -> nn.Sequential:
            hidden = [(layer_init(nn.Linear(n_in, n_out)), nn.Tanh()) for n_in, n_out in itertools.pairwise(sizes)]
            return nn.Sequential(*itertools.chain(*hidden), layer_init(nn.Linear(sizes[-1], out_dim), std))

        invalid, num_outputs = None, int(space.n) if isinstance(space, Discrete) else math.prod(space.shape)
        if isinstance(space, MultiDiscrete):  # each part has max n outputs
            nvec = torch.as_tensor(space.nvec).flatten()
            invalid = torch.arange(int(nvec.max())) >= nvec.unsqueeze(1)
            num_outputs = invalid.numel()
        self.register_buffer("invalid", invalid, persistent=False)
        self.actor = head(num_outputs, std=0.01)
        self.critic = head(1, std=1.0)
        self.actor_logstd = nn.Parameter(torch.full((0 if self.discrete else num_outputs,), args.logstd_init))
        self.register_buffer("action_scale", envs.action_scale)
        self.register_buffer("action_bias", envs.action_bias)

    def forward(self, obs: Tensor, action_mask: Tensor | None = None) -> tuple[Distribution, Tensor]:
        """The policy and the values, [B], at observations [B, ...]."""
        features = self.features(obs)
        out = self.outputs(features, action_mask)
        base: Distribution
        if self.discrete:
            base = Categorical(logits=out, validate_args=False)
        else:
            base = Normal(out, self.actor_logstd.exp(), validate_args=False)
        return Independent(base, len(base.batch_shape) - 1, validate_args=False), self.critic(features).squeeze(1)

    def features(self, obs: Tensor) -> Tensor:
        if self.pixels:
            return self.trunk(obs / 255.0)
        return self.trunk(obs.float() if self.obs_rms is None else self.obs_rms(obs))

    def outputs(self, features: Tensor, action_mask: Tensor | None = None) -> Tensor:
        """Logits [B, n] or [B, parts, n], -inf for actions that are not allowed; means [B, n] of a Box action."""
        out = self.actor(features)
        if self.invalid is not None:
            out = out.unflatten(1, self.invalid.shape).masked_fill(self.invalid, -math.inf)
        return out if action_mask is None else out.masked_fill(~action_mask.to(out.device), -math.inf)

    def value(self, obs: Tensor) -> Tensor:
        return self.critic(self.features(obs)).squeeze(1)

    def sample(self, obs: Tensor, action_mask: Tensor | None = None) -> Tensor:
        """Actions drawn from the policy; faster than building the distribution."""
        out = self.outputs(self.features(obs), action_mask)
        if self.discrete:  # Gumbel-max trick: a sample of Categorical(logits)
            return (out - torch.empty_like(out).exponential_().log()).argmax(dim=-1)
        return out + self.actor_logstd.exp() * torch.randn_like(out)

    def in_env_units(self, actions: Tensor) -> Tensor:
        """Box actions scaled from [-1, 1] to the bounds of each dimension; without bounds unchanged."""
        if self.discrete:
            return actions
        return actions.view(-1, *self.action_scale.shape) * self.action_scale + self.action_bias

    def greedy(self, obs: Tensor, action_mask: Tensor | None = None) -> Tensor:
        out = self.outputs(self.features(obs), action_mask)
        return self.in_env_units(out.argmax(dim=-1) if self.discrete else out)


def linear_schedule(start: float, end: float, duration: float, t: int) -> float:
    """Linear from `start` at t = 0 to `end` at t = `duration`, then constant."""
    return end if t >= duration else start + (end - start) * t / duration


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminations: Tensor,
    truncations: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimates, [num_steps, num_envs] like every argument; next_values are V(s_{t+1})."""
    deltas = rewards + gamma * next_values * ~terminations - values
    decays = gamma * gae_lambda * ~(terminations | truncations)
    advantages = [torch.zeros_like(rewards[0])]
    for delta, decay in zip(reversed(deltas.unbind()), reversed(decays.unbind()), strict=True):
        advantages.append(delta + decay * advantages[-1])
    return torch.stack(advantages[:0:-1])


def ppo_loss(policy: Distribution, values: Tensor, mb: SimpleNamespace, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate objective (equation 7 of the paper), with value loss and entropy bonus (equation 9)."""
    logratio = policy.log_prob(mb.actions) - mb.logprobs
    ratio = logratio.exp()

    advantages = mb.advantages
    if args.norm_adv:
        mean, std = common.global_mean_std(advantages)
        advantages = (advantages - mean) / (std + 1e-8)
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = -torch.min(advantages * ratio, advantages * clipped_ratio).mean()

    v_loss = (values - mb.returns) ** 2
    if args.clip_vloss:
        clipped_values = mb.values + (values - mb.values).clamp(-args.clip_coef, args.clip_coef)
        v_loss = torch.max(v_loss, (clipped_values - mb.returns) ** 2)
    v_loss = 0.5 * v_loss.mean()

    entropy = policy.entropy().mean()
    loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
    with torch.no_grad():
        old_approx_kl = -logratio.mean()
        approx_kl = (ratio - 1 - logratio).mean()  # http://joschu.net/blog/kl-approx.html
        clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
    return loss, {
        "losses/policy_loss": pg_loss.detach(),
        "losses/value_loss": v_loss.detach(),
        "losses/entropy": entropy.detach(),
        "losses/old_approx_kl": old_approx_kl,
        "losses/approx_kl": approx_kl,
        "losses/clipfrac": clipfrac,
    }


def main(args: Args) -> None:
    device = common.setup(args)
    envs = common.make_envs(args, wrap=None, terminal_on_life_loss=args.terminal_on_life_loss)
    if not isinstance(envs.single_action_space, Discrete | MultiDiscrete | Box):
        common.fail(f"PPO takes Discrete, MultiDiscrete or Box actions; {args.env_id} has {envs.single_action_space}")
    if args.norm_obs and len(envs.single_observation_space.shape) == 3:
        common.fail("--norm-obs is for flat observations; images are divided by 255 instead")
    if args.num_steps * envs.num_envs < 2 * args.num_minibatches:
        common.fail("--num-minibatches must leave at least 2 samples each: one has no standard deviation")

    agent = Agent(envs, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    rollout = common.RolloutStorage(args.num_steps, envs.num_envs, device)
    reward_scaler = common.RewardScaler(envs.num_envs, args.gamma).to(device)
    run = common.track(args, device)
    checkpoint = common.Checkpoint(run, envs, agent=agent, optimizer=optimizer, reward_scaler=reward_scaler)
    run.save_policy(agent.greedy)
    evaluation = common.Evaluation(run, agent.greedy)

    @common.compile_update(args, optimizer)
    def update(mb: SimpleNamespace) -> dict[str, Tensor]:
        policy, values = agent(mb.obs, getattr(mb, "action_mask", None))
        loss, metrics = ppo_loss(policy, values, mb, args)
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
                action_mask = envs.action_mask
                actions = agent.sample(obs, action_mask)
                next_obs, rewards, terminations, truncations, infos = envs.step(agent.in_env_units(actions))
                global_step += args.num_envs
                run.log_episodes(infos, global_step)
                next_obs = next_obs.to(device)
                rollout.add(
                    obs=obs,
                    action_mask=action_mask,
                    actions=actions,
                    rewards=rewards,
                    next_obs=common.final_obs(next_obs, infos),
                    terminations=terminations,
                    truncations=truncations,
                )
                obs = next_obs
            terminations, truncations = rollout.terminations, rollout.truncations
            rewards = rollout.rewards.sign() if args.clip_rewards else rollout.rewards
            if args.norm_reward:
                reward_scaler.update(rewards, terminations | truncations)
                rewards = reward_scaler(rewards)
            action_mask = getattr(rollout, "action_mask", None)  # only of environments that report one
            policy, values = agent(
                rollout.obs.flatten(0, 1), None if action_mask is None else action_mask.flatten(0, 1)
            )
            logprobs = policy.log_prob(rollout.actions.flatten(0, 1)).view_as(rewards)
            values = values.view_as(rewards)
            next_values = agent.value(rollout.next_obs.flatten(0, 1)).view_as(rewards)
            advantages = gae(rewards, values, next_values, terminations, truncations, args.gamma, args.gae_lambda)
            returns = advantages + values

        targets = {"logprobs": logprobs, "values": values, "advantages": advantages, "returns": returns}
        for _ in range(args.update_epochs):
            for mb in rollout.minibatches(args.num_minibatches, **targets):
                metrics = update(mb)
            if args.target_kl is not None and common.global_mean(metrics["losses/approx_kl"]) > args.target_kl:
                break
        if agent.obs_rms is not None:  # after the updates, which need the statistics that acted
            agent.obs_rms.update(rollout.obs)
        rollout.clear()

        if log_due(global_step):
            explained_variance = 1 - (returns - values).var() / (returns.var() + 1e-8)
            rollout_metrics = {"losses/explained_variance": explained_variance, "losses/values": values.mean()}
            health = common.diagnostics(agent, mb.obs, global_step, optimizer)
            run.log({**metrics, **rollout_metrics, **health, "charts/learning_rate": lr}, global_step)
        checkpoint.save(global_step)

    envs.close()
    evaluation(global_step)
    run.finish()


if __name__ == "__main__":
    main(common.parse(Args, __doc__))
