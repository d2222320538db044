"""Diagnostics of training, measured when a row is logged. They draw no random numbers and change nothing."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from common.args import beside_training

SATURATED = 0.99  # of the range of a tanh; its gradient is next to 0 beyond


def diagnostics(
    network: nn.Module, inputs: Tensor | tuple[Tensor, ...], step: int, *optimizers: Optimizer
) -> dict[str, float]:
    """health/grad_norm, health/dead_units and health/updates_per_step, as docs/health.md describes them.

    What cannot be measured, for another kind of network or optimizer, is left out after one warning.

    Args:
        inputs: what `network` is called with, some hundred observations [B, ...] or (observations, actions).
        step: environment steps so far.
        optimizers: the network's first; the gradients of the others count in the norm.
    """
    found: dict[str, float] = {}
    words = inputs if isinstance(inputs, tuple) else (inputs,)
    for name, measure in (
        ("health/grad_norm", lambda: grad_norm(*optimizers)),
        ("health/dead_units", lambda: dead_units(network, *words)),
        ("health/updates_per_step", lambda: _updates(optimizers[0]) / step),
    ):
        with beside_training(f"measuring {name}", "it is not logged"):
            found[name] = measure()
    return found


def _updates(optimizer: Optimizer) -> float:
    """Steps that the optimizer has taken: the largest count of any parameter."""
    counts = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
    if not counts and not isinstance(optimizer, Adam):
        raise TypeError(f"{type(optimizer).__name__} counts no steps")
    return max(counts, default=0.0)


@torch.no_grad()
def dead_units(network: nn.Module, *inputs: Tensor) -> float:
    """Share of the units after a ReLU or tanh that pass no gradient on for any of the inputs [B, ...]; NaN without any.

    A ReLU unit is dead if it is 0 for the whole batch (Sokar et al., 2023: https://arxiv.org/abs/2302.12902, with
    tau = 0), a tanh unit if it stays beyond 0.99 on one side. In a convolution a unit is a channel. The network is
    called once more, in its current mode; its buffers and the random state are put back.
    """
    dead: list[Tensor] = []

    def look(module: nn.Module, _: object, out: Tensor) -> None:
        units = out.transpose(0, 1).flatten(1)  # [units, batch and places]
        if isinstance(module, nn.Tanh):
            dead.append((units < -SATURATED).all(1) | (units > SATURATED).all(1))
        else:
            dead.append((units <= 0).all(1))

    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]  # batch norm counts one more batch
    hooks = [m.register_forward_hook(look) for m in network.modules() if isinstance(m, nn.ReLU | nn.ReLU6 | nn.Tanh)]
    try:
        with torch.random.fork_rng({p.device for p in network.parameters() if p.device.type == "cuda"}):
            network(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, before in buffers:
            buffer.copy_(before)
    return torch.cat(dead).float().mean().item() if dead else math.nan


def grad_norm(*optimizers: Optimizer) -> float:
    """Root mean square of the gradient's norm over about the last 1 / (1 - beta2) updates, from Adam's second moment.

    With v the running mean of squared gradients, corrected for its start at 0: sqrt(sum(v)). It is what the optimizer
    saw, so after clipping. NaN before the first update.
    """
    total, seen = 0.0, False
    for optimizer in optimizers:
        if not isinstance(optimizer, Adam):
            raise TypeError(f"{type(optimizer).__name__} has no running mean of squared gradients as Adam has")
        for group in optimizer.param_groups:
            for state in (optimizer.state.get(p) for p in group["params"]):
                if state and state["step"] > 0:
                    seen = True
                    correction = 1 - group["betas"][1] ** float(state["step"])
                    total += float(state["exp_avg_sq"].sum()) / correction
    return math.sqrt(total) if seen else math.nan


class Alarms:
    """One warning, once a run, for each thing in the rows for which a person would stop the run."""

    ENTROPY = 0.01  # of its first value
    NO_EPISODE = 5000  # steps of each environment
    DEAD = 0.9  # half of a wide ReLU network's units are dead in runs that learn well
    AT_BOUNDS = 0.9
    VALUES = "losses/q_values", "losses/values", "losses/qf1_values", "losses/qf2_values"
    DIVERGED = 100  # times the largest return; the entropy bonus and DQN's overestimation stay far below

    def __init__(self, total_timesteps: int, num_envs: int) -> None:
        self.total = total_timesteps
        self.num_envs = num_envs
        self.raised: set[str] = set()
        self.first_entropy = math.nan
        self.episodes = False
        self.largest_return = 10.0  # absolute; where rewards are near 0, SAC's values come from the entropy

    def note(self, episodic_return: float) -> None:
        self.episodes = True
        if math.isfinite(episodic_return):
            self.largest_return = max(self.largest_return, abs(episodic_return))

    def look(self, row: Mapping[str, float], step: int) -> list[str]:
        """The warnings that are new; `row` holds what is logged at `step`."""
        at = f"at step {step:,}"
        entropy = row.get("losses/entropy", math.nan)
        if not math.isfinite(self.first_entropy):
            self.first_entropy = entropy
        value = max((abs(row[name]) for name in self.VALUES if not math.isnan(row.get(name, math.nan))), default=0.0)
        dead, saturated = row.get("health/dead_units", 0.0), row.get("health/action_saturation", 0.0)
        found = {}
        if not self.episodes and step >= self.NO_EPISODE * self.num_envs:
            found["episode"] = f"no episode has ended in {step:,} steps, so there is no return; add a time limit?"
        # The entropy of a Box action may be negative, and its size then means nothing.
        if step < self.total / 2 and 0 <= entropy < self.ENTROPY * self.first_entropy:
            fell = f"its entropy fell from {self.first_entropy:.3g} to {entropy:.3g}"
            advice = "try a lower learning rate or a larger entropy bonus"
            found["entropy"] = f"the policy hardly explores any more: {fell} {at}; {advice}"
        if self.episodes and value > self.DIVERGED * self.largest_return:
            most = f"no return exceeded {self.largest_return:,.3g}"
            advice = "try a lower learning rate or a slower target network"
            found["value"] = f"predicted values diverge: {value:,.3g} {at}, but {most}; {advice}"
        if dead > self.DEAD:
            found["dead"] = f"{dead:.0%} of the hidden units pass no gradient on {at}; try a lower learning rate"
        if saturated > self.AT_BOUNDS:
            found["saturated"] = f"the policy no longer chooses: {saturated:.0%} of its actions sit at the bounds {at}"
        new = [line for name, line in found.items() if name not in self.raised]
        self.raised |= found.keys()
        return new

    def state_dict(self) -> dict[str, Any]:
        kept = ("first_entropy", "episodes", "largest_return")
        return {"raised": sorted(self.raised), **{name: getattr(self, name) for name in kept}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "raised": set(state.get("raised", ()))}
