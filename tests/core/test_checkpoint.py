"""Checkpoint files against kills, flipped bits, full disks and foreign pickles."""

import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checkpoint import Checkpoint
from common.internals.resume.checkpoint_files import FORMAT, load_latest, read_file, write_file

EVERYTHING = {
    "tensor": torch.arange(6, dtype=torch.float64).reshape(2, 3),
    "bool": torch.tensor([True, False]),
    "array": np.arange(4, dtype=np.uint8).reshape(2, 2),
    "zero_d": np.array(3.5),
    "scalar": np.float32(1.25),
    "flag": np.bool_(True),
    "large": 2**127 + 1,
    "tuple": (1, (2.5, None), [True, "text", b"bytes"]),
    7: {"deep": {"deeper": np.int64(-3)}},
}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray | np.generic):
        return type(a) is type(b) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_everything_comes_back_as_it_was_without_pickle(tmp_path):
    write_file(tmp_path / "x.pt", EVERYTHING)
    assert equal(EVERYTHING, read_file(tmp_path / "x.pt"))
    assert torch.load(tmp_path / "x.pt", weights_only=True).keys() == EVERYTHING.keys()


def test_what_would_need_pickle_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="not PosixPath"):
        write_file(tmp_path / "x.pt", {"path": Path("/")})
    assert not list(tmp_path.iterdir())


def checkpoint(folder, step, **more):
    write_file(folder / f"step-{step:012d}.pt", {"format": FORMAT, "step": step, "segments": {}, **more})


def test_300_flipped_bits_and_100_cuts_are_always_noticed_and_the_older_one_is_used(tmp_path, capsys):
    checkpoint(tmp_path, 100, weights=torch.randn(500))
    checkpoint(tmp_path, 200, weights=torch.randn(500))
    newest = tmp_path / f"step-{200:012d}.pt"
    whole = newest.read_bytes()
    rng = random.Random(0)
    for i in range(400):
        data = bytearray(whole)
        if i < 300:
            bit = rng.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
        else:
            del data[rng.randrange(len(data)) :]
        newest.write_bytes(data)
        assert load_latest(tmp_path)["step"] == 100
        assert capsys.readouterr().err.count("warning: skipping the broken checkpoint") == 1
        assert (tmp_path / f"step-{200:012d}.broken").read_bytes() == data
    newest.write_bytes(whole)
    assert load_latest(tmp_path)["step"] == 200


def test_a_broken_segment_breaks_the_checkpoints_that_need_it(tmp_path, capsys):
    write_file(tmp_path / "replay-000-100.pt", {"x": torch.zeros(3)})
    checkpoint(tmp_path, 100)
    checkpoint(tmp_path, 200, segments={"replay": [("replay-000-100.pt", 0, 100)]})
    assert load_latest(tmp_path)["step"] == 200
    (tmp_path / "replay-000-100.pt").write_bytes(b"nothing")
    assert load_latest(tmp_path)["step"] == 100


def test_a_checkpoint_of_another_format_is_not_read(tmp_path, capsys):
    write_file(tmp_path / f"step-{1:012d}.pt", {"format": 1, "step": 1, "segments": {}})
    with pytest.raises(SystemExit) as stop:
        load_latest(tmp_path)
    assert stop.value.code == 3
    assert "checkpoint format 1, and this version reads 3" in capsys.readouterr().err


def test_if_all_are_broken_the_run_does_not_begin_again(tmp_path, capsys):
    for step in (100, 200):
        (tmp_path / f"step-{step:012d}.pt").write_bytes(b"x" * 100)
    with pytest.raises(SystemExit) as stop:
        load_latest(tmp_path)
    assert stop.value.code == 3
    assert "2 are broken" in capsys.readouterr().err
    assert load_latest(tmp_path / "none") is None


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_is_never_run(how, tmp_path, capsys):
    marker, path = tmp_path / "marker", tmp_path / f"step-{1:012d}.pt"
    if how == "torch":
        torch.save({"format": FORMAT, "bomb": Bomb(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(marker)))
    # With a right checksum too: whoever can write the file can hash it.
    import hashlib

    data = path.read_bytes()
    path.write_bytes(data + b"SHA256:" + hashlib.sha256(data).digest())
    with pytest.raises(SystemExit) as stop:
        load_latest(tmp_path)
    assert stop.value.code == 3
    assert not marker.exists()


WRITER = """
import sys, torch
from pathlib import Path
from common.internals.resume.checkpoint_files import FORMAT, write_file
folder, step = Path(sys.argv[1]), int(sys.argv[2])
state = torch.randn(2_000_000)
print("ready", flush=True)
while True:
    step += 1
    write_file(folder / f"step-{step:012d}.pt", {"format": FORMAT, "step": step, "segments": {}, "x": state})
    for old in sorted(folder.glob("step-*.pt"))[:-2]:
        old.unlink()
"""


@pytest.mark.parametrize("kills", [4, pytest.param(25, marks=pytest.mark.slow)])
def test_a_kill_in_mid_write_never_costs_the_run(kills, tmp_path, capsys):
    rng, step, left_over = random.Random(1), 0, 0
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(step)], stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        while not list(tmp_path.glob("step-*.pt")):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        left_over += len(list(tmp_path.glob("*.tmp")))
        content = load_latest(tmp_path)
        assert content["step"] >= step
        step = content["step"]
        assert not list(tmp_path.glob("*.tmp"))
    assert capsys.readouterr().err == ""  # no checkpoint was broken
    assert left_over > 0  # or no kill fell into a write, and nothing was tested


class Part:
    """A ring of 10 slots; slot i holds the number of its last write."""

    def __init__(self):
        self.ring, self.written = np.full((10, 2), -1), 0

    def add(self):
        self.ring[self.written % 10] = self.written
        self.written += 1

    def rings(self):
        return {"ring": self.ring}, self.written

    def state_dict(self):
        return {"written": self.written}

    def load_state_dict(self, state):
        self.written = state["written"]


class FakeRun:
    def __init__(self, folder, save_interval=1, saved=None):
        from types import SimpleNamespace

        self.dir, self.saved, self.step = folder, saved, 0
        self.args = SimpleNamespace(save_interval=save_interval, total_timesteps=10**6)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def must_stop(self):
        return False

    def leave_out(self, seconds):
        pass

    def evaluation_due(self, step):
        return False


class FakeEnvs:
    obs = torch.ones(1)
    began_anew = False

    def check_snapshots(self):
        return True

    def state_dict(self, snapshots):
        return {}

    def load_state_dict(self, state):
        pass

    def reset(self, seed):
        return torch.zeros(1), {}


@pytest.mark.parametrize("stride", [1, 3, 7, 10, 25])
def test_rings_come_back_from_what_was_new_in_each_checkpoint(stride, tmp_path):
    part = Part()
    saver = Checkpoint(FakeRun(tmp_path), FakeEnvs(), part=part)
    saver.restore(torch.zeros(1))
    for step in range(1, 12):
        for _ in range(stride):
            part.add()
        assert saver.write(step)
        restored = Part()
        run = FakeRun(tmp_path, saved=load_latest(tmp_path / "checkpoints"))
        _, at = Checkpoint(run, FakeEnvs(), part=restored).restore(torch.zeros(1))
        assert at == step
        assert np.array_equal(part.ring, restored.ring)
        # The older checkpoint is whole as well.
        newest = max((tmp_path / "checkpoints").glob("step-*.pt"))
        hidden = newest.rename(newest.with_suffix(".hidden"))
        if step > 1:
            assert load_latest(tmp_path / "checkpoints")["step"] == step - 1
        hidden.rename(newest)
    files = list((tmp_path / "checkpoints").iterdir())
    assert len([f for f in files if f.name.startswith("step-")]) == 2
    assert sum(f.name.startswith("part-") for f in files) <= 10 // stride + 3


def test_a_resumed_run_goes_on_with_its_segments(tmp_path):
    part = Part()
    saver = Checkpoint(FakeRun(tmp_path), FakeEnvs(), part=part)
    saver.restore(torch.zeros(1))
    for step in range(1, 8):
        for _ in range(4):
            part.add()
        saver.write(step)
        part = Part()
        saver = Checkpoint(FakeRun(tmp_path, saved=load_latest(tmp_path / "checkpoints")), FakeEnvs(), part=part)
        assert saver.restore(torch.zeros(1))[1] == step
        assert part.ring.max() == 4 * step - 1
        assert sorted(part.ring[:, 0].tolist())[-min(10, 4 * step) :] == list(range(max(0, 4 * step - 10), 4 * step))


def test_weights_that_are_not_finite_are_not_written(tmp_path, capsys):
    net = torch.nn.Linear(2, 2)
    saver = Checkpoint(FakeRun(tmp_path), FakeEnvs(), net=net)
    saver.restore(torch.zeros(1))
    saver.write(1)
    with torch.no_grad():
        net.weight[0, 0] = float("nan")
    with pytest.raises(SystemExit) as stop:
        saver.write(2)
    assert stop.value.code == 4
    assert "net is not finite at step 2" in capsys.readouterr().err
    assert load_latest(tmp_path / "checkpoints")["step"] == 1


def test_a_full_disk_is_a_warning_and_the_last_checkpoint_stays(tmp_path, capsys):
    net = torch.nn.Linear(200, 200)
    saver = Checkpoint(FakeRun(tmp_path), FakeEnvs(), net=net)
    saver.restore(torch.zeros(1))
    assert saver.write(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        assert not saver.write(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "warning: no checkpoint at step 2: File too large; the last one is kept" in capsys.readouterr().err
    assert load_latest(tmp_path / "checkpoints")["step"] == 1
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))
    assert saver.write(3)
    assert load_latest(tmp_path / "checkpoints")["step"] == 3


def test_a_checkpoint_with_other_parts_than_the_script_is_one_line(tmp_path, capsys):
    saver = Checkpoint(FakeRun(tmp_path), FakeEnvs(), net=torch.nn.Linear(2, 2))
    saver.restore(torch.zeros(1))
    saver.write(1)
    for parts, says in (
        ({"net": torch.nn.Linear(2, 3)}, "net of the checkpoint at step 1 does not fit"),
        ({"network": torch.nn.Linear(2, 2)}, "has ['net'], the script has ['network']"),
    ):
        run = FakeRun(tmp_path, saved=load_latest(tmp_path / "checkpoints"))
        with pytest.raises(SystemExit) as stop:
            Checkpoint(run, FakeEnvs(), **parts).restore(torch.zeros(1))
        assert stop.value.code == 3
        err = capsys.readouterr().err
        assert says in err
        assert len(err.splitlines()) == 1


def test_save_interval_0_writes_nothing(tmp_path):
    saver = Checkpoint(FakeRun(tmp_path, save_interval=0), FakeEnvs(), net=torch.nn.Linear(2, 2))
    saver.restore(torch.zeros(1))
    saver.save(10**6)
    assert not saver.write(5)
    assert not (tmp_path / "checkpoints").exists()


def test_checkpoints_are_written_where_a_folder_cannot_be_opened(tmp_path, monkeypatch, capsys):
    """Windows: os.open of a folder is a PermissionError."""
    real = os.open

    def as_on_windows(path, flags, *words, **more):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *words, **more)

    monkeypatch.setattr(os, "open", as_on_windows)
    saver = Checkpoint(FakeRun(tmp_path), FakeEnvs(), part=Part())
    saver.restore(torch.zeros(1))
    assert saver.write(1) and saver.write(2)
    assert capsys.readouterr().err == ""
    assert load_latest(tmp_path / "checkpoints")["step"] == 2
