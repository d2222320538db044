"""Of every kind of state that an environment has: it goes on to the bit, or one warning names attribute and type."""

import kinds_of_state
import pytest
import torch
from kinds_of_state import EXACT, NAMED, number
from test_snapshot import through_a_file

from common import args, make_envs


@pytest.fixture(autouse=True)
def warns_anew(monkeypatch):
    monkeypatch.setattr(args, "_warned", set())


def play(vector, steps):
    out = []
    for _ in range(steps):
        obs, rewards, _, truncations, _ = vector.step(torch.zeros(vector.num_envs, dtype=torch.int64))
        out.append([obs.tolist(), rewards.tolist(), truncations.tolist()])
    return out


def begun(name, async_envs):
    vector = make_envs(f"Kind{number(name)}-v0", 1 if async_envs else 2, async_envs)
    vector.reset(seed=1)
    vector.check_snapshots()
    play(vector, 11)  # in the middle of the second episode
    return vector


@pytest.mark.parametrize("async_envs", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("name", [name for name in EXACT])
def test_known_state_goes_on_to_the_bit(name, async_envs, capfd):
    vector, other = begun(name, async_envs), make_envs(f"Kind{number(name)}-v0", 1 if async_envs else 2, async_envs)
    try:
        state = through_a_file(vector.state_dict())
        if name == "class attribute" and not async_envs:
            made, visits = kinds_of_state.Kind.made, list(kinds_of_state.Kind.visits)
        expected = play(vector, 25)
        if name == "class attribute" and not async_envs:  # both environments have it in one process
            kinds_of_state.Kind.made, kinds_of_state.Kind.visits[:] = 0, []
        assert capfd.readouterr().err == ""
        other.load_state_dict(state)
        if name == "class attribute" and not async_envs:
            assert (made, visits) == (kinds_of_state.Kind.made, kinds_of_state.Kind.visits)
        assert capfd.readouterr().err == ""
        assert not other.began_anew
        assert play(other, 25) == expected
    finally:
        vector.close()
        other.close()


@pytest.mark.parametrize("async_envs", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("name", [name for name in NAMED])
def test_unknown_state_is_one_warning_with_attribute_and_type(name, async_envs, capfd):
    vector, other = begun(name, async_envs), make_envs(f"Kind{number(name)}-v0", 1 if async_envs else 2, async_envs)
    try:
        state = through_a_file(vector.state_dict())
        vector.state_dict()
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("warning: resume will start new episodes: attribute `x")
        assert f" of Kind is {'an' if NAMED[name][0][0] in 'aeiou' else 'a'} {NAMED[name][0]}" in line
        other.load_state_dict(state)
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("warning: new episodes begin")
        assert other.began_anew
    finally:
        vector.close()
        other.close()
