"""The whole training step (forward, backward, AdamW), variants side by side in one run.

`python -m benchmarks.bench_step --device cpu --preset small --batch 8 --json`. All variants are prepared in
one process and timed in rounds that alternate between them. Rates are read against the machine's own rate of
products (on a CPU the median of the rounds, as the times are) and against the floor of the step, by ceilings
measured in the same run. `benchmarks/step_variants.py` describes the variants. `--results` keeps a JSON file
that has each figure as soon as it is measured. The exit code is 1 if a variant fails, 130 if the run is
interrupted: what is measured by then is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings
from benchmarks.machine import Record
from benchmarks.step_rounds import STEPS, Comparison
from benchmarks.step_variants import CUDA_ONLY, VARIANTS, Search, Setting, search_of
from lmim_fast.config import ModelConfig, preset

_LEFT_OUT = ("ours+compile", "ours+epilogue", "ours+bias", "ours+rows")  # by default
_CPU_PRODUCT = 4096


def step_flops(config: ModelConfig) -> float:
    """FLOPs of a step for one image as the release computes it: 2 a multiply-add, backward twice the forward.

    Linears and attention products of both student branches, the teacher (forward only) and the decoder over
    all tokens; norms, GELU and softmax are not counted.
    """
    tokens, shown = config.num_patches + 1, config.num_visible + 1
    width, deep = config.width, config.decoder_width

    def encoder(count: int) -> float:
        linears = (4 + 2 * config.mlp_ratio) * width**2 * count
        attention = 2 * count**2 * width
        return 2 * (config.depth * (linears + attention) + config.num_patches * config.patch_pixels * width)

    layer = tokens * (4 + 2 + 2) * deep**2 + 4 * tokens**2 * deep + 2 * tokens * deep * config.decoder_ffn
    edges = (shown + tokens) * width * deep + tokens * deep * config.target_width
    decoder = 2 * (config.decoder_depth * layer + edges)
    teacher = encoder(tokens) if config.target == "teacher" else 0.0
    guidance = encoder(tokens) if config.guidance else 0.0
    return 3 * (encoder(shown) + guidance + decoder) + teacher


def main() -> int:
    arguments = _parse()
    device = torch.device(arguments.device)
    dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    low, flops = dtype == "bfloat16", step_flops(preset(arguments.preset))
    record = Record(arguments.results, "step", device, dtype=dtype, preset=arguments.preset)
    record.result |= {"flops_per_image": flops, "steps_a_round": STEPS[device.type]}
    record.result |= {"parts": []} if arguments.parts else {}
    rates = None
    if device.type == "cuda":
        rates = ceilings.measure(device, getattr(torch, dtype))
        torch.cuda.empty_cache()
        record.result |= {"ceilings": vars(rates), "gemm_size": 8192, "gemm_flops": rates.flops}
    else:
        record.result |= {"gemm_size": _CPU_PRODUCT, "gemm_flops": None}
        record.result["no_floor"] = "floors are counted for a GPU"
    settings = [
        Setting(_config(arguments, dropout, low), batch, arguments.device, low)
        for batch in arguments.batch
        for dropout in arguments.dropout
    ]
    comparison = Comparison(
        record,
        arguments.variants,
        settings,
        warmup=arguments.warmup,
        rounds=arguments.rounds,
        search=_search(arguments, record),
        flops=flops,
        parts=arguments.parts,
        ceilings=rates,
        products=_CPU_PRODUCT if rates is None and not arguments.steps_only else None,
        memory=not arguments.steps_only,
    )
    interrupted = False
    try:
        comparison.run()
    except torch.AcceleratorError:
        pass  # filed as a failure
    except KeyboardInterrupt:
        record.result["interrupted"] = interrupted = True
    record.result["headline"] = headline(record.result)
    record.write()
    code = 130 if interrupted else record.end()
    print(json.dumps(record.result) if arguments.json else text(record.result), flush=True)
    return code


def _search(arguments: argparse.Namespace, record: Record) -> Search:
    """How "compiled" is compiled: searched for, or the first that runs."""

    def report(searched: list[dict[str, Any]]) -> None:
        record.result["searched"] = searched
        record.write()

    return search_of(arguments.device, arguments.search)._replace(report=report)


def headline(result: dict[str, Any]) -> str:
    """Images a second of every row, in a line."""
    rows = [
        f"{row['variant']} {row['images_per_second']:,.0f}"
        + (f" ({row['share_of_floor']:.0%} of the floor)" if row["share_of_floor"] else "")
        + (" preliminary" if row.get("preliminary") else "")
        for row in result["rows"]
    ]
    return f"images/s: {', '.join(rows)}" if rows else "nothing measured"


def _config(arguments: argparse.Namespace, dropout: float, low: bool) -> ModelConfig:
    """`residual` is for ours: plain variants have their own."""
    residual = arguments.residual if low else "fp32"
    return preset(arguments.preset, decoder_dropout=dropout, residual=residual)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--preset", choices=["tiny", "small", "base"], default="small")
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        help=f"default: all but {', '.join(_LEFT_OUT)}, and ours+graph on cuda alone",
    )
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0])
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, float32 on cpu"
    )
    parser.add_argument(
        "--residual",
        choices=["fp32", "bf16"],
        default="bf16",
        help='residual stream of ours where products run in bf16; "compiled" has bf16 there',
    )
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--search",
        type=float,
        nargs="?",
        const=float("inf"),
        metavar="SECONDS",
        help='"compiled" tries every attention, then every mode, for so long: minutes on cuda',
    )
    parser.add_argument(
        "--parts", action="store_true", help="time forward and backward of the parts of a step too"
    )
    parser.add_argument(
        "--steps-only", action="store_true", help="on a CPU: no peak memory, no products in each round"
    )
    parser.add_argument("--results", type=Path, help="write the result into this JSON file, figure by figure")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.warmup < 0:
        parser.error(f"need a round at least, got --rounds {arguments.rounds} --warmup {arguments.warmup}")
    elsewhere = CUDA_ONLY if arguments.device != "cuda" else ()
    if arguments.variants is None:
        left_out = (*_LEFT_OUT, *elsewhere)
        arguments.variants = [variant for variant in VARIANTS if variant not in left_out]
    for variant in arguments.variants:
        if variant in elsewhere:
            parser.error(f"{variant} needs a CUDA device")
    return arguments


def text(result: dict[str, Any]) -> str:
    """Tables for a terminal: steps, their parts, what failed."""
    size, rate = result["gemm_size"], result["gemm_flops"]
    lines = [
        f"{result['device']}, {result['dtype']}, {result['preset']}; "
        f"product of {size}^3: {'-' if rate is None else f'{rate / 1e9:.0f}'} GFLOP/s"
    ]
    head = ("variant", "batch", "dropout", "ms", "images/s", "MFU", "of floor", "peak MB")
    lines.append("{:>13} {:>6} {:>8} {:>9} {:>9} {:>7} {:>9} {:>8}  compiled by".format(*head))
    for row in result["rows"]:
        share, chosen = row["share_of_floor"], row.get("chosen")
        lines.append(
            f"{row['variant']:>13} {row['batch']:>6} {row['dropout']:>8} "
            f"{statistics.median(row['milliseconds']):>9.1f} {row['images_per_second']:>9.2f} "
            f"{_percent(row['mfu']):>7} {_percent(share):>9} "
            f"{'-' if row['peak_memory'] is None else format(row['peak_memory'] / 1e6, '.0f'):>8}  "
            + (f"{chosen['mode']}, {chosen['attention']} attention" if chosen else "")
        )
    for row in result.get("parts", []):
        floor = row["floor_milliseconds"]
        lines.append(
            f"{row['variant']:>13} {row['batch']:>6} {row['dropout']:>8} {row['milliseconds']:>9.2f} ms "
            f"{'' if floor is None else f'(floor {floor:.2f}) '}{row['part']}, {row['direction']}"
        )
    lines += [f"{row['variant']}, batch {row['batch']}: FAILED: {row['error']}" for row in result["failed"]]
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


if __name__ == "__main__":
    sys.exit(main())
