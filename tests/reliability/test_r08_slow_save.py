"""R8: one save at a time; the next one waits for a slow disk, which is not taken for a process that hangs."""

import time

from pretrain_runs import options, write_lmdb

from lmim_fast import cli
from lmim_fast.faults import Fault, injected


def test_r08_a_save_slower_than_the_timeout_is_waited_for_and_no_stacks_are_written(tmp_path):
    data, run = write_lmdb(tmp_path / "words", 30), tmp_path / "run"
    # Half a second each: two seconds after each of the three files of the first save.
    slow = [Fault("save", "slow", at=passing) for passing in (1, 2, 3) for _ in range(4)]
    start = time.monotonic()
    with injected(*slow):
        more = ("--checkpoint-every", "1", "--timeout", "4")
        assert cli.main(["pretrain", *options(data, run, *more, steps=2)]) == 0
    assert time.monotonic() - start > 6
    assert not (run / "stacks-rank0.txt").exists()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
