"""What all ranks of a run must have been started with, and how a rank that was not is named."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from lmim_fast import faults
from lmim_fast.config.io import differences, to_dict
from lmim_fast.errors import UsageError, shared_on_this_machine

# Where data is mounted, how many threads read it and where a rank computes is each machine's own: contents
# and kinds of device are compared.
_MACHINES_OWN = re.compile(
    r"config\.((data|val|eval_data)\[\d+\]|loader\.(threads|skip)|device)|data\..*\.name"
)
_EXPLAINS_THE_REST = ("command", "config.objective")
_DATABASE = re.compile(r"data\.databases\[(\d+)\]\.\w+")


def start_of(command: str, config: Any, versions: dict[str, str]) -> dict[str, Any]:
    """How this process was started, JSON-ready: what `refuse_different` compares.

    Args:
        command:  what the process does, in a word.
        config:   its config dataclass.
        versions: of the packages, by name.
    """
    switches = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("LMIM_FAST_") and name != faults.VARIABLE
    }
    return {
        "command": command,
        "config": to_dict(config),
        "versions": versions,
        "environment": switches,
    }


def refuse_different(ranks: Sequence[dict[str, Any]]) -> None:
    """Refuse ranks that differ in what has to be equal.

    Args:
        ranks: of every rank what it has, JSON-ready and under the same names.
    Raises:
        UsageError: names the first rank that differs from rank 0, in what, and both values. The first process
            of each machine reports it: its user may see no other.
    """
    for rank, other in enumerate(ranks):
        changed = [
            line for line in differences(ranks[0], other, "") if not _MACHINES_OWN.fullmatch(line[0][1:])
        ]
        if not changed:
            continue
        told: dict[str, str] = {}
        for name, old, new in changed:
            cause, text = _told(name[1:], old, new, ranks[0])
            told.setdefault(cause, text)
        lines = [told[name] for name in _EXPLAINS_THE_REST if name in told][:1] or list(told.values())
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise shared_on_this_machine(
            UsageError(
                f"rank {rank} differs from rank 0: {'; '.join(lines[:3])}{more}; start all ranks by the same "
                "command, on the same data, with the same packages"
            )
        )


def _told(name: str, old: Any, new: Any, first: dict[str, Any]) -> tuple[str, str]:
    """The cause of a difference, and what to tell of it; the first difference of a cause tells most."""
    if name == "data.count":
        return name, f"the data has {old:,} records, there {new:,}"
    if name == "data.databases":
        return name, f"the data has {len(old):,} databases, there {len(new):,}"
    if name == "skip list":
        return name, "the skip list names other records there"
    if place := _DATABASE.fullmatch(name):
        database = first["data"]["databases"][int(place[1])]["name"]
        return f"data.{place[1]}", f"{database} holds other records there"
    kind, _, rest = name.partition(".")
    if kind == "environment":
        return name, f"{rest} is {_value(old)}, there {_value(new)}"
    if kind == "config":
        return name, f"--{rest.replace('_', '-')} is {old!r}, there {new!r}"
    return name, f"{name} is {_value(old)}, there {_value(new)}"


def _value(value: Any) -> str:
    return "not set" if value is None else repr(value)
