"""--compile: an update as one graph, from the loss over its gradients and their clipping to the optimizer's step."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim import Adam

from common.args import RunArgs, fail
from common.internals.speed.timing import update_timer

P = ParamSpec("P")
R = TypeVar("R")


def compile_update(args: RunArgs, *optimizers: Adam) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes one graph of an update, where `--compile` asks for it; its time is that of health/time_update either way.

        @common.compile_update(args, optimizer)
        def update(batch):
            loss, metrics = some_loss(network, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return metrics

    The graph is made at the first call, and anew where shapes, dtypes or a number that the update reads change: at most
    8 times. Step sizes are read from the optimizer at each call and may change. Random draws are those of the update as
    it stands. Gradients are None afterwards. `.item()`, NumPy and prints belong outside of an update.

    Args:
        optimizers: all those that the update steps.

    Ends the process with code 2 if there is no C++ compiler, or the update cannot be made one graph: a run that is
    slower than what was asked for, and differs in its last bits, is not begun.
    """

    def decorate(update: Callable[P, R]) -> Callable[P, R]:
        if not args.compile:

            @functools.wraps(update)
            def timed(*words: P.args, **named: P.kwargs) -> R:
                with update_timer:
                    return update(*words, **named)

            return timed
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
        from torch._inductor.exc import InductorError

        traced = [_TracedAdam(optimizer) for optimizer in optimizers]
        torch._dynamo.config.trace_autograd_ops = True  # backward() becomes a part of the graph
        # dynamic: shapes are few, and known sizes are faster. fallback_random: torch's own generator, which checkpoints
        # hold, not one of the compiler's.
        graph = torch.compile(update, fullgraph=True, dynamic=False, options={"fallback_random": True})

        @functools.wraps(update)
        def run(*words: P.args, **named: P.kwargs) -> R:
            for adam in traced:
                adam.read_lr()
            try:
                with update_timer:
                    return graph(*words, **named)
            except (TorchDynamoException, FailOnRecompileLimitHit, InductorError) as error:
                reason = str(error).strip().partition("\n")[0]
                fail(f"--compile cannot make one graph of {update.__name__}(): {reason}; try without it, or --debug")

        return run

    return decorate


class _TracedAdam:
    """Adam in operations that a graph can hold, in place of the `step` and `zero_grad` of `optimizer`.

    Those of torch break a graph in two. Moments and counts stay where the optimizer's state_dict looks for them.
    """

    def __init__(self, optimizer: Adam) -> None:
        off = ("weight_decay", "amsgrad", "maximize", "differentiable")
        if type(optimizer) is not Adam or any(group[name] for group in optimizer.param_groups for name in off):
            fail(f"--compile knows torch.optim.Adam without {', '.join(off)}; the optimizer is {optimizer}")
        self.optimizer = optimizer
        self.params: list[Tensor] = []
        self.groups: list[tuple[Tensor, float, float, float, list[Tensor]]] = []
        for group in optimizer.param_groups:
            # A number would be a constant of the graph, and each new step size a new graph.
            lr = torch.zeros((), dtype=torch.float64, device=group["params"][0].device)
            self.groups.append((lr, *group["betas"], group["eps"], group["params"]))
            self.params += group["params"]
        if any(p.ndim == 0 and p.dtype == torch.float64 for p in self.params):
            fail("--compile cannot learn a float64 scalar (torch 2.13 loses what a graph writes to it): use float32")
        self.take_state()
        optimizer.register_load_state_dict_post_hook(lambda _: self.take_state())
        optimizer.step = self.step  # type: ignore[method-assign, assignment]
        optimizer.zero_grad = self.zero_grad  # type: ignore[method-assign, assignment]

    def take_state(self) -> None:
        for p in self.params:
            if not self.optimizer.state[p]:
                zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
        self.state = [self.optimizer.state[p] for p in self.params]

    def read_lr(self) -> None:
        for (lr, *_), group in zip(self.groups, self.optimizer.param_groups, strict=True):
            lr.fill_(group["lr"])

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Kingma & Ba, 2015, algorithm 1: https://arxiv.org/abs/1412.6980"""
        states = iter(self.state)
        for lr, beta1, beta2, eps, params in self.groups:
            for p in params:
                state = next(states)
                if p.grad is None:
                    continue
                m, v = state["exp_avg"], state["exp_avg_sq"]
                t = state["step"].add_(1).double()  # in float32, 1 - 0.999^t has lost 4 of its 7 digits at t = 1
                step_size, correction = lr / (1 - beta1**t), (1 - beta2**t).sqrt()
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                p.sub_(step_size.to(p.dtype) * m / (v.sqrt() / correction.to(p.dtype) + eps))
                p.grad = None  # gradients that nobody reads need not leave the graph


def require_compiler() -> None:
    """Ends the process with code 2 and one line if there is no C++ compiler, which --compile needs at run time."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        fail(
            "--compile needs a C++ compiler and finds none: install one (apt install g++, or xcode-select --install), "
            "or name it in the environment variable CXX"
        )
