"""The DALI pipeline, one definition for CPU and GPU: encoded bytes and programs in, both views as bytes out.

    encoded -> decode (CPU threads) -+-> bicubic resize                            -> plain
                                     +-> shrink -> per-sample filter -> warp       -> warped

Decoded as released: RGB whatever the file holds (gray, palette, CMYK, 16 bit), alpha dropped, EXIF rotation ignored.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

try:
    import nvidia.dali as dali
    from nvidia.dali import fn, types
except ImportError as error:  # pragma: no cover - depends on the machine
    raise ImportError('the input pipeline needs DALI: pip install "lmim_fast[cuda13]" (or cuda12)') from error

Image = NDArray[np.uint8]


def view_graph(
    *,
    batch_size: int,
    threads: int,
    device_id: int | None,
    image_size: tuple[int, int],
    guidance: bool,
) -> dali.Pipeline:
    """Build the pipeline.

    Inputs to feed: `encoded`; with guidance also `working_size` (2,), `kernel` (k, k), `map_x` and `map_y` (H, W), fp32.

    Args:
        batch_size: most samples of a run.
        threads:    DALI threads.
        device_id:  GPU on which the views are made; None: on the CPU.
        image_size: height and width of the views.
        guidance:   False: the plain view alone.
    Returns:
        A built pipeline whose run gives the plain and the warped views, (H, W, 3) uint8 each.
    """

    @dali.pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        exec_dynamic=True,
        prefetch_queue_depth=1,
    )
    def graph() -> tuple[Any, ...]:
        image = decode()
        if device_id is not None:
            image = image.gpu()
        plain = fn.resize(image, size=image_size, interp_type=types.INTERP_CUBIC, antialias=True)
        if not guidance:
            return (plain,)
        shrunk = fn.resize(
            image,
            size=fn.external_source(name="working_size"),
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        kernel, map_x, map_y = (fn.external_source(name=name) for name in ("kernel", "map_x", "map_y"))
        if device_id is not None:
            filtered = fn.filter(shrunk, kernel.gpu())
            # Constant black border: never seen, the maps stay inside the crop.
            return plain, fn.experimental.remap(
                filtered, map_x.gpu(), map_y.gpu(), interp=types.INTERP_LINEAR, pixel_origin="center"
            )
        filtered = fn.filter(shrunk, kernel)
        warped = fn.python_function(
            filtered, map_x, map_y, function=_warp, batch_processing=True, num_outputs=1, output_layouts="HWC"
        )
        return plain, warped

    pipeline = graph()
    pipeline.build()
    return pipeline


def decode_graph(batch_size: int, threads: int) -> dali.Pipeline:
    """A built pipeline that only decodes `encoded`, as `view_graph` does; it tells which record of a batch is broken."""

    @dali.pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None, exec_dynamic=True)
    def graph() -> Any:
        return decode()

    pipeline = graph()
    pipeline.build()
    return pipeline


def decode() -> Any:
    """The decode node of both graphs: the same bytes give the same pixels or the same error in both."""
    return fn.decoders.image(
        fn.external_source(name="encoded"), device="cpu", output_type=types.RGB, adjust_orientation=False
    )


def _warp(images: list[Image], maps_x: list[NDArray[np.float32]], maps_y: list[NDArray[np.float32]]) -> list[Image]:
    """OpenCV in place of DALI's remap, which is for GPUs only."""
    return [
        cv2.remap(image, map_x, map_y, cv2.INTER_LINEAR)
        for image, map_x, map_y in zip(images, maps_x, maps_y, strict=True)
    ]
