"""Peak memory of a step on a CPU, in a process of its own: allocators keep what other steps have freed."""

from __future__ import annotations

import gc
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch

from benchmarks.step_variants import Candidate, Search, Setting, prepare
from lmim_fast.config import preset

_GIVEN_BACK = str(256 * 1024)  # bytes from which glibc gives freed memory back at once; read at a start


def peak_bytes(variant: str, setting: Setting, chosen: Candidate | None) -> int:
    """Peak bytes of a step, weights and optimiser state included.

    The growth of the resident set after a tiny step, so without the libraries. What a compiler keeps for
    itself counts, what it takes for a while does not.

    Args:
        variant: one of `step_variants.VARIANTS`.
        setting: on a CPU.
        chosen:  of "compiled": how it is compiled.
    Raises:
        Exception: what the step raises; BrokenProcessPool if its process dies.
    """
    context = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": _GIVEN_BACK}),
        ProcessPoolExecutor(1, context) as pool,
    ):
        return pool.submit(_measure, variant, setting, chosen, torch.get_num_threads()).result()


def _measure(variant: str, setting: Setting, chosen: Candidate | None, threads: int) -> int:
    torch.set_num_threads(threads)  # as in the process whose steps are timed
    search = Search([chosen] if chosen else [])
    tiny = preset("tiny", decoder_dropout=setting.config.decoder_dropout, residual=setting.config.residual)
    prepare(variant, setting._replace(config=tiny), search)
    gc.collect()
    before = _resident("VmRSS")
    prepared = prepare(variant, setting, search)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    prepared.run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status: peak memory on a CPU is measured on Linux only")
