"""runs/bench/speed.py: its arithmetic, that everybody is given the same work, and one real measurement."""

import os
import sys

import pytest
from conftest import ROOT, load

import common

sys.path.insert(0, str(ROOT / "runs" / "bench"))

import speed
import speed_parts
from speed_parts import WORKS


@pytest.fixture(autouse=True)
def same_affinity():
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


def test_speed_is_measured_between_the_outermost_rows_of_the_window_by_each_clock():
    rows = [(90, 1.0, 1.0), (100, 2.0, 1.5), (150, 2.5, 1.75), (300, 6.0, 3.5), (310, 9.0, 9.0)]
    assert speed.rates(rows, (100, 305)) == {"wall": 50.0, "processor": 100.0}
    assert speed.rates(rows, (100, 300)) == {"wall": 50.0, "processor": 100.0}
    with pytest.raises(ValueError, match="1 rows between steps 301 and 320"):
        speed.rates(rows, (301, 320))


def test_the_best_peer_is_the_one_with_the_largest_median_and_never_ours():
    speeds = {"eager": [900.0], "sb3": [1.0, 100.0, 3.0], "sbx": [4.0, 4.0, 4.0], "cleanrl": []}
    assert speed.best_peer(speeds) == "sbx"
    assert speed.best_peer({"eager": [1.0]}) is None


def test_ratios_are_between_runs_of_the_same_round():
    assert speed.ratios([4.0, None, 6.0, 8.0], [2.0, 1.0, None, 1.0]) == [2.0, 8.0]
    with pytest.raises(ValueError):
        speed.ratios([1.0], [1.0, 2.0])


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


def test_a_point_of_a_cost_curve(tmp_path):
    """A whole one: the script runs, gives rows, and ends by itself with its peak memory."""
    args = speed.argparse.Namespace(job="cost", core=0)
    words = ["--seconds", "0.2", "--fill", "--buffer-size", "20000", "--hidden-sizes", "16", "16"]
    said = speed.Bench(args, tmp_path / "x.json").run(
        "cost", "eager", "dqn", *words, *speed.COSTS["all"].split(), *speed.COSTS["dqn"].split()
    )
    assert speed.rates(speed.warm(said["CLOCK"], speed.WARM_UP), (0, float("inf")))["processor"] > 0
    assert 50 < said["MEMORY"] / 1024 < 5_000
