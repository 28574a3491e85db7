"""Everything that needs a device in one command: its parts, their time, what it leaves."""

import re
import signal
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


INTERRUPTED = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('written at the end')"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def faked(
    monkeypatch: pytest.MonkeyPatch, parts: list[gpu.Part], capability: tuple[int, int] = (9, 0)
) -> None:
    monkeypatch.setattr(gpu, "parts", lambda *arguments: parts)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU X")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # main clears it: put back at the end


def test_a_red_part_of_the_gpu_run_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both = "import sys; print('{}'); print('log', file=sys.stderr)"
    parts = [
        gpu.Part("kernels", python("exit(1)"), "checks.txt", "checks.txt", 60, grace=0),
        gpu.Part(
            "tests", python(both.format("one failed") + "; exit(1)"), "checks.txt", "checks.txt", 60, grace=0
        ),
        gpu.Part("sanitize", python("exit(3)"), "checks.txt", "checks.txt", 60, grace=0, absent=(3,)),
        gpu.Part("step", python(both.format("{}")), "step.json", "step.txt", 60, grace=0),
        gpu.Part("ops", python(INTERRUPTED), "ops.txt", "ops.txt", 30, grace=15),
        gpu.Part("tune", python("exit(1)"), "tune.txt", "tune.txt", 60, grace=0),
    ]
    (tmp_path / "step.json").write_text("of an earlier run")
    (tmp_path / "ops.part").write_text("of a part that was killed")
    faked(monkeypatch, parts, (8, 9))
    assert gpu.main([str(tmp_path), "--seconds", "30"]) == 1
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert summary[0].startswith("GPU X, torch ")
    assert [re.sub(r" \d+ s\)", " N s)", line.split(",")[0]) for line in summary[1:]] == [
        "kernels: skipped",
        "tests: RED (1)",
        "sanitize: skipped",
        "step: ok",
        "ops: RED (stopped after N s)",
        "tune: skipped",
    ]
    checks = (tmp_path / "checks.txt").read_text().splitlines()
    assert sorted(checks) == ["== sanitize ==", "== tests ==", "log", "one failed"]
    assert (tmp_path / "ops.txt").read_text() == "== ops ==\nwritten at the end\n"
    assert capsys.readouterr().out.splitlines() == summary[1:]
    assert (tmp_path / "step.json").read_text() == "{}\n"
    assert (tmp_path / "step.txt").read_text() == "== step ==\nlog\n"
    assert not (tmp_path / "ops.part").exists()


def test_in_the_background_of_a_script_a_part_is_interrupted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupts are ignored there, and who is started would ignore them as well."""
    faked(monkeypatch, [gpu.Part("ops", python(INTERRUPTED), "ops.txt", "ops.txt", 1, grace=15)])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert gpu.main([str(tmp_path), "--seconds", "18"]) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "ops.txt").read_text() == "== ops ==\nwritten at the end\n"


def test_a_part_that_ignores_an_interrupt_is_killed(tmp_path: Path) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    part = gpu.Part("ops", python(stubborn), "ops.txt", "ops.txt", 1, grace=1)
    assert gpu.run(part, tmp_path, 0.5).startswith("ops: RED (stopped after 0 s)")


def test_a_part_that_is_run_again_leaves_what_the_others_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("kernels", "tests", "sanitize")
    for code in (0, 1):
        say = f"print('run {code}'); exit({code})"
        faked(monkeypatch, [gpu.Part(name, python(say), "checks.txt", "checks.txt", 1) for name in names])
        assert gpu.main([str(tmp_path), *(("--parts", "tests") if code else ())]) == code
    runs = {"kernels": 0, "sanitize": 0, "tests": 1}  # the last one comes last
    assert (tmp_path / "checks.txt").read_text() == "".join(
        f"== {name} ==\nrun {code}\n" for name, code in runs.items()
    )
    verdicts = [line.partition(",")[0] for line in (tmp_path / "summary.txt").read_text().splitlines()[1:]]
    assert verdicts == ["kernels: ok", "sanitize: ok", "tests: RED (1)"]


def test_time_that_a_part_leaves_goes_to_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def run(part: gpu.Part, results: Path, seconds: float) -> str:
        given.append(seconds)
        return f"{part.name}: ok"

    monkeypatch.setattr(gpu, "run", run)
    faked(monkeypatch, gpu.parts(tmp_path, "sm_90"))
    assert gpu.main([str(tmp_path), "--parts", "kernels", "tune", "--seconds", "560"]) == 0
    assert given == pytest.approx([(560 - 15) * 50 / 125, 560 - 10], abs=1)
    given.clear()
    assert gpu.main([str(tmp_path)]) == 0
    assert given[0] == pytest.approx((gpu.SECONDS - 55) * 50 / 560, abs=1)
    assert given[-1] == pytest.approx(gpu.SECONDS - 10, abs=1)


def test_the_gpu_run_ends_within_ten_minutes_and_leaves_eight_files(tmp_path: Path) -> None:
    parts = gpu.parts(tmp_path, "sm_90")
    assert tuple(part.name for part in parts) == gpu.PARTS
    assert gpu.SECONDS <= 570  # starting and installing take time too
    files = {name for part in parts for name in (part.file, part.log)} | {
        "summary.txt",
        "ops.json",
        "tune.json",
    }
    assert len(files) == 8
    assert next(part for part in parts if part.name == "sanitize").absent == (sanitize.ABSENT,)


def test_parts_begin_nothing_more_before_their_end(tmp_path: Path) -> None:
    parts = {part.name: part for part in gpu.parts(tmp_path, "sm_90")}
    for name, option, seconds in (
        ("ops", "--budget", 85),
        ("tune", "--seconds", 90),
        ("sanitize", "--seconds", 95),
    ):
        command = parts[name].within(100.9)
        assert command[command.index(option) + 1] == str(seconds)
    assert parts["step"].within(100.0) == parts["step"].command
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path), "--parts", "nothing"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_the_gpu_run_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path / "results")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("make gpu needs a CUDA device")
    assert not (tmp_path / "results").exists()
