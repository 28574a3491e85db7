"""Rules for attention that was measured to be faster than the kernel."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import attention_table
from benchmarks.tune_studies import BACKEND_STUDY
from lmim_fast.ops import routes
from lmim_fast.ops.routes import Route

TWO = {"triton": 10.0, "cudnn": 9.0, "sdpa": 9.5}


def row(tokens: int, backend: str, microseconds: float, **changes: Any) -> dict[str, Any]:
    sizes = dict(model="ViT-S", batch=64, tokens=tokens, memory=257, width=384, heads=6, p=0.0)
    found = dict(study=BACKEND_STUDY, candidate=f"backend={backend}", operation="self_attention", sizes=sizes)
    return found | dict(microseconds=[microseconds, 2 * microseconds, 0.1]) | changes


def rule(backend: str, tokens: int, capability: tuple[int, int] = (9, 0)) -> Route:
    return Route("self_attention", "forward", backend, capability, 64, tokens, 257)


def result(times: dict[int, dict[str, float]], arch: str = "sm_90") -> dict[str, Any]:
    rows = [row(tokens, name, time) for tokens, of in times.items() for name, time in of.items()]
    return dict(arch=arch, rows=rows)


def test_what_takes_less_time_in_every_file_is_entered() -> None:
    first = result({52: TWO, 205: {"triton": 10.0, "cudnn": 9.0}, 257: {"triton": 10.0, "cudnn": 9.8}})
    assert attention_table.faster([first]) == [rule("cudnn", 52), rule("cudnn", 205)]
    second = result({52: TWO | {"cudnn": 9.6}, 205: {"triton": 10.0, "cudnn": 11.0}})
    assert attention_table.faster([first, second]) == [rule("sdpa", 52)]


def test_backends_of_other_packages_failures_and_other_studies_are_left_out() -> None:
    found = result({52: {"triton": 10.0, "flash": 1.0}, 64: {"cudnn": 1.0}}, "sm_100")
    failed = row(52, "cudnn", 1.0)
    del failed["microseconds"]
    found["rows"] += [failed | dict(failure="no kernel"), row(52, "sdpa", 1.0, study="attention forward")]
    assert attention_table.faster([found]) == []
    found["rows"].append(row(52, "sdpa", 1.0))
    assert attention_table.faster([found]) == [rule("sdpa", 52, capability=(10, 0))]


def test_the_rules_are_written_into_their_module_and_taken_out_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = tmp_path / "tune.json", tmp_path / "routes.py"
    shutil.copy(attention_table.PATH, output)
    by_hand = Route("attention", "backward", "sdpa", width=32, deterministic=True)
    monkeypatch.setattr(routes, "TABLE", (by_hand, rule("sdpa", 77)))
    path.write_text(json.dumps(result({52: TWO, 205: TWO})))
    assert attention_table.main([str(path)]) == 0
    lines = [
        f'    Route("self_attention", "forward", "cudnn", (9, 0), 64, {tokens}, 257),' for tokens in (52, 205)
    ]
    kept = '    Route("attention", "backward", "sdpa", None, 32, None, None, deterministic=True),'
    assert capsys.readouterr().out.splitlines() == ["(", kept, *lines, ")"]
    assert attention_table.main([str(path), "--write", "--output", str(output)]) == 0
    assert written(output) == (by_hand, rule("cudnn", 52), rule("cudnn", 205))
    monkeypatch.setattr(routes, "TABLE", ())
    path.write_text(json.dumps(result({52: {"triton": 1.0}})))
    assert attention_table.main([str(path), "--write", "--output", str(output)]) == 0
    assert output.read_text() == attention_table.PATH.read_text()


def written(path: Path) -> tuple[Route, ...]:
    """The table of a module at `path`; its rules as those of the package."""
    spec = importlib.util.spec_from_file_location("written", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["written"] = module
    spec.loader.exec_module(module)
    return tuple(Route(**vars(rule)) for rule in module.TABLE)


def test_files_without_the_study_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tune.json"
    path.write_text(json.dumps(dict(arch="sm_90", rows=[])))
    assert attention_table.main([str(path), "--write"]) == 1
    assert "no study" in capsys.readouterr().err
