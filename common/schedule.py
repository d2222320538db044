"""Events that are due every so many environment steps."""


class Every:
    """How often an event was due since the last call: the multiples of `interval` that the step counter has passed.

    The counter advances by `num_envs` at a time, so `step % interval == 0` could miss them. With `start`, multiples
    are counted from there. An interval of 0 is never due. `now` is the step that a resumed run starts at: events up to
    it have happened already.

        train_due = Every(args.train_frequency, start=args.learning_starts, now=global_step)
        for _ in range(train_due(global_step)):
            ...
    """

    def __init__(self, interval: int, start: int = 0, now: int = 0) -> None:
        if interval < 0:
            raise ValueError(f"interval must be 0 (never) or more environment steps, not {interval}")
        self.interval = interval
        self.start = start
        self.passed = 0
        self(now)

    def __call__(self, step: int) -> int:
        if self.interval == 0 or step < self.start:
            return 0
        passed = (step - self.start) // self.interval
        due = passed - self.passed
        self.passed = passed
        return due
