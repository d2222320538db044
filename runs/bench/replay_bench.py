"""Replay beside that of the libraries which can be imported: microseconds a batch, and the memory of Atari.

    PYTHONPATH=. PEER_VENV/bin/python runs/bench/replay_bench.py speed --core 0
    python runs/bench/replay_bench.py memory

speed: 256 of 100,000 transitions of 17 + 6 + 1 + 17 + 1 floats, in host memory. "uniform" is one sample; "loader" is
one sample through a DataLoader, of ours alone; "prioritized" is one sample with weights and the update of its
priorities. All libraries in turn in one process, on one thread; the figures are processor time, which is the time on
an idle core. Ours, TorchRL and Stable-Baselines3 return tensors, cpprb and Tianshou NumPy arrays. The interpreter
needs torch and any of stable-baselines3, cpprb, tianshou, torchrl.

memory: resident memory of 1,000,000 Atari transitions, 84 x 84 x 4 with next observations, 3-step returns and
priorities, with a game ending every 175 steps (as in Breakout at random), after every place was filled and sampled.
"""

import argparse
import importlib.metadata
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import DataLoader

from common import ReplayBuffer, ReplayDataset

CAPACITY, BATCH, ALPHA, BETA = 100_000, 256, 0.6, 0.4
Calls = dict[str, Callable[[], object]]


def transitions(rng: np.random.Generator) -> dict[str, np.ndarray]:
    widths = {"obs": (17,), "actions": (6,), "rewards": (), "next_obs": (17,), "terminations": ()}
    return {name: rng.random((CAPACITY, *width), dtype=np.float32) for name, width in widths.items()}


def plainrl(data: dict[str, np.ndarray], priorities: np.ndarray) -> Calls:
    uniform, prioritized = ReplayBuffer(CAPACITY, 1), ReplayBuffer(CAPACITY, 1, alpha=ALPHA)
    for i in range(CAPACITY):
        step = {name: torch.from_numpy(values[i : i + 1]) for name, values in data.items()}
        uniform.add(**step)
        prioritized.add(**step)
    prioritized.update_priorities(torch.arange(CAPACITY), torch.from_numpy(priorities))
    errors = torch.from_numpy(priorities[:BATCH].astype(np.float32))

    def cycle() -> None:
        batch = prioritized.sample(BATCH, BETA)
        prioritized.update_priorities(batch.indices, errors)

    batches = iter(DataLoader(ReplayDataset(uniform, BATCH), batch_size=None))
    return {
        "uniform": lambda: uniform.sample(BATCH),
        "loader": lambda: next(batches),
        "prioritized": cycle,
        "add": lambda: uniform.add(**step),
    }


def stable_baselines3(data: dict[str, np.ndarray], priorities: np.ndarray) -> Calls:
    from gymnasium.spaces import Box
    from stable_baselines3.common.buffers import ReplayBuffer as Buffer

    box = {name: Box(-1, 1, (width,), np.float32) for name, width in (("obs", 17), ("actions", 6))}
    buffer = Buffer(CAPACITY, box["obs"], box["actions"], "cpu", handle_timeout_termination=False)
    for i in range(CAPACITY):
        o, a, r, o2, d = (values[i : i + 1] for values in data.values())
        buffer.add(o, o2, a, r, d, [{}])
    return {"uniform": lambda: buffer.sample(BATCH), "add": lambda: buffer.add(o, o2, a, r, d, [{}])}


def cpprb(data: dict[str, np.ndarray], priorities: np.ndarray) -> Calls:
    import cpprb

    fields = {name: {"shape": values.shape[1:] or 1} for name, values in data.items()}
    uniform = cpprb.ReplayBuffer(CAPACITY, fields)
    prioritized = cpprb.PrioritizedReplayBuffer(CAPACITY, fields, alpha=ALPHA)
    uniform.add(**data)
    prioritized.add(**data, priorities=priorities)
    errors = priorities[:BATCH]
    step = {name: values[0] for name, values in data.items()}

    def cycle() -> None:
        batch = prioritized.sample(BATCH, beta=BETA)
        prioritized.update_priorities(batch["indexes"], errors)

    batches = iter(DataLoader(ReplayDataset(uniform, BATCH), batch_size=None))
    return {
        "uniform": lambda: uniform.sample(BATCH),
        "loader": lambda: next(batches),
        "prioritized": cycle,
        "add": lambda: uniform.add(**step),
    }


def tianshou(data: dict[str, np.ndarray], priorities: np.ndarray) -> Calls:
    from tianshou.data import Batch, PrioritizedReplayBuffer
    from tianshou.data import ReplayBuffer as Buffer

    uniform = Buffer(CAPACITY)
    prioritized = PrioritizedReplayBuffer(CAPACITY, alpha=ALPHA, beta=BETA)
    for i in range(CAPACITY):
        o, a, r, o2, d = (values[i] for values in data.values())
        step = Batch(obs=o, act=a, rew=float(r), obs_next=o2, terminated=bool(d > 0.99), truncated=False, info={})
        uniform.add(step)
        prioritized.add(step)
    prioritized.update_weight(np.arange(CAPACITY), priorities)
    errors = priorities[:BATCH]

    def cycle() -> None:
        _, indices = prioritized.sample(BATCH)
        prioritized.update_weight(indices, errors)

    return {"uniform": lambda: uniform.sample(BATCH), "prioritized": cycle, "add": lambda: uniform.add(step)}


def torchrl(data: dict[str, np.ndarray], priorities: np.ndarray) -> Calls:
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer, TensorDictReplayBuffer

    steps = TensorDict({name: torch.from_numpy(values) for name, values in data.items()}, [CAPACITY])
    uniform = TensorDictReplayBuffer(storage=LazyTensorStorage(CAPACITY), batch_size=BATCH)
    uniform.extend(steps)
    calls: Calls = {"uniform": uniform.sample, "add": lambda: uniform.add(steps[0])}
    try:
        prioritized = TensorDictPrioritizedReplayBuffer(
            alpha=ALPHA, beta=BETA, storage=LazyTensorStorage(CAPACITY), batch_size=BATCH, priority_key="td_error"
        )
        prioritized.extend(steps)
        prioritized.update_priority(torch.arange(CAPACITY), torch.from_numpy(priorities))
    except Exception as error:
        print(f"torchrl has no prioritized replay here: {type(error).__name__}: {str(error).splitlines()[0]}")
        return calls
    errors = torch.from_numpy(priorities[:BATCH].astype(np.float32))

    def cycle() -> None:
        batch = prioritized.sample()
        batch["td_error"] = errors
        prioritized.update_tensordict_priority(batch)

    return {**calls, "prioritized": cycle}


LIBRARIES = {
    "plainrl": plainrl,
    "stable-baselines3": stable_baselines3,
    "cpprb": cpprb,
    "tianshou": tianshou,
    "torchrl": torchrl,
}


def speed(core: int, repeats: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    data, priorities = transitions(rng), rng.exponential(size=CAPACITY) + 0.01
    libraries: dict[str, Calls] = {}
    for name, make in LIBRARIES.items():
        try:
            libraries[name] = make(data, priorities)
            version = importlib.metadata.version(name) if name != "plainrl" else "this tree"
            print(f"{name} {version}")
        except ImportError as error:
            print(f"{name}: not measured ({error})")
    print(f"torch {torch.__version__}, numpy {np.__version__}")

    times: dict[tuple[str, str], list[float]] = {}
    for repeat in range(repeats + 1):  # the first round warms up
        for name, calls in libraries.items():
            for what, call in calls.items():
                start = time.process_time()
                for _ in range(300):
                    call()
                if repeat:
                    times.setdefault((what, name), []).append((time.process_time() - start) / 300 * 1e6)
    for what in ("add", "uniform", "loader", "prioritized"):
        medians = {name: statistics.median(v) for (w, name), v in times.items() if w == what}
        print(f"\n{what}, microseconds: median of {repeats} (lowest to highest), and ours over it")
        for name, median in medians.items():
            values = times[what, name]
            ratio = statistics.median(a / b for a, b in zip(times[what, "plainrl"], values, strict=True))
            print(f"  {name:<18} {median:8.1f}  ({min(values):.1f} to {max(values):.1f})  {ratio:5.2f}")


def resident() -> float:
    """GB (10^9 bytes) of this process that lie in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def memory(transitions: int) -> None:
    n, game = 8, 175
    torch.set_num_threads(1)
    before = resident()
    replay = ReplayBuffer(transitions, n, n_step=3, gamma=0.99, frame_stack=4, alpha=0.5)
    frames = torch.randint(1, 256, (game + 8 * n, 84, 84), dtype=torch.uint8)
    obs = torch.zeros(n, 4, 84, 84, dtype=torch.uint8)
    obs[:, 3] = frames[:n]
    games = 0
    for t in range(transitions // n + 1000):  # overfull: the ring has turned over
        next_obs = torch.cat([obs[:, 1:], frames[t % game : t % game + 8 * n : 8].unsqueeze(1)], dim=1)
        over = (torch.arange(n) * 20 + t) % game == game - 1
        replay.add(
            obs=obs,
            actions=torch.randint(4, (n,)),
            rewards=torch.rand(n),
            next_obs=next_obs,
            terminations=over,
            truncations=torch.zeros(n, dtype=torch.bool),
        )
        if over.any():
            games += int(over.sum())
            next_obs[over, :3] = 0
        obs = next_obs
    for _ in range(1000):
        batch = replay.sample(32, BETA)
        replay.update_priorities(batch.indices, torch.rand(32))
    after = resident()
    pixels = len(replay) * 84 * 84 / 1e9
    print(f"{len(replay):,} transitions, {games:,} games ended, {len(replay.frames.aside):,} places for their frames")
    print(f"resident: {after:.2f} GB in all; before the replay {before:.2f} GB, so the replay {after - before:.2f} GB")
    print(f"the pixels alone: {pixels:.2f} GB; stacks stored twice, as observation and next: {8 * pixels:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--core", type=int, default=0, help="the processor core that speed is measured on")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of 300 calls each")
    parser.add_argument("--transitions", type=int, default=1_000_000, help="transitions that memory is measured for")
    args = parser.parse_args()
    if args.what == "speed":
        speed(args.core, args.repeats)
    else:
        memory(args.transitions)


if __name__ == "__main__":
    main()
