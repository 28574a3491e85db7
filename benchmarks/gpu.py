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
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SECONDS = 560  # starting, and getting the results back, have to fit into ten minutes too
_TEST_PROCESSES = 6
PARTS = ("kernels", "tests", "sanitize", "ops", "step", "tune")
_HEADING = "== {} ==\n"
_ABSENT = 3  # exit code of benchmarks/sanitize.py, which cannot be imported in a plain checkout


class Part(NamedTuple):
    """A command: its output goes to `file`, what it says of errors to `log`.

    It has a share of the time that is left when it starts, beside the shares of those that come after it.
    It is interrupted at the end of that, and killed `grace` seconds later: pytest writes its results then.
    `option` takes the seconds after which it begins nothing more: `reserve` fewer than it has. Exit codes in
    `absent` say that the machine lacks what the part needs: it is skipped.
    """

    name: str
    command: list[str]
    file: str
    log: str
    share: float
    grace: int = 10
    option: str = ""
    reserve: int = 0
    absent: tuple[int, ...] = ()

    def within(self, seconds: float) -> list[str]:
        """The command for this time."""
        limit = str(max(1, int(seconds - self.reserve)))
        return [*self.command, self.option, limit] if self.option else self.command


def parts(results: Path, arch: str) -> list[Part]:
    """All parts in their order.

    Compiling takes 10 to 15 s on 16 cores. Of the operations torch.compile takes most, at 1 s or more for
    each of 144 graphs at batch 512, the only one it is timed at; of the steps too, so all their graphs are
    compiled at once before any step is timed. Tuning takes what is left, and would take some minutes.
    """
    python, cores = sys.executable, str(len(os.sched_getaffinity(0)))
    kernels = [python, "-m", "benchmarks.static", "--arch", arch, "--only", "bfloat16", "--jobs", cores]
    tests = [python, "-m", "pytest", "-m", "gpu", "-v", "--durations=10", "--tb=short", *gpu_tests()]
    if find_spec("xdist") is not None:
        tests += ["-n", str(_TEST_PROCESSES)]
    sanitize = [python, "-m", "benchmarks.sanitize"]
    ops = [python, "-m", "pytest", "benchmarks", "--benchmark-only", "--benchmark-columns=median,min,rounds"]
    ops += ["--batches", "512", "64", "--compiled-batches", "512"]
    ops += ["--results", str(results / "ops.json")]
    step = [python, "-m", "benchmarks.bench_step", "--device", "cuda", "--preset", "small"]
    step += ["--variants", "released", "sdpa", "compiled", "ours", "ours+graph", "--batch", "512", "64"]
    step += ["--dropout", "0", "0.1", "--warmup", "1", "--parts", "--json"]
    tune = [python, "-m", "benchmarks.tune", "--results", str(results / "tune.json")]
    return [
        Part("kernels", kernels, "checks.txt", "checks.txt", 50, grace=5),
        Part("tests", tests, "checks.txt", "checks.txt", 110),
        Part(
            "sanitize",
            sanitize,
            "checks.txt",
            "checks.txt",
            60,
            option="--seconds",
            reserve=5,
            absent=(_ABSENT,),
        ),
        Part("ops", ops, "ops.txt", "ops.txt", 115, option="--budget", reserve=15),
        Part("step", step, "step.json", "step.txt", 150),
        Part("tune", tune, "tune.txt", "tune.txt", 75, option="--seconds", reserve=10),
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


def run(part: Part, results: Path, seconds: float) -> str:
    """Run a part for so long at most, and its grace; a line for the summary, "ok" in it where it is green."""
    start = time.monotonic()
    path = results / part.file
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with path.open("a") as output, (results / part.log).open("a") as errors:
        errors.write(_HEADING.format(part.name))
        errors.flush()
        process = subprocess.Popen(
            part.within(seconds), cwd=ROOT, env=environment, stdout=output, stderr=errors,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"stopped after {seconds:.0f} s"
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

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script
        signal.signal(signal.SIGINT, signal.default_int_handler)  # else parts would ignore it too
    deadline = time.monotonic() + seconds
    todo = [part for part in parts(results, arch) if part.name in names]
    told = _cleared(results, todo, title)
    red = False
    for number, part in enumerate(todo):
        left = deadline - time.monotonic() - sum(later.grace for later in todo[number:])
        share = part.share / sum(later.share for later in todo[number:])
        if part.name in ("kernels", "tune") and arch not in ARCHES:
            line = f"{part.name}: skipped, there is no static check for {arch}"
        else:
            line = run(part, results, max(1.0, left * share))
            red |= ": RED" in line
        print(line, flush=True)
        told.append(line)
        (results / "summary.txt").write_text("\n".join(told) + "\n")
    for unfinished in results.glob("*.part"):
        unfinished.unlink()
    if "ops" in names and (results / "ops.json").exists():
        from benchmarks.tables import ops_page

        with (results / "ops.txt").open("a") as output:
            output.write("\n" + ops_page(results / "ops.json"))
    return int(red)


def _cleared(results: Path, todo: Sequence[Part], title: str) -> list[str]:
    """Delete what earlier runs of these parts have left; the summary so far, with what the others found."""
    names = [part.name for part in todo]
    for part in todo:
        (results / f"{part.name}.json").unlink(missing_ok=True)
        for path in {results / part.file, results / part.log} - {results / f"{part.name}.json"}:
            text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            before, *sections = re.split(_HEADING.format(r"(\w+)"), text)
            kept = [
                _HEADING.format(name) + body
                for name, body in zip(sections[::2], sections[1::2], strict=True)
                if name not in names
            ]
            path.unlink(missing_ok=True)
            if kept:
                path.write_text(before + "".join(kept), encoding="utf-8")
    summary = results / "summary.txt"
    lines = summary.read_text(encoding="utf-8").splitlines()[1:] if summary.exists() else []
    return [title, *(line for line in lines if line.partition(":")[0] not in names)]


if __name__ == "__main__":
    sys.exit(main())
