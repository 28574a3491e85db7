"""Operands that `wgmma` instructions read from shared memory, decoded from PTX.

A matrix descriptor is computed in a few integer instructions from the base of shared memory, constants and,
for a warpgroup's share of a tile, the number of the warp. Their values are followed as ranges, so that the
last byte that an operand may reach is known without a device.

Source: PTX ISA, "Asynchronous warpgroup level matrix instructions": matrix descriptor and canonical layouts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

SWIZZLES = (0, 128, 64, 32)  # bytes, by the two highest bits of a descriptor
_ADDRESSES = 0x3FFF  # a descriptor's start, in units of 16 bytes
_WORD = 2**64 - 1
_MARGIN = 1024  # bytes

_INSTRUCTION = re.compile(
    r"wgmma\.mma_async\S*\.m(?P<m>\d+)n(?P<n>\d+)k(?P<k>\d+)\.\w+\.(?P<a_type>\w+)\.(?P<b_type>\w+)\s+"
    r"\{[^}]*\},\s*(?P<a>\{[^}]*\}|%\w+),\s*(?P<b>%\w+),\s*(?P<rest>[^;]*);"
)
_DEFINITION = re.compile(
    r"^\s*(?P<name>[a-z]+)(?P<kind>[.\w:]*)\s+(?P<to>%\w+),\s*(?P<of>[^;{}]*);", re.MULTILINE
)
_WRITES = re.compile(
    r"(?:^|[;{}:])\s*(?:@!?%\w+\s+)?[a-z][\w.:]*\s+(?P<to>\{[^{}]*\}|\(?%\w+(?:\|%\w+)?\)?)\s*,", re.MULTILINE
)


class Range(NamedTuple):
    """An integer between `low` and `high`, both included."""

    low: int
    high: int


class Operand(NamedTuple):
    """A matrix in shared memory as one instruction reads it; sizes and places in bytes.

    instruction: its shape, "m64n32k16".
    side:        "a" or "b".
    transposed:  MN-major: neighbours in memory are rows of a or columns of b, not steps of the sum.
    start:       where it may begin, from the base of shared memory.
    leading, stride: the descriptor's offsets between core matrices (LBO, SBO).
    swizzle:     0, 32, 64 or 128.
    size:        from its first to its last byte.
    """

    instruction: str
    side: str
    transposed: bool
    start: Range
    leading: int
    stride: int
    swizzle: int
    size: int

    @property
    def end(self) -> int:
        """The first byte behind it, at the latest; a swizzle moves bytes within whole lines."""
        width = self.swizzle or 16
        return self.start.high // width * width + self.size

    def __str__(self) -> str:
        low, high = self.start
        order = "MN" if self.transposed else "K"
        place = f"{low}" if low == high else f"{low} to {high}"
        return (
            f"{self.side} of {self.instruction}, {order}-major, {self.swizzle}-byte swizzle, "
            f"LBO {self.leading}, SBO {self.stride}, {self.size} bytes from {place}"
        )


def operands(ptx: str) -> Iterator[Operand]:
    """Every operand in shared memory of every `wgmma` instruction, in order.

    Raises:
        ValueError: a descriptor is not made of what is followed here.
    """
    values = _Values(ptx)
    found = list(_INSTRUCTION.finditer(ptx))
    if len(found) != ptx.count("wgmma.mma_async"):
        raise ValueError(f"{ptx.count('wgmma.mma_async')} products, of which {len(found)} can be read")
    for match in found:
        *_, rest = match.group("rest").partition(",")
        flags = [flag.strip() for flag in rest.split(",")][2:]  # after both factors of sign
        in_memory = [side for side in ("a", "b") if match.group(side).startswith("%")]
        for side, flag in zip(in_memory, flags or ["0"] * len(in_memory), strict=True):
            yield _operand(match, side, flag == "1", values.of(match.group(side)))


def hazards(ptx: str, shared: int) -> Iterator[Operand]:
    """Operands that Hopper has been reported to read past the end of a block's shared memory.

    Those are MN-major with a swizzle below 128 bytes, and may end at the end of the `shared` bytes that the
    block has (triton-lang/triton issues 10486, 10573, 11366: illegal accesses with Triton 3.6 and later). How
    far it reads is not known: eight lines of 128 bytes are kept clear.
    """
    for operand in operands(ptx):
        if operand.transposed and operand.swizzle < 128 and operand.end + _MARGIN > shared:
            yield operand


def _operand(match: re.Match[str], side: str, transposed: bool, descriptor: Range | None) -> Operand:
    shape = f"m{match['m']}n{match['n']}k{match['k']}"
    if descriptor is None:
        raise ValueError(f"cannot follow descriptor {match[side]} of {shape}")
    low, high = descriptor.low & _WORD, descriptor.high & _WORD
    places = Range(low & _ADDRESSES, high & _ADDRESSES)
    if low >> 16 != high >> 16:  # the two bits behind a place are not used
        raise ValueError(f"descriptor {match[side]} of {shape} may be anything from {low:#x} to {high:#x}")
    if low >> 14 != high >> 14:  # a place that is not known, and a step
        places = Range(0, _ADDRESSES)
    itemsize = 4 if match[f"{side}_type"] == "tf32" else 1 if match[f"{side}_type"].startswith("e") else 2
    leading, stride = 16 * (low >> 16 & _ADDRESSES), 16 * (low >> 32 & _ADDRESSES)
    swizzle = SWIZZLES[low >> 62]
    rows, depth = int(match["m" if side == "a" else "n"]), int(match["k"]) * itemsize
    size = _size(rows * itemsize, int(match["k"]), leading, stride, swizzle) if transposed else 0
    if not transposed:
        size = _size(depth, rows, leading, stride, swizzle)
    start = Range(16 * places.low, 16 * places.high)
    return Operand(shape, side, transposed, start, leading, stride, swizzle, size)


def _size(contiguous: int, lines: int, leading: int, stride: int, swizzle: int) -> int:
    """Bytes from the first to the last of `lines` lines of `contiguous` bytes each.

    Core matrices are 8 lines of 16 bytes, or of the swizzle; the next 8 lines follow after `stride`, the next
    bytes of a line after `leading`.
    """
    width = swizzle or 16
    across, down = -(-contiguous // width), -(-lines // 8)
    return (across - 1) * leading + (down - 1) * stride + 8 * width


@dataclass
class _Values:
    """Ranges of the integer registers of a kernel, with the base of shared memory as 0."""

    ptx: str
    _definitions: dict[str, list[tuple[str, str, list[str]]]] = field(default_factory=dict)
    _known: dict[str, Range | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        followed = set()
        for match in _DEFINITION.finditer(self.ptx):
            followed.add(match.start("to"))
            arguments = [argument.strip() for argument in match["of"].split(",")]
            self._definitions.setdefault(match["to"], []).append((match["name"], match["kind"], arguments))
        for match in _WRITES.finditer(self.ptx):  # by what is not followed: several results, a predicate, ...
            if match.start("to") not in followed:
                self._known.update(dict.fromkeys(re.findall(r"%\w+", match["to"])))

    def of(self, name: str) -> Range | None:
        """Range of a register or a constant; None where nothing is known."""
        if re.fullmatch(r"-?\d+", name):
            return Range(int(name), int(name))
        if name == "global_smem":
            return Range(0, 0)
        if name not in self._known:
            self._known[name] = None  # while it is looked for: a loop tells nothing
            found = [self._result(*definition) for definition in self._definitions.get(name, [])]
            self._known[name] = _union(found)
        return self._known[name]

    def _result(self, name: str, kind: str, arguments: list[str]) -> Range | None:
        given = [self.of(argument) for argument in arguments]
        first = given[0] if given else None
        if name == "and":
            mask = given[1]
            if mask is None or mask.low != mask.high or mask.low < 0:
                return None
            exact = first is not None and first.low >= 0 and first.high <= mask.low and _ones(mask.low)
            return first if exact else Range(0, mask.low)
        if name == "bfe":
            place, length = given[1:]
            if place is None or length is None or not kind.startswith(".u"):
                return None
            if place.low != place.high or length.low != length.high:
                return None
            mask = 2**length.low - 1
            shifted = None if first is None else Range(first.low >> place.low, first.high >> place.low)
            return shifted if shifted and shifted.low >= 0 and shifted.high <= mask else Range(0, mask)
        if any(value is None for value in given):
            return None
        found = self._arithmetic(name, [value for value in given if value is not None])
        if found is not None and not kind.endswith("64") and not -(2**31) <= found.low <= found.high < 2**32:
            return None  # it may have wrapped around
        return found

    @staticmethod
    def _arithmetic(name: str, given: list[Range]) -> Range | None:
        first = given[0]
        if name in ("cvt", "shr") and first.low < 0:  # of an unsigned number it would be a large one
            return None
        if name in ("mov", "cvt", "cvta"):
            return first
        if len(given) < 2:
            return None
        second = given[1]
        if name == "add":
            return Range(first.low + second.low, first.high + second.high)
        if name == "sub":
            return Range(first.low - second.high, first.high - second.low)
        if name == "shl" and second.low == second.high:
            return Range(first.low << second.low, first.high << second.low)
        if name == "shr" and second.low == second.high:
            return Range(first.low >> second.low, first.high >> second.low)
        if name == "or":
            return _or(first, second)
        return None


def _or(first: Range, second: Range) -> Range | None:
    """Of values without a bit in common, one of which is a constant: their sum."""
    value, constant = (first, second) if second.low == second.high else (second, first)
    bits = 2 ** value.high.bit_length() - 1
    if constant.low != constant.high or value.low < 0 or constant.low & bits:
        return None
    return Range(value.low + constant.low, value.high + constant.low)


def _ones(mask: int) -> bool:
    return mask & (mask + 1) == 0


def _union(found: list[Range | None]) -> Range | None:
    known = [value for value in found if value is not None]
    if not known or len(known) < len(found):
        return None
    return Range(min(value.low for value in known), max(value.high for value in known))
