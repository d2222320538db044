"""The Lightning script is dqn.py under another trainer: it must learn the same, to the bit, and end as well."""

import functools
import importlib.metadata
import importlib.util
import json
import math
import operator
import os
import signal

import pytest
import torch
import warm
from conftest import ROOT, clockless, envs_of, load, only_run, rows, run_script, run_tool, same, train_with, weights

import common

if importlib.util.find_spec("lightning") is None:
    pytest.skip('needs pip install -e ".[lightning]"', allow_module_level=True)


dqn, script = load("dqn"), load("dqn_lightning")
train = functools.partial(train_with, script)
SMALL = {"env_id": "CartPole-v1", "total_timesteps": 300, "learning_starts": 100, "log_interval": 100}


@pytest.fixture(autouse=True)
def handlers_put_back():
    """After a run that is stopped, Lightning's teardown puts the run's own signal handlers back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"num_envs": 3, "train_frequency": 1, "target_network_frequency": 10},  # three updates in a row
        {"num_envs": 3, "train_frequency": 7, "target_network_frequency": 10, "total_timesteps": 301},
        {"env_id": "Mixed-v0", "learning_starts": 0, "gamma": 0.9, "tau": 0.3, "learning_rate": 1e-4},
        {"env_id": "Truncating-v0", "double": False, "anneal_lr": False, "learning_rate": 1e-4},
        {"buffer_size": 64, "batch_size": 20, "hidden_sizes": (8,), "start_e": 0.7, "exploration_fraction": 0.1},
        {"eval_episodes": 2, "eval_interval": 150, "capture_video": False},
    ],
    ids=lambda flags: "-".join(flags) or "default",
)
def test_it_learns_what_dqn_learns_to_the_bit(flags, tmp_path):
    ours, theirs = train(tmp_path, **{**SMALL, **flags}), train_with(dqn, tmp_path, **{**SMALL, **flags})
    assert same(weights(ours), weights(theirs))
    assert clockless(ours) == clockless(theirs)
    assert any("losses/td_loss" in row for row in rows(ours))


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("learning_starts", [0, 100, 1000])
def test_budget_updates_and_targets_follow_environment_steps(learning_starts, num_envs, tmp_path, monkeypatch):
    counts = {"step": 0, "update": 0, "target": 0, "adam": 0}

    class Counted(common.Envs):
        def step(self, actions):
            counts["step"] += len(actions)
            return super().step(actions)

    def counted(name, function):
        def wrapper(*words, **options):
            counts[name] += 1
            return function(*words, **options)

        return wrapper

    monkeypatch.setattr("common.envs.Envs", Counted)
    monkeypatch.setattr(script, "dqn_loss", counted("update", script.dqn_loss))
    monkeypatch.setattr(script, "polyak_update", counted("target", script.polyak_update))
    monkeypatch.setattr(torch.optim.Adam, "step", counted("adam", torch.optim.Adam.step))
    flags = {"total_timesteps": 400, "train_frequency": 4, "target_network_frequency": 50, "log_interval": 100}
    run = train(tmp_path, num_envs=num_envs, learning_starts=learning_starts, **flags)
    taken = math.ceil(400 / num_envs) * num_envs
    assert counts["step"] == taken
    assert counts["update"] == counts["adam"] == max(taken - learning_starts, 0) // 4
    assert counts["target"] == max(taken - learning_starts, 0) // 50
    assert len([row for row in rows(run) if "charts/SPS" in row]) == 4


def test_the_networks_are_on_the_device_before_the_first_steps(tmp_path):
    """Lightning moves a module only in fit(); a device that no machine lacks stands for the GPU."""
    envs = envs_of("CartPole-v1", 1)
    args = script.Args(track=False, runs_dir=str(tmp_path))
    run = common.track(args, torch.device("cpu"))
    run.save_policy = lambda policy: None  # it has no numbers there
    module = script.DQN(envs, args, run, torch.device("meta"))
    run.finish()
    envs.close()
    assert module.device.type == "meta"
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    assert all(map(operator.is_, module.optimizer.param_groups[0]["params"], module.q_network.parameters()))


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("elsewhere")
    flags = ("--total-timesteps", 1200, "--learning-starts", 500, "--eval-episodes", 2, "--eval-interval", 600)
    home = {"HOME": str(cwd / "home"), "WANDB_CONFIG_DIR": str(cwd / "home")}
    return run_script(*flags, "--cuda", script="dqn_lightning", cwd=cwd, env=home), only_run(cwd / "runs")


def test_the_command_prints_and_leaves_what_dqn_does(command):
    done, run = command
    lines = done.stdout.splitlines()
    assert done.stderr == ""
    assert lines[0] == "no CUDA GPU found: training on the CPU" or torch.cuda.is_available()
    assert [line.split()[0] for line in lines if "steps/s" in line] == ["500/1,200", "1,000/1,200"]
    assert sum("greedy evaluation" in line for line in lines) == 2
    assert "done in" in lines[-2] and "wandb sync" in lines[-1]
    names = {"events.out.tfevents" if "tfevents" in path.name else path.name for path in run.iterdir()}
    files = {
        "args.json",
        "metrics.jsonl",
        "events.out.tfevents",
        "finished.json",
        ".lock",
        "policy.pt",
        "policy_best.pt",
    }
    assert names == files | {"wandb", "videos", "source", "checkpoints"}
    assert len(list((run / "videos").glob("*.mp4"))) == 2
    assert list((run / "wandb").glob("offline-run-*"))
    assert run.name.startswith("CartPole-v1__dqn_lightning__1__")
    assert (run / "source/dqn_lightning.py").read_text() == (ROOT / "algos/dqn_lightning.py").read_text()
    args = json.loads((run / "args.json").read_text())
    assert vars(script.Args()).keys() <= args.keys()
    assert args["versions"]["lightning"] == importlib.metadata.version("lightning")
    logged = [row for row in rows(run) if "charts/SPS" in row]
    assert [row["global_step"] for row in logged] == [500, 1000]
    keys = {"losses/td_loss", "losses/q_values", "charts/epsilon", "charts/learning_rate"}
    assert keys <= logged[-1].keys()
    assert logged[-1]["health/time_update"] > logged[-1]["health/time_env"] > 0


def test_the_policy_is_evaluated_in_a_new_process(command):
    _, run = command
    done = run_tool("evaluate", run, "--episodes", 2)
    assert f"{rows(run)[-1]['eval/episodic_return']:.1f}" in done.stdout


@pytest.mark.parametrize(
    ("when", "number"),
    [
        ("in an update", signal.SIGTERM),
        ("in an update", signal.SIGINT),
        ("in an environment step", signal.SIGTERM),
        ("after it", signal.SIGTERM),
        ("after it", signal.SIGINT),
        ("after the last", signal.SIGTERM),
    ],
)
def test_a_signal_ends_the_run_by_our_rules_and_keeps_what_was_learnt(when, number, tmp_path, monkeypatch, capsys):
    calls = 0

    def killing(function, at):
        def wrapper(*words, **options):
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), number)
            return function(*words, **options)

        return wrapper

    if when == "in an update":
        monkeypatch.setattr(script, "dqn_loss", killing(script.dqn_loss, at=50))
    elif when == "in an environment step":
        monkeypatch.setattr(common.Envs, "step", killing(common.Envs.step, at=200))
    else:  # Lightning's look comes before ours at the next environment step
        at = 200 if when == "after it" else 300
        monkeypatch.setattr(common.ReplayBuffer, "add", killing(common.ReplayBuffer.add, at=at))
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, **SMALL, train_frequency=1)
    assert stop.value.code == 128 + number
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and f"stopped by {number.name}" in errors[0]
    envs = envs_of("CartPole-v1", 1)
    torch.manual_seed(1)
    untrained = script.QNetwork(envs, script.Args()).state_dict()
    envs.close()
    assert not same(weights(only_run(next(tmp_path.iterdir()))), untrained)


def test_sigterm_ends_the_command_with_143(tmp_path):
    flags = ("--total-timesteps", "1e6", "--learning-starts", "100", "--log-interval", "200", "--runs-dir", tmp_path)
    process = warm.Warm([ROOT / "algos/dqn_lightning.py", *flags])
    assert any("steps/s" in line for line in process.stdout)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "stopped by SIGTERM" in line
    assert "Traceback" not in err
    assert (only_run(tmp_path) / "policy.pt").exists()


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, **{**SMALL, "learning_rate": 1e30})
    assert stop.value.code == 4
    assert "losses/td_loss is" in capsys.readouterr().err
    assert all(value.isfinite().all() for value in weights(only_run(next(tmp_path.iterdir()))).values())


@pytest.mark.parametrize(("env_id", "says"), [("Pendulum-v1", "Discrete action space"), ("Pixels-v0", "dqn.py")])
def test_a_wrong_space_is_one_line(env_id, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, env_id=env_id)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
