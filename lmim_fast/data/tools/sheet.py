"""`lmim data sheet`: crops of LMDBs side by side as one PNG, with their numbers and labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from lmim_fast.config import DataConfig, GuidanceConfig, SheetConfig
from lmim_fast.data.decoding import decode
from lmim_fast.data.order import SampleOrder
from lmim_fast.data.samples import decodable, reason_of
from lmim_fast.data.store.probe import Status
from lmim_fast.data.store.records import Records, RecordStore
from lmim_fast.data.tools.captions import caption
from lmim_fast.data.tools.chosen import ChosenSamples
from lmim_fast.data.tools.files import require_writable, write_whole
from lmim_fast.data.visible import visible

Pixels = NDArray[np.uint8]

BOX = (48, 192)
"""Height and width of a crop's place: 1.5 times the size that a model sees."""
_ENLARGED = 4.0  # no crop is drawn larger than this, so that small ones are seen to be small
_GAP = 8  # pixels between tiles
_DIGIT = 9  # pixels of a digit of a record's number, at most
_GRAY = 160  # of a broken record's tile


def write_sheet(config: SheetConfig) -> str:
    """Write the sheet.

    Returns:
        One line that says what is on it.
    Raises:
        UsageError: the file cannot be written.
        DataError:  a path without a database, or one that cannot be read.
    """
    path = Path(config.output)
    require_writable(path)
    store = RecordStore(config.paths)
    try:
        count = min(config.count, len(store))
        # The first samples of a run of this seed.
        _, indices = SampleOrder(len(store), count, config.seed).batch(0)
        tiles, broken = _tiles(store, indices.tolist(), config)
    finally:
        store.close()
    write_png(path, _grid(tiles, config.columns))
    bad = f", {broken} of them broken" if broken else ""
    return f"{visible(str(path))}: {count:,} of {len(store):,} records{bad}"


def write_png(path: Path, pixels: Pixels) -> None:
    """Write (H, W, 3) uint8 RGB; UsageError where it cannot be written."""
    write_whole(path, cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes())


def _tiles(store: RecordStore, indices: list[int], config: SheetConfig) -> tuple[list[Pixels], int]:
    """The tiles, all of one size, and how many records are broken."""
    crops, problems = decoded_crops(store, indices)
    views: dict[int, Pixels] = {}
    if config.views:
        good = [index for index, crop in zip(indices, crops, strict=True) if crop is not None]
        views = _guidance_views(store, good, config.seed)
    labels = store.labels(indices)
    tiles = []
    for index, crop, problem, label in zip(indices, crops, problems, labels, strict=True):
        pictures = [gray_tile(BOX, problem) if crop is None else fitted(crop, BOX)]
        if config.views:
            empty = np.full((*BOX, 3), 255, np.uint8)
            between = np.full((BOX[0], _GAP // 2, 3), 255, np.uint8)
            pictures += [between, fitted(views[index], BOX) if index in views else empty]
        top = np.concatenate(pictures, axis=1)
        # Two captions: in one, a label that is written from the right would stand before the number.
        words = "(no label)" if label is None else label
        number = caption(str(index), _DIGIT * len(str(max(indices))) + _GAP)
        bottom = np.concatenate((number, caption(words, top.shape[1] - number.shape[1])), axis=1)
        tiles.append(np.concatenate((top, bottom), axis=0))
    return tiles, sum(crop is None for crop in crops)


def decoded_crops(store: Records, indices: Sequence[int]) -> tuple[list[Pixels | None], list[str]]:
    """Crops (H, W, 3) RGB as they are in the database, None where broken, and why they are."""
    images = decodable(store.gather(indices, store.max_pixels))
    crops: list[Pixels | None] = []
    problems: list[str] = []
    for image, verdict in zip(images.encoded, images.status, strict=True):
        crop = decoded(image) if verdict == Status.OK else None
        crops.append(crop)
        if crop is not None:
            problems.append("")
        else:
            problems.append("does not decode" if verdict == Status.OK else reason_of(verdict, image))
    return crops, problems


def decoded(image: NDArray[np.uint8]) -> Pixels | None:
    """(H, W, 3) RGB, turned by no EXIF entry, as training has it; None if OpenCV cannot decode it."""
    pixels = decode(image)
    return None if pixels is None else pixels[..., ::-1]


def _guidance_views(store: RecordStore, indices: list[int], seed: int) -> dict[int, Pixels]:
    """Guidance views of the first epoch, (32, 128, 3) uint8, by index."""
    from lmim_fast.data.pipeline import ViewPipeline  # needs DALI, which a sheet of crops does not

    if not indices:
        return {}
    order = ChosenSamples(SampleOrder(len(store), 1, seed), [0] * len(indices), indices)
    loader = DataConfig(prefetch=1, max_bad_fraction=1.0)
    options = dict(guidance=GuidanceConfig(), loader=loader, seed=seed, end_step=1)
    with ViewPipeline(store, order, **options) as pipeline:  # type: ignore[arg-type]
        _, views = next(pipeline).views()
    assert views is not None
    pixels = views.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return dict(zip(indices, pixels, strict=True))


def fitted(pixels: Pixels, box: tuple[int, int]) -> Pixels:
    """(H, W, 3) at the left of a white (height, width, 3) box, as large as fits, with its proportions."""
    scale = min(box[0] / pixels.shape[0], box[1] / pixels.shape[1], _ENLARGED)
    height, width = (max(1, round(scale * side)) for side in pixels.shape[:2])
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    result = np.full((*box, 3), 255, np.uint8)
    top = (box[0] - height) // 2
    result[top : top + height, :width] = cv2.resize(pixels, (width, height), interpolation=way)
    return result


def gray_tile(box: tuple[int, int], problem: str) -> Pixels:
    """A gray (height, width, 3) box that says what is wrong."""
    tile = np.full((*box, 3), _GRAY, np.uint8)
    line = caption(f" broken: {problem}", box[1], ink=0, ground=_GRAY)
    top = (box[0] - len(line)) // 2
    tile[top : top + len(line)] = line
    return tile


def _grid(tiles: list[Pixels], columns: int) -> Pixels:
    """Tiles in rows, on white."""
    height, width = tiles[0].shape[:2]
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3), 255, np.uint8)
    for place, tile in enumerate(tiles):
        row, column = divmod(place, columns)
        top, left = _GAP + row * (height + _GAP), _GAP + column * (width + _GAP)
        sheet[top : top + height, left : left + width] = tile
    return sheet
