"""Which shared memory a process and its children use: other processes of the machine use some too."""

import contextlib
import threading
from pathlib import Path

import psutil


def segments(process):
    """Files in /dev/shm that a process maps."""
    try:
        lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    except OSError:  # it has ended
        return set()
    return {line.split(None, 5)[5] for line in lines if "/dev/shm/" in line}


@contextlib.contextmanager
def watched(process):
    """Watch a process and its children; the set that it gives grows by what they map."""
    seen, end = set(), threading.Event()

    def watch():
        while not end.wait(0.05):
            with contextlib.suppress(psutil.Error):
                family = [process, *process.children(recursive=True)]
                seen.update(*map(segments, family))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        end.set()
        thread.join()


def left(seen):
    """Those of the files that still exist."""
    return sorted(path for path in seen if Path(path).exists())
