"""The table of MLPs whose GELU was measured to be faster in the epilogue of the products."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import epilogue_table
from benchmarks.bench_mlp import VARIANTS, operations
from lmim_fast.ops.epilogue_table import FASTER

Times = dict[tuple[int, str], tuple[float, float]]  # batch, direction: ours, epilogue
BOTH: Times = {(64, "forward"): (10.0, 9.0), (64, "forward+backward"): (30.0, 29.9)}


def rows(width: int, times: Times, dtype: str = "bfloat16") -> list[dict[str, Any]]:
    """As `benchmarks/harness.py` files them."""
    return [
        dict(
            operation="mlp",
            sizes=dict(model="x", batch=batch, tokens=257, width=width, hidden=4 * width, p=0.0),
            variant=variant,
            direction=direction,
            dtype=dtype,
            microseconds=[microseconds, 2 * microseconds, 0.1],
        )
        for (batch, direction), of in times.items()
        for variant, microseconds in zip(("ours", "epilogue"), of, strict=True)
    ]


def result(*groups: list[dict[str, Any]], arch: str = "sm_90") -> dict[str, Any]:
    return dict(arch=arch, rows=[row for group in groups for row in group])


def test_what_takes_less_time_at_every_batch_and_in_every_file_is_entered() -> None:
    slower_small = {(8, "forward"): (5.0, 4.9), **BOTH}
    first = result(rows(384, BOTH), rows(512, slower_small))
    assert epilogue_table.faster([first]) == [("forward", (9, 0), 384, 1536)]
    trained = {(64, "forward+backward"): (30.0, 20.0)}
    other = result(rows(384, trained), rows(768, trained), arch="sm_100")
    assert epilogue_table.faster([first, other]) == [
        ("forward", (9, 0), 384, 1536),
        ("forward+backward", (10, 0), 384, 1536),
        ("forward+backward", (10, 0), 768, 3072),
    ]
    slower = result(rows(384, {(64, "forward"): (10.0, 9.9)}))
    assert epilogue_table.faster([first, slower]) == []


def test_forms_that_were_not_timed_other_operations_and_fp32_are_left_out() -> None:
    alone = [row for row in rows(384, BOTH) if row["variant"] == "epilogue"]
    gelu = [row | dict(operation="bias_gelu") for row in rows(512, BOTH)]
    found = result(alone, gelu, rows(768, BOTH, "float32"))
    assert epilogue_table.faster([found]) == []
    assert epilogue_table.faster([dict(rows=rows(384, BOTH))]) == []  # of a CPU
    assert epilogue_table.faster([result(rows(384, BOTH))]) == [("forward", (9, 0), 384, 1536)]


def test_the_benchmark_has_the_forms_and_sizes_that_the_table_reads() -> None:
    for operation in operations(8):
        assert set(operation.ours) == {"ours", "epilogue"} <= set(VARIANTS)
        assert operation.sizes.keys() >= {"batch", "tokens", "width", "hidden"}


def written(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("written", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FASTER


def test_the_table_is_written_into_its_module_and_emptied_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / "ops.json", tmp_path / "epilogue_table.py"
    shutil.copy(epilogue_table.PATH, output)
    path.write_text(json.dumps(result(rows(384, BOTH), rows(768, BOTH))))
    assert epilogue_table.main([str(path)]) == 0
    lines = [f'    ("forward", (9, 0), {width}, {4 * width}),' for width in (384, 768)]
    assert capsys.readouterr().out.splitlines() == ["{", *lines, "}"]
    for _ in range(2):  # the second time over its own entries
        assert epilogue_table.main([str(path), "--write", "--output", str(output)]) == 0
        assert written(output) == {("forward", (9, 0), width, 4 * width) for width in (384, 768)}
    path.write_text(json.dumps(result(rows(384, {(64, "forward"): (9.0, 10.0)}))))
    assert epilogue_table.main([str(path), "--write", "--output", str(output)]) == 0
    assert written(output) == set()


def test_a_file_without_an_mlp_on_a_device_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, right = tmp_path / "ops.json", tmp_path / "right.json"
    path.write_text(json.dumps(dict(rows=rows(384, BOTH))))
    right.write_text(json.dumps(result(rows(384, BOTH))))
    assert epilogue_table.main([str(right), str(path), "--write", "--output", str(tmp_path / "none")]) == 1
    assert f"no MLP on a CUDA device in {path}" in capsys.readouterr().err


def test_the_shipped_table_has_entries_that_can_be_looked_up() -> None:
    for direction, capability, width, hidden in FASTER:
        assert direction in ("forward", "forward+backward")
        assert len(capability) == 2
        assert width >= 1 <= hidden
