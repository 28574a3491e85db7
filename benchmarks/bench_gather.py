"""Records of random batches, read by py-lmdb and by the native gather, from the disk and from memory.

    python -m benchmarks.bench_gather [--size 2e9] [--folder DIR] [--batches 40] [--threads 1 2 4 8]
                                      [--larger-than-memory] [--results FILE]

Makes an LMDB of noisy JPEGs of 6 to 12 KB and deletes it afterwards. "cold": its pages are dropped from the
page cache before the run, without root. Where data fits in memory the system reads ahead, and much of the
database comes with the first batches. "beside Python": another thread computes in Python all the while, as a
training loop does; "its rate" is what that thread gets done, to what it does alone. Serial CPU is that of the
calling thread, an image; a thread that waits for the disk uses none.

py-lmdb    `RecordStore.images` and `probe`, as data was read before
n threads  `RecordStore.gather` with n workers
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import describe, write_whole
from lmim_fast.data.store import records
from lmim_fast.data.store.probe import probe
from lmim_fast.data.store.records import RecordStore
from lmim_fast.data.store.writer import LmdbWriter
from lmim_fast.native import native

_BATCH = 256
_KINDS = 64  # different images
_MAX_PIXELS = 2**26
_BLOCK = 512  # bytes that the system counts reads in

Read = Callable[[RecordStore, NDArray[np.int64]], object]


def noisy_jpegs(rng: np.random.Generator) -> list[bytes]:
    """Images of 6 to 12 KB."""
    images: list[bytes] = []
    while len(images) < _KINDS:
        height, width = int(rng.integers(32, 72)), int(rng.integers(96, 320))
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 60])[1].tobytes()
        if 6000 <= len(encoded) <= 12000:
            images.append(encoded)
    return images


def write_database(folder: Path, size: float) -> None:
    """An LMDB of about `size` bytes."""
    rng = np.random.default_rng(0)
    images = noisy_jpegs(rng)
    count = max(1, int(size / (np.mean([len(image) for image in images]) + 2048)))  # half a page is lost
    with LmdbWriter(folder, count) as writer:
        for kind in rng.integers(0, _KINDS, count).tolist():
            writer.put(images[kind], None)


def drop_from_page_cache(folder: Path) -> None:
    """No page of the database is in memory; nobody may have it mapped."""
    with open(folder / "data.mdb", "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class PythonBeside:
    """A thread that computes in Python; context manager."""

    def __init__(self) -> None:
        self._done, self._rounds = threading.Event(), 0
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> PythonBeside:
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.rate = self._rounds / (time.perf_counter() - self._start)
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.is_set():
            for number in range(100):
                number * number
            self._rounds += 1


def measure(folder: Path, read: Read, batches: int, seed: int) -> dict[str, float]:
    """Images a second, CPU of the calling thread in us an image, and MB that came from the disk."""
    store = RecordStore([folder])
    order = np.random.default_rng(seed).integers(0, len(store), (batches, _BATCH))
    store.gather([0], _MAX_PIXELS)  # opens
    read_before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    cpu, start = time.thread_time(), time.perf_counter()
    for indices in order:
        read(store, indices)
    seconds, cpu = time.perf_counter() - start, time.thread_time() - cpu
    from_disk = (resource.getrusage(resource.RUSAGE_SELF).ru_inblock - read_before) * _BLOCK / 1e6
    store.close()
    images = batches * _BATCH
    return {"images_per_second": images / seconds, "serial_us": 1e6 * cpu / images, "disk_mb": from_disk}


def by_py_lmdb(store: RecordStore, indices: NDArray[np.int64]) -> object:
    return probe(store.images(indices.tolist()), _MAX_PIXELS)


def natively(threads: int) -> Read:
    workers = native().Workers(threads)
    return lambda store, indices: store.gather(indices, _MAX_PIXELS, workers)


def rows(folder: Path, threads: list[int], batches: int) -> list[dict[str, Any]]:
    """A row for each way, state and company; printed as they come."""
    with PythonBeside() as beside:
        time.sleep(1)
    rate_alone = beside.rate
    ways: dict[str, Read] = {"py-lmdb": by_py_lmdb}
    ways |= {f"{count} thread{'s' * (count > 1)}": natively(count) for count in threads}
    found: list[dict[str, Any]] = []
    print(
        f"{'pages':6s} {'beside':8s} {'way':10s} {'images/s':>9s} {'serial us':>9s} {'disk MB':>8s} its rate"
    )
    for state in ("cold", "warm"):
        for company in ("nothing", "Python"):
            for seed, (way, read) in enumerate(ways.items()):
                if state == "cold":
                    drop_from_page_cache(folder)
                else:
                    measure(folder, read, batches, seed)
                row: dict[str, Any] = {"pages": state, "beside": company, "way": way}
                if company == "Python":
                    with PythonBeside() as beside:
                        row |= measure(folder, read, batches, seed)
                    row["rate_beside"] = beside.rate / rate_alone
                else:
                    row |= measure(folder, read, batches, seed)
                found.append(row)
                rate = f"{row['rate_beside']:.0%}" if "rate_beside" in row else ""
                print(
                    f"{state:6s} {company:8s} {way:10s} {row['images_per_second']:9,.0f}"
                    f" {row['serial_us']:9.2f} {row['disk_mb']:8.0f} {rate:>8s}",
                    flush=True,
                )
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=float, default=2e9, help="bytes of the database")
    parser.add_argument("--folder", type=Path, help="where the database is made; a temporary folder")
    parser.add_argument("--batches", type=int, default=40, help=f"of {_BATCH} images, for each row")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--larger-than-memory", action="store_true", help="read as if it were")
    parser.add_argument("--results", type=Path, help="write the rows there too, as JSON")
    args = parser.parse_args(argv)
    if native() is None:
        return 1
    place = tempfile.mkdtemp(prefix="bench-gather-", dir=args.folder)
    try:
        free = shutil.disk_usage(place).free
        if free < 2 * args.size:
            parser.error(f"{place}: {free:,} bytes are free, this needs {2 * args.size:,.0f}")
        if args.larger_than_memory:
            records._fits_in_memory = lambda paths: False
        database = Path(place, "data")
        write_database(database, args.size)
        settings = {
            "bytes": os.path.getsize(database / "data.mdb"),
            "records": len(RecordStore([database])),
            "batch": _BATCH,
            "larger_than_memory": args.larger_than_memory,
        }
        print(", ".join(f"{name} {value:,}" for name, value in settings.items()))
        found = rows(database, args.threads, args.batches)
    finally:
        shutil.rmtree(place)
    if args.results:
        result = {"benchmark": "gather", **describe(torch.device("cpu")), **settings, "rows": found}
        write_whole(args.results, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
