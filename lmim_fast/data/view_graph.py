"""The DALI pipeline, one definition for CPU and GPU: encoded images and programs in, both views as bytes out.

    encoded -> decode (CPU threads) -+-> bicubic resize                      -> plain
                                     +-> shrink -> per-sample filter -> warp -> warped

Decoded as released: RGB whatever the file holds (gray, palette, CMYK, 16 bit), alpha dropped, EXIF rotation
ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmim_fast.data.guidance_program import GuidanceProgram

try:
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali.plugin.pytorch import feed_ndarray
    from nvidia.dali.types import DALIImageType, DALIInterpType
except ImportError as error:
    raise ImportError('the input pipeline needs DALI: pip install "lmim_fast[cuda13]" (or cuda12)') from error


class BrokenImages(Exception):
    """Images of a batch that cannot be decoded: `reasons` by row."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(f"{len(reasons)} images cannot be decoded: {reasons}")
        self.reasons = reasons


class ViewGraph:
    """A built pipeline; call it with a batch at a time.

    Args:
        batch_size: most samples of a call.
        threads:    DALI threads.
        device:     where the views are made.
        image_size: height and width of the views.
        guidance:   False: the plain view alone.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        threads: int,
        device: torch.device,
        image_size: tuple[int, int],
        guidance: bool,
    ) -> None:
        self._device, self._image_size = device, image_size
        self._device_id = (device.index or 0) if device.type == "cuda" else None
        options: dict[str, Any] = dict(num_threads=threads, exec_dynamic=True, prefetch_queue_depth=1)
        define = pipeline_def(_define_views)
        self._views = define(
            image_size,
            guidance,
            self._device_id is not None,
            batch_size=batch_size,
            device_id=self._device_id,
            **options,
        )
        self._views.build()
        self._decoder = pipeline_def(_decode)(batch_size=1, device_id=None, **options)
        self._decoder.build()

    def __call__(
        self, encoded: Sequence[bytes], program: GuidanceProgram | None
    ) -> tuple[Tensor, Tensor | None]:
        """Make the views of one batch.

        Args:
            encoded: B encoded images.
            program: for these images; None exactly where there is no guidance view.
        Returns:
            plain and warped views, (B, H, W, 3) uint8 on the graph's device, in torch's current stream.
        Raises:
            BrokenImages: some cannot be decoded; the graph goes on working.
        """
        self._views.feed_input("encoded", [np.frombuffer(image, np.uint8) for image in encoded])
        if program is not None:
            self._views.feed_input("working_size", program.working_size)
            self._views.feed_input("kernel", program.kernels)
            self._views.feed_input("map_x", program.map_x)
            self._views.feed_input("map_y", program.map_y)
        try:
            outputs = self._views.run()
        except RuntimeError:
            reasons = self._broken(encoded)
            if not reasons:
                raise
            raise BrokenImages(reasons) from None
        views = [self._tensor(output, len(encoded)) for output in outputs]
        return views[0], views[1] if program is not None else None

    def close(self) -> None:
        """Free the pipeline, its threads and its memory."""
        del self._views, self._decoder

    def _broken(self, encoded: Sequence[bytes]) -> dict[int, str]:
        """Rows that do not decode, and why; the rest of a failed batch is none the wiser."""
        reasons = {}
        for row, image in enumerate(encoded):
            try:
                self._decoder.feed_input("encoded", [np.frombuffer(image, np.uint8)])
                self._decoder.run()
            except RuntimeError as error:
                reasons[row] = _short(str(error))
        return reasons

    def _tensor(self, output: Any, batch: int) -> Tensor:
        tensor = torch.empty((batch, *self._image_size, 3), dtype=torch.uint8, device=self._device)
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        return feed_ndarray(output.as_tensor(), tensor, cuda_stream=stream)


def _define_views(image_size: tuple[int, int], guidance: bool, on_gpu: bool) -> tuple[Any, ...]:
    image = _decode()
    if on_gpu:
        image = image.gpu()
    plain = fn.resize(image, size=image_size, interp_type=DALIInterpType.INTERP_CUBIC, antialias=True)
    if not guidance:
        return (plain,)
    names = ("working_size", "kernel", "map_x", "map_y")
    size, kernel, map_x, map_y = (_source(name) for name in names)
    shrunk: Any = fn.resize(image, size=size, interp_type=DALIInterpType.INTERP_LINEAR, antialias=True)
    if on_gpu:
        # Its border is constant black, which is never seen: the maps stay inside the crop.
        warped = fn.experimental.remap(
            fn.filter(shrunk, kernel.gpu()),
            map_x.gpu(),
            map_y.gpu(),
            interp=DALIInterpType.INTERP_LINEAR,
            pixel_origin="center",
        )
        return plain, warped
    filtered = fn.filter(shrunk, kernel)
    warped = fn.python_function(
        filtered, map_x, map_y, function=_warp, batch_processing=True, output_layouts="HWC"
    )
    return plain, warped


def _decode() -> Any:
    # On the CPU even for views made on the GPU: no GPU decoder was found faster on tiny crops.
    return fn.decoders.image(
        _source("encoded"), device="cpu", output_type=DALIImageType.RGB, adjust_orientation=False
    )


def _source(name: str) -> Any:
    return fn.external_source(name=name)


def _warp(
    images: list[NDArray[np.uint8]], maps_x: list[NDArray[np.float32]], maps_y: list[NDArray[np.float32]]
) -> list[Any]:
    """OpenCV in place of DALI's remap, which is for GPUs only."""
    return [
        cv2.remap(image, map_x, map_y, cv2.INTER_LINEAR)
        for image, map_x, map_y in zip(images, maps_x, maps_y, strict=True)
    ]


def _short(message: str) -> str:
    """The telling line of a DALI error."""
    lines = [line.strip() for line in message.splitlines()]
    telling = [line for line in lines if "rror" in line and "Critical" not in line and "operator" not in line]
    return (telling or [line for line in lines if line] or ["cannot be decoded"])[0][:200]
