"""Reads the words and fonts of a render and keeps what fits together."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmim_fast.config import RenderConfig
from lmim_fast.data.render.coverage import Coverage
from lmim_fast.data.render.fonts import can_shape, font_files, load_faces, needs_shaping
from lmim_fast.data.render.labels import PRINTABLE, Vocabulary
from lmim_fast.data.render.scripts import FINAL_FORMS, WIDE_ENDINGS, WIDE_QUOTES
from lmim_fast.data.render.wordlist import WordList, read_words, stands_alone
from lmim_fast.errors import UsageError

_NAMED = 5  # words and characters listed in a message
_HEAD = 2**16  # bytes of a font file: its table of contents, with a checksum of every table


def load_vocabulary(
    config: RenderConfig, say: Callable[[str], None] = lambda line: None
) -> tuple[Vocabulary, dict[str, Any]]:
    """The words and fonts of a render, and digests that tell whether another render has the same.

    Words that no face draws, words longer than `max_length` and files that are no fonts are left out; `say`
    gets a line about each kind.

    Raises:
        UsageError: a file or folder that is missing, unreadable or empty; or no word is left.
    """
    english = not config.words
    words, digest = read_words(config.words, config.max_length, say)
    characters = words.characters()
    files = font_files(config.fonts)
    wanted = {*PRINTABLE, " ", *_cases(characters), *WIDE_ENDINGS, *"".join(WIDE_QUOTES)}
    coverage = Coverage.of(load_faces(files, wanted, say))
    words, coverage = _fitting(words, coverage, config, say)
    alphabet = PRINTABLE if english else "".join(sorted(filter(stands_alone, words.characters())))
    vocabulary = Vocabulary(
        words, alphabet, coverage, config.max_length, config.random_share, config.lines_share, english
    )
    return vocabulary, {"words": digest, "fonts": _fonts_digest(files)}


def _cases(characters: set[str]) -> set[str]:
    """The characters and those of their other cases."""
    cased = (form for character in characters for form in (character.lower(), character.upper()))
    return characters.union(*cased, *(FINAL_FORMS[letter] for letter in characters & FINAL_FORMS.keys()))


def _fitting(
    words: WordList, coverage: Coverage, config: RenderConfig, say: Callable[[str], None]
) -> tuple[WordList, Coverage]:
    """The words that some face draws, and the faces that draw one of them."""
    kept = np.ones(len(words), dtype=bool)
    used = 0
    missing: list[str] = []
    shaped = can_shape()
    for place, word in enumerate(words):
        if coverage.any_face(word) is None or not (shaped or not needs_shaping(word)):
            kept[place] = False
            if len(missing) < _NAMED:
                missing.append(word)
        else:
            used |= coverage.claims(word)
    if missing:
        message = _left_out(len(words) - int(kept.sum()), len(words), missing, coverage, config.fonts)
        if not kept.any():
            raise UsageError(f"{message}; give fonts for this script")
        say(f"left out: {message}")
        words = words.where(kept)
    return words, coverage if used == (1 << len(coverage.faces)) - 1 else coverage.restricted(used)


def _left_out(
    count: int,
    total: int,
    missing: Sequence[str],
    coverage: Coverage,
    fonts: Sequence[str],
) -> str:
    listed = ", ".join(map(repr, missing)) + (", ..." if count > len(missing) else "")
    source = f"in {', '.join(map(repr, fonts[:_NAMED]))}" if fonts else "that come with matplotlib"
    absent = sorted(c for c in set().union(*missing) if coverage.any_face(c) is None)
    if absent:
        reason = "no font has " + " ".join(f"{c!r} (U+{ord(c):04X})" for c in absent[:_NAMED])
    elif any(map(needs_shaping, missing)) and not can_shape():
        reason = "they need text shaping, and this Pillow was built without libraqm; install its wheel"
    else:
        reason = "no single font has all their characters"
    return (
        f"{count:,} of {total:,} words cannot be written with the {len(coverage.faces):,} fonts {source}: "
        f"{listed} ({reason})"
    )


def _fonts_digest(files: Sequence[Path]) -> str:
    """Of names, sizes and the tables of contents, which hold a checksum of everything else."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0".encode("utf-8", "surrogateescape"))
        with contextlib.suppress(OSError), path.open("rb") as file:  # one that cannot be read has no part
            digest.update(b"%d" % path.stat().st_size + file.read(_HEAD))
    return digest.hexdigest()
