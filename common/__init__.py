"""What every PlainRL script shares. Each name is loaded when first used: tools that need no torch start at once."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.args import RunArgs as RunArgs
    from common.args import fail as fail
    from common.args import parse as parse
    from common.checkpoint import Checkpoint as Checkpoint
    from common.envs import Envs as Envs
    from common.envs import final_obs as final_obs
    from common.envs import make_envs as make_envs
    from common.envs import training_envs as training_envs
    from common.evaluation import Evaluation as Evaluation
    from common.internals.speed.compile import compiled as compiled
    from common.internals.speed.processes import global_mean as global_mean
    from common.internals.speed.processes import global_mean_std as global_mean_std
    from common.internals.speed.processes import sync_grads as sync_grads
    from common.internals.speed.timing import updating as updating
    from common.internals.storage.dataset import ReplayDataset as ReplayDataset
    from common.internals.tracking.diagnostics import vitals as vitals
    from common.normalize import RewardScaler as RewardScaler
    from common.normalize import RunningMeanStd as RunningMeanStd
    from common.replay import ReplayBuffer as ReplayBuffer
    from common.rollout import RolloutStorage as RolloutStorage
    from common.run import Run as Run
    from common.run import setup as setup
    from common.run import track as track
    from common.schedule import Every as Every

_HOME = {
    "RunArgs": "args",
    "fail": "args",
    "parse": "args",
    "Checkpoint": "checkpoint",
    "compiled": "internals.speed.compile",
    "ReplayDataset": "internals.storage.dataset",
    "global_mean": "internals.speed.processes",
    "global_mean_std": "internals.speed.processes",
    "sync_grads": "internals.speed.processes",
    "Envs": "envs",
    "final_obs": "envs",
    "make_envs": "envs",
    "training_envs": "envs",
    "Evaluation": "evaluation",
    "vitals": "internals.tracking.diagnostics",
    "RewardScaler": "normalize",
    "RunningMeanStd": "normalize",
    "updating": "internals.speed.timing",
    "ReplayBuffer": "replay",
    "RolloutStorage": "rollout",
    "Run": "run",
    "setup": "run",
    "track": "run",
    "Every": "schedule",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'common' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"common.{_HOME[name]}"), name)
    globals()[name] = value
    return value
