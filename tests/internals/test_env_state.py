"""A restored environment does what the one it was saved from does, to the bit: in a new process, across episodes."""

import argparse
import collections
import enum
import hashlib
import importlib.util
import io
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import odd_envs
import pytest
import torch
from conftest import ROOT, envs_of, load, same, train_with, weights
from gymnasium import wrappers

from common import Envs, args, final_obs
from common.internals.resume.action_log import AtariActionLog, with_action_log
from common.internals.resume.env_state import restore, snapshot

EXTRAS = {"box2d": "Box2D", "mujoco": "mujoco", "atari": "ale_py"}
MUJOCO = (
    "Ant HalfCheetah Hopper Humanoid HumanoidStandup InvertedDoublePendulum InvertedPendulum Pusher Reacher Swimmer"
)
MUJOCO = [f"{name}-{v}" for name in f"{MUJOCO} Walker2d".split() for v in ("v4", "v5") if (name, v) != ("Pusher", "v4")]
# (id, extra, steps before the snapshot and after it): episodes end in both parts, unless they take 1000 steps.
CLASSIC = [("CartPole-v1", 60), ("MountainCar-v0", 230), ("MountainCarContinuous-v0", 1030), ("Pendulum-v1", 230)]
BOX2D = [("LunarLander-v3", 250), ("LunarLanderContinuous-v3", 250), ("BipedalWalker-v3", 1650)]
GAMES = [("ALE/Breakout-v5", "atari", 330), ("ALE/SpaceInvaders-v5", "atari", 1030), ("ALE/Freeway-v5", "atari", 2100)]
EVERY = [(i, None, n) for i, n in [*CLASSIC, ("Acrobot-v1", 530)]] + [(i, "box2d", n) for i, n in BOX2D]
EVERY += [(i, "mujoco", 1030) for i in MUJOCO] + [("BipedalWalkerHardcore-v3", "box2d", 2050)] + GAMES
QUICK = [
    *((i, None, n, num_envs, way) for i, n in CLASSIC[:2] for num_envs, way in [(1, "sync"), (3, "async")]),
    ("CartPole-v1", None, 100, 1, "native"),
    ("CartPole-v1", None, 100, 3, "native"),
    ("Acrobot-v1", None, 530, 1, "sync"),
    ("Pendulum-v1", None, 230, 3, "sync"),
    ("LunarLander-v3", "box2d", 250, 3, "sync"),
    ("LunarLander-v3", "box2d", 150, 1, "async"),
    ("BipedalWalker-v3", "box2d", 330, 3, "sync"),
    ("HalfCheetah-v5", "mujoco", 1030, 1, "sync"),
    ("HalfCheetah-v4", "mujoco", 1030, 1, "sync"),
    ("Ant-v5", "mujoco", 200, 3, "sync"),
    ("Humanoid-v5", "mujoco", 60, 3, "async"),
    ("Hopper-v5", "mujoco", 60, 3, "sync"),
    ("Walker2d-v4", "mujoco", 60, 1, "sync"),
    ("ALE/Breakout-v5", "atari", 330, 3, "sync"),
]
SLOW = [(*case, num_envs, way) for case in EVERY for num_envs in (1, 3) for way in ("sync", "async")]


@pytest.fixture(autouse=True)
def warns_anew(monkeypatch):
    monkeypatch.setattr(args, "_warned", set())


def there(extra):
    return extra is None or importlib.util.find_spec(EXTRAS[extra]) is not None


def through_a_file(state):
    """`state`, as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def play(vector, steps):
    """A line for each step: a hash of all that it handed out, and the episodes that ended. Actions are drawn by the
    action space, whose random generator is part of the state."""
    lines = []
    for _ in range(steps):
        actions = torch.as_tensor(vector.vector.action_space.sample())
        next_obs, *arrays, infos = vector.step(actions)
        parts = [next_obs, final_obs(next_obs, infos), *arrays]
        digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
        mask = infos.get("_episode", np.zeros(vector.num_envs, bool))
        ended = [[int(i), infos["episode"]["r"][i], int(infos["episode"]["l"][i])] for i in np.flatnonzero(mask)]
        lines.append([digest, ended])
    return lines


def continued(folder):
    """What a new process does: restores every case of `folder`, and plays on."""
    answers = {}
    for path in sorted(Path(folder).glob("*.pt")):
        case = json.loads(path.with_suffix(".json").read_text())
        vector = envs_of(
            case["id"],
            case["num_envs"],
            case["way"] == "async",
            native=case["way"] == "native",
            terminal_on_life_loss=True,
        )
        vector.load_state_dict(torch.load(path, weights_only=True))
        obs = hashlib.sha256(vector.obs.numpy().tobytes()).hexdigest()
        answers[path.stem] = [obs, play(vector, case["steps"])]
        vector.close()
    return answers


def goes_on(cases, tmp_path):
    """Plays each case, saves it, plays on; a new process does so from the files, and the two are compared."""
    truth = {}
    cases = [case for case in cases if there(case[1])]
    for number, (env_id, _, steps, num_envs, way) in enumerate(cases):
        vector = envs_of(env_id, num_envs, way == "async", native=way == "native", terminal_on_life_loss=True)
        vector.reset(seed=number)
        vector.vector.action_space.seed(number)
        before = play(vector, steps)
        path = tmp_path / f"{number}.pt"
        torch.save(vector.state_dict(), path)
        path.with_suffix(".json").write_text(
            json.dumps({"id": env_id, "num_envs": num_envs, "way": way, "steps": steps})
        )
        truth[path.stem] = [hashlib.sha256(vector.obs.numpy().tobytes()).hexdigest(), play(vector, steps)]
        assert vector.check_snapshots(), env_id
        vector.close()
        if steps not in (150, 200):
            assert any(ended for _, ended in before), env_id
            assert any(ended for _, ended in truth[path.stem][1]), env_id
    program = "import json, sys, test_env_state as t; print(json.dumps(t.continued(sys.argv[1])))"
    path = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "tests/helpers", "tests/internals", "."))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers.keys() == truth.keys()
    different = [case for number, case in enumerate(cases) if answers[str(number)] != truth[str(number)]]
    assert not different


def test_a_new_process_goes_on_as_the_old_one_did(tmp_path):
    goes_on(QUICK, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("env_id", [case[0] for case in EVERY])
def test_a_new_process_goes_on_as_the_old_one_did_with_every_environment(env_id, tmp_path):
    cases = [case for case in SLOW if case[0] == env_id and there(case[1])]
    if not cases:
        pytest.skip("not installed")
    goes_on(cases, tmp_path)


def follow(env, other, steps=300, seed=0):
    """Steps both with the same actions and resets, and compares every answer to the bit. Number of episodes."""
    actions = np.random.default_rng(seed)
    episodes = 0
    for _ in range(steps):
        space = env.action_space
        action = actions.uniform(space.low, space.high).astype(space.dtype) if hasattr(space, "low") else None
        action = int(actions.integers(space.n)) if action is None else action
        one, two = env.step(action), other.step(action)
        assert np.asarray(one[0]).tobytes() == np.asarray(two[0]).tobytes()
        assert one[1:4] == two[1:4]
        if one[2] or one[3]:
            episodes += 1
            assert np.asarray(env.reset()[0]).tobytes() == np.asarray(other.reset()[0]).tobytes()
    assert np.asarray(env.action_space.sample()).tobytes() == np.asarray(other.action_space.sample()).tobytes()
    return episodes


def restored(make, before, seed=3):
    """An environment that has been played for `before` steps, and another that was restored from its file."""
    env, other = make(), make()
    follow(env, twin := make_twin(make, env, seed), before)
    twin.close()
    restore(other, through_a_file(snapshot(env)))
    return env, other


def make_twin(make, env, seed):
    twin = make()
    for each in (env, twin):
        each.action_space.seed(seed)
        each.reset(seed=seed)
    return twin


@pytest.mark.parametrize(
    "name", ["FrozenLake-v1", "FrozenLake8x8-v1", "CliffWalking-v1", "Taxi-v4", "Blackjack-v1", "CartPole-v0"]
)
def test_toy_text(name):
    env, other = restored(lambda: gym.make(name), 57)
    follow(env, other, 300, seed=9)


def test_every_wrapper_that_remembers():
    def make():
        env = gym.make("Pendulum-v1", max_episode_steps=40)
        env = wrappers.RecordEpisodeStatistics(wrappers.FrameStackObservation(env, 4))
        env = wrappers.NormalizeReward(wrappers.NormalizeObservation(env), 0.9)
        env = wrappers.DelayObservation(wrappers.StickyAction(env, 0.5), 2)
        return wrappers.TimeAwareObservation(wrappers.FlattenObservation(env))

    env, other = restored(make, 57)
    assert follow(env, other, 100, seed=9) == 2  # the step counter went on: one end after 23 steps, one after 63
    assert list(env.get_wrapper_attr("return_queue")) == list(other.get_wrapper_attr("return_queue"))
    one, two = env.get_wrapper_attr("obs_rms"), other.get_wrapper_attr("obs_rms")
    assert one.count == two.count
    assert one.mean.tobytes() + one.var.tobytes() == two.mean.tobytes() + two.var.tobytes()


def test_flags_of_the_wrappers_gymnasium_adds():
    env, other = gym.make("CartPole-v1"), gym.make("CartPole-v1")
    restore(other, snapshot(env))
    with pytest.raises(gym.error.ResetNeeded):  # as in the one that was saved
        other.step(0)
    env.reset(seed=1)
    restore(other, snapshot(env))
    other.step(0)


def test_box2d_under_a_wrapper_that_draws_from_its_generator():
    pytest.importorskip("Box2D")

    def make():
        return with_action_log(wrappers.FlattenObservation(wrappers.StickyAction(gym.make("LunarLander-v3"), 0.5)))

    env, other = restored(make, 230)
    assert follow(env, other, 200, seed=9)


def test_a_box2d_environment_of_ones_own_is_refused_by_name():
    box2d = pytest.importorskip("gymnasium.envs.box2d.lunar_lander")

    class Mine(box2d.LunarLander):
        pass

    env = with_action_log(Mine())
    env.reset(seed=1)
    with pytest.raises(TypeError, match=r"of Mine is a .*, which cannot be saved"):
        snapshot(env)


def test_bipedal_walker_does_not_depend_on_what_was_played_before():
    pytest.importorskip("Box2D")
    for seed in range(8):
        old, new = (envs_of("BipedalWalker-v3", 1) for _ in range(2))
        old.reset(seed=100 + seed)
        old.vector.action_space.seed(0)
        play(old, 150)
        for each in (old, new):
            each.reset(seed=seed)
            each.vector.action_space.seed(1)
        assert play(old, 150) == play(new, 150)


def test_car_racing():
    pytest.importorskip("Box2D")

    def make():
        return with_action_log(gym.make("CarRacing-v3", max_episode_steps=30))

    env, other = restored(make, 40)
    follow(env, other, 40, seed=9)


def single_atari_game(sticky):
    gym.register_envs(pytest.importorskip("ale_py"))
    env = gym.make("ALE/Breakout-v5", obs_type="grayscale", repeat_action_probability=sticky)
    return wrappers.FrameStackObservation(env, 4)


def test_a_single_atari_game_with_frames_stacked():
    env, other = restored(lambda: single_atari_game(sticky=0.0), 230)
    assert follow(env, other, 260, seed=9) >= 1


def test_atari_with_sticky_actions_is_refused():
    env = single_atari_game(sticky=0.25)
    env.reset(seed=1)
    with pytest.raises(TypeError, match="sticky actions"):
        snapshot(env)


def test_atari_games_seeded_anew(monkeypatch):
    pytest.importorskip("ale_py")
    monkeypatch.setattr(AtariActionLog, "EPISODES_PER_SEED", 2)
    vector, other = (envs_of("ALE/Breakout-v5", 2, terminal_on_life_loss=True) for _ in range(2))
    vector.reset(seed=1)
    seeds = list(vector.vector.seeds)
    vector.vector.action_space.seed(1)
    episodes, obs = 0, vector.obs
    while episodes < 6 or vector.vector.seeds == seeds:
        next_obs, _, _, _, infos = vector.step(torch.as_tensor(vector.vector.action_space.sample()))
        assert torch.equal(final_obs(next_obs, infos)[:, :3], obs[:, 1:])
        episodes += int(infos.get("_episode", np.zeros(1)).sum())
        obs = next_obs
    assert max(vector.vector.resets) < 2
    other.load_state_dict(through_a_file(vector.state_dict()))
    assert play(vector, 300) == play(other, 300)


def test_statistics_and_the_observation_go_on():
    # Counter knows its truth: episode k of "Uneven" is 1, 30 or 4 steps long, and its return is 1 + 2 + ... + length.
    for async_envs in (False, True):
        vector, other = (envs_of("Uneven-v0", 2, async_envs) for _ in range(2))
        vector.reset(seed=1)
        for _ in range(20):
            vector.step(torch.zeros(2, dtype=torch.int64))
        other.load_state_dict(through_a_file(vector.state_dict()))
        assert other.obs.tolist() == [[1019.0], [1019.0]]
        for _ in range(11):
            _, _, _, _, infos = other.step(torch.zeros(2, dtype=torch.int64))
        assert infos["episode"]["r"].tolist() == [465.0, 465.0]
        assert infos["episode"]["l"].tolist() == [30, 30]
        for each in (vector, other):
            each.close()


def test_a_life_lost_before_the_snapshot_is_not_lost_again():
    vector, other = (Envs(odd_envs.game("Lives-v0"), terminal_on_life_loss=True) for _ in range(2))
    vector.reset(seed=1)
    for _ in range(5):  # a life goes with every fourth step
        vector.step(torch.zeros(1, dtype=torch.int64))
    other.load_state_dict(through_a_file(vector.state_dict()))
    ends = [bool(other.step(torch.zeros(1, dtype=torch.int64))[2]) for _ in range(7)]
    assert ends == [False, False, True, False, False, False, True]


@pytest.mark.parametrize("env_id", ["CartPole-v1", "LunarLander-v3", "Global-v0"])
def test_taking_a_snapshot_changes_nothing(env_id):
    if env_id == "LunarLander-v3":
        pytest.importorskip("Box2D")

    def run(saving):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
        vector = envs_of(env_id, 2)
        vector.reset(seed=1)
        vector.vector.action_space.seed(1)
        lines = []
        for _ in range(10):
            lines += play(vector, 20)
            if saving:
                vector.check_snapshots()
                vector.state_dict()
        return lines, torch.rand(3).tolist(), np.random.random(3).tolist(), random.random()  # noqa: NPY002

    assert run(True) == run(False)


def test_the_check_is_silent_quick_and_steps_nothing(capfd):
    vector = envs_of("CartPole-v1", 2)
    vector.reset(seed=1)
    before = [list(env.unwrapped.state) for env in vector.vector.envs]
    began = time.monotonic()
    assert vector.check_snapshots()
    assert time.monotonic() - began < 0.2
    assert before == [list(env.unwrapped.state) for env in vector.vector.envs]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("async_envs", [False, True])
def test_hidden_state_is_found_out_and_new_episodes_begin(capfd, async_envs):
    vector, other, again = (envs_of("Hidden-v0", 3, async_envs) for _ in range(3))
    first, _ = vector.reset(seed=1)
    for _ in range(30):
        vector.step(torch.zeros(3, dtype=torch.int64))
    assert not vector.check_snapshots()
    state = through_a_file(vector.state_dict())
    (line,) = capfd.readouterr().err.splitlines()  # said once
    assert line.startswith(
        "warning: resume will start new episodes: attribute `clock` of Hidden is an itertools.count,"
    )
    other.load_state_dict(state)
    again.load_state_dict(state)
    assert other.began_anew
    assert not set(other.obs.flatten().tolist()) & set(first.flatten().tolist())
    assert len(set(other.obs.flatten().tolist())) == 3
    assert torch.equal(other.obs, again.obs)  # a run resumed twice from the same place goes on in the same way
    for _ in range(35):
        _, _, _, _, infos = other.step(torch.zeros(3, dtype=torch.int64))
    assert infos["episode"]["l"].tolist() == [35, 35, 35]  # of the new episodes only
    assert infos["episode"]["r"].tolist() == [35, 35, 35]
    for each in (vector, other, again):
        each.close()


@pytest.mark.parametrize(("script", "env_id"), [("dqn", "CartPole-v1"), ("reinforce_rollout", "Hidden-v0")])
def test_the_self_test_and_snapshots_leave_training_as_it_was(script, env_id, tmp_path, monkeypatch):
    module, taken = load(script), []

    class Saving(Envs):
        def step(self, actions):
            if self._steps % 50 == 0:
                taken.append(self.state_dict())
            return super().step(actions)

    flags = {"learning_starts": 100} if script == "dqn" else {}
    flags |= {"env_id": env_id, "total_timesteps": 1000, "num_envs": 2}
    plain = weights(train_with(module, tmp_path, **flags))
    other_seed = weights(train_with(module, tmp_path, **flags, seed=2))
    monkeypatch.setattr("common.envs.Envs", Saving)
    assert same(plain, weights(train_with(module, tmp_path, **flags)))
    assert len(taken) >= 10
    assert not same(plain, other_seed)


@pytest.mark.parametrize(("env_id", "num_envs"), [("CartPole-v1", 3), ("Pendulum-v1", 2), ("Acrobot-v1", 2)])
def test_the_snapshot_of_another_environment_is_exit_3(capfd, env_id, num_envs):
    vector = envs_of("CartPole-v1", 2)
    vector.reset(seed=1)
    with pytest.raises(SystemExit) as stop:
        envs_of(env_id, num_envs).load_state_dict(vector.state_dict())
    assert stop.value.code == 3
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: the ")


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Part:
    def __init__(self):
        self.value = 0


CONSTANT = np.zeros(3)


class Zoo:
    """An attribute of every kind; `change` makes every one another than in a new object."""

    def __init__(self):
        self.plain = [None, True, 1, 2.0, "three", b"4"]
        self.big, self.nan = 2**100, float("nan")
        self.numbers = (np.float64(0.5), np.int16(3), np.bool_(False))
        self.array = np.zeros((2, 3))
        self.view = self.array[1, ::2]
        self.fortran = np.asfortranarray(np.zeros((3, 40)))
        self.column = self.fortran[:, 1]
        self.empty, self.flags = np.zeros((0, 2)), np.zeros(3, bool)
        self.names = np.array(["a", "b"])
        self.target = CONSTANT
        self.queue = collections.deque([1, 2], maxlen=3)
        self.counts: collections.defaultdict = collections.defaultdict(int)
        self.bag = {1}
        self.colour = Colour.RED
        self.parts = [Part(), Part(), Part()]
        self.chosen = self.parts[0]
        self.keyed = {(1, "a"): [1], np.int64(3): Colour.RED}
        self.me = self
        self.generators = [
            np.random.Generator(kind(1))
            for kind in (np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64, np.random.PCG64DXSM)
        ]
        self.old_generator, self.python = np.random.RandomState(1), random.Random(1)
        self.torch = torch.Generator().manual_seed(1)
        self.space = gym.spaces.Dict({"a": gym.spaces.Discrete(99), "b": gym.spaces.Tuple([gym.spaces.Discrete(99)])})
        self.function = self.draws
        self.gone = 1

    def draws(self):
        drawn = [generator.standard_normal() for generator in self.generators]
        drawn += [self.old_generator.randn(), self.python.gauss(0, 1), float(torch.randn(1, generator=self.torch))]
        sample = self.space.sample()
        return [*drawn, int(sample["a"]), int(sample["b"][0])]

    def change(self):
        self.plain[2], self.plain[4] = 7, "seven"
        self.big += 1
        self.numbers = (np.float64(1 / 3), np.int16(-4), np.bool_(True))
        self.array[:] = np.arange(6).reshape(2, 3) / 7
        self.fortran[:] = np.random.default_rng(0).normal(size=(3, 40))
        self.flags[1] = True
        self.names = np.array(["cc", "d"])
        self.target = np.ones(3)
        self.queue.append(9)
        self.queue.append(10)
        self.counts["x"] += 5
        self.bag.add((2, 3))
        self.keyed[1, "a"].append(self.parts[2])
        self.keyed[np.int64(3)] = Colour.BLUE
        self.colour = Colour.BLUE
        for i, part in enumerate(self.parts):
            part.value = i + 1
        self.chosen = self.parts[2]
        self.space.seed(5)
        self.draws()
        del self.gone
        self.new = [self.array]


def test_every_kind_of_attribute():
    zoo, other = Zoo(), Zoo()
    zoo.change()
    restore(other, through_a_file(snapshot(zoo)))
    assert other.plain == [None, True, 7, 2.0, "seven", b"4"]
    assert (other.big, np.isnan(other.nan)) == (2**100 + 1, True)
    assert other.numbers == zoo.numbers
    assert list(map(type, other.numbers)) == [np.float64, np.int16, np.bool_]
    for name in ("array", "view", "fortran", "column", "empty", "flags", "names", "target"):
        one, two = getattr(zoo, name), getattr(other, name)
        assert (one.dtype, one.shape, one.tobytes()) == (two.dtype, two.shape, two.tobytes()), name
    other.array[1, 2] = 5.0
    assert other.view[1] == 5.0  # still a view
    assert other.fortran.strides == (8, 24)
    other.fortran[2, 1] = 5.0
    assert other.column[2] == 5.0
    assert other.new[0] is other.array
    assert CONSTANT.tolist() == [0, 0, 0]
    assert list(other.queue) == [2, 9, 10]
    assert other.queue.maxlen == 3
    assert other.counts == {"x": 5}
    assert other.counts["missing"] == 0
    assert other.bag == {1, (2, 3)}
    assert other.keyed[np.int64(3)] is other.colour is Colour.BLUE
    assert [part.value for part in other.parts] == [1, 2, 3]
    assert other.chosen is other.parts[2] is other.keyed[1, "a"][1]
    assert other.me is other
    assert not hasattr(other, "gone")
    assert other.function() == zoo.draws()
    assert other.draws() != Zoo().draws()


def test_what_has_no_counterpart_is_made_without_a_constructor_but_never_of_the_standard_library(monkeypatch):
    zoo, other = Zoo(), Zoo()
    zoo.parts.append(Part())
    zoo.parts[3].value = 7
    state = through_a_file(snapshot(zoo))
    monkeypatch.setattr(Part, "__init__", None)
    restore(other, state)
    assert [part.value for part in other.parts] == [0, 0, 0, 7]
    monkeypatch.undo()
    for made in (argparse.Namespace(), Closing(), gym.Env()):
        zoo.parts[3] = made
        with pytest.raises(ValueError, match="where this environment has nothing"):
            restore(Zoo(), snapshot(zoo))


class Closing:
    def __del__(self):
        pass


def test_a_file_cannot_name_code_to_be_called():
    zoo, other = Zoo(), Zoo()
    for named in (os.system, eval, subprocess.Popen, np.load, torch.load):
        zoo.function = named
        with pytest.raises(ValueError, match="where this environment has"):
            restore(other, through_a_file(snapshot(zoo)))


def test_a_file_cannot_give_addresses_of_objects():
    def of_objects(state):
        if isinstance(state, tuple | list):
            return type(state)(of_objects(part) for part in state)
        if isinstance(state, dict):
            return {key: of_objects(part) for key, part in state.items()}
        return "|O" if state == "<i8" else state

    for value in ([np.zeros(1, np.int64)], [np.int64(1)]):
        with pytest.raises(ValueError, match="addresses"):
            restore([], of_objects(snapshot(value)))


def test_what_cannot_be_restored_is_left_as_it_is():
    zoo, other = Zoo(), Zoo()
    zoo.change()
    zoo.me, zoo.new = zoo, os.system  # the last attribute
    before = snapshot(other)
    with pytest.raises(ValueError, match="system"):
        restore(other, snapshot(zoo))
    assert snapshot(other) == before


def test_a_snapshot_is_plain_data():
    def kinds(state):
        yield type(state)
        if isinstance(state, dict):
            state = itertools.chain(*state.items())
        if not isinstance(state, (str, bytes)) and hasattr(state, "__iter__"):
            for item in state:
                yield from kinds(item)

    zoo = Zoo()
    zoo.change()
    plain = {type(None), bool, int, float, str, bytes, tuple, list, dict}
    assert set(kinds(snapshot(zoo))) <= plain
    names = ["CartPole-v1"] + ["LunarLander-v3"] * there("box2d") + ["Ant-v5"] * there("mujoco")
    for env_id in names + ["ALE/Pong-v5"] * there("atari"):
        vector = envs_of(env_id, 2)
        vector.reset(seed=1)
        state = vector.state_dict()
        assert set(kinds(state["snapshots"])) | set(kinds(state["spaces"])) <= plain
        through_a_file(state)


def test_nothing_in_the_repository_unpickles():
    folders = (ROOT / name for name in ("algos", "common", "runs", "tests"))
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    paths = [path for path in paths if path.name not in ("test_docs.py", Path(__file__).name)]
    assert len(paths) > 20
    for path in paths:
        assert not re.search(r"pickle\.loads?\(|Unpickler|weights_only\s*=\s*False", path.read_text()), path
