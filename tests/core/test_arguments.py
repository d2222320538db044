"""Arguments that can mean nothing are one line and exit 2 (3 from args.json); output never raises."""

import dataclasses
import io
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from conftest import ROOT, load, run_script

import common
from common import args as arguments
from common.args import RunArgs, say
from common.internals.console import checks
from common.internals.console.cli import parse, read_config

SCRIPTS = ["dqn", "pqn", "ppo", "ppo_recurrent", "sac", "crossq", "reinforce_rollout", "dqn_lightning"]
WORDS = ["-1", "0", "nan", "inf", "-inf", "1e30", "1e400", "99999999999999999999", "", "x"]


def refusal(capsys, make, code=2):
    """The one line with which `make` ends the process."""
    with pytest.raises(SystemExit) as stop:
        make()
    out, error = capsys.readouterr()
    assert stop.value.code == code and out == ""
    (line,) = error.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("script", SCRIPTS)
def test_whatever_a_flag_is_given_has_a_meaning_or_is_one_line(script, tmp_path, monkeypatch, capsys):
    if script == "dqn_lightning":
        pytest.importorskip("lightning")
    args_class = load(script).Args
    monkeypatch.chdir(tmp_path)
    hook = sys.excepthook
    kinds = checks.type_hints(args_class)
    for name in kinds if script == "dqn" else args_class.__annotations__:  # those of RunArgs once
        kind = kinds[name]
        for word in WORDS:
            words = ["--" + name.replace("_", "-"), word]
            try:
                args = parse(args_class, argv=words)
            except SystemExit as stop:
                # That a folder is no run directory is the checkpoint's code.
                assert stop.code == (3 if name == "resume" else 2), words
                (line,) = capsys.readouterr().err.splitlines()
                assert line.startswith("error: "), words
                continue
            value = getattr(args, name)
            assert kind is bool or value is not None, words
            numbers = [n for n in (value if isinstance(value, tuple) else [value]) if isinstance(n, int | float)]
            assert all(math.isfinite(n) and (isinstance(n, float) or n < 2**53) for n in numbers), words
            assert all(n >= 0 for n in numbers) or name in ("logstd_init", "stop_at_return"), words
            assert word != "" or name not in ("env_id", "runs_dir", "wandb_project"), words
            capsys.readouterr()
    monkeypatch.setattr(sys, "excepthook", hook)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        ("ppo", ["--max-grad-norm", "-1"], "--max-grad-norm must be above 0, not -1.0"),
        ("ppo", ["--max-grad-norm", "0"], "--max-grad-norm must be above 0, not 0.0"),
        ("ppo", ["--clip-coef", "0"], "--clip-coef must be above 0, not 0.0"),
        ("ppo", ["--ent-coef", "-0.01"], "--ent-coef must be at least 0, not -0.01"),
        ("ppo", ["--target-kl", "0"], "--target-kl must be above 0, not 0.0"),
        ("ppo", ["--logstd-init", "-21"], "--logstd-init must be at least -20, not -21.0"),
        ("ppo", ["--hidden-sizes", "64", "0"], "--hidden-sizes must be at least 1, not 0"),
        ("dqn", ["--learning-rate", "-1e-3"], "--learning-rate must be above 0, not -0.001"),
        ("dqn", ["--learning-rate", "nan"], "--learning-rate must be a finite number, not nan"),
        ("dqn", ["--tau", "0"], "--tau must be above 0, not 0.0"),
        ("dqn", ["--tau", "1.01"], "--tau must be between 0 and 1, not 1.01"),
        (
            "dqn",
            ["--buffer-size", "9007199254740992"],
            "--buffer-size must be at most 9007199254740991, not 9007199254740992",
        ),
        ("dqn", ["--seed", "4294967296"], "--seed must be at most 4294967295, not 4294967296"),
        ("dqn", ["--env-timeout", "1e30"], "--env-timeout must be at most 4000000, not 1e+30"),
        ("dqn", ["--num-envs", "4097"], "--num-envs must be at most 4096, not 4097"),
        ("dqn", ["--runs-dir", " "], "--runs-dir must be a name on one line, not ' '"),
        ("sac", ["--policy-lr", "0"], "--policy-lr must be above 0, not 0.0"),
        ("sac", ["--q-lr", "-1"], "--q-lr must be above 0, not -1.0"),
    ],
)
def test_a_number_outside_its_bounds_is_refused_and_the_bounds_are_named(script, words, says, capsys):
    args_class = load(script).Args
    assert refusal(capsys, lambda: parse(args_class, argv=words)) == f"error: {says}"


def test_bounds_themselves_are_allowed():
    ppo, dqn, sac = (load(script).Args for script in ("ppo", "dqn", "sac"))
    dqn(seed=0), dqn(seed=2**32 - 1), dqn(tau=1.0), dqn(gamma=0.0, env_timeout=0.0, learning_starts=0), dqn(gamma=1)
    ppo(target_kl=None, ent_coef=0.0, logstd_init=-20.0, hidden_sizes=()), sac(alpha=None), sac(alpha=0.0)
    dqn(num_envs=4096, torch_threads=1024, total_timesteps=2**53 - 1, save_interval=0, eval_episodes=0)


@dataclass
class Fork(RunArgs):
    """Fields of a researcher's own, about which nothing is known."""

    offset: int = 0
    temperature: float = -2.5
    ceiling: float = math.inf
    hash_seed: int = 2**60
    obs_key: str = "state"
    api_key: str = ""
    several_lines: str = "a\nb"
    layers: list[int] = field(default_factory=lambda: [0, -1])
    pair: tuple[tuple[int, int], ...] = ((0, 1),)
    mode: Literal["a", "b"] | None = None
    anything: Any = None
    target_kl: float = None  # type: ignore[assignment]  # as CleanRL's scripts have it
    alpha: str = "auto"
    learning_starts: int | None = None
    buffer_size: int | None = None
    computed: int = field(init=False, default=-1)


def test_a_forks_own_fields_may_hold_anything(tmp_path):
    assert Fork(offset=-3, temperature=0.0, hash_seed=-(2**70)).offset == -3
    assert parse(Fork, argv=["--offset", "-1", "--temperature", "-inf"]).temperature == -math.inf
    args = Fork(layers=[0, 7], pair=((3, 4), (5, 6)), mode="b", obs_key="token", api_key="x y", anything="z")
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    again = parse(Fork, argv=["--resume", str(tmp_path)])
    assert dataclasses.replace(again, resume=None) == args  # words as they were, lists and tuples each their own


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_envs": True}, "--num-envs must be int, not True"),
        ({"num_envs": "4"}, "--num-envs must be int, not '4'"),
        ({"num_envs": 4.0}, "--num-envs must be int, not 4.0"),
        ({"num_envs": None}, "--num-envs must be int, not None"),
        ({"env_timeout": "1"}, "--env-timeout must be float, not '1'"),
        ({"env_timeout": False}, "--env-timeout must be float, not False"),
        ({"track": 1}, "--track must be bool, not 1"),
        ({"env_id": 5}, "--env-id must be str, not 5"),
        ({"env_id": None}, "--env-id must be str, not None"),
        ({"env_id": "a\nb"}, r"--env-id must be a name on one line, not 'a\nb'"),
        ({"env_id": "a\0b"}, r"--env-id must be a name on one line, not 'a\x00b'"),
        ({"wandb_name": "a\rb"}, r"--wandb-name must be a name on one line, not 'a\rb'"),
        ({"wandb_tags": "tag"}, "--wandb-tags must be tuple[str, ...], not 'tag'"),
        ({"wandb_tags": ("a", 1)}, "--wandb-tags must be tuple[str, ...], not ('a', 1)"),
        ({"matmul_precision": "low"}, "--matmul-precision must be typing.Literal['highest', 'high', 'medium']"),
        ({"layers": (1, 2)}, "--layers must be list[int], not (1, 2)"),
        ({"layers": ["a"]}, "--layers must be list[int], not ('a',)"),
        ({"pair": ((1, 2, 3),)}, "--pair must be tuple[tuple[int, int], ...], not ((1, 2, 3),)"),
        ({"obs_key": {}}, "--obs-key must be str, not {}"),
        ({"seed": "x" * 10_000}, "--seed must be int, not 'xxx"),
    ],
    ids=lambda part: str(part)[:40],
)
def test_a_value_of_another_type_is_refused(values, says, tmp_path, capsys):
    line = refusal(capsys, lambda: Fork(**values))
    assert line.startswith(f"error: {says}") and len(line) < 200
    name, value = next(iter(values.items()))
    if isinstance(value, tuple):
        return  # JSON has none
    (tmp_path / "args.json").write_text(json.dumps(values))
    line = refusal(capsys, lambda: parse(Fork, argv=["--resume", str(tmp_path)]), code=3)
    assert (
        line.startswith(f"error: {tmp_path}")
        and "args.json" in line
        and name.replace("-", "_") in line.replace("-", "_")
    )


def test_a_list_in_the_place_of_a_tuple_is_that_tuple():
    assert load("ppo").Args(hidden_sizes=[32, 16]).hidden_sizes == (32, 16)


FACTS = {
    "env_id": "CartPole-v1",
    "total_timesteps": 100,
    "script": "dqn",
    "device": "cpu",
    "threads": 1,
    "versions": {},
}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b'"text"',
        b"{",
        b"\xff\xfe{}",
        b"[" * 100_000,
        json.dumps({**FACTS, "note": "x" * 2**24}).encode(),
        json.dumps({**FACTS, "script": ["evil"]}).encode(),
        json.dumps({**FACTS, "versions": []}).encode(),
        json.dumps({**FACTS, "threads": "1"}).encode(),
        json.dumps({**FACTS, "seed": 1.5}).encode(),
        json.dumps({**FACTS, "total_timesteps": -4}).encode(),
        json.dumps({**FACTS, "env_timeout": math.nan}).encode(),
        json.dumps({**FACTS, "env_id": "a\nb"}).encode(),
        b'{"seed": ' + b"9" * 5000 + b"}",
        "folder",
        "pipe",
        "nothing",
        "endless",
    ],
    ids=lambda content: str(content[:30]),
)
def test_an_invalid_args_json_is_one_line_and_exit_3(content, tmp_path, capsys):
    path = tmp_path / "args.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content == "endless":
        path.symlink_to("/dev/zero")
    assert str(tmp_path) in refusal(capsys, lambda: parse(RunArgs, argv=["--resume", str(tmp_path)]), code=3)


def test_whether_a_module_is_imported_is_never_taken_from_args_json(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({**FACTS, "env_id": "evil:X-v0", "allow_env_import": True}))
    assert parse(RunArgs, argv=["--resume", str(tmp_path)]).allow_env_import is False
    assert parse(RunArgs, argv=["--resume", str(tmp_path), "--allow-env-import"]).allow_env_import is True
    assert read_config(str(tmp_path))["env_id"] == "evil:X-v0"


def test_what_an_args_json_lacks_is_the_default(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"seed": 7, "unknown": [1]}))
    args = parse(RunArgs, argv=["--resume", str(tmp_path), "--total-timesteps", "9"])
    assert args == RunArgs(seed=7, total_timesteps=9, resume=str(tmp_path))


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


class NoStream:
    pass


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, closed(), Full(), NoStream(), io.TextIOWrapper(io.BytesIO(), "idna")])
def test_say_never_raises(stream, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", stream)
    say("return 3 ± 1")
    monkeypatch.setattr(sys, "stderr", stream)
    arguments.warn("3 ± 1")


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", "d?j? 3 ? 1"), ("cp866", "d?j? 3 ? 1"), ("latin2", "d\xe9j? 3 ? 1"), ("latin1", "d\xe9j\xe0 3 ± 1"),
     ("utf-8", "d\xe9j\xe0 3 ± 1"), ("utf-16", "d\xe9j\xe0 3 ± 1")],
)  # fmt: skip
def test_a_character_that_the_encoding_lacks_is_printed_as_a_question_mark(encoding, shown, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, newline=""))
    say("d\xe9j\xe0 3 ± 1")
    assert raw.getvalue().decode(encoding) == shown + "\n"


def test_a_pipe_that_nobody_reads_is_left_alone(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        for _ in range(3):
            say("x" * 100_000)


def test_the_output_that_other_libraries_print_to_takes_every_character(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    parse(RunArgs, argv=[])
    print("an environment's own ±", flush=True)
    assert raw.getvalue() == b"an environment's own ?\n"


def test_help_in_ascii_and_into_closed_or_full_output():
    script = ROOT / "algos" / "dqn.py"
    done = run_script("--help", script=script, env={"PYTHONIOENCODING": "ascii"})
    assert "--learning-rate" in done.stdout and done.stderr == ""
    for where in (">&-", ">/dev/full"):
        done = run_script("--help", script=script, wrap=("sh", "-c", f'exec "$@" {where}', "sh"))
        assert done.stdout == done.stderr == ""


def test_help_takes_any_character(monkeypatch, capsys):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with pytest.raises(SystemExit) as stop:
        parse(RunArgs, "Episodes, mean ± standard deviation", ["--help"])
    sys.stdout.flush()
    assert stop.value.code == 0
    assert b"mean ? standard deviation" in raw.getvalue()


def test_a_mistyped_flag_in_ascii_has_no_frame(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit):
        parse(common.RunArgs, argv=["--num-envs", "x"])
    line = capsys.readouterr().err
    assert line.startswith("error: Error parsing --num-envs: ") and "---" not in line


def test_help_has_groups_with_the_algorithm_first_and_one_default_a_flag(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for script in ("dqn", "ppo"):
        module = load(script)
        with pytest.raises(SystemExit) as stop:
            parse(module.Args, module.__doc__, ["--help"])
        shown = capsys.readouterr().out
        places = [
            shown.index(f"\n{title}:\n")
            for title in ("algorithm", "environment", "run", "evaluation", "Weights & Biases")
        ]
        assert stop.value.code == 0 and places == sorted(places)
        flags = re.findall(r"^  --(?:\[no-\])?([\w-]+)", shown, re.M)
        assert sorted(flags) == sorted(field.name.replace("_", "-") for field in dataclasses.fields(module.Args))
        own = {
            name.replace("_", "-")
            for name in module.Args.__dataclass_fields__.keys() - RunArgs.__dataclass_fields__.keys()
        }
        assert set(re.findall(r"^  --(?:\[no-\])?([\w-]+)", shown[places[0] : places[1]], re.M)) == own
        assert max(map(len, shown.splitlines())) <= 80 and "(default: None)" not in shown
        for entry in re.split(r"^  (?=--)", shown[places[0] :], flags=re.M):
            assert entry.count("(default") <= 1, entry
