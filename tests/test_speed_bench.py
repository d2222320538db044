"""runs/bench/speed.py: its arithmetic, its tables, and that everybody is given the same work."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, load

import common

sys.path.insert(0, str(ROOT / "runs" / "bench"))

import speed
import speed_parts
from speed_parts import OURS, WORKS


@pytest.fixture(autouse=True)
def same_affinity():
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


# --- what a process says --------------------------------------------------------------------------------------------


def test_rows_are_told_from_everything_else_a_script_prints():
    said = speed.read(
        'VERSIONS {"a": "1"}\nstep 5: CLOCK\nCLOCK 512 1.5 1.25\nEVAL 5000 7.5 6 475.5\nMEMORY 2048\nCLOCK 1024 2 1'
    )
    assert said["CLOCK"] == [(512, 1.5, 1.25), (1024, 2, 1)]
    assert said["EVAL"] == [(5000, 7.5, 6, 475.5)]
    assert said["MEMORY"] == 2048 and said["VERSIONS"] == {"a": "1"}
    assert speed.read("") == {"CLOCK": [], "EVAL": []}


def test_speed_is_measured_between_the_outermost_rows_of_the_window_by_each_clock():
    rows = [(90, 1.0, 1.0), (100, 2.0, 1.5), (150, 2.5, 1.75), (300, 6.0, 3.5), (310, 9.0, 9.0)]
    assert speed.rates(rows, (100, 305)) == {"wall": 50.0, "processor": 100.0}
    assert speed.rates(rows, (100, 300)) == {"wall": 50.0, "processor": 100.0}
    with pytest.raises(ValueError, match="1 rows between steps 301 and 320"):
        speed.rates(rows, (301, 320))


def test_the_warm_up_is_left_out():
    rows = [(0, 1.0, 10.0), (1, 8.0, 10.9), (2, 9.0, 11.0), (3, 9.5, 12.0)]
    assert speed.warm(rows, 1.0) == rows[2:]


def test_the_best_peer_is_the_one_with_the_largest_median_and_never_ours():
    speeds = {"eager": [900.0], "sb3": [1.0, 100.0, 3.0], "sbx": [4.0, 4.0, 4.0], "cleanrl": []}
    assert speed.best_peer(speeds) == "sbx"
    assert speed.best_peer({"eager": [1.0]}) is None


def test_ratios_are_between_runs_of_the_same_round():
    assert speed.ratios([4.0, None, 6.0, 8.0], [2.0, 1.0, None, 1.0]) == [2.0, 8.0]
    with pytest.raises(ValueError):
        speed.ratios([1.0], [1.0, 2.0])


def test_spread():
    assert speed.spread([3.0, 1.0, 1000.0]) == "3 (1 to 1,000)"
    assert speed.spread([1.0, 2.0], ".2f") == "1.50 (1.00 to 2.00)"
    assert speed.spread([2.0]) == "2" and speed.spread([]) == "-"


# --- tables and files -----------------------------------------------------------------------------------------------


def rounds(**parts):
    return {part: [row and {"wall": row[0], "processor": row[1]} for row in rows] for part, rows in parts.items()}


STEPS = {
    "job": "steps",
    "works": {
        "dqn": {
            "rounds": rounds(
                eager=[(200.0, 300.0), (100.0, 300.0)],
                compiled=[(400.0, 600.0), None],
                sb3=[(100.0, 50.0), (100.0, 50.0)],
                cleanrl=[(50.0, 100.0), (40.0, 200.0)],
            ),
            "phases": {"eager": {"steps": 1000, "seconds": {"update": 0.25, "acting": 0.005}}},
        }
    },
}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_steps():
    wall, processor, phases = (
        cells(line) for line in speed.steps_table(STEPS) if line.startswith(("| dqn |", "| dqn, eager"))
    )
    assert wall == [
        "dqn", "150 (100 to 200)", "400", "-", "100 (100 to 100)", "-", "45 (40 to 50)",
        "Stable-Baselines3", "1.50 (1.00 to 2.00)", "4.00", "-",
    ]  # fmt: skip
    assert processor[7:] == ["CleanRL", "2.25 (1.50 to 3.00)", "6.00", "-"]
    assert phases == ["dqn, eager", "5.0", "250.0", "255.0"]


def test_a_table_without_peers_has_no_ratio():
    only = {"works": {"ppo": {"rounds": rounds(eager=[(10.0, 10.0)]), "phases": {}}}}
    assert [cells(line)[-4:] for line in speed.steps_table(only) if line.startswith("| ppo")] == [["-"] * 4] * 2


def test_a_run_that_did_not_solve_the_task_counts_as_infinitely_long():
    def row(solved, wall):
        return {"solved": solved, "steps": 5000, "wall": wall, "processor": wall / 3}

    result = {
        "rounds": {
            "eager": [row(True, 4.0), row(True, 2.0), row(True, 3.0)],
            "sb3": [row(True, 12.0), row(False, 300.0), row(True, 10.0)],
            "cleanrl": [row(True, 1.0), row(False, 300.0), row(False, 300.0)],
        }
    }
    lines = [cells(line) for line in speed.solved_table(result)[2:-1]]
    assert lines[0] == [
        "ours", "3 of 3", "5,000 (5,000 to 5,000)", "3.0 (2.0 to 4.0)", "0.25", "1.0 (0.7 to 1.3)", "0.25",
    ]  # fmt: skip
    assert lines[1][1] == "2 of 3" and lines[1][-1] == lines[1][-3] == "1.00"
    assert lines[2][1] == "1 of 3" and lines[2][-1] == lines[2][-3] == "inf"
    del result["rounds"]["sb3"], result["rounds"]["cleanrl"]
    assert cells(speed.solved_table(result)[2])[-1] == "-"


def test_the_result_file_makes_the_same_table(tmp_path, capsys):
    args = speed.argparse.Namespace(job="steps", core=0, cleanrl=None)
    bench = speed.Bench(args, tmp_path / "new" / "steps.json", works=STEPS["works"])
    bench.save()
    saved = json.loads(bench.out.read_text())
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert saved["commit"] == commit and saved["core"] == 0 and len(saved["load_at_end"]) == 3
    speed.main(["table", str(bench.out)])
    assert capsys.readouterr().out.splitlines() == speed.steps_table(STEPS)


def test_steps_writes_down_every_round_and_the_phases(tmp_path, monkeypatch, capsys):
    seen = []

    def said(bench, job, part, work):
        seen.append((job, part, work))
        if job == "phases":
            return {"PHASES": {"steps": 1000, "seconds": {part: 0.5}}}
        if part == "compiled" and seen.count(("steps", "compiled", "dqn")) == 2:
            return {"CLOCK": []}  # it failed
        return {"CLOCK": [(12_000, 1.0, 1.0), (32_000, 3.0, 2.0)]}

    monkeypatch.setattr(speed.Bench, "run", said)
    core = str(min(os.sched_getaffinity(0)))
    speed.main(["steps", "dqn", "--core", core, "--rounds", "2", "--out", str(tmp_path / "steps.json")])
    found = json.loads((tmp_path / "steps.json").read_text())["works"]["dqn"]
    rate = {"wall": 10_000.0, "processor": 20_000.0}
    assert found["rounds"] == {"eager": [rate, rate], "compiled": [rate, None]}
    assert found["phases"] == {part: {"steps": 1000, "seconds": {part: 0.5}} for part in ("eager", "compiled")}
    assert [part for job, part, _ in seen if job == "steps"] == ["eager", "compiled", "compiled", "eager"]
    assert "warning: dqn, compiled: 0 rows" in capsys.readouterr().err


def test_solved_writes_down_how_long_each_seed_took(tmp_path, monkeypatch):
    def said(bench, job, part, seed, limit):
        now = time.monotonic()
        rows = [(5000, now + 1, 2.0, 9.0), (10_000, now + 7, 5.0, 475.0 if part == "eager" else 474.9)]
        return {"EVAL": rows if seed == "1" else []}

    monkeypatch.setattr(speed.Bench, "run", said)
    core = str(min(os.sched_getaffinity(0)))
    speed.main(["solved", "--core", core, "--rounds", "2", "--out", str(tmp_path / "solved.json")])
    rounds = json.loads((tmp_path / "solved.json").read_text())["rounds"]
    assert [row["solved"] for row in rounds["eager"]] == [True, False]
    assert [row["solved"] for row in rounds["compiled"]] == [False, False]
    first = rounds["eager"][0]
    assert (first["steps"], first["processor"], first["return"]) == (10_000, 5.0, 475.0)
    assert first["wall"] == pytest.approx(7, abs=0.5)


def test_a_figure_is_small(tmp_path):
    pytest.importorskip("matplotlib")
    points = [
        {"flag": flag, "value": value, "processor": 1e5 / value, "memory": 250.0 + value**0.5}
        for flag, values in speed.SWEEPS.items()
        for value in values
    ]
    points[0] |= {"processor": None, "memory": None}  # a point that failed
    speed.draw({"script": "dqn", "env_id": "CartPole-v1", "points": points}, tmp_path / "cost.png")
    assert 5_000 < (tmp_path / "cost.png").stat().st_size < 80_000


# --- the same work for everybody ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "part"), [*((name, "compiled") for name in WORKS), ("sac", "bf16")])
def test_our_scripts_take_every_flag_of_the_work(name, part):
    work = WORKS[name]
    args = common.parse(load(work.script).Args, argv=speed_parts.ours_flags(work, part, "somewhere"))
    assert getattr(args, "bf16", False) == (part == "bf16")
    assert {flag: getattr(args, flag.replace("-", "_")) for flag in work.flags} == work.flags
    assert args.compile and args.total_timesteps == work.window[1] and args.hidden_sizes == work.hidden_sizes
    assert args.track and args.eval_episodes == 0
    assert not getattr(args, "double", False)  # no peer has it


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ppo", {"n_steps": 128, "batch_size": 4 * 128 // 4, "n_epochs": 4, "clip_range_vf": 0.2, "ent_coef": 0.01}),
        ("ppo-64", {"n_steps": 32, "batch_size": 64 * 32 // 4, "n_epochs": 4}),
        ("ppo-mujoco", {"n_steps": 2048, "batch_size": 64, "n_epochs": 10, "ent_coef": 0.0}),
        ("dqn", {"batch_size": 128, "train_freq": 10, "target_update_interval": 500, "learning_starts": 10_000}),
        ("sac", {"batch_size": 256, "learning_rate": 3e-4, "tau": 0.005, "buffer_size": 1_000_000}),
    ],
)
def test_peers_are_given_the_same_numbers(name, expected):
    words, num_envs = speed_parts.sb3_arguments(WORKS[name])
    assert expected.items() <= words.items()
    assert words["policy_kwargs"] == {"net_arch": list(WORKS[name].hidden_sizes)}
    assert num_envs == {"ppo": 4, "ppo-64": 64}.get(name, 1)


def test_a_flag_that_peers_do_not_know_is_not_forgotten():
    work = speed_parts.Work("dqn", "dqn", "CartPole-v1", (0, 1), {"gamma": 0.9, "new-flag": 1})
    with pytest.raises(KeyError, match="new-flag"):
        speed_parts.sb3_arguments(work)


def test_windows_are_after_the_first_updates_and_begin_and_end_with_a_rollout():
    for work in WORKS.values():
        first, last = work.window
        assert work.flags.get("learning-starts", 0) < first < last
        if work.script == "ppo":
            rollout = work.flags["num-envs"] * work.flags["num-steps"]
            assert first % rollout == last % rollout == 0 and first >= 2 * rollout


def test_each_round_has_every_part_and_begins_with_another(tmp_path):
    args = speed.argparse.Namespace(job="steps", core=0, sb3_python="a", sbx_python=None, cleanrl_python="b")
    bench = speed.Bench(args, tmp_path / "steps.json")
    orders = [bench.parts(number, bf16=True) for number in range(5)]
    assert all(sorted(order) == sorted([*OURS, "sb3", "cleanrl"]) for order in orders)
    assert len({order[0] for order in orders}) == 5
    assert set(bench.parts(0)) == {"eager", "compiled", "sb3", "cleanrl"}


# --- inside the processes -------------------------------------------------------------------------------------------


def burn(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_processor_time_is_that_of_descendants_too():
    code = "import time\nwhile time.process_time() < 0.5: pass\nprint('done', flush=True)\ntime.sleep(60)"
    shell = subprocess.Popen(["sh", "-c", f'"{sys.executable}" -c "{code}"; true'], stdout=subprocess.PIPE)
    before = speed_parts.processor_time()
    alone = time.process_time()
    assert shell.stdout.readline() == b"done\n"
    (child,) = Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
    gained = speed_parts.processor_time() - time.process_time() - (before - alone)
    os.kill(int(child), 9)
    shell.wait()
    assert gained > 0.3


def test_the_profile_gives_each_phase_its_time(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(
        "def main(burn):\n"
        "    def act():\n        burn(0.01)\n"
        "    def update():\n        burn(0.03)\n"
        "    for _ in range(15):\n        act()\n        update()\n"
    )
    names = {}
    exec(compile(script.read_text(), str(script), "exec"), names)
    profile = speed_parts.Profile(str(script))
    profile.start()
    names["main"](burn)
    profile.stop()
    assert set(profile.seconds) <= {"acting", "update", "loop"}
    assert profile.seconds["acting"] == pytest.approx(0.15, rel=0.25)
    assert profile.seconds["update"] == pytest.approx(0.45, rel=0.15)


@pytest.mark.parametrize(
    ("inner", "phase"),
    [
        ([], "loop"),
        ([("SCRIPT", "main.<locals>.act"), ("torch/nn/modules/module.py", "Module._call_impl")], "acting"),
        ([("torch/utils/_contextlib.py", "decorate_context"), ("SCRIPT", "main.<locals>.act")], "acting"),
        ([("SCRIPT", "Agent.sample"), ("SCRIPT", "Agent.features")], "acting"),
        ([("SCRIPT", "main.<locals>.update_critic"), ("SCRIPT", "Actor.sample")], "update"),
        ([("COMMON/compilation.py", "run"), ("SCRIPT", "main.<locals>.update")], "update"),
        ([("SCRIPT", "gae")], "update"),
        ([("COMMON/envs.py", "Envs.step"), ("gymnasium/vector/sync_vector_env.py", "step")], "environment"),
        ([("COMMON/replay.py", "ReplayBuffer.add"), ("COMMON/priorities.py", "Priorities.add")], "storing"),
        ([("COMMON/replay.py", "ReplayBuffer.sample")], "sampling"),
        ([("COMMON/replay.py", "ReplayBuffer.spread")], "logging"),
        ([("COMMON/health.py", "vitals"), ("SCRIPT", "Agent.features")], "logging"),
        ([("COMMON/rollout.py", "RolloutStorage.add")], "storing"),
        ([("COMMON/rollout.py", "RolloutStorage.minibatches")], "sampling"),
        ([("bench.py", "log_and_then"), ("COMMON/run.py", "Run.log"), ("COMMON/local_loggers.py", "write")], "logging"),
    ],
)
def test_phases_are_told_by_what_the_training_loop_called(inner, phase):
    def real(path):
        return path.replace("SCRIPT", "/x/dqn.py").replace("COMMON", str(ROOT / "common"))

    frames = [("runpy.py", "run_path"), ("/x/dqn.py", "<module>"), ("/x/dqn.py", "main")]
    assert speed_parts.phase_of([*frames, *((real(path), name) for path, name in inner)], "/x/dqn.py") == phase
    assert speed_parts.phase_of(frames[:2], "/x/dqn.py") == "other"


def test_functions_that_phases_are_told_by_exist():
    """A renamed function would silently become a part of the loop, or of the update."""
    from common import envs, replay, rollout, run

    assert envs.Envs.step and replay.ReplayBuffer.sample and replay.ReplayBuffer.spread and common.diagnostics
    assert rollout.RolloutStorage.minibatches and run.Run.log_episodes and replay.ReplayBuffer.mean_age
    for script in ("dqn", "sac"):
        assert "    def act(" in (ROOT / "algos" / f"{script}.py").read_text()
    assert "agent.sample(obs)" in (ROOT / "algos" / "ppo.py").read_text()


def test_greedy_return_is_that_of_the_episodes_played_one_by_one(monkeypatch):
    monkeypatch.setattr(speed_parts, "SOLVED_EPISODES", 4)
    total = 0
    for i in range(4):
        env = gym.make("CartPole-v1")
        obs, _ = env.reset(seed=10_000 + i)
        ended = False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(int(obs[2] + obs[3] > 0))
            total += reward
            ended = terminated or truncated
    assert speed_parts.greedy_return(lambda obs: (obs[:, 2] + obs[:, 3] > 0).astype(np.int64)) == total / 4 > 50


def test_a_filled_replay_is_full_and_then_goes_on_as_usual():
    replay = common.ReplayBuffer(1_001, 2, "cpu")
    add = common.ReplayBuffer.add
    step = {
        "obs": torch.tensor([[1.0], [2.0]]),
        "next_obs": torch.zeros(2, 1),
        "actions": torch.zeros(2, dtype=torch.int64),
        "rewards": torch.zeros(2),
        "terminations": torch.zeros(2, dtype=torch.bool),
    }
    speed_parts.fill_replay()
    try:
        replay.add(**step)
        assert len(replay) == 1_000 and common.ReplayBuffer.add is add
    finally:
        common.ReplayBuffer.add = add
    other = common.ReplayBuffer(1_000, 2, "cpu")
    other.add(**step)
    assert len(other) == 2


def test_cleanrl_runs_as_it_is_and_its_rows_and_networks_are_seen(tmp_path, monkeypatch):
    from torch.utils import tensorboard

    (tmp_path / "cleanrl").mkdir()
    (tmp_path / "cleanrl_utils.py").write_text("number = 7\n")
    (tmp_path / "cleanrl" / "fake.py").write_text(
        "import sys, cleanrl_utils\nfrom torch.utils.tensorboard import SummaryWriter\n"
        "if __name__ == '__main__':\n"
        "    writer, agent = SummaryWriter('runs/x'), (cleanrl_utils.number, sys.argv[1:])\n"
        "    writer.add_scalar('charts/SPS', 5, 512)\n    writer.add_scalar('losses/td_loss', 5, 512)\n"
        "    writer.close()\n"
    )
    monkeypatch.setattr(tensorboard, "SummaryWriter", tensorboard.SummaryWriter)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(tmp_path)
    seen = []
    speed_parts.run_cleanrl(
        str(tmp_path), "fake", ["--seed", "1"], lambda step, names: seen.append((step, names["agent"]))
    )
    assert seen == [(512, (7, ["--seed", "1", "--no-cuda"]))]
    assert not (tmp_path / "runs").exists()


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["steps", "dqn", "--core", "4096"], "--core 4096 is none of this process's"),
        (["steps", "dqn", "--core", "CORE", "--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["steps", "dqn", "--core", "CORE", "--cleanrl", "x"], "CleanRL needs both --cleanrl, its checkout"),
        (["solved", "--core", "CORE", "--cleanrl", ".", "--cleanrl-python", sys.executable], "no checkout of CleanRL"),
        (["solved", "--core", "CORE", "--sb3-python", "/nowhere/python"], "is no interpreter that can be run"),
        (["cost", "dqn", "ppo", "--core", "CORE", "--out", "x.json"], "--out names one file"),
        (["table", __file__], "is no result of this command"),
    ],
)
def test_bad_input_is_one_line(words, error, capsys):
    core = str(min(os.sched_getaffinity(0)))
    with pytest.raises(SystemExit) as stop:
        speed.main([core if word == "CORE" else word for word in words])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and error in line


def test_a_result_that_cannot_be_written_is_known_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        speed.Bench(speed.argparse.Namespace(job="steps", core=0), tmp_path / "file" / "steps.json")
    assert stop.value.code == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cannot write")


def test_a_peer_that_fails_is_one_warning_and_the_rest_goes_on(tmp_path, capsys):
    args = speed.argparse.Namespace(job="steps", core=0, sb3_python=sys.executable, cleanrl=None)
    bench = speed.Bench(args, tmp_path / "steps.json")
    said = bench.run("steps", "sb3", "no-such-work")
    assert said["CLOCK"] == [] and said["VERSIONS"]["gymnasium"] == gym.__version__
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: steps sb3 no-such-work: exit code 1: KeyError")


def test_a_point_of_a_cost_curve(tmp_path):
    """A whole one: the script runs, gives rows, and ends by itself with its peak memory."""
    args = speed.argparse.Namespace(job="cost", core=0)
    words = ["--seconds", "0.2", "--fill", "--buffer-size", "20000", "--hidden-sizes", "16", "16"]
    said = speed.Bench(args, tmp_path / "x.json").run(
        "cost", "eager", "dqn", *words, *speed.COSTS["all"].split(), *speed.COSTS["dqn"].split()
    )
    assert speed.rates(speed.warm(said["CLOCK"], speed.WARM_UP), (0, float("inf")))["processor"] > 0
    assert 50 < said["MEMORY"] / 1024 < 5_000
