"""Stands for the module `time`: only its own `sleep` moves it, so that a busy machine changes no figure."""


class StoppedClock:
    def __init__(self) -> None:
        self._now = 0.0

    def perf_counter(self) -> float:
        return self._now

    monotonic = perf_counter

    def sleep(self, seconds: float) -> None:
        self._now += seconds
