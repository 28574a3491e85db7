"""Config dataclasses to and from JSON, and their fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from typing import Any, TypeVar

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON-ready nested dictionaries (tuples become lists)."""
    result: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return result


def from_dict(kind: type[Config], values: dict[str, Any]) -> Config:
    """Rebuild a config dataclass of type `kind` from `to_dict`'s output.

    Raises:
        ValueError: a key that `kind` does not have, or a value its checks refuse.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}")
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(hints[name], value)
        elif isinstance(value, list):
            value = tuple(value)
        arguments[name] = value
    return kind(**arguments)


def config_hash(config: Any) -> str:
    """Sixteen hex digits that change when any value of the config does."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:16]
