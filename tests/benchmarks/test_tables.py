"""The page of results."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables

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


def test_compiled_kernels_are_summed_up_by_their_worst(tmp_path: Path) -> None:
    def row(registers: int, warps: int, failures: list[str]) -> dict[str, Any]:
        resources = dict(registers=registers, spilled=0, shared=1024, threads=128, mma=dict(wgmma=8))
        occupancy = dict(warps_per_multiprocessor=warps)
        return dict(kernel="lmim_fast.kernels.norm:_forward", failures=failures, **resources, **occupancy)

    rows = [row(64, 32, []), row(128, 16, ["spills 8 bytes a thread"])]
    (tmp_path / "static.json").write_text(json.dumps(dict(benchmark="static", **MACHINE, rows=rows)))
    assert "| `norm._forward` | 2 | 128 | 0 | 1024 | 128 | 16 - 32 | wgmma | 1 |" in tables.render(tmp_path)


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
