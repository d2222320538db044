"""Of every kind of state that an environment has: it goes on to the bit, or one warning names attribute and type."""

import io

import kinds_of_state
import pytest
import torch
from conftest import ROOT, envs_of
from kinds_of_state import EXACT, NAMED, number
from test_env_state import through_a_file

from common import args

# A worker walks through its environment as the trainer does; what differs is the process that names are looked up in.
IN_WORKERS = ("NumPy generator", "object as a key", "one of a module's objects", "closure", "class attribute")


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
    vector = envs_of(f"Kind{number(name)}-v0", 1 if async_envs else 2, async_envs)
    vector.reset(seed=1)
    vector.check_snapshots()
    play(vector, 11)  # in the middle of the second episode
    return vector


@pytest.mark.parametrize(("name", "async_envs"), [*((name, False) for name in EXACT), *((n, True) for n in IN_WORKERS)])
def test_known_state_goes_on_to_the_bit(name, async_envs, capfd):
    vector, other = begun(name, async_envs), envs_of(f"Kind{number(name)}-v0", 1 if async_envs else 2, async_envs)
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


@pytest.mark.parametrize(("name", "async_envs"), [*((name, False) for name in NAMED), ("Python generator", True)])
def test_unknown_state_is_one_warning_with_attribute_and_type(name, async_envs, capfd):
    vector, other = begun(name, async_envs), envs_of(f"Kind{number(name)}-v0", 1 if async_envs else 2, async_envs)
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


def pair(env_id, num_envs, async_envs, steps=11):
    vector, other = (envs_of(env_id, num_envs, async_envs) for _ in range(2))
    vector.reset(seed=1)
    play(vector, steps)
    return vector, other


@pytest.mark.parametrize("async_envs", [False, True], ids=["sync", "async"])
def test_an_environment_brings_its_own_state(async_envs, capfd):
    vector, other = pair("Owned-v0", 2, async_envs)
    other.load_state_dict(through_a_file(vector.state_dict()))
    assert play(vector, 25) == play(other, 25)
    assert capfd.readouterr().err == ""
    vector.close(), other.close()


@pytest.mark.parametrize(
    ("env_id", "says"),
    [
        ("Owned-raises-v0", "ZeroDivisionError"),
        ("Owned-unsaved-v0", "attribute `get_state()[]` of Owned is a generator"),
    ],
)
def test_state_of_ones_own_that_cannot_be_saved_is_one_warning(env_id, says, capfd):
    vector, _ = pair(env_id, 1, False)
    assert vector.state_dict()["snapshots"] is None
    (line,) = capfd.readouterr().err.splitlines()
    assert says in line


def bytes_of(state):
    file = io.BytesIO()
    torch.save(state, file)
    return len(file.getvalue())


@pytest.mark.parametrize("async_envs", [False, True], ids=["sync", "async"])
def test_large_arrays_that_never_change_are_in_no_checkpoint_and_others_once(async_envs):
    for env_id, least, most in (("Table-v0", 0, 60_000), ("Table-changes-v0", 1_600_000, 1_660_000)):
        vector, other = pair(env_id, 3, async_envs)
        state = vector.state_dict()
        assert least < bytes_of(state) < most
        other.load_state_dict(through_a_file(state))
        assert not other.began_anew
        assert play(vector, 25) == play(other, 25)
        vector.close(), other.close()


def test_a_large_array_drawn_without_a_seed_means_new_episodes(capfd):
    vector, other = pair("Table-unseeded-v0", 2, False)
    other.load_state_dict(through_a_file(vector.state_dict()))
    assert other.began_anew
    assert "is it drawn without a seed?" in capfd.readouterr().err
    assert other.obs.tolist() == [[0.0], [0.0]]


def test_a_large_snapshot_is_said_once(monkeypatch, capfd):
    monkeypatch.setattr("common.internals.resume.vector_state.LARGE_SNAPSHOT", 1e6)
    vector, _ = pair("Table-changes-v0", 2, False)
    vector.state_dict(), vector.state_dict()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: each checkpoint holds 2 MB")


def test_the_global_generators_of_workers_go_on():
    vector, other = pair("Global-v0", 2, True)
    other.load_state_dict(through_a_file(vector.state_dict()))
    assert play(vector, 9) == play(other, 9)
    vector.close(), other.close()


def test_state_without_snapshots_needs_no_worker(capfd):
    vector, other = pair("Owned-v0", 2, True)
    for process in vector.vector.processes:
        process.kill()
    state = through_a_file(vector.state_dict(snapshots=False))
    other.load_state_dict(state)
    assert other.began_anew
    assert "new episodes begin" in capfd.readouterr().err
    with pytest.raises(SystemExit) as stop:
        vector.state_dict()
    assert stop.value.code == 5
    vector.close(), other.close()


def test_state_that_was_there_for_a_while_costs_only_the_checkpoints_of_that_while():
    vector, other = pair(f"Kind{number('Python generator that shows late')}-v0", 1, False, steps=2)
    assert vector.state_dict()["snapshots"] is not None
    play(vector, 30)
    assert vector.state_dict()["snapshots"] is None
    vector.vector.envs[0].unwrapped.x = 1.0
    assert vector.state_dict()["snapshots"] is not None


def test_the_page_of_faults_has_the_table_of_kinds():
    page = (ROOT / "docs" / "faults.md").read_text()
    rows = [f"| {name} | exact |" for name in EXACT] + [f"| {name} | named: `{NAMED[name][0]}` |" for name in NAMED]
    assert "\n".join(rows) in page
