"""Every test is logged out of W&B, and no test leaves anything in the folder it is started from."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Each process of the tests takes one core, as the scripts do, and pytest-xdist starts one a core.
os.environ["OMP_NUM_THREADS"] = "1"

TESTS = Path(__file__).resolve().parent
ROOT, HELPERS = TESTS.parent, TESTS / "helpers"
# The folders of tests too, as a file of tests may use what another defines.
sys.path[:0] = [str(TESTS), str(HELPERS), *(str(TESTS / part) for part in ("core", "internals", "tools"))]

import probe_envs  # noqa: E402, F401
import warm  # noqa: E402

LONGEST = ("test_scripts_check", "test_sweep")


def pytest_collection_modifyitems(items):
    """With several workers the longest tests begin first, so that none of them is the last to end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def nothing_warned_yet(monkeypatch):
    from common import args

    monkeypatch.setattr(args, "_warned", set())


@pytest.fixture(autouse=True)
def logged_out(tmp_path_factory, monkeypatch):
    home = tmp_path_factory.mktemp("home")
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    # For `probe_envs:` ids in subprocesses, and for the `common` beside these tests, whichever is installed.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS, HELPERS, ROOT))))


def load(script: Path | str):
    """A script as a module; `load("dqn")` is algos/dqn.py."""
    path = ROOT / "algos" / f"{script}.py" if isinstance(script, str) else script
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_script(*flags, script="dqn", cwd=None, env=None, timeout=120, check=0, wrap=(), cold=False):
    """Runs algos/{script}.py as a user does; returns the finished process. `cold`: in a new interpreter, 3 s slower."""
    path = ROOT / "algos" / f"{script}.py" if isinstance(script, str) else script
    words = [str(path), *map(str, flags)]
    environment = {**os.environ, **(env or {})}
    if cold or wrap or warm.cold(env or {}):
        done = subprocess.run(
            [*wrap, sys.executable, *words],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
    else:
        done = warm.run(words, cwd, environment, timeout)
    assert check is None or done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_tool(*words, cwd=None, env=None, check=0):
    """Runs `python -m common WORDS` as a user does; returns the finished process."""
    done = warm.run(["-m", "common", *map(str, words)], cwd, {**os.environ, **(env or {})}, timeout=120)
    assert check is None or done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def only_run(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def clockless(run_dir: Path) -> list[dict]:
    """The rows without what no two runs have in common."""
    clock = ("time", "charts/SPS", "health/time_env", "health/time_update", "health/time_other")
    return [{key: value for key, value in row.items() if key not in clock} for row in rows(run_dir)]


def weights(run_dir: Path):
    import torch

    return torch.load(run_dir / "policy.pt", weights_only=True)["state_dict"]


def train_with(module, tmp_path: Path, **flags) -> Path:
    """Runs a script's main() in this process, quietly, and returns its run directory."""
    folder = tmp_path / f"runs{len(list(tmp_path.iterdir()))}"
    quiet = {"track": False, "cuda": False, "eval_episodes": 0, "runs_dir": str(folder)}
    module.main(module.Args(**{**quiet, **flags}))
    return only_run(folder)


def envs_of(env_id, num_envs, async_envs=False, allow_import=False, *, terminal_on_life_loss=False, **more):
    """Environments by id, without the arguments of a run."""
    from common.envs import Envs
    from common.internals.vector.make import make_vector

    more.setdefault("env_timeout", 600.0)
    vector = make_vector(env_id, num_envs, async_envs, allow_import, **more)
    return Envs(vector, terminal_on_life_loss, env_timeout=more["env_timeout"])


def network_of(run_dir: Path):
    """The trained network of a run."""
    from common.tools.load_policy import load_policy

    return load_policy(run_dir)[0].__self__


def same(a: dict, b: dict) -> bool:
    """Whether two state dictionaries are equal to the bit."""
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
