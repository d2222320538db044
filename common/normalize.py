"""Normalisation of observations and rewards by running statistics, shared by all environments and processes.

The statistics are buffers, so policy.pt has those that are part of the network. Only `update` changes them.
"""

import torch
from torch import Tensor, nn

from common.internals.speed.processes import all_gather


class RunningMeanStd(nn.Module):
    """(x - mean) / std, clipped to ±`clip`. Before the first `update` the mean is 0 and the standard deviation 1.

    Args:
        shape: of one sample; `x` is [..., *shape].
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...] = (), clip: float = 10.0) -> None:
        super().__init__()
        self.clip = clip
        # float64: a float32 count stops at 2^24 samples, and float32 sums of squares lose precision long before.
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Adds the samples of `x`, exactly as if all had come at once (Chan et al., 1979, equation 2.1).

        Under torchrun every process adds the samples of all; each must bring equally many.
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
    """Rewards divided by the standard deviation of the discounted return (Engstrom et al., 2020, section 3).

    The mean is not subtracted: where episodes can end, that would change which policy is optimal.

    Args:
        gamma: the algorithm's discount factor.
    """

    running: Tensor

    def __init__(self, num_envs: int, gamma: float, clip: float = 10.0) -> None:
        super().__init__()
        self.gamma = gamma
        self.clip = clip
        self.returns = RunningMeanStd()
        self.register_buffer("running", torch.zeros(num_envs, dtype=torch.float64))

    @torch.no_grad()
    def update(self, rewards: Tensor, dones: Tensor) -> None:
        """Adds a rollout; rewards and dones (bool, terminated or truncated) are [num_steps, num_envs].

        The discounted return R_t = r_t + gamma R_{t-1} restarts at 0 after a done.
        """
        rewards = rewards.double()
        returns = torch.empty_like(rewards)
        for t, done in enumerate(dones):
            self.running = self.gamma * self.running + rewards[t]
            returns[t] = self.running
            self.running = self.running * ~done
        self.returns.update(returns)

    def new_episodes(self) -> None:
        """Restarts the discounted returns; a resumed run calls it when its environments start new episodes."""
        self.running.zero_()

    def forward(self, rewards: Tensor) -> Tensor:
        scaled = rewards / (self.returns.var + 1e-8).sqrt()
        return scaled.clamp(-self.clip, self.clip).float()
