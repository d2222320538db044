"""Evaluation: which episodes count, what it may touch, and what a film may cost (P19, P20, P22, P23)."""

import random

import numpy as np
import pytest
import torch
from conftest import load, only_run, rows
from torch import nn

import common
from common.evaluation import PARALLEL_ENVS, Camera, play


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.modes = set()

    def parameters(self, recurse=True):
        return iter([torch.zeros(1)])

    def zeros(self, obs):
        self.modes.add(self.training)
        return torch.zeros(len(obs), dtype=torch.int64)

    def noisy(self, obs):
        np.random.random(), random.random()  # noqa: NPY002
        return torch.randint(2, (len(obs),))


@pytest.mark.parametrize("episodes", [1, 4, 10, 12, 25])
def test_short_episodes_count_no_more_than_long_ones(episodes):
    # Each of these environments plays episodes of 1, 30, 4, 1, 30 ... steps; episode e is number e // 10 of its own.
    returns, lengths = play(Network().zeros, "Uneven-v0", episodes, seed=1)
    expected = [(1, 30, 4)[e // PARALLEL_ENVS % 3] for e in range(episodes)]
    assert lengths.tolist() == expected
    assert returns.tolist() == [n * (n + 1) / 2 for n in expected]


def test_evaluation_puts_everything_back():
    network = Network()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = play(network.noisy, "CartPole-v1", 5, seed=1)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert np.array_equal(before[2], after[2])
    torch.manual_seed(99)
    assert np.array_equal(first[0], play(network.noisy, "CartPole-v1", 5, seed=1)[0])
    assert not np.array_equal(first[0], play(network.noisy, "CartPole-v1", 5, seed=2)[0])
    play(network.zeros, "CartPole-v1", 1, seed=1)
    assert network.modes == {False}
    assert network.training


def test_its_environments_are_not_those_of_training():
    seen = []

    class Recorder(Network):
        def zeros(self, obs):
            seen.append(obs)
            return super().zeros(obs)

    play(Recorder().zeros, "CartPole-v1", 3, seed=1)
    training, _ = common.make_envs("CartPole-v1", 3).reset(seed=1)
    assert not (seen[0].unsqueeze(0) == training.unsqueeze(1)).all(dim=2).any()


@pytest.mark.parametrize(("interval", "steps"), [(0, [300]), (1000, [300]), (300, [300]), (100, [100, 200, 300])])
def test_there_is_one_evaluation_at_the_end_and_none_twice(interval, steps, tmp_path):
    dqn = load("dqn")
    flags = {"track": False, "cuda": False, "capture_video": False, "learning_starts": 100, "eval_episodes": 2}
    dqn.main(dqn.Args(total_timesteps=300, eval_interval=interval, runs_dir=str(tmp_path), **flags))
    table = rows(only_run(tmp_path))
    assert [row["global_step"] for row in table if "eval/episodic_return" in row] == steps


def test_a_film_has_every_frame_of_its_episode_and_none_of_the_next(tmp_path):
    import imageio_ffmpeg

    film = tmp_path / "videos" / "film.mp4"
    play(Network().zeros, "Mixed-v0", 12, seed=1, video=film)  # episodes of 3, 5, 2 ... steps at 10 frames a second
    reader = imageio_ffmpeg.read_frames(str(film))
    facts = next(reader)
    assert facts["size"] == (60, 40)
    assert facts["fps"] == 10
    # Its grey is 20 a step since the episode's start: 0, 20, 40 and the last one, 60.
    greys = [np.frombuffer(frame, np.uint8).mean() for frame in reader]
    assert greys == pytest.approx([0, 20, 40, 60], abs=4)
    assert [path.name for path in film.parent.iterdir()] == ["film.mp4"]


@pytest.mark.parametrize(
    "breakage",
    ["imageio_ffmpeg.write_frames", "worlds.Counter.render", "gymnasium.make"],
)
def test_a_film_that_cannot_be_made_is_one_warning(breakage, tmp_path, monkeypatch, capsys):
    import gymnasium

    make = gymnasium.make

    def broken(*words, **more):
        if breakage != "gymnasium.make" or more.get("render_mode"):
            raise OSError("no display")
        return make(*words, **more)

    monkeypatch.setattr(breakage, broken)
    returns, _ = play(Network().zeros, "Mixed-v0", 3, seed=1, video=tmp_path / "film.mp4")
    assert returns.tolist() == [6.0, 6.0, 6.0]
    error = capsys.readouterr().err
    assert error.count("warning: no video: OSError: no display") == 1
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_frames_are_thinned_and_end_after_a_minute():
    camera = Camera(None)
    camera.on = True
    camera.set_rate(50)  # CartPole: every second frame, 25 a second
    assert camera.fps == 25
    kept = [i for i in range(10_000) if camera.due()]
    assert kept == list(range(0, 3000, 2))


def test_filming_does_not_gather_memory(tmp_path):
    import resource

    def film(i):
        play(Network().zeros, "CartPole-v1", 1, seed=i, video=tmp_path / f"{i}.mp4")

    for i in range(3):
        film(i)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(3, 23):
        film(i)
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000
    )  # kB; one film's frames are 7,000 to 700,000


def test_atari_is_filmed_as_the_agent_sees_it(tmp_path):
    pytest.importorskip("ale_py")
    import imageio_ffmpeg

    class Fire(Network):
        def zeros(self, obs):
            return torch.ones(len(obs), dtype=torch.int64)  # in Breakout a game ends only if balls are served

    play(Fire().zeros, "ALE/Breakout-v5", 1, seed=1, video=tmp_path / "film.mp4")
    facts = next(imageio_ffmpeg.read_frames(str(tmp_path / "film.mp4")))
    assert facts["size"] == (336, 336)
    assert facts["fps"] == 15
