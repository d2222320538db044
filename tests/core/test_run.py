"""The contract end to end, as a user meets it: logged out, from another folder, and with things going wrong."""

import contextlib
import dataclasses
import itertools
import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
import warm
from conftest import ROOT, envs_of, load, only_run, rows, run_script, run_tool, weights
from fake_wandb import FakeWandb

import common
from common.internals.console.progress import Progress

SMALL = ["--env-id", "CartPole-v1", "--total-timesteps", 1500, "--learning-starts", 200, "--eval-episodes", 3]
QUICK = [*SMALL, "--hidden-sizes", 16, "--batch-size", 16, "--no-capture-video"]
KEYS = {
    "charts/episodic_return",
    "charts/episodic_length",
    "charts/SPS",
    "charts/learning_rate",
    "charts/epsilon",
    "losses/td_loss",
    "losses/q_values",
    "health/grad_norm",
    "health/dead_units",
    "health/updates_per_step",
    "health/replay_age",
    "health/time_env",
    "health/time_update",
    "health/time_other",
    "eval/episodic_return",
    "eval/episodic_return_std",
    "eval/episodic_length",
}
WANDB = Path(sys.executable).with_name("wandb")


def wandb_records(run_dir):
    """What wandb itself reads in an offline run, one dictionary a record."""
    (folder,) = (run_dir / "wandb").glob("*run-*")
    out = subprocess.run([WANDB, "leet", "inspect", "--json", folder], capture_output=True, text=True, check=True)
    return folder, [json.loads(line) for line in out.stdout.splitlines()]


def of_kind(records, kind):
    return [record[kind] for record in records if record["type"] == kind]


def scalars(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def main_run(tmp_path_factory):
    """The main job, shortened; from a folder that is not the repository."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    env = {"HOME": str(cwd / "home"), "WANDB_CONFIG_DIR": str(cwd / "home")}
    done = run_script(*SMALL, "--cuda", "--eval-interval", 600, "--wandb-tags", "a", "b", cwd=cwd, env=env, cold=True)
    return done, only_run(cwd / "runs"), cwd


def test_a_run_prints_what_a_user_needs_and_nothing_else(main_run):
    done, run_dir, _ = main_run
    lines = done.stdout.splitlines()
    assert done.stderr == ""
    if not torch.cuda.is_available():
        assert lines.pop(0) == "no CUDA GPU found: training on the CPU"
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    sync = f"wandb sync runs/{run_dir.name}/wandb/{folder.name}"
    assert re.fullmatch(rf"dqn on CartPole-v1, seed 1, .*: runs/{run_dir.name}", lines[0])
    assert lines[1] == f"W&B: offline (not logged in); upload later with: {sync}"
    assert all(re.search(r"steps/s|greedy evaluation", line) for line in lines[2:-2])  # nor pygame's banner
    assert sum("steps/s" in line for line in lines) <= 11
    assert "\r" not in done.stdout
    assert sum("greedy evaluation" in line for line in lines) == 3
    assert f"runs/{run_dir.name}" in lines[-2]
    assert sync in lines[-1]
    assert f"wandb leet runs/{run_dir.name}/wandb/{folder.name}" in lines[-1]


def test_the_run_directory_is_complete(main_run):
    _, run_dir, _ = main_run
    assert re.fullmatch(r"CartPole-v1__dqn__1__\d{8}-\d{6}-[0-9a-f]{6}", run_dir.name)
    names = {re.sub(r"tfevents.*", "tfevents", path.name) for path in run_dir.iterdir()}
    assert names == {
        "args.json",
        "metrics.jsonl",
        "events.out.tfevents",
        "wandb",
        "videos",
        "policy.pt",
        "policy_best.pt",
        "source",
        "checkpoints",
        "finished.json",
        ".lock",
    }
    args = json.loads((run_dir / "args.json").read_text())
    script = load("dqn")
    assert {field.name for field in dataclasses.fields(script.Args)} <= args.keys()
    assert args["total_timesteps"] == 1500
    assert args["wandb_tags"] == ["a", "b"]
    assert args["versions"]["torch"] == torch.__version__
    assert args["threads"] == 1
    assert (run_dir / "source" / "dqn.py").read_text() == (ROOT / "algos" / "dqn.py").read_text()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert args["git_commit"] == (commit or None)
    if commit:
        diff = subprocess.run(["git", "diff", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
        assert (run_dir / "source" / "uncommitted.diff").read_text() == diff


def test_metrics_are_the_same_numbers_in_every_logger(main_run):
    _, run_dir, _ = main_run
    table = rows(run_dir)
    assert set().union(*table) == KEYS | {"global_step", "time"}
    steps = [row["global_step"] for row in table]
    assert steps == sorted(steps)
    assert steps[-1] == 1500
    assert all(a["time"] <= b["time"] for a, b in itertools.pairwise(table))

    def flat(points):
        return [number for point in points for number in point]

    board = scalars(run_dir)
    assert set(board) == KEYS
    _, records = wandb_records(run_dir)
    history = [item["item"] for item in of_kind(records, "history")]
    assert [row["_step"] for row in history] == [row["global_step"] for row in history]
    for key in KEYS:
        mine = [(row["global_step"], row[key]) for row in table if key in row]
        theirs = [(row["global_step"], row[key]) for row in history if key in row]
        assert flat(theirs) == pytest.approx(flat(board[key]), rel=1e-5), key
        if key in ("charts/episodic_return", "charts/episodic_length"):
            continue
        assert flat(theirs) == pytest.approx(flat(mine), rel=1e-5), key
    # Dashboards get the mean of the episodes since the last row.
    before = 0
    for step, value in board["charts/episodic_return"]:
        between = [
            r["charts/episodic_return"]
            for r in table
            if "charts/episodic_return" in r and before < r["global_step"] <= step
        ]
        assert value == pytest.approx(sum(between) / len(between), rel=1e-5)
        before = step


def test_wandb_has_the_config_the_video_the_code_and_the_policy(main_run):
    _, run_dir, _ = main_run
    folder, records = wandb_records(run_dir)
    (run,) = of_kind(records, "run")
    config = run["config"]["update"]
    args = json.loads((run_dir / "args.json").read_text())
    assert all(args[key] == value for key, value in config.items() if key != "_wandb")
    left_out = {"runs_dir", "resume", "debug", "track", "capture_video", "save_interval", "env_timeout", "cwd"}
    left_out |= {"allow_env_import", "folder", "common", *(key for key in args if key.startswith("wandb_"))}
    assert args.keys() - config.keys() == left_out
    assert str(ROOT) not in json.dumps(config)
    assert run["display_name"] == run_dir.name
    assert run["project"] == "plainrl"
    assert run["tags"] == ["a", "b"]
    metrics = of_kind(records, "metric")
    assert {m.get("glob_name"): m.get("step_metric") for m in metrics}["*"] == "global_step"
    videos = [item["item"] for item in of_kind(records, "history") if "videos/eval.path" in item["item"]]
    assert [row["global_step"] for row in videos] == [600, 1200, 1500]
    for video in videos:
        assert (folder / "files" / video["videos/eval.path"]).stat().st_size == video["videos/eval.size"] > 1000
    code, artifact = of_kind(records, "artifact")
    assert (code["name"], code["type"]) == ("source-dqn", "code")
    files = {entry["path"]: Path(entry["local_path"]).read_bytes() for entry in code["manifest"]["contents"]}
    assert files == {path.name: path.read_bytes() for path in (run_dir / "source").iterdir()}
    assert {"_wandb": {"code_path": "source-dqn"}} in [item.get("update") for item in of_kind(records, "config")]
    assert artifact["name"] == "dqn-CartPole-v1"
    assert artifact["type"] == "model"
    assert {entry["path"] for entry in artifact["manifest"]["contents"]} == {"policy.pt", "args.json"}
    (done,) = of_kind(records, "exit")
    assert done.get("exit_code", 0) == 0


def test_videos_show_the_whole_first_episode(main_run):
    import imageio_ffmpeg

    _, run_dir, _ = main_run
    films = sorted((run_dir / "videos").iterdir())
    assert [film.name for film in films] == ["step-000000600.mp4", "step-000001200.mp4", "step-000001500.mp4"]
    reader = imageio_ffmpeg.read_frames(str(films[-1]))
    facts = next(reader)
    assert facts["size"] == (600, 400)
    assert facts["pix_fmt"].startswith("yuv420p")
    frames = list(reader)
    assert len(set(frames)) > 3

    from common.evaluation import play
    from common.tools.load_policy import load_policy

    policy, *_ = load_policy(run_dir)
    _, lengths = play(policy, "CartPole-v1", 3, 1)
    assert len(frames) == (lengths[0] + 1 + 1) // 2  # its first frame and one a step; every second one is kept


def test_the_policy_acts_the_same_in_a_new_process(main_run, tmp_path):
    _, run_dir, cwd = main_run
    logged = [row for row in rows(run_dir) if "eval/episodic_return" in row][-1]
    film = tmp_path / "film.mp4"
    done = run_tool("evaluate", run_dir, "--video", film, cwd=tmp_path)
    printed = re.search(r"episodic_return (\S+) ± (\S+)  episodic_length (\S+)", done.stdout)
    expected = [logged["eval/" + key] for key in ("episodic_return", "episodic_return_std", "episodic_length")]
    assert [float(x) for x in printed.groups()] == pytest.approx(expected, rel=1e-5)
    assert film.stat().st_size > 1000

    code = (
        "import sys, torch; from pathlib import Path; from common.tools.load_policy import load_policy\n"
        "policy, *_ = load_policy(Path(sys.argv[1])); torch.manual_seed(0); obs = torch.randn(1000, 4)\n"
        "torch.save((policy(obs), policy.__self__(obs).detach()), sys.argv[2])"
    )
    for name in ("a", "b"):
        assert warm.run(["-c", code, run_dir, tmp_path / name], cwd=tmp_path).returncode == 0
    (actions, q), (again, q_again) = torch.load(tmp_path / "a"), torch.load(tmp_path / "b")
    assert torch.equal(actions, again)
    assert torch.equal(q, q_again)
    # ... and as the network that was trained, made here from the weights alone.
    dqn = load("dqn")
    network = dqn.QNetwork(envs_of("CartPole-v1", 1), dqn.Args())
    network.load_state_dict(weights(run_dir))
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(network(torch.randn(1000, 4)), q)


def test_the_printed_sync_command_uploads_everything(main_run):
    done, run_dir, cwd = main_run
    words = shlex.split(re.search(r"(wandb sync \S+)", done.stdout).group(1))
    server = FakeWandb()
    try:
        subprocess.run(
            [WANDB, *words[1:]], cwd=cwd, env={**os.environ, **server.env}, check=True, capture_output=True, timeout=60
        )
        (history,) = server.history.values()
        assert set().union(*history) >= KEYS
        assert any(name.endswith(".mp4") for name in server.files)
        assert [each["input"]["artifactTypeName"] for each in server.artifacts] == ["code", "model"]
    finally:
        server.close()


def test_online_when_the_server_answers(tmp_path):
    server = FakeWandb()
    try:
        done = run_script(*SMALL, "--wandb-group", "g", "--runs-dir", tmp_path / "runs", env=server.env)
        ((run_id, run),) = server.runs.items()
        lines = done.stdout.splitlines()
        where = f"W&B: {server.url}/me/plainrl/runs/{run_id}"
        first, last = [i for i, line in enumerate(lines) if line == where]
        assert "dqn on CartPole-v1" in lines[first - 1]
        assert last == len(lines) - 1
        assert done.stderr == ""
        assert run["exitcode"] == 0
        assert run["groupName"] == "g"
        config = json.loads(run["config"])
        assert config["total_timesteps"]["value"] == 1500
        assert not config.keys() & {"runs_dir", "resume", "folder", "cwd", "common", "wandb_project"}
        assert config["_wandb"]["value"]["code_path"] == "source-dqn"  # what the Code panel shows
        history = server.history[run_id]
        assert set().union(*history) >= KEYS
        assert [row["global_step"] for row in history] == [row["_step"] for row in history]
        assert [name for name in server.files if name.endswith(".mp4")]
        code, artifact = server.artifacts
        assert (code["input"]["artifactTypeName"], code["input"]["runName"]) == ("code", run_id)
        assert artifact["input"]["artifactTypeName"] == "model"
        assert "dqn-CartPole-v1" in json.dumps(artifact)
    finally:
        server.close()


@contextlib.contextmanager
def black_hole():
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("server", ["refused", "silent"])
def test_an_unreachable_server_means_offline_in_one_line(server, tmp_path):
    with black_hole() as url:
        if server == "refused":
            url = "http://127.0.0.1:9"
        began = time.monotonic()
        done = run_script(
            *QUICK, "--runs-dir", tmp_path / "runs", env={"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}
        )
        assert time.monotonic() - began < 40
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    where = f"W&B: offline ({url} does not answer); upload later with: wandb sync "
    first, last = [i for i, line in enumerate(lines) if line.startswith(where)]
    assert "dqn on CartPole-v1" in lines[first - 1]
    assert last == len(lines) - 1
    _, records = wandb_records(only_run(tmp_path / "runs"))
    assert len(of_kind(records, "history")) >= 3


@pytest.mark.parametrize("key", ["short", "0" * 40])
def test_a_key_the_server_refuses_means_offline(key, tmp_path):
    server = FakeWandb()
    server.die()
    try:
        env = {**server.env, "WANDB_API_KEY": key}
        done = run_script(*QUICK, "--runs-dir", tmp_path / "runs", env=env)
        why = "does not answer" if key == "0" * 40 else "API key must have 40+ characters"
        assert re.search(rf"^W&B: offline \(.*{re.escape(why)}.*\); upload later with: wandb sync", done.stdout, re.M)
        assert done.stderr == ""
    finally:
        server.close()


def test_an_entity_the_server_refuses_means_offline(tmp_path):
    server = FakeWandb()
    refused = {"data": None, "errors": [{"message": "permission denied"}]}
    answer = server._graphql
    server._graphql = lambda name, v: refused if name == "UpsertBucket" else answer(name, v)
    try:
        done = run_script(*QUICK, "--runs-dir", tmp_path / "runs", "--wandb-entity", "x", env=server.env)
        assert re.search(r"^W&B: offline \(.*permission denied\); upload later with: wandb sync", done.stdout, re.M)
        assert done.stderr == ""
    finally:
        server.close()


def test_a_server_that_dies_costs_no_step(tmp_path, monkeypatch, capfd):
    server = FakeWandb()
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("common.internals.tracking.wandb_logger.Wandb.FINISH_TIMEOUT", 3)
    dqn = load("dqn")
    learn = dqn.dqn_loss

    def dies_at_the_first_update(*words):
        server.die()
        return learn(*words)

    monkeypatch.setattr(dqn, "dqn_loss", dies_at_the_first_update)
    try:
        began = time.monotonic()
        flags = {"total_timesteps": 1500, "hidden_sizes": (16,), "eval_episodes": 0, "cuda": False}
        dqn.main(dqn.Args(**flags, runs_dir=str(tmp_path)))
        assert time.monotonic() - began < 30
    finally:
        server.close()
    run_dir = only_run(tmp_path)
    assert rows(run_dir)[-1]["global_step"] == 1500
    out = capfd.readouterr().out.splitlines()[-1]
    assert "wandb sync --include-online" in out
    _, records = wandb_records(run_dir)
    assert of_kind(records, "history")[-1]["item"]["global_step"] == 1500
    import wandb

    wandb.teardown()


def start(*flags, **kwargs):
    return warm.Warm([ROOT / "algos" / "dqn.py", *flags], **kwargs)


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"never printed {text!r}: {process.communicate()[1]}")


def test_the_run_is_printed_before_wandb_opens(tmp_path, monkeypatch, capsys):
    shown = []

    def opens(*words):
        shown.append(capsys.readouterr().out)
        raise OSError("no W&B")

    monkeypatch.setattr("common.internals.tracking.loggers.Wandb", opens)
    args = common.RunArgs(runs_dir=str(tmp_path), total_timesteps=10)
    run = common.track(args, torch.device("cpu"))
    run.finish()
    assert len(shown) == 1
    assert f"on CartPole-v1, seed 1, cpu: {run.dir}" in shown[0]


def test_a_killed_wandb_process_is_one_warning(tmp_path):
    process = start(*QUICK, "--total-timesteps", 12000, "--runs-dir", tmp_path, "--eval-episodes", 0)
    wait_for(process, "steps/s")
    killed = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, parent = re.fullmatch(r"\d+ \((.*)\) \S (\d+) .*", status.read_text().strip()).groups()
            if "wandb-core" in name and int(parent) == process.pid:
                os.kill(int(status.parent.name), signal.SIGKILL)
                killed += 1
    assert killed == 1
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    warnings = [line for line in err.splitlines() if line]
    assert len(warnings) == 1, err
    assert warnings[0].startswith("warning: W&B failed and is off")
    assert rows(only_run(tmp_path))[-1]["global_step"] == 12000


STOP_IT = """if True:
    import os, signal, sys, time, torch
    import common
    from common.internals.tracking.wandb_logger import Wandb, wandb_service
    Wandb.ANSWER_TIMEOUT, Wandb.FINISH_TIMEOUT = 3, 1
    args = common.RunArgs(runs_dir=sys.argv[1], total_timesteps=10)
    run = common.track(args, torch.device("cpu"))
    run.log({"losses/td_loss": 1.0}, 1)
    service = wandb_service()
    rows = {"in a row": 50_000, "at the end": 1}.get(sys.argv[2], 0)
    if rows:
        os.kill(service.pid, signal.SIGSTOP)
    for step in range(2, 2 + rows):
        run.log({f"losses/{i}": 1.0 for i in range(100)}, step)
        if run.loggers.wandb not in run.loggers.active:
            print("off")
            break
    run.finish()
    if not rows:
        os.kill(service.pid, signal.SIGSTOP)
"""


@pytest.mark.parametrize("when", ["in a row", "at the end", "at exit"])
def test_a_wandb_process_that_hangs_is_one_warning(when, tmp_path):
    """Stopped, not killed: nothing tells wandb that no answer will come."""
    done = warm.run(["-c", STOP_IT, tmp_path, when], env=os.environ | {"WANDB_MODE": "offline"}, timeout=90)
    assert done.returncode == 0, done.stderr
    assert ("off" in done.stdout.split()) == (when == "in a row")
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert [line.startswith("warning: W&B failed and is off") for line in warnings] == [True] * (when != "at exit")
    assert "Traceback" not in done.stderr, done.stderr
    assert json.loads((only_run(tmp_path) / "finished.json").read_text())
    assert rows(only_run(tmp_path))[0]["losses/td_loss"] == 1.0


def test_an_exit_of_wandbs_own_ends_no_run(tmp_path, monkeypatch, capfd):
    """`wandb.teardown` exits with the code of the service that the watchdog killed."""
    import wandb

    teardown, exits = wandb.teardown, []

    def exit_after(*words):
        teardown(*words)
        exits.append(-9)
        raise SystemExit(-9)

    def fails(*words, **more):
        raise wandb.errors.CommError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(wandb, "teardown", exit_after)
        patch.setattr(wandb, "login", fails)
        run = common.track(common.RunArgs(runs_dir=str(tmp_path), total_timesteps=10), torch.device("cpu"))
        assert exits == [-9]  # the offline run is started after it
        run.loggers.wandb.run.log = fails
        for step in (1, 2):
            run.log({"charts/x": 1.0}, step)
        assert exits == [-9, -9]
        run.finish()
    assert capfd.readouterr().err.count("warning: W&B failed and is off") == 1
    assert len(rows(run.dir)) == 2


def test_a_full_disk_is_one_warning_per_logger(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs root, to mount a small file system")
    try:
        process = start(*QUICK, "--total-timesteps", 6000, "--runs-dir", disk / "runs", "--eval-episodes", 0)
        wait_for(process, "steps/s")
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 4096)
        out, err = process.communicate(timeout=90)
        warnings = [line for line in err.splitlines() if line.startswith("warning:")]
        assert len(warnings) == len({line.split()[1] for line in warnings}) >= 1, err
        assert "6,000/6,000 steps" in out  # training went on to its end
        # What was learnt could not be kept: that is an error, and says so.
        assert err.splitlines()[-1].startswith("error: cannot write"), err
        assert process.returncode == 6
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_logger_that_fails_leaves_the_others_running(tmp_path, capsys):
    args = common.RunArgs(runs_dir=str(tmp_path), track=False, total_timesteps=10)
    run = common.track(args, torch.device("cpu"))
    run.loggers.active[1].log = lambda *words: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    for step in (1, 2, 3):
        run.log({"charts/x": step}, step)
    run.finish()
    assert capsys.readouterr().err.count("warning: TensorBoard failed and is off") == 1
    assert [row["charts/x"] for row in rows(run.dir)] == [1, 2, 3]


def test_what_is_noted_is_in_the_next_row_only_and_in_a_resumed_run(tmp_path):
    args = common.RunArgs(runs_dir=str(tmp_path), track=False, total_timesteps=10)
    run, other = (common.track(args, torch.device("cpu")) for _ in range(2))
    run.note({"losses/a": torch.tensor(1.0), "losses/b": 5.0})
    run.note({"losses/a": torch.tensor(2.0)})
    other.load_state_dict(run.state_dict())
    for each in (run, other):
        each.log({"charts/x": 1.0}, 1)
        each.log({"charts/x": 2.0}, 2)
        each.finish()
        noted = [{key: value for key, value in row.items() if key.startswith("losses/")} for row in rows(each.dir)]
        assert noted == [{"losses/a": 2.0, "losses/b": 5.0}, {}]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("async_envs", [False, True])
def test_a_signal_stops_at_the_next_step_and_keeps_everything(number, async_envs, tmp_path):
    flags = ["--async-envs", "--num-envs", 2] if async_envs else []
    process = start(
        "--total-timesteps", "1e6", "--runs-dir", tmp_path, "--learning-starts", 200, *flags, start_new_session=True
    )
    wait_for(process, "steps/s")
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C in a terminal reaches every process of the run
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert f"stopped by {number.name}" in line
    run_dir = only_run(tmp_path)
    assert str(run_dir) in line
    assert len(err.split("\n")) == 4, err  # an empty line, the answer to the signal, the error
    _, records = wandb_records(run_dir)
    assert of_kind(records, "exit")[0]["exit_code"] == 128 + number
    initial = load("dqn")
    torch.manual_seed(1)
    untrained = initial.QNetwork(envs_of("CartPole-v1", 1), initial.Args()).state_dict()
    assert any(not torch.equal(untrained[name], value) for name, value in weights(run_dir).items())


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path):
    process = start("--env-id", "probe_envs:Stuck-v0", "--allow-env-import", "--runs-dir", tmp_path, "--no-track")
    wait_for(process, "dqn on")
    time.sleep(2)  # into the step that never returns
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == -signal.SIGINT


def test_a_fork_in_another_folder_runs(tmp_path):
    fork = tmp_path / "my_dqn.py"
    fork.write_text(
        (ROOT / "algos" / "dqn.py").read_text().replace("nn.Linear(width, size)", "nn.Linear(width, size, False)")
    )
    run_script(*SMALL, "--no-capture-video", "--no-track", script=fork, cwd=tmp_path)
    run_dir = only_run(tmp_path / "runs")
    assert "__my_dqn__" in run_dir.name
    assert (run_dir / "source" / "my_dqn.py").read_text() == fork.read_text()
    assert "network.3.bias" not in weights(run_dir)
    fork.unlink()
    run_tool("evaluate", run_dir)


@pytest.mark.parametrize(
    "script",
    ["dqn", "rainbow", "pqn", "ppo", "ppo_recurrent", "sac", "crossq", "reinforce_rollout", "dqn_lightning"],
)
def test_help_and_wrong_flags_start_no_run(script, tmp_path):
    words = run_script("--help", script=script, cwd=tmp_path)
    assert "--total-timesteps" in words.stdout
    assert words.stderr == ""
    assert run_script("--learnin-rate", "1", script=script, cwd=tmp_path, check=2).stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_integers_may_be_written_as_people_write_them(tmp_path):
    from common.internals.console.cli import parse

    for text in ("2e3", "2000", "2_000", "2000.0"):
        assert parse(common.RunArgs, argv=["--total-timesteps", text]).total_timesteps == 2000


def test_an_environment_that_breaks_is_exit_5(tmp_path):
    flags = ["--env-id", "probe_envs:Broken-v0", "--allow-env-import", "--runs-dir", tmp_path, "--eval-episodes", 0]
    done = run_script(*flags, check=5)
    named = r"error: environment 0 failed in step\(\): OSError: the simulator went away \(probe_envs\.py:\d+\)\n"
    assert re.fullmatch(named, done.stderr.splitlines(keepends=True)[-1])
    assert [line[:8] for line in done.stderr.splitlines()] == ["error: e"]
    run_dir = only_run(tmp_path)
    assert (run_dir / "policy.pt").exists()
    _, records = wandb_records(run_dir)
    assert of_kind(records, "exit")[0]["exit_code"] == 1
    done = run_script(*flags, "--debug", check=5)
    assert "Traceback" in done.stderr
    assert 'raise OSError("the simulator' in done.stderr


def test_a_bug_in_a_fork_is_exit_1_and_says_where(tmp_path):
    fork = tmp_path / "fork.py"
    fork.write_text(
        (ROOT / "algos" / "dqn.py").read_text().replace("        obs = next_obs\n", "        obs = nxt_obs\n")
    )
    done = run_script(*QUICK, script=fork, cwd=tmp_path, check=1)
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: NameError: name 'nxt_obs' is not defined.* \(fork.py:\d+\); --debug shows", line)
    assert "Traceback" in run_script(*QUICK, "--no-track", "--debug", script=fork, cwd=tmp_path, check=1).stderr


def test_a_run_directory_that_cannot_be_made_is_exit_6(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_script(*SMALL, "--runs-dir", tmp_path / "file", check=6)
    assert "--runs-dir" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_flags_of_a_run_do_what_they_say(tmp_path, capsys):
    dqn = load("dqn")
    base = {"total_timesteps": 300, "learning_starts": 200, "eval_episodes": 1, "cuda": False, "track": False}
    base |= {"capture_video": False, "hidden_sizes": (16,)}

    def run(**flags):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        dqn.main(dqn.Args(**{**base, "runs_dir": str(folder), **flags}))
        return only_run(folder), capsys.readouterr().out

    plain, _ = run(capture_video=True)
    assert not (plain / "wandb").exists()  # --no-track
    assert (plain / "videos").exists()
    tracked, out = run(track=True, wandb_name="n", wandb_project="q", wandb_notes="why", wandb_entity="e")
    assert "wandb sync" in out
    assert not (tracked / "videos").exists()
    (record,) = of_kind(wandb_records(tracked)[1], "run")
    assert [record[key] for key in ("display_name", "project", "notes", "entity")] == ["n", "q", "why", "e"]
    silent, _ = run(eval_episodes=0)
    assert not any("eval/episodic_return" in row for row in rows(silent))
    assert (silent / "policy.pt").exists()
    for deterministic in (True, False):
        run(torch_deterministic=deterministic)
        assert torch.backends.cudnn.deterministic == deterministic
        assert torch.backends.cudnn.benchmark != deterministic
    for precision in ("medium", "highest"):
        run(matmul_precision=precision)
        assert torch.get_float32_matmul_precision() == precision
    if not torch.cuda.is_available():
        assert "no CUDA GPU found" in run(cuda=True)[1]
    _, out = run(async_envs=True, num_envs=2)
    together, _ = run(num_envs=2)
    apart, _ = run(num_envs=2, async_envs=True)
    for name, value in weights(together).items():
        assert torch.equal(value, weights(apart)[name])
    native, _ = run(native_envs=True, num_envs=2)
    assert not torch.equal(*(next(iter(weights(each).values())) for each in (native, together)))
    imported, _ = run(env_id="probe_envs:Mixed-v0", allow_env_import=True)
    assert imported.name.startswith("probe_envs-Mixed-v0__")
    threads, _ = run(torch_threads=2)
    assert json.loads((threads / "args.json").read_text())["threads"] == 2
    torch.set_num_threads(1)


@pytest.mark.parametrize("flags", [[], ["--help"]])
def test_a_closed_output_ends_no_run(flags, tmp_path):
    """Both streams closed at once, as by `2>&1 | true`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, str(ROOT / "algos" / "dqn.py"), *map(str, QUICK), "--runs-dir", str(tmp_path / "runs")]
    done = subprocess.run([*command, "--no-track", *flags], stdout=write, stderr=write, timeout=120, check=False)
    assert done.returncode == 0
    if not flags:
        assert (only_run(tmp_path / "runs") / "finished.json").exists()


def test_async_is_a_process_an_environment(monkeypatch):
    envs = envs_of("CartPole-v1", 2, async_envs=True)
    children = [p for p in envs.vector.processes if p.is_alive() and p.pid != os.getpid()]
    assert len(children) == 2
    envs.close()


def test_wandb_mode_disabled_is_respected(tmp_path):
    done = run_script(*QUICK, "--runs-dir", tmp_path, env={"WANDB_MODE": "disabled"})
    assert "disabled by WANDB_MODE" in done.stdout
    assert not list(only_run(tmp_path).glob("wandb/*run*"))


def test_wandb_mode_offline_says_nothing_of_its_own(tmp_path):
    done = run_script(*QUICK, "--runs-dir", tmp_path, env={"WANDB_MODE": "offline"})
    assert done.stderr == ""
    assert list(only_run(tmp_path).glob("wandb/offline-run*"))


def test_runs_of_the_same_second_have_directories_of_their_own(tmp_path):
    args = common.RunArgs(runs_dir=str(tmp_path), track=False)
    runs = [common.track(args, torch.device("cpu")) for _ in range(20)]
    assert len({run.dir for run in runs}) == 20
    for run in reversed(runs):
        run.finish()


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "../../etc", "a:b-v0", "x" * 400, ".hidden"])
def test_a_run_name_is_one_safe_path_component(env_id, tmp_path):
    run = common.track(common.RunArgs(env_id=env_id, runs_dir=str(tmp_path / "r"), track=False), torch.device("cpu"))
    run.finish()
    assert run.dir.parent == tmp_path / "r"
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", run.dir.name)


def test_sps_leaves_evaluation_out(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("common.run.time.monotonic", lambda: now[0])
    run = common.track(common.RunArgs(runs_dir=str(tmp_path), track=False), torch.device("cpu"))
    now[0] += 2
    run.log({}, 1000)
    now[0] += 7
    evaluation = {"eval/episodic_return": 1.0, "eval/episodic_return_std": 0.0, "eval/episodic_length": 1.0}
    run.leave_out(5.0)
    run.log_evaluation(evaluation, 1000, video=None)
    now[0] += 2
    run.log({}, 3000)
    run.finish()
    sps = [row["charts/SPS"] for row in rows(run.dir) if "charts/SPS" in row]
    assert sps == pytest.approx([500.0, 500.0])


def test_numbers_that_json_lacks_are_null(tmp_path):
    run = common.track(common.RunArgs(runs_dir=str(tmp_path), track=False), torch.device("cpu"))
    run.log({"x": float("nan"), "y": torch.tensor(float("inf")), "z": torch.tensor(2)}, 1)
    run.finish()
    (line,) = (run.dir / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda word: pytest.fail(word))
    assert (row["x"], row["y"], row["z"]) == (None, None, 2.0)


def shown_in_a_terminal(columns, tmp_path, **variables):
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, columns))
    flags = ["--total-timesteps", 4000, "--runs-dir", tmp_path, "--no-track", "--eval-episodes", 0]
    process = warm.Warm([ROOT / "algos" / "dqn.py", *flags], terminal=follower, env={**os.environ, **variables})
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(leader, 4096):
            shown += chunk
    assert process.wait() == 0
    return shown.decode()


@pytest.mark.parametrize("columns", [100, 40])
def test_a_terminal_shows_one_line_that_renews_itself_and_never_wraps(columns, tmp_path):
    shown = shown_in_a_terminal(columns, tmp_path, NO_COLOR="1", TERM="xterm")
    progress = [part for part in shown.split("\r") if "/4,000 steps" in part]
    assert len(progress) >= 2
    assert not any("\n" in part.rstrip("\n") for part in progress)
    if columns == 40:
        assert max(len(part) for part in progress) == 39
    else:
        assert "left" in progress[0]
    assert "\x1b" not in shown


def test_a_dumb_terminal_gets_plain_lines(tmp_path):
    shown = shown_in_a_terminal(100, tmp_path, TERM="dumb").replace("\r\n", "\n")
    assert "\r" not in shown
    assert "\x1b" not in shown
    assert sum("steps/s" in line for line in shown.splitlines()) >= 2


@pytest.mark.parametrize(("seconds", "each"), [(20, 0.1), (3600, 1.0), (3600, 45.0)])
def test_a_log_gets_one_or_two_lines_a_minute(seconds, each, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("common.internals.console.progress.time.monotonic", lambda: now[0])
    console, times = Progress(seconds * 10), []
    while now[0] < seconds:
        now[0] += each
        console.show(round(now[0] * 10), 10.0, None)
        times += [now[0]] * len(capsys.readouterr().out.splitlines())
    assert times[-1] == now[0]
    if seconds < 60:
        assert 5 <= len(times) <= 11
    else:
        gaps = [b - a for a, b in itertools.pairwise(times[:-1])]
        assert min(gaps) >= 30
        assert max(gaps) <= 60


def test_the_time_left_is_that_of_the_steps_of_this_process(capsys):
    console = Progress(1000)
    console.first_step, console.started = 500, time.monotonic() - 10  # 100 steps in 10 s
    console.show(600, 10.0, None)
    assert "0:00:40 left" in capsys.readouterr().out
    console.show(1007, 10.0, None)
    assert "0:00:00 left" in capsys.readouterr().out


def test_a_run_directory_without_a_policy_is_exit_3(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        done = run_tool("evaluate", folder, cwd=tmp_path, check=3)
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1


def test_a_window_without_a_screen_and_an_unknown_tool_are_one_line(tmp_path, monkeypatch):
    for name in [name for name in os.environ if "DISPLAY" in name]:
        monkeypatch.delenv(name)
    assert "no screen" in run_tool("evaluate", tmp_path, "--render", "human", check=2).stderr
    done = run_tool("evaluat", cwd=tmp_path, check=2)
    assert re.search(r"there are: ([\w-]+, )*evaluate", done.stderr)


def test_a_policy_that_would_run_code_when_loaded_is_refused(main_run, tmp_path):
    import shutil

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "marker"), "w"))

    _, run_dir, _ = main_run
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy, symlinks=True)
    torch.save({"network": Evil()}, copy / "policy.pt")
    done = run_tool("evaluate", copy, check=3)
    assert done.stderr.startswith("error: the policy in")
    assert not (tmp_path / "marker").exists()


STOPPED_SERVICE = """
import os, signal, sys, torch, wandb, common
from common.internals.tracking import wandb_logger

start = wandb_logger.Wandb._start


def failing(self, args, facts, offline=False):
    if offline:
        return start(self, args, facts, offline)
    wandb.init(mode="offline", dir=sys.argv[2], settings=wandb.Settings(silent=True))
    self.mode = "online"
    os.kill(wandb_logger.wandb_service().pid, signal.SIGSTOP)
    raise wandb.errors.CommError("timed out")


wandb_logger.Wandb._start = failing
run = common.track(common.RunArgs(runs_dir=sys.argv[1]), torch.device("cpu"))
run.log({"x": 1.0}, 1)
run.finish()
"""


@pytest.mark.slow
def test_a_wandb_service_that_hangs_after_a_failed_login_is_replaced_in_seconds(tmp_path):
    words = [sys.executable, "-c", STOPPED_SERVICE, tmp_path / "runs", tmp_path]
    began = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)  # a service left alive holds the pipes
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 30
    assert "does not answer" in done.stdout and "done in" in done.stdout
