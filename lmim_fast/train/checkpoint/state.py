"""The state.json of a checkpoint: what it must hold, and its checksum of its own."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmim_fast.errors import CheckpointError
from lmim_fast.train.checkpoint.files import reading

Fields = Mapping[str, Callable[[Any], bool]]
"""Fields of a state, and what is true of each of them."""


def checksum_of(body: dict[str, Any]) -> str:
    """Of the content of a state.json without its checksum."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _is_manifest(files: Any) -> bool:
    return isinstance(files, dict) and all(
        isinstance(line, dict) and type(line.get("bytes")) is int and isinstance(line.get("sha256"), str)
        for line in files.values()
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_meter(meter: Any) -> bool:
    if not isinstance(meter, dict) or not all(
        _is_count(meter.get(n)) for n in ("skipped", "skipped_in_a_row")
    ):
        return False
    steps, rows = meter.get("steps"), meter.get("rows")
    return isinstance(steps, list) and isinstance(rows, list) and all(isinstance(row, list) for row in rows)


def _is_fingerprint(data: Any) -> bool:
    return isinstance(data, dict) and all(isinstance(part, dict) for part in data.get("databases", [None]))


_FIELDS: Fields = {"step": _is_count, "files": _is_manifest}
FIELDS_OF_A_RUN: Fields = {
    "config": lambda config: isinstance(config, dict) and isinstance(config.get("objective"), str),
    "data": _is_fingerprint,
    "meter": _is_meter,
    "seconds": lambda seconds: isinstance(seconds, int | float) and 0 <= seconds < math.inf,
    "teacher": lambda line: line is None or _is_manifest({"teacher": line}),
}
"""Of what a training writes, beside these."""


def read_state(path: Path) -> dict[str, Any]:
    """The content of a state.json, checked against its own checksum.

    Raises:
        CheckpointError: it is missing or altered, or has not what a checkpoint has.
        LmimError: it cannot be read.
    """
    try:
        with reading(path):
            body = json.loads(path.read_bytes())
        if not isinstance(body, dict) or "checksum" not in body:
            raise ValueError("it is no JSON object with a checksum")
        checksum = body.pop("checksum")
        good = checksum == checksum_of(body)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a checkpoint's state: {error}") from error
    if not good:
        raise CheckpointError(f"{path} was altered: its checksum does not fit its content")
    check_fields(path, body, _FIELDS)
    return body


def check_fields(path: Path, state: dict[str, Any], fields: Fields) -> None:
    """Refuse a state with a field that is missing or malformed.

    Raises:
        CheckpointError: names the fields.
    """
    wrong = [name for name, fits in fields.items() if not fits(state.get(name))]
    if wrong:
        raise CheckpointError(f"{path} is not a checkpoint's state: {', '.join(wrong)} missing or malformed")
