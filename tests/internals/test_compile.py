"""--compile: the same numbers as without, from one graph that is made once."""

import copy
import inspect
import multiprocessing
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import load, network_of, rows, run_script, train_with

import common
from common.internals.speed.compile import _TracedAdam

compilers = [os.environ.get("CXX", "g++"), "g++", "clang++"]
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, compilers)), reason="no C++ compiler to make graphs with")
UPDATES = 100
COMPILE = SimpleNamespace(compile=True)


class Stopped(Exception):  # noqa: N818
    pass


def updates_of(script, tmp_path, monkeypatch, **flags):
    """The updates of a script as `main` builds them, before the first step: {name: (update, its optimizers)}."""
    found = {}

    def compiled(args, *optimizers, whole=True):
        def note(update):
            found[update.__name__] = update, optimizers
            update.whole = whole
            return update

        return note

    def stop(self, obs):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(common, "compile_update", compiled)
        patch.setattr(common.Checkpoint, "restore", stop)
        with pytest.raises(Stopped):
            train_with(load(script), tmp_path, **flags)
    return found


def held_by(update):
    return inspect.getclosurevars(update).nonlocals


def in_float64(update):
    """The networks of an update in float64, where two ways of computing it differ by an error only.

    The temperature of sac.py stays a float32: a graph cannot hold a float64 scalar.
    """
    for value in held_by(update).values():
        if isinstance(value, torch.nn.Module) and all(p.ndim for p in value.parameters()):
            value.double()
            if hasattr(value, "features"):  # ppo.py's turns observations to float32
                value.features = lambda obs: obs
            if hasattr(value, "encode"):
                value.encode = lambda obs, encoder=value.encoder: encoder(obs)


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def ppo_batch(discrete):
    batch = {name: numbers(32) for name in ("values", "advantages", "returns")}
    actions = torch.randint(2, (32,)) if discrete else numbers(32, 1)
    return SimpleNamespace(
        obs=numbers(32, 4 if discrete else 3), actions=actions, logprobs=numbers(32) / 10 - 1, **batch
    )


def sequences(update):
    """16 steps of 4 environments, with the ends of episodes at places of their own in each batch."""
    batch = {name: numbers(16, 4) for name in ("values", "advantages", "returns")}
    memory = held_by(update)["agent"].empty_memory(4).double().expand(16, 4, -1)
    return SimpleNamespace(
        obs=numbers(16, 4, 4),
        memory=memory + numbers(*memory.shape) / 10,
        episode_starts=torch.rand(16, 4) < 0.2,
        actions=torch.randint(2, (16, 4)),
        logprobs=numbers(16, 4) / 10 - 1,
        **batch,
    )


def replay_batch(obs_dim, actions):
    names = ("rewards", "discounts", "weights")
    return SimpleNamespace(
        obs=numbers(32, obs_dim),
        next_obs=numbers(32, obs_dim),
        actions=actions,
        terminations=torch.rand(32) < 0.1,
        **{name: numbers(32).abs() for name in names},
    )


def dqn_batch():
    return replay_batch(4, torch.randint(2, (32,)))


def pqn_batch():
    return SimpleNamespace(obs=numbers(32, 4), actions=torch.randint(2, (32,)), returns=numbers(32))


def sac_batch():
    return replay_batch(3, numbers(32, 1).tanh())


def reinforce_returns(update):
    held_by(update)["rollout"].fields.update(obs=numbers(8, 4, 4), actions=torch.randint(2, (8, 4)))
    held_by(update)["rollout"].pos = 8
    return numbers(8, 4)


def parameters(update):
    held = sorted(held_by(update).items())
    return [p for _, module in held if isinstance(module, torch.nn.Module) for p in module.parameters()]


def learn(update, optimizers, words, calls_to_compile=1):
    """UPDATES updates with falling learning rates; the metrics of each. Later ones may make no other graph."""
    torch.manual_seed(3)
    logged = []
    for i in range(UPDATES):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - i / UPDATES)
        with torch.compiler.set_stance("default" if i < calls_to_compile else "fail_on_recompile"):
            result = update(words(i))
        metrics = result[1] if isinstance(result, tuple) else result
        logged.append({name: float(value) for name, value in metrics.items()})
    return logged


def check(script, name, make, rel, tmp_path, monkeypatch, **flags):
    """A compiled update leaves the weights, and returns the metrics, of the update as it stands."""
    results = []
    for compile_it in (False, True):
        update, optimizers = updates_of(script, tmp_path, monkeypatch, **flags)[name]
        in_float64(update)
        torch.manual_seed(2)
        first = [p.detach().clone() for p in parameters(update)]
        batches = [make(update) for _ in range(4)]
        graph = common.compile_update(COMPILE, *optimizers, whole=update.whole)(update) if compile_it else update
        results.append((learn(graph, optimizers, lambda i, batches=batches: batches[i % 4]), parameters(update), first))
    (logged, eager, first), (logged_compiled, compiled, _) = results
    for row, other in zip(logged, logged_compiled, strict=True):
        assert other == pytest.approx(row, rel=rel, abs=rel / 1000)
    for p, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(other, p, rtol=rel, atol=rel / 1000)
    moved = [(p - q).abs().max().item() > 1e-3 for p, q in zip(eager, first, strict=True) if p.numel()]
    assert sum(moved) >= 4


CASES = {
    "ppo": ("ppo", "update", lambda _: ppo_batch(True), {"hidden_sizes": (8,), "clip_vloss": True, "ent_coef": 0.01}),
    "dqn": ("dqn", "update", lambda _: dqn_batch(), {"hidden_sizes": (8,)}),
    "rainbow": ("rainbow", "update", lambda _: dqn_batch(), {"hidden_sizes": (8,)}),
    "pqn": ("pqn", "update", lambda _: pqn_batch(), {"hidden_sizes": (8,)}),
    "sac actor": ("sac", "update_actor", lambda _: sac_batch(), {"hidden_sizes": (8,)}),
}
SLOW = {
    "reinforce_rollout": ("reinforce_rollout", "update", reinforce_returns, {"num_steps": 8, "num_envs": 4}),
    "sac critic": ("sac", "update_critic", lambda _: sac_batch(), {"hidden_sizes": (8,)}),
    "crossq critic": ("crossq", "update_critic", lambda _: sac_batch(), {"hidden_sizes": (8,)}),
    "crossq actor": ("crossq", "update_actor", lambda _: sac_batch(), {"hidden_sizes": (8,)}),
    "ppo Box": ("ppo", "update", lambda _: ppo_batch(False), {"env_id": "Pendulum-v1"}),
    "dqn not double": ("dqn", "update", lambda _: dqn_batch(), {"double": False}),
    "rainbow plain": ("rainbow", "update", lambda _: dqn_batch(), {"distributional": False, "double": False}),
    "sac fixed alpha": ("sac", "update_actor", lambda _: sac_batch(), {"alpha": 0.1}),
}


ALONE = {
    "ppo_recurrent": ("ppo_recurrent", "update", sequences, {"num_envs": 4, "memory_size": 8}),
    "ppo_recurrent GRU": ("ppo_recurrent", "update", sequences, {"lstm": False, "memory_size": 8, "num_envs": 4}),
}


def check_alone(case, folder):
    script, name, make, flags = ALONE[case]
    check(script, name, make, 1e-8, folder, pytest.MonkeyPatch(), **flags)


@needs_compiler
@pytest.mark.parametrize("case", ["ppo_recurrent", pytest.param("ppo_recurrent GRU", marks=pytest.mark.slow)])
def test_an_update_with_a_part_that_is_not_compiled_is_the_update(case, tmp_path):
    """In a new process, as a run is: in one, torch 2.13 mixes up the optimizers of whole graphs and of others."""
    process = multiprocessing.get_context("spawn").Process(target=check_alone, args=(case, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0


@needs_compiler
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_compiled_update_is_the_update(case, tmp_path, monkeypatch):
    script, name, make, flags = {**CASES, **SLOW}[case]
    rel = 1e-5 if case in ("sac actor", "crossq actor") else 1e-8  # a float32 temperature weighs its loss
    check(script, name, make, rel, tmp_path, monkeypatch, **flags)


@needs_compiler
@pytest.mark.slow
def test_a_compiled_update_in_bfloat16_is_the_update_within_its_rounding(tmp_path, monkeypatch):
    """Fused operations round less often, so the losses of 100 updates agree to some of bfloat16's 8 bits."""
    curves = []
    for compile_it, bf16 in ((False, True), (True, True), (False, False)):
        update, optimizers = updates_of("sac", tmp_path, monkeypatch, bf16=bf16)["update_critic"]
        torch.manual_seed(2)
        batches = [sac_batch() for _ in range(4)]
        for batch in batches:
            vars(batch).update({name: x.float() for name, x in vars(batch).items() if x.is_floating_point()})
        graph = common.compile_update(COMPILE, *optimizers)(update) if compile_it else update
        rows = learn(graph, optimizers, lambda i, batches=batches: batches[i % 4])
        curves.append(torch.tensor([row["losses/qf1_loss"] for row in rows]))
    eager, compiled, exact = curves
    assert not torch.equal(eager, exact)
    assert compiled[0].item() == pytest.approx(eager[0].item(), rel=2**-8)
    assert (compiled - eager).abs().mean() < 0.05 * eager.mean()


@needs_compiler
def test_a_run_makes_its_graph_once_though_the_step_size_falls(tmp_path):
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    flags = {"total_timesteps": 400, "learning_starts": 100, "hidden_sizes": (8,), "log_interval": 100}
    run_dir = train_with(load("dqn"), tmp_path, compile=True, **flags)
    assert stats["unique_graphs"] == before + 1
    assert len({row["charts/learning_rate"] for row in rows(run_dir) if "charts/learning_rate" in row}) == 4
    eager = train_with(load("dqn"), tmp_path, **flags)
    assert stats["unique_graphs"] == before + 1
    weights = [p.detach() for p in network_of(run_dir).parameters()]
    for p, other in zip(network_of(eager).parameters(), weights, strict=True):
        torch.testing.assert_close(other, p.detach(), rtol=1e-3, atol=1e-4)


@needs_compiler
def test_draws_in_a_graph_are_those_without_and_new_at_each_call():
    @common.compile_update(COMPILE)
    def draw(mean, log_std):
        return mean + log_std.exp() * torch.randn_like(mean)

    mean, log_std = torch.full((20_000,), 3.0), torch.full((20_000,), -1.0)
    torch.manual_seed(7)
    first, second = draw(mean, log_std), draw(mean, log_std)
    torch.manual_seed(7)
    torch.testing.assert_close(first, mean + log_std.exp() * torch.randn_like(mean))
    torch.testing.assert_close(second, mean + log_std.exp() * torch.randn_like(mean))
    # The standard error of a mean is std / sqrt(n), that of a standard deviation std / sqrt(2 n); 5 of them.
    std = log_std[0].exp().item()
    for actions in (first, second):
        assert abs(actions.mean().item() - 3.0) < 5 * std / 20_000**0.5
        assert abs(actions.std().item() - std) < 5 * std / 40_000**0.5
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 5 / 20_000**0.5


def twin_problems():
    """The same network and targets twice, with an Adam each: of torch, and in the operations of a graph."""
    torch.manual_seed(4)
    ours = []
    for _ in range(2):
        torch.manual_seed(4)
        net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
        unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        groups = [{"params": [*net[0].parameters(), unused]}, {"params": net[2].parameters(), "betas": (0.5, 0.9)}]
        ours.append((net, torch.optim.Adam(groups, lr=0.05, eps=1e-5, fused=True)))
    return ours


def descend(net, optimizer, steps, traced=None):
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    for _ in range(steps):
        if traced is not None:
            traced.read_lr()
        optimizer.zero_grad()
        (net(x) - x.sum(dim=1, keepdim=True)).square().mean().backward()
        optimizer.step()


def test_adam_in_the_operations_of_a_graph_is_adam():
    (net, optimizer), (other, other_optimizer) = twin_problems()
    traced = _TracedAdam(other_optimizer)
    for lr in (0.05, 0.02, 0.0):
        optimizer.param_groups[0]["lr"] = other_optimizer.param_groups[0]["lr"] = lr
        descend(net, optimizer, 20)
        descend(other, other_optimizer, 20, traced)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-14)
        assert q.grad is None


def test_the_state_of_adam_goes_over_in_both_directions():
    (net, optimizer), (other, other_optimizer) = twin_problems()
    traced = _TracedAdam(other_optimizer)
    descend(net, optimizer, 7)
    other.load_state_dict(net.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    descend(net, optimizer, 5)
    descend(other, other_optimizer, 5, traced)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-14)
    optimizer.load_state_dict(copy.deepcopy(other_optimizer.state_dict()))
    descend(net, optimizer, 5)
    descend(other, other_optimizer, 5, traced)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-14)


def test_without_the_flag_nothing_is_touched():
    (net, optimizer), _ = twin_problems()

    def update():
        return net

    timed = common.compile_update(SimpleNamespace(compile=False), optimizer)(update)
    assert timed() is net
    assert (timed.__name__, timed.__wrapped__) == ("update", update)
    assert "step" not in vars(optimizer)


OTHERS = {
    "Adam with weight decay": lambda params: torch.optim.Adam(params, weight_decay=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
    "AdamW": torch.optim.AdamW,
    "Adam with amsgrad": lambda params: torch.optim.Adam(params, amsgrad=True),
    "Adam that maximizes": lambda params: torch.optim.Adam(params, maximize=True),
    "Adam of a float64 scalar": torch.optim.Adam,
}


@needs_compiler
@pytest.mark.parametrize(
    "kind", [*list(OTHERS)[:1], *(pytest.param(x, marks=pytest.mark.slow) for x in list(OTHERS)[1:])]
)
def test_another_optimizer_steps_outside_the_graph_and_one_line_says_so(kind, capsys):
    """In the graph, torch 2.13 gets some of these wrong."""
    learnt = []
    for compile_it in (False, True):
        torch.manual_seed(4)
        net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
        params = list(net.parameters())
        scale = torch.ones((), dtype=torch.float64)
        if "scalar" in kind:
            params.append(scale.requires_grad_())
        optimizer = OTHERS[kind](params)
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)

        @common.compile_update(SimpleNamespace(compile=compile_it), optimizer)
        def update(x, net=net, optimizer=optimizer, params=params, scale=scale):
            loss = (scale * net(x) - x.sum(dim=1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 0.5)
            optimizer.step()
            return {"loss": loss.detach()}

        first = [p.detach().clone() for p in params]
        learn(update, [optimizer], lambda i, x=x: x, calls_to_compile=2)  # gradients are None in the first
        learnt.append([p.detach() for p in params])
        assert all((p - q).abs().max() > 1e-3 for p, q in zip(params, first, strict=True))
    for p, q in zip(*learnt, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-11)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: --compile: the loss and gradients are compiled, the step of ")


@pytest.mark.parametrize("what", ["item", "fail"])
def test_an_update_that_is_no_graph_is_one_line(what, capsys):
    @common.compile_update(COMPILE)
    def update(x):
        if x.sum().item() > 0 if what == "item" else common.fail("no"):
            return x
        return 2 * x

    with pytest.raises(SystemExit) as stop:
        update(torch.ones(3))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --compile cannot make one graph of update(): ")


def test_no_compiler_is_one_line_before_anything_is_made(tmp_path):
    done = run_script("--compile", cwd=tmp_path, env={"CXX": str(tmp_path / "none"), "PATH": str(tmp_path)}, check=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --compile needs a C++ compiler") and "apt install g++" in line
    assert not list(tmp_path.iterdir())


def test_lightning_has_an_update_of_its_own(tmp_path, capsys):
    pytest.importorskip("lightning")
    with pytest.raises(SystemExit) as stop:
        train_with(load("dqn_lightning"), tmp_path, compile=True)
    assert stop.value.code == 2 and "this script has no --compile" in capsys.readouterr().err


@needs_compiler
def test_losses_that_are_not_finite_end_a_compiled_run_with_code_4(tmp_path):
    flags = [
        "--total-timesteps",
        400,
        "--learning-starts",
        100,
        "--hidden-sizes",
        8,
        "--log-interval",
        100,
        "--no-track",
    ]
    done = run_script("--compile", *flags, "--learning-rate", 1e30, "--eval-episodes", 0, cwd=tmp_path, check=4)
    assert "losses/td_loss is " in done.stderr
