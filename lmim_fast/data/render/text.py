"""Sets a label: the ink of one line of text, or of a column of upright letters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lmim_fast.data.render.fonts import Face, needs_shaping
from lmim_fast.data.render.scripts import CORNER_IN_COLUMNS, TURNED_IN_COLUMNS, is_wide

DRAWN_SIZE = 64.0  # font size, pixels, at which text is measured and drawn first
_LARGEST_GROWTH = 1.15  # beyond it the first drawing is too coarse
_SMALLEST_BOX = 0.5  # of the font size: a lone dot does not fill a crop
_LOWER_CASE = 0.5  # of the font size: the height that every letter of a column takes at least
_SPACE = 0.35  # of the font size: a space in a column
_SQUARE_ASCENT = 0.88  # of the font size: how far a full-width square reaches above the baseline


class Text(Protocol):
    """A label set in some way; sizes scale with the font size."""

    def draw(self, size: float) -> np.ndarray:
        """Drawn with a font of `size` pixels: (height, width) uint8, cut out closely."""
        ...


def scaled_ink(text: Text, first: np.ndarray, size: float, margin: int) -> np.ndarray:
    """The text at a font size, `margin` empty pixels about; of `first`, its ink at DRAWN_SIZE, if smaller."""
    factor = size / DRAWN_SIZE
    if factor > _LARGEST_GROWTH:
        ink = text.draw(size)
    else:
        height, width = (max(1, round(side * factor)) for side in first.shape)
        ink = cv2.resize(first, (width, height), interpolation=cv2.INTER_AREA)
    return cv2.copyMakeBorder(ink, margin, margin, margin, margin, cv2.BORDER_CONSTANT, value=0)


@dataclass(frozen=True)
class Line:
    """A label in a face with its letter spacing."""

    label: str
    face: Face
    spacing: float = 0.0
    """Extra space after each letter, share of the font size."""
    wobble: tuple[float, ...] = ()
    """Vertical shift of each letter, share of the font size; empty for none."""

    def draw(self, size: float) -> np.ndarray:
        """See `Text`."""
        shaped = needs_shaping(self.label)
        font = _font(self.face, shaped) if size == DRAWN_SIZE else self.face.open(size, shaped=shaped)
        room = int(2 * size) + 2
        width = int(font.getlength(self.label) + max(self.spacing, 0.0) * size * len(self.label)) + 2 * room
        canvas = Image.new("L", (width, 2 * room))
        draw = ImageDraw.Draw(canvas)
        if not self.wobble and (shaped or self.spacing == 0.0):
            draw.text((room, room), self.label, fill=255, font=font, anchor="ls")
        else:
            for place, (letter, start) in enumerate(zip(self.label, self._starts, strict=True)):
                x = room + (start + place * self.spacing) * size
                y = room + (self.wobble[place] * size if self.wobble else 0.0)
                draw.text((x, y), letter, fill=255, font=font, anchor="ls")
        left, top, right, bottom = canvas.getbbox() or (room, room, room + 1, room + 1)
        missing = max(0, int(_SMALLEST_BOX * size) - (bottom - top))
        top, bottom = top - missing // 2, bottom + missing - missing // 2
        return np.asarray(canvas.crop((left, top, right, bottom)))

    @cached_property
    def _starts(self) -> tuple[float, ...]:
        """Where each letter begins without the spacing, share of the font size."""
        font = _font(self.face, False)
        return tuple(font.getlength(self.label[:place]) / DRAWN_SIZE for place in range(len(self.label)))


@dataclass(frozen=True)
class Column:
    """A label whose letters stand upright below each other, as on a vertical sign."""

    label: str
    face: Face
    gap: float
    """Space between letters, share of the font size."""

    def draw(self, size: float) -> np.ndarray:
        """See `Text`."""
        font = _font(self.face, False) if size == DRAWN_SIZE else self.face.open(size)
        turned = any(map(is_wide, self.label))
        tiles = [_tile(font, letter, size, turned) for letter in self.label]
        width = max(tile.shape[1] for tile in tiles)
        gap = round(self.gap * size)
        column = np.zeros((sum(tile.shape[0] + gap for tile in tiles) - gap, width), dtype=np.uint8)
        top = 0
        for tile in tiles:
            left = (width - tile.shape[1]) // 2
            column[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
            top += tile.shape[0] + gap
        return _trimmed(column, int(_SMALLEST_BOX * size))


def _tile(font: ImageFont.FreeTypeFont, letter: str, size: float, in_squares: bool) -> np.ndarray:
    """One letter in the cell that it takes in a column: (height, width) uint8."""
    left, top, right, bottom = (round(side) for side in font.getbbox(letter, anchor="ls"))
    if letter.isspace() or right <= left:
        return np.zeros((max(1, round(_SPACE * size)), 1), dtype=np.uint8)
    width = right - left
    if is_wide(letter):  # a square, wherever in it the ink is
        left, right = min(left, 0), max(right, round(size))
        up, down = min(top, -round(_SQUARE_ASCENT * size)), max(bottom, round((1 - _SQUARE_ASCENT) * size))
    else:
        up, down = min(top, -round(_LOWER_CASE * size)), max(bottom, 0)
    canvas = Image.new("L", (right - left, down - up))
    ImageDraw.Draw(canvas).text((-left, -up), letter, fill=255, font=font, anchor="ls")
    tile = np.asarray(canvas)
    if in_squares and letter in TURNED_IN_COLUMNS:
        return np.rot90(tile, -1)
    if in_squares and letter in CORNER_IN_COLUMNS:
        centre_x, centre_y = np.array([np.nonzero(tile)[1].mean(), np.nonzero(tile)[0].mean()])
        if centre_x < tile.shape[1] / 2 < centre_y:  # some fonts have it in the middle, where it stays
            return np.ascontiguousarray(_to_other_corner(tile, width))
    return tile


def _to_other_corner(tile: np.ndarray, width: int) -> np.ndarray:
    """The mark at the lower left of a square, at its upper right."""
    rows, columns = np.nonzero(tile)
    mark = tile[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    moved = np.zeros_like(tile)
    below, before = tile.shape[0] - 1 - rows.max(), columns.min()
    moved[below : below + mark.shape[0], tile.shape[1] - before - mark.shape[1] : tile.shape[1] - before] = (
        mark
    )
    return moved


def _trimmed(ink: np.ndarray, narrowest: int) -> np.ndarray:
    """Without the empty rows and columns about, but at least `narrowest` wide."""
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if not len(rows):
        return ink
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    missing = max(0, narrowest - ink.shape[1])
    return np.pad(ink, ((0, 0), (missing // 2, missing - missing // 2)))


@lru_cache(maxsize=64)
def _font(face: Face, shaped: bool) -> ImageFont.FreeTypeFont:
    """The face at DRAWN_SIZE, kept open: 64 faces of a large folder at a time."""
    return face.open(DRAWN_SIZE, shaped=shaped)


def random_line(rng: np.random.Generator, label: str, face: Face) -> Line:
    """The label with random letter spacing; one line in twelve dances on its baseline."""
    spacing, wobble = 0.0, ()
    if not needs_shaping(label):
        kind = rng.random()
        if kind < 0.35:
            spacing = rng.uniform(0.02, 0.12)
        elif kind < 0.45:
            spacing = rng.uniform(0.12, 0.4) / max(1.0, len(label) / 8)
        elif kind < 0.52:
            spacing = rng.uniform(-0.03, 0.0)
        if len(label) > 1 and rng.random() < 0.08:
            wobble = tuple(rng.normal(0.0, 0.04, len(label)))
    return Line(label, face, float(spacing), wobble)


def random_column(rng: np.random.Generator, label: str, face: Face) -> Column:
    """The label as a column with random gaps: small ones between the squares of Chinese."""
    wide = any(map(is_wide, label))
    return Column(label, face, float(rng.uniform(0.0, 0.08) if wide else rng.uniform(0.06, 0.28)))
