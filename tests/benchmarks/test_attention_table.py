"""The table of attention that was measured to be faster than the kernel."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import attention_table
from benchmarks.tune_studies import BACKEND_STUDY

TWO = {"triton": 10.0, "cudnn": 9.0, "sdpa": 9.5}


def row(tokens: int, backend: str, microseconds: float, **changes: Any) -> dict[str, Any]:
    sizes = dict(model="ViT-S", batch=64, tokens=tokens, memory=257, width=384, heads=6, p=0.0)
    found = dict(study=BACKEND_STUDY, candidate=f"backend={backend}", operation="self_attention", sizes=sizes)
    return found | dict(microseconds=[microseconds, 2 * microseconds, 0.1]) | changes


def result(times: dict[int, dict[str, float]], arch: str = "sm_90") -> dict[str, Any]:
    rows = [row(tokens, name, time) for tokens, of in times.items() for name, time in of.items()]
    return dict(arch=arch, rows=rows)


def test_what_takes_less_time_in_every_file_is_entered() -> None:
    first = result({52: TWO, 205: {"triton": 10.0, "cudnn": 9.0}, 257: {"triton": 10.0, "cudnn": 9.8}})
    assert attention_table.faster([first]) == {
        ("self_attention", (9, 0), 64, 52, 257): "cudnn",
        ("self_attention", (9, 0), 64, 205, 257): "cudnn",
    }
    second = result({52: TWO | {"cudnn": 9.6}, 205: {"triton": 10.0, "cudnn": 11.0}})
    assert attention_table.faster([first, second]) == {("self_attention", (9, 0), 64, 52, 257): "sdpa"}


def test_backends_of_other_packages_failures_and_other_studies_are_left_out() -> None:
    found = result({52: {"triton": 10.0, "flash": 1.0}, 64: {"cudnn": 1.0}}, "sm_100")
    failed = row(52, "cudnn", 1.0)
    del failed["microseconds"]
    found["rows"] += [failed | dict(failure="no kernel"), row(52, "sdpa", 1.0, study="attention forward")]
    assert attention_table.faster([found]) == {}
    found["rows"].append(row(52, "sdpa", 1.0))
    assert attention_table.faster([found]) == {("self_attention", (10, 0), 64, 52, 257): "sdpa"}


def test_the_table_is_written_into_its_module_and_emptied_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / "tune.json", tmp_path / "attention_table.py"
    shutil.copy(attention_table.PATH, output)
    path.write_text(json.dumps(result({52: TWO, 205: TWO})))
    assert attention_table.main([str(path)]) == 0
    printed = capsys.readouterr().out
    lines = [f'    ("self_attention", (9, 0), 64, {tokens}, 257): "cudnn",' for tokens in (52, 205)]
    assert printed.splitlines() == ["{", *lines, "}"]
    before = output.read_text()
    assert attention_table.main([str(path), "--write", "--output", str(output)]) == 0
    spec = importlib.util.spec_from_file_location("written", output)
    assert spec is not None
    assert spec.loader is not None
    written = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(written)
    assert written.FASTER == {
        ("self_attention", (9, 0), 64, 52, 257): "cudnn",
        ("self_attention", (9, 0), 64, 205, 257): "cudnn",
    }
    path.write_text(json.dumps(result({52: {"triton": 1.0}})))
    assert attention_table.main([str(path), "--write", "--output", str(output)]) == 0
    assert output.read_text().endswith("str] = {}\n")
    assert len(before.splitlines()) >= len(output.read_text().splitlines())


def test_files_without_the_study_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tune.json"
    path.write_text(json.dumps(dict(arch="sm_90", rows=[])))
    assert attention_table.main([str(path), "--write"]) == 1
    assert "no study" in capsys.readouterr().err
