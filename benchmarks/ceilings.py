"""What the machine reaches, measured in the run whose results are read against it.

A copy and the exponentials count by the median of their rounds, the product by its fastest round:
floors of products are the stricter ones.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.floors import Ceilings

# (bytes of a copy, side of a square product): large enough to leave caches and launches behind
_SIZES = {"cuda": (2**30, 8192), "cpu": (2**28, 1024)}


@functools.cache
def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Ceilings for products in `dtype`; once a process."""
    copied, side = _SIZES[device.type]
    return Ceilings(
        copy_bandwidth(device, copied),
        gemm_rate(device, dtype, side, rounds=10),
        exponential_rate(device) if device.type == "cuda" else None,
    )


def gemm_rate(device: torch.device, dtype: torch.dtype, size: int, rounds: int) -> float:
    """FLOP/s of the fastest of `rounds` square products."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(rounds + 1):
        _synchronise(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def copy_bandwidth(device: torch.device, size: int, rounds: int = 10) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _median_seconds(lambda: target.copy_(source), device, rounds)


def exponential_rate(device: torch.device, rounds: int = 10) -> float:
    """Exponentials a second of a CUDA device, from a kernel whose every instruction is nearly one of them."""
    from benchmarks.exponentials import exponentials

    blocks, repeats = 64 * torch.cuda.get_device_properties(device).multi_processor_count, 1024
    x = torch.rand(blocks * 1024, device=device)
    return x.numel() * repeats / _median_seconds(lambda: exponentials(x, repeats), device, rounds)


def _median_seconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    times = []
    for _ in range(rounds + 2):
        _synchronise(device)
        start = time.perf_counter()
        run()
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
