"""A pytest plugin (`-p slower`) that makes every benchmarked call 20 ms slower."""

import time
from typing import Any

from benchmarks import harness

call = harness._call


def slow_call(*arguments: Any) -> None:
    time.sleep(0.02)
    call(*arguments)


harness._call = slow_call
