"""Everything that needs a CUDA device, in under eight minutes: GPU tests, op benchmarks, whole steps.

    python -m benchmarks.gpu RESULTS

RESULTS gets summary.txt, tests.txt, ops.txt (a table at its end), ops.json, and step and step_dropout, each
as .json and .txt. A red part does not stop the next; the exit code is 1 where any is red. Needs torch,
triton, numpy, pytest and pytest-benchmark only: tests that want more skip themselves with a reason.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Part(NamedTuple):
    """A command, stopped after `seconds`. Its output goes to `file`, what it says of errors to <name>.txt."""

    name: str
    command: list[str]
    file: str
    seconds: int


def parts(results: Path) -> list[Part]:
    """At most 470 seconds in all.

    Operations: 29 are compiled, at batch 512 alone, for both directions: 87 graphs at about 1 s each; 452
    other measurements are captured and replayed at about 0.15 s each. Should that be wrong, the budget ends
    the sweep, whose order is that of importance. Steps: in each of 4 settings every variant has two
    processes, for times and for memory, at about 10 s each.
    """
    pytest = [sys.executable, "-m", "pytest"]
    ops = ["--benchmark-only", "--benchmark-columns=median,min,rounds", "--batches", "512", "64"]
    ops += ["--compiled-batches", "512", "--budget", "190", "--results", str(results / "ops.json")]
    step = [sys.executable, "-m", "benchmarks.bench_step", "--device", "cuda", "--preset", "small"]
    step += ["--batch", "64", "512", "--json", "--dropout"]
    return [
        Part("tests", [*pytest, "-m", "gpu", *gpu_tests()], "tests.txt", 95),
        Part("ops", [*pytest, "benchmarks", *ops], "ops.txt", 215),
        Part("step", [*step, "0"], "step.json", 80),
        Part("step_dropout", [*step, "0.1"], "step_dropout.json", 80),
    ]


def gpu_tests() -> list[str]:
    """Test files with a GPU test: others may import what a GPU machine lacks."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = re.compile(r"^\s*@?(pytestmark = )?pytest\.mark\.gpu\b", re.MULTILINE)
    return [str(path.relative_to(ROOT)) for path in files if marked.search(path.read_text("utf-8"))]


@contextmanager
def importable() -> Iterator[None]:
    """In a plain checkout `kernels/` is linked to where an installed package has it, while it is needed."""
    probe = [sys.executable, "-c", "import lmim_fast.kernels"]
    if subprocess.run(probe, cwd=ROOT, capture_output=True, check=False).returncode == 0:
        yield
        return
    link = ROOT / "lmim_fast/kernels"
    link.symlink_to("../kernels", target_is_directory=True)
    try:
        yield
    finally:
        link.unlink()


def run(part: Part, results: Path) -> str:
    """Run a part; one line for the summary, "ok" in it where it is green."""
    start = time.monotonic()
    path, log = results / part.file, results / f"{part.name}.txt"
    with path.open("w") as output, log.open("a") as errors:
        try:
            code: int | str = subprocess.run(
                part.command, cwd=ROOT, stdout=output, stderr=errors, timeout=part.seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {part.seconds} s"
    verdict = "ok" if code == 0 else f"RED ({code})"
    return f"{part.name}: {verdict}, {time.monotonic() - start:.0f} s, see {path}"


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m benchmarks.gpu RESULTS", file=sys.stderr)
        return 2
    try:
        import torch
    except ImportError:
        print(f"make gpu needs torch in {sys.executable}; GPU_PYTHON chooses another Python", file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        print(
            f"make gpu needs a CUDA device; {sys.executable} with torch {torch.__version__} sees none",
            file=sys.stderr,
        )
        return 1
    results = Path(sys.argv[1])
    results.mkdir(parents=True, exist_ok=True)
    os.environ.pop("TRITON_INTERPRET", None)
    (results / "summary.txt").write_text(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    red = False
    with importable():
        for part in parts(results.resolve()):
            line = run(part, results)
            red |= ": ok" not in line
            print(line, flush=True)
            with (results / "summary.txt").open("a") as file:
                file.write(line + "\n")
    if (results / "ops.json").exists():
        from benchmarks.tables import ops_page

        with (results / "ops.txt").open("a") as file:
            file.write("\n" + ops_page(results / "ops.json"))
    return int(red)


if __name__ == "__main__":
    sys.exit(main())
