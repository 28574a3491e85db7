"""Markdown of results: tables, and what they were measured on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; columns after the first are right-aligned."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(result: dict[str, Any]) -> str:
    """What a result was measured on, in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    cores = f"{result['cores']} cores, {result['threads']} torch threads"
    return f"{result['device']}, {cores}; {versions}; commit {result['commit']}."
