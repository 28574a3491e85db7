"""One pass of every kernel under compute-sanitizer: what is run, and when a verdict counts."""

import dataclasses
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from torch import Tensor

from benchmarks import floors, kernel_pass, operations, planted_faults, sanitize
from benchmarks.operation import Operation, Unavailable, kernel_name
from lmim_fast.kernels import runtime
from lmim_fast.ops import dispatch
from lmim_fast.ops.gelu import bias_gelu

CPU = torch.device("cpu")


def test_the_operations_launch_every_kernel_that_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are recorded, not run: so at real lengths, in the 16 bits that the interpreter has."""
    launched, shipped = set[str](), operations.shipped_kernels()
    # The products of an MLP are run, which takes long at other sizes than the leading one.
    found = sorted(operations.every(1), key=lambda one: (not one.leading, one.name == "mlp"))
    for operation in found:
        if launched >= shipped:
            break
        for form in operation.ours.values():
            with runtime.recording((9, 0)) as recording, dispatch.backend("triton"):
                inputs = operation.inputs(CPU, torch.float16)
                try:
                    result = form(*inputs)
                except Unavailable:
                    continue
                outputs = [result] if isinstance(result, Tensor) else result
                if any(output.requires_grad for output in outputs):
                    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
            launched |= {kernel_name(launch.kernel) for launch in recording.launches}
    assert launched == shipped
    assert len(launched) == 22


def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return torch.randn(4, 32).requires_grad_(), torch.randn(32).requires_grad_()


def right(x: Tensor, bias: Tensor, seed: Tensor | None = None) -> Tensor:
    with dispatch.backend("triton"):
        return bias_gelu(x, bias)


def wrong(x: Tensor, bias: Tensor, seed: Tensor | None = None) -> Tensor:
    return right(x, bias) * 1.001


def failing(x: Tensor, bias: Tensor, seed: Tensor | None = None) -> Tensor:
    raise ValueError("does not compile")


def elsewhere(x: Tensor, bias: Tensor, seed: Tensor | None = None) -> Tensor:
    raise Unavailable("another GPU")


def plain(x: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x + bias.to(x.dtype))


def operation(form: Any) -> Operation:
    sizes = dict(model=form.__name__, batch=1, tokens=4, p=0.0)
    return Operation("gelu", sizes, inputs, plain, {"ours": form}, lambda *_: floors.bias_gelu(4, 32, 4))


def passing(monkeypatch: pytest.MonkeyPatch, forms: list[Any], shipped: set[str], only: str = "") -> bool:
    chosen = [operation(form) for form in forms]
    chosen[-1] = dataclasses.replace(chosen[-1], leading=True)
    monkeypatch.setattr(operations, "every", lambda batch: chosen)
    monkeypatch.setattr(operations, "shipped_kernels", lambda: shipped)
    return kernel_pass.run([16], only)


GELU = {"gelu._forward", "gelu._backward"}


def test_a_pass_tells_each_operation_and_its_kernels_leading_ones_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert passing(monkeypatch, [elsewhere, right], GELU)
    assert capsys.readouterr().out.splitlines() == [
        "1/2 gelu right B1 N4 ours: right, gelu._forward, gelu._backward",
        "2/2 gelu elsewhere B1 N4 ours: not here: another GPU",
        "2 kernels launched",
    ]


@pytest.mark.parametrize(
    ("form", "verdict"), [(wrong, "WRONG: tensor 0"), (failing, "FAILED: ValueError: does not compile")]
)
def test_a_wrong_or_failing_operation_is_red_and_the_next_one_runs(
    form: Any, verdict: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not passing(monkeypatch, [right, form], GELU)
    first, second, _ = capsys.readouterr().out.splitlines()
    assert verdict in first
    assert "right, gelu._forward" in second


def test_a_kernel_that_no_operation_launched_is_red(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not passing(monkeypatch, [right], {*GELU, "norm._forward"})
    assert capsys.readouterr().out.splitlines()[-1] == "2 kernels launched, not norm._forward"
    assert passing(monkeypatch, [right], {*GELU, "norm._forward"}, only="right")
    assert not passing(monkeypatch, [right], GELU, only="nothing is called so")


def test_a_device_that_does_not_answer_ends_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: Tensor, bias: Tensor, seed: Tensor | None = None) -> Tensor:
        raise torch.AcceleratorError("illegal memory access")

    with pytest.raises(torch.AcceleratorError):
        passing(monkeypatch, [right, broken], GELU)


@pytest.mark.parametrize(("tool", "name"), [("memcheck", "planted_write"), ("racecheck", "planted_race")])
def test_a_fault_is_planted_for_each_tool_and_compiles(tool: str, name: str) -> None:
    with runtime.recording((9, 0)) as recording:
        planted_faults.launch_faulty(tool, torch.device("meta"))
    assert [launch.kernel.fn.__name__ for launch in recording.launches] == [name]
    code = f"""
import sys, torch
from benchmarks import planted_faults, static_build
from lmim_fast.kernels import runtime
with runtime.recording((9, 0)) as recording:
    planted_faults.launch_faulty({tool!r}, torch.device("meta"))
for arch in static_build.ARCHES:
    build = static_build.specialise(recording.launches[0], static_build.target_of(arch))
    report = static_build.compile_build(build, arch)
    assert not report.failures, report.failures
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = forked.run("-c", code, env=environment)
    assert result.returncode == 0, result.stderr


def test_our_kernels_alone_are_watched_by_the_names_they_have_on_the_device() -> None:
    line = sanitize.command("/opt/compute-sanitizer", "racecheck", planted=False, only="gelu")
    watched = {name for option, name in itertools.pairwise(line) if option == "--kernel-name"}
    assert {"kernel_name=attention_forward", "kernel_name=_forward"} < watched
    assert len(watched) == 19  # three modules have a `_forward`, two a `_backward`
    assert line[-4:] == ["-m", "benchmarks.kernel_pass", "--only", "gelu"]
    assert "--report-api-errors" not in line
    planted = sanitize.command("/opt/compute-sanitizer", "memcheck", planted=True, only="")
    assert planted[-2:] == ["--planted", "memcheck"]
    assert planted.count("--kernel-name") == 1
    assert "kernel_name=planted_write" in planted
    assert "--report-api-errors" in planted
    assert planted[planted.index("--padding") + 1] == "512"
    ports = {
        line[line.index("--port") + 1]
        for tool in sanitize.TOOLS
        for fault in (False, True)
        if (line := sanitize.command("", tool, planted=fault, only=""))
    }
    assert len(ports) == 4


def verdict(code: str, *, planted: bool = False, seconds: float = 60) -> str:
    run = sanitize.start([sys.executable, "-c", code], "memcheck", planted=planted)
    sanitize.wait([run], seconds)
    sanitize.end([run])
    return run.verdict()


TOLD = "print('========= ERROR SUMMARY: 0 errors'); "
PASS = TOLD + "print('1/1 gelu ours: right, gelu._forward'); print('kernel pass: all well'); "


def test_a_run_counts_only_where_it_got_to_its_end_and_the_tool_looked() -> None:
    assert verdict(PASS) == "ok, nothing found in 1 operations"
    racecheck = PASS.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed")
    assert verdict(racecheck) == "ok, nothing found in 1 operations"
    assert verdict(PASS + "exit(77)") == "RED: found something"
    unseen = "RED: the tool does not say that it found nothing: it may not have looked"
    assert verdict(PASS.removeprefix(TOLD)) == unseen
    assert verdict(PASS.replace("SUMMARY: 0", "SUMMARY: 10")) == unseen
    assert verdict(PASS.removeprefix(TOLD) + "print('========= No attachable process found.')") == unseen
    assert verdict(TOLD + "print('1/2 gelu ours: right'); exit(0)").startswith("RED: exit code 0: 1/2 gelu")
    assert verdict("print('kernel pass: RED'); exit(1)") == "RED: exit code 1: kernel pass: RED"
    assert verdict("print('========= no device'); exit(255)") == "RED: exit code 255: it printed nothing"


def test_a_planted_fault_has_to_be_launched_and_found_by_its_name() -> None:
    launched = "print('kernel pass: the fault was launched'); "
    found = "print('=========     at planted_write+0x90'); "
    assert verdict(launched + found + "exit(77)", planted=True) == "ok, found the planted fault"
    assert verdict(launched + found, planted=True) == "RED: missed it (exit code 0)"
    assert verdict(launched + "exit(77)", planted=True) == "RED: missed it (exit code 77)"
    other = found.replace("planted_write", "attention_forward")
    assert verdict(launched + other + "exit(77)", planted=True) == "RED: missed it (exit code 77)"
    assert verdict(found + "exit(77)", planted=True).startswith("RED: the fault was not launched")


@pytest.mark.parametrize("survives", [False, True])
def test_only_the_fault_itself_is_forgiven(
    survives: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault that cannot be launched is an error; one that takes the context with it is not."""
    left: list[int] = []

    def fail() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure\nmore")

    def leave(code: int) -> None:
        left.append(code)
        raise SystemExit

    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    monkeypatch.setattr(kernel_pass, "launch_faulty", lambda *_: None if survives else fail())
    with pytest.raises(SystemExit if survives else RuntimeError):
        kernel_pass._launch_planted("memcheck")
    assert left == ([0] if survives else [])
    assert (kernel_pass.PLANTED in capsys.readouterr().out) is survives


def test_what_was_found_before_an_interruption_is_told_and_nothing_runs_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[sanitize.Run] = []
    start = sanitize.start

    def second_interrupted(line: list[str], tool: str, *, planted: bool) -> sanitize.Run:
        if started:
            raise KeyboardInterrupt
        started.append(start([sys.executable, "-c", "import time; time.sleep(60)"], tool, planted=planted))
        return started[0]

    monkeypatch.setattr(sanitize, "find", lambda: "compute-sanitizer")
    monkeypatch.setattr(sanitize, "start", second_interrupted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        sanitize.main([])
    assert capsys.readouterr().out.splitlines()[-1].startswith("sanitize: memcheck: RED: stopped")
    assert started[0].process.returncode == -9


def alive(number: str) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_run_that_takes_too_long_is_killed_with_what_it_started() -> None:
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run({[sys.executable, '-c', child]})"
    run = sanitize.start([sys.executable, "-c", code], "memcheck", planted=False)
    output = Path(f"/proc/self/fd/{run.output.fileno()}")
    while not (number := output.read_text().strip()):
        time.sleep(0.05)
    sanitize.wait([run], 0.1)
    sanitize.end([run])
    assert run.verdict() == f"RED: stopped, the time was up: {number}"
    deadline = time.monotonic() + 30  # it would live on for 60 s
    while alive(number) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(number)


def test_all_runs_are_told_and_one_red_one_is_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(sanitizer: str, tool: str, *, planted: bool, only: str) -> list[str]:
        found = planted or tool == "racecheck"
        text = (
            [kernel_pass.PLANTED, f"========= at {sanitize.FAULTS[tool].fn.__name__}"]
            if planted
            else [kernel_pass.DONE]
        )
        text += ["========= ERROR SUMMARY: 0 errors"] * (not found)
        return [sys.executable, "-c", f"print(*{text!r}, sep='\\n'); exit({77 * found})"]

    monkeypatch.setattr(sanitize, "find", lambda: "compute-sanitizer")
    monkeypatch.setattr(sanitize, "command", command)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sanitize.main(["--tool", "memcheck"]) == 0
    assert sanitize.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "sanitize: memcheck: ok, nothing found in 0 operations",
        "sanitize: memcheck, planted: ok, found the planted fault",
        "sanitize: racecheck: RED: found something",
        "sanitize: racecheck, planted: ok, found the planted fault",
    ]


def test_without_the_tool_or_a_device_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(sanitize, "find_spec", lambda name: None)
    assert sanitize.main([]) == sanitize.ABSENT
    assert "pip install nvidia-cuda-sanitizer-api" in capsys.readouterr().err
    tool = tmp_path / "bin/compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert sanitize.find() == str(tool)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitize.main([]) == sanitize.ABSENT
    assert "sees no CUDA device" in capsys.readouterr().err
