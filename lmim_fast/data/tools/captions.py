"""Captions under pictures, in any script: in a font that has the glyphs, else as escaped code points."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont, TTLibError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lmim_fast.data.visible import escaped, visible

# Where a desktop or a server keeps fonts, in the order in which they are asked.
_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
_LONGEST = 4  # characters of a caption for each of its pixels: more than any line has
_ROOM = 6  # pixels of a line above and below its letters, together


def caption(text: str, width: int, size: int = 13, ink: int = 40, ground: int = 255) -> NDArray[np.uint8]:
    """One line of text as a picture; what is too long ends in "...".

    Args:
        text:   any characters.
        width:  pixels of the picture.
        size:   pixels of the letters.
        ink:    gray value of the letters.
        ground: gray value behind them.
    Returns:
        (size + 6, width, 3) uint8.
    """
    image = Image.new("RGB", (width, size + _ROOM), (ground,) * 3)
    path, line = _set(visible(text[: _LONGEST * width]))  # fonts refuse a text of a million characters
    font = _font(path, size)
    if font.getlength(line) > width:
        line = _shortened(line, font, width)
    ImageDraw.Draw(image).text((0, size + _ROOM // 2), line, fill=(ink,) * 3, font=font, anchor="ls")
    return np.asarray(image)


def _shortened(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """As much of the beginning as fits in front of "..."."""
    fits, too_long = 0, len(line)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if font.getlength(line[:middle] + "...") <= width:
            fits = middle
        else:
            too_long = middle
    return line[:fits] + "..."


def _set(text: str) -> tuple[str, str]:
    """The font of a line, and the line with what the font lacks as code points."""
    characters = set(text)
    best, most = _font_files()[0], -1
    for path in _font_files():
        known = len(characters & _characters(path))
        if known > most:
            best, most = path, known
        if most == len(characters):
            break
    there = _characters(best)
    return best, "".join(character if character in there else escaped(character) for character in text)


@cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@cache
def _characters(path: str) -> frozenset[str]:
    """Characters that a font file has glyphs for; none of a file that cannot be read."""
    try:
        # Opened here: TTFont leaves a file open that it cannot read.
        with open(path, "rb") as file, TTFont(file, fontNumber=0, lazy=True) as tables:
            found = frozenset(map(chr, tables.getBestCmap() or {}))
        ImageFont.truetype(path, 12)
    except (OSError, TTLibError, KeyError, ValueError, AssertionError):
        return frozenset()  # a font of the machine's that this picture can do without
    return found


@cache
def _font_files() -> list[str]:
    """DejaVu Sans, which comes with matplotlib, then the fonts of the machine."""
    return [str(_matplotlib_font()), *map(str, _machine_fonts())]


def _matplotlib_font() -> Path:
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError('captions need a font of matplotlib\'s: pip install "matplotlib>=3.8"')
    return Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"


def _machine_fonts() -> Iterator[Path]:
    for folder in _FOLDERS:
        files = Path(folder).expanduser().rglob("*")
        # "Last Resort" fonts claim every character and draw a box with the name of its script.
        yield from sorted(
            path
            for path in files
            if path.suffix.lower() in _SUFFIXES and "lastresort" not in path.name.lower()
        )
