"""A fork's parent is found by its content, and the diff kept with the run turns the parent into the fork."""

import hashlib
import json
import random
import shutil
import subprocess

import pytest
from conftest import ROOT, only_run, run_script
from test_run import of_kind, wandb_records

from common.internals.tracking import provenance
from common.internals.tracking.provenance import PARENTS, is_saved_source, keep_source, parent_of

ALGOS = ROOT / "algos"


def edited(name, share, seed=0):
    """The script with `share` of its lines changed, and some cut."""
    rng = random.Random(seed)
    lines = (ALGOS / name).read_text().splitlines(keepends=True)
    lines = [f"{line.rstrip()}  # mine\n" if rng.random() < share else line for line in lines]
    return "".join(line for line in lines if rng.random() > share / 4)


def patched(parent, diff, tmp_path):
    """`parent` with `diff` applied by git, which knows nothing of how it was made."""
    folder = tmp_path / "patched"
    (folder / "algos").mkdir(parents=True)
    shutil.copy(parent, folder / "algos")
    diff = diff.replace(
        f"--- algos/{parent.name}\n+++ fork.py", f"--- a/algos/{parent.name}\n+++ b/algos/{parent.name}"
    )
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "apply", "-"], cwd=folder, input=diff, text=True, check=True)
    return (folder / "algos" / parent.name).read_text()


def test_every_script_of_ours_is_known_and_has_no_parent():
    assert sorted(PARENTS) == sorted(path.name for path in ALGOS.glob("*.py"))
    assert [parent_of(ALGOS / name) for name in PARENTS] == [None] * len(PARENTS)


@pytest.mark.parametrize("name", PARENTS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_the_parent_is_the_script_that_was_copied(name, share, tmp_path):
    fork = tmp_path / "fork.py"
    fork.write_text(edited(name, share))
    assert parent_of(fork) == ALGOS / name


def test_a_fork_beside_its_parent_is_a_fork(tmp_path, monkeypatch):
    for name in PARENTS:
        shutil.copy(ALGOS / name, tmp_path)
    monkeypatch.setattr("common.internals.tracking.provenance.ALGOS", tmp_path)
    (tmp_path / "my_sac.py").write_text(edited("sac.py", 0.1))
    assert parent_of(tmp_path / "my_sac.py") == tmp_path / "sac.py"
    assert parent_of(tmp_path / "dqn.py") is None


def test_a_script_like_none_of_ours_has_no_parent(tmp_path, monkeypatch):
    script = tmp_path / "fork.py"
    script.write_text("import torch\nimport common\n\nprint('something else')\n" * 30)
    assert parent_of(script) is None
    facts = keep_source(script, tmp_path / "source")
    assert facts["parent"] is None
    assert not (tmp_path / "source" / "parent.diff").exists()
    monkeypatch.setattr(
        "common.internals.tracking.provenance.ALGOS", tmp_path / "nowhere"
    )  # installed without the repository
    script.write_text(edited("ppo.py", 0))
    assert parent_of(script) is None


@pytest.mark.parametrize("ending", ["", "\n", "\n\n"])
def test_the_diff_turns_the_parent_into_the_fork(ending, tmp_path):
    code = edited("ppo.py", 0.2).rstrip("\n") + ending
    (tmp_path / "fork.py").write_text(code)
    facts = keep_source(tmp_path / "fork.py", tmp_path / "source")["parent"]
    diff = (tmp_path / "source" / "parent.diff").read_text()
    assert patched(ALGOS / "ppo.py", diff, tmp_path) == code.rstrip("\n") + (ending or "\n")
    stat = subprocess.run(
        ["git", "diff", "--no-index", "--numstat", ALGOS / "ppo.py", tmp_path / "fork.py"],
        capture_output=True,
        text=True,
    ).stdout.split()
    assert facts["lines_added"] - facts["lines_removed"] == int(stat[0]) - int(stat[1])


def test_a_run_of_a_fork_tells_its_parent_in_args_json_and_wandb(tmp_path):
    fork = tmp_path / "fork.py"
    fork.write_text((ALGOS / "dqn.py").read_text().replace("gamma: float = 0.99", "gamma: float = 0.98"))
    run_script("--total-timesteps", 300, "--learning-starts", 100, "--eval-episodes", 0, cwd=tmp_path, script=fork)
    run_dir = only_run(tmp_path / "runs")
    parent = json.loads((run_dir / "args.json").read_text())["parent"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert parent == {
        "script": "dqn.py",
        "sha256": hashlib.sha256((ALGOS / "dqn.py").read_bytes()).hexdigest(),
        "git_commit": commit or None,
        "lines_added": 1,
        "lines_removed": 1,
    }
    diff = (run_dir / "source" / "parent.diff").read_text()
    assert "-    gamma: float = 0.99\n+    gamma: float = 0.98\n" in diff
    _, records = wandb_records(run_dir)
    (run,) = of_kind(records, "run")
    assert run["config"]["update"]["parent"] == parent
    code = next(artifact for artifact in of_kind(records, "artifact") if artifact["type"] == "code")
    assert "parent.diff" in [entry["path"] for entry in code["manifest"]["contents"]]


def repository(folder):
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def test_source_and_changes_keep_their_bytes(tmp_path):
    code = ("# -*- coding: latin-1 -*-\n" + edited("dqn.py", 0.1) + "# \xe9\n").encode("latin-1", "replace")
    (tmp_path / "fork.py").write_bytes(code)
    (tmp_path / "notes.txt").write_text("plain\n")
    (tmp_path / "two\nlines").write_bytes(b"a\n")
    repository(tmp_path)
    (tmp_path / "notes.txt").write_bytes(b"caf\xe9 \xff\n")
    (tmp_path / "two\nlines").write_bytes(b"\x00\x01")
    facts = keep_source(tmp_path / "fork.py", tmp_path / "source")
    assert (tmp_path / "source" / "fork.py").read_bytes() == code and facts["parent"]["script"] == "dqn.py"
    assert b"\n+# \xe9\n" in (tmp_path / "source" / "parent.diff").read_bytes()
    changes = (tmp_path / "source" / "uncommitted.diff").read_bytes()
    assert b"-plain\n+caf\xe9 \xff\n" in changes and b"Binary files" in changes
    assert is_saved_source(tmp_path / "fork.py", tmp_path)
    (tmp_path / "fork.py").write_bytes(code + b"\n")
    assert not is_saved_source(tmp_path / "fork.py", tmp_path)


def test_changes_that_are_too_long_are_cut_at_a_line_and_that_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "table.csv").write_text("")
    (tmp_path / "fork.py").write_text("import common\n")
    repository(tmp_path)
    (tmp_path / "table.csv").write_text("0123456\n" * 100_000)
    monkeypatch.setattr(provenance, "MOST_CHANGES", 10_000)
    keep_source(tmp_path / "fork.py", tmp_path / "source")
    lines = (tmp_path / "source" / "uncommitted.diff").read_text().splitlines()
    assert lines[-1] == "[the rest is left out: it is too long]" and lines[-2] == "+0123456" and len(lines) < 1200
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "first 10,000 bytes" in warning


def test_a_script_that_is_gone_costs_a_warning(tmp_path, capsys):
    facts = keep_source(tmp_path / "gone.py", tmp_path / "source")
    assert facts == {"git_commit": None, "parent": None} and not list((tmp_path / "source").iterdir())
    assert "gone.py cannot be read" in capsys.readouterr().err
