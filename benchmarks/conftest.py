"""Options of the op benchmarks, what is swept, and the file of results."""

from __future__ import annotations

import time
import types
from pathlib import Path

import pytest
import torch

from benchmarks import ceilings, harness, shapes
from benchmarks.machine import describe, write_whole
from benchmarks.operations import SCRIPTS

collect_ignore = [f"{name}.py" for name in SCRIPTS]


_WRITE_SECONDS = 10.0
_written = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lmim_fast")
    group.addoption("--batches", type=int, nargs="+", default=harness.BATCHES, help="batch sizes to sweep")
    group.addoption("--compiled-batches", type=int, nargs="+", help="those that torch.compile is timed at")
    group.addoption(
        "--budget", type=float, default=harness.settings.budget, help="seconds; the rest is skipped"
    )
    group.addoption("--results", type=Path, help="write all results into this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "default")  # a warning ends a test, but no measurement
    harness.settings.compiled_batches = config.option.compiled_batches or config.option.batches
    harness.settings.budget = config.option.budget


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Operations, directions and variants of a file, the largest batch first."""
    module: types.ModuleType = metafunc.module
    if "operation" not in metafunc.fixturenames:
        return
    operations = [item for batch in metafunc.config.option.batches for item in module.operations(batch)]
    metafunc.parametrize("operation", operations, ids=str)
    metafunc.parametrize("direction", getattr(module, "DIRECTIONS", harness.DIRECTIONS))
    metafunc.parametrize("variant", module.VARIANTS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The batches in the order asked for; of each the leading sizes first, then the models in their order."""
    names = [model.name for model in shapes.MODELS]

    def rank(item: pytest.Item) -> tuple[int, bool, int]:
        callspec = getattr(item, "callspec", None)
        operation: harness.Operation | None = callspec and callspec.params.get("operation")
        if operation is None:
            return -1, False, 0
        batch = config.option.batches.index(operation.sizes["batch"])
        return batch, not operation.leading, names.index(operation.sizes["model"])

    items.sort(key=rank)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """What is measured stays, however the run ends."""
    global _written
    if time.monotonic() - _written > _WRITE_SECONDS:
        _write(item.config)
        _written = time.monotonic()


def pytest_sessionfinish(session: pytest.Session) -> None:
    _write(session.config)


def _write(config: pytest.Config) -> None:
    path: Path | None = config.option.results
    if path is None or not harness.rows:
        return
    measured = ceilings.measure(harness.DEVICE, harness.DTYPE)
    result = dict(
        benchmark="ops",
        **describe(harness.DEVICE),
        ceilings=vars(measured),
        rows=harness.rows,
    )
    if harness.DEVICE.type == "cuda":
        result["arch"] = "sm_{}{}".format(*torch.cuda.get_device_capability(harness.DEVICE))
    write_whole(path, result)
