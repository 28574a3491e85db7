"""What summaries of data call things: formats, classes of characters, shares, spreads."""

from __future__ import annotations

import unicodedata

from lmim_fast.data.store.rare_formats import format_name

PERCENTILES = (0, 5, 50, 95, 100)
_SIGNATURES = (
    ("JPEG", b"\xff\xd8", b""),
    ("PNG", b"\x89PNG", b""),
    ("GIF", b"GIF8", b""),
    ("WebP", b"RIFF", b"WEBP"),
    ("BMP", b"BM", b""),
)  # name, first bytes, bytes from 8 on


def format_of(image: bytes) -> str:
    """The format that the bytes start like, or "other"."""
    for name, start, second in _SIGNATURES:
        if image.startswith(start) and image.startswith(second, 8):
            return name
    return format_name(image) or "other"


def character_class(character: str) -> str:
    """Broad class in the words of this field: Latin letters apart from other scripts."""
    category = unicodedata.category(character)
    if category == "Nd" and character.isascii():
        return "digits"
    if character.isascii() and character.isalpha():
        return "a-z" if character.islower() else "A-Z"
    if character == " ":
        return "space"
    if character.isascii() and character.isprintable():
        return "ASCII punctuation"
    if category[0] in "LMN":
        # Unicode names start with the script: "CJK UNIFIED IDEOGRAPH-4E2D", "GREEK SMALL LETTER ALPHA".
        script = unicodedata.name(character, "unnamed").split(" ")[0].split("-")[0]
        return script if script == "CJK" else script.capitalize()
    return "control" if category[0] == "C" else "other symbols"


def share_text(part: int, whole: int) -> str:
    """A count and its share of the whole."""
    return f"{part:,} ({100 * part / whole:.4g} %)"


def percentile_text(values: tuple[float, ...]) -> str:
    """PERCENTILES with their names; empty: nothing was measured."""
    if not values:
        return "none decoded"
    names = ("least", *(f"{p} %" for p in PERCENTILES[1:-1]), "most")
    return "   ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
