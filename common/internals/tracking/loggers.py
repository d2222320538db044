"""The loggers of a run, together: one that fails is one warning, and is dropped."""

from collections.abc import Callable
from typing import Any

from common.args import warn
from common.sinks import Sink


class Loggers:
    def __init__(self) -> None:
        self.active: list[Sink] = []

    def open(self, kind: Callable[..., Any], *arguments: Any) -> Any:
        """Adds `kind(*arguments)`, and returns it; None and a warning if that fails."""
        try:
            logger = kind(*arguments)
        except Exception as error:
            warn(f"{kind.__name__} is off for this run: {type(error).__name__}: {error}")
            return None
        self.active.append(logger)
        return logger

    def call(self, method: str, *arguments: Any, only: Any = Sink, but: Any = ()) -> None:
        """Calls a method of every logger that is an instance of `only` and not of `but`."""
        for logger in [logger for logger in self.active if isinstance(logger, only) and not isinstance(logger, but)]:
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:
                self.active.remove(logger)
                logger.drop()
                warn(f"{logger.name} failed and is off for the rest of the run: {type(error).__name__}: {error}")
