"""The guidance view's program: the few numbers per sample that make its view.

The ten operations of the paper's view, in their sampled order, become one convolution kernel, one inverse map
and one colour program, so that DALI touches each crop once and `ops.photometric` finishes both views.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmim_fast.data.guidance.color import color_program
from lmim_fast.data.guidance.filter import filter_kernels
from lmim_fast.data.guidance.geometry import inverse_maps, working_sizes
from lmim_fast.data.guidance.parameters import GuidanceParameters
from lmim_fast.ops.photometric import ColorProgram


@dataclass(frozen=True)
class GuidanceProgram:
    """What the pipeline executes for B samples; `parameters` says what it stands for."""

    parameters: GuidanceParameters
    working_size: NDArray[np.float32]
    """(B, 2) height and width to which large crops are shrunk before filter and warp."""
    kernels: list[NDArray[np.float32]]
    """B odd square kernels (1x1 where the filter is off), for the shrunk crop."""
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
) -> GuidanceProgram:
    """Turn drawn parameters into what the pipeline executes.

    Args:
        parameters: of B samples.
        heights:    (B,) pixels of the crops as decoded.
        widths:     (B,)
        image_size: height and width of the view.
    Raises:
        ValueError: sizes that are not positive or not one per sample.
    """
    sizes = np.stack((np.asarray(heights), np.asarray(widths)), axis=1).astype(np.float64)
    if sizes.shape != (len(parameters), 2) or (sizes.size and sizes.min() < 1):
        raise ValueError(f"heights and widths must be {len(parameters)} positive numbers each")
    working = working_sizes(sizes, image_size)
    maps = inverse_maps(parameters, sizes, working, image_size)
    return GuidanceProgram(
        parameters=parameters,
        working_size=working.astype(np.float32),
        kernels=filter_kernels(parameters, sizes / working),
        map_x=maps.x,
        map_y=maps.y,
        color=color_program(parameters, maps.coverage),
    )
