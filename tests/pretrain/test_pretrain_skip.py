"""Training with the skip list of `lmim data verify`: the same run, without reading what is broken."""

import json
import shutil

import pytest
from pretrain_runs import curve, lines, options, write_lmdb

from lmim_fast import cli
from lmim_fast.faults import Fault, injected

BROKEN = (3, 9, 14, 22, 27)
STEPS, STOP = 8, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lmdb(tmp_path_factory.mktemp("data") / "words", 30, broken=BROKEN)


@pytest.fixture(scope="module")
def skip(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("verified")
    assert cli.main(["data", "verify", str(data), "--output", str(output)]) == 0
    return output / "skip.txt"


def pretrain(data, run, *more):
    return cli.main(["pretrain", *options(data, run, *more, steps=STEPS)])


def tolerant(data, run):
    return pretrain(data, run, "--loader.max-bad-fraction", "0.5")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run that meets the broken records."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert tolerant(data, run) == 0
    return run


def test_a_run_with_the_list_is_bitwise_the_run_without_it(data, skip, whole, tmp_path, capsys):
    run = tmp_path / "run"
    assert pretrain(data, run, "--loader.max-bad-fraction", "0", "--loader.skip", str(skip)) == 0
    assert curve(run) == curve(whole)
    assert (run / "encoder.safetensors").read_bytes() == (whole / "encoder.safetensors").read_bytes()
    assert lines(whole)[-1]["bad_records"] == len(BROKEN)
    assert lines(run)[-1]["bad_records"] == 0
    assert not (run / "bad_records.jsonl").exists()
    told = capsys.readouterr()
    assert told.out.count("skip list") == 1
    assert "skip list: 5 of 30 records are never read" in told.out


def test_r14_a_stopped_run_continues_bitwise_with_the_list_that_it_did_not_have(data, skip, whole, tmp_path):
    run = tmp_path / "run"
    with injected(Fault("step", "term", at=STOP)):
        assert tolerant(data, run) == 0
    assert lines(run)[-1]["step"] == STOP
    assert pretrain(data, run, "--loader.max-bad-fraction", "0", "--loader.skip", str(skip)) == 0
    assert curve(run) == curve(whole)
    assert (run / "encoder.safetensors").read_bytes() == (whole / "encoder.safetensors").read_bytes()


def test_held_out_records_of_the_list_are_skipped_too(data, skip, tmp_path):
    good = write_lmdb(tmp_path / "good", 20)
    evaluated = ("--eval-data", str(data), "--eval-every", "4", "--loader.max-bad-fraction", "0")
    assert pretrain(good, tmp_path / "refused", *evaluated) == 1
    assert pretrain(good, tmp_path / "run", *evaluated, "--loader.skip", str(skip)) == 0
    measured = (tmp_path / "run" / "eval.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in measured] == [4, 8]


def test_a_list_of_other_data_is_refused_with_its_line_before_anything_is_written(skip, tmp_path, capsys):
    other = write_lmdb(tmp_path / "other", 12)
    assert pretrain(other, tmp_path / "run", "--loader.skip", str(skip)) == 2
    error = capsys.readouterr().err
    assert "line 4: no database of this run is words@" in error
    assert "there are other@" in error
    assert not (tmp_path / "run").exists()
    assert pretrain(other, tmp_path / "run", "--loader.skip", str(tmp_path / "nowhere")) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_the_report_names_skipped_records_and_does_without_a_list_that_is_gone(data, skip, tmp_path):
    copy = tmp_path / "skip.txt"
    shutil.copy(skip, copy)
    run = tmp_path / "run"
    assert pretrain(data, run, "--loader.skip", str(copy)) == 0
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert page.count("substitute: skipped: truncated") >= len(BROKEN)
    copy.unlink()
    assert cli.main(["report", str(run)]) == 0
    again = (run / "report.html").read_text()
    assert again.count("substitute: truncated") == page.count("substitute: skipped: truncated")


def test_a_word_that_was_listed_by_hand_is_replaced(data, skip, tmp_path):
    listed = tmp_path / "skip.txt"
    line = skip.read_text().splitlines()[-1].split("\t")[0]
    listed.write_text(skip.read_text() + f"{line}\timage-000000001\tillegible\n")
    run = tmp_path / "run"
    assert pretrain(data, run, "--loader.skip", str(listed), "--loader.max-bad-fraction", "0") == 0
    assert cli.main(["report", str(run)]) == 0
    assert "substitute: skipped: illegible" in (run / "report.html").read_text()
