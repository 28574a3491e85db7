"""How long training stands still for a checkpoint: written here and now, and by a thread of its own.

    python -m benchmarks.bench_checkpoint [--preset small] [--rounds 5] [--folder DIR] [--results FILE]

The model is that of LMIM pre-training with AdamW's moments. Here and now is `save` and `wait`, as a run
without a thread would do; asynchronous is `save` alone. Both take turns, after a save each that makes room.
Between them the thread is waited for: its time is "background". On CUDA the stall is that of the host; the
copies keep the stream busy for "device" milliseconds, during which kernels that follow wait.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.machine import describe
from benchmarks.tables_parallel import checkpoint as render
from lmim_fast.config import OptimConfig, PretrainConfig, preset
from lmim_fast.train import optim
from lmim_fast.train.checkpoint.saver import Saver
from lmim_fast.train.tasks import make_task
from lmim_fast.train.world import World

_ROWS = ("here and now", "asynchronous", "background", "device")


def measure(name: str, rounds: int, folder: Path, device: torch.device) -> tuple[dict[str, list[float]], int]:
    """Milliseconds of every round, by row, and the bytes of a checkpoint."""
    config = PretrainConfig(data=("none",), teacher="random", model=preset(name))
    model = make_task(config).build().to(device)
    groups = optim.decay_groups(model, config.optim.weight_decay)
    optimizer = optim.make_optimizer(groups, OptimConfig())
    optimizer.make_state()
    cuda = device.type == "cuda"
    times: dict[str, list[float]] = {row: [] for row in _ROWS if cuda or row != "device"}
    size = 0
    with Saver(folder, World(0, 1, device), keep=1) as saver:
        for step in range(1, 2 * rounds + 3):
            row = "here and now" if step % 2 else "asynchronous"
            if cuda:
                torch.cuda.synchronize()
                events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                events[0].record()
            start = time.perf_counter()
            saver.save({"step": step}, model, optimizer)
            saved = time.perf_counter()
            if cuda:
                events[1].record()
            saver.wait()
            end = time.perf_counter()
            (path,) = saver.published()
            size = sum(file.stat().st_size for file in path.iterdir())
            if step <= 2:
                continue
            times[row].append(1e3 * ((saved if row == "asynchronous" else end) - start))
            if row == "asynchronous":
                times["background"].append(1e3 * (end - saved))
                if cuda:
                    times["device"].append(events[0].elapsed_time(events[1]))
    return times, size


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="small", choices=("tiny", "small", "base"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="on the disk to measure; default: of temporary files")
    parser.add_argument("--results", help="write the result there")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        times, size = measure(args.preset, args.rounds, Path(folder), device)
    result = describe(device) | dict(benchmark="checkpoint", preset=args.preset, bytes=size)
    result |= dict(milliseconds=times)
    print(render(result))
    if args.results:
        Path(args.results).write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
