"""What the renderer knows of scripts: full-width characters and how they stand in columns; final forms."""
# ruff: noqa: RUF001 - the full-width marks are meant, not the ASCII that they look like

from __future__ import annotations

import unicodedata

TURNED_IN_COLUMNS = frozenset("（）〈〉《》「」『』【】〔〕()[]{}<>“”—–-―…‥～〜~ー－＿_｛｝［］＜＞＝=:：;；")
"""Drawn turned by 90 degrees where letters stand below each other in a column of full-width characters."""
CORNER_IN_COLUMNS = frozenset("。、，．")
"""Move from the lower left to the upper right of their square."""

WIDE_ENDINGS = "。，、！？：；"
WIDE_QUOTES = ("「」", "『』", "《》", "（）", "【】", "“”")
FINAL_FORMS = {"Σ": "ς", "σ": "ς"}
"""Letters that `str.lower` writes in another way at the end of a word."""


def is_wide(character: str) -> bool:
    """Whether it fills a square: Chinese, Japanese kana, Hangul, full-width forms."""
    return not character.isascii() and unicodedata.east_asian_width(character) in "WF"
