"""policy.pt: the trained policy, and what makes its network again in another process."""

import dataclasses
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.args import fail
from common.envs import make_envs
from common.internals.resume.files import data_file, open_file, read_object, write_atomically


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
    written = io.BytesIO()
    torch.save(saved, written)
    write_atomically(path, written.getvalue())


def load_policy(run_dir: Path, allow_env_import: bool = False) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """The policy of a run, made by the script as it ran (`source/`) and filled from policy.pt; and args.json.

    Runs the script saved in the run directory, with the installed `common`: only for runs you trust. Modules beside
    the script are found where they were: its folder and the run's current folder go to the end of `sys.path`.
    Ends the process with code 3 and one line if the directory holds no policy that can be loaded.

    Args:
        allow_env_import: import the module of an env id of the form module:Env-v0, whatever args.json says of it.
    """
    try:
        facts = read_object(run_dir, "args.json")
        name = str(facts["script"])
        if Path(name).name != name:
            raise ValueError(f"its args.json names a script outside source/: {name!r}")
        script = data_file(run_dir, f"source/{name}.py")
        with open_file(run_dir, "policy.pt") as file:
            saved = torch.load(file, weights_only=True)
        sys.path += [folder for folder in search_path(run_dir, facts) if folder not in sys.path]
        module = _import(script)
        names = {field.name for field in dataclasses.fields(module.Args)}
        args = module.Args(**{name: value for name, value in facts.items() if name in names})
        envs = make_envs(args.env_id, 1, allow_import=allow_env_import)
        network = getattr(module, saved["network"])(envs, args)
        envs.close()
        network.load_state_dict(saved["state_dict"])
        torch.set_num_threads(args.torch_threads)  # sums of floats depend on how they are split over threads
        torch.set_float32_matmul_precision(args.matmul_precision)
        return getattr(network.eval(), saved["method"]), facts
    except FileNotFoundError as error:
        fail(f"{run_dir} is not a run directory with a policy: {error.filename} is missing", code=3)
    except Exception as error:  # the script may raise anything
        fail(f"the policy in {run_dir} cannot be loaded: {type(error).__name__}: {error}", code=3)


def search_path(run_dir: Path, facts: dict[str, Any]) -> list[str]:
    """Folders in which a run's modules may be: source/, the current one, the script's, and where the run was begun."""
    places = [run_dir / "source", Path(), *(Path(facts[key]) for key in ("folder", "cwd") if facts.get(key))]
    return [str(place.resolve()) for place in places]


def _import(script: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"saved_{script.stem}", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except SystemExit as stop:
        raise RuntimeError(f"{script} ended itself (exit {stop.code})") from None
    return module
