"""Which faces can write a label, for thousands of faces and millions of labels.

A character has one integer with a bit a face: the faces of a label are the AND of its characters' integers.
They come from the fonts' character maps. Whether a glyph of the map has ink is tried when it is about
to be used, so a thousand fonts with all of Chinese are not drawn before the first crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lmim_fast.data.render.fonts import Face, MappedFace, has_ink


@dataclass(frozen=True)
class Coverage:
    """Faces and, of the characters asked for, those in their maps."""

    faces: tuple[Face, ...]
    bits: dict[str, int]
    """Bit k of a character: face k has it in its map."""
    _tried: dict[str, int] = field(default_factory=dict, repr=False, compare=False)
    _inked: dict[str, int] = field(default_factory=dict, repr=False, compare=False)
    _usable: dict[tuple[int, str], str] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, faces: Sequence[MappedFace]) -> Coverage:
        """The coverage by faces with these code points in their maps."""
        codes = np.unique(np.concatenate([mapped for _, mapped in faces])) if faces else np.empty(0, int)
        table = np.zeros((len(codes), -(-len(faces) // 8)), dtype=np.uint8)
        for place, (_, mapped) in enumerate(faces):
            table[np.searchsorted(codes, mapped), place >> 3] |= 1 << (place & 7)
        bits = {
            chr(code): int.from_bytes(row.tobytes(), "little") for code, row in zip(codes, table, strict=True)
        }
        return cls(tuple(face for face, _ in faces), bits)

    def claims(self, label: str) -> int:
        """The faces with every character of `label` in their maps, a bit each."""
        found = (1 << len(self.faces)) - 1
        for character in label:
            found &= self.bits.get(character, 0)
        return found

    def draws(self, face: int, label: str) -> bool:
        """Whether every character of `label`, all of which the face claims, has ink."""
        return all(self._has_ink(face, character) for character in label)

    def any_face(self, label: str) -> int | None:
        """The first face that draws the label, or None."""
        found = self.claims(label)
        while found:
            face = (found & -found).bit_length() - 1
            if self.draws(face, label):
                return face
            found &= found - 1
        return None

    def pick(self, rng: np.random.Generator, label: str) -> Face | None:
        """One of the faces that draw the label, each as likely; None if there is none."""
        found = self.claims(label)
        while found:
            face = _nth_bit(found, int(rng.integers(found.bit_count())))
            if self.draws(face, label):
                return self.faces[face]
            found &= ~(1 << face)
        return None

    def pick_characters(self, rng: np.random.Generator, face: int, alphabet: str, length: int) -> str:
        """`length` characters of the alphabet, each as likely, of those that the face draws; "" for none."""
        usable = self._usable.get((face, alphabet))
        if usable is None:
            usable = "".join(character for character in alphabet if self.bits.get(character, 0) >> face & 1)
            self._usable[face, alphabet] = usable
        while usable:
            drawn = [usable[place] for place in rng.integers(0, len(usable), length)]
            blank = {character for character in drawn if not self._has_ink(face, character)}
            if not blank:
                return "".join(drawn)
            usable = "".join(character for character in usable if character not in blank)
        return ""

    def restricted(self, faces: int) -> Coverage:
        """Only the faces of these bits, in their order."""
        kept = [place for place in range(len(self.faces)) if faces >> place & 1]
        codes = {place: [ord(c) for c, found in self.bits.items() if found >> place & 1] for place in kept}
        return Coverage.of([(self.faces[place], np.array(sorted(codes[place]), int)) for place in kept])

    def _has_ink(self, face: int, character: str) -> bool:
        bit = 1 << face
        if not self._tried.get(character, 0) & bit:
            self._tried[character] = self._tried.get(character, 0) | bit
            if has_ink(self.faces[face], character):
                self._inked[character] = self._inked.get(character, 0) | bit
        return bool(self._inked.get(character, 0) & bit)


def _nth_bit(bits: int, n: int) -> int:
    """The place of the n-th set bit, from 0."""
    place = 0
    width = bits.bit_length()
    while width > 1:  # halve the range that holds it
        half = width // 2
        low = bits & ((1 << half) - 1)
        count = low.bit_count()
        if n < count:
            bits = low
            width = half
        else:
            n -= count
            bits >>= half
            place += half
            width -= half
    return place
