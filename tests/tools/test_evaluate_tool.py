"""python -m common evaluate: which episodes it plays, of how many runs, and what it writes down."""

import json
import shutil
import sys

import gymnasium as gym
import numpy as np
import pytest
from conftest import load, rows, train_with
from test_evaluation import Network

from common.evaluation import play
from common.tools import evaluate


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("trained")
    small = {"learning_starts": 100, "eval_episodes": 3, "capture_video": False, "total_timesteps": 300}
    return train_with(load("dqn"), tmp_path, **small, seed=5)


@pytest.mark.parametrize(("episodes", "num_envs"), [(7, 1), (7, 3), (5, 8), (12, 4)])
def test_every_environment_plays_its_share(episodes, num_envs):
    # Each environment of Uneven-v0 plays episodes of 1, 30, 4, 1, 30 ... steps; episode e is number e // num_envs of
    # its own. Were the first to end taken, there would be more short ones.
    returns, lengths = play(Network().zeros, "Uneven-v0", episodes, seed=1, num_envs=num_envs)
    assert lengths.tolist() == [(1, 30, 4)[e // num_envs % 3] for e in range(episodes)]
    assert returns.tolist() == [n * (n + 1) / 2 for n in lengths]


class Logged(gym.Env):
    """Episodes of 1 or 40 steps, drawn by each environment for itself, which keeps their lengths."""

    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)
    made: list = []  # noqa: RUF012

    def __init__(self):
        self.lengths = []
        self.made.append(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.choice([1, 40]))
        self.length = self.left
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        if self.left == 0:
            self.lengths.append(self.length)
        return np.zeros(1, np.float32), 1.0, self.left == 0, False, {}


gym.register("Logged-v0", Logged)


@pytest.mark.parametrize("seed", range(3))
def test_the_first_to_end_are_not_preferred(seed):
    Logged.made.clear()
    _, lengths = play(Network().zeros, "Logged-v0", 11, seed=seed, num_envs=4)
    assert len(Logged.made) == 4
    assert lengths.tolist() == [Logged.made[e % 4].lengths[e // 4] for e in range(11)]


def test_by_default_it_plays_the_runs_last_evaluation_again(run_dir, capsys):
    evaluate.main([str(run_dir)])
    logged = [row for row in rows(run_dir) if "eval/episodic_return" in row][-1]
    assert f"episodic_return {logged['eval/episodic_return']:.6g} ± {logged['eval/episodic_return_std']:.6g}" in (
        capsys.readouterr().out
    )


def test_several_runs_are_a_table_and_a_file(run_dir, tmp_path, capsys):
    again = tmp_path / "again"
    shutil.copytree(run_dir, again)
    file, films = tmp_path / "scores.json", tmp_path / "films"
    flags = ["--episodes", "9", "--num-envs", "4", "--seed", "3", "--json", str(file), "--video", str(films)]
    evaluate.main([str(run_dir), str(again), *flags])
    header, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [run_dir.name, "again"]
    first, second = json.loads(file.read_text())
    assert (first["returns"], first["lengths"]) == (second["returns"], second["lengths"])
    assert len(first["returns"]) == first["episodes"] == 9 and first["num_envs"] == 4 and first["seed"] == 3
    assert first["returns"] == [float(n) for n in first["lengths"]]  # CartPole: a point a step
    ordered = sorted(first["returns"])
    expected = {"mean": np.mean(ordered), "std": np.std(ordered), "IQM": np.mean(ordered[2:7]), "min": ordered[0]}
    expected |= {"max": ordered[-1], "length": np.mean(first["lengths"])}
    shown = dict(zip(header.split()[1:], lines[0].split()[1:], strict=True))
    for name, value in expected.items():
        assert first[name] == pytest.approx(value), name
        assert float(shown[name]) == pytest.approx(value, abs=0.06), name
    assert sorted(path.name for path in films.iterdir()) == sorted([f"{run_dir.name}.mp4", "again.mp4"])


def test_processes_play_the_same_episodes(run_dir, tmp_path):
    played = []
    for i, flags in enumerate([[], ["--async-envs"]]):
        file = tmp_path / f"{i}.json"
        evaluate.main([str(run_dir), "--num-envs", "2", "--episodes", "4", "--json", str(file), *flags])
        played.append(json.loads(file.read_text())[0]["returns"])
    assert played[0] == played[1]


def test_a_run_that_cannot_be_played_costs_only_itself(run_dir, tmp_path, capsys):
    file = tmp_path / "scores.json"
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(tmp_path / "nothing"), str(run_dir), "--episodes", "2", "--json", str(file)])
    assert stop.value.code == 3
    shown = capsys.readouterr()
    assert [line.split(":")[0] for line in shown.err.splitlines()] == ["error", "error"]
    assert "1 of 2 runs could not be played" in shown.err
    assert run_dir.name in shown.out
    assert [score["run"] for score in json.loads(file.read_text())] == [run_dir.name]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "which run?"),
        (["RUN", "--episodes", "0"], 2, "--episodes"),
        (["RUN", "--num-envs", "0"], 2, "--num-envs"),
        (["RUN", "--seed", "-1"], 2, "--seed"),
        (["RUN", "RUN", "--video", "film.mp4"], 2, "into a folder"),
        (["RUN", "--video", "film.mp4", "--async-envs"], 2, "--async-envs"),
        (["RUN", "--json", "no/where.json"], 6, "no folder"),
    ],
)
def test_bad_flags_are_one_line(run_dir, words, code, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(run_dir) if word == "RUN" else word for word in words])
    error = capsys.readouterr().err
    assert (stop.value.code, len(error.splitlines())) == (code, 1)
    assert error.startswith("error: ") and says in error


def test_each_run_finds_the_modules_that_were_beside_its_script(run_dir, tmp_path, monkeypatch, capsys):
    """Two runs whose helpers have one name and different numbers; a third, which has none, costs only itself."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    words = []
    for i, push in enumerate((1.0, 2.0, None)):
        given, folder, cwd = tmp_path / f"run{i}", tmp_path / f"beside{i}", tmp_path / f"cwd{i}"
        shutil.copytree(run_dir, given)
        folder.mkdir(), cwd.mkdir()
        if push is not None:
            (folder / "helper_of_mine.py").write_text(f"PUSH = {push}\n")
            (cwd / "env_of_mine.py").write_text(
                "import helper_of_mine\nimport gymnasium as gym\n"
                "class Env(gym.Env):\n"
                "    observation_space, action_space = gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2)\n"
                "    def reset(self, seed=None, options=None):\n"
                "        return self.observation_space.sample(), {}\n"
                "    def step(self, action):\n"
                "        return self.observation_space.sample(), helper_of_mine.PUSH, True, False, {}\n"
                "gym.register('Mine-v0', Env)\n"
            )
        script = given / "source" / "dqn.py"
        script.write_text(script.read_text() + "\nimport helper_of_mine\n")
        facts = json.loads((given / "args.json").read_text())
        facts |= {"env_id": "env_of_mine:Mine-v0", "folder": str(folder), "cwd": str(cwd)}
        (given / "args.json").write_text(json.dumps(facts))
        words.insert(0, str(given))
    before = sys.path[:]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*words, "--allow-env-import", "--json", str(tmp_path / "scores.json")])
    error = capsys.readouterr().err
    assert stop.value.code == 3 and "No module named 'helper_of_mine'" in error and "1 of 3 runs" in error
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [(score["run"], score["mean"]) for score in scores] == [("run1", 2.0), ("run0", 1.0)]
    assert sys.path == before and "helper_of_mine" not in sys.modules
