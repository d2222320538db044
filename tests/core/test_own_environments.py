"""A user's own environment: its spaces, its arguments, its wrappers, and the actions that it allows."""

import contextlib
import json
import re
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, envs_of, load, only_run, rows, run_script, run_tool, train_with
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple, flatten
from odd_envs import odd
from torch import nn

import common
from common.evaluation import play
from common.internals.vector.make import EnvForm
from common.internals.vector.observations import adapted, observer

STACK = ["--frame-stack", 4]
BOTH = pytest.mark.parametrize("async_envs", [False, True], ids=["in turn", "in processes"])
IMAGE = Box(0, 255, (96, 80, 3), np.uint8)
LINE = Box(-1, 1, (2,), np.float64)


@pytest.mark.parametrize(
    "space",
    [
        Discrete(5),
        Discrete(3, start=-2),
        MultiDiscrete([2, 3, 4]),
        MultiDiscrete([[2, 3], [4, 2]], start=[[1, 0], [-1, 5]]),
        MultiBinary(4),
        MultiBinary([2, 3]),
        Dict({"b": Discrete(3), "a": LINE, "c": MultiBinary(2)}),
        Tuple([Discrete(32), Discrete(11), Discrete(2)]),
        Dict(
            {"goal": Box(-5, 5, (3,)), "inner": Tuple([Discrete(2), Dict({"x": LINE, "y": Box(0, 9, (), np.int64)})])}
        ),
    ],
    ids=str,
)
def test_a_space_becomes_the_flat_vector_that_gymnasium_makes_of_it(space):
    space.seed(1)
    observe, seen = observer(space), adapted(space)
    for _ in range(20):
        obs = space.sample()
        ours = observe(obs)
        assert ours.dtype == seen.dtype == np.float32
        assert np.array_equal(ours, np.ravel(flatten(space, obs)).astype(np.float32))
        assert seen.contains(ours)


@BOTH
def test_episodes_of_a_dict_reach_training_and_their_last_observation_is_right(async_envs):
    space = Dict({"place": Discrete(5), "height": Box(-9, 9, (), np.float64)})
    envs = envs_of(odd(space=space, obs=lambda t: {"place": t, "height": np.float64(t) / 2}), 2, async_envs)
    obs, _ = envs.reset(seed=1)
    for t in range(1, 5):
        next_obs, *_, infos = envs.step(torch.zeros(2, dtype=torch.int64))
        last = common.final_obs(next_obs, infos)
        assert last.tolist() == [[t / 2, *np.eye(5)[t]]] * 2  # Dict sorts its keys
    assert next_obs.tolist() == [[0, 1, 0, 0, 0, 0]] * 2
    envs.close()


@pytest.mark.parametrize(
    ("space", "says"),
    [
        (
            Dict({"a": Discrete(2), "mission": Text(5)}),
            "Text.*: remove or convert it in a wrapper .at 'mission'",
        ),
        (Dict({"a": Discrete(2), "image": IMAGE}), "an image beside other parts .at 'image'"),
        (Tuple([LINE, gym.spaces.Sequence(LINE)]), "Sequence.* .at 1"),
    ],
)
@BOTH
def test_a_space_that_cannot_be_adapted_is_named(space, says, async_envs, capsys):
    with pytest.raises(SystemExit) as stop:
        envs_of(odd(space=space), 1, async_envs)
    assert stop.value.code == 2
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("space", "obs", "says"),
    [
        (Discrete(3), 3, "observation 3 .* is not in Discrete"),
        (Discrete(3), -1, "is not in Discrete"),
        (Discrete(3), 0.5, "is not in Discrete"),
        (Discrete(3, start=1), 0, "is not in Discrete"),
        (MultiDiscrete([2, 2]), np.array([0, 2]), "is not in MultiDiscrete"),
        (Dict({"a": Discrete(3), "b": Discrete(3)}), {"a": 1}, "has no part 'b'"),
        (Dict({"a": Discrete(3), "b": LINE}), {"a": 1, "b": [1.0]}, "shape .* .at 'b'"),
    ],
)
def test_an_observation_outside_its_space_ends_the_run(space, obs, says, capsys):
    with pytest.raises(SystemExit) as stop:
        envs_of(odd(space=space, obs=lambda t: obs), 1).reset(seed=1)
    assert stop.value.code == 5
    assert re.search(says, capsys.readouterr().err)


def test_images_are_resized_as_pillow_does_it():
    from PIL import Image

    image = np.random.default_rng(1).integers(0, 256, IMAGE.shape, dtype=np.uint8)
    env_id = odd(space=IMAGE, obs=lambda t: image)
    obs, _ = envs_of(env_id, 1, form=EnvForm(resize=40)).reset(seed=1)
    expected = np.asarray(Image.fromarray(image).resize((40, 40), Image.Resampling.BILINEAR))
    assert obs.dtype == torch.uint8
    assert np.abs(obs[0].numpy().transpose(1, 2, 0).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("space", "flags", "shape", "frames_stored_once"),
    [
        (IMAGE, {"resize": 84}, (3, 84, 84), 0),
        (IMAGE, {"resize": 84, "grayscale": True}, (1, 84, 84), 0),
        (Box(0, 255, (50, 60, 1), np.uint8), {"resize": 40, "frame_stack": 2}, (2, 40, 40), 2),
        (IMAGE, {"resize": 40, "grayscale": True, "frame_stack": 4}, (4, 40, 40), 4),
        (IMAGE, {"frame_stack": 3}, (9, 96, 80), 0),
        (LINE, {"frame_stack": 4}, (4, 2), 4),
        (Discrete(3), {"frame_stack": 2}, (6,), 0),
    ],
)
@BOTH
def test_image_flags_and_stacks(space, flags, shape, frames_stored_once, async_envs):
    args = common.RunArgs(
        odd(space=space, obs=lambda t: np.full_like(space.sample(), t % 3)), async_envs=async_envs, **flags
    )
    envs = common.make_envs(args)
    obs, _ = envs.reset(seed=1)
    assert obs.shape == (1, *shape) == (1, *envs.single_observation_space.shape)
    assert envs.frame_stack == frames_stored_once
    replay = common.ReplayBuffer(8, 1, frame_stack=envs.frame_stack)
    for _ in range(7):  # past an episode's end
        next_obs, *_, infos = envs.step(torch.zeros(1, dtype=torch.int64))
        replay.add(obs=obs, next_obs=common.final_obs(next_obs, infos))
        if envs.frame_stack and "final_obs" not in infos:
            assert torch.equal(next_obs[:, :-1], obs[:, 1:])
        obs = next_obs
    assert replay.newest(1).next_obs.shape == (1, *shape)
    envs.close()


@pytest.mark.parametrize("flags", [{"resize": 84}, {"grayscale": True}])
def test_image_flags_without_images_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        common.make_envs(common.RunArgs("CartPole-v1", **flags))
    assert stop.value.code == 2
    assert "is for images" in capsys.readouterr().err


def test_env_kwargs_reach_training_and_evaluation(tmp_path):
    flags = ["--env-kwargs", "continuous=True", "gravity=-2.5", "--total-timesteps", 300, "--eval-episodes", 2]
    run_script("--env-id", "LunarLander-v3", *flags, "--no-track", "--runs-dir", tmp_path, script="ppo", check=0)
    run = only_run(tmp_path)
    assert json.loads((run / "args.json").read_text())["env_kwargs"] == ["continuous=True", "gravity=-2.5"]
    (logged,) = [row["eval/episodic_return"] for row in rows(run) if "eval/episodic_return" in row]
    assert f"episodic_return {logged:.6g} " in run_tool("evaluate", run).stdout
    env = gym.make("LunarLander-v3", continuous=True, gravity=-2.5)  # what its spaces and physics are by hand
    envs = common.make_envs(common.RunArgs("LunarLander-v3", env_kwargs=("continuous=True", "gravity=-2.5")))
    assert envs.single_action_space == env.action_space
    assert envs.vector.envs[0].unwrapped.gravity == env.unwrapped.gravity == -2.5


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        (("gravity",), "--env-kwargs takes NAME=VALUE, for example gravity=-9.8, not 'gravity'"),
        (("no such=1",), "takes NAME=VALUE"),
        (("gravidy=1",), "does not take these --env-kwargs: .*unexpected keyword argument 'gravidy'"),
    ],
)
@pytest.mark.parametrize("native", [False, True])
def test_env_kwargs_that_cannot_be_read_are_one_line(kwargs, says, native, capsys):
    with pytest.raises(SystemExit) as stop:
        common.make_envs(common.RunArgs("CartPole-v1", env_kwargs=kwargs, native_envs=native))
    assert stop.value.code == 2
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        (("noop_max=0", "stack_num=2"), ""),
        (("repeat_action_probability=0.25", "episodic_life=True"), "cannot change episodic_life, repeat_action_prob"),
        (("gravity=1",), "does not take these --env-kwargs"),
    ],
)
def test_env_kwargs_of_an_atari_game(kwargs, says, capsys):
    pytest.importorskip("ale_py")
    args = common.RunArgs("ALE/Pong-v5", env_kwargs=kwargs)
    if not says:
        envs = common.make_envs(args)
        assert envs.reset(seed=1)[0].shape == (1, 2, 84, 84) and envs.frame_stack == 2
        return
    with pytest.raises(SystemExit) as stop:
        common.make_envs(args)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


FORK = """
class HideVelocities(gym.ObservationWrapper):
    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))

    def observation(self, obs):
        return obs[[0, 2]]


def wrap(env):
    return HideVelocities(env)


def main(args"""


def fork(path, wrap="wrap", script="ppo"):
    text = (ROOT / "algos" / f"{script}.py").read_text()
    text = text.replace("wrap=None", f"wrap={wrap}").replace("\ndef main(args", FORK)
    path.write_text(
        text.replace("\nimport torch\n", "\nimport gymnasium as gym\nimport numpy as np\nimport torch\n", 1)
    )
    return path


@BOTH
def test_a_forks_wrapper_is_around_training_evaluation_and_the_tools(async_envs, tmp_path):
    script = fork(tmp_path / "hidden.py")
    flags = ["--total-timesteps", 600, "--eval-episodes", 3, "--no-track", "--runs-dir", tmp_path / "runs"]
    run_script(*flags, *["--async-envs"] * async_envs, script=script, cwd=tmp_path)
    run = only_run(tmp_path / "runs")
    policy = torch.load(run / "policy.pt", weights_only=True)
    assert policy["state_dict"]["actor.0.weight"].shape[1] == 2
    (logged,) = [row["eval/episodic_return"] for row in rows(run) if "eval/episodic_return" in row]
    script.unlink()  # the tools use the source that the run kept
    assert f"episodic_return {logged:.6g} " in run_tool("evaluate", run, cwd=tmp_path.parent).stdout
    saved = run / "source" / "hidden.py"
    resumed = run_script("--resume", run, "--total-timesteps", 900, script=saved, cwd=tmp_path)
    assert "start new episodes" not in resumed.stderr and "new episodes begin" not in resumed.stderr


@pytest.mark.parametrize(
    ("script", "env_id", "flags"),
    [
        ("ppo", "FrozenLake-v1", ["--env-kwargs", "map_name=8x8", "is_slippery=False"]),
        ("dqn", "Blackjack-v1", []),
        ("rainbow", "Taxi-v4", []),
        (
            "dqn",
            "CarRacing-v3",
            ["--env-kwargs", "continuous=False", "--grayscale", "--resize", 40, "--frame-stack", 4],
        ),
        ("ppo", "minigrid:MiniGrid-Empty-5x5-v0", ["--allow-env-import", "--num-steps", 16]),
    ],
)
def test_the_environments_of_the_documents_train_as_they_are_typed(script, env_id, flags, tmp_path):
    for module in {"CarRacing": ["Box2D"], "minigrid": ["minigrid"]}.get(re.split("[:-]", env_id)[0], []):
        pytest.importorskip(module)
    path = ROOT / "algos" / f"{script}.py"
    if env_id.startswith("minigrid"):
        text = path.read_text().replace("wrap=None", "wrap").replace("\ndef main(args", MINIGRID)
        path = tmp_path / "ppo_minigrid.py"
        path.write_text(text.replace("\nimport torch\n", "\nimport gymnasium as gym\nimport torch\n", 1))
    size = ["--buffer-size", 500, "--learning-starts", 200, "--batch-size", 16] if script != "ppo" else []
    size += ["--total-timesteps", 260, "--eval-episodes", 1, "--eval-max-steps", 20, "--no-track", "--no-capture-video"]
    run_script("--env-id", env_id, *flags, *size, "--runs-dir", tmp_path / "runs", script=path, cwd=tmp_path)
    assert "policy_best.pt" in {file.name for file in only_run(tmp_path / "runs").iterdir()}


MINIGRID = """
def wrap(env):
    from minigrid.wrappers import ImgObsWrapper

    return gym.wrappers.FlattenObservation(ImgObsWrapper(env))


def main(args"""


def test_a_wrapper_that_evaluation_could_not_find_is_refused_at_the_start(tmp_path):
    script = fork(tmp_path / "hidden.py", wrap="lambda env: HideVelocities(env)")
    done = run_script("--no-track", "--runs-dir", tmp_path / "runs", script=script, cwd=tmp_path, check=2)
    assert "error: `wrap` of make_envs must be a function at the top level" in done.stderr


@pytest.mark.parametrize("what", [{"env_id": "ALE/Pong-v5"}, {"native_envs": True}])
def test_what_cannot_be_wrapped_is_refused(what, capsys):
    with pytest.raises(SystemExit) as stop:
        common.make_envs(common.RunArgs(**what, frame_stack=2))
    assert stop.value.code == 2
    assert "leave out wrap, --grayscale, --resize and --frame-stack" in capsys.readouterr().err


def test_binary_actions_are_learnt_as_choices_of_two(tmp_path):
    """Each of the three switches pays 1 when it is at the place that the observation shows."""
    for script, flags in (
        ("ppo", {"learning_rate": 3e-3}),
        ("reinforce_rollout", {"learning_rate": 1e-2, "num_steps": 32}),
    ):
        run = train_with(load(script), tmp_path, env_id=lights(), total_timesteps=8000, gamma=0.0, **flags)
        assert (
            np.mean([row["charts/episodic_return"] for row in rows(run) if "charts/episodic_return" in row][-40:])
            > 10.5
        )


class Lights(gym.Env):
    observation_space, action_space = MultiBinary(3), MultiBinary(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.shown = 0, self.np_random.integers(0, 2, 3, dtype=np.int8)
        return self.shown, {}

    def step(self, action):
        assert self.action_space.contains(action)
        reward = float((action == self.shown).sum())
        self.t, self.shown = self.t + 1, self.np_random.integers(0, 2, 3, dtype=np.int8)
        return self.shown, reward, False, self.t == 4, {}


def lights():
    gym.registry.pop("Lights-v0", None)
    gym.register("Lights-v0", Lights)
    return "Lights-v0"


# --- action masks


class Masked(gym.Env):
    """Allows other actions at each step, reports them, and raises at any other. The first allowed one pays least."""

    observation_space = Box(0, 1, (6,), np.float32)

    def __init__(self, kind="one", final=True, absent=()):
        self.nvec = {"one": [6], "parts": [2, 4], "flat": [2, 4]}[kind]
        self.action_space = Discrete(6, start=3) if kind == "one" else MultiDiscrete(self.nvec, start=[0, 1])
        self.kind, self.absent = kind, absent

    def see(self):
        parts = []
        for n in self.nvec:
            part = self.np_random.integers(0, 2, n, dtype=np.int8)
            part[self.np_random.integers(n)] = 1
            parts.append(part)
        self.mask = parts
        flat = np.concatenate(parts)
        self.shown = {"one": parts[0], "parts": tuple(parts), "flat": flat}[self.kind]
        return flat.astype(np.float32), {} if self.t in self.absent else {"action_mask": self.shown}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.see()

    def step(self, action):
        choices = np.ravel(action - self.action_space.start)
        if self.t not in self.absent:
            for part, choice in zip(self.mask, choices, strict=True):
                assert part[choice] == 1, f"illegal action {action} at step {self.t}"
        self.t += 1
        obs, info = self.see()
        return obs, float(choices.sum()), self.t == 7, self.t == 5 and self.np_random.random() < 0.5, info


def masked(**kwargs):
    gym.registry.pop("Masked-v0", None)
    gym.register("Masked-v0", Masked, kwargs=kwargs, disable_env_checker=True)
    return "Masked-v0"


def uniform(mask):
    """Actions drawn from the allowed ones."""
    return torch.rand(mask.shape).masked_fill(~mask, -1).argmax(-1)


@BOTH
@pytest.mark.parametrize("kind", ["one", "parts", "flat"])
def test_the_mask_belongs_to_the_observation_it_came_with(kind, async_envs):
    """The observations show the masks, so each must fit its own, that of a last observation too."""
    envs = envs_of(masked(kind=kind), 3, async_envs)
    nvec = envs.vector.single_action_space.nvec if kind != "one" else [6]

    def flat(mask):
        return mask.float() if kind == "one" else torch.cat([mask[:, 0, : nvec[0]], mask[:, 1, : nvec[1]]], 1).float()

    obs, _ = envs.reset(seed=1)
    ends = 0
    for _ in range(60):
        assert torch.equal(flat(envs.action_mask), obs)
        if kind != "one":
            assert not envs.action_mask[:, 0, nvec[0] :].any()
        obs, *_, infos = envs.step(uniform(envs.action_mask))
        assert torch.equal(flat(common.final_mask(envs.action_mask, infos)), common.final_obs(obs, infos))
        ends += "final_mask" in infos
    assert ends > 10
    state = envs.state_dict()
    again = envs_of("Masked-v0", 3, async_envs)
    again.reset(seed=7)
    again.load_state_dict(state)
    assert torch.equal(again.action_mask, envs.action_mask)
    for _ in range(20):
        actions = uniform(envs.action_mask)
        envs.step(actions), again.step(actions)
        assert torch.equal(again.action_mask, envs.action_mask)
    envs.close()


def test_a_step_without_a_mask_allows_everything():
    envs = envs_of(masked(absent=(2, 3)), 2)
    envs.reset(seed=1)
    for t in range(4):
        assert envs.action_mask.all() == (t in (2, 3))
        envs.step(uniform(envs.action_mask))


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (np.ones(3), "action_mask must hold 0 or 1 for each of 2 choices"),
        (np.array([1, 2]), "action_mask must hold 0 or 1"),
        ("ab", "action_mask is no array of numbers"),
        (np.zeros(2, np.int8), "allows no action at step 0"),
    ],
)
def test_a_mask_that_makes_no_sense_is_one_line(mask, says, capsys):
    with pytest.raises(SystemExit) as stop:
        envs_of(odd(info={"action_mask": mask}), 2).reset(seed=1)
    assert stop.value.code == 5
    assert re.search(f"environment 0: .*{says}", capsys.readouterr().err)


def test_masks_for_box_actions_and_masks_that_come_late_are_not_used(capsys):
    envs = envs_of(odd(info={"action_mask": np.ones(9)}, actions=LINE), 1)
    envs.reset(seed=1)
    envs.step(torch.zeros(1, 2))
    assert envs.action_mask is None
    envs = envs_of(odd(info=lambda t: {"action_mask": np.ones(2, np.int8)} if t else {}), 1)
    envs.reset(seed=1)
    envs.step(torch.zeros(1, dtype=torch.int64))
    assert envs.action_mask is None
    assert "after step() but not after reset()" in capsys.readouterr().err


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("script", "kind", "flags"),
    [
        ("ppo", "one", {}),
        ("ppo", "parts", {}),
        ("ppo_recurrent", "one", {"num_steps": 32, "lstm": False}),
        ("ppo_recurrent", "parts", {"num_steps": 32}),
        ("dqn", "one", {"learning_starts": 100}),
        ("dqn", "one", {"learning_starts": 100, "double": False, "num_envs": 3}),
        ("pqn", "one", {"num_envs": 3}),
        ("dqn_lightning", "one", {"learning_starts": 100}),
        ("rainbow", "one", {"learning_starts": 100, "v_max": 30.0}),
        ("rainbow", "one", {"learning_starts": 100, "noisy": False, "distributional": False, "num_envs": 2}),
    ],
)
def test_no_algorithm_takes_an_action_that_is_not_allowed(script, kind, flags, compiled, tmp_path):
    """The environment raises at one: in training and in evaluation, from the first step on."""
    if compiled and script == "dqn_lightning":
        pytest.skip("it has no --compile")
    flags = {
        "env_id": masked(kind=kind),
        "total_timesteps": 1500,
        "log_interval": 500,
        "eval_episodes": 3,
        "capture_video": False,
        **flags,
    }
    run = train_with(load(script), tmp_path, compile=compiled, **flags)
    logged = rows(run)
    assert any("eval/episodic_return" in row for row in logged)
    values = [value for row in logged for key, value in row.items() if key.startswith("losses/")]
    assert values and np.isfinite(values).all()
    run_tool_in_process(run)


def run_tool_in_process(run):
    from common.tools.load_policy import load_policy

    policy, args, _ = load_policy(run)
    returns, _ = play(policy, args.env_id, 3, args.seed)
    assert np.isfinite(returns).all()


def test_ppos_probabilities_are_those_of_the_allowed_actions_alone():
    ppo = load("ppo")
    for kind, counts in (("one", [6]), ("parts", [2, 4])):
        envs = envs_of(masked(kind=kind), 64)
        obs, _ = envs.reset(seed=1)
        agent = ppo.Agent(envs, ppo.Args())
        nn.init.normal_(agent.actor[-1].weight)
        mask, actions = envs.action_mask, uniform(envs.action_mask)
        policy, _ = agent(obs, mask)
        logits = agent.actor(agent.features(obs)).view(64, len(counts), -1)
        logprobs, entropies = torch.zeros(64), torch.zeros(64)
        for i in range(64):
            for part in range(len(counts)):
                allowed = mask.view(64, len(counts), -1)[i, part].nonzero().squeeze(1)
                alone = torch.distributions.Categorical(logits=logits[i, part, allowed])
                choice = (allowed == actions.view(64, -1)[i, part]).nonzero().item()
                logprobs[i] += alone.log_prob(torch.tensor(choice))
                entropies[i] += alone.entropy()
        assert torch.allclose(policy.log_prob(actions), logprobs, atol=1e-6)
        assert torch.allclose(policy.entropy(), entropies, atol=1e-6)
        policy.log_prob(actions).sum().backward(retain_graph=True)
        policy.entropy().sum().backward()
        assert all(p.grad.isfinite().all() for p in agent.actor.parameters())
        drawn = torch.stack([agent.sample(obs, mask) for _ in range(500)])
        assert mask.expand(500, *mask.shape).gather(-1, drawn.unsqueeze(-1)).all()
        assert mask.gather(-1, agent.greedy(obs, mask).unsqueeze(-1)).all()


@pytest.mark.parametrize("script", ["dqn", "dqn_lightning", "rainbow"])
def test_the_updates_get_the_masks_of_the_next_observations(script, tmp_path, monkeypatch):
    """Which the observations show, those at the ends of episodes too."""
    module, batches = load(script), []
    loss = "rainbow_loss" if script == "rainbow" else "dqn_loss"
    real = getattr(module, loss)
    monkeypatch.setattr(module, loss, lambda *words: batches.append(words[2]) or real(*words))
    flags = {"learning_starts": 100, "buffer_size": 500, "num_envs": 2}
    train_with(module, tmp_path, env_id=masked(), total_timesteps=400, **flags)
    assert len(batches) > 50
    for batch in batches:
        assert torch.equal(batch.next_mask.float(), batch.next_obs)


@pytest.mark.parametrize("script", ["ppo", "ppo_recurrent"])
def test_ppos_first_update_of_a_rollout_is_by_the_policy_that_acted(script, tmp_path):
    """Without the masks in the update, the ratio of the probabilities would not be 1."""
    flags = {"update_epochs": 1, "num_minibatches": 1, "num_steps": 32, "log_interval": 256, "learning_rate": 0.05}
    run = train_with(load(script), tmp_path, env_id=masked(kind="parts"), total_timesteps=2048, **flags)
    logged = [row for row in rows(run) if "losses/approx_kl" in row]
    assert len(logged) == 8
    for row in logged:
        assert row["losses/approx_kl"] == pytest.approx(0, abs=1e-6) and row["losses/clipfrac"] == 0


class Table(nn.Module):
    """Q-values given by hand, chosen by the observation."""

    def __init__(self, q):
        super().__init__()
        self.q = nn.Parameter(q)

    def forward(self, obs):
        return self.q[obs[:, 0].long()]


@pytest.mark.parametrize("double", [False, True])
def test_dqns_target_is_the_maximum_over_the_allowed_actions(double):
    dqn = load("dqn")
    online, target = torch.randn(5, 4, generator=torch.manual_seed(1)), torch.randn(5, 4)
    mask = torch.rand(5, 4) < 0.5
    mask[0], mask[1], mask[2:, 3] = False, torch.tensor([0, 0, 1, 0]).bool(), True
    batch = SimpleNamespace(obs=torch.arange(5.0)[:, None], next_obs=torch.arange(5.0)[:, None], next_mask=mask)
    batch.actions, batch.rewards = torch.tensor([0, 1, 2, 3, 0]), torch.randn(5)
    batch.terminations = torch.tensor([1, 0, 0, 0, 0]).bool()  # at a terminal state nothing need be allowed
    loss, _ = dqn.dqn_loss(Table(online), Table(target), batch, dqn.Args(double=double, gamma=0.9))
    errors = []
    for i in range(5):
        bootstrap = 0.0
        if not batch.terminations[i]:
            chooser = online if double else target
            best = max((a for a in range(4) if mask[i, a]), key=lambda a: chooser[i, a])
            bootstrap = 0.9 * float(target[i, best])
        errors.append(float(online[i, batch.actions[i]]) - float(batch.rewards[i]) - bootstrap)
    assert float(loss) == pytest.approx(np.mean(np.square(errors)), rel=1e-5)


def test_pqns_targets_are_maxima_over_the_allowed_actions(tmp_path, monkeypatch):
    pqn, gaps = load("pqn"), []

    def spy(q_network, mb):
        with torch.no_grad():
            allowed = q_network(mb.next_obs).masked_fill(mb.next_obs == 0, -torch.inf)  # which the observations show
            targets = mb.rewards + torch.where(mb.terminations, 0.0, 0.9 * allowed.amax(dim=1))
        gaps.append((mb.returns - targets).abs().max().item())
        return loss(q_network, mb)

    loss = pqn.pqn_loss
    monkeypatch.setattr(pqn, "pqn_loss", spy)
    flags = {"num_envs": 4, "num_steps": 25, "num_minibatches": 1, "update_epochs": 1}
    train_with(pqn, tmp_path, env_id=masked(), total_timesteps=500, gamma=0.9, q_lambda=0.0, **flags)
    assert len(gaps) == 5 and max(gaps) < 1e-5


def test_a_replay_returns_the_mask_of_the_last_step_of_an_n_step_return():
    replay = common.ReplayBuffer(16, 1, n_step=3, gamma=0.9)
    masks = torch.rand(10, 1, 4) < 0.5
    for t in range(10):
        one = torch.tensor([float(t)])
        flags = {"terminations": one == 4, "truncations": one == 7}
        replay.add(obs=one, rewards=one, next_obs=one + 1, next_mask=masks[t], **flags)
    batch = replay.spread(10)
    assert torch.equal(batch.next_mask, masks[(batch.next_obs - 1).long(), 0])


# --- policies that need more than observations


class Remembers(nn.Module):
    """Counts the steps of each episode in its memory."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls = []

    def greedy(self, obs, memory, episode_starts):
        memory = torch.zeros(len(obs)) if memory is None else memory
        memory = torch.where(episode_starts, 0.0, memory) + 1
        self.calls.append((obs[:, 0].tolist(), memory.tolist()))
        return torch.zeros(len(obs), dtype=torch.int64), memory


def test_a_policy_with_a_memory_gets_its_own_back_and_knows_where_episodes_start():
    network = Remembers()
    returns, lengths = play(network.greedy, odd(), 6, seed=1, num_envs=3)  # its observation is the time, 0 to 3
    assert lengths.tolist() == [4] * 6
    assert len(network.calls) == 8
    for obs, memory in network.calls:
        assert memory == [t + 1 for t in obs]


def test_a_policy_without_masks_is_warned_about_where_there_are_some(capsys):
    with contextlib.suppress(SystemExit):
        play(lambda obs: torch.zeros(len(obs), dtype=torch.int64), masked(), 1, seed=1)
    assert "the policy takes no action_mask" in capsys.readouterr().err
