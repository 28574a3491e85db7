"""Rendering in processes: ended, interrupted or killed, it leaves no process and no half database."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lmim_fast.config import RenderConfig
from lmim_fast.data.render.database import render
from lmim_fast.data.store.records import RecordStore
from lmim_fast.errors import DataError

ROOT = Path(__file__).parents[3]


class Rendering:
    """A render of many crops in a process of its own, caught with records on disk and two children."""

    def __init__(self, output):
        code = (
            "import sys; from lmim_fast.config import RenderConfig;"
            "from lmim_fast.data.render.database import render;"
            "render(RenderConfig(output=sys.argv[1], count=100_000, processes=2))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, output],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            # A shell's background jobs ignore Ctrl-C, and so would this child of theirs.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.children = []
        partial = output.with_name(output.name + ".partial") / "records.partial"
        deadline = time.monotonic() + 60
        # 8 KiB are the two meta pages of an empty database.
        while not (len(self.children) == 2 and partial.exists() and partial.stat().st_size > 8192):
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < deadline
            self.children = psutil.Process(self.process.pid).children()
            time.sleep(0.05)

    def end(self):
        """Exit code and standard error, once the process and its children are gone."""
        _, errors = self.process.communicate(timeout=30)
        _, alive = psutil.wait_procs(self.children, timeout=30)
        assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
        return self.process.returncode, errors


def test_a_killed_render_leaves_no_database_and_no_process_and_can_be_repeated(tmp_path):
    rendering = Rendering(tmp_path / "words")
    rendering.process.kill()
    assert rendering.end() == (-signal.SIGKILL, "")
    with pytest.raises(DataError, match="no LMDB"):
        RecordStore([tmp_path])
    assert len(RecordStore([render(RenderConfig(output=str(tmp_path / "words"), count=5))])) == 5
    assert os.listdir(tmp_path) == ["words"]


def test_an_interrupted_render_leaves_no_file_and_no_process(tmp_path):
    rendering = Rendering(tmp_path / "words")
    rendering.process.send_signal(signal.SIGINT)
    code, errors = rendering.end()
    assert code != 0
    assert errors.strip().endswith("KeyboardInterrupt")
    assert os.listdir(tmp_path) == []


def test_the_death_of_a_rendering_process_is_an_error_not_a_hang(tmp_path):
    rendering = Rendering(tmp_path / "words")
    rendering.children[1].kill()
    code, errors = rendering.end()
    assert code == 1
    assert "LmimError: a rendering process ended early (signal 9)" in errors
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_five_thousand_crops_take_less_than_a_minute(tmp_path):
    start = time.monotonic()
    render(RenderConfig(output=str(tmp_path / "words"), processes=2))
    assert time.monotonic() - start < 60
    assert len(RecordStore([tmp_path / "words"])) == 5000
