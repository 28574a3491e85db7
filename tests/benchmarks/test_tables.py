"""The page of results."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import static, tables

MACHINE = dict(
    device="GPU X", cores=16, threads=8, versions=dict(python="3.12.1", triton="3.6.0"), commit="abc"
)


def op_row(
    variant: str, microseconds: list[float], direction: str = "forward", **sizes: Any
) -> dict[str, Any]:
    return dict(
        operation="dropout_add_layer_norm",
        sizes=dict(model="ViT-S", batch=512, tokens=257, width=384, p=0.0) | sizes,
        direction="forward",
        variant=variant,
        form="kernels _forward",
        floor_us=94.0,
        percent_of_floor=94.0,
        gigabytes_per_second=4042.1,
        teraflops_per_second=0.0,
        flops=0.0,
        microseconds=microseconds,
    )


def test_an_operation_has_a_line_a_size_with_the_medians_of_its_variants(tmp_path: Path) -> None:
    rows = [
        op_row("compiled", [130.0]),
        op_row("ours", [99.0, 100.0, 300.0]),
        op_row("ours", [140.0], residual="float32"),
        op_row("ours", [15.0], batch=64),
        op_row("eager", [400.0, 410.0, 420.0]),
    ]
    ceilings = dict(bandwidth=4.3e12, flops=7.9e14, exponentials=3.86e12)
    path = tmp_path / "ops.json"
    path.write_text(json.dumps(dict(benchmark="ops", **MACHINE, ceilings=ceilings, rows=rows)))
    page = tables.render(tmp_path)
    assert "Ceilings: copy 4,300 GB/s, GEMM 790.00 TFLOP/s, 3.86 T exponentials/s." in page
    lines = page.splitlines()
    start = lines.index("### dropout_add_layer_norm") + 2
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:]]
    assert shown[0][3:5] == ["ours us", "of floor"]
    by_size = {line[0]: dict(zip(shown[0], line, strict=True)) for line in shown[2:]}
    assert list(by_size) == [
        "ViT-S B64 N257 D384",
        "ViT-S B512 N257 D384",
        "ViT-S B512 N257 D384 residual float32",
    ]
    main = by_size["ViT-S B512 N257 D384"]
    assert (main["ours us"], main["eager us"], main["compiled us"]) == ("100.0", "410.0", "130.0")
    assert (main["GB/s"], main["TFLOP/s"], main["ours ran"]) == ("4,042", "-", "kernels _forward")
    assert by_size["ViT-S B64 N257 D384"]["compiled us"] == ""


def test_compiled_kernels_are_summed_up_by_their_worst_for_each_compiler(tmp_path: Path) -> None:
    def row(registers: int, warps: int, failures: list[str]) -> dict[str, Any]:
        resources = dict(registers=registers, spilled=0, shared=1024, threads=128, mma=dict(wgmma=8))
        occupancy = dict(warps_per_multiprocessor=warps)
        return dict(kernel="lmim_fast.kernels.norm:_forward", failures=failures, **resources, **occupancy)

    def of(version: str, *rows: dict[str, Any]) -> dict[str, Any]:
        return dict(
            benchmark="static", **MACHINE | dict(device="sm_90", versions=dict(triton=version)), rows=rows
        )

    spilling = row(128, 16, ["spills 8 bytes a thread"])
    static.write(
        tmp_path, [of("3.7.1", row(64, 32, []), row(96, 20, [])), of("3.6.0", row(64, 32, []), spilling)]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["static_sm90.json"]
    page = tables.render(tmp_path)
    first, second = page.split("Triton 3.6.0")
    assert "Triton 3.7.1" in first
    assert "| `norm._forward` | 2 | 96 | 0 | 1024 | 128 | 20 - 32 | wgmma | 0 |" in first
    assert "| `norm._forward` | 2 | 128 | 0 | 1024 | 128 | 16 - 32 | wgmma | 1 |" in second


def step_row(variant: str, milliseconds: list[float], **fields: Any) -> dict[str, Any]:
    return dict(variant=variant, batch=512, dropout=0.0, milliseconds=milliseconds, peak_memory=3e6) | fields


def step_page(tmp_path: Path, rows: list[dict[str, Any]], **fields: Any) -> str:
    result = MACHINE | dict(benchmark="step", preset="small", dtype="bfloat16", rows=rows) | fields
    (tmp_path / "step.json").write_text(json.dumps(result))
    return tables.render(tmp_path)


def test_a_step_is_compared_with_the_first_variant_of_the_same_setting(tmp_path: Path) -> None:
    known = dict(mfu=0.5, share_of_floor=0.75)
    chosen = dict(mode="default", attention="cudnn")
    rows = [step_row("compiled", [200.0], chosen=chosen, **known)]
    rows += [step_row("ours", [49.0, 50.0, 80.0], **known)]
    rows += [
        step_row("compiled", [300.0], **known, dropout=0.1),
        step_row("ours", [60.0], **known, dropout=0.1),
    ]
    page = step_page(tmp_path, rows, gemm_flops=7e14, gemm_size=8192, failed=[])
    assert "8192^3 product: 700,000 GFLOP/s" in page
    assert (
        "| compiled | 512 | 0.0 | 200.0 | 2,560.00 | 50% | 75% | 3 | 1.00x | default, cudnn attention |"
        in page
    )
    assert "| ours | 512 | 0.0 | 50.0 | 10,240.00 | 50% | 75% | 3 | 4.00x |  |" in page
    assert "| ours | 512 | 0.1 | 60.0 | 8,533.33 | 50% | 75% | 3 | 5.00x |  |" in page


def test_the_goal_of_a_known_card_stands_beside_what_ours_reached(tmp_path: Path) -> None:
    known = dict(mfu=0.5, share_of_floor=0.75)
    rows = [step_row(name, [100.0], **known) for name in ("compiled", "ours+graph")]
    rows += [step_row("ours", [100.0], **known, dropout=0.1), step_row("ours", [9.0], **known, batch=64)]
    for card, goal in (("NVIDIA H200", "7,100"), ("NVIDIA H100 80GB HBM3", "5,960")):
        page = step_page(tmp_path, rows, gemm_flops=7e14, gemm_size=8192, device=card)
        lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
        assert lines[0][-1] == "goal images/s"
        goals = {tuple(line[:3]): line[-1] for line in lines[2:]}
        assert goals["ours+graph", "512", "0.0"] == goal
        assert sum(value == goal for value in goals.values()) == 1
    assert "goal" not in step_page(tmp_path, rows, gemm_flops=7e14, gemm_size=8192)


def test_a_step_without_a_common_round_is_called_preliminary(tmp_path: Path) -> None:
    rows = [step_row("ours", [50.0], mfu=0.5, share_of_floor=None, preliminary=True)]
    page = step_page(tmp_path, rows, gemm_flops=7e14, gemm_size=8192)
    assert "| ours (preliminary) | 512 |" in page


def test_results_of_a_dry_run_are_refused_and_those_without_a_table_left_out(tmp_path: Path) -> None:
    (tmp_path / "tests.json").write_text(json.dumps(dict(benchmark="tests", **MACHINE, rows=[])))
    assert tables.render(tmp_path).endswith("PENDING.md`.\n")
    (tmp_path / "step.json").write_text(json.dumps(dict(benchmark="step", dry_run=True, **MACHINE, rows=[])))
    with pytest.raises(ValueError, match=r"step.json is of a dry run"):
        tables.render(tmp_path)


def test_products_which_are_the_library_s_stand_where_ours_would(tmp_path: Path) -> None:
    rows = [
        dict(op_row(name, [time]), operation="linear_wgrad")
        for name, time in (("eager", 94.0), ("fp32 out", 80.0))
    ]
    ceilings = dict(bandwidth=4.3e12, flops=7.9e14, exponentials=None)
    (tmp_path / "ops.json").write_text(
        json.dumps(dict(benchmark="ops", **MACHINE, ceilings=ceilings, rows=rows))
    )
    head, _, line = [row for row in tables.render(tmp_path).splitlines() if row.startswith("| ")]
    cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert (cells["eager us"], cells["of floor"], cells["fp32 out us"]) == ("94.0", "94%", "80.0")


def test_the_profile_and_the_comparison_with_the_oracle_have_tables(tmp_path: Path) -> None:
    totals = dict(variant="ours", wall_milliseconds=90.0, busy_milliseconds=81.0, host_milliseconds=30.0)
    totals |= dict(cpu_milliseconds=35.0, idle_share=0.1, launches=247.0)
    row = dict(variant="ours", kernel="attention|fwd", calls=36.0, microseconds=900.0, share=0.25)
    result = dict(benchmark="profile", **MACHINE, preset="small", totals=[totals], rows=[row])
    (tmp_path / "profile.json").write_text(json.dumps(result))
    errors = dict(residual="bf16", plain_error=1e-3, allowed=3e-3)
    tensors = [
        dict(tensor="loss", error=1e-3, right=True, **errors),
        dict(tensor="a", error=9e-3, right=False, **errors),
    ]
    result = dict(benchmark="parity", **MACHINE, preset="small", batch=64, rows=tensors)
    (tmp_path / "parity.json").write_text(json.dumps(result))
    page = tables.render(tmp_path)
    assert "| ours | 90.00 | 81.00 | 30.00 | 35.00 | 10% | 247 |" in page
    assert "| `attention/fwd` | 36.0 | 900.0 | 25.0% |" in page
    assert "2 tensors against fp32, 1 of them wrong" in page
    assert "| a | bf16 | 9.00e-03 | 1.00e-03 | 3.00e-03 |" in page


def test_steps_measured_before_floors_were_counted_are_shown(tmp_path: Path) -> None:
    page = step_page(tmp_path, [step_row("ours", [50.0], share_of_gemm_rate=0.5)], gemm_4096_flops=7e14)
    assert "4096^3 product: 700,000 GFLOP/s" in page
    assert "| ours | 512 | 0.0 | 50.0 | 10,240.00 | 50% |  | 3 | 1.00x |  |" in page


def test_steps_without_a_rate_of_products_are_shown(tmp_path: Path) -> None:
    rows = [step_row("ours", [50.0], mfu=None, share_of_floor=None)]
    page = step_page(tmp_path, rows, gemm_flops=None, gemm_size=4096)
    assert "product" not in page
    assert "| ours | 512 | 0.0 | 50.0 | 10,240.00 |  |  | 3 | 1.00x |  |" in page


def test_parts_of_a_step_stand_beside_their_floors(tmp_path: Path) -> None:
    part = dict(
        variant="ours", batch=512, dropout=0.0, part="decoder", direction="backward", milliseconds=9.5
    )
    parts = [part | dict(floor_milliseconds=7.6), part | dict(part="masks", floor_milliseconds=None)]
    rows = [step_row("ours", [50.0], mfu=0.5, share_of_floor=None)]
    page = step_page(tmp_path, rows, gemm_flops=7e14, gemm_size=8192, parts=parts)
    assert "| decoder | backward | ours | 512 | 0.0 | 9.50 | 7.60 |" in page
    assert "| masks | backward | ours | 512 | 0.0 | 9.50 |  |" in page


def test_the_page_of_results_is_the_one_that_the_results_give() -> None:
    assert tables.main(["--check"]) == 0, "run python -m benchmarks.tables"


def test_a_stale_page_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "BENCHMARKS.md"
    assert tables.main(["--output", str(page)]) == 0
    assert tables.main(["--output", str(page), "--check"]) == 0
    page.write_text(page.read_text().replace("images/s", "pictures/s"))
    assert tables.main(["--output", str(page), "--check"]) == 1
    assert "is stale" in capsys.readouterr().err
