"""Secrets stay out of what a run and the tools write; a run directory from somebody else is data and leads nowhere."""

import base64
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load, only_run, run_script, train_with

from common.internals.resume.files import (
    data_file,
    finished_step,
    read_file,
    read_json,
    require_no_links,
    write_atomically,
)
from common.internals.tracking.redact import redact
from common.internals.tracking.run_dir import reopen
from common.tools import evaluate
from common.tools.compare import compare

SECRET = "env-5f4dcc3b5aa7/65d61d"
PLANTED = {
    "an environment variable": SECRET,
    "the notes": "sk-notesnotes2808976e8fd7",
    "a tag": "ghp_tagtag8976e8fd72808",
    "the git remote": "remote-77de68daecd823ba",
    "a flag": "flag-9c1185a5c5e9fc5461",
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
    obs_key: str = "state"
    '''of no use'''
"""
    source = source.replace("class Args(common.RunArgs):\n", mine)
    (folder / "fork.py").write_text(source + f'\ntokenizer = "byte-level"\nCOMMITTED = "{SECRET}"\n')
    git(folder, "init", "-q")
    git(folder, "remote", "add", "origin", f"https://me:{PLANTED['the git remote']}@example.org/fork.git")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "fork")
    with (folder / "fork.py").open("a") as file:
        file.write(f"password = '{SECRET}'\n")
    return folder


def test_no_secret_is_in_any_byte_of_a_run(fork, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_API_KEY", SECRET)
    monkeypatch.setenv("DB_PASSWORD", PLANTED["a flag"])
    monkeypatch.chdir(fork)
    flags = ["--total-timesteps", 300, "--learning-starts", 100, "--eval-episodes", 1, "--runs-dir", tmp_path]
    flags += ["--wandb-notes", f"see {PLANTED['the notes']} and {SECRET}", "--wandb-tags", PLANTED["a tag"]]
    secret = ["--service-api-key", f"x{PLANTED['a flag']}"]
    run_script(*flags, *secret, script=fork / "fork.py")
    run_dir = only_run(tmp_path)
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        for where, planted in PLANTED.items():
            assert planted.encode() not in path.read_bytes(), f"{where}: {path}"
    facts = json.loads((run_dir / "args.json").read_text())
    assert facts["service_api_key"] == "x[redacted]" and facts["obs_key"] == "state"
    assert len(facts["git_commit"]) == 40
    source = (run_dir / "source" / "fork.py").read_text()
    assert source == (fork / "fork.py").read_text().replace(SECRET, "[redacted]")
    assert "+password = '[redacted]'" in (run_dir / "source" / "uncommitted.diff").read_text()

    (run_dir / "finished.json").write_text("")  # as if killed while it was written
    done = run_script("--resume", run_dir, script=fork / "fork.py", check=2)
    assert "--service-api-key was not kept, as it is a secret: give it again" in done.stderr
    done = run_script("--resume", run_dir, *secret, script=fork / "fork.py", env={"DB_PASSWORD": ""}, check=2)
    assert "--service-api-key is not what an environment variable held" in done.stderr and len(done.stderr) < 300
    done = run_script("--resume", run_dir, "--no-track", *secret, script=fork / "fork.py")
    assert "changed" not in done.stderr and finished_step(run_dir) == 300


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("git clone https://me:hunter2@example.org/x", "git clone https://me:[redacted]@example.org/x"),
        ("https://x-token-0123456789abc@example.org", "https://[redacted]@example.org"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----", "[redacted]"),
        ("x AKIAIOSFODNN7EXAMPLE y", "x [redacted] y"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4", "[redacted]"),
        *[
            (same, same)
            for same in (
                'token = "abcdefgh"',
                "run.py --api-key abcdefgh --seed 1",
                'obs_key: str = "state"',
                'tokenizer = "byte-level"',
                'f"https://{user}:{password}@host"',
                '"https://${USER}:${PASSWORD}@host"',
                r're.match(r"(\w+://)(.*):(.*)@")',
                "git@github.com:you/fork.git ssh://git@example.org/x",
                "hf_tokenizer_name_or_path sk-learn-random-forest task-sk-123456789012345678",
                'b"-----BEGIN PRIVATE KEY-----" in text or (b"-----END PRIVATE KEY-----" in text)',
                "https://doi.org/10.1038/nature14236",
            )
        ],
    ],
)
def test_what_is_known_by_its_form(text, kept):
    assert redact(text) == kept
    assert redact(kept) == kept


@pytest.mark.parametrize("value", [SECRET, "correct-horse-battery", 'a"b\\c 1ü', "AbcDefGhiJklMnoPq", "pass w0rd"])
def test_a_value_of_a_secret_variable_is_known_however_it_is_written(value, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", value + "\n")
    written = [value, urllib.parse.quote(value, safe=""), urllib.parse.quote_plus(value), json.dumps(value)[1:-1]]
    written += [base64.b64encode(value.encode()).decode().rstrip("="), json.dumps(value, ensure_ascii=False)[1:-1]]
    for text in written:
        assert redact(f"<{text}>") == "<[redacted]>", text
    latin = b"\xe9 " + value.encode() + b" \xff"
    assert redact({"a": [latin], "b": (value, 1)}) == {"a": [b"\xe9 [redacted] \xff"], "b": ("[redacted]", 1)}


@pytest.mark.parametrize(
    "value",
    ["true", "password", "production", "learning_rate", "charts/SPS", "CartPole-v1", "12345678", "abc1234", ROOT],
)
def test_ordinary_values_of_secret_variables_stay(value, monkeypatch):
    monkeypatch.setenv("SORT_KEY", str(value))
    assert redact(f"x = {value}") == f"x = {value}"


def test_scripts_in_the_repository_are_copied_as_they_are():
    for path in [*Path(ROOT, "algos").glob("*.py"), *Path(ROOT, "common").glob("*.py")]:
        if path.name != "redact.py":  # its comments show what it looks for
            assert redact(path.read_bytes()) == path.read_bytes()


# --- a run directory from somebody else


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    small = {"learning_starts": 50, "capture_video": False, "total_timesteps": 100, "save_interval": 50}
    return train_with(load("dqn"), tmp_path_factory.mktemp("trained"), **small, eval_episodes=1)


@pytest.fixture
def given(trained, tmp_path):
    """A copy of a run, to spoil."""
    subprocess.run(["cp", "-r", str(trained), str(tmp_path / "given")], check=True)
    return tmp_path / "given"


@pytest.fixture
def victim(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "victim").write_text("mine: 7f3a")
    return tmp_path / "outside" / "victim"


def resume(run_dir, script="dqn"):
    """What the start of `--resume` does, in this process; what it prints is for capsys."""
    module = load(script)
    args = module.Args(**{**saved_arguments(run_dir, module), "resume": str(run_dir), "total_timesteps": 200})
    return reopen(args, torch.device("cpu"), ROOT / "algos" / f"{script}.py")


def saved_arguments(run_dir, module):
    facts = json.loads((run_dir / "args.json").read_text())
    names = {field.name for field in dataclasses.fields(module.Args)}
    return {key: tuple(v) if isinstance(v, list) else v for key, v in facts.items() if key in names}


PLACES = [
    "metrics.jsonl",
    ".lock",
    "args.json",
    "policy.pt",
    "finished.json",
    "args.json.1.tmp",
    "events.out.tfevents.1",
]
PLACES += ["checkpoints/step-9.pt", "source/x.py", "videos/step-000000001.mp4", "wandb/x", "wandb/debug.log"]
PLACES += ["checkpoints", "videos", "wandb", "source"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["link", "hanging link", "pipe"])
def test_no_run_with_a_link_or_a_pipe_is_resumed(given, victim, place, kind, capsys):
    path = given / place
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        path.rename(given.parent / "aside")
    kept = json.loads((given / "args.json").read_text())
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(victim.parent / "victim" if kind == "link" else victim.parent / "new")
    module = load("dqn")
    names = {field.name for field in dataclasses.fields(module.Args)}
    kept = {key: tuple(v) if isinstance(v, list) else v for key, v in kept.items() if key in names}
    args = module.Args(**{**kept, "resume": str(given), "total_timesteps": 200})
    with pytest.raises(SystemExit) as stop:
        reopen(args, torch.device("cpu"), ROOT / "algos" / "dqn.py")
    error = capsys.readouterr().err
    assert stop.value.code == 3 and error.startswith("error: cannot resume") and place.split("/")[-1] in error
    assert [path.name for path in victim.parent.iterdir()] == ["victim"] and victim.read_text() == "mine: 7f3a"


def test_a_run_that_a_link_of_the_user_leads_to_is_resumed_with_what_wandb_left(given, tmp_path):
    (tmp_path / "latest").symlink_to(given)
    (given / "wandb" / "run-1" / "logs").mkdir(parents=True)
    (given / "wandb" / "latest-run").symlink_to("run-1")
    (given / "wandb" / "debug.log").symlink_to("run-1/logs/debug.log")
    (given / "wandb" / "run-1" / "logs" / "debug-core.log").symlink_to("/nowhere/core.log")  # wandb writes such ones
    path, _, lock = resume(tmp_path / "latest")
    lock.close()
    assert path == tmp_path / "latest"


def test_the_lock_file_keeps_what_is_in_it(given):
    (given / ".lock").write_text("kept")
    resume(given)[2].close()
    assert (given / ".lock").read_text() == "kept"


BAD = {
    "empty": b"",
    "cut": b'{"env_id": "Cart',
    "binary": bytes(range(256)),
    "latin": '{"env_id": "\xe9"}'.encode("latin-1"),
    "a list": b"[1]",
    "a number": b"3",
    "deep": b"[" * 100_000,
    "other types": b'{"env_id": 1, "script": [], "versions": 3, "total_timesteps": "x", "wandb_id": {}}',
    "few": b'{"env_id": "CartPole-v1", "script": "dqn"}',
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_broken_args_json_is_one_line_for_every_reader(given, content, capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    module, arguments = load("dqn"), saved_arguments(given, load("dqn"))
    (given / "args.json").write_bytes(content)
    args = module.Args(**{**arguments, "resume": str(given)})
    reads = [lambda: reopen(args, torch.device("cpu"), ROOT / "algos" / "dqn.py")]
    if content != BAD["few"]:  # what is missing has its default
        reads += [lambda: evaluate.main([str(given)]), lambda: compare.main([str(given)])]
    for read in reads:
        with pytest.raises(SystemExit) as stop:
            read()
        error = capsys.readouterr().err
        assert stop.value.code == 3 and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("script", ["../../evil", "/evil", "..", "sub/evil", "", "evil\0", ["dqn"]])
def test_a_script_outside_source_is_not_run(given, script, capsys):
    (given.parent / "evil.py").write_text("raise SystemExit('it ran')")
    (given / "source" / "sub").mkdir()
    (given / "source" / "sub" / "evil.py").write_text("raise SystemExit('it ran')")
    facts = json.loads((given / "args.json").read_text())
    (given / "args.json").write_text(json.dumps({**facts, "script": script}))
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(given)])
    error = capsys.readouterr().err
    assert stop.value.code == 3 and "it ran" not in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["args.json", "policy.pt", "source/dqn.py", "source"])
def test_evaluate_follows_no_link(given, victim, name, capsys):
    (given / name).rename(victim.parent / "moved")
    (given / name).symlink_to(victim.parent / "moved")
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(given)])
    assert stop.value.code == 3 and "is a link" in capsys.readouterr().err


def test_evaluate_imports_no_module_that_only_args_json_allows(given, tmp_path, monkeypatch, capsys):
    (tmp_path / "beside.py").write_text("print('it ran')\nfrom gymnasium.envs.classic_control import CartPoleEnv\n")
    monkeypatch.syspath_prepend(tmp_path)
    facts = json.loads((given / "args.json").read_text())
    (given / "args.json").write_text(json.dumps({**facts, "env_id": "beside:CartPole-v1", "allow_env_import": True}))
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(given)])
    shown = capsys.readouterr()
    assert stop.value.code == 2 and "--allow-env-import" in shown.err and "it ran" not in shown.out
    evaluate.main([str(given), "--allow-env-import"])
    assert "it ran" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", ["link", "pipe", "folder", "binary", "endless line"])
def test_metrics_that_are_none_cost_only_their_run(given, trained, victim, spoil, capsys):
    path = given / "metrics.jsonl"
    path.unlink()
    if spoil == "link":
        path.symlink_to(trained / "metrics.jsonl")
    elif spoil == "pipe":
        os.mkfifo(path)
    elif spoil == "folder":
        path.mkdir()
    else:
        path.write_bytes(os.urandom(3000) if spoil == "binary" else b"0" * 3_000_000)
    with contextlib.suppress(SystemExit):
        compare.main([str(trained), str(given)])
    shown = capsys.readouterr()
    assert "final score" in shown.out
    assert (spoil in ("binary", "endless line")) or "given: its metrics cannot be read" in shown.err


def test_no_file_outside_is_in_the_page(given, trained, victim, tmp_path):
    pytest.importorskip("plotly")
    secret = victim.read_text()
    (given / "videos").mkdir()
    (given / "videos" / "step-000000100.mp4").symlink_to(victim)
    (given / "source" / "parent.diff").symlink_to(victim)
    facts = json.loads((given / "args.json").read_text())
    (victim.parent / "victim.py").write_text(secret)
    (given / "args.json").write_text(json.dumps({**facts, "script": "../../outside/victim"}))
    compare.main([str(given), str(trained), "--html", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert secret not in page and base64.b64encode(secret.encode()).decode() not in page


def test_names_do_not_lead_out_of_a_folder(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("[1]")
    (tmp_path / "file").write_text("2")
    assert read_json(tmp_path / "a", "b/file") == [1]
    for name in ("../file", "/etc/passwd", "b/../../file", "", "b", "b/file/", "b//file", "b/./file", "none"):
        with pytest.raises(OSError):
            data_file(tmp_path / "a", name)
    with pytest.raises(ValueError, match="more than 2 bytes"):
        read_file(tmp_path / "a", "b/file", most=2)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, victim, monkeypatch):
    path = tmp_path / "file"
    path.symlink_to(victim)
    write_atomically(path, b"1")
    assert path.read_bytes() == b"1" and not path.is_symlink() and victim.read_text() == "mine: 7f3a"

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"2")
    assert path.read_bytes() == b"1" and sorted(p.name for p in tmp_path.iterdir()) == ["file", "outside"]


def test_wandbs_links_must_stay_in_its_folder(tmp_path, victim):
    (tmp_path / "run" / "wandb").mkdir(parents=True)
    (tmp_path / "run" / "wandb" / "latest-run").symlink_to("../wandb/run-1")
    require_no_links(tmp_path / "run")
    (tmp_path / "run" / "wandb" / "debug.log").symlink_to("../metrics.jsonl")
    with pytest.raises(OSError, match=r"debug\.log"):
        require_no_links(tmp_path / "run")
