"""Where metrics go on disk: plain JSON lines and TensorBoard. wandb_logger.py has Weights & Biases."""

import json
import math
import os
import threading
import time
from pathlib import Path
from typing import Any


class Logger:
    """Takes rows and videos. Any method may raise: the run then warns once and drops the logger."""

    name: str

    def log(self, row: dict[str, float], step: int, seconds: float) -> None:
        raise NotImplementedError

    def video(self, path: Path, step: int) -> None:
        """Most loggers show no videos; the file is in the run directory in any case."""

    def flush(self) -> None:
        """Called when a checkpoint is written: rows that are only in memory go to disk."""

    def drop(self) -> None:
        """Called after a failure; nothing is logged afterwards."""

    def close(self, exit_code: int) -> None:
        raise NotImplementedError


def quiet_threads() -> None:
    """Hides tracebacks of TensorBoard's and wandb's threads: the logger's next call raises as well."""
    hook = threading.excepthook

    def filtered(failure: Any) -> None:
        origins = type(failure.thread).__module__, failure.exc_type.__module__
        if not any(origin.startswith(("tensorboard", "wandb")) for origin in origins):
            hook(failure)

    threading.excepthook = filtered


class JsonLines(Logger):
    name = "metrics.jsonl"

    def __init__(self, path: Path, size: int = 0) -> None:
        """Keeps the first `size` bytes of the file: a resumed run logs again what came after its checkpoint."""
        if path.exists():
            os.truncate(path, min(size, path.stat().st_size))
        self.file = path.open("a", buffering=1)

    def position(self) -> int:
        """Bytes so far, all of them on disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def log(self, row: dict[str, float], step: int, seconds: float) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self.file.write(json.dumps({"global_step": step, "time": round(seconds, 3), **finite}) + "\n")

    def close(self, exit_code: int) -> None:
        self.file.close()


class TensorBoard(Logger):
    name = "TensorBoard"

    def __init__(self, path: Path, facts: dict[str, Any], resumed_at: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if resumed_at is None:
            self.writer = SummaryWriter(str(path))
            rows = (f"|{key}|{value}|" for key, value in facts.items())
            self.writer.add_text("hyperparameters", "\n".join(["|argument|value|", "|-|-|", *rows]))
            return
        # TensorBoard reads files in the order of their names, which begin with the second at which each was opened.
        time.sleep(1 - time.time() % 1)
        # It drops what earlier files hold from purge_step on.
        self.writer = SummaryWriter(str(path), purge_step=max(resumed_at, 1))

    def log(self, row: dict[str, float], step: int, seconds: float) -> None:
        for key, value in row.items():
            self.writer.add_scalar(key, value, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self, exit_code: int) -> None:
        self.writer.close()
