"""The whole training step (forward, backward, AdamW), variants side by side in one run.

`python -m benchmarks.bench_step --device cpu --preset small --batch 8 --json`. Each variant has a process;
rounds alternate between the variants, so that noise hits all alike. Peak memory is measured apart.
Rates are read against the machine's own GEMM rate, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from lmim_fast.config import ModelConfig, preset
from lmim_fast.models.lmim import LMIM
from lmim_fast.reference import ReferenceLMIM

VARIANTS: dict[str, Callable[[ModelConfig], torch.nn.Module]] = {
    "released": ReferenceLMIM,  # eager, explicit softmax attention, every token decoded
    "ours": LMIM,
}


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


def gemm_rate(device: torch.device, dtype: torch.dtype, size: int = 4096, rounds: int = 3) -> float:
    """FLOP/s of the fastest of `rounds` square products."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(rounds + 1):
        _synchronise(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training_step(
    variant: str, config: ModelConfig, batch: int, device: torch.device, low: bool
) -> Callable[[], None]:
    """A closure that runs one step of `variant` on fixed random crops."""
    torch.manual_seed(0)
    model = VARIANTS[variant](config).to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    images, guidance = (torch.rand(batch, 3, *config.image_size, device=device) * 2 - 1 for _ in range(2))
    generator = torch.Generator().manual_seed(1)

    def step() -> None:
        noise = torch.rand(batch, config.num_patches, generator=generator).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
            loss = model(images, guidance, noise).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _serve_steps(
    pipe: Connection, variant: str, config: ModelConfig, batch: int, device: str, low: bool
) -> None:
    """Child process: the milliseconds of one step for each message True."""
    place = torch.device(device)
    step = training_step(variant, config, batch, place, low)
    pipe.send("ready")
    while pipe.recv():
        _synchronise(place)
        start = time.perf_counter()
        step()
        _synchronise(place)
        pipe.send((time.perf_counter() - start) * 1e3)


def _serve_memory(
    pipe: Connection, variant: str, config: ModelConfig, batch: int, device: str, low: bool
) -> None:
    """Child process: peak bytes of a step, weights and optimiser state included.

    On CUDA the allocator's peak. On a CPU the growth of the resident set after a tiny step (so without the
    libraries), with an allocator that gives freed tensors back at once (see `measure_memory`).
    """
    place = torch.device(device)
    if place.type == "cuda":
        step = training_step(variant, config, batch, place, low)
        step()
        torch.cuda.reset_peak_memory_stats(place)
        step()
        pipe.send(torch.cuda.max_memory_allocated(place))
        return
    training_step(variant, preset("tiny", decoder_dropout=config.decoder_dropout), batch, place, low)()
    before = _resident("VmRSS")
    step = training_step(variant, config, batch, place, low)
    for _ in range(2):
        step()
    pipe.send(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status: peak memory on a CPU is measured on Linux only")


def _start(target: Callable[..., None], *arguments: Any) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def measure_times(
    variants: list[str], config: ModelConfig, batch: int, device: str, low: bool, warmup: int, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each round for each variant; a round runs every variant once."""
    workers = {variant: _start(_serve_steps, variant, config, batch, device, low) for variant in variants}
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for pipe, _ in workers.values():
        pipe.recv()
    for number in range(warmup + rounds):
        for variant, (pipe, _) in workers.items():
            pipe.send(True)
            milliseconds = pipe.recv()
            if number >= warmup:
                times[variant].append(milliseconds)
    for pipe, process in workers.values():
        pipe.send(False)
        process.join()
    return times


def measure_memory(variant: str, config: ModelConfig, batch: int, device: str, low: bool) -> int:
    """Peak bytes of a step of `variant` in a process of its own."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(256 * 1024)  # read by glibc when the child starts
    try:
        pipe, process = _start(_serve_memory, variant, config, batch, device, low)
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
    peak: int = pipe.recv()
    process.join()
    return peak


def measure(
    variants: list[str], config: ModelConfig, batch: int, device: str, dtype: str, warmup: int, rounds: int
) -> list[dict[str, Any]]:
    """A row a variant: milliseconds of each round, images/s of the median round, peak memory in bytes."""
    low = dtype == "bfloat16"
    times = measure_times(variants, config, batch, device, low, warmup, rounds)
    return [
        {
            "variant": variant,
            "batch": batch,
            "dropout": config.decoder_dropout,
            "images_per_second": batch / statistics.median(times[variant]) * 1e3,
            "milliseconds": times[variant],
            "peak_memory": measure_memory(variant, config, batch, device, low),
        }
        for variant in variants
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--preset", choices=["tiny", "small", "base"], default="small")
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0])
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, float32 on cpu"
    )
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    device = torch.device(arguments.device)
    rate = gemm_rate(device, getattr(torch, dtype))
    rows = []
    for batch in arguments.batch:
        for dropout in arguments.dropout:
            config = preset(arguments.preset, decoder_dropout=dropout)
            sizes = (batch, arguments.device, dtype, arguments.warmup, arguments.rounds)
            rows += measure(arguments.variants, config, *sizes)
    flops = step_flops(preset(arguments.preset))
    for row in rows:
        row["share_of_gemm_rate"] = row["images_per_second"] * flops / rate
    result = {
        "benchmark": "step",
        **describe(device),
        "dtype": dtype,
        "preset": arguments.preset,
        "gemm_4096_flops": rate,
        "flops_per_image": flops,
        "rows": rows,
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{result['device']}, {dtype}, {arguments.preset}: 4096^3 product {rate / 1e9:.0f} GFLOP/s")
    print(
        f"{'variant':>10} {'batch':>6} {'dropout':>8} {'ms':>9} {'images/s':>9} {'of GEMM':>8} {'peak MB':>8}"
    )
    for row in rows:
        milliseconds = statistics.median(row["milliseconds"])
        print(
            f"{row['variant']:>10} {row['batch']:>6} {row['dropout']:>8} {milliseconds:>9.1f} "
            f"{row['images_per_second']:>9.2f} {row['share_of_gemm_rate']:>8.1%} "
            f"{row['peak_memory'] / 1e6:>8.0f}"
        )


if __name__ == "__main__":
    main()
