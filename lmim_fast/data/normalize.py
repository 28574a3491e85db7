"""Text normalisation: what evaluation compares, and labels in the characters that a set has."""

from __future__ import annotations

import functools
import re
import unicodedata
import warnings
from collections.abc import Callable

from lmim_fast.data.charset import Charset

# Equivalents that Unicode's compatibility forms do not know.
_PLAIN = str.maketrans({
    "\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201b": "'", "\u2032": "'", "\u00b4": "'", "\u02bc": "'",
    "\u201c": '"', "\u201d": '"', "\u201e": '"', "\u201f": '"', "\u2033": '"',
    "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\u2014": "-", "\u2015": "-", "\u2212": "-",
    "\u2044": "/", "\u2215": "/",
})  # fmt: skip
_MARK = "[\u0300-\u036f]"  # combining accents
_CLUSTER = re.compile(f"[\\s\\S]{_MARK}*")
_NOT_WAICS = re.compile("[^0-9a-zA-Z]")


def waics(text: str) -> str:
    """Text as word accuracy ignoring case and symbols compares it: only 0-9, a-z and A-Z, in lower case."""
    return _NOT_WAICS.sub("", text).lower()


def chinese(text: str) -> str:
    """Text as the Chinese benchmark compares it: NFKC, simplified, lower case, no whitespace.

    Characters are simplified; words stay (Taiwan's are not put into the mainland's).
    """
    return "".join(_simplified(unicodedata.normalize("NFKC", text)).lower().split())


def comparison_of(characters: str) -> Callable[[str], str]:
    """How readings in a character set are compared: `waics` if it is ASCII, else `chinese`.

    `waics` would leave nothing of a text in another script, and any two such texts would be equal.
    """
    return waics if characters.isascii() else chinese


def normalize_label(text: str, charset: Charset) -> str:
    """The label with characters that the set lacks replaced by equivalents that it has.

    Equivalents: composed accents, compatibility forms (full width, ligatures), ASCII quotes and dashes,
    simplified for traditional Chinese, full width for ASCII, and last the letter without its accent. A
    character that the set has stays as it is, and so does one without an equivalent; nothing is deleted but
    an accent the set lacks.
    """
    if charset.holds(text):
        return text
    return "".join(_replaced(cluster, charset) for cluster in _CLUSTER.findall(text))


def _replaced(cluster: str, charset: Charset) -> str:
    """One character and the accents behind it in the characters of the set."""
    if charset.holds(cluster):
        return cluster
    composed = unicodedata.normalize("NFC", cluster)
    if charset.holds(composed):
        return composed
    base = _equivalent(cluster[0], charset)
    # An accent the set lacks goes only if its letter stays.
    accents = "".join(c for c in cluster[1:] if c in charset) if charset.holds(base) else cluster[1:]
    return base + accents


def _equivalent(character: str, charset: Charset) -> str:
    if charset.holds(character):
        return character
    for form in _FORMS:
        replaced = form(character)
        if replaced and charset.holds(replaced):
            return replaced
    return character


def _compatible(character: str) -> str:
    return unicodedata.normalize("NFKC", character)


def _plain(character: str) -> str:
    return _compatible(character.translate(_PLAIN)).translate(_PLAIN)


def _full_width(character: str) -> str:
    return chr(ord(character) + 0xFEE0) if "!" <= character <= "~" else ""


def _without_accents(character: str) -> str:
    return re.sub(_MARK, "", unicodedata.normalize("NFKD", character)).strip()


@functools.cache
def _converter() -> Callable[[str, str], str]:
    # The import may warn of pkg_resources, and the first conversion leaves the dictionary's file open.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from zhconv import convert

        convert("\u6f22", "zh-hans")
    return convert


def _simplified(text: str) -> str:
    return text if text.isascii() else _converter()(text, "zh-hans")


_FORMS = (
    _compatible,
    _plain,
    _simplified,
    lambda character: _simplified(_compatible(character)),
    _full_width,
    _without_accents,
)
