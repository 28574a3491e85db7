"""The DALI pipeline, one definition for CPU and GPU: encoded images and programs in, views as bytes out.

    encoded -> cut -> decode (CPU threads) -+-> bicubic resize                      -> plain
                                            +-> shrink -> per-sample filter -> warp -> warped

Decoded as released: RGB whatever the file holds (gray, palette, CMYK, 16 bit), alpha dropped, EXIF rotation
ignored. An augmented view is the warped one; its pipeline makes no plain view.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmim_fast.data.guidance.kernels import Kernels
from lmim_fast.data.store.gather import EncodedImages
from lmim_fast.errors import LmimError
from lmim_fast.native import native

try:
    from nvidia.dali import Pipeline, fn, pipeline_def
    from nvidia.dali.backend import TensorCPU, TensorListCPU
    from nvidia.dali.plugin.pytorch import feed_ndarray
    from nvidia.dali.types import DALIImageType, DALIInterpType
except ImportError as error:
    raise ImportError('the input pipeline needs DALI: pip install "lmim_fast[cuda13]" (or cuda12)') from error


# DALI reads the headers of up to this many images in one thread. Those of larger batches are read in several,
# and an image that fails there can crash the process: its decoder does not wait for the other threads
# (DALI 2.4; batches of 32 crash, of 8 never did).
_SEARCHED_AT_ONCE = 8

Encoded = EncodedImages | Sequence[bytes | NDArray[np.uint8]]


class WarpProgram(Protocol):
    """What makes the warped views of B samples."""

    @property
    def working_size(self) -> NDArray[np.float32]:
        """(B, 2) height and width to which crops are shrunk before filter and warp."""

    @property
    def kernels(self) -> Kernels:
        """For the shrunk crop."""

    @property
    def map_x(self) -> NDArray[np.float32]:
        """(B, H, W) source column of every output pixel, inside the shrunk crop."""

    @property
    def map_y(self) -> NDArray[np.float32]:
        """(B, H, W) source row."""


class Stage(enum.IntEnum):
    """How far a pipeline goes; the benchmark times them one by one."""

    DECODE = 0
    PLAIN = 1
    """The plain view."""
    FILTER = 2
    """The plain view and the filtered crop."""
    WARP = 3
    """Both views."""
    AUGMENT = 4
    """The warped view alone."""


class BrokenImages(Exception):
    """Images of a batch that cannot be decoded: `rows`."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(f"images in rows {rows} cannot be decoded")
        self.rows = rows


def start_workers(module: Any, threads: int) -> Any:
    """The native module's threads.

    Raises:
        LmimError: the system does not start that many.
    """
    try:
        return module.Workers(threads)
    except RuntimeError as error:
        raise LmimError(f"--loader.threads: {error}") from None


class DaliViews:
    """Makes the views of one batch per call with a DALI pipeline.

    On a CPU DALI only decodes, and C++ (`csrc/views.h`) does the rest where it is built: on word crops DALI's
    operators take several times as long.

    Args:
        batch_size: most samples of a call.
        threads:    DALI threads, and as many of C++.
        device:     where the views are made.
        image_size: height and width of the views.
        stage:      PLAIN, WARP or AUGMENT; or DECODE, which makes no view: it tells which images are broken.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        threads: int,
        device: torch.device,
        image_size: tuple[int, int],
        stage: Stage,
    ) -> None:
        self._device, self._image_size, self._stage = device, image_size, stage
        self._native: Any = native() if device.type == "cpu" else None
        self._workers = None if self._native is None else start_workers(self._native, threads)
        device_id = None
        if device.type == "cuda":
            device_id = torch.cuda.current_device() if device.index is None else device.index
        self._options: dict[str, Any] = dict(
            stage=stage if self._native is None else Stage.DECODE,
            batch_size=batch_size,
            threads=threads,
            device_id=device_id,
            image_size=image_size,
        )
        self._pipeline: Pipeline | None = build_pipeline(**self._options)

    def __call__(self, encoded: Encoded, program: WarpProgram | None) -> list[Tensor]:
        """Make the views of one batch.

        Args:
            encoded: B encoded images.
            program: for these images; None exactly if there is no warped view.
        Returns:
            plain and warped views, as far as the stage has them, (B, H, W, 3) uint8 on `device`, in torch's
            current stream.
        Raises:
            BrokenImages: some cannot be decoded; the next batch can follow.
        """
        if self._pipeline is None:
            raise RuntimeError("the DALI views are closed")
        feed(self._pipeline, self._options["stage"], encoded, program)
        try:
            outputs = self._pipeline.run()
        except RuntimeError:
            # A failed DALI pipeline must not run again; a new one takes 5 ms.
            self._pipeline = build_pipeline(**self._options)
            broken = _broken_rows(encoded)
            if not broken:
                raise
            raise BrokenImages(broken) from None
        if self._stage == Stage.DECODE:  # crops of many sizes
            return []
        if self._native is not None:
            return self._native_views(outputs[0], len(encoded), program)
        return [self._tensor(output, len(encoded)) for output in outputs]

    def close(self) -> None:
        """Free the pipeline, its threads and its memory."""
        self._pipeline = self._workers = None

    def _native_views(self, decoded: Any, batch: int, program: WarpProgram | None) -> list[Tensor]:
        crops = [decoded[row] for row in range(batch)]
        shape, views = (batch, *self._image_size, 3), []
        if self._stage != Stage.AUGMENT:
            views.append(torch.empty(shape, dtype=torch.uint8, device="cpu"))
            self._native.make_plain_views(crops, views[-1].numpy(), self._workers)
        if program is not None:
            views.append(torch.empty(shape, dtype=torch.uint8, device="cpu"))
            kernels, maps = program.kernels, (program.map_x, program.map_y)
            self._native.make_warped_views(
                crops,
                program.working_size,
                kernels.sides,
                kernels.taps,
                *maps,
                views[-1].numpy(),
                self._workers,
            )
        return views

    def _tensor(self, output: Any, batch: int) -> Tensor:
        tensor = torch.empty((batch, *self._image_size, 3), dtype=torch.uint8, device=self._device)
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        return feed_ndarray(output.as_tensor(), tensor, cuda_stream=stream)


def build_pipeline(
    stage: Stage, *, batch_size: int, threads: int, device_id: int | None, image_size: tuple[int, int]
) -> Pipeline:
    """The DALI pipeline up to `stage`; `device_id` is the GPU that makes the views, None the CPU."""
    pipeline = pipeline_def(_define)(
        stage,
        image_size,
        device_id is not None,
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        exec_dynamic=True,
        prefetch_queue_depth=1,
    )
    pipeline.build()
    return pipeline


def feed(pipeline: Pipeline, stage: Stage, encoded: Encoded, program: WarpProgram | None) -> None:
    """Give a pipeline of `stage` its next batch.

    Images and program are not copied: they must stay as they are until the views are there.
    """
    _feed_encoded(pipeline, encoded)
    if stage >= Stage.FILTER:
        if program is None:
            raise ValueError("the warped view needs a program")
        pipeline.feed_input("working_size", program.working_size)
        kernels = [TensorCPU(kernel) for kernel in program.kernels]
        pipeline.feed_input("kernel", TensorListCPU(kernels))
        if stage >= Stage.WARP:
            pipeline.feed_input("map_x", program.map_x)
            pipeline.feed_input("map_y", program.map_y)


def _feed_encoded(pipeline: Pipeline, encoded: Encoded) -> None:
    # One array for all is handed over in a tenth of the time of an array each.
    block = encoded if isinstance(encoded, EncodedImages) else None
    rows: Any = None if block is None else block.rectangle()
    if rows is None:
        rows = TensorListCPU([TensorCPU(np.frombuffer(image, np.uint8)) for image in encoded])
    pipeline.feed_input("encoded", rows)
    lengths = [len(image) for image in encoded] if block is None else block.lengths
    pipeline.feed_input("length", np.array(lengths, np.int32).reshape(-1, 1))


def _define(stage: Stage, image_size: tuple[int, int], on_gpu: bool) -> tuple[Any, ...]:
    # Decoded on the CPU even for views made on the GPU: no GPU decoder is faster on tiny crops.
    # What follows an image in its row is cut off: decoders read on where a damaged image ends too early.
    encoded = fn.slice(_source("encoded"), 0, _source("length", no_copy=False), axes=[0])
    image: Any = fn.decoders.image(
        encoded, device="cpu", output_type=DALIImageType.RGB, adjust_orientation=False
    )
    if stage == Stage.DECODE:
        return (image,)
    if on_gpu:
        image = image.gpu()
    plain: tuple[Any, ...] = ()
    if stage != Stage.AUGMENT:
        plain = (fn.resize(image, size=image_size, interp_type=DALIInterpType.INTERP_CUBIC, antialias=True),)
    if stage == Stage.PLAIN:
        return plain
    shrunk: Any = fn.resize(
        image, size=_source("working_size"), interp_type=DALIInterpType.INTERP_LINEAR, antialias=True
    )
    filtered = fn.filter(shrunk, _source("kernel", on_gpu))
    if stage == Stage.FILTER:
        return *plain, filtered
    map_x, map_y = _source("map_x", on_gpu), _source("map_y", on_gpu)
    if on_gpu:
        # Its border is constant black, which is never seen: the maps stay inside the crop.
        return *plain, fn.experimental.remap(
            filtered, map_x, map_y, interp=DALIInterpType.INTERP_LINEAR, pixel_origin="center"
        )
    return *plain, fn.python_function(
        filtered, map_x, map_y, function=_warp, batch_processing=True, output_layouts="HWC"
    )


def _source(name: str, on_gpu: bool = False, no_copy: bool = True) -> Any:
    source: Any = fn.external_source(name=name, no_copy=no_copy)
    return source.gpu() if on_gpu else source


def _broken_rows(encoded: Encoded) -> list[int]:
    """The images that the pipeline's decoder refuses, ascending: small batches, halved where they fail."""
    broken: list[int] = []
    pipeline: Pipeline | None = None
    everything = range(len(encoded))
    pending = [everything[start : start + _SEARCHED_AT_ONCE] for start in everything[::_SEARCHED_AT_ONCE]]
    pending.reverse()  # the last one is next
    while pending:
        rows = pending.pop()
        if pipeline is None:
            pipeline = build_pipeline(
                Stage.DECODE, batch_size=_SEARCHED_AT_ONCE, threads=1, device_id=None, image_size=(1, 1)
            )
        feed(pipeline, Stage.DECODE, [encoded[row] for row in rows], None)
        try:
            pipeline.run()
        except RuntimeError:
            pipeline = None
            half = len(rows) // 2
            if half:
                pending += [rows[half:], rows[:half]]
            else:
                broken.append(rows[0])
    return broken


def _warp(
    images: list[NDArray[np.uint8]], maps_x: list[NDArray[np.float32]], maps_y: list[NDArray[np.float32]]
) -> list[Any]:
    """OpenCV in place of DALI's remap, which is for GPUs only."""
    return [
        cv2.remap(image, map_x, map_y, cv2.INTER_LINEAR)
        for image, map_x, map_y in zip(images, maps_x, maps_y, strict=True)
    ]
