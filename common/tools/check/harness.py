"""Runs one script many times for a moment, and keeps the traces."""

import ast
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.args import RunArgs, fail
from common.tools.check import recorder
from common.tools.launch.cli import as_words, ask
from common.tools.launch.jobs import last_error

TIMEOUT = 600  # seconds that one run may take; it takes about one
QUIET: dict[str, Any] = {"track": False, "cuda": False, "capture_video": False, "eval_episodes": 0, "eval_interval": 0}
QUIET |= {"save_interval": 0, "runs_dir": "runs"}
GAMMA = 0.5  # of the environments whose values are known
RATES = ("learning_rate", "policy_lr", "q_lr")


class Failed(Exception):  # noqa: N818 - a result
    """What was seen, and what it means."""


class Skipped(Exception):  # noqa: N818
    """Why there is nothing to see."""


def fail_if(wrong: object, text: str) -> None:
    if wrong:
        raise Failed(text)


def skip_if(lacking: object, text: str) -> None:
    if lacking:
        raise Skipped(text)


@dataclass
class Trace:
    """What one run left behind."""

    code: int
    folder: Path

    @property
    def error(self) -> str:
        return last_error(self.folder / "err")

    @functools.cached_property
    def run_dir(self) -> Path:
        found = list((self.folder / "runs").glob("*"))
        fail_if(len(found) != 1, f"it made {len(found)} run directories, not one: common.track makes it")
        return found[0]

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]

    def logged(self, key: str) -> list[tuple[int, float]]:
        return [(row["global_step"], row[key]) for row in self.rows if key in row]

    @functools.cached_property
    def recorded(self) -> dict[str, Any]:
        path = self.folder / recorder.REPORT
        fail_if(not path.exists(), "it ends its process itself, before the recording could be written")
        return torch.load(path, weights_only=True)

    def file(self, name: str, written_by: str) -> Path:
        fail_if(not (self.run_dir / name).exists(), f"it left no {name}: {written_by} writes it")
        return self.run_dir / name

    @functools.cached_property
    def weights(self) -> dict[str, Any]:
        return torch.load(self.file("policy.pt", "run.save_policy(policy)"), weights_only=True)["state_dict"]

    @property
    def end(self) -> int:
        return json.loads(self.file("finished.json", "run.finish() at its end").read_text())["global_step"]

    @functools.cached_property
    def training_rows(self) -> list[dict[str, Any]]:
        """Its rows without the clock and evaluations."""
        left_out = "eval/", "time", "charts/SPS", "health/time_"
        rows = [{k: v for k, v in row.items() if not k.startswith(left_out)} for row in self.rows]
        return [row for row in rows if row.keys() != {"global_step"}]

    def played(self, num_envs: int | None = None) -> list[dict[str, Any]]:
        """The first environments that took a step, which are those of training; all by default."""
        return [env for env in self.recorded["envs"] if len(env["rewards"])][:num_envs]


def others(kind: str, value: Any) -> list[Any]:
    """Values near `value` that a flag of this type can have as well; none for other types."""
    kind = kind.removesuffix(" | None")
    if kind.startswith("typing.Literal"):
        return [option for option in ast.literal_eval(kind.removeprefix("typing.Literal")) if option != value]
    if value is None:
        known: dict[str, list[Any]] = {"float": [1e-6, 0.1, 1.0], "int": [1, 2, 10], "bool": [True, False]}
        return known.get(kind, [])
    if kind == "bool":
        return [not value]
    if kind == "int":
        return [value + 1, 2 * value + 1, max(value // 2, 1)]
    if kind == "float":
        return [0.1 * value, (1 + value) / 2, 0.5 * value, 2 * value + 0.1]
    if kind in ("tuple[int, ...]", "tuple[float, ...]"):
        return [[*value, value[-1] + 1], [*value[:-1], value[-1] + 1]] if value else [[8]]
    return []


class Harness:
    """A script, the folder it is run in, and the runs so far: many checks look at the same ones."""

    def __init__(self, script: Path) -> None:
        types, (plain,) = ask(script, [[]])
        if plain.error is not None:
            fail(f"{script} does not accept its own defaults: {plain.error}")
        inherited = {field.name for field in dataclasses.fields(RunArgs)}
        self.flags: dict[str, dict[str, Any]] = {}  # default, and for the script's own flags, other values to try
        for name, value in plain.args.items():
            self.flags[name] = {"default": value, "others": None if name in inherited else others(types[name], value)}
        self.script = script.resolve()
        self.folder = tempfile.TemporaryDirectory(prefix="check-", ignore_cleanup_errors=True)
        self.server = recorder.server(self.script)
        self.runs: dict[str, Trace] = {}
        self.replays = "buffer_size" in self.flags  # so that it learns from each step many times
        self.budgets = (1_500, 5_000) if self.replays else (8_000, 32_000)  # steps to learn a value in; if not, in
        tried = {space: self.trial(f"PushedPoint-{space}", **self.small) for space in ("Discrete", "Box")}
        self.spaces = [space for space, trace in tried.items() if trace.code == 0]
        refused = {space: trace.error.removeprefix("error: ") for space, trace in tried.items() if trace.code}
        self.refused = "; ".join(f"{space}: {error}" for space, error in refused.items())
        if not self.spaces:
            fail(f"{script} runs with neither kind of actions. {self.refused}", code=1)

    @functools.cached_property
    def small(self) -> dict[str, Any]:
        """Flags of a run of a few hundred steps in which as much as possible happens: buffers fill, targets move."""
        wanted: dict[str, Any] = {"total_timesteps": 400 if self.replays else 320, "num_envs": 1 if self.replays else 2}
        wanted |= {"learning_starts": 100, "buffer_size": 200, "batch_size": 16, "num_steps": 16, "log_interval": 40}
        wanted |= {"hidden_sizes": [16, 16], **dict.fromkeys(RATES, 0.01)}
        return self._known(wanted, target_network_frequency=20, update_epochs=4)

    def learning(self, steps: int) -> dict[str, Any]:
        """Flags with which `steps` steps suffice to learn a value."""
        wanted: dict[str, Any] = {"total_timesteps": steps, "gamma": GAMMA, "hidden_sizes": [32, 32]}
        wanted |= {"learning_starts": 100, "buffer_size": 10_000, "log_interval": 50, "alpha": 0.0}
        wanted |= {"v_min": -4.0, "v_max": 4.0, "norm_reward": False}
        wanted |= {"tau": max(self.default("tau", 1.0), 0.05)}
        wanted |= {name: max(self.default(name, 0.0), 3e-3) for name in RATES}
        return self._known(wanted, batch_size=64, target_network_frequency=20, num_steps=16)

    def _known(self, wanted: dict[str, Any], **at_most: int) -> dict[str, Any]:
        wanted |= {name: min(self.default(name, most), most) for name, most in at_most.items()}
        return {name: value for name, value in wanted.items() if name in self.flags}

    @property
    def epsilon(self) -> dict[str, Any]:
        """Flags with which it explores by epsilon."""
        return {"noisy": False} if "noisy" in self.flags else {}

    def default(self, name: str, otherwise: Any) -> Any:
        return self.flags[name]["default"] if name in self.flags else otherwise

    def trial(self, env: str, stop: tuple[int, int] | None = None, again: int = 0, **flags: Any) -> Trace:
        """A run, whatever its exit code. `again` tells apart runs that ought to be the same."""
        words = ["--env-id", f"Check-{env}-v0", *as_words(QUIET | flags)]
        key = repr((words, stop, again))
        if key not in self.runs:
            self.runs[key] = self._start(recorder.play, words, stop)
        return self.runs[key]

    def run(self, env: str, **flags: Any) -> Trace:
        """A run that has to come to its end."""
        trace = self.trial(env, **flags)
        fail_if(trace.code, f"in {env} it ends with exit code {trace.code}: {trace.error}")
        return trace

    def base(self, **flags: Any) -> Trace:
        return self.run(f"PushedPoint-{self.spaces[0]}", **{**self.small, **flags})

    def planned(self, env: str, num_envs: int) -> Trace:
        """200 steps in an environment that tells every step apart."""
        return self.run(f"{env}-{self.spaces[0]}", **{**self.small, "num_envs": num_envs, "total_timesteps": 200})

    def all_planned(self) -> Iterator[tuple[str, int, Trace]]:
        """What to call the environments, how many they are, and the run."""
        for env, n in (("Terminating", 1), ("Truncating", 1), ("Mixed", 1), ("Mixed", 3), ("Uneven", 3)):
            yield f"{env}, {n} environment{'s' * (n > 1)}", n, self.planned(env, n)

    def resumed(self, stopped: Trace) -> Trace:
        trace = self._start(recorder.play, ["--resume", str(stopped.run_dir)], None, folder=stopped.folder)
        fail_if(trace.code, f"--resume ends with exit code {trace.code}: {trace.error}")
        return trace

    def close(self) -> None:
        """Removes what the runs left behind."""
        self.folder.cleanup()

    def _start(self, target: Callable[..., None], *words: Any, folder: Path | None = None) -> Trace:
        if folder is None:
            folder = Path(self.folder.name) / f"{len(list(Path(self.folder.name).iterdir())):03d}"
            folder.mkdir()
        process = self.server.Process(target=target, args=(str(self.script), str(folder), dict(os.environ), *words))
        process.start()
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
            process.join()
            (folder / "err").write_text(f"error: it had not ended after {TIMEOUT} s\n")
        return Trace(process.exitcode, folder)
