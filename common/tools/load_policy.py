"""The policy of a run, in another process."""

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.args import RunArgs, fail
from common.envs import Envs
from common.internals.console.cli import read_config
from common.internals.resume.files import data_file, open_file
from common.internals.vector.make import form_of, make_vector


def load_policy(
    run_dir: Path, allow_env_import: bool = False, file_name: str = "policy.pt"
) -> tuple[Callable[..., Any], RunArgs, str]:
    """The policy of a run, its arguments, and the name of its script, which is imported as it ran (`source/`).

    Runs the script saved in the run directory, with the installed `common`: only for runs you trust. Modules beside
    the script are found where they were: its folder and the run's current folder go to the end of `sys.path`.
    Ends the process with code 3 and one line if the directory holds no policy that can be loaded.

    Args:
        file_name: policy.pt, or policy_best.pt.
        allow_env_import: import the module of an env id of the form module:Env-v0, whatever args.json says of it.
    """
    try:
        config = read_config(str(run_dir))
        name = str(config["script"])
        if Path(name).name != name:
            raise ValueError(f"its args.json names a script outside source/: {name!r}")
        script = data_file(run_dir, f"source/{name}.py")
        with open_file(run_dir, file_name) as file:
            saved = torch.load(file, weights_only=True)
        sys.path += [folder for folder in search_path(run_dir, config) if folder not in sys.path]
        module = _import(script)
        names = {field.name for field in dataclasses.fields(module.Args)}
        args = module.Args(**{name: value for name, value in config.items() if name in names})
        if saved.get("wrap"):
            vars(args)["wrap"] = getattr(module, saved["wrap"])
        envs = Envs(make_vector(args.env_id, 1, allow_import=allow_env_import, form=form_of(args)))
        network = getattr(module, saved["network"])(envs, args)
        envs.close()
        network.load_state_dict(saved["state_dict"])
        torch.set_num_threads(args.torch_threads)  # sums of floats depend on how they are split over threads
        torch.set_float32_matmul_precision(args.matmul_precision)
        return getattr(network.eval(), saved["method"]), args, name
    except FileNotFoundError as error:
        fail(f"{run_dir} has no policy to load: {error.filename} is missing", code=3)
    except Exception as error:  # the script may raise anything
        fail(f"the policy in {run_dir} cannot be loaded: {type(error).__name__}: {error}", code=3)


def search_path(run_dir: Path, config: dict[str, Any]) -> list[str]:
    """Folders in which a run's modules may be: source/, the current one, the script's, and where the run was begun."""
    places = [run_dir / "source", Path(), *(Path(config[key]) for key in ("folder", "cwd") if config.get(key))]
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
