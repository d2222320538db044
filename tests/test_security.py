"""Secrets stay out of run directories and of what W&B gets; nothing but the user's own code is ever run."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, only_run, run_script

from common.redact import redact, redact_argv

PLANTED = {
    "an environment variable": "env-5f4dcc3b5aa765d61d",
    "a flag": "flag-9c1185a5c5e9fc5461",
    "the notes": "sk-notesnotes2808976e8fd7",
    "a tag": "ghp_tagtag8976e8fd72808",
    "the git remote": "remote-77de68daecd823ba",
    "committed code": "code-b7a875fc1ea228b906",
    "uncommitted code": "diff-e358efa489f58062f1",
}


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fork")
    source = Path(ROOT, "algos", "dqn.py").read_text()
    mine = """class Args(common.RunArgs):
    service_api_key: str = ""
    '''of a service'''
    notes_file: str = ""
    '''of no use'''
"""
    source = source.replace("class Args(common.RunArgs):\n", mine)
    (folder / "fork.py").write_text(source + f'\nSERVICE_TOKEN = "{PLANTED["committed code"]}"\n')
    git(folder, "init", "-q")
    git(folder, "remote", "add", "origin", f"https://me:{PLANTED['the git remote']}@example.org/fork.git")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "fork")
    with (folder / "fork.py").open("a") as file:
        file.write(f"password = '{PLANTED['uncommitted code']}'\n")
    return folder


def test_no_secret_is_in_any_byte_of_a_run(fork, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_API_KEY", PLANTED["an environment variable"])
    monkeypatch.chdir(fork)
    flags = ["--total-timesteps", 300, "--learning-starts", 100, "--eval-episodes", 1, "--runs-dir", tmp_path]
    flags += ["--wandb-notes", f"see {PLANTED['the notes']} and {PLANTED['an environment variable']}"]
    flags += ["--wandb-tags", PLANTED["a tag"], "--notes-file", f"x{PLANTED['an environment variable']}"]
    secret = ["--service-api-key", PLANTED["a flag"]]
    run_script(*flags, *secret, script=fork / "fork.py")
    run_dir = only_run(tmp_path)
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        for where, planted in PLANTED.items():
            assert planted.encode() not in path.read_bytes(), f"{where}: {path}"
    facts = json.loads((run_dir / "args.json").read_text())
    assert facts["service_api_key"] == "[redacted]"
    assert len(facts["git_commit"]) == 40
    source = (run_dir / "source" / "fork.py").read_text()
    compile(source, "fork.py", "exec")
    assert 'SERVICE_TOKEN = "[redacted]"' in source
    assert "+password = '[redacted]'" in (run_dir / "source" / "uncommitted.diff").read_text()

    (run_dir / "finished.json").unlink()
    done = run_script("--resume", run_dir, script=fork / "fork.py", check=2)
    assert "--service-api-key was not kept, as it is a secret: give it again" in done.stderr
    done = run_script("--resume", run_dir, *secret, *flags[-2:], script=fork / "fork.py")
    assert "changed" not in done.stderr


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('token = "abcdefgh"', 'token = "[redacted]"'),
        ("{'db_password': 'abc defgh'}", "{'db_password': '[redacted]'}"),
        ("git clone https://me:hunter2@example.org/x", "git clone https://[redacted]@example.org/x"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----", "[redacted]"),
        ("x AKIAIOSFODNN7EXAMPLE y", "x [redacted] y"),
        ("run.py --api-key abcdefgh --seed 1", "run.py --api-key [redacted] --seed 1"),
        ("token = read(path)", "token = read(path)"),
        ("max_tokens = 4096", "max_tokens = 4096"),
        ("https://doi.org/10.1038/nature14236", "https://doi.org/10.1038/nature14236"),
        ('key = "episodic_return"', 'key = "episodic_return"'),
    ],
)
def test_what_is_taken_for_a_secret(text, kept):
    assert redact(text) == kept


def test_names_of_arguments_decide():
    given = {"api_key": "x", "keyboard": "qwerty", "hidden_sizes": (64, 64), "token": "", "seeds": ["a"], "key": "k"}
    kept = {"api_key": "[redacted]", "keyboard": "qwerty", "hidden_sizes": (64, 64), "token": "", "seeds": ["a"]}
    assert redact(given) == {**kept, "key": "[redacted]"}
    assert redact_argv(["a.py", "--key", "k", "--secret=s3cr3t42", "--seed", "1"]) == [
        *("a.py", "--key", "[redacted]", "--secret=[redacted]", "--seed", "1")
    ]


def test_scripts_in_the_repository_are_copied_as_they_are():
    for path in [*Path(ROOT, "algos").glob("*.py"), *Path(ROOT, "common").glob("*.py")]:
        if path.name != "redact.py":  # its comments show what it looks for
            assert redact(path.read_text()) == path.read_text()
