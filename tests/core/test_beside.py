"""What is beside training ends no training; what training needs ends it with its code, and with a checkpoint."""

import json

import numpy as np
import pytest
import slips
import torch
from conftest import load, only_run, rows, run_script, same, weights

import common
import common.internals.resume.checkpoint_files

SMALL = {
    "total_timesteps": 300,
    "learning_starts": 40,
    "batch_size": 16,
    "buffer_size": 200,
    "hidden_sizes": (16,),
    "log_interval": 50,
    "eval_interval": 100,
    "eval_episodes": 2,
    "track": False,
    "cuda": False,
    "capture_video": False,
}


@pytest.fixture(autouse=True)
def nobody_has_it(monkeypatch):
    monkeypatch.setattr(slips.OnlyOne, "taken", False)


def train(tmp_path, script="dqn", **flags):
    module = load(script)
    module.main(module.Args(**{**SMALL, "runs_dir": str(tmp_path), **flags}))
    return only_run(tmp_path)


def evaluations(run_dir):
    return [(row["global_step"], row["eval/episodic_return"]) for row in rows(run_dir) if "eval/episodic_return" in row]


@pytest.mark.parametrize(
    ("slip", "reason"),
    [
        ("ResetRaises", "RuntimeError: no seed"),
        ("StepRaises", "RuntimeError: no power"),
        ("SysExit", "SystemExit: 0"),
        ("Nan", "is nan"),
        ("Shape", "(3,)"),
    ],
)
def test_an_evaluation_that_fails_is_one_warning_and_training_goes_on(slip, reason, tmp_path, capsys):
    run_dir = train(tmp_path / "a", env_id=f"InEvaluation-{slip}-v0")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("warning: evaluation failed")
    assert reason in lines[0]
    assert "--eval-episodes 0" in lines[0]
    assert evaluations(run_dir) == []
    assert json.loads((run_dir / "finished.json").read_text())["global_step"] == 300
    plain = train(tmp_path / "b", env_id="Steady-v0", eval_episodes=0)
    assert same(weights(run_dir), weights(plain))


def test_a_close_that_raises_costs_no_evaluation(tmp_path, capsys):
    run_dir = train(tmp_path, env_id="InEvaluation-CloseRaises-v0")
    assert evaluations(run_dir) == [(100, 10.0), (200, 10.0), (300, 10.0)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert "close" in line


def test_an_environment_that_can_exist_only_once_is_evaluated_at_the_end_after_a_warning(tmp_path, capsys):
    run_dir = train(tmp_path, env_id="OnlyOne-v0")
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert "evaluation failed" in line
    assert "the port is in use" in line
    assert evaluations(run_dir) == [(300, 10.0)]
    assert "greedy evaluation 10.0" in out


def test_an_evaluation_that_would_not_end_is_cut_and_its_return_so_far_counts(tmp_path, capsys, monkeypatch):
    from common.evaluation import play

    class Stay(torch.nn.Module):
        def greedy(self, obs):
            return torch.zeros(len(obs), dtype=torch.int64)

        def parameters(self, recurse=True):
            return iter([torch.zeros(1)])

    returns, lengths = play(Stay().greedy, "Corridor-v0", 13, seed=1, max_steps=70)
    assert returns.tolist() == [70.0] * 13
    assert lengths.tolist() == [70] * 13
    (line,) = capsys.readouterr().err.splitlines()
    assert "13 of 13 evaluation episodes did not end within 70 steps" in line
    assert "--eval-max-steps" in line
    play(Stay().greedy, "Steady-v0", 3, seed=1, max_steps=70)  # ends by itself
    play(Stay().greedy, "Steady-v0", 3, seed=1, max_steps=11)
    assert capsys.readouterr().err == ""


def test_the_limit_of_an_evaluation_is_a_flag(tmp_path):
    run_dir = train(tmp_path, env_id="Corridor-v0", eval_max_steps=30, total_timesteps=100)
    assert evaluations(run_dir) == [(100, 30.0)]


@pytest.mark.parametrize("script", ["dqn", "ppo"])
def test_a_checkpoint_comes_before_every_evaluation(script, tmp_path, monkeypatch):
    seen = []
    play = common.evaluation.play

    def spy(policy, *words, **more):
        checkpoints = sorted((only_run(tmp_path) / "checkpoints").glob("step-*.pt"))
        seen.append([int(path.stem.removeprefix("step-")) for path in checkpoints][-1:])
        return play(policy, *words, **more)

    monkeypatch.setattr("common.evaluation.play", spy)
    module = load(script)
    known = {name: value for name, value in SMALL.items() if name in module.Args.__dataclass_fields__}
    flags = {"num_steps": 25, "num_envs": 2} if script == "ppo" else {}
    module.main(
        module.Args(**{**known, **flags, "env_id": "Steady-v0", "runs_dir": str(tmp_path), "total_timesteps": 200})
    )
    assert seen == [[100], [200]]


def test_a_policy_that_cannot_be_written_at_an_evaluation_is_one_warning(tmp_path, monkeypatch, capsys):
    import common.internals.tracking.policy

    calls = []

    def full(*words):
        calls.append(1)
        if 1 < len(calls) < 4:
            raise OSError(28, "No space left on device")
        return save(*words)

    save = common.internals.tracking.policy.save_policy
    monkeypatch.setattr("common.run.save_policy", full)
    run_dir = train(tmp_path, env_id="Steady-v0")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in lines] == ["policy.pt", "policy_best.pt"]
    assert all("failed, training goes on" in line and "No space left" in line for line in lines)
    assert len(evaluations(run_dir)) == 3


def broken_run(tmp_path, *flags, script="dqn"):
    """A run whose environment fails in its 163rd step, and the words that resume it."""
    words = ["--env-id", "slips:Breaks-v0", "--allow-env-import", "--runs-dir", tmp_path, "--total-timesteps", 300]
    words += ["--no-track", "--no-cuda", "--eval-episodes", 0, "--save-interval", 1000, *flags]
    done = run_script(*words, script=script, check=5)
    assert "a wire is loose" in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
    return only_run(tmp_path), ["--resume", only_run(tmp_path), "--allow-env-import"]


RAINBOW = ("--learning-starts", 40, "--batch-size", 16, "--hidden-sizes", 16, "--buffer-size", 400)
PPO = ("--num-steps", 20, "--num-envs", 2)


@pytest.mark.parametrize(("script", "flags"), [("rainbow", RAINBOW), ("ppo", PPO)])
def test_a_failing_environment_ends_the_run_after_a_checkpoint_and_resume_begins_new_episodes(script, flags, tmp_path):
    run_dir, resume = broken_run(tmp_path, *flags, script=script)
    (checkpoint,) = (run_dir / "checkpoints").glob("step-*.pt")
    assert checkpoint.name == "step-000000000162.pt"
    done = run_script(*resume, script=script)
    assert "from step 162" in done.stdout
    assert "new episodes" in done.stderr
    assert json.loads((run_dir / "finished.json").read_text())["global_step"] >= 300
    lengths = [row["charts/episodic_length"] for row in rows(run_dir) if "charts/episodic_length" in row]
    assert set(lengths) == {10.0}  # none reaches over the new beginning
    steps = [row["global_step"] for row in rows(run_dir)]
    assert steps == sorted(steps)


def test_the_cut_of_new_episodes_is_in_every_later_checkpoint(tmp_path):
    """A file of the replay that was written before holds the newest step without its truncation."""
    run_dir, resume = broken_run(tmp_path, *RAINBOW, script="rainbow")
    run_script(*resume, script="rainbow")
    saved = common.internals.resume.checkpoint_files.load_latest(run_dir / "checkpoints")
    rings = [
        common.internals.resume.checkpoint_files.read_file(run_dir / "checkpoints" / file)
        for file, _, _ in saved["segments"]["replay"]
    ]
    truncations = np.concatenate([ring["truncations"].numpy() for ring in rings])[:, 0]
    assert len(truncations) == 300
    assert np.flatnonzero(truncations).tolist() == [*range(9, 162, 10), 161, *range(171, 300, 10)]


def test_returns_of_n_steps_end_where_a_resume_began_new_episodes():
    def add(replay, t, truncation=False):
        flag = torch.tensor([truncation])
        replay.add(
            obs=torch.tensor([[float(t)]]),
            actions=torch.zeros(1, dtype=torch.int64),
            rewards=torch.tensor([float(t)]),
            next_obs=torch.tensor([[t + 0.5]]),
            terminations=torch.tensor([False]),
            truncations=flag,
        )

    def table(replay):
        batch = replay.newest(len(replay))
        rows = zip(batch.obs[:, 0], batch.rewards, batch.discounts, batch.next_obs[:, 0], strict=True)
        return [tuple(map(float, row)) for row in rows]

    resumed = common.ReplayBuffer(10, 1, n_step=3, gamma=0.5)
    expected = common.ReplayBuffer(10, 1, n_step=3, gamma=0.5)
    for t in range(4):
        add(resumed, t)
        add(expected, t, truncation=t == 3)
    resumed.new_episodes()
    for t in range(10, 14):
        add(resumed, t)
        add(expected, t)
    assert table(resumed) == table(expected)
    assert (2.0, 2 + 0.5 * 3, 0.25, 3.5) in table(resumed)  # by hand: the return from 2 ends with 3


def test_the_reward_scaler_begins_new_sums_with_new_episodes():
    scaler = common.RewardScaler(2, gamma=0.9)
    ends = torch.zeros(3, 2, dtype=torch.bool)
    scaler.update(torch.ones(3, 2), ends)
    before = scaler.returns.state_dict()
    scaler.new_episodes()
    assert same(before, scaler.returns.state_dict())
    one, two = common.RewardScaler(2, gamma=0.9), common.RewardScaler(2, gamma=0.9)
    one.load_state_dict(scaler.state_dict())
    one.update(torch.ones(1, 2), ends[:1])
    two.update(torch.ones(1, 2), ends[:1])
    assert torch.equal(one.running, two.running)  # the sum of one reward


@pytest.mark.parametrize(("num_envs", "frequency"), [(8, 1), (8, 3), (3, 7)])
def test_there_are_as_many_target_updates_as_due(num_envs, frequency, tmp_path, monkeypatch):
    module = load("dqn")
    calls = []
    polyak = module.polyak_update
    monkeypatch.setattr(module, "polyak_update", lambda *words: (calls.append(1), polyak(*words)))
    flags = {**SMALL, "env_id": "Steady-v0", "runs_dir": str(tmp_path), "eval_episodes": 0, "num_envs": num_envs}
    module.main(module.Args(**flags, target_network_frequency=frequency, tau=0.005))
    steps = -(-300 // num_envs) * num_envs
    assert len(calls) == (steps - 40) // frequency


def test_growing_total_timesteps_is_reported(tmp_path, capsys):
    module = load("dqn")
    flags = {**SMALL, "env_id": "Steady-v0", "runs_dir": str(tmp_path), "eval_episodes": 0}
    module.main(module.Args(**flags))
    run_dir = only_run(tmp_path)
    capsys.readouterr()
    module.main(module.Args(**{**flags, "resume": str(run_dir), "total_timesteps": 400}))
    (line,) = capsys.readouterr().err.splitlines()
    assert "total_timesteps was 300, is now 400" in line
    assert "learning rate" in line
    assert "jump" in line


def test_nothing_is_left_behind_by_what_does_not_fit_into_memory(tmp_path):
    done = run_script("--buffer-size", "1e12", "--runs-dir", tmp_path / "runs", check=2)
    assert done.stderr.startswith("error: ")
    assert "--buffer-size" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_policy_that_cannot_be_written_at_the_end_is_exit_6_and_the_run_is_not_finished(
    tmp_path, monkeypatch, capsys
):
    import common.internals.tracking.policy

    save, steps = common.internals.tracking.policy.save_policy, []

    def full(policy, path, wrap):
        if steps and steps[-1] >= 300:
            raise OSError(28, "No space left on device")
        save(policy, path, wrap)

    log_episodes = common.Run.log_episodes
    monkeypatch.setattr(common.Run, "log_episodes", lambda run, i, s: (steps.append(s), log_episodes(run, i, s))[1])
    monkeypatch.setattr("common.run.save_policy", full)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, env_id="Steady-v0", eval_episodes=0)
    assert stop.value.code == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cannot write")
    assert not (only_run(tmp_path) / "finished.json").exists()


def test_metrics_that_the_disk_took_are_kept_by_a_resumed_run(tmp_path, monkeypatch, capsys):
    """A full disk turns metrics.jsonl off; a checkpoint after that must not say that it was empty."""
    from common.internals.tracking.local_loggers import JsonLines

    log, rows_written = JsonLines.log, []

    def full(self, row, step, seconds):
        if step > 150:
            raise OSError(28, "No space left on device")
        rows_written.append(step)
        log(self, row, step, seconds)

    monkeypatch.setattr(JsonLines, "log", full)
    run_dir = train(tmp_path, env_id="Steady-v0", eval_episodes=0)
    assert "metrics.jsonl failed" in capsys.readouterr().err
    saved = common.internals.resume.checkpoint_files.load_latest(run_dir / "checkpoints")
    assert saved["step"] == 300
    assert saved["run"]["loggers"]["metrics_size"] == (run_dir / "metrics.jsonl").stat().st_size
    assert len(rows(run_dir)) == len(rows_written) > 10
