"""`lmim data verify`: it finds what training would replace, says so, and writes it whole or not at all."""

import json
import os
import random
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import warm
from encoded_images import mutations
from lmdb_folders import write_database
from pipeline_runs import database, pipeline
from shared_memory import left, watched

from lmim_fast import cli
from lmim_fast.config import DataConfig
from lmim_fast.data.skip_list import SkipList
from lmim_fast.data.store.records import RecordStore
from lmim_fast.data.tools import verify as verify_module
from lmim_fast.data.tools.verify import DaliViews, check_records
from lmim_fast.errors import UsageError

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings("ignore:.*some lack image or label:UserWarning")


def encoded(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 34, 3), dtype=np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def write(folder, images, labels):
    """An LMDB of raw values; None leaves a key out."""
    values = [(b"image-%09d" % n, image) for n, image in enumerate(images, 1)]
    values += [(b"label-%09d" % n, label) for n, label in enumerate(labels, 1)]
    extra = [(key, value) for key, value in values if value is not None]
    return write_database(
        folder, len(images), extra=extra, skip=[key for key, value in values if value is None]
    )


@pytest.fixture
def folders(tmp_path):
    """Two databases of the same name, with broken images and unusable labels."""
    good = [encoded(number) for number in range(6)]
    first = [good[0], None, good[2][:40], good[3], b"junk", good[5]]
    write(tmp_path / "a" / "words", first, [b"one", b"two", None, b"", b"five", b"\xff\xfe"])
    write(tmp_path / "b" / "words", [*good, b""], [b"w"] * 7)
    write(tmp_path / "c", good[:2], [None, None])
    return tmp_path


def test_a_report_names_every_broken_record_and_every_label_that_cannot_be_read(folders, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(["data", "verify", str(folders), "--output", str(output)]) == 0
    report = json.loads((output / "verify.json").read_text())
    first, second = str(folders / "a" / "words"), str(folders / "b" / "words")
    assert report["kinds"] == {"empty": 2, "truncated": 1, "not an image": 1}
    assert report["label_kinds"] == {"no label": 1, "empty label": 1, "label is not UTF-8": 1}
    named = [(bad["database"], bad["key"], bad["reason"]) for bad in report["bad_records"]]
    assert named == [
        (first, "image-000000002", "empty"),
        (first, "image-000000003", "truncated"),
        (first, "image-000000005", "not an image"),
        (second, "image-000000007", "empty"),
    ]
    assert [(bad["database"], bad["key"]) for bad in report["bad_labels"]] == [
        (first, f"image-{number:09d}") for number in (3, 4, 6)
    ]
    counts = [(each["path"], each["records"], each["bad"], each["labels"]) for each in report["databases"]]
    assert counts == [(first, 6, 3, True), (second, 7, 1, True), (str(folders / "c"), 2, 0, False)]
    assert (report["records"], report["bad"], report["max_pixels"]) == (15, 4, 2**22)
    text = capsys.readouterr().out
    assert f"{second}: 1 (14.29 %) broken" in text
    assert "words image-000000005" in text
    assert "1 of 3 databases have no labels" in text
    assert "15 records in 3 databases decoded in" in text
    assert "4 (26.67 %) broken" in text


def test_the_skip_list_holds_the_broken_ones_and_if_asked_those_without_a_label(folders, tmp_path):
    store = RecordStore([folders])
    expected = {1: "empty", 2: "truncated", 4: "not an image", 12: "empty"}
    for asked, reasons in (
        ([], expected),
        (["--skip-labels"], expected | {3: "empty label", 5: "label is not UTF-8"}),
    ):
        output = tmp_path / f"out{len(asked)}"
        assert cli.main(["data", "verify", str(folders), "--output", str(output), *asked]) == 0
        skip_list = SkipList.read(output / "skip.txt")
        assert skip_list.reasons(store) == reasons
        skip_list.check([store])


def test_strict_fails_for_broken_records_and_not_for_labels(folders, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(["data", "verify", str(folders), "--strict", "--output", str(output)]) == 1
    assert capsys.readouterr().err.strip() == "error: 4 of 15 records are broken"
    assert (output / "verify.json").exists()
    assert (output / "skip.txt").exists()
    good = write(folders / "good", [encoded()] * 2, [b"", None])
    assert cli.main(["data", "verify", str(good), "--strict"]) == 0
    assert "none broken" in capsys.readouterr().out


def test_what_training_met_in_mutated_files_is_what_verify_finds(tmp_path):
    files = list(mutations(random.Random(7), 300))
    folder = database(tmp_path / "lmdb", dict(enumerate(files)), count=len(files) + 20)
    loader = DataConfig(threads=2, max_bad_fraction=1.0)
    with pipeline(folder, batch_size=20, end_step=16, loader=loader, guidance=None) as batches:
        for _ in batches:
            pass
        met = {int(entry.key[-9:]) - 1: entry.reason for entry in batches.bad.entries}
    found = check_records(RecordStore([folder]), threads=2)
    assert {bad.record: bad.reason for bad in found.bad} == met
    assert "pixel data cannot be decoded" in found.kinds


def test_neither_threads_nor_the_pixels_decoded_at_once_change_the_result(folders, monkeypatch):
    store = RecordStore([folders])
    expected = check_records(store, threads=1).bad
    monkeypatch.setattr(verify_module, "_BLOCK", 4)
    monkeypatch.setattr(verify_module, "_PIXELS_AT_ONCE", 500)  # 12 x 34 fit once
    assert check_records(store, threads=3).bad == expected


def test_images_are_decoded_as_many_at_a_time_as_memory_allows(monkeypatch):
    monkeypatch.setattr(verify_module, "_PIXELS_AT_ONCE", 100)

    def groups(*pixels):
        return [list(rows) for rows in verify_module._within_memory(np.array(pixels, dtype=np.int64))]

    assert groups() == []
    assert groups(500) == [[0]]
    assert groups(50, 50, 1, 500, 99, 1, 1) == [[0, 1], [2], [3], [4, 5], [6]]


def test_a_record_above_max_pixels_is_broken(folders, capsys):
    assert cli.main(["data", "verify", str(folders / "b"), "--max-pixels", "407"]) == 0
    assert "too large" in capsys.readouterr().out


def test_files_that_exist_are_refused_before_anything_is_decoded(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify_module, "check_records", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "skip.txt").write_text("# edited by hand")
    assert cli.main(["data", "verify", str(folders), "--output", str(tmp_path / "out")]) == 2
    assert "skip.txt exists; remove it" in capsys.readouterr().err
    assert cli.main(["data", "verify", str(folders), "--output", str(folders / "c" / "data.mdb")]) == 2
    assert cli.main(["data", "verify", str(tmp_path / "nothing")]) == 2


def test_a_folder_whose_name_steers_a_terminal_is_escaped(tmp_path, capsys):
    folder = write(tmp_path / "esc\x1b[31m", [b"junk"], [b"w"])
    assert cli.main(["data", "verify", str(folder), "--output", str(tmp_path / "out\x1b[32m")]) == 0
    assert "\x1b" not in capsys.readouterr().out
    store = RecordStore([folder])
    assert SkipList.read(tmp_path / "out\x1b[32m" / "skip.txt").reasons(store) == {0: "not an image"}


def test_lines_of_decoders_do_not_reach_the_terminal(tmp_path):
    image = bytearray(cv2.imencode(".jpg", np.zeros((9, 9, 3), np.uint8))[1])
    at = image.index(b"\xff\xc4") + 5
    image[at : at + 16] = b"\xff" * 16
    folder = write(tmp_path / "words", [bytes(image)] * 3, [b"w"] * 3)
    run = warm.lmim(["data", "verify", str(folder), "--strict"]).wait()
    assert run.returncode == 1
    assert "pixel data cannot be decoded" in run.stdout
    assert run.stderr.strip() == "error: 3 of 3 records are broken"


def _slowly(arguments):
    decode = DaliViews.__call__

    def slowly(views, *batch):
        print("decoding", flush=True)
        time.sleep(0.3)
        return decode(views, *batch)

    DaliViews.__call__ = slowly
    return cli.main(["data", "verify", *arguments])


def test_r19_ctrl_c_leaves_no_half_written_file_no_process_and_no_shared_memory(tmp_path):
    folder = write(tmp_path / "words", [encoded()] * 5000, [b"w"] * 5000)  # 20 blocks, 6 seconds
    output = tmp_path / "out"
    run = warm.Program(_slowly, [str(folder), "--output", str(output)])
    process = psutil.Process(run.pid)
    with watched(process) as shared:
        run.wait_for("decoding\n")
        children = process.children(recursive=True)
        os.kill(run.pid, signal.SIGINT)
        done = run.wait()
    assert done.returncode == 130, (done.stdout, done.stderr)
    assert done.stderr == ""
    assert list(output.iterdir()) == []
    assert not any(child.is_running() for child in children)
    assert left(shared) == []


def test_real_crops_are_all_good(real_crops):
    found = check_records(RecordStore([real_crops / "train" / "SVT_train"]))
    assert (found.records, found.bad, found.bad_labels) == (257, [], [])


def test_what_was_found_is_printed_even_where_it_cannot_be_written(tmp_path, capsys, monkeypatch):
    def full(path, content):
        raise UsageError(f"{path} cannot be written (No space left on device)")

    monkeypatch.setattr(verify_module, "write_whole", full)
    data = write(tmp_path / "words", [encoded(), b"junk", encoded(1)], [b"w"] * 3)
    assert cli.main(["data", "verify", str(data), "--output", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert "1 (33.33 %) broken" in shown.out
    assert "written" not in shown.out
    assert "No space left" in shown.err
