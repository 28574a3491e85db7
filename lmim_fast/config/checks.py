"""What the configs check their values with, and what is the same for all of them: paths and numbers."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import typing
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

PATH = "path"
PathName = Annotated[str, PATH]
"""A str field that names a file or folder: the command line expands its `~` and refuses an empty one."""

Config = TypeVar("Config")

_TOO_LARGE = 2**64  # of whole numbers; a seed reaches up to it


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_seed(seed: int) -> None:
    """Raise ValueError unless the seed fits in 64 bits."""
    require(0 <= seed < 2**64, f"seed must be in [0, 2^64), got {seed}")


def require_numbers(config: Any, prefix: str = "") -> None:
    """Raise ValueError where a number in a config is NaN, infinite or beyond 64 bits; it names the field."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            require_numbers(value, f"{name}.")
            continue
        for number in value if isinstance(value, tuple) else (value,):
            reason = refused_number(str(number)) if isinstance(number, int | float) else ""
            require(not reason, f"{name} {reason}")


def require_size(name: str, value: int) -> None:
    """Raise ValueError unless the size of a model is positive and no slip of the pen."""
    require(0 < value <= 2**16, f"{name} must be in [1, {2**16}], got {value}")


def refused_number(text: str) -> str:
    """Why no option takes this number: not finite, or a whole one beyond 64 bits; "" of anything else."""
    shown = text if len(text) <= 24 else f"{text[:12]}... ({len(text)} characters)"
    if re.fullmatch(r"\s*[+-]?[\d_]+\s*", text):
        digits = text.strip().lstrip("+-").replace("_", "").lstrip("0")
        # Python itself refuses to read thousands of digits.
        large = len(digits) > len(str(_TOO_LARGE)) or int(digits or 0) >= _TOO_LARGE
        return f"must fit in 64 bits, got {shown}" if large else ""
    try:
        number = float(text)
    except ValueError:
        return ""
    return "" if math.isfinite(number) else f"must be a finite number, got {shown}"


def with_home_folders(config: Config, prefix: str = "") -> Config:
    """The config with `~` expanded in its paths, as a shell does in front of a path of its own.

    Raises:
        ValueError: a path is empty, or `~NAME` is no user's home folder.
    """
    changed: dict[str, Any] = {}
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            changed[field.name] = with_home_folders(value, f"{name}.")
        elif PATH in _metadata(hints[field.name]) and value is not None:
            paths = tuple(_expanded(path, name) for path in (value if isinstance(value, tuple) else (value,)))
            changed[field.name] = paths if isinstance(value, tuple) else paths[0]
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]


def _metadata(hint: Any) -> Iterator[Any]:
    """What a type is annotated with, or its parts are."""
    yield from getattr(hint, "__metadata__", ())
    for part in typing.get_args(hint):
        yield from _metadata(part)


def _expanded(path: str, name: str) -> str:
    require(path.strip() != "", f"{name} is empty: name a file or folder, or leave the option out")
    label, equals, folder = path.partition("=")  # NAME=FOLDER of test sets
    if not (equals and folder.startswith("~/")):
        label, equals, folder = "", "", path
    home = os.path.expanduser(folder)
    require(
        not home.startswith("~"),
        f"{name}: {folder!r} is in no user's home folder; a name that begins with ~ is written ./{folder}",
    )
    return label + equals + home
