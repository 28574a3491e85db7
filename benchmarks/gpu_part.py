"""A part of a stage in a process of its own, within its time: how it went is added to its result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.gpu_stages import Part

ROOT = Path(__file__).parents[1]
GRACE = 5.0  # seconds from the interrupt of a part to its end
ROUTES = "LMIM_FAST_ROUTES"  # environment: backends of ops by direction and width of heads
_OUTPUT = 8000  # characters that a result keeps of what its part printed
_SAMPLES = 5.0  # seconds between two looks at the clocks
interrupted: list[int] = []  # signals


@contextmanager
def signals_noted() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM are noted, for `run` to see: no file is left half written."""
    interrupted.clear()
    kinds = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(kind, lambda number, _: interrupted.append(number)) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def run(part: Part, path: Path, seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run a part for so long at most, and its grace; its result, with how it went, is in `path` too."""
    start = looked = time.monotonic()
    log, stopped, clocks = path.with_suffix(".log"), "", list[Any]()
    path.unlink(missing_ok=True)
    if not part.routed:
        environment = {name: value for name, value in environment.items() if name != ROUTES}
    line: list[str] = part.line(path, seconds)
    with log.open("wb") as output:
        process = subprocess.Popen(
            line, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    while process.poll() is None and not stopped:
        time.sleep(0.05)
        if interrupted or time.monotonic() - start > seconds:
            stopped = "interrupted" if interrupted else f"stopped after {seconds:.0f} s"
        elif time.monotonic() - looked > _SAMPLES and machine.DRY_RUN not in environment:
            clocks.append(machine.clocks())
            looked = time.monotonic()
    if stopped:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):  # processes that it left would slow the next part down
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    path.with_suffix(".part").unlink(missing_ok=True)
    result: dict[str, Any] = {"benchmark": "gpu", "rows": [], "failed": []}
    if written := path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
    result["verdict"] = _verdict(part, result, code, stopped, written)
    result |= {
        "command": part.command,
        "seconds": round(time.monotonic() - start, 1),
        "exit": stopped or code,
    }
    result |= {"output": log.read_text(encoding="utf-8", errors="replace")[-_OUTPUT:]}
    result |= {"clocks_seen": clocks, "routes": environment.get(ROUTES)}
    log.unlink()
    return _without_places(result, path.parent)


def _without_places(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The result without the folders of this machine: it may be published."""
    text = json.dumps(result)
    for place, name in ((folder, "RESULTS"), (ROOT, "."), (Path.home(), "~")):
        text = text.replace(str(place), name)
    found: dict[str, Any] = json.loads(text)
    return found


def _verdict(part: Part, result: dict[str, Any], code: int, stopped: str, written: bool) -> str:
    """Of a part that has ended: green, red, absent, or partial: what it measured in its time is right."""
    if stopped:
        red = result.get("verdict") == "red" or not (result["rows"] or interrupted)
        return "red" if red else "interrupted" if interrupted else "partial"
    if code == machine.ABSENT:
        return "absent"
    return "green" if code == 0 and (written or not part.files) else "red"
