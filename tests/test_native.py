"""What the C++ parts ask of the process they run in: threads, memory, the interpreter's end."""

import subprocess
import sys
import textwrap
import types

import pytest

from lmim_fast.native import native

pytest.importorskip("lmim_fast._C", reason="lmim_fast._C is not built")

VIEWS = """
    import os, resource, threading, time
    import numpy as np
    from lmim_fast import _C

    workers = _C.Workers(2)
    plain = np.zeros((4, 32, 128, 3), np.uint8)

    def views(height, width):
        _C.make_plain_views([np.zeros((height, width, 3), np.uint8)] * 4, plain, workers)

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(VIEWS) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )


def test_an_interpreter_that_ends_while_views_are_made_ends_quietly() -> None:
    process = run(
        """
        def forever():
            while True:
                views(200, 400)

        for _ in range(2):
            threading.Thread(target=forever, daemon=True).start()
        time.sleep(0.5)
        """
    )
    assert (process.returncode, process.stderr) == (0, "")


def test_threads_that_the_system_refuses_are_an_error_and_leave_none_behind() -> None:
    process = run(
        """
        del workers
        before = set(os.listdir("/proc/self/task"))
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**26,) * 2)
        try:
            _C.Workers(200)
        except RuntimeError as error:
            print(error, set(os.listdir("/proc/self/task")) - before)
        """
    )
    assert process.stdout.startswith("200 data threads cannot be started (")
    assert process.stdout.endswith(" set()\n")


def test_a_huge_crop_does_not_keep_its_memory() -> None:
    process = run(
        """
        views(32, 100)
        before = resident()
        views(2500, 4000)
        print(round(resident() - before))
        """
    )
    assert int(process.stdout) < 40  # its values in single precision are 115 MB a thread


def test_a_build_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    older = types.ModuleType("lmim_fast._C")
    older.__file__ = "lmim_fast/_C.so"
    monkeypatch.setitem(sys.modules, "lmim_fast._C", older)
    native.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match=r"is not built \(lmim_fast/_C.so is of another version: interface None"
        ):
            assert native() is None
    finally:
        native.cache_clear()
