"""One stage of what needs a CUDA device, within SECONDS: see `benchmarks/gpu_stages.py`.

    python -m benchmarks.gpu RESULTS --stage 1|2|3|4 [--seconds 190] [--dry-run]

RESULTS gets a JSON file a part, `<stage>_<part>.json`, which has each figure as soon as it is measured, and
summary.txt. Time that a part leaves goes to those after it; at its limit it is interrupted, then killed. One
that dies does not stop the next. Exit code 0: green; 1: a part is red, or had no time to measure anything; 3:
no CUDA device; 130: interrupted, with all that was measured. Needs torch, triton, numpy and pytest only.
`--dry-run` rehearses the stage on a CPU: same processes, order and limits, tiny shapes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks import gpu_stages

_ABSENT, _INTERRUPTED = 3, 130
_DRY = {
    "LMIM_FAST_DRY_RUN": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--stage", type=int, choices=gpu_stages.NAMES, default=1)
    parser.add_argument("--seconds", type=float, default=gpu_stages.SECONDS)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    missing = None
    try:
        import torch
    except ImportError:
        missing = f"torch in {sys.executable}; GPU_PYTHON chooses another Python"
    else:
        if not args.dry_run and not torch.cuda.is_available():
            missing = f"a CUDA device; {sys.executable} with torch {torch.__version__} sees none"
    if missing is not None:
        print(f"make gpu needs {missing}", file=sys.stderr)
        return _ABSENT
    from benchmarks import gpu_part

    folder: Path = args.results.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with gpu_part.signals_noted():
        return _run_stage(folder, args.stage, args.seconds, args.dry_run)


def _run_stage(folder: Path, stage: int, seconds: float, dry: bool) -> int:
    """Run the parts; the exit code."""
    import torch

    from benchmarks import gpu_part, gpu_summary, machine

    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | (_DRY if dry else {})
    environment.pop("TRITON_INTERPRET", None)
    deadline, verdicts = time.monotonic() + seconds, list[str]()
    capability = (9, 0) if dry else torch.cuda.get_device_capability()
    known = machine.describe(torch.device("cpu" if dry else "cuda")) | ({"dry_run": True} if dry else {})
    for earlier in folder.glob(f"{gpu_stages.NAMES[stage]}_*"):
        earlier.unlink()
    todo = gpu_stages.parts(stage, folder, "sm_{}{}".format(*capability), dry)
    for number, part in enumerate(todo):
        if gpu_part.interrupted:
            break
        path = folder / f"{gpu_stages.NAMES[stage]}_{part.name}.json"
        left = deadline - time.monotonic() - gpu_part.GRACE
        share = part.seconds / sum(later.seconds for later in todo[number:])
        result = known | gpu_part.run(part, path, max(1.0, left * share), environment)
        result |= {"stage": stage, "order": number, "part": part.name, "counts": not part.reports}
        if part.remedy and result["verdict"] not in ("green", "absent"):
            environment[gpu_part.ROUTES] = result["remedy"] = part.remedy
        machine.write_whole(path, result)
        verdicts += [] if part.reports else [result["verdict"]]
        print(gpu_summary.line(result), flush=True)
        gpu_summary.write(folder)
    if gpu_part.interrupted:
        return _INTERRUPTED
    return 1 if "red" in verdicts else _ABSENT if set(verdicts) == {"absent"} else 0


if __name__ == "__main__":
    sys.exit(main())
