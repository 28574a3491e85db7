"""Which attention runs on a library in place of the kernel: one table for both directions.

A kernel that crashes on some device, or loses against a library, is taken out of the way by one line here, or
for one run by the environment:

    LMIM_FAST_ROUTES="attention.backward.32=cudnn" torchrun ...
    LMIM_FAST_ROUTES="self_attention.backward.64=sdpa:deterministic;cross_attention.forward=cudnn"

that is op.direction[.head width]=backend[:deterministic], separated by semicolons. Rules of the environment
come first, then `TABLE`; the first that fits counts. Forward rules are for attention backend "auto" and for
inputs that a kernel takes: a backend that is asked for by name runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lmim_fast.kernels import runtime

OPS = ("attention", "self_attention", "cross_attention")  # the first stands for both others
DIRECTIONS = ("forward", "backward", "both")
BACKENDS = ("cudnn", "flash", "sdpa", "eager")
TAKE_LENGTHS = ("sdpa", "eager")  # those of them that can hide keys of a sequence
_TEXT = re.compile(r"(\w+)\.(\w+)(?:\.(\d+))?=(\w+)(:deterministic)?")


class Size(NamedTuple):
    """What a rule may depend on: compute capability, width of a head, queries and keys of a sequence."""

    capability: tuple[int, int]
    width: int
    queries: int
    keys: int


@dataclass(frozen=True)
class Route:
    """A rule; None fits everything.

    op:            one of `OPS`.
    direction:     "forward": calls without gradients and dropout. "backward": gradients of calls whose
                   forward pass is the kernel's; the backend repeats that pass. "both": all calls.
    backend:       one of `BACKENDS`, as in `ops.attention.backend`. With a dropout mask that the seed fixes,
                   which "backward" always has, "eager" runs in its place; with `key_lengths`, "sdpa" runs in
                   place of those that cannot hide keys.
    deterministic: the backward pass has to give the same bits in each run: by flash-attn's own option, by
                   `torch.use_deterministic_algorithms` for the others; an error if the backend has no such
                   form, and under torch.compile. For direction "backward".
    """

    op: str
    direction: str
    backend: str
    capability: tuple[int, int] | None = None
    width: int | None = None
    queries: int | None = None
    keys: int | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        for value, known in ((self.op, OPS), (self.direction, DIRECTIONS), (self.backend, BACKENDS)):
            if value not in known:
                raise ValueError(f"unknown {value!r} in a route; choose from {', '.join(known)}")
        if self.deterministic and self.direction != "backward":
            raise ValueError(f"a route is deterministic in direction 'backward' only, got {self.direction!r}")

    def fits(self, op: str, directions: Sequence[str], size: Size) -> bool:
        """True where the rule is about a call of this size, in one of the directions."""
        wanted = (self.capability, self.width, self.queries, self.keys)
        sizes = all(want is None or want == have for want, have in zip(wanted, size, strict=True))
        return sizes and self.op in (op, "attention") and self.direction in directions


# `python -m benchmarks.attention_table FILE --write` enters what was measured to be faster than the kernel.
TABLE: tuple[Route, ...] = ()


def find(op: str, directions: Sequence[str], sizes: Sequence[Size]) -> Route | None:
    """The rule for calls over sequences of these sizes, or None for the kernel; one for any is one for all.

    Raises:
        ValueError: LMIM_FAST_ROUTES is not made of rules.
    """
    return next((rule for rule in _rules() for size in sizes if rule.fits(op, directions, size)), None)


def of_call(op: str, directions: Sequence[str], arguments: Sequence[Any]) -> Route | None:
    """`find` for the arguments of `ops.attention.self_attention` or `cross_attention`."""
    if not _rules():  # at every call
        return None
    x = arguments[0]
    capability = runtime.capability(x.device)
    if op == "self_attention":
        heads, segments = arguments[2:4]
        width = x.shape[1] // 3 // heads
        return find(op, directions, [Size(capability, width, tokens, tokens) for _, tokens in segments])
    kv, heads = arguments[2], arguments[4]
    rule = find(op, directions, [Size(capability, x.shape[2] // heads, x.shape[1], kv.shape[1])])
    hides_keys = len(arguments) > 7 and arguments[7] is not None
    if rule is not None and hides_keys and rule.backend not in TAKE_LENGTHS:
        return replace(rule, backend="sdpa")
    return rule


_parsed: dict[str, tuple[Route, ...]] = {"": ()}


def _rules() -> tuple[Route, ...]:
    text = os.environ.get("LMIM_FAST_ROUTES", "")
    _keep_parsed(text)
    return _parsed[text] + TABLE


def _keep_parsed(text: str) -> None:
    if text not in _parsed:
        _parsed[text] = parse(text)


# torch.compile calls it while it traces; as torch.compiler.assume_constant_result, without its import.
_keep_parsed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def parse(text: str) -> tuple[Route, ...]:
    """Rules from text as the environment has it.

    Raises:
        ValueError: a part of it is no rule.
    """
    rules = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        match = _TEXT.fullmatch(part)
        if match is None:
            raise ValueError(
                f"cannot read the route {part!r}: need op.direction[.head width]=backend[:deterministic], "
                "as in attention.backward.32=cudnn"
            )
        op, direction, width, backend, deterministic = match.groups()
        number = int(width) if width else None
        rules.append(Route(op, direction, backend, width=number, deterministic=bool(deterministic)))
    return tuple(rules)
