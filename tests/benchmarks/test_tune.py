"""Launch configurations that are tried: what is changed, compiled, measured and told."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from torch import Tensor

from benchmarks import floors, operations, static_cases, tables, tune, tune_static
from benchmarks.operation import Operation
from benchmarks.static_build import Report
from benchmarks.tune_static import Attempt, Compiled
from benchmarks.tune_studies import BACKEND_STUDY, SHIPPED, Candidate, Study, Trial, studies
from lmim_fast.kernels import attention, attention_backward, gelu, runtime
from lmim_fast.ops import attention_backends


@pytest.mark.parametrize("study", studies(), ids=lambda study: study.name)
def test_a_study_names_what_there_is(study: Study) -> None:
    """Each name is one of a kernel's module, each trial one operation at both batches and its launches."""
    labels = [label for label, _ in static_cases.cases()]
    for trial in study.trials:
        assert sum(bool(re.search(trial.case, label)) for label in labels) == 1, trial.case
        assert "p0" not in trial.operation or study.compiles  # other backends take no seed
        for batch in (512, tune.CHECKED_BATCH):
            assert study.variant in tune.find(trial.operation, batch).ours
    candidates = study.candidates()
    assert candidates[0] == Candidate(SHIPPED, {})
    assert len({candidate.label for candidate in candidates}) == len(candidates)
    for candidate in candidates:
        with candidate.applied():
            pass


@pytest.mark.parametrize("study", [one for one in studies() if one.compiles], ids=lambda study: study.name)
def test_every_value_that_is_changed_arrives_in_a_launch(study: Study) -> None:
    """One name after the other takes its values, the others their first."""
    cases = dict(static_cases.cases())
    call = next(call for label, call in cases.items() if re.search(study.trials[0].case, label))
    for name, values in study.grid.items():
        launched = set()
        for value in values:
            changes = {other: found[0] for other, found in study.grid.items()} | {name: value}
            with Candidate("", changes).applied(), runtime.recording((9, 0)) as recording:
                call()
            told = [(one.grid, one.constants, one.options) for one in recording.launches]
            launched.add(str(told))
        assert len(launched) > len(values) / 2, name  # a tile may be cut to what there is


def test_studies_are_chosen_by_name() -> None:
    names = [study.name for study in studies("^attention")]
    assert names == ["attention backward", "attention forward", BACKEND_STUDY]


def test_an_operation_that_is_not_one_is_an_error() -> None:
    with pytest.raises(LookupError, match="names 0 operations"):
        tune.find("nothing B{B}", 16)
    with pytest.raises(LookupError, match=r"names \d+ operations, not one: self_attention"):
        tune.find("^self_attention", 16)


def test_changes_are_in_force_inside_alone() -> None:
    before, blocks = gelu.FORWARD_TILE, attention_backward.Blocks(16, 32, 64, 4)
    shipped = attention_backward._blocks(256, 64, 0, wgmma=True)
    with Candidate("", {"gelu.FORWARD_TILE": 1, "attention_backward._blocks()": blocks}).applied():
        assert gelu.FORWARD_TILE == 1
        assert attention_backward._blocks(256, 64, threshold=0, wgmma=True) == blocks
    assert before == gelu.FORWARD_TILE
    assert attention_backward._blocks(256, 64, 0, wgmma=True) == shipped != blocks
    with pytest.raises(AttributeError, match="NOTHING"), Candidate("", {"gelu.NOTHING": 1}).applied():
        pass


def test_an_attention_backend_is_a_candidate_that_needs_no_compilation() -> None:
    (study,) = studies(BACKEND_STUDY)
    assert not study.compiles
    found = {}
    for candidate in study.candidates():
        with candidate.applied():
            found[candidate.label] = attention_backends.current()
    assert found == {
        SHIPPED: "auto",
        "backend=triton": "triton",
        "backend=cudnn": "cudnn",
        "backend=sdpa": "sdpa",
        "backend=flash": "flash",
    }
    attempts = list(tune_static.compile_attempts(BACKEND_STUDY, "sm_90", 1))
    assert [one.reports for one in attempts] == [[]] * 5 * len(study.trials)


def test_values_are_tried_in_all_combinations_and_named() -> None:
    grid = {"gelu.MAX_BLOCK": (256, 512), "attention.BLOCKS": [attention.Blocks(16, 0, 64, 4)]}
    found = Study("", "", (), grid).candidates()
    blocks = "queries=16, transposed=0, keys=64, num_warps=4, num_stages=1"
    assert [one.label for one in found] == [SHIPPED, f"MAX_BLOCK=256, {blocks}", f"MAX_BLOCK=512, {blocks}"]
    assert found[1].changes == {"gelu.MAX_BLOCK": 256, "attention.BLOCKS": attention.Blocks(16, 0, 64, 4)}


def test_without_a_gpu_configurations_are_compiled_once_and_told(tmp_path: Path) -> None:
    """Of six combinations one is what is shipped."""
    path = tmp_path / "tune.json"
    command = ["-m", "benchmarks.tune", "--static", "--only", "tokens forward", "--jobs", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = forked.run(*command, "--results", str(path), env=environment)
    assert result.returncode == 0, result.stderr
    found = json.loads(path.read_text())
    assert found["device"] == "sm_90"
    rows = found["rows"]
    assert [row["candidate"] for row in rows] == [
        SHIPPED,
        "FORWARD_TILE=2048, NUM_WARPS=4",
        "FORWARD_TILE=2048, NUM_WARPS=8",
        "FORWARD_TILE=4096, NUM_WARPS=8",
        "FORWARD_TILE=8192, NUM_WARPS=4",
        "FORWARD_TILE=8192, NUM_WARPS=8",
    ]
    names = [[kernel["kernel"] for kernel in row["kernels"]] for row in rows]
    assert all("lmim_fast.kernels.tokens:_decoder_tokens" in found for found in names)
    forward = [row["kernels"][names[0].index("lmim_fast.kernels.tokens:_decoder_tokens")] for row in rows]
    assert forward[4]["registers"] > forward[1]["registers"] > 0
    assert len(result.stdout.splitlines()) == 6
    page = tables.tune(found)
    assert "### decoder tokens forward: bytes in flight\n\ntokens decoder .* bfloat16, forward\n" in page
    assert "| FORWARD_TILE=8192, NUM_WARPS=4 |  |  |  |" in page


BROKEN = 13.0


def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(64, 32, dtype=dtype).requires_grad_(),)


def form(x: Tensor, seed: Tensor | None = None) -> Tensor:
    if gelu.FACTOR == BROKEN:
        raise torch.AcceleratorError("illegal memory access")
    if gelu.FACTOR is None:
        raise ValueError("out of resources")
    return 2 * x * gelu.FACTOR


def twice(batch: int) -> Operation:
    sizes = dict(model="test", batch=batch, tokens=64, p=0.0)
    passes = lambda itemsize, training: floors.layer_norm(64, 32, itemsize, itemsize)  # noqa: E731
    return Operation("twice", sizes, inputs, lambda x: 2 * x, {"ours": form}, passes)


def group(
    monkeypatch: pytest.MonkeyPatch, *candidates: tuple[str, dict[str, Any], list[Report]]
) -> list[Compiled]:
    monkeypatch.setattr(operations, "every", lambda batch: [twice(batch)])
    monkeypatch.setattr(gelu, "FACTOR", 1.0, raising=False)
    study = Study("doubling", "nothing", (), {}, direction="forward+backward")
    trial = Trial("^twice test B{B} N64$", "^case$")
    return [
        Compiled(Attempt(study, trial, Candidate(label, changes)), reports)
        for label, changes, reports in candidates
    ]


def report(**values: Any) -> Report:
    return Report("lmim_fast.kernels.gelu:_forward", "", [], **values)


def test_configurations_are_checked_and_timed_in_turn_and_failures_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = group(
        monkeypatch,
        (SHIPPED, {}, [report(registers=40, warps_per_multiprocessor=32)]),
        ("wrong", {"gelu.FACTOR": 1.01}, []),
        ("failing", {"gelu.FACTOR": None}, []),
        ("uncompiled", {}, [report(failures=["does not compile: X"])]),
        ("spilling a little", {}, [report(spilled=8, failures=["spills 8 bytes a thread"])]),
        ("spilling", {}, [report(spilled=999, failures=["spills 999 bytes a thread"])]),
    )
    rows = list(tune.measure(found, 4, float("inf")))
    by_label = {row["candidate"]: row for row in rows}
    assert list(by_label) == [one.attempt.candidate.label for one in found]
    for label in (SHIPPED, "spilling a little"):
        row = by_label[label]
        assert "failure" not in row
        assert len(row["microseconds"]) == tune.ROUNDS
        assert min(row["microseconds"]) > 0
        assert row["floor_us"] > 0
        assert row["sizes"]["batch"] == 4
    assert by_label["wrong"]["failure"].startswith("AssertionError: tensor 0 is wrong")
    assert by_label["failing"]["failure"] == "ValueError: out of resources"
    assert by_label["uncompiled"]["failure"] == "does not compile: X"
    assert by_label["spilling"]["failure"] == "spills 999 bytes a thread: not run"
    lines = list(map(tune.told, rows))
    assert re.match(
        r"doubling \| \^case\$ \| shipped \| 40 registers, 32 warps/SM \| \d+\.\d us, \d+%", lines[0]
    )
    assert lines[2].endswith("FAILED ValueError: out of resources")

    path = tmp_path / "tune.json"
    record = tune.record_of(path, "sm_90", static=False)
    for row in rows:
        record.add(row)
    page = tables.render(tmp_path)
    assert "### doubling: nothing\n\ntwice test B4 N64, forward+backward\n" in page
    shipped = next(line for line in page.splitlines() if line.startswith("| shipped |"))
    assert "| 1.00x |" in shipped
    assert shipped.endswith("| 40 | 0 | 32 |  |")
    assert "| wrong |  |  |  |  |  |  | AssertionError: tensor 0 is wrong" in page
    order = [
        line.split(" | ")[0] for line in page.splitlines() if re.match(r"\| (shipped|wrong|spilling)", line)
    ]
    assert order[-2:] == ["| wrong", "| spilling"]


def test_a_configuration_that_breaks_the_device_is_told_with_those_before_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The rows come first, so that they are written."""
    found = group(monkeypatch, (SHIPPED, {}, []), ("bad", {"gelu.FACTOR": BROKEN}, []), ("next", {}, []))
    rows: list[dict[str, Any]] = []
    with pytest.raises(torch.AcceleratorError):
        rows.extend(tune.measure(found, 4, float("inf")))
    assert [row["candidate"] for row in rows] == [SHIPPED, "bad"]
    assert rows[1]["failure"] == "AcceleratorError: illegal memory access"
    assert "microseconds" not in rows[0]
    assert capsys.readouterr().out.splitlines()[-1] == "doubling | ^case$ | bad runs"


def test_no_configuration_is_captured_after_its_time_but_what_was_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = group(monkeypatch, (SHIPPED, {}, []), ("late", {}, []))
    (row,) = tune.timed(found, 4, -1.0)
    assert (row["candidate"], len(row["microseconds"])) == (SHIPPED, tune.ROUNDS)
    assert capsys.readouterr().err == "tune: time is up at late of doubling, ^case$\n"


def test_every_row_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "tune.json", []

    def measure(*arguments: Any) -> Iterator[dict[str, Any]]:
        for case in ("a", "a", "b"):
            seen.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
            yield dict(study="s", case=case, candidate=SHIPPED, kernels=[])
        seen.append(len(json.loads(path.read_text())["rows"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "without_interpreter", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--results", str(path)])
    assert seen == [0, 1, 2, 3]
    found = json.loads(path.read_text())
    assert (len(found["rows"]), found["arch"]) == (3, "sm_90")


def test_no_study_is_begun_after_its_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = group(monkeypatch, (SHIPPED, {}, []))
    assert list(tune.measure(found, 4, -1.0)) == []
    assert capsys.readouterr().err == "tune: time is up before doubling, ^case$\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_only_compiling_is_offered() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = forked.run("-m", "benchmarks.tune", env=environment)
    assert result.returncode == 1
    assert "sees no CUDA device; --static needs none" in result.stderr
