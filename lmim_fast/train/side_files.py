"""What lies in a run folder beside checkpoints and weights: lines of JSON, and what tells what happened.

No damage to them may keep a run from continuing, so they are read leniently: a line that is damaged counts as
one that is not there.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmim_fast.durable import flush_file, flush_folder
from lmim_fast.train.checkpoint.files import explain, reading, write_file

METRICS_FILE, HELD_OUT_FILE, VALIDATION_FILE = "metrics.jsonl", "eval.jsonl", "validation.jsonl"
SKIPPED_FILE, BAD_RECORDS_FILE = "skipped.jsonl", "bad_records.jsonl"
WRONG_FILE = "wrong_readings.json"
BEST_FOLDER = "best"

_BOM = b"\xef\xbb\xbf"
_NAMED = 5  # damaged lines whose numbers a warning lists
# Of a run that left no checkpoint, with `LINES`: nothing goes on from them.
_LOGS = re.compile(r"wrong_readings\.json|wandb_id|events\.out\.tfevents\..*")
_WITNESSES = re.compile(r"stacks-rank\d+\.txt|trace-rank\d+\.json\.gz|nccl-rank-\d+|memory-rank\d+\.pickle")
_WEIGHTS = ("encoder.safetensors", "recognizer.safetensors", f"{BEST_FOLDER}/recognizer.safetensors")


def has_step(line: dict[str, Any]) -> bool:
    """Whether a line is of a step."""
    step = line.get("step")
    return type(step) is int and 0 <= step < 2**53


def _has_scores(line: dict[str, Any]) -> bool:
    accuracy = line.get("accuracy")
    if not isinstance(accuracy, int | float) or not 0 <= accuracy <= 1:
        return False
    return has_step(line) and isinstance(line.get("sets"), dict)


def _names_record(line: dict[str, Any]) -> bool:
    return all(isinstance(line.get(name), str) for name in ("database", "key", "reason"))


LINES: dict[str, Callable[[dict[str, Any]], bool]] = {
    METRICS_FILE: has_step,
    HELD_OUT_FILE: has_step,
    VALIDATION_FILE: _has_scores,
    SKIPPED_FILE: has_step,
    BAD_RECORDS_FILE: _names_record,
}
"""The files of lines, and what is true of each of their whole lines."""


def parse(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None if it holds none, or numbers that JSON lacks."""
    try:
        value = json.loads(line.decode(), parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):  # also what is not UTF-8
        return None
    return value if isinstance(value, dict) else None


def _refuse(word: str) -> float:
    raise ValueError(word)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of lines, without the damaged ones; none if there is no file.

    Raises:
        LmimError: it cannot be read.
    """
    return [value for _, value in _split(path, LINES.get(path.name, lambda line: True))[0]]


def _split(
    path: Path, good: Callable[[dict[str, Any]], bool]
) -> tuple[list[tuple[bytes, dict[str, Any]]], list[int]]:
    """The whole lines with their objects, and the numbers of the damaged ones but a torn last one."""
    if not path.exists():
        return [], []
    with reading(path):
        content = path.read_bytes()
    whole, damaged = [], []
    lines = content.removeprefix(_BOM).split(b"\n")
    for number, line in enumerate(lines, 1):
        value = parse(line) if line.strip() else None
        if value is not None and good(value):
            whole.append((line, value))
        elif line.strip() and number < len(lines):  # the last one is whole only if a line break follows
            damaged.append(number)
    return whole, damaged


def drop_lines_after(path: Path, step: int, say: Callable[[str], None] | None = None) -> None:
    """Keep the whole lines of a file that are of `step` or before, or of no step.

    Args:
        say: is told which lines were damaged; a torn last line is what a killed run leaves, and not told.
    Raises:
        LmimError: the file cannot be read or written.
    """
    if not path.exists():
        return
    whole, damaged = _split(path, LINES.get(path.name, has_step))
    if damaged and say is not None:
        numbers = ", ".join(map(str, damaged[:_NAMED]))
        more = f" and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else ""
        say(f"warning: {path}: damaged lines were dropped (line {numbers}{more}), the run goes on without")
    kept = b"".join(line + b"\n" for line, value in whole if not has_step(value) or value["step"] <= step)
    if kept != path.read_bytes():
        write_file(path, kept)


def add_new_lines(path: Path, lines: Sequence[dict[str, Any]]) -> int:
    """Append the JSON lines that a file does not have yet; how many it has then."""
    known = {line.decode() for line, _ in _split(path, LINES.get(path.name, lambda line: True))[0]}
    new = [text for text in dict.fromkeys(json.dumps(line) for line in lines) if text not in known]
    if new:
        append(path, new)
    return len(known) + len(new)


def append(path: Path, lines: Sequence[str]) -> None:
    """Append lines of text to a file, behind a torn last line if there is one.

    Raises:
        LmimError: the disk is full or the file cannot be written.
    """
    try:
        with path.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
                file.write(b"\n" if torn else b"")
            file.write("".join(line + "\n" for line in lines).encode())
    except OSError as error:
        raise explain(error, path) from error


def flush(run: Path) -> None:
    """Make the lines written so far last through a power cut, before a checkpoint counts on them.

    Raises:
        LmimError: the disk failed.
    """
    path = run
    try:
        for name in LINES:
            path = run / name
            if path.exists():
                with path.open("rb") as file:
                    flush_file(file.fileno(), path)
        path = run
        flush_folder(path)
    except OSError as error:
        raise explain(error, path) from error


def resume_at(run: Path, step: int, say: Callable[[str], None]) -> None:
    """Keep what belongs to the first `step` steps of a run that goes on from there; say what was damaged.

    Raises:
        LmimError: a file cannot be read or written.
    """
    for name in LINES:
        drop_lines_after(run / name, step, say)
    best = run / BEST_FOLDER
    if best.exists() and not best.is_dir():
        aside = best.with_name(best.name + ".damaged")
        _rename(best, aside)
        say(f"warning: {best} is a file where a folder should be; set aside as {aside.name}")


def start_afresh(run: Path, say: Callable[[str], None], *, restarted: bool) -> None:
    """Clear what a run without a checkpoint has left: it is not of the run that begins now.

    Logs are deleted. Weights, which a finished run leaves whose checkpoints were deleted, are renamed.

    Args:
        restarted: torchrun has just restarted this run: what tells why it ended stays.
    Raises:
        LmimError: a file cannot be deleted or renamed.
    """
    gone = [run / name for name in LINES if (run / name).is_file()]
    for folder in (run, run / "tensorboard"):
        if folder.is_dir():
            gone += [
                path
                for path in sorted(folder.iterdir())
                if _LOGS.fullmatch(path.name) or (_WITNESSES.fullmatch(path.name) and not restarted)
            ]
    for path in gone:
        try:
            path.unlink()
        except OSError as error:
            raise explain(error, path) from error
    kept = [run / name for name in _WEIGHTS if (run / name).is_file()]
    for path in kept:
        _rename(path, path.with_name(path.name + ".old"))
    if gone:
        say(f"{run} has no checkpoint: logs of the run before are deleted ({_listed(gone, run)})")
    if kept:
        say(f"{run} has no checkpoint: weights of the run before get the ending .old ({_listed(kept, run)})")


def _listed(paths: Sequence[Path], run: Path) -> str:
    names = [str(path.relative_to(run)) for path in paths]
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _rename(path: Path, target: Path) -> None:
    try:
        path.rename(target)
    except OSError as error:
        raise explain(error, path) from error
