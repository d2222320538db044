"""crossq.py's critic update, compiled and as it is, in each process of torchrun; see test_distributed.py.

torchrun --nproc-per-node 2 tests/helpers/compiled_ranks.py FOLDER
"""

import sys
from pathlib import Path

import conftest  # noqa: F401 - for the folders of tests
import pytest
import test_compile

from common.args import RANK
from common.internals.speed import processes
from common.internals.tracking.run_dir import RUN_DIR_KEY


def batch(_):
    made = test_compile.sac_batch()
    made.obs += 2 * RANK  # the batch statistics of one process are not those of the other
    return made


def updates_of(*words, **flags):
    found = real(*words, **flags)
    processes.on_rank_zero(lambda: processes.launcher_store().delete_key(RUN_DIR_KEY))  # the next is another run
    return found


real, test_compile.updates_of = test_compile.updates_of, updates_of
patch, folder = pytest.MonkeyPatch(), Path(sys.argv[1])
test_compile.check("crossq", "update_critic", batch, 1e-8, folder, patch, hidden_sizes=(8,), num_envs=2)
print(f"process {RANK}: equal")
