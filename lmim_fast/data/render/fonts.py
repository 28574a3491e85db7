"""Fonts for the renderer: which files there are, and which characters each of them really draws."""

from __future__ import annotations

import importlib.util
import string
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fontTools.ttLib import TTFont, TTLibError  # type: ignore[import-untyped]
from PIL import ImageFont, features

from lmim_fast.errors import LmimError, UsageError

FONT_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
CHECK_SIZE = 24  # pixels; large enough that every visible glyph leaves ink

# Computer Modern claims all of ASCII but draws TeX's encoding: "<" comes out as an inverted "!".
# These are the characters that look like themselves.
_TEX_TEXT = frozenset(string.ascii_letters + string.digits + "!#$%&'()*+,-./:;=?@[]")
_TRUE_CHARACTERS: dict[str, frozenset[str]] = {
    "cmr10": _TEX_TEXT,
    "cmb10": _TEX_TEXT,
    "cmss10": _TEX_TEXT,
    "cmti10": _TEX_TEXT - {"$"},  # drawn as a pound sign
    "cmtt10": frozenset(string.printable[:94]) - {"`"},
    "cmmi10": frozenset(),
    "cmsy10": frozenset(),
    "cmex10": frozenset(),
}


@dataclass(frozen=True)
class Font:
    """A font file and the characters, of those asked for, that it draws."""

    path: str
    characters: frozenset[str]

    def covers(self, label: str) -> bool:
        """Whether every character of `label` can be drawn."""
        return self.characters.issuperset(label)


def font_files(folder: str | None) -> list[Path]:
    """Font files under `folder` at any depth, or those that come with matplotlib for None, in a fixed order.

    Raises:
        UsageError: the folder is missing or has no font file.
        LmimError: `folder` is None and matplotlib's fonts are not installed.
    """
    root = _matplotlib_fonts() if folder is None else Path(folder)
    if not root.is_dir():
        raise UsageError(f"the font folder {root} does not exist or is not a folder")
    files = [
        path
        for path in root.rglob("*")
        if path.suffix.lower() in FONT_SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]
    if not files:
        raise UsageError(f"the font folder {root} holds no {', '.join(FONT_SUFFIXES)} file")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def load_fonts(files: Iterable[Path], characters: Iterable[str]) -> list[Font]:
    """Find out which of the `characters` each file draws; files that draw none are left out.

    Raises:
        UsageError: a file is not a font that FreeType can draw with.
    """
    candidates = frozenset(characters)
    fonts = (Font(str(path), _drawn_characters(path, candidates)) for path in files)
    return [font for font in fonts if font.characters]


def needs_shaping(label: str) -> bool:
    """Whether letters join, reorder or run right to left, so that the line cannot be set letter by letter."""
    return any(
        unicodedata.bidirectional(character) in ("R", "AL", "AN")
        or unicodedata.category(character) in ("Mn", "Mc")
        for character in label
    )


def check_shaping(labels: Sequence[str]) -> None:
    """Refuse labels that need text shaping if Pillow was built without it.

    Raises:
        UsageError: Pillow lacks libraqm and a label needs it.
    """
    if features.check("raqm"):
        return
    for label in labels:
        if needs_shaping(label):
            raise UsageError(
                f"the word {label!r} needs text shaping, and this Pillow was built without libraqm; "
                "install Pillow from its wheel"
            )


def _matplotlib_fonts() -> Path:
    """Matplotlib's font folder, without importing matplotlib."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise LmimError(
            'the default fonts come with matplotlib: pip install "matplotlib>=3.8", or give a font folder'
        )
    return Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"


def _drawn_characters(path: Path, candidates: frozenset[str]) -> frozenset[str]:
    """The candidates that are in the file's character map and leave ink when drawn."""
    try:
        with TTFont(path, fontNumber=0, lazy=True) as tables:
            mapped = candidates.intersection(map(chr, tables.getBestCmap() or {}))
        font = ImageFont.truetype(str(path), CHECK_SIZE, layout_engine=ImageFont.Layout.BASIC)
        family = str(font.getname()[0])
        if family.startswith("Last Resort"):  # draws a box with the script's name for every character
            return frozenset()
        mapped &= _TRUE_CHARACTERS.get(family, mapped)
        return frozenset(character for character in mapped if character == " " or _has_ink(font, character))
    except (OSError, TTLibError, KeyError, ValueError) as error:
        raise UsageError(f"{path} is not a font that can be drawn with: {error}") from error


def _has_ink(font: ImageFont.FreeTypeFont, character: str) -> bool:
    left, top, right, bottom = font.getbbox(character)
    return right > left and bottom > top
