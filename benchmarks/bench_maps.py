"""Maps of the guidance view on a GPU: made on the host and copied, or densified there from the copied mesh.

    python -m benchmarks.bench_maps [--batch 512] [--rounds 50] [--results FILE]

Both ends with DALI's remap of the same crops. The host's form copies 36 KB an image (two fp32 maps and the
coverage), the device's 7 KB and a few launches a batch. The pipeline has the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import describe

_VIEW = (32, 128)
_CELL = (2, 4)  # view pixels per mesh cell
_CROP = (64, 200)
_WARMUP = 5


def densify(mesh: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Interpolate (B, rows, columns) on the mesh of `guidance.geometry` to (B, H, W), on any device."""
    (high, wide), (height, width) = _CELL, image_size
    size = (mesh.shape[1] * high, mesh.shape[2] * wide)
    dense = F.interpolate(mesh[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    return dense[:, high : high + height, wide : wide + width]


def random_mesh(batch: int, generator: np.random.Generator) -> np.ndarray:
    """(3, B, rows, columns) fp32: columns, rows and coverage of slightly bent views."""
    rows, columns = (side // cell + 2 for side, cell in zip(_VIEW, _CELL, strict=True))
    y, x = np.meshgrid(
        np.linspace(-2, _CROP[0] + 1, rows), np.linspace(-3, _CROP[1] + 2, columns), indexing="ij"
    )
    noise = generator.normal(0.0, 1.0, (3, batch, rows, columns))
    return (np.stack((x, y, np.ones_like(x)))[:, None] + noise).astype(np.float32)


class Warp:
    """A DALI pipeline that remaps crops on the GPU; `maps_from` is "cpu" or "gpu"."""

    def __init__(self, batch: int, maps_from: str) -> None:
        from nvidia.dali import fn, pipeline_def
        from nvidia.dali.types import DALIInterpType

        def define() -> Any:
            source: Any = fn.external_source
            image = source(name="image", device="gpu", no_copy=True)
            maps = [source(name=name, device=maps_from, no_copy=True) for name in ("map_x", "map_y")]
            if maps_from == "cpu":
                maps = [part.gpu() for part in maps]
            return fn.experimental.remap(
                image, *maps, interp=DALIInterpType.INTERP_LINEAR, pixel_origin="center"
            )

        self._pipeline: Any = pipeline_def(define)(
            batch_size=batch, num_threads=2, device_id=0, exec_dynamic=True, prefetch_queue_depth=1
        )
        self._pipeline.build()
        self._images = torch.randint(0, 256, (batch, *_CROP, 3), dtype=torch.uint8, device="cuda")

    def __call__(self, map_x: Any, map_y: Any) -> None:
        """Remap all crops."""
        for name, value in (("image", self._images), ("map_x", map_x), ("map_y", map_y)):
            self._pipeline.feed_input(name, value)
        self._pipeline.run()
        torch.cuda.synchronize()


def forms(batch: int) -> dict[str, Callable[[], None]]:
    """The two forms on the same meshes; each call makes the views of one batch."""
    meshes = torch.from_numpy(random_mesh(batch, np.random.default_rng(0))).pin_memory()
    dense = torch.stack([densify(part, _VIEW) for part in meshes[:2]]).contiguous().pin_memory()
    coverage = torch.full((batch, *_VIEW), 255, dtype=torch.uint8).pin_memory()
    limits = [float(side - 1) for side in reversed(_CROP)]
    host, device = Warp(batch, "cpu"), Warp(batch, "gpu")

    def from_host() -> None:
        coverage.to("cuda", non_blocking=True)
        host(dense[0].numpy(), dense[1].numpy())

    def on_device() -> None:
        copied = meshes.to("cuda", non_blocking=True)
        x, y, shown = (densify(part, _VIEW) for part in copied)
        (shown.clamp(0.0, 1.0) * 255.0 + 0.5).to(torch.uint8)
        device(x.clamp(0.0, limits[0]).contiguous(), y.clamp(0.0, limits[1]).contiguous())

    return {"maps copied": from_host, "mesh copied": on_device}


def measure(batch: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Microseconds an image of each round: on the clock, and of this thread's CPU."""
    run = forms(batch)
    times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in run}
    for number in range(_WARMUP + rounds):
        for name, form in run.items():
            wall, cpu = time.perf_counter(), time.thread_time()
            form()
            if number >= _WARMUP:
                times[name]["wall"].append(1e6 * (time.perf_counter() - wall) / batch)
                times[name]["cpu"].append(1e6 * (time.thread_time() - cpu) / batch)
    return times


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--results", help="write the result into this JSON file")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: this compares copies to a GPU, and there is no CUDA device", file=sys.stderr)
        return 1
    times = measure(args.batch, args.rounds)
    print(f"{'us an image':12s} {'wall':>8s} {'cpu':>8s}")
    for name, clocks in times.items():
        print(f"{name:12s} " + " ".join(f"{statistics.median(clock):8.2f}" for clock in clocks.values()))
    if args.results:
        result = dict(
            benchmark="maps", **describe(torch.device("cuda")), batch=args.batch, microseconds=times
        )
        with open(args.results, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
