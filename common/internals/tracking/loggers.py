"""The loggers of a run. One that fails is turned off with a warning."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.args import RANK, RunArgs, warn
from common.internals.tracking.local_loggers import JsonLines, Logger, TensorBoard, quiet_threads
from common.internals.tracking.wandb_logger import Wandb


class Loggers:
    """metrics.jsonl, TensorBoard and, with `args.track`, W&B. Under torchrun only the first process has loggers.

    Args:
        saved: the checkpoint of a resumed run.
    """

    def __init__(self, path: Path, args: RunArgs, config: dict[str, Any], saved: Any = None) -> None:
        self.active: list[Logger] = []
        self.metrics = path / "metrics.jsonl"
        self.wandb: Wandb | None = None
        self.rows: list[dict[str, float]] = []  # those of `rows_at`, the newest step
        self.rows_at = 0
        if RANK == 0:
            quiet_threads()
            self.open(JsonLines, self.metrics, saved["run"]["loggers"]["metrics_size"] if saved else 0)
            self.open(TensorBoard, path, config, (saved["step"] if saved else 0) if args.resume else None)
            self.wandb = self.open(Wandb, path, args, config) if args.track else None

    def open(self, kind: Callable[..., Any], *arguments: Any) -> Any:
        """Adds `kind(*arguments)`, and returns it; None and a warning if that fails."""
        try:
            logger = kind(*arguments)
        except Exception as error:
            warn(f"{kind.__name__} is off for this run: {type(error).__name__}: {error}")
            return None
        self.active.append(logger)
        return logger

    def call(self, method: str, *arguments: Any, only: Any = Logger, without: Any = ()) -> None:
        """Calls a method of every logger of the class `only`, except those of the class `without`."""
        for logger in [each for each in self.active if isinstance(each, only) and not isinstance(each, without)]:
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:
                self.active.remove(logger)
                logger.drop()
                warn(f"{logger.name} failed and is off for the rest of the run: {type(error).__name__}: {error}")

    def log(self, row: dict[str, float], episodes: dict[str, float], step: int, seconds: float) -> None:
        """Logs `row`, with the means of its `episodes` except to metrics.jsonl, which has every episode already."""
        with_episodes = {**row, **episodes}
        self.rows, self.rows_at = [*(self.rows if self.rows_at == step else []), with_episodes], step
        if row:
            self.call("log", row, step, seconds, only=JsonLines)
        if with_episodes:
            self.call("log", with_episodes, step, seconds, without=JsonLines)

    def state_dict(self, step: int) -> dict[str, Any]:
        """The rows that a resumed run logs again. Flushes all loggers to disk."""
        self.call("flush")
        return {
            "metrics_size": self._metrics_size(),
            "rows": self.rows if self.rows_at == step else [],
            "wandb_rows": [] if self.wandb is None else [(row, at) for _, row, at in self.wandb.recent],
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        # TensorBoard drops all that it had from this step on, an evaluation after the checkpoint among it.
        self.rows, self.rows_at = state["rows"], step
        for row in self.rows:
            self.call("log", row, step, 0.0, only=TensorBoard)
        for row, at in state["wandb_rows"]:
            self.call("log", row, at, 0.0, only=Wandb)

    def _metrics_size(self) -> int:
        """Bytes of metrics.jsonl that a resumed run keeps: all, also if a full disk has turned its logger off."""
        for logger in self.active:
            if isinstance(logger, JsonLines):
                return logger.position()
        return self.metrics.stat().st_size if RANK == 0 and self.metrics.exists() else 0


def as_floats(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    """The metrics as Python floats. Tensors are transferred once per device."""
    values = dict(metrics)
    tensors = {key: value.detach().float() for key, value in metrics.items() if isinstance(value, Tensor)}
    for device in {tensor.device for tensor in tensors.values()}:
        mine = {key: tensor for key, tensor in tensors.items() if tensor.device == device}
        values.update(zip(mine, torch.stack(list(mine.values())).tolist(), strict=True))
    return {key: float(value) for key, value in values.items()}
