"""What every PlainRL script shares: the names that a script uses."""

from common.args import RunArgs as RunArgs
from common.args import fail as fail
from common.args import parse as parse
from common.checkpoint import Checkpoint as Checkpoint
from common.compilation import compiled as compiled
from common.dataset import ReplayDataset as ReplayDataset
from common.distributed import global_mean as global_mean
from common.distributed import global_mean_std as global_mean_std
from common.distributed import sync_grads as sync_grads
from common.envs import Envs as Envs
from common.envs import final_obs as final_obs
from common.envs import make_envs as make_envs
from common.envs import training_envs as training_envs
from common.evaluation import Evaluation as Evaluation
from common.health import vitals as vitals
from common.normalize import RewardScaler as RewardScaler
from common.normalize import RunningMeanStd as RunningMeanStd
from common.phases import updating as updating
from common.replay import ReplayBuffer as ReplayBuffer
from common.rollout import RolloutStorage as RolloutStorage
from common.run import Run as Run
from common.run import setup as setup
from common.run import track as track
from common.schedule import Every as Every
