"""Everything that needs a device in one command: its parts, their time, what it leaves."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, sanitize

ROOT = Path(__file__).parents[2]


def test_files_with_gpu_tests_are_found_and_others_left_alone() -> None:
    found = gpu.gpu_tests()
    assert "tests/models/test_lmim_cuda.py" in found
    assert "tests/data/test_pipeline_cuda.py" in found
    assert "tests/ops/test_philox.py" not in found
    assert "tests/benchmarks/test_harness.py" not in found


def test_a_red_part_of_the_gpu_run_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    both = "import sys; print('{}'); print('log', file=sys.stderr)"
    interrupted = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('written at the end')"
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    parts = [
        gpu.Part("kernels", python("exit(1)"), "checks.txt", "checks.txt", 60),
        gpu.Part("tests", python(both.format("one failed") + "; exit(1)"), "checks.txt", "checks.txt", 60),
        gpu.Part("sanitize", python("exit(3)"), "checks.txt", "checks.txt", 60, absent=(3,)),
        gpu.Part("ops", python(interrupted), "ops.txt", "ops.txt", 4, grace=15),
        gpu.Part("stubborn", python(stubborn), "stubborn.txt", "stubborn.txt", 1, grace=1),
        gpu.Part("step", python(both.format("{}")), "step.json", "step.txt", 60),
    ]
    (tmp_path / "step.json").write_text("of an earlier run")
    monkeypatch.setattr(gpu, "parts", lambda *arguments: parts)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU X")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # main clears it: put back at the end
    assert gpu.main([str(tmp_path)]) == 1
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert summary[0].startswith("GPU X, torch ")
    assert [line.split(",")[0] for line in summary[1:]] == [
        "kernels: skipped",
        "tests: RED (1)",
        "sanitize: skipped",
        "ops: RED (stopped after 4 s)",
        "stubborn: RED (stopped after 1 s)",
        "step: ok",
    ]
    checks = (tmp_path / "checks.txt").read_text().splitlines()
    assert sorted(checks) == ["== sanitize ==", "== tests ==", "log", "one failed"]
    assert (tmp_path / "ops.txt").read_text() == "== ops ==\nwritten at the end\n"
    assert capsys.readouterr().out.splitlines() == summary[1:]
    assert (tmp_path / "step.json").read_text() == "{}\n"
    assert (tmp_path / "step.txt").read_text() == "== step ==\nlog\n"


def test_the_gpu_run_ends_within_ten_minutes_and_leaves_eight_files(tmp_path: Path) -> None:
    parts = gpu.parts(tmp_path, "sm_90")
    assert [part.name for part in parts] == ["kernels", "tests", "sanitize", "ops", "step", "tune"]
    assert sum(part.seconds + part.grace for part in parts) == pytest.approx(gpu.SECONDS)
    assert gpu.SECONDS <= 570  # starting and installing take time too
    files = {name for part in parts for name in (part.file, part.log)} | {
        "summary.txt",
        "ops.json",
        "tune.json",
    }
    assert len(files) == 8
    assert next(part for part in parts if part.name == "sanitize").absent == (sanitize.ABSENT,)


def test_parts_alone_get_all_the_time_and_end_what_they_begin(tmp_path: Path) -> None:
    ops, tune = gpu.parts(tmp_path, "sm_90", ["tune", "ops"], 420)
    assert (ops.name, tune.name) == ("ops", "tune")
    assert ops.seconds + ops.grace + tune.seconds + tune.grace == pytest.approx(420)
    budget, seconds = (
        int(part.command[part.command.index(option) + 1])
        for part, option in ((ops, "--budget"), (tune, "--seconds"))
    )
    assert budget == int(ops.seconds) - 15
    assert seconds == int(tune.seconds) - 10
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path), "--parts", "nothing"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_the_gpu_run_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path / "results")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("make gpu needs a CUDA device")
    assert not (tmp_path / "results").exists()
