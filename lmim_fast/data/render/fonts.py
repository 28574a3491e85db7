"""Fonts for the renderer: the files and folders of `--fonts`, each file's faces, their character maps."""

from __future__ import annotations

import importlib.util
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fontTools.ttLib import TTFont  # type: ignore[import-untyped]
from PIL import ImageFont, features

from lmim_fast.data.render.cmap import mapped_characters
from lmim_fast.errors import LmimError, UsageError

FONT_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
_COLLECTION = b"ttcf"  # the first bytes of a file with several faces
_MOST_FACES = 256  # of a collection; a larger number is damage
_CHECK_SIZE = 24  # pixels; large enough that every visible glyph leaves ink
_PROBES = 12  # characters that are drawn to see whether a face draws at all
_NAMED_IN_WARNINGS = 5  # font files, one line each

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


class Face(NamedTuple):
    """One face of a font file: collections (.ttc) have several."""

    path: str
    number: int = 0

    def open(self, size: float, *, shaped: bool = False) -> ImageFont.FreeTypeFont:
        """The face at `size` pixels, with text shaping or letter by letter.

        Raises:
            OSError: the file cannot be read.
        """
        engine = ImageFont.Layout.RAQM if shaped else ImageFont.Layout.BASIC
        return ImageFont.truetype(self.path, size, index=self.number, layout_engine=engine)


MappedFace = tuple[Face, np.ndarray]


def font_files(paths: Sequence[str]) -> list[Path]:
    """The files that `paths` name, and the font files under folders at any depth, in a fixed order.

    Args:
        paths: font files and folders; none: the fonts that come with matplotlib.
    Raises:
        UsageError: a path is missing, or a folder has no font file.
        LmimError: `paths` is empty and matplotlib's fonts are not installed.
    """
    roots = [Path(path) for path in paths] or [_matplotlib_fonts()]
    files: dict[Path, None] = {}  # each once, where paths overlap
    for root in roots:
        files.update(dict.fromkeys([root] if root.is_file() else _folder_fonts(root)))
    return list(files)


def _folder_fonts(root: Path) -> list[Path]:
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


def load_faces(
    files: Sequence[Path], characters: Iterable[str], say: Callable[[str], None]
) -> list[MappedFace]:
    """The faces that have some of the `characters`, each with the code points of those in its map.

    A file that is no font is left out, and `say` gets a line with its name: for the first five, then a count.

    Raises:
        UsageError: no file can be drawn with.
    """
    wanted = np.array(sorted(map(ord, set(characters))), dtype=np.int32)
    faces: list[MappedFace] = []
    unreadable: list[str] = []
    for path in files:
        try:
            faces += _faces(path, wanted)
        except _Unreadable as error:
            unreadable.append(f"{str(path)!r} is not a font that can be drawn with: {error}")
    if len(unreadable) == len(files):
        more = f"; nor are the other {len(files) - 1} files" if len(files) > 1 else ""
        raise UsageError(f"{unreadable[0]}{more}")
    for line in unreadable[:_NAMED_IN_WARNINGS]:
        say(f"left out: {line}")
    if len(unreadable) > _NAMED_IN_WARNINGS:
        say(f"left out: {len(unreadable) - _NAMED_IN_WARNINGS} more files that are not fonts")
    return faces


@lru_cache(maxsize=64)
def _check_font(face: Face) -> ImageFont.FreeTypeFont:
    return face.open(_CHECK_SIZE)


def has_ink(face: Face, character: str) -> bool:
    """Whether the face draws something for a character of its map; a space needs no ink.

    Raises:
        OSError: the file cannot be opened.
    """
    if character == " ":
        return True
    font = _check_font(face)
    try:
        left, top, right, bottom = font.getbbox(character)
    except OSError:  # FreeType's word for a damaged outline
        return False
    return right > left and bottom > top


def needs_shaping(label: str) -> bool:
    """Whether letters join, reorder or run right to left, so that the line cannot be set letter by letter."""
    return not label.isascii() and any(
        unicodedata.bidirectional(character) in ("R", "AL", "AN")
        or unicodedata.category(character) in ("Mn", "Mc")
        for character in label
    )


def can_shape() -> bool:
    """Whether this Pillow has libraqm, which sets what `needs_shaping` names."""
    return bool(features.check("raqm"))


class _Unreadable(Exception):
    """Why a file is no font."""


def _faces(path: Path, wanted: np.ndarray) -> list[MappedFace]:
    faces = []
    for number in range(_count_faces(path)):
        face = Face(str(path), number)
        try:
            with path.open("rb") as file, TTFont(file, fontNumber=number, lazy=True) as tables:
                codes = mapped_characters(tables)
            family = str(_check_font(face).getname()[0])
        except Exception as error:  # fontTools lets out whatever its parsing of damaged tables meets
            raise _Unreadable(" ".join(repr(str(error))[1:-1].split())[:200]) from error
        if family.startswith("Last Resort"):  # draws a box with the script's name for every character
            continue
        mapped = wanted[np.isin(wanted, codes, assume_unique=True)]
        if family in _TRUE_CHARACTERS:
            mapped = mapped[[chr(code) in _TRUE_CHARACTERS[family] for code in mapped]]
        if len(mapped) and _draws(face, mapped):
            faces.append((face, mapped))
    return faces


def _count_faces(path: Path) -> int:
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError as error:
        raise _Unreadable(error.strerror or "cannot be read") from error
    if head[:4] != _COLLECTION:
        return 1
    count = int.from_bytes(head[8:12], "big")
    if not 1 <= count <= _MOST_FACES:
        raise _Unreadable(f"it claims to have {count} faces")
    return count


def _draws(face: Face, mapped: np.ndarray) -> bool:
    """Whether one of a few characters, spread over the map, has ink."""
    probes = [chr(code) for code in mapped[:: -(-len(mapped) // _PROBES)] if code != ord(" ")]
    if any(has_ink(face, character) for character in probes):
        return True
    try:
        for character in probes:
            _check_font(face).getbbox(character)
    except OSError as error:
        raise _Unreadable(f"its glyphs are damaged ({error})") from error
    return False


def _matplotlib_fonts() -> Path:
    """Matplotlib's font folder, without importing matplotlib."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise LmimError(
            'the default fonts come with matplotlib: pip install "matplotlib>=3.8", or give a font folder'
        )
    return Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"
