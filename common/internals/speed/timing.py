"""Where the time of training goes: how fast it is, and which share environments and updates take."""

import time
from typing import Any


class Timer:
    """Seconds that this process has spent inside `with timer:`; what is nested counts once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0
        self._depth = 0

    def __enter__(self) -> None:
        if self._depth == 0:
            self._began = time.monotonic()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.monotonic() - self._began


env_timer = Timer()  # in `Envs.step`, without evaluation
update_timer = Timer()  # in what `common.compile_update` decorates


class RowClock:
    """charts/SPS and health/time_* of each row: steps a second, and shares of the time since the row before."""

    def __init__(self) -> None:
        self.step, self.time = 0, time.monotonic()  # of the last row
        self.timers = (env_timer.seconds, update_timer.seconds)  # at the last row

    def row(self, step: int) -> dict[str, float]:
        """The metrics of a row at `step`; the next row begins now."""
        seconds = max(time.monotonic() - self.time, 1e-9)
        in_envs, in_updates = self._in_timers()
        speed = (step - self.step) / seconds
        self.step, self.time = step, time.monotonic()
        self.timers = (env_timer.seconds, update_timer.seconds)
        return {
            "charts/SPS": speed,
            "health/time_env": in_envs / seconds,
            "health/time_update": in_updates / seconds,
            "health/time_other": 1 - (in_envs + in_updates) / seconds,
        }

    def leave_out(self, seconds: float) -> None:
        """Counts `seconds` of something that is not training out."""
        self.time += seconds

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "ago": time.monotonic() - self.time, "timers": self._in_timers()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.time = state["step"], time.monotonic() - state["ago"]
        in_envs, in_updates = state["timers"]
        self.timers = (env_timer.seconds - in_envs, update_timer.seconds - in_updates)

    def _in_timers(self) -> tuple[float, float]:
        """Seconds in environments and in updates since the last row."""
        return env_timer.seconds - self.timers[0], update_timer.seconds - self.timers[1]
