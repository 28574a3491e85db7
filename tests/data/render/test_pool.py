"""Rendering in processes: in order, a bounded number ahead; however it ends, nothing half-done is left."""

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from rendering import DEJAVU

from lmim_fast.config import RenderConfig
from lmim_fast.data.render import pool
from lmim_fast.data.render.coverage import Coverage
from lmim_fast.data.render.crop import Recipe
from lmim_fast.data.render.database import render
from lmim_fast.data.render.fonts import Face
from lmim_fast.data.render.labels import Vocabulary
from lmim_fast.data.render.layouts import LayoutShares
from lmim_fast.data.render.load import load_vocabulary
from lmim_fast.data.render.pool import CHUNK, render_records
from lmim_fast.data.render.wordlist import WordList
from lmim_fast.data.store.records import RecordStore
from lmim_fast.errors import DataError, LmimError

ROOT = Path(__file__).parents[3]
SCRIPT = f"""
import sys
from lmim_fast.config import RenderConfig
from lmim_fast.data.render.database import render
from lmim_fast.data.store import resumable
resumable.SECONDS_PER_COMMIT = 0.5
print("the script runs", flush=True)
render(RenderConfig(output=sys.argv[1], count=int(sys.argv[2]), processes=2, fonts=({DEJAVU!r},)))
"""


@pytest.fixture(scope="module")
def recipe():
    config = RenderConfig(seed=5, fonts=(DEJAVU,))  # one font loads in no time
    return Recipe(load_vocabulary(config)[0], LayoutShares.of(config), config.seed)


def worker_processes(process):
    return [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]


class Rendering:
    """A render of many crops in a process of its own with two workers; `busy`: with records on disk."""

    def __init__(self, output, *, busy):
        self.temporary = output.parent / "temporary"
        self.temporary.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, output, "100000"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(self.temporary)},
            start_new_session=True,  # a group of its own for Ctrl-C, which a terminal sends to all of it
            # A shell's background jobs ignore Ctrl-C, and so would this child of theirs.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.workers = []
        partial = output.with_name(output.name + ".partial") / "records.partial"
        deadline = time.monotonic() + 60
        # 8 KiB are the two meta pages of an empty database.
        while len(self.workers) < 2 or (busy and not (partial.exists() and partial.stat().st_size > 8192)):
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < deadline
            self.workers = worker_processes(psutil.Process(self.process.pid))
            time.sleep(0.05 if busy else 0.001)
        self.children = psutil.Process(self.process.pid).children()

    def end(self):
        """Exit code and standard error, once the process, its children and their files are gone."""
        _, errors = self.process.communicate(timeout=30)
        _, alive = psutil.wait_procs(self.children, timeout=30)
        assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
        self.temporary.rmdir()  # an error unless empty
        return self.process.returncode, errors


def test_a_render_that_is_killed_at_its_start_leaves_no_database_and_no_process_and_can_be_repeated(tmp_path):
    rendering = Rendering(tmp_path / "words", busy=False)
    rendering.process.kill()
    code, _ = rendering.end()
    assert code == -signal.SIGKILL
    with pytest.raises(DataError, match="no LMDB"):
        RecordStore([tmp_path])
    config = RenderConfig(output=str(tmp_path / "words"), count=5, restart=True, fonts=(DEJAVU,))
    assert len(RecordStore([render(config)])) == 5
    assert os.listdir(tmp_path) == ["words"]


@pytest.mark.parametrize("busy", [False, True])
def test_ctrl_c_leaves_no_process_and_what_was_committed_and_prints_one_traceback(tmp_path, busy):
    rendering = Rendering(tmp_path / "words", busy=busy)
    os.killpg(rendering.process.pid, signal.SIGINT)
    code, errors = rendering.end()
    assert code != 0
    assert errors.strip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1
    # Stopped in the first commit or behind it.
    assert os.listdir(tmp_path) in ([["words.partial"], []] if busy else [[]])


def test_the_death_of_a_rendering_process_is_an_error_not_a_hang(tmp_path):
    rendering = Rendering(tmp_path / "words", busy=True)
    rendering.workers[1].kill()
    code, errors = rendering.end()
    assert code == 1
    assert (
        errors.strip()
        .splitlines()[-1]
        .endswith("LmimError: a rendering process died: it crashed or was killed (out of memory?)")
    )
    assert os.listdir(tmp_path) == ["words.partial"]


def test_no_death_of_a_process_leaves_half_a_message_to_wait_for(tmp_path):
    rendering = Rendering(tmp_path / "words", busy=True)
    rendering.process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)  # the workers finish what they have been sent, and nothing reads their results
    for worker in rendering.workers:
        worker.kill()
    rendering.process.send_signal(signal.SIGCONT)
    code, errors = rendering.end()
    assert code == 1
    assert "LmimError: a rendering process died" in errors


def test_a_process_computes_in_one_thread(recipe):
    records = render_records(recipe, range(10**6), 2)
    next(records)
    workers = worker_processes(psutil.Process())
    # The second one waits for the end of the parent and may begin late; there is none of OpenCV's or BLAS's.
    end = time.monotonic() + 60
    while (threads := [worker.num_threads() for worker in workers]) != [2, 2] and time.monotonic() < end:
        time.sleep(0.05)
    assert threads == [2, 2]
    records.close()


def test_records_come_in_order_and_the_vocabulary_is_sent_once_to_each_process(recipe, monkeypatch):
    count = 3 * CHUNK + 1
    expected = [recipe.crop(index) for index in range(count)]  # and fills the caches
    sent = []

    def counted(self):
        sent.append(self)
        return self.__dict__

    monkeypatch.setattr(Vocabulary, "__getstate__", counted)
    assert list(render_records(recipe, range(count), 3)) == expected
    assert len(sent) == 3


def test_processes_get_a_long_word_list_as_files_that_they_share(recipe, tmp_path):
    words = WordList(np.full(10**6, ord("a"), np.uint8), np.arange(1, 10**6 + 1), None)
    vocabulary = dataclasses.replace(recipe.vocabulary, words=words)
    sent = pickle.dumps(dataclasses.replace(recipe, vocabulary=vocabulary).save_words(tmp_path))
    assert len(sent) < 50_000
    received = pickle.loads(sent).with_words(tmp_path).vocabulary.words
    assert isinstance(received.text.base, np.memmap)
    assert len(received) == 10**6
    assert received[999_999] == "a"


def test_few_crops_are_rendered_ahead_of_the_reader_and_closing_ends_the_processes(recipe, monkeypatch):
    submitted, main = [], sys.modules["__main__"]
    submit = pool.ProcessPoolExecutor.submit

    def counted(self, *args):
        submitted.append(args)
        return submit(self, *args)

    monkeypatch.setattr(pool.ProcessPoolExecutor, "submit", counted)
    records = render_records(recipe, range(10**9), 2)
    assert next(records) == recipe.crop(0)
    assert len(submitted) <= 20
    workers = worker_processes(psutil.Process())
    assert len(workers) == 2
    records.close()
    assert not any(worker.is_running() for worker in workers)
    assert "OMP_NUM_THREADS" not in os.environ
    assert sys.modules["__main__"] is main


@pytest.mark.parametrize(("count", "processes"), [(CHUNK, 8), (3 * CHUNK, 1)])
def test_one_process_or_one_chunk_renders_in_the_callers_process(recipe, monkeypatch, count, processes):
    monkeypatch.setattr(pool, "ProcessPoolExecutor", None)
    assert len(list(render_records(recipe, range(count), processes))) == count


def test_a_font_that_a_process_cannot_read_is_an_error(recipe):
    coverage = recipe.vocabulary.coverage
    faces = tuple(Face("/no/such/font.ttf") for _ in coverage.faces)
    gone = dataclasses.replace(
        recipe,
        vocabulary=dataclasses.replace(recipe.vocabulary, coverage=Coverage(faces, coverage.bits)),
    )
    with pytest.raises(LmimError, match="rendering in 2 processes failed: cannot open resource"):
        list(render_records(gone, range(2 * CHUNK), 2))


@pytest.mark.parametrize(
    "form",
    [
        *("script", "module"),  # multiprocessing runs these two again, by their path and by their name
        *(pytest.param(form, marks=pytest.mark.slow) for form in ("standard input", "command")),
    ],
)
def test_a_program_without_a_main_guard_runs_once(tmp_path, form):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "unguarded.py").write_text(SCRIPT)
    start = {
        "script": [str(programs / "unguarded.py")],
        "standard input": ["-"],
        "module": ["-m", "unguarded"],
        "command": ["-c", SCRIPT],
    }[form]
    done = subprocess.run(
        [sys.executable, *start, tmp_path / "words", str(2 * CHUNK)],
        input=SCRIPT,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=programs if form == "module" else ROOT,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "the script runs\n", "")
    assert len(RecordStore([tmp_path / "words"])) == 2 * CHUNK


def test_a_file_in_the_working_directory_does_not_replace_a_standard_module(tmp_path):
    (tmp_path / "program.py").write_text(SCRIPT)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "socket.py").write_text("raise AssertionError('imported')")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), "words", str(2 * CHUNK)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=elsewhere,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_five_thousand_crops_take_less_than_a_minute(tmp_path):
    start = time.monotonic()
    render(RenderConfig(output=str(tmp_path / "words"), processes=2))
    assert time.monotonic() - start < 60
    assert len(RecordStore([tmp_path / "words"])) == 5000
