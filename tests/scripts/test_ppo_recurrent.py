"""PPO with a memory: sequences against a recomputation step by step, episode ends, and tasks that need a memory."""

import functools
import itertools

import numpy as np
import pytest
import torch
from conftest import envs_of, load, rows, run_tool, train_with, weights

from common.evaluation import play

recurrent = load("ppo_recurrent")
train = functools.partial(train_with, recurrent)
KINDS = pytest.mark.parametrize("lstm", [False, True], ids=["gru", "lstm"])


def agent_of(env_id, num_envs=3, **flags):
    """An agent whose weights are all at work, in its memory too."""
    torch.manual_seed(1)
    agent = recurrent.Agent(envs_of(env_id, num_envs), recurrent.Args(memory_size=8, hidden_sizes=(8,), **flags))
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return agent


def cell(rnn, x, memory):
    """One step of a GRU or LSTM as the papers write it (Cho et al., 2014, with torch's reset after the product)."""
    W, U, b, c = rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0
    n = rnn.hidden_size
    if isinstance(rnn, torch.nn.GRU):
        wx, uh = x @ W.T + b, memory @ U.T + c
        reset, update = (wx[:, :n] + uh[:, :n]).sigmoid(), (wx[:, n : 2 * n] + uh[:, n : 2 * n]).sigmoid()
        new = (wx[:, 2 * n :] + reset * uh[:, 2 * n :]).tanh()
        return (1 - update) * new + update * memory
    h, cells = memory[:, :n], memory[:, n:]
    gates = x @ W.T + b + h @ U.T + c
    take, forget, new, give = (gates[:, k * n : (k + 1) * n] for k in range(4))
    cells = forget.sigmoid() * cells + take.sigmoid() * new.tanh()
    return torch.cat([give.sigmoid() * cells.tanh(), cells], dim=1)


def by_steps(agent, obs, memory, starts):
    """Outputs of the actor and values, [T, B, ...], one environment and one step at a time."""
    outs, values = [], []
    for t in range(len(obs)):
        memory = torch.where(starts[t].unsqueeze(1), torch.zeros_like(memory), memory)
        memory = torch.cat([cell(agent.rnn, agent.encode(obs[t, i : i + 1]), memory[i : i + 1]) for i in range(3)])
        output = memory[:, : agent.rnn.hidden_size]
        outs.append(agent.outputs(output))
        values.append(agent.critic(output).squeeze(1))
    return torch.stack(outs), torch.stack(values)


def log_probs(agent, out, actions):
    if agent.discrete:
        return (
            torch.log_softmax(out, -1).gather(-1, actions.unsqueeze(-1)).squeeze(-1).reshape(*out.shape[:2], -1).sum(-1)
        )
    std = agent.actor_logstd.exp()
    return (-(((actions - out) / std) ** 2) / 2 - std.log() - np.log(2 * np.pi) / 2).sum(-1)


@KINDS
@pytest.mark.parametrize("ends", [*itertools.product([0, 1], repeat=5), "drawn"], ids=str)
def test_a_batch_of_sequences_is_the_recomputation_step_by_step(ends, lstm):
    """Environment 0 has episode starts wherever `ends` has a 1: all 32 patterns of 5 steps; the others are drawn."""
    agent = agent_of("CartPole-v1", lstm=lstm).double()
    agent.encode = lambda obs: agent.encoder(obs)  # the script's makes float32 of observations
    T = 40 if ends == "drawn" else 5
    obs, memory = torch.randn(T, 3, 4).double(), torch.randn_like(agent.empty_memory(3).double())
    starts = torch.rand(T, 3) < 0.3
    if ends != "drawn":
        starts[:, 0] = torch.tensor(ends, dtype=torch.bool)
    policy, values = agent(obs, memory, starts)
    actions = torch.randint(2, (T, 3))
    outs, expected = by_steps(agent, obs, memory, starts)
    torch.testing.assert_close(policy.log_prob(actions), log_probs(agent, outs, actions), rtol=0, atol=1e-12)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    # The gradients are those of the recomputation as well, over time and into the memory before the first step.
    weights = torch.randn(T, 3).double()
    gradients = []
    for logs, v in ((policy.log_prob(actions), values), (log_probs(agent, outs, actions), expected)):
        agent.zero_grad()
        (weights * (logs + v)).sum().backward(retain_graph=True)
        gradients.append([p.grad.clone() for p in agent.parameters() if p.grad is not None])
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@KINDS
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Dials-v0", "Sheet-v0", "Pixels-v0"])
def test_acting_values_and_sequences_agree_to_float32_for_each_kind_of_space(env_id, lstm):
    agent = agent_of(env_id, lstm=lstm)
    shape = (12, 3, *envs_of(env_id, 1).single_observation_space.shape)
    obs = torch.randint(256, shape, dtype=torch.uint8) if env_id == "Pixels-v0" else torch.randn(shape)
    starts, memory = torch.rand(12, 3) < 0.3, torch.randn_like(agent.empty_memory(3))
    with torch.no_grad():
        policy, values = agent(obs, memory, starts)
        outs, expected = by_steps(agent, obs, memory, starts)
        acted, memories = [], [memory]
        for t in range(12):
            _, played = agent.greedy(obs[t], memory, starts[t])
            action, memory = agent.sample(obs[t], memory, starts[t])
            assert torch.equal(played, memory)
            acted.append(action)
            memories.append(memory)
        actions = torch.stack(acted)
        torch.testing.assert_close(policy.log_prob(actions), log_probs(agent, outs, actions), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
        for t in range(12):
            before = torch.where(starts[t].unsqueeze(1), 0.0, memories[t])
            torch.testing.assert_close(agent.value(obs[t], before), values[t], rtol=1e-5, atol=1e-5)


@KINDS
def test_nothing_passes_an_episode_start(lstm):
    agent = agent_of("CartPole-v1", lstm=lstm)
    obs = torch.randn(6, 3, 4, requires_grad=True)
    memory = torch.randn_like(agent.empty_memory(3)).requires_grad_()
    starts = torch.zeros(6, 3, dtype=torch.bool)
    starts[3] = True
    policy, values = agent(obs, memory, starts)
    (values[3:].sum() + policy.base_dist.logits[3:].sum()).backward()
    assert obs.grad[:3].abs().max() == 0 and memory.grad.abs().max() == 0 and obs.grad[3:].abs().min() > 0


class Told:
    """What the script stores and learns from, for a run in an environment whose observations are told apart."""

    def __init__(self, monkeypatch):
        self.rollouts, self.values, self.agents = [], [], []
        real = recurrent.gae

        def gae(rewards, values, next_values, *rest):
            self.values.append((values.clone(), next_values.clone()))
            return real(rewards, values, next_values, *rest)

        told = self

        class Spy(recurrent.common.RolloutStorage):
            def sequences(self, *words, **extra):
                if not told.rollouts or told.rollouts[-1][0] is not extra["returns"]:
                    agent = told.agents[-1]
                    before = {name: p.detach().clone() for name, p in agent.state_dict().items()}
                    fields = {name: value.clone() for name, value in self.fields.items()}
                    told.rollouts.append((extra["returns"], fields, before))
                return super().sequences(*words, **extra)

        class Kept(recurrent.Agent):
            def __init__(self, *words):
                super().__init__(*words)
                told.agents.append(self)

        monkeypatch.setattr(recurrent, "gae", gae)
        monkeypatch.setattr(recurrent, "Agent", Kept)
        monkeypatch.setattr(recurrent.common, "RolloutStorage", Spy)


@KINDS
def test_every_bootstrap_is_of_the_true_final_observation_with_the_memory_of_its_episode(lstm, tmp_path, monkeypatch):
    """Mixed-v0's episodes of 3, 5 and 2 steps end by termination and by truncation, across the ends of rollouts.

    Its observation is 1000 * episode + t, so whole episodes can be replayed from nothing: from the weights that acted
    in a rollout, and the memory that it began with, come the values of all observations, the last ones included.
    """
    told = Told(monkeypatch)
    flags = {"num_envs": 2, "num_steps": 7, "total_timesteps": 84, "update_epochs": 3, "learning_rate": 0.01}
    train(tmp_path, env_id="Mixed-v0", memory_size=8, hidden_sizes=(8,), lstm=lstm, **flags)
    assert len(told.rollouts) == 6
    agent, ends = told.agents[-1], 0
    memory = agent.empty_memory(2)
    for (_, fields, before), (values, next_values) in zip(told.rollouts, told.values, strict=True):
        agent.load_state_dict(before)
        with torch.no_grad():
            for t in range(7):
                obs, next_obs = fields["obs"][t], fields["next_obs"][t]
                first = obs[:, 0] % 1000 == 0
                assert torch.equal(fields["episode_starts"][t], first)
                assert torch.equal(next_obs, obs + 1)
                memory = torch.where(first.unsqueeze(1), 0.0, memory)
                memory = cell(agent.rnn, agent.encode(obs), memory)
                after = cell(agent.rnn, agent.encode(next_obs), memory)
                for state, found in ((memory, values[t]), (after, next_values[t])):
                    expected = agent.critic(state[:, :8]).squeeze(1)
                    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
                ends += int(fields["truncations"][t].sum() + fields["terminations"][t].sum())
    assert ends > 20


@KINDS
@pytest.mark.parametrize("flags", [{}, {"env_id": "Sheet-v0"}, {"sequence_length": 8}])
def test_the_first_epoch_has_ratio_one_and_later_ones_do_not(flags, lstm, tmp_path, monkeypatch):
    seen = []
    loss = recurrent.ppo_loss

    def spy(policy, values, mb, args):
        result = loss(policy, values, mb, args)
        seen.append(((policy.log_prob(mb.actions) - mb.logprobs).abs().max(), (values - mb.values).abs().max()))
        return result

    monkeypatch.setattr(recurrent, "ppo_loss", spy)
    train(tmp_path, num_envs=4, num_steps=32, total_timesteps=512, update_epochs=3, lstm=lstm, **flags)
    firsts, later = seen[::3], seen[2::3]
    assert len(firsts) == 4
    assert all(gap < 1e-5 for pair in firsts for gap in pair)
    assert all(ratio > 1e-4 for ratio, _ in later)


RECALL = {"num_envs": 8, "num_minibatches": 2, "learning_rate": 3e-3, "gamma": 1.0, "gae_lambda": 0.95}
RECALL |= {"ent_coef": 0.01, "update_epochs": 8, "memory_size": 32, "hidden_sizes": (32,)}


def recall_score(run_dir, env_id):
    from common.tools.load_policy import load_policy

    policy, *_ = load_policy(run_dir)
    returns, _ = play(policy, env_id, 100, seed=99)
    return returns.mean()


@KINDS
@pytest.mark.parametrize(
    ("steps", "budget"),
    [(2, 3_000), pytest.param(10, 40_000, marks=pytest.mark.slow), pytest.param(50, 200_000, marks=pytest.mark.slow)],
)
def test_a_bit_shown_at_the_first_step_is_known_at_the_last(steps, budget, lstm, tmp_path):
    env_id = f"Recall-{steps}-v0"
    flags = {**RECALL, "num_steps": max(16, 2 * steps)}
    run_dir = train(tmp_path, env_id=env_id, total_timesteps=budget, lstm=lstm, **flags)
    assert recall_score(run_dir, env_id) == 1.0


@pytest.mark.parametrize(
    "steps", [2, pytest.param(10, marks=pytest.mark.slow), pytest.param(50, marks=pytest.mark.slow)]
)
def test_without_a_memory_it_is_not(steps, tmp_path):
    env_id = f"Recall-{steps}-v0"
    flags = {"num_envs": 8, "num_minibatches": 2, "learning_rate": 3e-3, "gamma": 1.0, "num_steps": max(16, 2 * steps)}
    run_dir = train_with(load("ppo"), tmp_path, env_id=env_id, total_timesteps=3_000, **flags)
    assert abs(recall_score(run_dir, env_id)) < 0.5  # 100 coin flips of +-1: five standard errors


@KINDS
def test_what_was_shown_in_the_last_episode_is_forgotten_though_it_would_pay(lstm, tmp_path):
    """Carried-v0 pays for the bit that the episode before showed. A memory that was not emptied would know it."""
    flags = {**RECALL, "num_steps": 16}
    run_dir = train(tmp_path, env_id="Carried-v0", total_timesteps=3_000, lstm=lstm, **flags)
    assert abs(recall_score(run_dir, "Carried-v0")) < 0.5
    paid = [row["charts/episodic_return"] for row in rows(run_dir) if "charts/episodic_return" in row][-1000:]
    assert abs(np.mean(paid)) < 5 / len(paid) ** 0.5


def test_new_episodes_after_a_resume_begin_with_an_empty_memory(tmp_path):
    """Hidden-v0 cannot be saved: the resumed run starts new episodes, and their first steps are marked so."""
    flags = {"env_id": "Hidden-v0", "num_envs": 2, "num_steps": 8, "save_interval": 64}
    run_dir = train(tmp_path, total_timesteps=64, **flags)
    from common.internals.console.cli import parse

    starts = []

    class Spy(recurrent.common.RolloutStorage):
        def add(self, **step):
            starts.append(step["episode_starts"])
            super().add(**step)

    patched = recurrent.common.RolloutStorage
    recurrent.common.RolloutStorage = Spy
    try:
        recurrent.main(parse(recurrent.Args, argv=["--resume", str(run_dir), "--total-timesteps", "128"]))
    finally:
        recurrent.common.RolloutStorage = patched
    assert starts[0].all() and not starts[1].any()


def test_a_memory_serves_evaluation_policy_pt_and_the_tool(tmp_path):
    flags = {**RECALL, "num_steps": 16, "eval_episodes": 20, "capture_video": False}
    flags |= {"env_id": "probe_envs:Recall-2-v0", "allow_env_import": True}
    run_dir = train(tmp_path, total_timesteps=3_000, **flags)
    logged = [row["eval/episodic_return"] for row in rows(run_dir) if "eval/episodic_return" in row]
    assert logged[-1] == 1.0
    out = run_tool("evaluate", run_dir, "--episodes", 20, "--allow-env-import")
    assert "episodic_return 1 ± 0" in out.stdout
    assert {name.split(".")[0] for name in weights(run_dir)} >= {"encoder", "rnn", "actor", "critic"}
    assert weights(run_dir)["rnn.weight_hh_l0"].shape[1] == 32


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"num_envs": 2, "num_minibatches": 3}, "--num-minibatches"),
        ({"num_steps": 1}, "--sequence-length"),
        ({"num_steps": 10, "sequence_length": 4}, "--sequence-length"),
    ],
)
def test_a_flag_that_does_not_fit_is_one_line(flags, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, **flags)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
