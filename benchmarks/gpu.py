"""Everything that needs a CUDA device, in under ten minutes: kernels, tests, op benchmarks, whole steps.

    python -m benchmarks.gpu RESULTS

RESULTS gets summary.txt, kernels.txt, tests.txt, ops.txt (a table at its end), ops.json, step.json, and
step.txt with what the steps say of errors; results that were there are deleted. A red part does not stop the
next; the exit code is 1 where any is red. Needs torch, triton, numpy, pytest and pytest-benchmark only: tests
that want more skip themselves with a reason.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Part(NamedTuple):
    """A command: its output goes to `file`, what it says of errors to `log`.

    It is interrupted after `seconds`, and killed `grace` seconds later: pytest writes its results meanwhile.
    """

    name: str
    command: list[str]
    file: str
    log: str
    seconds: int
    grace: int = 5


def parts(results: Path, arch: str) -> list[Part]:
    """At most 545 seconds in all, those between interruption and end included.

    Kernels: a static check, which should also fill Triton's cache from all cores, so that later parts do not
    compile one kernel after the other. Operations: torch.compile takes most, at about 1 s for each of 144
    graphs at batch 512, the only one it is timed at; other measurements are captured and replayed at about
    0.15 s each. The budget ends the sweep, whose order is that of importance: batch 64 comes last. Steps: the
    compiled variant takes most, so all its graphs are compiled at once before any step is timed; then batch
    512 comes first, and what is measured by an interruption is written.
    """
    kernels = [sys.executable, "-m", "benchmarks.static", "--arch", arch, "--only", "bfloat16"]
    kernels += ["--jobs", str(len(os.sched_getaffinity(0)))]
    pytest = [sys.executable, "-m", "pytest"]
    tests = ["-m", "gpu", "-v", "--durations=10", "--tb=short"]
    ops = ["--benchmark-only", "--benchmark-columns=median,min,rounds", "--batches", "512", "64"]
    ops += ["--compiled-batches", "512", "--budget", "110", "--results", str(results / "ops.json")]
    step = [sys.executable, "-m", "benchmarks.bench_step", "--device", "cuda", "--preset", "small"]
    step += ["--variants", "released", "sdpa", "compiled", "ours", "ours+graph", "--batch", "512", "64"]
    step += ["--dropout", "0", "0.1", "--warmup", "1", "--parts", "--json"]
    return [
        Part("kernels", kernels, "kernels.txt", "kernels.txt", 40),
        Part("tests", [*pytest, *tests, *gpu_tests()], "tests.txt", "tests.txt", 110, grace=15),
        Part("ops", [*pytest, "benchmarks", *ops], "ops.txt", "ops.txt", 130, grace=15),
        Part("step", step, "step.json", "step.txt", 215, grace=15),
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
    path = results / part.file
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with path.open("a") as output, (results / part.log).open("a") as errors:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=output, stderr=errors, start_new_session=True
        )
        try:
            code: int | str = process.wait(part.seconds)
        except subprocess.TimeoutExpired:
            code = f"stopped after {part.seconds} s"
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(part.grace)
        finally:
            with suppress(ProcessLookupError):  # processes that it left would slow the next part down
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
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
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    todo = parts(results.resolve(), arch)
    for name in {"ops.json", *(part.file for part in todo), *(part.log for part in todo)}:
        (results / name).unlink(missing_ok=True)
    red = False
    with importable():
        from benchmarks.static_build import ARCHES

        for part in todo:
            if part.name == "kernels" and arch not in ARCHES:
                line = f"kernels: skipped, there is no static check for {arch}"
            else:
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
