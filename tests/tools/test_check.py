"""The conformance kit: our scripts pass, and each of many planted bugs is found by the check that is meant for it."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load
from gymnasium.spaces import Box, Discrete

from common.tools.check import checks, recorder
from common.tools.check.checks import CHECKS, _compare_stored, _length, _line, examine
from common.tools.check.harness import Failed, Harness, Skipped, others
from common.tools.check.probe_envs import ElapsedTime, Ladder, PlannedEpisodes, PushedPoint
from common.tools.launch.cli import as_words

DQN, RAINBOW, PPO, SAC, REINFORCE = "dqn", "rainbow", "ppo", "sac", "reinforce_rollout"
STEP = "global_step += args.num_envs"
FINAL = "next_obs=common.final_obs(next_obs, infos),\n"
BOGUS = """obs = next_obs
        if (terminations | truncations).all():
            no = torch.zeros_like(terminations)
            replay.add(
                obs=common.final_obs(next_obs, infos), actions=actions, rewards=0 * rewards, next_obs=next_obs,
                terminations=no,
            )
"""
ADD = re.search(r"replay\.add\(\n.*?\n        \)\n", (ROOT / "algos" / "rainbow.py").read_text(), re.S)[0]
# n-step returns of a fork's own, for one environment: as they should be, and as CleanRL's rainbow_atari.py has them.
OWN_N_STEP = """pending.append((obs, actions, rewards))
        over = bool(terminations | truncations)
        while len(pending) == args.n_step or (FLUSH and over and pending):
            replay.add(
                obs=pending[0][0],
                actions=pending[0][1],
                rewards=sum(args.gamma**i * r for i, (_, _, r) in enumerate(pending)),
                next_obs=common.final_obs(next_obs, infos),
                terminations=terminations,
                truncations=truncations,
                discounts=torch.full((1,), args.gamma ** len(pending)),
            )
            del pending[0]
"""
NO_GAMMA = [
    ("        n_step=args.n_step,\n        gamma=args.gamma,\n", ""),
    ("    run = common.track(args, device)\n", "    pending = []\n    run = common.track(args, device)\n"),
]

IN_UNITS = """actions, log_prob = squashed_gaussian(mean, log_std, torch.randn_like(mean))
        return actions, log_prob - self.action_scale.log().sum()"""

MEMORY = """class Memory:
    def __init__(self, *_, **__):
        self.steps = []

    def add(self, **step):
        self.steps.append({name: value for name, value in step.items() if value is not None})

    def sample(self, size):
        picked = [self.steps[i] for i in torch.randint(len(self.steps), (size,))]
        batch = {name: torch.cat([step[name] for step in picked]) for name in picked[0]}
        return SimpleNamespace(**batch)


def main("""
HEALTH = """common.diagnostics(q_network, replay.spread(256).obs, global_step, optimizer)
            health["health/replay_age"] = replay.mean_age()"""
OWN_STORAGE = [
    ("common.ReplayBuffer(", "Memory("),
    (', "replay": replay', ""),
    ("def main(", MEMORY),
    (HEALTH, "{}"),
]
DEATH = ("terminations=terminations,", "terminations=terminations | truncations,")
DRAWS = "        if run.evaluation_due(global_step):\n            torch.rand(1)\n"
LAST_EVALUATION = "    evaluation(global_step)\n    run.finish"

# what is wrong: the script, what is replaced, the check that has to find it
BUGS = {
    "truncation stored as termination": (DQN, [DEATH], "transitions"),
    "observation after the reset stored": (DQN, [(FINAL, "next_obs=next_obs,\n")], "transitions"),
    "observation after the reset stored in a rollout": (
        PPO,
        [("next_obs=common.final_obs(next_obs, infos),", "next_obs=next_obs,")],
        "transitions",
    ),
    "transition of a next-step autoreset stored": (DQN, [("obs = next_obs\n", BOGUS)], "transitions"),
    "acts on the last observation after a reset": (
        DQN,
        [("obs = next_obs\n", "obs = common.final_obs(next_obs, infos)\n")],
        "transitions",
    ),
    "reward of another environment": (PPO, [("rewards=rewards,", "rewards=rewards.roll(1),")], "transitions"),
    "rewards not stored": (SAC, [("rewards=rewards,", "rewards=0 * rewards,")], "transitions"),
    "another action stored than was played": (
        DQN,
        [("actions=actions,", "actions=act(obs, envs.action_mask, epsilon),")],
        "transitions",
    ),
    "returns not logged": (DQN, [("run.log_episodes(infos, global_step)", "pass")], "returns"),
    "x axis off by num_envs": (
        PPO,
        [("log_episodes(infos, global_step)", "log_episodes(infos, global_step // args.num_envs)")],
        "returns",
    ),
    "steps counted without num_envs": (DQN, [(STEP, "global_step += 1")], "steps"),
    "budget in steps of one environment": (
        SAC,
        [("global_step < args.total_timesteps:", "global_step < args.total_timesteps * args.num_envs:")],
        "steps",
    ),
    "epsilon never falls": (
        DQN,
        [("actions = act(obs, envs.action_mask, epsilon)", "actions = act(obs, envs.action_mask, args.start_e)")],
        "exploration",
    ),
    "epsilon small from the start": (
        DQN,
        [("actions = act(obs, envs.action_mask, epsilon)", "actions = act(obs, envs.action_mask, args.end_e)")],
        "exploration",
    ),
    "one draw for all environments": (
        SAC,
        [("torch.rand(len(obs), action_dim, device=device)", "torch.rand(1, action_dim).expand(len(obs), -1)")],
        "exploration",
    ),
    "epsilon logged constant": (DQN, [('"charts/epsilon": epsilon', '"charts/epsilon": args.start_e')], "schedules"),
    "learning rate not annealed": (
        PPO,
        [("last_lr = 0.0 if args.anneal_lr else args.learning_rate", "last_lr = args.learning_rate")],
        "schedules",
    ),
    "target network never updated": (DQN, [("in range(target_due(global_step)):", "in range(0):")], "parameters"),
    "one critic never updated": (SAC, [("return qf1_loss + qf2_loss, {", "return qf1_loss, {")], "parameters"),
    "environments not seeded": (DQN, [("envs.reset(seed=args.seed)", "envs.reset(seed=1)")], "seed"),
    "networks not seeded": (
        PPO,
        [("device = common.setup(args)", "device = common.setup(args)\n    torch.manual_seed(0)")],
        "seed",
    ),
    "draws that no seed reaches": (
        SAC,
        [("device = common.setup(args)", "device = common.setup(args)\n    torch.seed()")],
        "seed",
    ),
    "evaluation draws from training's generator": (
        PPO,
        [("        if evaluation(global_step):\n", DRAWS + "        if evaluation(global_step):\n")],
        "evaluation",
    ),
    "no last evaluation": (DQN, [(LAST_EVALUATION, "    run.finish")], "evaluation"),
    "an evaluation that is not what was paid": (
        DQN,
        [
            (
                "run = common.track(args, device)",
                "run = common.track(args, device)\n    log = run.log_evaluation\n"
                "    run.log_evaluation = lambda m, *rest: log({key: m[key] + 1 for key in m}, *rest)",
            )
        ],
        "evaluation",
    ),
    "policy.pt is not the trained network": (
        DQN,
        [
            ("    run = common.track(", "    begun = copy.deepcopy(q_network)\n    run = common.track("),
            (LAST_EVALUATION, "    run.save_policy(begun.greedy)\n" + LAST_EVALUATION),
        ],
        "parameters",
    ),
    "all environments seeded alike": (
        DQN,
        [
            (
                "checkpoint.restore(obs)",
                "checkpoint.restore(obs)\n    envs.vector.reset(seed=[args.seed] * args.num_envs)",
            )
        ],
        "seed",
    ),
    "a flag without effect": (PPO, [("agent.parameters(), args.max_grad_norm", "agent.parameters(), 0.5")], "flags"),
    "a flag that crashes": (
        SAC,
        [
            ("target_entropy=-action_dim)", "target_entropy=-action_dim)\n            last = loss"),
            ("        return metrics\n\n    obs, ", "        last.item()\n        return metrics\n\n    obs, "),
        ],
        "flags",
    ),
    "resume loses the optimizer": (DQN, [(', "optimizer": optimizer', "")], "resume"),
    "resume loses the target critics": (SAC, [('"critic_target": critic_target, ', "")], "resume"),
    "truncation as termination, in its own storage": (DQN, [*OWN_STORAGE, DEATH], "values"),
    "values cut at time limits": (
        PPO,
        [("next_values * ~terminations - values", "next_values * ~(terminations | truncations) - values")],
        "values",
    ),
    "values carried over terminations": (
        PPO,
        [("next_values * ~terminations - values", "next_values - values")],
        "values",
    ),
    "returns run on over time limits": (
        REINFORCE,
        [("torch.where(truncations[t], next_values[t], next_return)", "next_return")],
        "values",
    ),
    "n-step returns across episodes": (RAINBOW, [*NO_GAMMA, (ADD, OWN_N_STEP.replace("FLUSH", "False"))], "n_step"),
    "GAE runs on over time limits": (
        PPO,
        [("gae_lambda * ~(terminations | truncations)", "gae_lambda * ~terminations")],
        "advantages",
    ),
    "GAE runs on over terminations": (
        PPO,
        [("gae_lambda * ~(terminations | truncations)", "gae_lambda * ~truncations")],
        "advantages",
    ),
    "advantage of the wrong sign": (PPO, [("loss = pg_loss - ", "loss = -pg_loss - ")], "policy"),
    "log-probability without the squash": (
        SAC,
        [("(normal_log_prob - log_det).sum(dim=1)", "normal_log_prob.sum(dim=1)")],
        "entropy",
    ),
    "log-probability in the environment's units": (
        SAC,
        [("return squashed_gaussian(mean, log_std, torch.randn_like(mean))", IN_UNITS)],
        "units",
    ),
}
IN_CI = ("observation after the reset stored", "steps counted without num_envs", "target network never updated")


def fork(script, replaced, folder):
    """A copy of a script with a change, which has to apply."""
    code = (ROOT / "algos" / f"{script}.py").read_text()
    for old, new in replaced:
        assert code.count(old) >= 1, old
        code = code.replace(old, new)
    path = folder / f"my_{script}.py"
    path.write_text(code)
    return path


def found(bug, tmp_path):
    script, replaced, name = BUGS[bug]
    (result,) = examine(Harness(fork(script, replaced, tmp_path)), (name,))
    return result


@pytest.mark.parametrize("bug", IN_CI)
def test_a_planted_bug_is_found_and_is_exit_1(bug, tmp_path, capsys):
    script, replaced, name = BUGS[bug]
    with pytest.raises(SystemExit) as stop:
        checks.main([str(fork(script, replaced, tmp_path)), "--only", name])
    assert stop.value.code == 1
    _, result, summary = capsys.readouterr().out.splitlines()
    assert result.startswith(f"FAIL  {name} ")
    assert summary.startswith("0 passed, 1 failed, 0 skipped in ")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("bug", BUGS)
def test_every_planted_bug_is_found_by_the_check_that_is_meant_for_it(bug, tmp_path):
    result = found(bug, tmp_path)
    print(bug, "|", result)
    assert result.word == "FAIL"


@pytest.mark.parametrize("bug", BUGS)
def test_every_planted_bug_still_applies_to_our_scripts(bug, tmp_path):
    script, replaced, _ = BUGS[bug]
    compile(fork(script, replaced, tmp_path).read_text(), script, "exec")


def test_every_check_has_a_planted_bug():
    assert {name for _, _, name in BUGS.values()} == set(CHECKS)


def test_the_page_has_every_check_and_every_planted_bug():
    page = (ROOT / "docs" / "check.md").read_text()
    assert all(f"| `{name}` | " in page for name in CHECKS)
    assert all(f"| {bug} | `{script}` | `{name}` |" in page for bug, (script, _, name) in BUGS.items())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "algos").glob("*.py")))
def test_our_scripts_pass(script):
    if script == "dqn_lightning":
        pytest.importorskip("lightning")
    verdicts = list(examine(Harness(ROOT / "algos" / f"{script}.py")))
    assert [str(result) for result in verdicts if result.word == "FAIL"] == []
    skipped = {result.name for result in verdicts if result.word == "SKIP"}
    assert (
        skipped
        == {
            "dqn": {"n_step", "advantages", "entropy", "units"},
            "dqn_lightning": {"n_step", "advantages", "entropy", "units"},
            "ppo": {"n_step", "entropy", "units"},
            "rainbow": {"advantages", "entropy", "units"},
            "reinforce_rollout": {"n_step", "advantages", "entropy", "units"},
            "sac": {"n_step", "advantages"},
        }[script]
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_a_fork_makes_itself_passes_if_it_is_right(tmp_path):
    own = fork("rainbow", [*NO_GAMMA, (ADD, OWN_N_STEP.replace("FLUSH", "True"))], tmp_path)
    (result,) = examine(Harness(own), ("n_step",))
    assert result.word == "PASS", result
    own = fork("dqn", OWN_STORAGE, tmp_path)
    words = {result.name: result.word for result in examine(Harness(own), ("transitions", "values"))}
    assert words == {"transitions": "SKIP", "values": "PASS"}


def test_a_right_fork_passes_from_the_command_line_and_what_is_no_script_is_one_line(tmp_path, tmp_path_factory):
    def kit(*words):
        words = [sys.executable, "-m", "common", "check", *map(str, words)]
        environment = {**os.environ, "TMPDIR": str(temporary)}
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment)

    temporary = tmp_path_factory.mktemp("t")  # short: the server's socket lies in it
    path = fork("ppo", [("nn.Tanh()", "nn.ReLU()")], tmp_path)
    done = kit(
        path.name, "--only", "transitions", "returns", "steps", "exploration", "parameters", "units", "--json", "-"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert [check["passed"] for check in found] == [True] * 5 + [None] and found[0]["name"] == "transitions"
    lines = done.stderr.splitlines()
    assert lines[1].endswith(found[0]["reason"])
    flags = len(dataclasses.fields(load("ppo").Args))
    assert lines[0] == f"my_ppo.py: Discrete and Box actions, {flags} flags"
    assert [line.split()[:2] for line in lines[1:-1]] == [
        *(["PASS", name] for name in ("transitions", "returns", "steps", "exploration", "parameters")),
        ["SKIP", "units"],
    ]
    assert lines[-1].startswith("5 passed, 0 failed, 1 skipped in ")
    left = {path.name for folder in (tmp_path, temporary) for path in folder.rglob("*")}
    assert {name for name in left if not name.startswith("torchinductor_")} == {"my_ppo.py"}  # torch's own

    (tmp_path / "no.py").write_text("print('no Args here')\n")
    for words, says in (
        (["nowhere.py"], "error: there is no script nowhere.py\n"),
        (["no.py"], "error: the arguments of no.py cannot be read: it does not read them with common.parse(Args)\n"),
        (["my_ppo.py", "--only", "luck"], "error: there is no check 'luck'; there are: transitions, "),
    ):
        done = kit(*words)
        assert done.returncode == 2
        assert done.stderr.startswith(says)


def test_with_pytest_each_check_is_a_test(tmp_path):
    fork("ppo", [("rewards=rewards,", "rewards=rewards.roll(1),")], tmp_path)
    (tmp_path / "test_other.py").write_text("def test_other(): pass\n")
    words = [sys.executable, "-m", "pytest", "-p", "common.tools.pytest_plugin", "-v", "-p", "no:cacheprovider"]
    words += ["--plainrl-check", "my_ppo.py", "-k", "transitions or returns or units"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed, 1 skipped" in done.stdout
    assert "is stored, for others that paid as much" in done.stdout
    assert "test_other" not in done.stdout


# --- the parts of it that can be seen without a run


def steps_of(env, count):
    """`count` steps of an environment, as they are recorded."""
    rows, (obs, _) = [], env.reset(seed=0)
    for _ in range(count):
        action = env.action_space.sample()
        after, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs, action, reward, terminated, truncated, after))
        obs = env.reset()[0] if terminated or truncated else after
    names = ("obs", "actions", "rewards", "terminations", "truncations", "next_obs")
    return {name: torch.from_numpy(np.array([row[i] for row in rows])) for i, name in enumerate(names)}


def planned(ends="Tt", count=20):
    return steps_of(PlannedEpisodes((3, 5, 2), ends, Discrete(2)), count)


def stored_as(played):
    return {name: torch.stack([world[name] for world in played], 1) for name in played[0]}


def test_episodes_stored_as_they_were_are_right_and_any_one_change_is_found():
    played = [planned(), planned()]
    right = stored_as(played)
    assert _compare_stored(right, played, "here", 0.5) == 40
    for name in ("actions", "rewards", "terminations", "truncations", "next_obs", "obs"):
        for t, env in ((0, 0), (7, 1), (19, 1)):
            wrong = {key: value.clone() for key, value in right.items()}
            if wrong[name].dtype == torch.bool:
                wrong[name][t, env] ^= True
            elif name == "actions":
                wrong[name][t, env] = 1 - wrong[name][t, env]
            elif name == "rewards":
                wrong[name][t, env] += 0.25
            else:
                wrong[name][t, env] = right[name][(t + 1) % 20, env] if t else right[name][5, env]
            with pytest.raises(Failed):
                _compare_stored(wrong, played, "here", 0.5)
    with pytest.raises(Failed, match="are not stored"):
        _compare_stored({name: value[:-1] for name, value in right.items()}, played, "here", 0.5)
    twice = {name: torch.cat([value, value[:1]]) for name, value in right.items()}
    with pytest.raises(Failed, match="is stored twice"):
        _compare_stored(twice, played, "here", 0.5)
    with pytest.raises(Skipped):
        _compare_stored({**right, "obs": right["obs"] * 3 + 1}, played, "here", 0.5)


def test_clipped_rewards_are_right_and_constant_ones_are_not():
    played = [planned(), planned()]
    right = stored_as(played)
    assert _compare_stored({**right, "rewards": right["rewards"].sign()}, played, "here", 0.5) == 40
    with pytest.raises(Failed, match="all are stored as the same number"):
        _compare_stored({**right, "rewards": torch.ones_like(right["rewards"])}, played, "here", 0.5)
    rolled = {**right, "rewards": right["rewards"].roll(1, 1)}
    with pytest.raises(Failed, match="was paid and"):
        _compare_stored(rolled, played, "here", 0.5)


def test_two_step_returns_are_right_within_an_episode_only():
    (world,) = played = [planned("T")]
    kept = []
    for t in range(20):
        more = 0 if t == 19 or world["terminations"][t] else 1
        reward = world["rewards"][t] + 0.5 * more * world["rewards"][t + more]
        kept.append((world["obs"][t], reward, world["terminations"][t + more], world["next_obs"][t + more]))
    names = ("obs", "rewards", "terminations", "next_obs")
    stored = {name: torch.stack([row[i] for row in kept]).unsqueeze(1) for i, name in enumerate(names)}
    assert _compare_stored(stored, played, "here", 0.5) == 20
    across = {name: value.clone() for name, value in stored.items()}
    end = int(world["terminations"].nonzero()[0])
    across["next_obs"][end, 0] = world["next_obs"][end + 1]
    assert _length(world, end, world["next_obs"][end + 1]) == 0
    with pytest.raises(Failed, match="is stored as leading to"):
        _compare_stored(across, played, "here", 0.5)
    with pytest.raises(Failed, match="was paid and"):
        _compare_stored(stored, played, "here", 0.9)


def test_the_probe_environments_are_what_they_say():
    world = planned(count=60)
    over = (world["terminations"] | world["truncations"]).nonzero().flatten().tolist()
    ends = [(t, bool(world["terminations"][t])) for t in over]
    lengths = [b - a for (a, _), (b, _) in zip([(-1, None), *ends], ends, strict=False)]
    number = int(world["obs"][0, 0] / PlannedEpisodes.UNIT)
    assert lengths == [(3, 5, 2)[(number + k) % 3] for k in range(len(lengths))]
    assert [terminated for _, terminated in ends] == [(number + k) % 2 == 0 for k in range(len(ends))]
    assert len({tuple(obs) for obs in world["obs"].tolist()}) == 60
    assert len(set(world["rewards"].tolist())) == 8 and world["rewards"].min() < 0 < world["rewards"].max()

    beside = planned(count=60)  # the next environment is paid otherwise for the same step of the same episode
    paid = [
        {tuple(obs): r for obs, r in zip(x["obs"][:, 1:].tolist(), x["rewards"].tolist(), strict=True)}
        for x in (world, beside)
    ]
    assert all(paid[0][step] != paid[1][step] for step in paid[0].keys() & paid[1].keys())

    ladder = Ladder(Discrete(2))
    ladder.reset()
    assert [ladder.step(0)[:2] for _ in range(3)] == [([1.0], 0.0), ([1.0], 1.0), ([1.0], 1.0)]

    clock = steps_of(ElapsedTime(Discrete(2)), 28)
    times = (clock["next_obs"][:, 0] * 8).int()
    terminated, truncated = (times[clock[name]].tolist() for name in ("terminations", "truncations"))
    assert (terminated, truncated) == ([3, 5, 3, 5], [2, 4, 2, 4])
    first = [clock["rewards"][t].item() for t in range(28) if clock["obs"][t] == 0]
    assert len(set(first)) > 4  # the same observation, and other rewards each time

    point = steps_of(PushedPoint(Box(-1.0, 1.0, (1,))), 400)
    assert 10 < point["terminations"].sum() < 90


def test_other_values_fit_their_type():
    assert others("bool", True) == [False] and others("str", "text") == [] and others("str | None", None) == []
    assert others("tuple[int, ...]", [64, 64]) == [[64, 64, 65], [64, 65]]
    assert others("typing.Literal['x', 'y']", "x") == ["y"]
    assert all(isinstance(value, int) and value > 0 and value != 7 for value in others("int", 7))
    near = others("float", 0.99)
    assert any(0 <= value <= 1 for value in near) and any(value > 1 for value in near) and 0.99 not in near
    assert others("float | None", None) and all(isinstance(value, float) for value in others("float | None", None))
    assert as_words({"a_b": False, "c": [1, 2], "d": 0.5}) == ["--no-a-b", "--c", "1", "2", "--d", "0.5"]
    assert [_line(1.0, 0.0, 10, t) for t in (-3, 0, 5, 10, 12)] == [1.0, 1.0, 0.5, 0.0, 0.0]


def test_a_script_s_output_and_exit_code_are_its_own(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("import sys\nprint('said', sys.argv[1:])\nsys.exit(int(sys.argv[1]))\n")
    for code in (0, 4):
        words = (str(path), str(tmp_path), {}, [str(code)], None)
        process = recorder.server(path).Process(target=recorder.play, args=words)
        process.start()
        process.join()
        assert process.exitcode == code
        assert (tmp_path / "out").read_text() == f"said ['{code}']\n"
