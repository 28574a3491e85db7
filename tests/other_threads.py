"""Whether a call into C++ lets other Python threads run: one that keeps the interpreter's lock does not."""

import threading
import time
from collections.abc import Callable

TICKS = 20  # around a call that keeps the lock there are two or three
TRIES = 100  # a busy machine may give the other thread no time during one call


def other_threads_run_during(call: Callable[[], object]) -> bool:
    """Whether another thread ran `TICKS` times within one call."""
    seen: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            seen.append(time.perf_counter())
            time.sleep(0)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        return any(_ticks_during(call, seen) >= TICKS for _ in range(TRIES))
    finally:
        done.set()
        thread.join()


def _ticks_during(call: Callable[[], object], seen: list[float]) -> int:
    seen.clear()
    start = time.perf_counter()
    call()
    stop = time.perf_counter()
    return sum(start < at < stop for at in seen.copy())
