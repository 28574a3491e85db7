import gzip
import json

import pytest
import torch

from lmim_fast.train.profiling import SKIPPED, Trace

CPU = torch.device("cpu")


def run(folder, steps, of):
    """Matrix products in `of` steps under a trace of `steps`; what was said."""
    said, matrix = [], torch.rand(32, 32)
    with Trace(folder, 0, steps, CPU, said.append) as trace:
        for step in range(of):
            with torch.profiler.record_function(f"product {step}"):
                matrix @ matrix
            trace.step()
    return said


def recorded(folder):
    """Numbers of the products in the trace."""
    document = json.loads(gzip.decompress((folder / "trace-rank0.json.gz").read_bytes()))
    names = {str(event.get("name")) for event in document["traceEvents"]}
    assert "aten::mm" in names
    return sorted(int(name.split()[1]) for name in names if name.startswith("product "))


def test_the_steps_after_the_first_ten_are_recorded_once(tmp_path):
    said = run(tmp_path, steps=2, of=40)
    assert recorded(tmp_path) == [SKIPPED, SKIPPED + 1]
    assert said == [f"trace of 2 steps in {tmp_path / 'trace-rank0.json.gz'}"]
    assert [path.name for path in tmp_path.iterdir()] == ["trace-rank0.json.gz"]


def test_a_run_that_ends_earlier_leaves_the_steps_until_then(tmp_path):
    assert run(tmp_path, steps=100, of=SKIPPED + 3)[0].startswith("trace of 3 steps")
    assert recorded(tmp_path) == [SKIPPED, SKIPPED + 1, SKIPPED + 2]


@pytest.mark.parametrize("of", [1, SKIPPED])
def test_a_run_that_ends_before_the_recording_says_so(tmp_path, of):
    assert run(tmp_path, steps=2, of=of) == ["no trace was written: there were not more than 10 steps"]
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_trace_pays_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("lmim_fast.train.profiling.profile", None)
    assert run(tmp_path, steps=0, of=20) == []
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_block_is_the_one_that_is_raised(tmp_path):
    def fails(trace):
        for step in range(20):
            trace.step()
            1 // (step < SKIPPED + 2)

    with pytest.raises(ZeroDivisionError), Trace(tmp_path, 0, 5, CPU, print) as trace:
        fails(trace)
    assert (tmp_path / "trace-rank0.json.gz").exists()


def test_a_trace_that_cannot_be_written_is_said_and_training_goes_on(tmp_path):
    (tmp_path / "trace-rank0.json.gz").mkdir()
    (said,) = run(tmp_path, steps=2, of=20)
    assert said.startswith("warning: no trace in ")
    assert [path.name for path in tmp_path.iterdir()] == ["trace-rank0.json.gz"]
