"""R26: damage to what lies beside the checkpoints of a run keeps no run from continuing."""

import json
import os
import shutil

import lmdb
import pytest
from pretrain_runs import curve, lines, options, weights_of, write_lmdb

from lmim_fast import cli
from lmim_fast.errors import CheckpointError
from lmim_fast.faults import Fault, injected
from lmim_fast.train import side_files
from lmim_fast.train.checkpoint import folders, state

STEPS, STOP = 8, 5
GOOD = {
    "metrics.jsonl": {"step": 3, "loss": 1.5},
    "eval.jsonl": {"step": 3, "loss": None},
    "validation.jsonl": {"step": 3, "accuracy": 0.5, "sets": {"val": {"accuracy": 0.5}}},
    "skipped.jsonl": {"step": 3, "seed": 0, "epochs": [0], "indices": [7]},
    "bad_records.jsonl": {"database": "/data/wörter", "key": "image-000000003", "reason": "truncated"},
}
NESTED = b"[" * 100_000 + b"]" * 100_000
LINES = {
    "not UTF-8": b'{"step": 4, "loss": "\xff\xfe"}',
    "infinite step": b'{"step": 1e400}',
    "infinite number": b'{"step": 4, "accuracy": -1e400, "sets": {}}',
    "no number": b'{"step": NaN, "accuracy": NaN, "sets": {}}',
    "negative step": b'{"step": -1}',
    "true step": b'{"step": true}',
    "huge step": b'{"step": ' + b"9" * 400 + b"}",
    "endless digits": b'{"step": ' + b"9" * 5000 + b"}",
    "deep nesting": b'{"step": ' + NESTED + b"}",
    "array": b'[{"step": 4}]',
    "string": b'"step"',
    "null": b"null",
    "no field": b'{"other": 1}',
    "zeros": b"\0" * 512,
}


@pytest.mark.parametrize("name", GOOD)
def test_r26_a_damaged_line_is_dropped_and_named_and_the_good_lines_stay(tmp_path, name):
    assert set(GOOD) == set(side_files.LINES)
    path, good = tmp_path / name, json.dumps(GOOD[name]).encode()
    for damage in LINES.values():
        said = []
        path.write_bytes(b"\n".join([good, damage, b"", good, b""]))
        assert len(side_files.read_lines(path)) == 2
        side_files.resume_at(tmp_path, 10, said.append)
        assert path.read_bytes() == good + b"\n" + good + b"\n"
        assert said == [f"warning: {path}: damaged lines were dropped (line 2), the run goes on without"]
    said = []
    for whole in (b"\xef\xbb\xbf" + good + b"\n", good, good + b"\n" + good[:-9]):  # mark of bytes; torn
        path.write_bytes(whole)
        side_files.resume_at(tmp_path, 10, said.append)
        assert path.read_bytes() == good + b"\n"
    assert said == []
    if name != "bad_records.jsonl":  # which is of no step
        side_files.resume_at(tmp_path, 2, said.append)
        assert path.read_bytes() == b""


def test_r26_a_line_behind_a_torn_one_is_whole(tmp_path):
    path = tmp_path / "skipped.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    side_files.append(path, ['{"step": 2}'])
    assert [line["step"] for line in side_files.read_lines(path)] == [1, 2]
    assert side_files.add_new_lines(path, [{"step": 2}, {"step": 3}]) == 3
    assert [line["step"] for line in side_files.read_lines(path)] == [1, 2, 3]


def sealed(body):
    return json.dumps({**body, "checksum": state.checksum_of(body)}).encode()


STATES = {
    "array": b"[]",
    "number": b"1e400",
    "empty": b"",
    "not UTF-8": b'{"step": "\xff"}',
    "deep nesting": NESTED,
    "deep nesting inside": b'{"checksum": "", "step": ' + NESTED + b"}",
    "endless digits": b'{"checksum": "", "step": ' + b"9" * 5000 + b"}",
    "no step": sealed({"files": {}}),
    "infinite step": sealed({"step": float("inf"), "files": {}}),
    "files of another kind": sealed({"step": 5, "files": ["model.safetensors"]}),
    "a size of another kind": sealed({"step": 5, "files": {"model.safetensors": {"bytes": "9"}}}),
}


@pytest.mark.parametrize("damage", STATES)
def test_r26_a_damaged_state_is_a_damaged_checkpoint(tmp_path, damage):
    path = tmp_path / "state.json"
    path.write_bytes(STATES[damage])
    with pytest.raises(CheckpointError, match=r"state\.json"):
        folders.read_state(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_lmdb(tmp_path_factory.mktemp("data") / "words", 30, broken=(3, 9))
    write_labels(folder, "word")
    return folder


def write_labels(folder, label):
    with lmdb.open(str(folder), map_size=2**26) as environment, environment.begin(write=True) as transaction:
        for number in range(1, 31):
            transaction.put(b"label-%09d" % number, label.encode())


def pretrain(data, run, *more):
    more = ("--loader.max-bad-fraction", "0.5", "--checkpoint-every", "2", *more)
    return cli.main(["pretrain", *options(data, run, *more, steps=STEPS)])


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert pretrain(data, run) == 0
    return run


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("stopped") / "run"
    with injected(Fault("step", "term", at=STOP)):
        assert pretrain(data, run) == 0
    return run


def test_r26_a_run_whose_side_files_are_all_damaged_continues_bitwise_from_the_older_checkpoint(
    data, whole, stopped, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    for name in GOOD:
        with (run / name).open("ab") as file:
            file.write(b"\n".join([b"", *LINES.values(), b'{"step": 2']))
    for name in ("wrong_readings.json", "wandb_id"):
        (run / name).write_bytes(NESTED)
    (run / "best").write_bytes(b"\xff")
    newest = folders.folder_of(run, STOP)
    (newest / "state.json").write_bytes(b"[]")
    body = folders.read_state(folders.folder_of(run, 4) / "state.json")
    for name in ("meter", "config"):  # of the next older one, under a right checksum
        del body[name]
    (folders.folder_of(run, 4) / "state.json").write_bytes(sealed(body))
    relabelled = tmp_path / "words"
    shutil.copytree(data, relabelled)
    write_labels(relabelled, "another, which pre-training does not read")
    assert pretrain(relabelled, run) == 0
    told = capsys.readouterr().out
    assert curve(run) == curve(whole)
    assert weights_of(run, STEPS) == weights_of(whole, STEPS)
    named = [(line["database"], line["key"][-1]) for line in side_files.read_lines(run / "bad_records.jsonl")]
    assert sorted(named) == sorted((str(folder), key) for folder in (data, relabelled) for key in "39")
    assert f"warning: {newest / 'state.json'} is not a checkpoint's state: it is no JSON object" in told
    assert "config, meter missing or malformed; set aside as step-00000004.damaged" in told
    assert f"warning: {run / 'metrics.jsonl'}: damaged lines were dropped (line " in told
    assert f"warning: {run / 'best'} is a file where a folder should be; set aside as best.damaged" in told


def test_the_lines_of_a_run_are_on_the_disk_before_a_checkpoint_that_counts_on_them(
    data, tmp_path, monkeypatch
):
    flushed, fsync = [], os.fsync

    def noted(file):
        flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}")))
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    with injected(Fault("step", "term", at=4)):  # checkpoints of the steps 2 and 4
        assert pretrain(data, tmp_path / "run") == 0
    states = [place for place, name in enumerate(flushed) if name == "state.json"]
    assert len(states) == 2
    for number, place in enumerate(states, 1):
        for name in ("metrics.jsonl", "bad_records.jsonl"):
            assert flushed[:place].count(name) >= number


def test_a_run_that_begins_anew_reports_nothing_of_the_one_that_left_no_checkpoint(stopped, tmp_path, capsys):
    run = tmp_path / "run"
    clean = write_lmdb(tmp_path / "clean", 30)
    shutil.copytree(stopped, run)
    shutil.rmtree(run / "checkpoints")
    for name in GOOD:
        (run / name).write_text(json.dumps(GOOD[name]) + "\n")
    left = ("wrong_readings.json", "wandb_id", "stacks-rank1.txt", "trace-rank0.json.gz", "nccl-rank-0")
    for name in left:
        (run / name).write_text("of the other run")
    (run / "best").mkdir()
    (run / "best" / "recognizer.safetensors").write_text("weights")
    (run / "mine.txt").write_text("of the user")
    events = set((run / "tensorboard").iterdir())
    assert events
    assert pretrain(clean, run) == 0
    told = capsys.readouterr().out
    assert f"{run} has no checkpoint: logs of the run before are deleted (metrics.jsonl, eval.jsonl" in told
    assert "weights of the run before get the ending .old (best/recognizer.safetensors)" in told
    assert [line["step"] for line in lines(run)] == list(range(1, STEPS + 1))
    assert all(line["bad_records"] == line["skipped_steps"] == 0 for line in lines(run))
    assert not [name for name in (*left, *GOOD) if name != "metrics.jsonl" and (run / name).exists()]
    assert not events & set((run / "tensorboard").iterdir())
    assert (run / "best" / "recognizer.safetensors.old").read_text() == "weights"
    assert (run / "mine.txt").exists()
    assert "replaced" not in told
