"""The progress of a run on the screen."""

import contextlib
import datetime
import math
import os
import sys
import time

from common.args import say


class Progress:
    """In a terminal one line that renews itself; in a log a line each tenth of the first minute, then each 30 seconds.

    No escape codes: they would need NO_COLOR, and a terminal that knows them. TERM=dumb is a log.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.first_step = 0  # of this process
        terminal = sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()
        self.terminal = terminal and os.environ.get("TERM") != "dumb"
        self.started = time.monotonic()
        self.last_time = -math.inf
        self.last_tenth = -1
        self.shown = 0  # characters that the next line has to cover

    def show(self, step: int, sps: float, mean_return: float | None) -> None:
        now, tenth = time.monotonic(), 10 * step // self.total
        due = now - self.last_time >= (0.5 if self.terminal else 30)
        new_tenth = tenth != self.last_tenth and (tenth >= 10 or now - self.started < 60)
        if not due and (self.terminal or not new_tenth):
            return
        self.last_time, self.last_tenth = now, tenth
        # The last step may lie beyond the total, where that is no multiple of num_envs.
        left = max(self.total - step, 0) / max(step - self.first_step, 1) * (now - self.started)
        so_far = "" if mean_return is None else f"  return {mean_return:.1f}"
        clock = datetime.timedelta(seconds=round(left))
        self.line(f"{step:>9,}/{self.total:,} steps{so_far}  {sps:,.0f} steps/s  {clock} left", renewed=True)

    def line(self, text: str, renewed: bool = False) -> None:
        if not self.terminal:
            say(text)
            return
        columns = 0
        with contextlib.suppress(AttributeError, OSError, ValueError):  # a stream that only looks like a terminal
            columns = os.get_terminal_size(sys.stdout.fileno()).columns
        width = (columns or 80) - 1  # a terminal may wrap once its last column is filled
        text = text[:width] if renewed else text
        say("\r" + text.ljust(min(self.shown, width)), end="" if renewed else "\n")
        self.shown = len(text) if renewed else 0
