"""The guidance view's program: the few numbers per sample that make its view.

The ten operations of the paper's view, in their sampled order, become one convolution kernel, one inverse map
and one colour program, so that DALI touches each crop once and `ops.photometric` finishes both views.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmim_fast.data.guidance.color import color_program
from lmim_fast.data.guidance.filter import filter_kernels
from lmim_fast.data.guidance.geometry import inverse_maps, working_sizes
from lmim_fast.data.guidance.kernels import Kernels
from lmim_fast.data.guidance.parameters import GuidanceParameters
from lmim_fast.native import native
from lmim_fast.ops.photometric import ColorProgram


@dataclass(frozen=True)
class GuidanceProgram:
    """What the pipeline executes for B samples; `parameters` says what it stands for."""

    parameters: GuidanceParameters
    working_size: NDArray[np.float32]
    """(B, 2) height and width to which large crops are shrunk before filter and warp."""
    kernels: Kernels
    """For the shrunk crop."""
    map_x: NDArray[np.float32]
    """(B, H, W) source column of every output pixel, in pixels of the shrunk crop, inside it."""
    map_y: NDArray[np.float32]
    """(B, H, W) source row."""
    color: ColorProgram
    """What `ops.photometric` does after the warp."""


def make_program(
    parameters: GuidanceParameters,
    heights: NDArray[np.int32],
    widths: NDArray[np.int32],
    image_size: tuple[int, int] = (32, 128),
    *,
    workers: Any = None,
    pinned: bool = False,
) -> GuidanceProgram:
    """Turn drawn parameters into what the pipeline executes.

    Runs in C++ without the interpreter's lock, or as `program_in_numpy` where that is not built: maps are
    equal to 1e-4 pixels and coverage to 1, whatever the number of threads.

    Args:
        parameters: of B samples.
        heights:    (B,) pixels of the crops as decoded.
        widths:     (B,)
        image_size: height and width of the view.
        workers:    `lmim_fast._C.Workers` that share the samples; None: this thread does all.
        pinned:     whether the program lies in page-locked memory, from which a GPU copies it.
    Raises:
        ValueError: sizes that are not positive or not one per sample.
    """
    sizes = np.stack((np.asarray(heights), np.asarray(widths)), axis=1)
    if sizes.shape != (len(parameters), 2) or (sizes.size and sizes.min() < 1):
        raise ValueError(f"heights and widths must be {len(parameters)} positive numbers each")
    module = native()
    if module is None:
        return program_in_numpy(parameters, sizes.astype(np.float64), image_size)
    batch = len(parameters)
    empty = functools.partial(torch.empty, device="cpu", pin_memory=pinned)
    pixels = (batch, *image_size)
    working, map_x, map_y = empty((batch, 2)), empty(pixels), empty(pixels)
    color = ColorProgram(
        before=empty((batch, 3, 4)),
        threshold=empty(batch),
        invert_above=empty(batch, dtype=torch.bool),
        after=empty((batch, 3, 4)),
        coverage=empty(pixels, dtype=torch.uint8),
        border=empty((batch, 3)),
        contrast=empty(batch),
        final=empty((batch, 3, 4)),
    )
    sides, taps = module.guidance_programs(
        parameters,
        *(np.ascontiguousarray(sides, np.int32) for sides in sizes.T),
        *(part.numpy() for part in (working, map_x, map_y)),
        workers=workers,
        **{item.name: getattr(color, item.name).numpy() for item in fields(color)},
    )
    kernels = Kernels(sides, taps)
    return GuidanceProgram(parameters, working.numpy(), kernels, map_x.numpy(), map_y.numpy(), color)


def program_in_numpy(
    parameters: GuidanceParameters, sizes: NDArray[np.float64], image_size: tuple[int, int]
) -> GuidanceProgram:
    """`make_program` without C++; sizes (B, 2) are heights and widths."""
    working = working_sizes(sizes, image_size)
    maps = inverse_maps(parameters, sizes, working, image_size)
    return GuidanceProgram(
        parameters=parameters,
        working_size=working.astype(np.float32),
        kernels=Kernels.of(filter_kernels(parameters, sizes / working)),
        map_x=maps.x,
        map_y=maps.y,
        color=color_program(parameters, maps.coverage),
    )
