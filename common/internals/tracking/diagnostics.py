"""Signs that learning goes wrong, measured when a row is logged and at no other time. They draw and change nothing."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from common.args import beside_training

CUT_OFF = (nn.ReLU, nn.ReLU6)  # gradient 0 below 0
SQUASHED = (nn.Tanh, nn.Sigmoid)  # gradient next to 0 at both ends
SATURATED = 0.99


def diagnostics(
    network: nn.Module, inputs: Tensor | tuple[Tensor, ...], step: int, *optimizers: Optimizer
) -> dict[str, float]:
    """health/grad_norm, health/dead_units and health/updates_per_step, as docs/health.md describes them.

    What cannot be measured, of a network or an optimizer of another kind, is left out, after one warning.

    Args:
        inputs: what `network` is called with, some hundred observations [B, ...] or (observations, actions).
        step: environment steps so far.
        optimizers: those of the network first; the others' gradients count in the norm.
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
    """Steps that the optimizer has taken: the most that it has counted for any parameter."""
    counts = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
    if not counts and not isinstance(optimizer, Adam):
        raise TypeError(f"{type(optimizer).__name__} counts no steps")
    return max(counts, default=0.0)


@torch.no_grad()
def dead_units(network: nn.Module, *inputs: Tensor) -> float:
    """Share of the units behind an activation that pass no gradient on for any of the inputs [B, ...]; NaN without any.

    A ReLU's unit is dead where it is 0 for the whole batch (Sokar et al., 2023: https://arxiv.org/abs/2302.12902, with
    tau = 0), one of a tanh or sigmoid where it stays beyond 0.99 of its range, on one side. Of convolutions a
    unit is a channel. The network is called once more, as it is; what it counts or draws then is put back.
    """
    dead: list[Tensor] = []

    def look(module: nn.Module, _: object, out: Tensor) -> None:
        units = out.transpose(0, 1).flatten(1)  # [units, batch and places]
        if isinstance(module, CUT_OFF):
            dead.append((units <= 0).all(1))
        else:
            low = 0.0 if isinstance(module, nn.Sigmoid) else -1.0
            share = (units - low) / (1 - low)  # of the range
            low_end, high_end = (1 - SATURATED) / 2, (1 + SATURATED) / 2
            dead.append((share < low_end).all(1) | (share > high_end).all(1))

    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]  # of batch norm: one more batch counts in them
    hooks = [m.register_forward_hook(look) for m in network.modules() if isinstance(m, CUT_OFF + SQUASHED)]
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
    """Root mean square of the gradient's norm over the last 1 / (1 - beta2) updates or so, as Adam's moments tell it.

    With v the running mean of squared gradients, corrected for its start at 0: sqrt(sum(v)). It is what the optimizer
    saw, so after clipping. NaN before the first update.
    """
    total, seen = 0.0, False
    for optimizer in optimizers:
        if not isinstance(optimizer, Adam):
            raise TypeError(f"{type(optimizer).__name__} keeps no mean of squared gradients as Adam does")
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                if state and state["step"] > 0:
                    seen = True
                    correction = 1 - group["betas"][1] ** float(state["step"])
                    total += float(state["exp_avg_sq"].sum()) / correction
    return math.sqrt(total) if seen else math.nan


class Alarms:
    """One line, once a run, for each thing in the rows that a person would stop the run for."""

    ENTROPY = 0.01  # of its first value
    NO_EPISODE = 5000  # steps of each environment
    DEAD = 0.9  # half of a wide ReLU network's units are silent in runs that learn well
    SATURATED = 0.9
    VALUES = "losses/q_values", "losses/values", "losses/qf1_values", "losses/qf2_values"
    BLOWN_UP = 100  # times the largest return; the entropy bonus and DQN's overestimation stay far below

    def __init__(self, total_timesteps: int, num_envs: int) -> None:
        self.total = total_timesteps
        self.num_envs = num_envs
        self.raised: set[str] = set()
        self.first_entropy = math.nan
        self.episodes = False
        self.largest_return = 10.0  # in size; where next to nothing is earned, SAC's entropy makes the values

    def note(self, episodic_return: float) -> None:
        self.episodes = True
        if math.isfinite(episodic_return):
            self.largest_return = max(self.largest_return, abs(episodic_return))

    def look(self, row: Mapping[str, float], step: int) -> list[str]:
        """What is newly wrong, as lines for a person; `row` holds what is logged at `step`."""
        early = step < self.total / 2
        entropy = row.get("losses/entropy", math.nan)
        if not math.isfinite(self.first_entropy):
            self.first_entropy = entropy
        # A Box action's entropy may be negative, and then says nothing by its size.
        collapsed = early and 0 <= entropy < self.ENTROPY * self.first_entropy
        dead = row.get("health/dead_units", 0.0)
        saturated = row.get("health/action_saturation", 0.0)
        value = max((abs(row[name]) for name in self.VALUES if not math.isnan(row.get(name, math.nan))), default=0.0)
        found = {
            "episode": not self.episodes
            and step >= self.NO_EPISODE * self.num_envs
            and f"no episode has ended in {step:,} steps: there is no return to log yet; does the task end, or have a "
            "time limit?",
            "entropy": collapsed
            and f"the policy's entropy has fallen from {self.first_entropy:.3g} to {entropy:.3g} at step {step:,}: it "
            "hardly explores any more; a lower learning rate or more entropy bonus may help",
            "value": self.episodes
            and value > self.BLOWN_UP * self.largest_return
            and f"predicted values of {value:,.3g} at step {step:,}, where no return was beyond "
            f"{self.largest_return:,.3g}: they diverge; a lower learning rate or a slower target network may help",
            "dead": dead > self.DEAD
            and f"{dead:.0%} of the units pass no gradient on at step {step:,}: a lower learning rate may help",
            "saturated": saturated > self.SATURATED
            and f"{saturated:.0%} of the actions are at the bounds at step {step:,}: the policy has stopped to choose",
        }
        new = [line for name, line in found.items() if line and name not in self.raised]
        self.raised |= {name for name, line in found.items() if line}
        return new

    def state_dict(self) -> dict[str, object]:
        kept = ("first_entropy", "episodes", "largest_return")
        return {"raised": sorted(self.raised), **{name: getattr(self, name) for name in kept}}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.__dict__ |= {**state, "raised": set(state.get("raised", ()))}  # type: ignore[call-overload]
