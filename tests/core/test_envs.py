"""What a vector environment hands out, against environments that know the truth (P1, P2, P9, P17, P24, P32)."""

import gymnasium as gym
import numpy as np
import odd_envs
import pytest
import torch
from conftest import envs_of
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from common import RunArgs, final_obs, make_envs
from common.envs import Envs
from common.internals.vector.make import MAX_ENVS, InTurn, NativeCartPole, env_seeds
from common.internals.vector.workers import Workers

IDS = ["Mixed-v0", "Terminating-v0", "Truncating-v0", "BothAtOnce-v0", "Uneven-v0", "Mixed64-v0", "Reusing-v0"]


def play(envs, steps):
    """Every transition as (env, obs, next_obs, reward, terminated, truncated), and the episodes reported."""
    obs, _ = envs.reset(seed=1)
    transitions, episodes = [], []
    for _ in range(steps):
        next_obs, rewards, terminations, truncations, infos = envs.step(torch.zeros(envs.num_envs, dtype=torch.int64))
        last = final_obs(next_obs, infos)
        for i in range(envs.num_envs):
            transitions.append(
                (i, float(obs[i]), float(last[i]), float(rewards[i]), bool(terminations[i]), bool(truncations[i]))
            )
            if "episode" in infos and infos["_episode"][i]:
                episodes.append((i, infos["episode"]["r"][i], infos["episode"]["l"][i]))
        obs = next_obs
    return transitions, episodes


@pytest.mark.parametrize(
    ("env_id", "num_envs", "async_envs"),
    [(env_id, num_envs, False) for env_id in IDS for num_envs in (1, 3, 7)]
    + [("Mixed-v0", 3, True), ("Reusing-v0", 2, True), ("Truncating-v0", 1, True), ("Mixed64-v0", 2, True)],
)
def test_every_transition_is_a_true_one(env_id, num_envs, async_envs):
    envs = envs_of(env_id, num_envs, async_envs)
    transitions, episodes = play(envs, 60)
    envs.close()
    assert len(transitions) == 60 * num_envs

    spec = gym.spec(env_id).kwargs
    lengths, ends = spec.get("lengths", (3, 5, 2)), spec.get("ends", "Tt")
    for i in range(num_envs):
        mine = [t[1:] for t in transitions if t[0] == i]
        # The truth, from the definition of Counter: episode k, time t.
        truth, returns = [], []
        k = 0
        while len(truth) < 60:
            n, end = lengths[k % len(lengths)], ends[k % len(ends)]
            for t in range(n):
                over = t == n - 1
                truth.append((1000.0 * k + t, 1000.0 * k + t + 1, t + 1.0, over and end in "TB", over and end in "tB"))
            if len(truth) <= 60:
                returns.append((n * (n + 1) / 2, n))
            k += 1
        assert mine == truth[:60]
        assert [(r, length) for j, r, length in episodes if j == i] == returns


class Telling(gym.Wrapper):
    """Infos of several kinds, not in every step."""

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.env.step(action)
        t = self.env.unwrapped.t
        info = {"t": t, "half": t / 2, "deep": {"even": t % 2 == 0}, "name": str(t), "row": np.full(2, t)}
        return obs, reward, terminated, truncated, info if t % 3 else {}


def same(ours, theirs):
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, np.ndarray) and theirs.dtype == object:
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(theirs, np.ndarray):
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()
    return ours == theirs


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Mixed64-v0", "Uneven-v0", "Telling"])
def test_the_leaner_step_is_that_of_gymnasium(env_id):
    def make():
        return Telling(gym.make("Mixed-v0", lengths=(3, 4, 2))) if env_id == "Telling" else gym.make(env_id)

    ours, theirs = InTurn([make] * 3), SyncVectorEnv([make] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
    for vector in (ours, theirs):
        vector.reset(seed=[1, 2, 3])
        vector.action_space.seed(1)
    kept = None
    for t in range(80):
        results = [vector.step(vector.action_space.sample()) for vector in (ours, theirs)]
        assert all(map(same, *results)), t
        if kept is not None:
            assert all(map(same, *kept)), "an earlier result was written over"
        kept = [[np.array(result[0]), *result[1:4]] for result in results]
    ours.close()
    theirs.close()


def test_next_step_autoreset_is_refused():
    # Its step after an end is no transition (P1); nothing here would notice.
    for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED):
        with pytest.raises(ValueError, match="SAME_STEP"):
            Envs(SyncVectorEnv([lambda: gym.make("Mixed-v0")], autoreset_mode=mode))


def test_observations_are_copies_in_the_right_dtype():
    envs = envs_of("Mixed64-v0", 2)
    obs, _ = envs.reset(seed=1)
    assert obs.dtype == torch.float32
    before = obs.clone()
    next_obs, rewards, terminations, truncations, _ = envs.step(torch.zeros(2, dtype=torch.int64))
    assert torch.equal(obs, before)
    assert rewards.dtype == torch.float32
    assert terminations.dtype == truncations.dtype == torch.bool
    kept = rewards.clone(), terminations.clone()
    envs.step(torch.zeros(2, dtype=torch.int64))
    assert torch.equal(rewards, kept[0])
    assert torch.equal(terminations, kept[1])
    assert envs_of("Pixels-v0", 1).reset(seed=1)[0].dtype == torch.uint8


def test_box_actions_are_clipped_to_the_bounds_of_their_dimension():
    envs = envs_of("Reach-v0", 2)
    envs.reset(seed=1)
    obs, *_ = envs.step(torch.tensor([[5.0, 5.0], [-0.5, -5.0]]))
    assert obs.tolist() == [[1.0, 2.0], [-0.5, -2.0]]


def test_discrete_actions_count_from_zero_whatever_the_space_starts_at():
    envs = envs_of("Shifted-v0", 2)
    envs.reset(seed=1)
    obs, *_ = envs.step(torch.tensor([0, 1]))
    assert obs.flatten().tolist() == [3.0, 4.0]


def test_a_lost_life_terminates_for_the_learner_and_the_game_goes_on():
    for terminal_on_life_loss in (True, False):
        envs = Envs(odd_envs.game("Lives-v0"), terminal_on_life_loss=terminal_on_life_loss)
        obs, _ = envs.reset(seed=1)
        seen, episodes = [], []
        for _ in range(24):
            next_obs, _, terminations, _, infos = envs.step(torch.zeros(1, dtype=torch.int64))
            seen.append((float(obs), float(final_obs(next_obs, infos)), bool(terminations)))
            if "episode" in infos:
                episodes.append((infos["episode"]["r"][0], infos["episode"]["l"][0]))
            obs = next_obs
        every = 4 if terminal_on_life_loss else 12
        assert seen == [(t % 12, t % 12 + 1, (t + 1) % every == 0) for t in range(24)]
        assert episodes == [(12.0, 12), (12.0, 12)]


@pytest.mark.parametrize("num_envs", [1, 5])
def test_native_cartpole_is_cartpole_with_true_endings(num_envs):
    """Each transition, one by one, against gymnasium's single environment put into the state before it."""
    envs, single = envs_of("CartPole-v1", num_envs, native=True), gym.make("CartPole-v1").unwrapped
    single.reset()
    obs, _ = envs.reset(seed=1)
    ages, ends, generator = [0] * num_envs, [], torch.Generator().manual_seed(1)
    for _ in range(1100):
        state = np.array(envs.vector.state).T
        assert torch.equal(obs, torch.as_tensor(state, dtype=torch.float32))
        actions = (obs[:, 2] + 0.5 * obs[:, 3] + 0.1 * obs[:, 1] > 0).long()  # balances
        chance = torch.rand(num_envs, generator=generator) < 0.5
        chance[0] = False
        actions[chance] = torch.randint(2, (int(chance.sum()),), generator=generator)
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        true_obs = final_obs(next_obs, infos)
        for i in range(num_envs):
            single.state, single.steps_beyond_terminated = state[i], None
            last, reward, terminated, _, _ = single.step(int(actions[i]))
            ages[i] += 1
            assert true_obs[i].numpy() == pytest.approx(last, rel=1e-6, abs=1e-6)
            assert (rewards[i], terminations[i], truncations[i]) == (reward, terminated, ages[i] == 500)
            ended = bool(terminations[i] or truncations[i])
            assert ended == (not torch.equal(next_obs[i], true_obs[i]))
            if ended:
                assert infos["_episode"][i] and infos["episode"]["r"][i] == infos["episode"]["l"][i] == ages[i]
                assert next_obs[i].abs().max() <= 0.05
                ends.append((i, bool(truncations[i])))
                ages[i] = 0
        obs = next_obs
    assert (0, True) in ends
    assert num_envs == 1 or len({i for i, truncated in ends if not truncated}) == num_envs - 1


@pytest.mark.parametrize(
    ("env_id", "async_envs"), [("Pendulum-v1", False), ("MountainCar-v0", False), ("CartPole-v1", True)]
)
def test_native_is_refused_where_there_is_none_and_beside_processes(env_id, async_envs, capsys):
    with pytest.raises(SystemExit) as stop:
        envs_of(env_id, 2, async_envs, native=True)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_flags_of_a_run_reach_its_environments(capsys):
    kinds = {(): InTurn, ("native_envs",): NativeCartPole, ("async_envs",): Workers}
    for flags, kind in kinds.items():
        envs = make_envs(RunArgs(num_envs=3, env_timeout=7.0, **dict.fromkeys(flags, True)))
        assert isinstance(envs.vector, kind) and envs.num_envs == 3 and not envs.terminal_on_life_loss
        assert envs._watchdog.timeout == 7
        envs.close()
    assert make_envs(RunArgs(env_timeout=0.0), terminal_on_life_loss=True).terminal_on_life_loss
    for allowed, says in ((False, "--allow-env-import"), (True, "nothing_of_this_name")):
        with pytest.raises(SystemExit):
            make_envs(RunArgs(env_id="nothing_of_this_name:Env-v0", allow_env_import=allowed))
        assert says in (line := capsys.readouterr().err) and (allowed or "No module" not in line)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_seeds_decide_the_episodes(num_envs, native):
    def observations(seed, async_envs=False, evaluation=False):
        envs = envs_of("CartPole-v1", num_envs, async_envs, native=native)
        obs = [envs.reset(seed=seed, evaluation=evaluation)[0]]
        for t in range(60):
            obs.append(envs.step(torch.full((num_envs,), t % 2))[0])
        envs.close()
        return torch.stack(obs)

    assert torch.equal(observations(3), observations(3))
    if not native:
        assert torch.equal(observations(3), observations(3, async_envs=True))
    assert not torch.equal(observations(3), observations(4))
    assert not torch.equal(observations(3), observations(3, evaluation=True))


def test_seeds_of_environments_never_overlap():
    seeds = [s for seed in range(40) for role in (0, 1) for s in env_seeds(seed, 64, role)]
    assert len(set(seeds)) == len(seeds)
    assert max(env_seeds(2**62, MAX_ENVS, 1)) < 2**31
    assert len(set(env_seeds(2**62, MAX_ENVS, 1) + env_seeds(2**62, MAX_ENVS, 0))) == 2 * MAX_ENVS


@pytest.mark.parametrize(
    ("env_id", "says"),
    [
        ("probe_envs:Mixed-v0", "--allow-env-import"),
    ],
)
def test_an_environment_that_cannot_be_had_is_one_line(env_id, says, capsys):
    with pytest.raises(SystemExit) as stop:
        envs_of(env_id, 1)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert says in line


def test_a_missing_extra_is_named(monkeypatch, capsys):
    import sys

    for env_id, module, extra in (("LunarLander-v3", "Box2D", "box2d"), ("ALE/Pong-v5", "ale_py", "atari")):
        for name in [name for name in sys.modules if name.split(".")[0] == module or "box2d" in name]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, module, None)  # the import fails as if it were not installed
        with pytest.raises(SystemExit) as stop:
            envs_of(env_id, 1)
        assert stop.value.code == 2
        assert f'pip install -e ".[{extra}]"' in capsys.readouterr().err


def test_atari_is_native_and_keeps_the_true_score():
    pytest.importorskip("ale_py")
    envs = envs_of("ALE/Breakout-v5", 2, terminal_on_life_loss=True)
    obs, infos = envs.reset(seed=1)
    assert obs.shape == (2, 4, 84, 84)
    assert obs.dtype == torch.uint8
    rng = np.random.default_rng(0)
    lives, terminations_seen, games = np.array(infos["lives"]), 0, []
    score = np.zeros(2)
    for _ in range(900):
        next_obs, rewards, terminations, truncations, infos = envs.step(torch.tensor(rng.integers(0, 4, 2)))
        last = final_obs(next_obs, infos)
        score += rewards.numpy()
        # Frame stacks of every transition overlap by three frames: no reset frame was stored as a next one.
        assert torch.equal(last[:, :3], obs[:, 1:])
        for i in range(2):
            ended = "episode" in infos and infos["_episode"][i]
            assert bool(terminations[i]) == bool(ended or infos["lives"][i] < lives[i])
            terminations_seen += bool(terminations[i])
            if ended:
                games.append(infos["episode"]["r"][i])
                assert games[-1] == score[i]
                score[i] = 0
        lives = np.array(infos["lives"])
        obs = next_obs
    assert terminations_seen >= 4 * len(games) > 0
    assert not truncations.any()
