"""`lmim evaluate` from its command line to its files; the model reads numbers off colours."""

import json
import os
from pathlib import Path

import forked
import lmdb
import pytest
from evaluation_sets import install_files, reading, word, write_set

from lmim_fast import cli
from lmim_fast.data.normalize import waics
from lmim_fast.evaluation.metrics import score_readings

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _files(monkeypatch):
    install_files(monkeypatch.setattr)


@pytest.fixture
def model(tmp_path):
    """A run folder with its last weights."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recognizer.safetensors").write_bytes(b"COLOUR last")
    return folder


def evaluate(*arguments, code=0):
    assert cli.main(["evaluate", *map(str, arguments), "--device", "cpu"]) == code


def document(folder):
    return json.loads((folder / "evaluation.json").read_text())


def error_of(capsys, *arguments, code=2):
    evaluate(*arguments, code=code)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_a_run_folder_is_evaluated_and_the_files_lie_in_it(tmp_path, model, capsys):
    sets = [write_set(tmp_path / "sets" / name, count) for name, count in (("SVT", 12), ("IC13", 857))]
    evaluate(model, tmp_path / "sets", "--compare")
    saved = document(model / "evaluation")
    assert [entry["name"] for entry in saved["sets"]] == ["IC13", "SVT"]
    for entry, count in zip(saved["sets"], (857, 12), strict=True):
        numbers = range(count)
        expected = score_readings([*map(word, numbers)], [*map(reading, numbers)], waics)
        assert (entry["images"], entry["correct"], entry["exact"]) == (
            count,
            expected.correct,
            expected.exact,
        )
        assert entry["accuracy"] == expected.accuracy
        assert entry["one_minus_ned"] == expected.one_minus_ned
        assert sum(tally["images"] for tally in entry["lengths"].values()) == count
    assert saved["sets"][0]["split"] == "IC13-857"
    assert saved["averages"][0]["average"] == pytest.approx(sum(e["accuracy"] for e in saved["sets"]) / 2)
    assert {row["published"] for row in saved["published"]} == {True}
    assert {row["benchmark"] for row in saved["published"]} == {"six"}
    assert saved["model"] == str(model / "recognizer.safetensors")
    shown = capsys.readouterr().out
    assert f"{saved['sets'][0]['accuracy']:.1f}%" in shown
    assert "published, LMIM (original labels, IC13-1015, IC15-2077): Avg 95.9%" in shown
    assert (model / "evaluation" / "evaluation.html").is_file()
    assert len(sets) == 2
    assert sorted(os.listdir(model / "evaluation")) == ["evaluation.html", "evaluation.json"]


def test_the_best_weights_of_a_run_go_before_the_last_and_a_file_stands_for_itself(tmp_path, model):
    folder = write_set(tmp_path / "set", 3)
    (model / "best").mkdir()
    (model / "best" / "recognizer.safetensors").write_bytes(b"COLOUR best")
    evaluate(model, folder)
    assert document(model / "evaluation")["model"] == str(model / "best" / "recognizer.safetensors")
    evaluate(model / "recognizer.safetensors", folder, "--output", tmp_path / "out")
    assert document(tmp_path / "out")["model"] == str(model / "recognizer.safetensors")


def test_an_unreadable_image_is_counted_as_wrong_and_named(tmp_path, model, capsys):
    evaluate(model, write_set(tmp_path / "set", 6, broken=(2,)))
    (entry,) = document(model / "evaluation")["sets"]
    assert (entry["images"], entry["correct"]) == (6, 4)
    assert entry["broken"] == [{"index": 1, "reason": "truncated"}]
    page = (model / "evaluation" / "evaluation.html").read_text()
    assert "set: 1 image cannot be decoded, counted as wrong: image-000000002 (truncated)" in page


def test_bad_input_is_one_line_that_says_what_to_do(tmp_path, model, capsys):
    good = write_set(tmp_path / "good", 2)
    bare = write_set(tmp_path / "bare", 2, labels=False)
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"something else")
    assert f"{empty}: no LMDB here" in error_of(capsys, model, empty)
    assert "missing: cannot be opened" in error_of(capsys, model, tmp_path / "missing")
    assert "no such file or run folder" in error_of(capsys, tmp_path / "no model", good)
    assert f"{empty}: no recogniser here (best/recognizer.safetensors, " in error_of(capsys, empty, good)
    assert "not a recogniser" in error_of(capsys, other, good, code=1)
    told = f"{model}::ema: {model} is a folder, and ::ema names one of the models in a file; leave it out"
    assert told in error_of(capsys, f"{model}::ema", good)
    assert "'seven'" in error_of(capsys, model, good, "--layout", "seven")
    assert "no set of --layout six" in error_of(capsys, model, good, "--layout", "six")
    assert "cannot write the evaluation to" in error_of(capsys, model, good, "--output", other / "x")
    assert "beam must be >= 1, got 0" in error_of(capsys, model, good, "--beam", "0")
    evaluate(model, bare, code=2)
    assert "bare: no record has a label" in capsys.readouterr().err.splitlines()[-1]
    assert not (model / "evaluation" / "evaluation.json").exists()


def test_a_damaged_database_is_named(tmp_path, model, capsys):
    folder = write_set(tmp_path / "set", 2)
    with lmdb.open(str(folder)) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"num-samples", b"9")
    assert "num-samples says 9" in error_of(capsys, model, folder, code=1)


# The program in two processes with the environment of torchrun; their parent has the store.
RANKS = """
import os, runpy, sys
from torch.distributed import TCPStore
import lmim_fast.evaluate
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")
os.environ.update(place, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
ranks = []
for rank in range(2):
    process = os.fork()
    if not process:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        sys.argv[:1] = []
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code)  # else the store would wait for threads that a fork does not have
    ranks.append(process)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) != 0 for rank in ranks))
"""


def launch(*arguments):
    """`lmim evaluate` in two processes."""
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = os.environ | settings | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    worker = str(Path(__file__).with_name("evaluate_worker.py"))
    return forked.run("-c", RANKS, worker, *map(str, arguments), "--device", "cpu", env=environment)


def test_two_processes_evaluate_1015_images_as_one_does(tmp_path, model):
    folder = write_set(tmp_path / "IC13", 1015, broken=(3, 700))
    evaluate(model, folder, "--output", tmp_path / "one", "--batch-size", "64")
    launched = launch(model, folder, "--output", tmp_path / "two", "--batch-size", "64")
    assert launched.returncode == 0, launched.stderr
    one, two = document(tmp_path / "one"), document(tmp_path / "two")
    assert one["sets"] == two["sets"]
    assert one["sets"][0]["split"] == "IC13-1015"
    assert one["sets"][0]["images"] == 1015
    pages = [(tmp_path / name / "evaluation.html").read_bytes() for name in ("one", "two")]
    assert pages[0] == pages[1]
    assert launched.stdout.count("evaluation: ") == 1


def test_two_processes_report_a_set_without_labels_in_one_line(tmp_path, model):
    launched = launch(model, write_set(tmp_path / "bare", 3, labels=False))
    assert launched.returncode != 0
    errors = [line for line in launched.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "bare: no record has a label" in errors[0]


def test_r24_a_process_that_has_another_copy_of_a_set_is_refused(tmp_path, model):
    for rank in (0, 1):
        write_set(tmp_path / str(rank), 3 + rank)
    launched = launch(model, f"IC15={tmp_path}/{{}}")
    assert launched.returncode != 0
    (error,) = (line for line in launched.stderr.splitlines() if line.startswith("error: "))
    told = (
        "rank 1 differs from rank 0: the data has 3 records, there 4; 0 holds other records there; start all"
    )
    assert told in error
    assert not (model / "evaluation" / "evaluation.json").exists()
