"""Signals that ask a run to stop (Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 of clusters)."""

import os
import signal
import threading
import time
from typing import Any

from common.args import RANK, WORLD_SIZE
from common.internals.speed import processes

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


class StopSignals:
    """Keeps the number of the first signal that asks to stop; a second one ends the process at once."""

    def __init__(self) -> None:
        self.number = 0  # 0: none yet
        self._calls, self._since = 0, time.monotonic()  # since all processes last agreed
        self._ask_after = 1
        self._old_handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._old_handlers[number] = signal.signal(number, self._on_signal)

    def agreed(self, now: bool = False) -> bool:
        """Whether to stop. All processes call it at the same steps, and get the same answer.

        Under torchrun they ask each other, four times a second unless `now`: each call would cost more than a step.
        """
        if WORLD_SIZE == 1:
            return bool(self.number)
        self._calls += 1
        if self._calls < self._ask_after and not now:
            return False
        seconds = (time.monotonic() - self._since) / self._calls
        answers = processes.all_gather_object((self.number, min(max(round(0.25 / seconds), 1), 200)))
        self.number, self._ask_after = max(number for number, _ in answers), answers[0][1]
        self._calls, self._since = 0, time.monotonic()
        return bool(self.number)

    def restore_handlers(self) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.number = number
        for known in self._old_handlers:
            signal.signal(known, signal.SIG_DFL)
        if RANK == 0:
            os.write(2, b"\nstopping at the next step (again: at once)\n")
