"""Where the time goes, by a clock that only the test moves."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import envs_of, load, only_run, rows
from gymnasium.spaces import Box, Discrete
from torch import nn

import common
from common.internals.speed import timing

KEYS = ("health/time_env", "health/time_update", "health/time_other")
SHARES = pytest.approx((0.3, 0.5, 0.2))


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


class Ticking(gym.Env):
    """A step takes 3 seconds, a reset 11."""

    now: list[float]

    def __init__(self):
        self.observation_space, self.action_space = Box(0.0, 1.0, (1,), np.float32), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.now[0] += 11
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.now[0] += 3
        self.t += 1
        return np.zeros(1, np.float32), 1.0, self.t == 40, False, {}


if "Ticking-v0" not in gym.registry:
    gym.register("Ticking-v0", entry_point=Ticking, disable_env_checker=True)


class Training:
    """3 seconds in the environment, 5 in the update, 2 in none of both, again and again."""

    def __init__(self, clock, tmp_path, compile_it=False):
        Ticking.now = self.clock = clock
        self.args = common.RunArgs(env_id="Ticking-v0", runs_dir=str(tmp_path), track=False, capture_video=False)
        self.args.eval_episodes, self.args.eval_interval, self.args.compile = 1, 1, compile_it
        self.run = common.track(self.args, torch.device("cpu"))
        self.envs = envs_of("Ticking-v0", 1)
        self.checkpoint = common.Checkpoint(self.run, self.envs)
        self.network = nn.Linear(1, 1)
        self.evaluation = common.Evaluation(self.run, self.policy)
        self.update = common.compile_update(self.args)(self._update)
        self.step = 0

    def begin(self):
        before = self.clock[0]
        self.envs.reset(seed=1)
        self.run.leave_out(self.clock[0] - before)

    def _update(self, seconds):
        self.clock[0] += seconds

    def steps(self, n):
        for _ in range(n):
            self.step += 1
            _, _, _, _, infos = self.envs.step(torch.zeros(1))
            self.run.log_episodes(infos, self.step)
            self.update(4)
            with common.update_timer:  # as a script does that has an update of its own, here around another one
                self.clock[0] += 0.75
                self.update(seconds=0.25)
            self.clock[0] += 2

    def evaluate(self):
        self.evaluation(self.step)

    def policy(self, obs):
        self.clock[0] += 0.5
        return torch.zeros(len(obs))


def shares(training):
    table = [row for row in rows(training.run.dir) if KEYS[0] in row]
    return [tuple(row[key] for key in KEYS) for row in table], [row["charts/SPS"] for row in table]


@pytest.mark.parametrize("compile_it", [False, True])
def test_shares_are_those_of_training_alone(compile_it, clock, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.compile", lambda function, **_: function)
    training = Training(clock, tmp_path, compile_it)
    training.begin()
    training.steps(2)
    training.run.log({}, training.step)
    training.evaluate()
    training.steps(3)
    training.evaluate()
    training.run.log({}, training.step)
    training.steps(1)
    training.run.log({}, training.step)
    training.run.finish()
    found, sps = shares(training)
    assert found == [SHARES] * 3
    assert sps == pytest.approx([0.1] * 3)


def test_shares_go_on_where_a_checkpoint_was_made(clock, tmp_path, monkeypatch):
    training = Training(clock, tmp_path / "a")
    training.begin()
    training.steps(2)
    training.run.log({}, training.step)
    training.steps(3)
    state = training.run.state_dict()
    training.steps(1)  # lost with the process
    training.run.finish()

    clock[0] += 10_000  # in another process, whose clocks stand elsewhere
    timing.env_timer.seconds, timing.update_timer.seconds = 777.0, 0.25
    resumed = Training(clock, tmp_path / "b")
    resumed.begin()
    resumed.run.load_state_dict(state)
    resumed.step = 5
    resumed.steps(1)
    resumed.run.log({}, 6)
    resumed.run.finish()
    assert shares(resumed) == ([SHARES], [pytest.approx(0.1)])


def test_an_evaluation_that_a_signal_ends_is_no_part_of_training(clock, tmp_path, monkeypatch):
    training = Training(clock, tmp_path)
    training.begin()
    training.steps(2)
    monkeypatch.setattr(training.run, "must_stop", lambda now=False: True)
    states = []

    def stop(step):
        states.append(training.run.state_dict())
        raise SystemExit

    monkeypatch.setattr(training.run, "stop", stop)
    with pytest.raises(SystemExit):
        training.evaluate()
    assert training.run.evaluation_due(training.step)  # in the resumed run
    training.run.finish()
    assert states[0]["clock"] == {"step": 0, "ago": 20.0, "timers": (6.0, 10.0)}
    assert states[0]["evaluated"] == 0


def test_an_update_that_fails_stops_its_clock():
    before = timing.update_timer.seconds

    def update():
        raise ValueError

    with pytest.raises(ValueError):
        common.compile_update(common.RunArgs())(update)()
    with timing.update_timer:
        pass
    assert timing.update_timer.seconds > before
    assert timing.update_timer._depth == 0


@pytest.mark.parametrize("script", ["dqn", "pqn", "ppo", "ppo_recurrent", "reinforce_rollout", "sac", "crossq"])
def test_every_script_counts_its_updates(script, tmp_path):
    module = load(script)
    flags = {"env_id": "Pendulum-v1", "hidden_sizes": (16,)} if script in ("sac", "crossq") else {}
    flags |= {"learning_starts": 100} if script in ("dqn", "sac", "crossq") else {"num_envs": 2, "num_steps": 32}
    flags |= {"total_timesteps": 512, "log_interval": 256, "eval_episodes": 0, "track": False}
    module.main(module.Args(runs_dir=str(tmp_path), **flags))
    last = [row for row in rows(only_run(tmp_path)) if KEYS[0] in row][-1]
    assert sum(last[key] for key in KEYS) == pytest.approx(1)
    assert all(last[key] > 0.01 for key in KEYS)
