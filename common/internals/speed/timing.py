"""Where the time of training goes: `Run.log` makes shares of the seconds that are counted here."""

import time


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
