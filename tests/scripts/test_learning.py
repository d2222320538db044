"""What the README claims, run again; minutes long."""

import pytest
from conftest import load, only_run, rows


def final_return(folder):
    return [row for row in rows(only_run(folder)) if "eval/episodic_return" in row][-1]["eval/episodic_return"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12, 13])  # not the seeds of the table
def test_dqn_solves_cartpole_by_its_defaults(seed, tmp_path):
    dqn = load("dqn")
    dqn.main(dqn.Args(seed=seed, track=False, eval_episodes=100, capture_video=False, runs_dir=str(tmp_path)))
    assert final_return(tmp_path) >= 475


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12])
def test_dqn_under_lightning_solves_cartpole_by_its_defaults(seed, tmp_path):
    pytest.importorskip("lightning")
    module = load("dqn_lightning")
    module.main(module.Args(seed=seed, track=False, eval_episodes=100, capture_video=False, runs_dir=str(tmp_path)))
    assert final_return(tmp_path) >= 475


@pytest.mark.slow
def test_dqn_solves_acrobot_by_its_defaults(tmp_path):
    dqn = load("dqn")
    args = dqn.Args(
        env_id="Acrobot-v1", seed=11, track=False, eval_episodes=100, capture_video=False, runs_dir=str(tmp_path)
    )
    dqn.main(args)
    assert final_return(tmp_path) >= -100


@pytest.mark.slow
@pytest.mark.parametrize("script", ["reinforce_rollout", "ppo"])
@pytest.mark.parametrize("seed", [11, 12])
def test_policy_gradients_solve_cartpole_by_their_defaults(script, seed, tmp_path):
    module = load(script)
    module.main(module.Args(seed=seed, track=False, eval_episodes=100, capture_video=False, runs_dir=str(tmp_path)))
    assert final_return(tmp_path) >= 475


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [11, 12])
def test_sac_swings_the_pendulum_up_by_its_defaults(seed, tmp_path):
    sac = load("sac")
    sac.main(sac.Args(seed=seed, track=False, eval_episodes=100, capture_video=False, runs_dir=str(tmp_path)))
    assert final_return(tmp_path) >= -170
