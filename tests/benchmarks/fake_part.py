"""Stands for a part of a stage: `python -m tests.benchmarks.fake_part BEHAVIOUR --results FILE`."""

import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.machine import write_whole

BEHAVIOUR, PATH = sys.argv[1], Path(sys.argv[sys.argv.index("--results") + 1])
result = dict(benchmark="fake", verdict="unfinished", rows=[], failed=[])


def file(number: int) -> None:
    result["rows"].append(dict(number=number, padding="x" * 1000))
    write_whole(PATH, result)


print(f"{BEHAVIOUR} begins", flush=True)
if BEHAVIOUR == "environment":
    result["seen"] = {name: os.environ.get(name) for name in ("LMIM_FAST_ROUTES", "LMIM_FAST_DRY_RUN")}
    file(0)
elif BEHAVIOUR == "figures":  # for ever
    number = 0
    while True:
        file(number)
        number += 1
elif BEHAVIOUR == "few":
    for number in range(3):
        file(number)
elif BEHAVIOUR == "nothing":  # in time
    time.sleep(60)
elif BEHAVIOUR == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    file(0)
    time.sleep(60)
elif BEHAVIOUR == "crash":
    file(0)
    os.kill(os.getpid(), signal.SIGSEGV)
elif BEHAVIOUR == "wrong":
    file(0)
    result["failed"].append(dict(operation="attention", error="WRONG: tensor 0"))
    write_whole(PATH, result | dict(verdict="red"))
    sys.exit(1)
elif BEHAVIOUR == "absent":
    print("there is no compute-sanitizer")
    sys.exit(3)
elif BEHAVIOUR == "silent":  # ends well, having measured nothing
    sys.exit(0)
write_whole(PATH, result | dict(verdict="green", headline="all is well"))
