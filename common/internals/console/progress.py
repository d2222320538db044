"""The progress of a run on the screen."""

import datetime
import math
import sys
import time

from common.args import say


class Progress:
    """One line that renews itself in a terminal; a line every tenth of the run in a redirected log."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.first_step = 0  # of this process
        self.terminal = sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()
        self.started = time.monotonic()
        self.last_time = -math.inf
        self.last_tenth = -1

    def show(self, step: int, sps: float, mean_return: float | None) -> None:
        now, tenth = time.monotonic(), 10 * step // self.total
        if now - self.last_time < 0.5 if self.terminal else tenth == self.last_tenth:
            return
        self.last_time, self.last_tenth = now, tenth
        # The last step may lie beyond the total, where that is no multiple of num_envs.
        left = max(self.total - step, 0) / max(step - self.first_step, 1) * (now - self.started)
        so_far = "" if mean_return is None else f"  return {mean_return:.1f}"
        clock = datetime.timedelta(seconds=round(left))
        self.line(f"{step:>9,}/{self.total:,} steps{so_far}  {sps:,.0f} steps/s  {clock} left", renewed=True)

    def line(self, text: str, renewed: bool = False) -> None:
        say(f"\r{text:<78}" if self.terminal else text, end="" if self.terminal and renewed else "\n")
