"""The public names of `common`: all that a script may use."""

from common.args import RunArgs as RunArgs
from common.args import fail as fail
from common.args import warn as warn
from common.checkpoint import Checkpoint as Checkpoint
from common.envs import Envs as Envs
from common.envs import final_mask as final_mask
from common.envs import final_obs as final_obs
from common.envs import make_envs as make_envs
from common.evaluation import Evaluation as Evaluation
from common.internals.console.cli import parse as parse
from common.internals.speed.compile import compile_update as compile_update
from common.internals.speed.processes import global_mean as global_mean
from common.internals.speed.processes import global_mean_std as global_mean_std
from common.internals.speed.processes import sync_grads as sync_grads
from common.internals.speed.timing import update_timer as update_timer
from common.internals.storage.dataset import ReplayDataset as ReplayDataset
from common.internals.tracking.diagnostics import diagnostics as diagnostics
from common.normalize import RewardScaler as RewardScaler
from common.normalize import RunningMeanStd as RunningMeanStd
from common.replay import ReplayBuffer as ReplayBuffer
from common.rollout import RolloutStorage as RolloutStorage
from common.run import Run as Run
from common.run import setup as setup
from common.run import track as track
from common.schedule import Every as Every
