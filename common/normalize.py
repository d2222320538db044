"""Observations and rewards brought to scale by running statistics, one set for all environments of all processes.

Both hold their statistics in buffers, so a `state_dict` has them: what is part of a network lands in policy.pt.
Neither changes its statistics but in `update`, which training calls and evaluation does not.
"""

import torch
from torch import Tensor, nn

from common.internals.speed.processes import all_gather


class RunningMeanStd(nn.Module):
    """(x - mean) / std of everything `update` has seen, clipped to ±`clip`; x itself, clipped, before that.

    Args:
        shape: of one sample; `x` is [..., *shape].
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...] = (), clip: float = 10.0) -> None:
        super().__init__()
        self.clip = clip
        # float64: after 10^8 samples float32 would no longer count, and its sums of squares lose what is left.
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Takes the samples of `x` in, as if all had been seen at once (Chan et al., 1979, equation 2.1).

        Under torchrun each process has as many, and all of them end with the same statistics of them all.
        """
        x = x.double().reshape(-1, *self.mean.shape)
        for mean, var in all_gather(torch.stack([x.mean(dim=0), x.var(dim=0, correction=0)])):
            total = self.count + len(x)
            delta = mean - self.mean
            squares = self.var * self.count + var * len(x) + delta**2 * self.count * len(x) / total
            self.mean += delta * len(x) / total
            self.var.copy_(squares / total)
            self.count.copy_(total)

    def forward(self, x: Tensor) -> Tensor:
        scaled = (x - self.mean) / (self.var + 1e-8).sqrt()
        return scaled.clamp(-self.clip, self.clip).float()


class RewardScaler(nn.Module):
    """Rewards divided by the standard deviation of the discounted return so far (Engstrom et al., 2020, section 3).

    Their mean is not subtracted: that would change which behaviour is best where episodes end.

    Args:
        gamma: the discount factor of the return, the algorithm's.
    """

    running: Tensor

    def __init__(self, num_envs: int, gamma: float, clip: float = 10.0) -> None:
        super().__init__()
        self.gamma = gamma
        self.clip = clip
        self.returns = RunningMeanStd()
        self.register_buffer("running", torch.zeros(num_envs, dtype=torch.float64))

    @torch.no_grad()
    def update(self, rewards: Tensor, ends: Tensor) -> None:
        """Takes a rollout in: rewards and ends (bool) are [num_steps, num_envs].

        The return R_t = r_t + gamma R_{t-1} starts anew after an end of either kind.
        """
        steps = rewards.double()
        seen = torch.empty_like(steps)
        for t, end in enumerate(ends):
            self.running = self.gamma * self.running + steps[t]
            seen[t] = self.running
            self.running = self.running * ~end
        self.returns.update(seen)

    def new_episodes(self) -> None:
        """No step to come continues the episodes that ran."""
        self.running.zero_()

    def forward(self, rewards: Tensor) -> Tensor:
        scaled = rewards / (self.returns.var + 1e-8).sqrt()
        return scaled.clamp(-self.clip, self.clip).float()
