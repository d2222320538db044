"""Environment ids that are not registered, or out of date, are one line that says what to type instead."""

import sys
import warnings

import gymnasium as gym
import pytest
from conftest import envs_of

STANDARD = "ALE/Pong-v5 (with the standard preprocessing)?"
NEAREST = {
    "CartPole": "CartPole-v1?",
    "CartPol-v1": "CartPole-v1?",
    "cartpole-v1": "CartPole-v1?",
    "CartPole_v1": "CartPole-v1?",
    "CartPole-v7": "CartPole-v1?",
    "foo/CartPole-v0": "CartPole-v0?",
    "phys2d/cartpole": "phys2d/CartPole-v1?",
    "LunarLander": "LunarLander-v3?",
    "LunarLander-v2": "LunarLander-v3?",
    "Pendulum-v0": "Pendulum-v1?",
    "HalfChetah-v5": "HalfCheetah-v5?",
    "HalfChetah-v4": "HalfCheetah-v4?",
    "HalfCheetah-v2": "HalfCheetah-v5?",
    "Hoper-v3": "Hopper-v5?",
}
GAMES = {
    "Pong-v5": STANDARD,
    "Pong-v4": STANDARD,
    "pong": STANDARD,
    "ALE/Pong": STANDARD,
    "ALE/Pong-v4": STANDARD,
    "ALE/Pongg-v5": STANDARD,
    "PongNoFrameskip-v4": STANDARD,
    "BreakoutDeterministic-v4": STANDARD.replace("Pong", "Breakout"),
    "MsPacman-ramNoFrameskip-v0": STANDARD.replace("Pong", "MsPacman"),
}


def one_line(capsys, env_id, **how):
    """The one line with which making the environment ends with code 2."""
    with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
        warnings.simplefilter("error")
        envs_of(env_id, 1, **how)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


@pytest.mark.parametrize("env_id", [*NEAREST, *GAMES])
def test_an_id_that_is_not_registered_is_one_line_with_the_id_that_was_meant(env_id, capsys):
    if env_id in GAMES:
        pytest.importorskip("ale_py")
    says = {**NEAREST, **GAMES}[env_id]
    assert one_line(capsys, env_id) == f"error: --env-id {env_id}: there is no such environment; did you mean {says}"


@pytest.mark.parametrize("env_id", ["Pong-v5", "Pong-v4", "pong", "PongNoFrameskip-v4"])
def test_a_game_is_suggested_without_ale_py_too(env_id, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    for name, spec in list(gym.registry.items()):
        if "ale_py" in str(spec.entry_point):
            monkeypatch.delitem(gym.registry, name)
    assert "ALE/Pong-v5" in one_line(capsys, env_id)


def test_a_module_without_the_environment_is_one_line_with_those_that_it_has(tmp_path, monkeypatch, capsys):
    (tmp_path / "two_envs.py").write_text(
        "import gymnasium as gym\n"
        "gym.register('Mine-v0', 'gymnasium.envs.classic_control:CartPoleEnv')\n"
        "gym.register('Yours-v0', lambda: None)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr("common.internals.vector.ids._FIRST_REGISTERED", frozenset(gym.registry))
    line = one_line(capsys, "two_envs:mine", allow_import=True)
    assert line == "error: --env-id two_envs:mine: two_envs registers Mine-v0, Yours-v0"
    for name in ("Mine-v0", "Yours-v0"):
        gym.registry.pop(name)
    monkeypatch.delitem(sys.modules, "two_envs")
    assert one_line(capsys, "two_envs:Mine-v0") == (
        "error: --env-id two_envs:Mine-v0 would import and run 'two_envs'; if you trust it, add --allow-env-import"
    )
    assert "json registers no environment" in one_line(capsys, "json:Mine-v0", allow_import=True)
    assert "PACKAGE:FetchReach-v4, with --allow-env-import" in one_line(capsys, "FetchReach-v4")


@pytest.mark.parametrize("async_envs", [False, True])
def test_an_old_version_that_works_is_one_warning(async_envs, capfd):
    for _ in range(2):
        envs_of("CartPole-v0", 2, async_envs).close()
    assert capfd.readouterr().err == "warning: CartPole-v0 is an old version; the newest is CartPole-v1\n"
