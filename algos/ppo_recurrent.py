"""PPO with a memory: proximal policy optimisation with an LSTM or a GRU, for what one observation does not show.

    python algos/ppo_recurrent.py --env-id CartPole-v1 --cuda
    torchrun --nproc-per-node 2 algos/ppo_recurrent.py --env-id CarRacing-v3 --grayscale --resize 84

Copied from ppo.py (Schulman et al., 2017: https://arxiv.org/abs/1707.06347), whose details and departures from the
paper hold here too. The memory is between the encoder and the heads of policy and value (Mnih et al., 2016:
https://arxiv.org/abs/1602.01783):
1. A sequence is a rollout of one environment, or `--sequence-length` steps of it. Gradients flow through a sequence and
   no further: it should be longer than the time for which something has to be remembered.
2. A sequence begins with the memory that acted at its first step; later ones are computed anew in every epoch.
3. The memory is zero at the start of an episode, inside a sequence too.
4. The value of the last observation of a truncated episode is computed with the memory of that episode.
5. Policy and value share the memory, so rewards are scaled: otherwise the gradient of the value loss is the larger one.
   Flat observations are normalised: a velocity is a small difference of two of them.

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
    lstm: bool = True
    """LSTM; otherwise a GRU, whose updates take several times as long on a CPU"""
    memory_size: int = 64
    """units of the memory"""
    hidden_sizes: tuple[int, ...] = (64,)
    """units of the layers before the memory (flat observations)"""
    logstd_init: float = 0.0
    """initial log standard deviation of Box actions"""
    num_envs: int = 8
    """parallel environments, in total over all processes"""
    num_steps: int = 128
    """steps of each environment per rollout"""
    sequence_length: int = 0
    """steps that gradients flow through, a divisor of num_steps (0: num_steps)"""
    learning_rate: float = 1e-3
    """initial learning rate of Adam"""
    anneal_lr: bool = True
    """anneal the learning rate linearly to zero"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 1
    """minibatches per epoch, each of whole sequences"""
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
    norm_obs: bool = True
    """normalise flat observations by running statistics"""
    norm_reward: bool = True
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
    """An encoder of flat observations or of uint8 images [C, H, W], a memory, and the heads of policy and value.

    The state of the memory is one tensor [B, m]: the output of a GRU, the output and the cells of an LSTM.
    """

    action_scale: Tensor
    action_bias: Tensor
    invalid: Tensor | None  # bool [parts, max n] of a MultiDiscrete action: outputs beyond the n of a part

    def __init__(self, envs: common.Envs, args: Args) -> None:
        super().__init__()
        shape, space = envs.single_observation_space.shape, envs.single_action_space
        self.pixels, self.discrete = len(shape) == 3, not isinstance(space, Box)
        self.obs_rms = common.RunningMeanStd(shape) if args.norm_obs and not self.pixels else None
        if self.pixels:  # Mnih et al., 2015: https://doi.org/10.1038/nature14236
            convs = nn.Sequential()
            for c_in, c_out, kernel, stride in ((shape[0], 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)):
                convs.extend([layer_init(nn.Conv2d(c_in, c_out, kernel, stride)), nn.ReLU()])
            width, num_features = convs(torch.zeros(1, *shape)).numel(), 512
            self.encoder = nn.Sequential(convs, nn.Flatten(), layer_init(nn.Linear(width, 512)), nn.ReLU())
        else:
            self.encoder, sizes = nn.Sequential(nn.Flatten()), (math.prod(shape), *args.hidden_sizes)
            for n_in, n_out in itertools.pairwise(sizes):
                self.encoder.extend([layer_init(nn.Linear(n_in, n_out)), nn.Tanh()])
            num_features = sizes[-1]

        self.rnn: nn.GRU | nn.LSTM = (nn.LSTM if args.lstm else nn.GRU)(num_features, args.memory_size)
        for weight in self.rnn.parameters():
            nn.init.orthogonal_(weight) if weight.ndim > 1 else nn.init.zeros_(weight)

        invalid, num_outputs = None, int(space.n) if isinstance(space, Discrete) else math.prod(space.shape)
        if isinstance(space, MultiDiscrete):  # each part has max n outputs
            nvec = torch.as_tensor(space.nvec).flatten()
            invalid = torch.arange(int(nvec.max())) >= nvec.unsqueeze(1)
            num_outputs = invalid.numel()
        self.register_buffer("invalid", invalid, persistent=False)
        self.actor = layer_init(nn.Linear(args.memory_size, num_outputs), std=0.01)
        self.critic = layer_init(nn.Linear(args.memory_size, 1), std=1.0)
        self.actor_logstd = nn.Parameter(torch.full((0 if self.discrete else num_outputs,), args.logstd_init))
        self.register_buffer("action_scale", envs.action_scale)
        self.register_buffer("action_bias", envs.action_bias)

    def forward(
        self, obs: Tensor, memory: Tensor, episode_starts: Tensor, action_mask: Tensor | None = None
    ) -> tuple[Distribution, Tensor]:
        """The policy and the values, [T, B], along sequences.

        Args:
            obs: [T, B, ...], the observations of B environments.
            memory: [B, m], before the first step.
            episode_starts: bool [T, B], true at the first observation of an episode.
        """
        encoded = self.encode(obs.flatten(0, 1)).unflatten(0, obs.shape[:2])
        features = self.remember(encoded, memory, episode_starts).flatten(0, 1)
        mask = None if action_mask is None else action_mask.flatten(0, 1)
        out = self.outputs(features, mask).unflatten(0, obs.shape[:2])
        base: Distribution
        if self.discrete:
            base = Categorical(logits=out, validate_args=False)
        else:
            base = Normal(out, self.actor_logstd.exp(), validate_args=False)
        policy = Independent(base, len(base.batch_shape) - 2, validate_args=False)
        return policy, self.critic(features).view(obs.shape[:2])

    def encode(self, obs: Tensor) -> Tensor:
        if self.pixels:
            return self.encoder(obs / 255.0)
        return self.encoder(obs.float() if self.obs_rms is None else self.obs_rms(obs))

    @torch.compiler.disable  # a compiler would unroll it, step by step
    def remember(self, encoded: Tensor, memory: Tensor, episode_starts: Tensor) -> Tensor:
        """The outputs of the memory, [T, B, n], along encoded observations [T, B, n_in].

        Each episode is a column of its own, [longest, episodes, n_in], so that one call of cuDNN or oneDNN does all
        steps. The price is padding where episodes differ in length.
        """
        starts = episode_starts.clone()
        starts[0] = True
        steps = torch.arange(len(starts), device=starts.device).unsqueeze(1)
        row = steps - (steps * starts).cummax(dim=0).values
        column = starts.T.flatten().cumsum(dim=0).sub(1).view_as(starts.T).T
        num_rows, num_columns = int(row.max()) + 1, int(column[-1, -1]) + 1
        columns = encoded.new_zeros(num_rows, num_columns, encoded.shape[2])
        columns[row, column] = encoded
        first = memory.new_zeros(num_columns, memory.shape[1])
        first[column[0]] = memory * ~episode_starts[0].unsqueeze(1)
        state = [x.contiguous() for x in first.unsqueeze(0).split(self.rnn.hidden_size, dim=2)]
        outputs, _ = self.rnn(columns, tuple(state) if isinstance(self.rnn, nn.LSTM) else state[0])
        return outputs[row, column]

    def step(self, obs: Tensor, memory: Tensor, episode_starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output of the memory, [B, n], at one observation of each environment, and its next state [B, m]."""
        if episode_starts is not None:
            memory = memory * ~episode_starts.unsqueeze(1)
        weights = self.rnn.all_weights[0]
        if isinstance(self.rnn, nn.LSTM):
            output, cells = torch.lstm_cell(self.encode(obs), memory.chunk(2, dim=1), *weights)
            return output, torch.cat([output, cells], dim=1)
        output = torch.gru_cell(self.encode(obs), memory, *weights)
        return output, output

    def empty_memory(self, num_envs: int) -> Tensor:
        """[num_envs, m], the memory before the first observation of an episode."""
        size = self.rnn.hidden_size * (2 if isinstance(self.rnn, nn.LSTM) else 1)
        return torch.zeros(num_envs, size, device=self.actor_logstd.device)

    def outputs(self, features: Tensor, action_mask: Tensor | None = None) -> Tensor:
        """Logits [B, n] or [B, parts, n], -inf for actions that are not allowed; means [B, n] of a Box action."""
        out = self.actor(features)
        if self.invalid is not None:
            out = out.unflatten(1, self.invalid.shape).masked_fill(self.invalid, -math.inf)
        return out if action_mask is None else out.masked_fill(~action_mask.to(out.device), -math.inf)

    def value(self, obs: Tensor, memory: Tensor) -> Tensor:
        """Values [B] of observations [B, ...] that follow in the same episode, with the memory [B, m] before them."""
        return self.critic(self.step(obs, memory)[0]).squeeze(1)

    def sample(
        self, obs: Tensor, memory: Tensor, episode_starts: Tensor, action_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Actions drawn from the policy, and the next memory; faster than building the distribution."""
        features, memory = self.step(obs, memory, episode_starts)
        out = self.outputs(features, action_mask)
        if self.discrete:  # Gumbel-max trick: a sample of Categorical(logits)
            return (out - torch.empty_like(out).exponential_().log()).argmax(dim=-1), memory
        return out + self.actor_logstd.exp() * torch.randn_like(out), memory

    def in_env_units(self, actions: Tensor) -> Tensor:
        """Box actions scaled from [-1, 1] to the bounds of each dimension; without bounds unchanged."""
        if self.discrete:
            return actions
        return actions.view(-1, *self.action_scale.shape) * self.action_scale + self.action_bias

    def greedy(
        self, obs: Tensor, memory: Tensor | None, episode_starts: Tensor, action_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What `common.Evaluation` plays: the best actions, and the next memory."""
        features, memory = self.step(obs, self.empty_memory(len(obs)) if memory is None else memory, episode_starts)
        out = self.outputs(features, action_mask)
        return self.in_env_units(out.argmax(dim=-1) if self.discrete else out), memory


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
    length = args.sequence_length or args.num_steps
    if args.num_steps % length or length < 2:
        common.fail(f"--sequence-length must divide the {args.num_steps} of --num-steps, and be at least 2")
    if (sequences := envs.num_envs * args.num_steps // length) < args.num_minibatches:
        common.fail(f"a rollout has {sequences} sequences: --num-minibatches cannot be {args.num_minibatches}")

    agent = Agent(envs, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    rollout = common.RolloutStorage(args.num_steps, envs.num_envs, device)
    reward_scaler = common.RewardScaler(envs.num_envs, args.gamma).to(device)
    run = common.track(args, device)
    state = {"memory": agent.empty_memory(envs.num_envs)}
    parts = {"agent": agent, "optimizer": optimizer, "reward_scaler": reward_scaler, "state": state}
    checkpoint = common.Checkpoint(run, envs, **parts)
    run.save_policy(agent.greedy)
    evaluation = common.Evaluation(run, agent.greedy)

    @common.compile_update(args, optimizer, whole=False)
    def update(mb: SimpleNamespace) -> dict[str, Tensor]:
        policy, values = agent(mb.obs, mb.memory[0], mb.episode_starts, getattr(mb, "action_mask", None))
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
    obs, memory = obs.to(device), state["memory"].to(device)
    log_due = common.Every(args.log_interval, now=global_step)
    while global_step < args.total_timesteps:
        if evaluation(global_step):
            break
        lr = linear_schedule(args.learning_rate, last_lr, args.total_timesteps, global_step)
        optimizer.param_groups[0]["lr"] = lr

        with torch.no_grad():
            for _ in range(args.num_steps):
                action_mask, episode_starts = envs.action_mask, envs.episode_starts.to(device)
                actions, next_memory = agent.sample(obs, memory, episode_starts, action_mask)
                next_obs, rewards, terminations, truncations, infos = envs.step(agent.in_env_units(actions))
                global_step += args.num_envs
                run.log_episodes(infos, global_step)
                next_obs = next_obs.to(device)
                rollout.add(
                    obs=obs,
                    memory=memory,
                    episode_starts=episode_starts,
                    action_mask=action_mask,
                    actions=actions,
                    rewards=rewards,
                    next_obs=common.final_obs(next_obs, infos),
                    terminations=terminations,
                    truncations=truncations,
                )
                obs, memory = next_obs, next_memory
            terminations, truncations = rollout.terminations, rollout.truncations
            rewards = rollout.rewards.sign() if args.clip_rewards else rollout.rewards
            if args.norm_reward:
                reward_scaler.update(rewards, terminations | truncations)
                rewards = reward_scaler(rewards)
            action_mask = getattr(rollout, "action_mask", None)  # only of environments that report one
            policy, values = agent(rollout.obs, rollout.memory[0], rollout.episode_starts, action_mask)
            logprobs = policy.log_prob(rollout.actions)
            next_memory = torch.cat([rollout.memory[1:], memory.unsqueeze(0)])  # also after the end of an episode
            next_values = agent.value(rollout.next_obs.flatten(0, 1), next_memory.flatten(0, 1)).view_as(rewards)
            advantages = gae(rewards, values, next_values, terminations, truncations, args.gamma, args.gae_lambda)
            returns = advantages + values

        targets = {"logprobs": logprobs, "values": values, "advantages": advantages, "returns": returns}
        for _ in range(args.update_epochs):
            for mb in rollout.sequences(args.num_minibatches, length, **targets):
                metrics = update(mb)
            if args.target_kl is not None and common.global_mean(metrics["losses/approx_kl"]) > args.target_kl:
                break
        if agent.obs_rms is not None:  # after the updates, which need the statistics that acted
            agent.obs_rms.update(rollout.obs)
        rollout.clear()

        if log_due(global_step):
            explained_variance = 1 - (returns - values).var() / (returns.var() + 1e-8)
            rollout_metrics = {"losses/explained_variance": explained_variance, "losses/values": values.mean()}
            health = common.diagnostics(agent, (mb.obs, mb.memory[0], mb.episode_starts), global_step, optimizer)
            run.log({**metrics, **rollout_metrics, **health, "charts/learning_rate": lr}, global_step)
        state["memory"] = memory
        checkpoint.save(global_step)

    envs.close()
    evaluation(global_step)
    run.finish()


if __name__ == "__main__":
    main(common.parse(Args, __doc__))
