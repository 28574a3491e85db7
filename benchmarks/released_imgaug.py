"""Both views in the released manner with the operations of imgaug 0.4, the library that the release uses.

    PYTHON -m benchmarks.released_imgaug < records

`bench_data --imgaug-python PYTHON` runs this. The library is older than NumPy 2, so PYTHON is not the one
that has the package: it has numpy 1.23, imgaug 0.4, scikit-image, opencv-python-headless and pillow. Records
come in as length (8 bytes, little-endian) and bytes, one after the other; a line of JSON goes out.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import cv2

from benchmarks.released_views import Bytes, ReleasedViews
from lmim_fast.config import GuidanceConfig

_WARMUP = 20  # records
_LENGTH = struct.Struct("<Q")
_MOST_SECONDS = 600


class ImgaugViews(ReleasedViews):
    """`ReleasedViews` whose ten operations are imgaug's, with the same strengths."""

    def __init__(self, config: GuidanceConfig, seed: int = 0) -> None:
        import imgaug.augmenters as iaa

        super().__init__(config, seed)
        vertical, horizontal = config.crop_vertical, config.crop_horizontal
        self._some = iaa.SomeOf(
            (config.min_operations, config.max_operations),
            [
                iaa.LinearContrast(config.contrast),
                iaa.GaussianBlur(config.blur_sigma),
                iaa.Crop(percent=(vertical, (0.0, 0.0), vertical, (0.0, 0.0))),
                iaa.Crop(percent=((0.0, 0.0), horizontal, (0.0, 0.0), horizontal)),
                iaa.Sharpen(alpha=config.sharpen_alpha, lightness=config.sharpen_lightness),
                iaa.Affine(rotate=config.rotate_degrees, fit_output=True),
                iaa.PiecewiseAffine(scale=config.piecewise_scale, mode="edge"),
                iaa.PerspectiveTransform(scale=config.perspective_scale),
                iaa.Solarize(1.0, threshold=config.solarize_threshold),
                iaa.Grayscale(alpha=config.grayscale_alpha),
            ],
            random_order=True,
            seed=seed,
        )

    def augment(self, image: Bytes) -> Bytes:
        augmented: Bytes = self._some(image=image)
        return augmented


def in_process(python: str, records: Sequence[bytes]) -> float:
    """Seconds of CPU time an image, by this program in the interpreter `python`.

    Raises:
        RuntimeError: it failed; with what it said last.
    """
    run = subprocess.run(
        [python, "-m", "benchmarks.released_imgaug"],
        input=b"".join(_LENGTH.pack(len(record)) + record for record in records),
        capture_output=True,
        timeout=_MOST_SECONDS,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    if run.returncode:
        said = run.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"{python} cannot run benchmarks.released_imgaug: {said}")
    return float(json.loads(run.stdout)["seconds"])


def main() -> int:
    cv2.setNumThreads(1)
    data, at, records = sys.stdin.buffer.read(), 0, []
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        records.append(data[at : at + length])
        at += length
    make = ImgaugViews(GuidanceConfig())
    for record in itertools.islice(itertools.cycle(records), _WARMUP):
        make(record)
    start = time.process_time()
    for record in records:
        make(record)
    print(json.dumps({"seconds": (time.process_time() - start) / len(records)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
