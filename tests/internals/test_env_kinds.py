"""Environments with slips of their own, by kind: what they hand out has one form, or one line says what is wrong."""

import contextlib
import fractions
import math
import multiprocessing
import re
import sys
import threading
import time
import types

import gymnasium as gym
import numpy as np
import odd_envs
import pytest
import torch
from conftest import envs_of
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from odd_envs import odd

from common import args, final_obs
from common.args import beside_training
from common.internals.vector.guard import EnvError, Guarded
from common.internals.vector.make import import_env_module
from common.internals.vector.observations import adapted, observer
from common.internals.vector.spaces import RESERVED, as_flag, as_info, as_number, in_columns
from common.internals.vector.workers import CLOSING, Workers

BOTH = pytest.mark.parametrize("async_envs", [False, True])
IMAGE = Box(0, 255, (3, 40, 44), np.uint8)


def box(shape, dtype, low=0, high=1):
    return Box(low, high, shape, dtype)


def play(envs, steps=6):
    envs.reset(seed=1)
    for _ in range(steps):
        result = envs.step(torch.zeros(envs.num_envs, dtype=torch.int64))
    return result


def fails(capfd, env_id, async_envs=False, num_envs=2, steps=6, **more):
    """The exit code and the lines on stderr of a run of the environment."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        play(envs_of(env_id, num_envs, async_envs, **more), steps)
    return stop.value.code, capfd.readouterr().err.splitlines()


# Infos


@BOTH
@pytest.mark.parametrize("key", sorted(RESERVED))
def test_an_environments_own_keys_are_never_taken_for_the_librarys(key, async_envs):
    value = {"final_obs": np.full(1, 77, np.float32), "episode": {"r": 1000.0, "l": 7}}.get(key, 5)
    envs = envs_of(odd(info={key: value, "mine": 3}), 2, async_envs)
    _, infos = envs.reset(seed=1)
    assert infos.keys() == {"mine", "_mine"}
    for t in range(1, 9):
        next_obs, _, terminations, truncations, infos = envs.step(torch.zeros(2, dtype=torch.int64))
        assert infos["mine"].tolist() == [3, 3]
        assert not terminations.any()
        assert ("episode" in infos) == truncations.all() == (t % 4 == 0)
        if t % 4 == 0:
            assert infos["episode"]["r"].tolist() == [4.0, 4.0]
            assert infos["episode"]["l"].tolist() == [4, 4]
            assert infos["final_info"].keys() == {"mine", "_mine"}
            assert final_obs(next_obs, infos).tolist() == [[4.0], [4.0]]
        else:
            assert "lives" not in infos and "final_obs" not in infos
    envs.close()


def test_lives_are_no_terminations_but_in_ale():
    envs = envs_of("Lives-v0", 1, terminal_on_life_loss=True)
    envs.reset(seed=1)
    ends = [bool(envs.step(torch.zeros(1, dtype=torch.int64))[2]) for _ in range(12)]
    assert ends == [False] * 11 + [True]


def by_hand(*rows):
    return in_columns({i: row for i, row in enumerate(rows) if row}, len(rows))


@pytest.mark.parametrize(
    ("rows", "dtype", "column"),
    [
        (({"x": 2.5}, {}, {"x": 1.0}), np.float64, [2.5, 0, 1]),
        (({"x": 1}, {"x": 1.5}), object, [1, 1.5]),
        (({"x": True}, {"x": 2}), object, [True, 2]),
        (({"x": np.float32(0.1)}, {"x": 0.1}), object, [np.float32(0.1), 0.1]),
        (({"x": 2.5}, {}, {"x": 1}), object, [2.5, None, 1]),
        (({"x": 2**53 + 1}, {"x": 0.5}), object, [2**53 + 1, 0.5]),
        (({"x": 2**70}, {"x": 1}), object, [2**70, 1]),
        (({"x": np.uint64(2**63 + 1)}, {"x": -1}), object, [2**63 + 1, -1]),
        (({"x": 1}, {"x": "far"}), object, [1, "far"]),
        (({"x": None}, {"x": 1.0}), object, [None, 1.0]),
        (({"x": None}, {}), object, [None, None]),
        (({"x": {"y": 1}}, {"x": 3}), object, [{"y": 1}, 3]),
        (({"x": [1, 2]}, {"x": [1]}), object, [[1, 2], [1]]),
        (({"x": "a"}, {"x": "abc"}), object, ["a", "abc"]),
        (({"x": np.array([1, 2])}, {}, {"x": np.array([3, 4])}), np.int64, [[1, 2], [0, 0], [3, 4]]),
        (({"x": 1 + 2j}, {"x": 1}), object, [1 + 2j, 1]),
    ],
)
def test_a_column_of_infos_holds_each_value_as_it_is(rows, dtype, column):
    columns = by_hand(*rows)
    assert columns["x"].dtype == dtype
    assert columns["x"].tolist() == column
    assert columns["_x"].tolist() == [bool(row) for row in rows]


def test_arrays_that_grow_and_dicts_that_change_are_gathered():
    columns = by_hand({"path": np.arange(2), "d": {"a": 1}}, {"path": np.arange(3), "d": {"b": 2.5}})
    assert [part.tolist() for part in columns["path"]] == [[0, 1], [0, 1, 2]]
    assert (columns["d"]["a"].tolist(), columns["d"]["_a"].tolist()) == ([1, 0], [True, False])
    assert (columns["d"]["b"].tolist(), columns["d"]["_b"].tolist()) == ([0, 2.5], [False, True])
    assert columns["_d"].tolist() == [True, True]
    endless = {}
    endless["again"] = endless
    assert "again" in by_hand(endless)["again"]
    assert by_hand({"x": 1, "_x": 7})["_x"].tolist() == [True]  # the name of a mask is the mask


def test_columns_of_one_type_are_those_of_gymnasium():
    rows = [{"f": 0.5, "i": 3, "b": True, "a": np.arange(3), "n": {"g": np.float32(2)}, "s": "x"}, {"f": 1.5}]
    gymnasiums = SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    theirs = {}
    for i, row in enumerate(rows):
        theirs = gymnasiums._add_info(theirs, row, i)

    def plain(columns):
        return {k: plain(v) if isinstance(v, dict) else (v.dtype, v.tolist()) for k, v in columns.items()}

    assert plain(by_hand(*rows)) == plain(theirs)


@BOTH
@pytest.mark.parametrize("info", [None, [("a", 1)], "text", np.arange(3), 5])
def test_an_info_that_is_no_dict_is_an_empty_one(info, async_envs):
    envs = envs_of(odd(info=lambda t: info), 2, async_envs)
    assert envs.reset(seed=1)[1] == {}
    assert envs.step(torch.zeros(2, dtype=torch.int64))[4] == {}
    envs.close()
    assert as_info(types.MappingProxyType({"a": 1})) == {}


def test_an_info_that_a_worker_cannot_send_is_left_out_after_one_warning(capfd):
    envs = envs_of(odd(info=lambda t: {"lock": threading.Lock(), "t": t, "nested": {"x": [1]}}), 1, True)
    envs.reset(seed=1)
    for _ in range(3):
        infos = envs.step(torch.zeros(1, dtype=torch.int64))[4]
        assert "lock" not in infos
        assert infos["_t"].tolist() == [True]
    envs.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "warning: what infos['lock'] holds cannot leave its process, and is left out"


# Observations


@pytest.mark.parametrize(
    ("space", "shape", "dtype"),
    [
        (box((4,), np.uint8), (4,), np.float32),
        (box((4, 5), np.uint8), (4, 5), np.float32),
        (box((2, 3, 40, 40), np.float32), (2, 3, 40, 40), np.float32),
        (box((4,), np.bool_), (4,), np.float32),
        (box((4,), np.int64, -10, 10), (4,), np.float32),
        (box((4,), np.float16), (4,), np.float32),
        (box((4,), np.float64, -1e300, 1e300), (4,), np.float32),
        (box((), np.float32), (1,), np.float32),
        (box((), np.int32), (1,), np.float32),
        (box((3, 40, 44), np.uint8), (3, 40, 44), np.uint8),
        (box((40, 44, 3), np.uint8), (3, 40, 44), np.uint8),
        (box((40, 44, 1), np.uint8), (1, 40, 44), np.uint8),
        (box((40, 44, 4), np.uint8), (4, 40, 44), np.uint8),
        (box((4, 84, 84), np.uint8), (4, 84, 84), np.uint8),
        (box((4, 44, 3), np.uint8), (4, 44, 3), np.uint8),  # channels first already
        (box((12, 84, 84), np.uint8), (12, 84, 84), np.uint8),
    ],
)
def test_the_space_that_scripts_see(space, shape, dtype):
    seen = adapted(space)
    assert (seen.shape, seen.dtype) == (shape, dtype)
    assert adapted(seen) is seen
    obs = space.sample()
    ours = observer(space)(obs)
    assert (ours.shape, ours.dtype) == (shape, dtype)
    if space.shape[-1:] == shape[-1:]:
        assert np.array_equal(ours, obs.astype(dtype))
    elif space.shape:
        assert np.array_equal(ours, np.moveaxis(obs, 2, 0))


@BOTH
def test_training_sees_the_adapted_space_and_the_values_are_not_rescaled(async_envs):
    values = {"u8": box((2,), np.uint8, 0, 255), "scalar": box((), np.int64, 0, 9), "last": box((36, 40, 3), np.uint8)}
    for space in values.values():
        envs = envs_of(odd(space=space), 2, async_envs)
        obs, _ = envs.reset(seed=1)
        assert obs.shape == (2, *envs.single_observation_space.shape)
        assert obs.dtype == (torch.uint8 if len(space.shape) == 3 else torch.float32)
        for t in (1, 2, 3):
            obs, *_ = envs.step(torch.zeros(2, dtype=torch.int64))
            assert (obs == t).all()
        next_obs, *_, infos = envs.step(torch.zeros(2, dtype=torch.int64))
        assert (next_obs == 0).all() and (final_obs(next_obs, infos) == 4).all()
        envs.close()


@BOTH
def test_reset_and_step_may_differ_in_type(async_envs):
    kinds = [np.zeros(2), [0, 0], [0.5, 1], np.array([1, 2], np.int8), (0, True), torch.tensor([0.25, 3])]
    kinds.append(torch.tensor([2.0, 1.0], requires_grad=True))
    envs = envs_of(odd(obs=lambda t: kinds[t % len(kinds)], space=box((2,), np.float32, -9, 9)), 1, async_envs)
    seen = [envs.reset(seed=1)[0]]
    for _ in range(3):
        seen.append(envs.step(torch.zeros(1, dtype=torch.int64))[0])
    envs.close()
    assert [obs.tolist() for obs in seen] == [[[0, 0]], [[0, 0]], [[0.5, 1]], [[1, 2]]]
    observe = observer(box((2,), np.float32))
    assert [observe(kind).tolist() for kind in kinds[4:]] == [[0, 1], [0.25, 3], [2, 1]]


@pytest.mark.parametrize(
    ("obs", "says"),
    [
        (np.zeros(3), "shape (3,), its space (2,)"),
        (np.zeros((2, 1)), "shape (2, 1), its space (2,)"),
        (0.5, "shape (), its space (2,)"),
        ([0.5, None], "no array of numbers"),
        ([[1], [1, 2]], "no array of numbers"),
        (None, "no array of numbers but None"),
        ({"a": 1}, "no array of numbers but {'a': 1}"),
        ("ab", "no array of numbers but 'ab'"),
        (np.array(["1", "2"]), "no array of numbers"),
        (np.array([1, 2], object), "no array of numbers"),
        (np.array([1, 2j]), "no array of numbers"),
        (np.array([0, 1], "datetime64[s]"), "no array of numbers"),
        (np.ma.array([1, 2], mask=[True, False]), "no array of numbers"),
    ],
)
def test_an_observation_that_is_none_is_refused(obs, says):
    with pytest.raises(ValueError) as error:
        observer(box((2,), np.float32))(obs)
    assert says in str(error.value)


@pytest.mark.parametrize("value", [0.5, 300, -1, 256.0, math.nan, math.inf])
def test_a_value_that_uint8_cannot_hold_is_refused(value):
    with pytest.raises(ValueError, match="which uint8 cannot hold"):
        observer(IMAGE)(np.full(IMAGE.shape, value))


@pytest.mark.parametrize("value", [7, 255.0, True, np.int64(3), np.float32(200)])
def test_a_value_that_uint8_can_hold_is_cast(value):
    assert (observer(IMAGE)(np.full(IMAGE.shape, value)) == int(value)).all()


@BOTH
def test_a_refused_observation_is_exit_5_with_number_and_reason(capfd, async_envs):
    env_id = odd(obs=lambda t: np.zeros(2 if t == 2 else 1))
    assert fails(capfd, env_id, async_envs) == (
        5,
        ["error: environment 0: its observation has shape (2,), its space (1,)"],
    )


def test_each_observation_is_a_copy():
    for space in (odd_envs.LINE, box((1,), np.float64), box((), np.float32), IMAGE, box((36, 36, 3), np.uint8)):
        mine = np.zeros(space.shape, space.dtype)
        assert not np.shares_memory(observer(space)(mine), mine)
        guarded = Guarded(lambda s=space, o=mine: odd_envs.Odd(obs=o, space=s), 0)
        assert not np.shares_memory(guarded.reset()[0], mine)
        assert not np.shares_memory(guarded.step(0)[0], mine)


# Rewards and endings

ONES = [1, True, 1.0, np.float32(1), np.array(1), np.array([1.0]), np.array([[1]]), [1], torch.tensor(1.0)]
ONES += [torch.ones(1, requires_grad=True), np.bool_(True), np.ones(1, np.float16)]


@BOTH
def test_an_array_of_one_number_is_that_number(async_envs):
    rewards = ONES[:4] if async_envs else ONES
    for one in rewards:
        envs = envs_of(odd(reward=one, end=lambda t, one=one: one if t == 2 else np.zeros(1)), 2, async_envs)
        envs.reset(seed=1)
        for t in (1, 2):
            _, reward, terminations, truncations, infos = envs.step(torch.zeros(2, dtype=torch.int64))
            assert reward.tolist() == [1.0, 1.0] and reward.dtype == torch.float32
            assert terminations.tolist() == [t == 2] * 2 and not truncations.any()
        assert infos["episode"]["r"].tolist() == [2.0, 2.0]
        envs.close()
    for one in ONES:
        assert (as_number(one, "x"), as_flag(one, "x")) == (1.0, True)


@BOTH
@pytest.mark.parametrize("what", ["reward", "terminated"])
def test_what_is_not_one_number_is_exit_5_and_named(capfd, what, async_envs):
    for wrong, shown in ((np.ones(2), "array([1., 1.])"), (None, "None"), ("far", "'far'")):
        env_id = odd(**{{"reward": "reward", "terminated": "end"}[what]: lambda t, wrong=wrong: wrong})
        code, (line,) = fails(capfd, env_id, async_envs)
        kind = type(wrong).__name__
        assert (code, line) == (5, f"error: environment 0: its {what} is not one number but {shown} ({kind})")


@pytest.mark.parametrize(
    "wrong",
    [1j, [], [1, 2], {}, np.array(None), np.array("1"), fractions.Fraction(1), torch.ones(2), b"1", object()],
)
def test_what_is_not_one_number(wrong):
    for convert in (as_number, as_flag):
        with pytest.raises(ValueError, match=r"^reward is not one number but"):
            convert(wrong, "reward")


@pytest.mark.parametrize("wrong", [0.5, 2, -1, math.nan, np.array([7])])
def test_an_ending_is_true_or_false(wrong):
    with pytest.raises(ValueError, match=r"^ending is neither true nor false but"):
        as_flag(wrong, "ending")


def test_a_reward_without_limit_is_not_finite(capfd):
    code, (line,) = fails(capfd, odd(reward=-(10**400)))
    assert (code, line) == (4, "error: environment 0: its reward is -inf at step 1 (as float32)")


@BOTH
@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (
            {"result": (np.zeros(1, np.float32), 1.0, False, {})},
            "step() must return (observation, reward, terminated, truncated, info), not a tuple of 4",
        ),
        ({"result": 7}, "step() must return (observation, reward, terminated, truncated, info), not 7 (int)"),
        (
            {"begin": np.zeros(2, np.float32)},
            "reset() must return (observation, info), not array([0., 0.], dtype=float32) (ndarray)",
        ),
    ],
)
def test_a_step_of_another_form_is_exit_5(capfd, parts, says, async_envs):
    code, (line,) = fails(capfd, odd(**parts), async_envs)
    assert (code, line) == (5, f"error: environment 0: {says}")


# Actions


def sent(space, actions, async_envs=False):
    """What arrives in an environment with this action space."""
    envs = envs_of(odd(actions=space), len(actions), async_envs)
    envs.reset(seed=1)
    envs.step(torch.as_tensor(actions))
    arrived = [env.unwrapped.actions[0] for env in envs.vector.envs]
    envs.close()
    return arrived


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        (np.int64, 0, 10),
        (np.int64, -(2**63), 2**63 - 1),
        (np.uint8, 0, 255),
        (np.int8, -128, 127),
        (np.uint64, 0, 2**64 - 1),
        (np.bool_, False, True),
        (np.int32, 5, 5),
    ],
)
def test_integer_boxes_get_whole_numbers_within_their_bounds(dtype, low, high):
    space = Box(np.array([low], dtype), np.array([high], dtype), dtype=dtype)
    given = [-1e30, -3.4, -0.6, 0.4, 0.6, 2.6, 254.6, 1e10, 1e30, 9.223372e18]
    arrived = sent(space, np.array(given, np.float32)[:, None])
    for action, value in zip(given, arrived, strict=True):
        assert value.dtype == dtype and value.shape == (1,)
        assert int(value[0]) == min(max(round(float(np.float32(action))), int(low)), int(high))
    (exact,) = sent(space, torch.tensor([[2**53 + 1]]))
    assert int(exact[0]) == min(max(2**53 + 1, int(low)), int(high))


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(np.float32, -2, 3), (np.float64, -0.1, 0.1), (np.float16, -9, 9), (np.float64, -np.inf, 1e300)],
)
def test_float_boxes_get_their_own_dtype(dtype, low, high):
    space = Box(low, high, (1,), dtype)
    given = [-1e30, -0.05, 0.0, 0.07, 1e6, 3e38]
    for action, value in zip(given, sent(space, np.array(given, np.float32)[:, None]), strict=True):
        expected = min(max(float(np.float32(action)), float(space.low[0])), float(space.high[0]))
        assert value.dtype == dtype
        assert value[0] == dtype(expected)


@pytest.mark.parametrize("space", [Box(-1, 1, (2,)), Box(-np.inf, np.inf, (2,)), Box(0, 9, (2,), np.int64)])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_an_action_that_is_not_finite_is_exit_4(capsys, space, wrong):
    with pytest.raises(SystemExit) as stop:
        sent(space, np.array([[0, 0], [0, wrong]], np.float32))
    assert stop.value.code == 4
    assert capsys.readouterr().err == f"error: environment 1: its next action is {wrong} at step 0 (as float32)\n"


# Processes


MODULE = """
import gymnasium, odd_envs
gymnasium.register("Beside-v0", odd_envs.Odd, kwargs={"reward": lambda t: 2.5 if t < 3 else None, "info": {"x": 1}})
"""


@pytest.mark.parametrize("method", [pytest.param("forkserver", marks=pytest.mark.slow), "spawn"])
def test_workers_work_with_every_start_method(capfd, monkeypatch, tmp_path, method):
    """With spawn the module is in the current folder only; with forkserver the trainer alone knows the environment."""
    context = multiprocessing.get_context(method)
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", context)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside_me.py").write_text(MODULE)
    env_id = "beside_me:Beside-v0" if method == "spawn" else odd(reward=lambda t: 2.5 if t < 3 else None, info={"x": 1})
    envs = envs_of(env_id, 1, async_envs=True, allow_import=True)
    _, rewards, _, _, infos = play(envs, 2)
    assert rewards.tolist() == [2.5] and infos["x"].tolist() == [1]
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        envs.step(torch.zeros(1, dtype=torch.int64))
    assert stop.value.code == 5
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "error: environment 0: its reward is not one number but None (NoneType)"
    assert not envs.vector.processes[0].is_alive()


def test_modules_are_found_in_the_current_folder_beside_the_script_and_where_told(monkeypatch, tmp_path, capsys):
    places = [tmp_path / name for name in ("current", "script", "told")]
    for place in places:
        place.mkdir()
        (place / f"kinds_{place.name}.py").write_text("")
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(places[0])
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(places[1] / "train.py"), raising=False)
    for _ in range(2):
        for place in places:
            import_env_module(f"kinds_{place.name}", [str(places[2])])
    assert [sys.path.count(str(place)) for place in places] == [1, 1, 1]
    assert sys.path[-3:] == [str(place) for place in places]
    for text in ("import nothing_of_this_name", "1/0", "(", "raise SystemExit(0)"):
        (places[0] / "kinds_broken.py").write_text(text)
        with pytest.raises(SystemExit) as stop:
            import_env_module("kinds_broken")
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        envs_of("kinds_current:Lacks-v0", 1, allow_import=True)
    assert stop.value.code == 2
    assert "Lacks" in capsys.readouterr().err


# Exits, hangs, close


@BOTH
@pytest.mark.parametrize("code", [0, 3, "bye"])
def test_an_environment_that_exits_is_exit_5(capfd, code, async_envs):
    for where in ("reward", "begin"):
        exits = odd(**{where: lambda t, code=code: sys.exit(code)})
        method = "reset" if where == "begin" else "step"
        exit_code, (line,) = fails(capfd, exits, async_envs)
        assert exit_code == 5
        assert line.startswith(f"error: environment 0 failed in {method}(): SystemExit: {code} (test_env_kinds.py:")


class Exits(odd_envs.Odd):
    def __init__(self):
        sys.exit(0)


class InWorker(odd_envs.Odd):
    """Exits in a process of its own only."""

    def __init__(self):
        super().__init__()
        if multiprocessing.parent_process():
            sys.exit(0)


def registered(kind):
    gym.registry.pop(f"{kind.__name__}-v0", None)
    gym.register(f"{kind.__name__}-v0", kind)
    return f"{kind.__name__}-v0"


@pytest.mark.parametrize(("kind", "async_envs"), [(Exits, False), (Exits, True), (InWorker, True)])
def test_a_constructor_that_exits_is_exit_5(capfd, kind, async_envs):
    code, (line,) = fails(capfd, registered(kind), async_envs)
    assert code == 5
    assert "cannot be made: environment 0 failed in __init__(): SystemExit: 0 (test_env_kinds.py:" in line


def test_the_last_words_of_a_worker_that_has_ended_are_read(capfd, monkeypatch):
    call = Workers._call

    def late(self, *words):
        self.processes[0].join(10)
        return call(self, *words)

    monkeypatch.setattr(Workers, "_call", late)
    code, (line,) = fails(capfd, registered(InWorker), async_envs=True)
    assert (code, "failed in __init__(): SystemExit: 0" in line) == (5, True)


def test_an_error_without_words_is_still_named(capfd):
    class SilentError(Exception):
        def __str__(self):
            raise ValueError

    def fault(t):
        raise SilentError

    code, (line,) = fails(capfd, odd(reward=fault))
    assert (code, line.partition(" (")[0]) == (5, "error: environment 0 failed in step(): SilentError")


def sleep(t=0):
    time.sleep(30)


class Hangs(odd_envs.Odd):
    def __init__(self):
        sleep()


@BOTH
@pytest.mark.parametrize("where", ["reward", "begin", "__init__"])
def test_a_hang_ends_in_time_with_the_place(capfd, where, async_envs):
    hangs = registered(Hangs) if where == "__init__" else odd(**{where: sleep})
    began = time.monotonic()
    code, (line,) = fails(capfd, hangs, async_envs, env_timeout=0.5)
    assert 0.5 <= time.monotonic() - began < 5
    assert code == 5
    place = f"test_env_kinds.py:{sleep.__code__.co_firstlineno + 1}"
    assert line.endswith(f"environment 0 has not answered within --env-timeout: it hangs in sleep ({place})")


def test_a_worker_that_the_signal_does_not_reach_is_killed(capfd, monkeypatch):
    def deaf(t):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(EnvError):
                time.sleep(30)

    began = time.monotonic()
    code, (line,) = fails(capfd, odd(reward=deaf), async_envs=True, env_timeout=0.5)
    assert time.monotonic() - began < 5
    assert (code, line) == (5, "error: environment 0 has not answered within --env-timeout: it hangs outside of Python")


def test_an_environment_that_does_not_hear_the_signal_ends_the_process(capfd, monkeypatch):
    """As one that hangs in C, with Python's lock released, would."""
    ended = []
    monkeypatch.setattr("common.internals.vector.workers.os._exit", ended.append)

    def deaf(t):
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            with contextlib.suppress(EnvError):
                time.sleep(0.01)
        return 1.0

    play(envs_of(odd(reward=deaf), 2, env_timeout=0.3), 1)
    assert ended == [5]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: environment 0 has not answered within --env-timeout: it hangs in ")
    assert "deaf (test_env_kinds.py:" in line


def test_a_hang_beside_training_is_a_warning(capfd):
    with beside_training("evaluation"):
        play(envs_of(odd(reward=sleep), 1, env_timeout=0.5))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: evaluation failed, training goes on: environment 0 has not answered within")


def shut():
    raise AttributeError("no window")


@BOTH
@pytest.mark.parametrize("closing", [shut, lambda: sys.exit(0)])
def test_a_close_that_fails_is_one_warning(capfd, monkeypatch, closing, async_envs):
    monkeypatch.setattr(args, "_warned", set())
    for _ in range(2):
        envs = envs_of(odd(shut=closing), 3, async_envs)
        play(envs)
        envs.close()
        envs.close()
        assert envs.vector.closed  # or gymnasium closes it again
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: {CLOSING} failed, training goes on: environment 0 failed in close(): ")
    if async_envs:
        assert not any(process.is_alive() for process in envs.vector.processes)


def test_a_close_that_fails_in_a_worker_only_is_one_warning(capfd, monkeypatch):
    def in_worker():
        if multiprocessing.parent_process():
            raise OSError

    monkeypatch.setattr(args, "_warned", set())
    envs = envs_of(odd(shut=in_worker), 3, async_envs=True)
    play(envs)
    envs.close()
    (line,) = capfd.readouterr().err.splitlines()
    first = re.sub("[012]", "0", line, count=1)  # they close at the same time
    assert first.startswith(f"warning: {CLOSING} failed, training goes on: environment 0 failed in close(): OSError")
    assert [process.exitcode for process in envs.vector.processes] == [0, 0, 0]


def test_all_environments_are_closed_if_the_first_fails():
    closed = []

    def first():
        closed.append(1)
        raise OSError

    envs_of(odd(shut=first), 3).close()
    assert closed == [1, 1, 1]


def test_a_close_that_hangs_ends_and_the_others_are_left_alone(capfd):
    asked = []

    def hang():
        asked.append(1)
        sleep()

    began = time.monotonic()
    envs = envs_of(odd(shut=hang), 3, env_timeout=0.5)
    play(envs)
    envs.close()
    assert time.monotonic() - began < 5
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: {CLOSING} failed, training goes on: environment 0 has not answered within")
    assert asked == [1]


def test_a_close_that_hangs_in_a_worker_ends(capfd, monkeypatch):
    monkeypatch.setattr("common.internals.vector.workers.CLOSE_SECONDS", 0.5)
    envs = envs_of(odd(shut=sleep), 2, async_envs=True)
    play(envs)
    envs.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"warning: {CLOSING} failed, training goes on: environment 0 did not close within 0.5 s"
    assert not any(process.is_alive() for process in envs.vector.processes)


def test_what_is_saved_after_a_failure_is_the_last_completed_step():
    def third(t):
        if t == 3:
            raise OSError
        return 1.0

    envs = envs_of(odd(reward=third), 1)
    states = []
    envs.on_failure = lambda: states.append(envs.state_dict(snapshots=False))
    with pytest.raises(SystemExit) as stop:
        play(envs)
    assert stop.value.code == 5
    (state,) = states
    assert (state["steps"], state["returns"].tolist(), state["began"].tolist()) == (2, [2.0], [0])
    assert state["obs"].tolist() == [[2.0]]
    with pytest.raises(SystemExit):
        envs._failed("again", OSError())
    assert len(states) == 1
