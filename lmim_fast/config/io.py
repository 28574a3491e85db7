"""Config dataclasses to and from JSON, and their fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from lmim_fast.config.checks import require_numbers
from lmim_fast.config.finetune import FinetuneConfig
from lmim_fast.config.pretrain import PretrainConfig
from lmim_fast.config.run import RunConfig

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
            if not isinstance(value, dict):
                raise ValueError(f"{name} must be an object, got {_shortly(value)}")
            value = from_dict(hints[name], value)
        elif isinstance(value, list):
            value = tuple(value)
        if not _fits(value, hints[name]):
            choices = typing.get_args(hints[name])
            wanted = (
                f"one of {', '.join(map(str, choices))}" if _is_literal(hints[name]) else "of another type"
            )
            raise ValueError(f"{name} must be {wanted}, got {_shortly(value)}")
        arguments[name] = value
    config = kind(**arguments)
    require_numbers(config)
    return config


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is one of a field's type: a plain type, a choice, a tuple, or None."""
    if _is_literal(hint):
        return isinstance(value, str) and value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        parts = parts[:1] * len(value) if Ellipsis in parts else parts
        return len(parts) == len(value) and all(map(_fits, value, parts))
    if typing.get_args(hint):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def _shortly(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def run_from_dict(values: dict[str, Any]) -> RunConfig:
    """Rebuild the config of a run, of whatever objective, from `to_dict`'s output.

    Raises:
        ValueError: as `from_dict`.
    """
    kind = FinetuneConfig if values.get("objective") == "recognizer" else PretrainConfig
    if isinstance(values.get("cuda_graph"), bool):  # of older runs
        values = values | {"cuda_graph": "on" if values["cuda_graph"] else "off"}
    return from_dict(kind, values)


def read_run_config(path: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The config that a run left in its config.json, and the whole document: config, versions, data.

    Raises:
        OSError:    the file cannot be read.
        ValueError: it is not a config of this version; says why.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig", errors="replace"))
        return run_from_dict(document["config"]), document
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a config of this version: {reason}") from error


def config_hash(config: Any) -> str:
    """Sixteen hex digits that change when any value of the config does."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Any, new: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Places where two JSON values differ: (dotted name, old value, new value)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key), new.get(key), f"{name}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from differences(before, after, f"{name}[{place}]")
    elif old != new:
        yield name, old, new
