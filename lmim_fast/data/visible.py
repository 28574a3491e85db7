"""Text of files for people: no control character of it reaches a terminal or a picture."""

from __future__ import annotations

import re
import unicodedata
from typing import IO

_UNPRINTABLE = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")  # categories of Unicode that draw nothing of use
_LAYOUT = re.compile(r"([\n\t])")


def visible(text: str) -> str:
    """The text with control characters, line breaks and the like as escaped code points."""
    return "".join(
        escaped(character) if unicodedata.category(character) in _UNPRINTABLE else character
        for character in text
    )


def visible_lines(text: str) -> str:
    """`visible` of a text whose line breaks and tabs are its layout: they stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(piece if piece in ("\n", "\t") else visible(piece) for piece in _LAYOUT.split(text))


def escaped(character: str) -> str:
    """The code point of a character as Python writes it: `\\x1b`, `\\u4e2d`."""
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def beneath(stream: IO[str]) -> IO[str]:
    """The stream that the command line or a progress bar wraps: for output with colours of our own."""
    while hasattr(stream, "rich_proxied_file"):  # rich's name for it
        stream = stream.rich_proxied_file
    return stream
