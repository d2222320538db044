"""Every command of wrong_commands.txt ends with its code and one line that says what to type instead."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import warm
from conftest import ROOT, load

TABLE = [
    tuple(part.strip() for part in line.split(" | "))
    for line in Path(__file__).with_name("wrong_commands.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
WITHOUT = "import runpy, sys; sys.modules[{!r}] = None; del sys.argv[0]; runpy.run_path({!r}, None, '__main__')"
MY_ENVS = """
import gymnasium as gym

class Words(gym.Env):
    observation_space, action_space = gym.spaces.Text(5), gym.spaces.Discrete(2)

class Broken(gym.Env):
    def __init__(self):
        1 / 0

gym.register("Mine-v0", "gymnasium.envs.classic_control:CartPoleEnv")
gym.register("Words-v0", Words)
gym.register("Broken-v0", Broken)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("newcomer")
    for name in ("empty", "broken", "a_run/checkpoints"):
        (folder / name).mkdir(parents=True)
    config = {**vars(load("dqn").Args()), "script": "dqn", "device": "cpu", "threads": 1, "versions": {}}
    (folder / "a_run" / "args.json").write_text(json.dumps({**config, "wandb_id": "0a1b2c3d"}))
    (folder / "a_run" / "policy.pt").write_text("no policy")
    (folder / "broken" / "args.json").write_text("{")
    (folder / "a_file").write_text("")
    (folder / "my_envs.py").write_text(MY_ENVS)
    shutil.copy(ROOT / "algos" / "dqn.py", folder)
    return folder


def contents(folder):
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts and path.name != ".lock"}


@pytest.mark.parametrize(("code", "command", "says"), TABLE, ids=[command for _, command, _ in TABLE])
def test_a_wrong_command_is_one_line_that_says_what_to_type(code, command, says, folder):
    before, (*without, command) = contents(folder), command.split(": ") if "without " in command else [command]
    first, *words = shlex.split(command)
    script = str(ROOT / "algos" / first)
    words = [script, *words] if first.endswith(".py") else ["-m", "common", first, *words]
    if without:
        words = ["-c", WITHOUT.format(without[0].removeprefix("without "), script), *words]
    done = warm.run(words, folder, dict(os.environ), timeout=120)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stdout
    assert says.format(algos=ROOT / "algos") in done.stderr
    assert done.returncode == int(code)
    assert contents(folder) == before
