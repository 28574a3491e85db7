"""Options of the op benchmarks, what is swept, and the file of results."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest

from benchmarks import ceilings, harness, shapes
from benchmarks.machine import describe
from benchmarks.operations import SCRIPTS

collect_ignore = [f"{name}.py" for name in SCRIPTS]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lmim_fast")
    group.addoption("--batches", type=int, nargs="+", default=harness.BATCHES, help="batch sizes to sweep")
    group.addoption("--compiled-batches", type=int, nargs="+", help="those that torch.compile is timed at")
    group.addoption(
        "--budget", type=float, default=harness.settings.budget, help="seconds; the rest is skipped"
    )
    group.addoption("--results", type=Path, help="write all results into this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    harness.settings.compiled_batches = config.option.compiled_batches or config.option.batches
    harness.settings.budget = config.option.budget


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Operations, directions and variants of a file, the largest batch first."""
    module: types.ModuleType = metafunc.module
    if "operation" not in metafunc.fixturenames:
        return
    operations = [item for batch in metafunc.config.option.batches for item in module.operations(batch)]
    metafunc.parametrize("operation", operations, ids=str)
    metafunc.parametrize("direction", harness.DIRECTIONS)
    metafunc.parametrize("variant", module.VARIANTS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The leading size first, then the batches in the order asked for and the models in theirs."""
    names = [model.name for model in shapes.MODELS]

    def rank(item: pytest.Item) -> tuple[bool, int, int]:
        callspec = getattr(item, "callspec", None)
        operation: harness.Operation | None = callspec and callspec.params.get("operation")
        if operation is None:
            return False, 0, 0
        batch = config.option.batches.index(operation.sizes["batch"])
        return not operation.leading, batch, names.index(operation.sizes["model"])

    items.sort(key=rank)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path | None = session.config.option.results
    if path is None or not harness.rows:
        return
    measured = ceilings.measure(harness.DEVICE, harness.DTYPE)
    result = dict(
        benchmark="ops",
        **describe(harness.DEVICE),
        ceilings=vars(measured),
        rows=harness.rows,
    )
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
