"""Hardware counters of the kernels: what is asked of the profiler, and how its report is read."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_gelu, bench_masking, counters, operations
from lmim_fast.ops import dispatch

TIME, MEMORY = "gpu__time_duration.sum", "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
XU, FMA = (f"sm__inst_executed_pipe_{name}.avg.pct_of_peak_sustained_active" for name in ("xu", "fma"))
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
HEAD = ["ID", "Kernel Name", TIME, MEMORY, XU, FMA, STALL.format("selected"), STALL.format("long_scoreboard")]
HEAD += [STALL.format("barrier"), "launch__registers_per_thread"]
UNITS = ["", "", "ns", "%", "%", "%", "inst", "inst", "inst", ""]
LAUNCHED = [("", "masking.select_patches_kernel"), ("gelu", "gelu._forward"), ("gelu", "gelu._backward")]


def report(*rows: list[str]) -> list[str]:
    lines = ["==PROF== Connected", *(",".join(f'"{cell}"' for cell in row) for row in (HEAD, UNITS, *rows))]
    return lines


def row(name: str, time: str = "1,234,500") -> list[str]:
    return ["0", name, time, "81.5", "12.0", "33.25", "1.0", "7.5", "0.25", "64"]


def test_a_row_tells_the_limits_of_a_launch() -> None:
    lines = report(row("select_patches_kernel"), row("_forward"), row("_backward(float*, int)", "n/a"))
    first, second = counters.rows(lines, LAUNCHED)
    assert first == dict(
        operation="gelu",
        kernel="gelu._forward",
        nanoseconds=1234500.0,
        memory=81.5,
        issue=None,
        warps=None,
        registers=64.0,
        pipe=("fma", 33.25),
        waits=[("long_scoreboard", 7.5), ("barrier", 0.25)],
    )
    assert second["nanoseconds"] is None
    assert counters.line(first) == (
        "gelu | gelu._forward | 1234.5 us | memory 82% | issue - | pipe fma 33% | warps - | 64 registers | "
        "waits for long_scoreboard 7.5, barrier 0.2"
    )
    assert "| - us |" in counters.line(second)


@pytest.mark.parametrize("names", [[], ["_forward"], ["select_patches_kernel", "_backward", "_forward"]])
def test_a_report_of_other_launches_is_an_error(names: list[str]) -> None:
    with pytest.raises(ValueError, match="ncu reports the launches"):
        counters.rows(report(*map(row, names)), LAUNCHED)


def test_launches_are_told_in_order_and_those_that_make_inputs_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gelu = next(one for one in bench_gelu.operations(1) if one.leading)
    select = next(one for one in bench_masking.operations(2) if one.name == "select_patches")
    small = torch.randn(4, 32).requires_grad_(), torch.randn(32).requires_grad_()

    def inputs(device: torch.device, dtype: torch.dtype) -> Any:
        select.ours["ours"](*select.inputs(device, dtype))
        return small

    monkeypatch.setattr(operations, "every", lambda batch: [select, dataclasses.replace(gelu, inputs=inputs)])
    monkeypatch.setattr(counters.harness, "_copy_count", lambda operation: 1)
    with dispatch.backend("triton"):
        counters.work(tmp_path / "launched.json", "", 1)
        leading = json.loads((tmp_path / "launched.json").read_text())
        counters.work(tmp_path / "launched.json", "select", 1)
    assert leading == [["", "masking.select_patches_kernel"]] + [
        [str(gelu), f"gelu.{name}"] for name in ("_forward", "_backward")
    ]
    assert json.loads((tmp_path / "launched.json").read_text()) == [
        [str(select), "masking.select_patches_kernel"]
    ]


FAKE = """#!{python}
import json, pathlib, sys
given = sys.argv
assert given[given.index("--clock-control") + 1] == "none"
assert given[given.index("--kernel-name-base") + 1] == "function"
launched = given[given.index("--worker") + 1]
print("the program's own output")
if given[given.index("--only") + 1] == "broken":
    sys.exit(5)
pathlib.Path(launched).write_text(json.dumps({launched!r}))
pathlib.Path(given[given.index("--log-file") + 1]).write_text({report!r})
"""


def test_the_profiler_runs_over_a_worker_and_its_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = "\n".join(report(row("select_patches_kernel"), row("_forward"), row("_backward")))
    ncu = tmp_path / "ncu"
    ncu.write_text(FAKE.format(python=sys.executable, launched=LAUNCHED, report=text))
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert counters.main([]) == 0
    assert capfd.readouterr().out.startswith("gelu | gelu._forward | 1234.5 us | memory 82%")
    assert counters.main(["--json"]) == 0
    assert [one["kernel"] for one in json.loads(capfd.readouterr().out)] == [
        "gelu._forward",
        "gelu._backward",
    ]
    assert counters.main(["--only", "broken"]) == 1
    assert "counters: ncu ended with 5" in capfd.readouterr().err


def test_all_kernels_are_watched_by_their_names_on_the_device() -> None:
    line = counters.command("ncu", Path("log"), Path("launched"), "gelu", 64)
    names = line[line.index("--kernel-name") + 1]
    assert names.startswith("regex:^(_append_rows|_backward|")
    assert names.endswith(")$")
    assert names.count("|") == 18
    assert line[-4:] == ["--only", "gelu", "--batch", "64"]


def test_without_the_profiler_or_a_device_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(counters, "_INSTALLED", tmp_path / "nsight-compute")
    assert counters.main([]) == counters.ABSENT
    for version in ("2024.1", "2025.3"):
        tool = tmp_path / "nsight-compute" / version / "ncu"
        tool.parent.mkdir(parents=True)
        tool.touch(0o755)
    assert counters.find() == str(tool)
    monkeypatch.setattr(counters, "find", lambda: "ncu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert counters.main([]) == counters.ABSENT
    assert capsys.readouterr().err.splitlines() == [
        "counters: there is no ncu (Nsight Compute)",
        "counters: there is no CUDA device",
    ]
