"""A stage of the GPU run: its parts, their time, what it leaves however it ends."""

import argparse
import importlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import pytest
import torch

from benchmarks import gpu, gpu_part, gpu_stages, gpu_summary, gpu_tests, sanitize, static_cases
from benchmarks.gpu_stages import Part

ROOT = Path(__file__).parents[2]
MOST_FILES = 8


def fake(behaviour: str, seconds: float = 30, **options: Any) -> Part:
    return Part(behaviour, ["tests.benchmarks.fake_part", behaviour], seconds, **options)


def staged(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *parts: Part, seconds: float = 60
) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code of a dry run of these parts, and their results."""
    monkeypatch.setattr(gpu_stages, "parts", lambda *arguments: list(parts))
    code = gpu.main([str(folder), "--stage", "1", "--dry-run", "--seconds", str(seconds)])
    return code, results(folder)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {one["part"]: one for one in found}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_parts_that_die_are_wrong_or_lack_a_tool_leave_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [fake(name) for name in ("crash", "wrong", "absent", "silent", "few")]
    code, found = staged(monkeypatch, tmp_path, *parts)
    assert code == 1
    verdicts = {name: one["verdict"] for name, one in found.items()}
    assert verdicts == dict(crash="red", wrong="red", absent="absent", silent="red", few="green")
    assert (len(found["crash"]["rows"]), found["crash"]["exit"]) == (1, -signal.SIGSEGV)
    assert found["absent"]["output"] == "absent begins\nthere is no compute-sanitizer\n"
    assert all(one["dry_run"] and one["versions"]["torch"] and one["seconds"] > 0 for one in found.values())
    assert names(tmp_path) == {f"light_{part.name}.json" for part in parts} | {"summary.txt"}
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert summary[0].startswith("DRY RUN, no figure counts: ")
    told = [line.partition(",")[0] for line in summary[1:]]
    assert told == [
        "light crash: RED (-11)",
        "light wrong: RED (1)",
        "light absent: absent",
        "light silent: RED",
        "light few: green",
    ]
    assert summary[2].endswith("attention: WRONG: tensor 0")
    assert summary[3].endswith("there is no compute-sanitizer")
    assert summary[5].endswith("all is well")
    assert capsys.readouterr().out.splitlines() == summary[1:]


@pytest.mark.parametrize(
    ("behaviours", "code"), [(["few", "absent"], 0), (["absent", "absent"], 3), (["crash", "few"], 1)]
)
def test_the_exit_code_says_green_red_or_absent(
    behaviours: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [fake(name)._replace(name=f"{number}") for number, name in enumerate(behaviours)]
    assert staged(monkeypatch, tmp_path, *parts)[0] == code


def test_what_is_only_reported_does_not_turn_a_stage_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, found = staged(monkeypatch, tmp_path, fake("crash", reports=True), fake("few"))
    assert (code, found["crash"]["verdict"]) == (0, "red")
    assert "light crash: RED (-11) (reported only)" in (tmp_path / "summary.txt").read_text()


def test_a_part_over_its_limit_is_stopped_with_its_figures_and_the_rest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_part, "GRACE", 1.0)
    parts = [fake("figures", 1), fake("stubborn", 1), fake("nothing", 1), fake("few", 3)]
    start = time.monotonic()
    code, found = staged(monkeypatch, tmp_path, *parts, seconds=19)
    assert time.monotonic() - start < 25
    assert code == 1  # nothing was measured by one of them
    verdicts = {name: one["verdict"] for name, one in found.items()}
    assert verdicts == dict(figures="partial", stubborn="partial", nothing="red", few="green")
    assert found["figures"]["exit"] == "stopped after 3 s"
    assert found["figures"]["rows"]
    assert names(tmp_path) == {f"light_{part.name}.json" for part in parts} | {"summary.txt"}


def test_results_do_not_name_the_folders_of_the_machine(tmp_path: Path) -> None:
    text = f"{tmp_path}/light_step.json and {ROOT}/benchmarks/gpu.py"
    found = gpu_part._without_places(dict(failed=[dict(error=text)], output=text), tmp_path)
    assert found["output"] == "RESULTS/light_step.json and ./benchmarks/gpu.py"
    assert found["failed"] == [dict(error=found["output"])]


def test_a_stopped_part_that_had_found_something_wrong_is_red() -> None:
    known = dict(rows=[1], failed=[1], verdict="red")
    assert gpu_part._verdict(fake("few"), known, -2, "stopped after 3 s", True) == "red"
    assert (
        gpu_part._verdict(fake("few"), known | dict(verdict="unfinished"), -2, "stopped", True) == "partial"
    )


def test_time_that_a_part_leaves_goes_to_those_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []

    def run(part: Part, path: Path, seconds: float, environment: dict[str, str]) -> dict[str, Any]:
        given.append(seconds)
        return dict(verdict="green", rows=[], failed=[], exit=0, seconds=0.0)

    monkeypatch.setattr(gpu_part, "run", run)
    staged(monkeypatch, tmp_path, fake("a", 30), fake("b", 10), fake("c", 60), seconds=105)
    assert given == pytest.approx([30, 100 * 10 / 70, 100], abs=1)


def test_suspicious_kernels_that_fail_are_left_out_of_the_parts_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = "attention.backward.32=cudnn"
    seen = fake("environment")
    after, watched = seen._replace(name="after"), seen._replace(name="watched", routed=False)
    code, found = staged(monkeypatch, tmp_path, seen, fake("crash", remedy=route), after, watched)
    assert code == 1
    assert found["watched"]["seen"]["LMIM_FAST_ROUTES"] is None  # a checker looks at the kernel itself
    assert found["environment"]["seen"] == dict(LMIM_FAST_ROUTES=None, LMIM_FAST_DRY_RUN="1")
    assert found["after"]["seen"]["LMIM_FAST_ROUTES"] == found["after"]["routes"] == route
    assert f"REMEDY: export LMIM_FAST_ROUTES='{route}'" in (tmp_path / "summary.txt").read_text()
    _, found = staged(monkeypatch, tmp_path, fake("few", remedy=route), seen)
    assert found["environment"]["seen"]["LMIM_FAST_ROUTES"] is None
    assert "REMEDY" not in (tmp_path / "summary.txt").read_text()


# Sends itself the signal so long after a part begins.
INTERRUPTED = """
import os, signal, sys, threading, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
folder, seconds, kind, part = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
def interrupt():
    while not list(folder.glob(f"light_{part}.log")):
        time.sleep(0.01)
    time.sleep(seconds)
    os.kill(os.getpid(), kind)
threading.Thread(target=interrupt, daemon=True).start()
"""


def interrupted_stage(
    folder: Path, seconds: float, kind: signal.Signals, code: str, part: str = "*"
) -> tuple[int, str]:
    """Interrupt a stage so long after a part begins; its exit code and what it printed."""
    result = forked.run("-c", INTERRUPTED + code, str(folder), str(seconds), str(int(kind)), part)
    return result.returncode, result.stdout + result.stderr


FAKE_STAGE = """
from benchmarks import gpu, gpu_stages
from benchmarks.gpu_stages import Part
names = ["few", "figures", "never"]
parts = [Part(name, ["tests.benchmarks.fake_part", name], 60) for name in names]
gpu_stages.parts = lambda *arguments: parts
sys.exit(gpu.main([sys.argv[1], "--dry-run"]))
"""


@pytest.mark.parametrize("number", range(5))
def test_an_interrupt_at_any_instant_leaves_whole_results(number: int, tmp_path: Path) -> None:
    moment = random.Random(number).uniform(0, 2)  # the first part ends within the first second
    kind = (signal.SIGINT, signal.SIGTERM)[number % 2]
    folder = tmp_path / "results"
    code, output = interrupted_stage(folder, moment, kind, FAKE_STAGE)
    assert code == 130, output
    found = results(folder)
    assert set(found) in ({"few"}, {"few", "figures"})
    last = found[max(found, key=lambda name: found[name]["order"])]
    assert last["verdict"] in (("interrupted",) if "figures" in found else ("interrupted", "green"))
    if "figures" in found:
        numbers = [row["number"] for row in found["figures"]["rows"]]
        assert numbers == list(range(len(numbers)))
    assert names(folder) == {f"light_{name}.json" for name in found} | {"summary.txt"}
    assert len((folder / "summary.txt").read_text().splitlines()) == 1 + len(found)


STAGE_ONE = "from benchmarks import gpu; sys.exit(gpu.main([sys.argv[1], '--dry-run']))"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["compile", "hazard", "parity", "step", "profile", "ops"])
def test_a_real_part_that_is_interrupted_leaves_whole_results(part: str, tmp_path: Path) -> None:
    folder, moment = tmp_path / "results", random.Random(part).uniform(0, 1.5)
    code, output = interrupted_stage(folder, moment, signal.SIGINT, STAGE_ONE, part)
    assert code == 130, output
    verdicts = {name: one["verdict"] for name, one in results(folder).items()}
    assert verdicts.pop(part) in ("interrupted", "green")
    assert set(verdicts.values()) <= {"green"}
    assert not [name for name in names(folder) if not name.endswith((".json", "summary.txt"))]


def dry_run(folder: Path, stage: int) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.gpu", str(folder), "--stage", str(stage), "--dry-run"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    found = {name: one for name, one in results(folder).items() if one["stage"] == stage}
    order = sorted(found, key=lambda name: found[name]["order"])
    assert order == [part.name for part in gpu_stages.parts(stage, folder, "sm_90", True)]
    for name, one in found.items():
        absent = one["command"][0] == "benchmarks.sanitize"
        assert one["verdict"] == ("absent" if absent and not sanitize.find() else "green"), (
            name,
            one["output"],
        )
        assert one["dry_run"]
        assert one["rows"] or absent or name == "compile"
    return found


@pytest.mark.slow
def test_a_dry_run_of_the_light_stage_has_every_part_in_order_with_figures(tmp_path: Path) -> None:
    found = dry_run(tmp_path, 1)
    assert sorted(found, key=lambda name: found[name]["order"]) == [
        "compile", "hazard", "parity", "step", "profile", "ops", "memcheck",
    ]  # fmt: skip
    assert len(names(tmp_path)) == MOST_FILES
    assert [row["variant"] for row in found["step"]["rows"]] == ["ours"]
    assert found["parity"]["rows"][0]["tensor"] == "loss"
    totals = found["profile"]["totals"][0]
    assert totals["launches"] > 100
    assert 0 <= totals["idle_share"] < 1
    assert {row["operation"] for row in found["ops"]["rows"]} == {
        "linear_forward", "linear_dgrad", "linear_wgrad", "self_attention", "layer_norm",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3, 4])
def test_a_dry_run_of_the_other_stages_has_every_part_in_order_with_figures(
    stage: int, tmp_path: Path
) -> None:
    found = dry_run(tmp_path, stage)
    if stage == 2:
        assert [row["variant"] for row in found["step"]["rows"]] == ["ours", "compiled", "ours+compile"]
        assert found["dropout"]["rows"][0]["dropout"] == 0.1


class Parsed(Exception):
    pass


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("stage", gpu_stages.NAMES)
def test_every_part_is_a_program_that_takes_its_options(
    stage: int, dry: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = argparse.ArgumentParser.parse_known_args

    def parsed(self: argparse.ArgumentParser, *arguments: Any) -> Any:
        _, rest = parse(self, *arguments)
        raise Parsed(rest)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parsed)
    for part in gpu_stages.parts(stage, tmp_path, "sm_90", dry):
        _, _, name, *options = part.line(tmp_path / "x.json", 50)
        monkeypatch.setattr(sys, "argv", [name, *options])
        with pytest.raises(Parsed) as caught:
            importlib.import_module(name).main()
        to_pytest = ["-q", "-n", "0", "-p", "no:cacheprovider", "tests/benchmarks/test_floors.py"]
        assert caught.value.args[0] == (to_pytest if name == "benchmarks.gpu_tests" and dry else [])


@pytest.mark.parametrize("stage", gpu_stages.NAMES)
def test_a_stage_leaves_eight_files_at_most_and_ends_within_its_time(stage: int, tmp_path: Path) -> None:
    parts = gpu_stages.parts(stage, tmp_path, "sm_90", False)
    assert len(parts) + 1 <= MOST_FILES
    assert sum(part.seconds for part in parts) == gpu_stages.SECONDS <= 200
    for part in parts:
        line = part.line(tmp_path / "x.json", 50.9)
        assert ("--results" in line) == part.files
        assert not part.option or int(line[line.index(part.option) + 1]) == 50 - part.reserve


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: the parts would run")
@pytest.mark.parametrize("stage", gpu_stages.NAMES)
def test_parts_take_the_options_that_they_get_on_a_device(stage: int, tmp_path: Path) -> None:
    """Without a device they end at once, but not for their options (exit code 2)."""
    for part in gpu_stages.parts(stage, tmp_path, "sm_90", False):
        if part.command[0] in ("benchmarks.static", "benchmarks.gpu_tests", "benchmarks.ops_run"):
            continue  # they run without a device
        line = part.line(tmp_path / "x.json", 50)
        result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode in (1, sanitize.ABSENT), result.stderr


def test_the_light_stage_compiles_what_it_runs_and_no_more() -> None:
    compile, *_ = gpu_stages.parts(1, Path(), "sm_90", False)
    only = compile.command[compile.command.index("--only") + 1]
    chosen = [label for label, _ in static_cases.cases() if re.search(only, label)]
    attention = "attention ViT-S 257", "attention decoder 205 x 257"
    rows = "GELU ViT-S", "LayerNorm decoder", "tokens decoder", "append rows", "feature loss"
    for wanted in (*attention, *rows, "patch embed ViT-S", "patch selection"):
        assert any(wanted in label for label in chosen), wanted
    assert not [label for label in chosen if "ViT-B" in label or " float16" in label or "linear" in label]


def test_files_with_gpu_tests_are_found_and_others_left_alone() -> None:
    found = gpu_tests.files()
    assert "tests/models/test_lmim_cuda.py" in found
    assert "tests/data/test_pipeline_cuda.py" in found
    assert "tests/ops/test_philox.py" not in found
    assert "tests/benchmarks/test_harness.py" not in found


def test_failing_tests_turn_their_part_red_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "test_two.py"
    path.write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    arguments = [
        "--results",
        str(tmp_path / "tests.json"),
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        str(path),
    ]
    assert forked.run("-m", "benchmarks.gpu_tests", *arguments).returncode == 1
    found = json.loads((tmp_path / "tests.json").read_text())
    assert [row["outcome"] for row in found["rows"]] == ["passed", "failed"]
    assert "assert 1 == 2" in found["failed"][0]["error"]
    assert found["headline"] == "1 passed, 1 failed, 0 skipped"


def test_tests_that_are_stopped_by_their_time_are_not_red(tmp_path: Path) -> None:
    path, results = tmp_path / "test_long.py", tmp_path / "tests.json"
    path.write_text("import time\ndef test_good(): pass\ndef test_long(): time.sleep(60)\n")
    code = """
import json, os, signal, sys, threading, time
from pathlib import Path
from benchmarks import gpu_tests
results = Path(sys.argv[2])
def interrupt():
    while not results.exists() or not json.loads(results.read_text())["rows"]:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
sys.exit(gpu_tests.main(sys.argv[1:]))
"""
    arguments = ["--results", str(results), "-q", "-n", "0", "-p", "no:cacheprovider", str(path)]
    result = forked.run("-c", code, *arguments)
    assert result.returncode == 130, result.stdout + result.stderr
    found = json.loads(results.read_text())
    assert (found["verdict"], found["headline"]) == ("unfinished", "1 passed, 0 failed, 0 skipped")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_a_stage_is_absent(tmp_path: Path) -> None:
    result = forked.run("-m", "benchmarks.gpu", str(tmp_path / "results"), "--stage", "1")
    assert result.returncode == 3
    assert result.stderr.startswith("make gpu needs a CUDA device")
    assert not (tmp_path / "results").exists()


def test_a_summary_covers_all_stages_of_a_folder_and_says_what_of_the_goals_is_reached(
    tmp_path: Path,
) -> None:
    machine = dict(device="NVIDIA H200", versions=dict(torch="2.11", triton="3.6"), commit="abc")

    def part(stage: int, name: str, *rows: tuple[str, int, float, float, float]) -> None:
        keys = "variant", "batch", "dropout", "images_per_second", "peak_memory"
        result = dict(
            benchmark="step", preset="small", rows=[dict(zip(keys, row, strict=True)) for row in rows]
        )
        result |= dict(stage=stage, order=0, part=name, verdict="green", exit=0, counts=True, seconds=9.0)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(machine | result | dict(failed=[], output="")))

    part(2, "released", ("released", 512, 0.0, 2000.0, 63e9))
    part(1, "step", ("ours", 512, 0.0, 7000.0, 10e9), ("ours+graph", 512, 0.0, 7200.0, 12e9))
    part(2, "rivals", ("compiled", 512, 0.0, 4000.0, 30e9), ("ours", 64, 0.0, 6480.0, 1e9))
    part(2, "dropout", ("ours", 512, 0.1, 6840.0, 10e9))
    assert gpu_summary.text(tmp_path).splitlines() == [
        "NVIDIA H200, torch 2.11, triton 3.6, commit abc",
        "light step: green, 9 s",
        "rivals dropout: green, 9 s",
        "rivals released: green, 9 s",
        "rivals rivals: green, 9 s",
        "Goals:",
        "B=512: 7,200 images/s (ours+graph), goal 7,100",
        "3.60x released, goal 3.0x",
        "1.80x compiled, goal 1.6x",
        "peak memory 0.40 of compiled, goal 0.6",
        "B=64 (ours): 0.90 of the rate at 512, goal 0.9",
        "dropout 0.1: 0.95 of the rate without, goal 0.95",
    ]
