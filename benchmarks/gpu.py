"""Everything that needs a CUDA device, in under ten minutes: correctness, op benchmarks, tuning, whole steps.

    python -m benchmarks.gpu RESULTS [--parts NAME ...] [--seconds N]

kernels   compiles them all, which the other parts then need not do one after the other
tests     the tests marked gpu
sanitize  compute-sanitizer over one pass of every kernel
ops       every operation against its floor and its rivals
step      whole training steps and their parts
tune      launch configurations, tried

RESULTS gets checks.txt (the first three), ops.json and ops.txt (a table at its end), step.json and step.txt,
tune.json and tune.txt, and summary.txt; of parts that are run again, earlier results are deleted. Each part
takes what matters most first, and is stopped when its share of the time is used up. A red part does not stop
the next; the exit code is 1 where any is red. Needs torch, triton, numpy, pytest and pytest-benchmark only:
tests that want more skip themselves with a reason. With pytest-xdist tests run in several processes.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]


SECONDS = 560  # starting, and getting the results back, have to fit into ten minutes too
_TEST_PROCESSES = 6
_ABSENT = 3  # exit code of benchmarks/sanitize.py, which cannot be imported in a plain checkout


class Part(NamedTuple):
    """A command: its output goes to `file`, what it says of errors to `log`.

    It is interrupted after `seconds`, and killed `grace` seconds later: pytest writes its results meanwhile.
    Exit codes in `absent` say that the machine lacks what the part needs: it is skipped.
    """

    name: str
    command: list[str]
    file: str
    log: str
    seconds: float
    grace: int = 5
    absent: tuple[int, ...] = ()


# Shares of the time when all parts are run. Compiling takes 10 to 15 s on 16 cores; of the operations
# torch.compile takes most, at 1 s or more for each of 144 graphs at batch 512, the only one it is timed at;
# of the steps too, so all graphs are compiled at once before any step is timed.
_SHARES = {"kernels": 50, "tests": 110, "sanitize": 50, "ops": 115, "step": 150, "tune": 85}
PARTS = tuple(_SHARES)


def parts(results: Path, arch: str, names: Sequence[str] = PARTS, seconds: float = SECONDS) -> list[Part]:
    """The parts in their order; all take at most `seconds`, those between interruption and end included."""
    grace = {name: 5 if name in ("kernels", "sanitize") else 10 for name in names}
    shares = sum(_SHARES[name] for name in names)
    left = seconds - sum(grace.values())

    def part(name: str, command: list[str], file: str = "checks.txt", log: str = "", **more: Any) -> Part:
        limit = left * _SHARES[name] / shares if name in names else 0
        return Part(name, command, file, log or file, limit, grace.get(name, 0), **more)

    def within(name: str, reserve: int) -> str:
        """Seconds after which a part should begin nothing more, `reserve` before its end."""
        return str(max(1, int(left * _SHARES[name] / shares - reserve)))

    python, cores = sys.executable, str(len(os.sched_getaffinity(0)))
    kernels = [python, "-m", "benchmarks.static", "--arch", arch, "--only", "bfloat16", "--jobs", cores]
    pytest = [python, "-m", "pytest"]
    tests = ["-m", "gpu", "-v", "--durations=10", "--tb=short", *gpu_tests()]
    if find_spec("xdist") is not None:
        tests += ["-n", str(_TEST_PROCESSES)]
    ops = ["--benchmark-only", "--benchmark-columns=median,min,rounds", "--batches", "512", "64"]
    ops += [
        "--compiled-batches",
        "512",
        "--budget",
        within("ops", 15),
        "--results",
        str(results / "ops.json"),
    ]
    step = [python, "-m", "benchmarks.bench_step", "--device", "cuda", "--preset", "small"]
    step += ["--variants", "released", "sdpa", "compiled", "ours", "ours+graph", "--batch", "512", "64"]
    step += ["--dropout", "0", "0.1", "--warmup", "1", "--parts", "--json"]
    tune = [
        python,
        "-m",
        "benchmarks.tune",
        "--seconds",
        within("tune", 10),
        "--results",
        str(results / "tune.json"),
    ]
    sanitize = [python, "-m", "benchmarks.sanitize", "--seconds", within("sanitize", 3)]
    every = [
        part("kernels", kernels),
        part("tests", [*pytest, *tests]),
        part("sanitize", sanitize, absent=(_ABSENT,)),
        part("ops", [*pytest, "benchmarks", *ops], "ops.txt"),
        part("step", step, "step.json", "step.txt"),
        part("tune", tune, "tune.txt"),
    ]
    return [found for found in every if found.name in names]


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
        errors.write(f"== {part.name} ==\n")
        errors.flush()
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=output, stderr=errors, start_new_session=True
        )
        try:
            code: int | str = process.wait(part.seconds)
        except subprocess.TimeoutExpired:
            code = f"stopped after {part.seconds:.0f} s"
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(part.grace)
        finally:
            with suppress(ProcessLookupError):  # processes that it left would slow the next part down
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    verdict = "ok" if code == 0 else "skipped" if code in part.absent else f"RED ({code})"
    return f"{part.name}: {verdict}, {time.monotonic() - start:.0f} s, see {path}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="NAME")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    args = parser.parse_args(argv)
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
    results: Path = args.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    os.environ.pop("TRITON_INTERPRET", None)
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    with importable():
        return _run_all(results, arch, args.parts, args.seconds, title)


def _run_all(results: Path, arch: str, names: Sequence[str], seconds: float, title: str) -> int:
    """Run the parts; 1 where one is red."""
    from benchmarks.static_build import ARCHES

    todo = parts(results, arch, names, seconds)
    (results / "summary.txt").write_text(title + "\n")
    for file in {name for part in todo for name in (part.file, part.log, f"{part.name}.json")}:
        (results / file).unlink(missing_ok=True)
    red = False
    for part in todo:
        if part.name in ("kernels", "tune") and arch not in ARCHES:
            line = f"{part.name}: skipped, there is no static check for {arch}"
        else:
            line = run(part, results)
            red |= ": RED" in line
        print(line, flush=True)
        with (results / "summary.txt").open("a") as summary:
            summary.write(line + "\n")
    if "ops" in names and (results / "ops.json").exists():
        from benchmarks.tables import ops_page

        with (results / "ops.txt").open("a") as output:
            output.write("\n" + ops_page(results / "ops.json"))
    return int(red)


if __name__ == "__main__":
    sys.exit(main())
