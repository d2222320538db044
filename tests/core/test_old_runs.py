"""Runs that older code made (commit d2ad9b7, the 24th of November 2026) can still be evaluated and compared."""

import gzip
import json
import shutil

import pytest
from conftest import ROOT, run_script

from common.tools import evaluate
from common.tools.compare import compare
from common.tools.compare.tables import number

OLD = ROOT / "tests" / "old_runs"
RUNS = sorted(OLD.iterdir())


def last_evaluation(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["eval/episodic_return"] for row in rows if "eval/episodic_return" in row][-1]


@pytest.mark.parametrize("run_dir", RUNS, ids=lambda path: path.name)
def test_the_last_evaluation_of_an_old_run_can_be_played_again(run_dir, tmp_path):
    evaluate.main([str(run_dir), "--json", str(tmp_path / "scores.json")])
    (score,) = json.loads((tmp_path / "scores.json").read_text())
    assert score["mean"] == pytest.approx(last_evaluation(run_dir), rel=1e-6)


def test_old_runs_can_be_compared(tmp_path, capsys):
    shutil.copytree(OLD, tmp_path / "runs")
    compare.main([str(tmp_path / "runs")])
    shown = capsys.readouterr().out
    assert len(RUNS) == 2 and all(number(last_evaluation(run_dir)) in shown for run_dir in RUNS)


def test_a_checkpoint_of_an_earlier_format_is_refused_in_one_line_and_nothing_changes(tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(OLD / "Pendulum-v1__ppo__1__old", copy)
    (packed,) = (copy / "checkpoints").glob("*.pt.gz")
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    done = run_script("--resume", copy, "--total-timesteps", 10_000, script="ppo", check=3)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "checkpoint format 1, and this version reads 3" in errors[0]
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != ".lock"} == before
