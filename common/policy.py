"""policy.pt: the trained policy, and what makes its network again in another process."""

import dataclasses
import importlib.util
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.args import fail
from common.envs import make_envs


def save_policy(policy: Callable[[Tensor], Tensor], path: Path) -> None:
    """Writes the network's weights and the names that lead back to `policy`; atomic.

    Raises:
        TypeError: `policy` is not a method of a network.
    """
    network = getattr(policy, "__self__", None)
    if not isinstance(network, nn.Module):
        raise TypeError("a policy is a method of a network, for example q_network.greedy")
    saved = {
        "format": 1,
        "network": type(network).__name__,
        "method": policy.__name__,
        "state_dict": {key: value.detach().cpu().clone() for key, value in network.state_dict().items()},
    }
    partial = path.with_suffix(".tmp")
    torch.save(saved, partial)
    partial.replace(path)


def load_policy(run_dir: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """The policy of a run, made by the script as it ran (`source/`) and filled from policy.pt; and args.json.

    Runs the script saved in the run directory, as running that script does: only for runs you trust.
    Ends the process with code 3 and one line if the directory holds no policy that can be loaded.
    """
    try:
        facts = json.loads((run_dir / "args.json").read_text())
        saved = torch.load(run_dir / "policy.pt", weights_only=True)
        script = run_dir / "source" / f"{facts['script']}.py"
        module = _import(script)
        names = {field.name for field in dataclasses.fields(module.Args)}
        args = module.Args(**{name: value for name, value in facts.items() if name in names})
        envs = make_envs(args.env_id, 1, allow_import=args.allow_env_import)
        network = getattr(module, saved["network"])(envs, args)
        envs.close()
        network.load_state_dict(saved["state_dict"])
    except FileNotFoundError as error:
        fail(f"{run_dir} is not a run directory with a policy: {error.filename} is missing", code=3)
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        fail(f"the policy in {run_dir} cannot be loaded: {error}", code=3)
    torch.set_num_threads(args.torch_threads)  # sums of floats depend on how they are split over threads
    torch.set_float32_matmul_precision(args.matmul_precision)
    return getattr(network.eval(), saved["method"]), facts


def _import(script: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"saved_{script.stem}", script)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(2, "no such script", str(script))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module
