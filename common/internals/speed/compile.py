"""--compile: an update as one graph, from the loss over its gradients and their clipping to the optimizer's step."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.optim import Adam, Optimizer

from common.args import RunArgs, fail, warn
from common.internals.speed.timing import update_timer

P = ParamSpec("P")
R = TypeVar("R")


def compile_update(
    args: RunArgs, *optimizers: Optimizer, whole: bool = True
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes an update one graph where `--compile` asks for it; its time is that of health/time_update either way.

        @common.compile_update(args, optimizer)
        def update(batch):
            loss, metrics = some_loss(network, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return metrics

    The graph is made at the first call, and again where shapes, dtypes or a number that the update reads change, at
    most 8 times. Learning rates may change at any time. Random draws are the same as without the flag. Gradients are
    None afterwards. `.item()`, NumPy and prints belong outside an update.

    Args:
        optimizers: all that the update steps. Unless each is Adam without weight decay and the like, only the loss and
            its gradients are compiled, and one line says so.
        whole: false if a part is hidden from the compiler (`torch.compiler.disable`): what is before and after it is
            compiled, the steps of the optimizers are not.

    Ends the process with code 2 if the update cannot be made one graph.
    """

    def decorate(update: Callable[P, R]) -> Callable[P, R]:
        run = _graph(update, optimizers, whole) if args.compile else update

        @functools.wraps(update)
        def timed(*words: P.args, **named: P.kwargs) -> R:
            with update_timer:
                return run(*words, **named)

        return timed

    return decorate


def _graph(update: Callable[P, R], optimizers: tuple[Optimizer, ...], whole: bool) -> Callable[P, R]:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import InductorError

    plain = all(map(_is_plain_adam, optimizers))
    whole = whole and plain
    adams = [_TracedAdam(optimizer) for optimizer in optimizers] if whole else []
    if not plain:
        kinds = " and ".join(sorted({type(optimizer).__name__ for optimizer in optimizers}))
        warn(f"--compile: the loss and gradients are compiled, the step of {kinds} is not (plain Adam's would be)")
    if not whole:
        for optimizer in optimizers:
            optimizer.step = torch.compiler.disable(optimizer.step)  # type: ignore[method-assign]
    # Makes backward() a part of the graph. In a graph with breaks torch 2.13 then computes wrong gradients.
    tracing = torch._dynamo.config.patch(trace_autograd_ops=whole)
    # dynamic: shapes are few, and known sizes are faster. fallback_random: torch's own generator, which checkpoints
    # hold, and not the compiler's.
    graph = torch.compile(update, fullgraph=whole, dynamic=False, options={"fallback_random": True})

    def run(*words: P.args, **named: P.kwargs) -> R:
        for adam in adams:
            adam.read_lr()
        try:
            with tracing:
                return graph(*words, **named)
        except (TorchDynamoException, FailOnRecompileLimitHit, InductorError) as error:
            reason = str(error).strip().partition("\n")[0]
            fail(f"--compile cannot make one graph of {update.__name__}(): {reason}; try without it, or --debug")

    return run


def _is_plain_adam(optimizer: Optimizer) -> bool:
    groups = optimizer.param_groups
    off = ("weight_decay", "amsgrad", "maximize", "differentiable")
    # torch 2.13 loses what a graph writes to a float64 scalar.
    scalars = [p for group in groups for p in group["params"] if p.ndim == 0 and p.dtype == torch.float64]
    return type(optimizer) is Adam and not scalars and not any(group[name] for group in groups for name in off)


class _TracedAdam:
    """Replaces `step` and `zero_grad` of Adam, which break a graph in two; its state_dict stays as it is."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        # A number would be a constant of the graph, and each new learning rate a new graph.
        device = optimizer.param_groups[0]["params"][0].device
        self.lrs = [torch.zeros((), dtype=torch.float64, device=device) for _ in optimizer.param_groups]
        self.take_state()
        optimizer.register_load_state_dict_post_hook(lambda _: self.take_state())
        optimizer.step = self.step  # type: ignore[method-assign, assignment]
        optimizer.zero_grad = self.zero_grad  # type: ignore[method-assign, assignment]

    def take_state(self) -> None:
        self.parts: list[tuple[Any, ...]] = []
        for lr, group in zip(self.lrs, self.optimizer.param_groups, strict=True):
            for p in group["params"]:
                state = self.optimizer.state[p]
                if not state:
                    zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    state |= {"step": torch.zeros((), device=p.device), **zeros}
                self.parts.append((p, state, lr, *group["betas"], group["eps"]))

    def read_lr(self) -> None:
        for lr, group in zip(self.lrs, self.optimizer.param_groups, strict=True):
            lr.fill_(group["lr"])

    def zero_grad(self) -> None:
        for p, *_ in self.parts:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Kingma & Ba, 2015, algorithm 1: https://arxiv.org/abs/1412.6980"""
        for p, state, lr, beta1, beta2, eps in self.parts:
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
        fail("--compile needs a C++ compiler: install one (apt install g++), or name it in the variable CXX")
