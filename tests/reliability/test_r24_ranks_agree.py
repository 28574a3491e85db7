"""R24: ranks that were started differently are refused before the first step, by what differs."""

from pretrain_runs import options, write_lmdb
from sittings import command, run_limited

SCRIPT = """
import os, sys
from lmim_fast import cli

shared, other = sys.argv[1:sys.argv.index("--then")], sys.argv[sys.argv.index("--then") + 1:]
sys.exit(cli.main(["pretrain", *shared, *(other if os.environ["RANK"] == "1" else [])]))
"""


def test_r24_a_rank_with_another_seed_and_other_data_is_refused_by_name_and_nothing_is_written(tmp_path):
    data, other = write_lmdb(tmp_path / "words", 30), write_lmdb(tmp_path / "other", 31)
    script, run = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT)
    changed = ["--then", "--seed", "3", "--data", str(other)]
    done = run_limited(command([str(script), *options(data, run, steps=4), *changed], 2))
    assert done.returncode != 0
    assert done.stderr.count("error: rank 1 differs from rank 0: ") == 1
    assert "run.config.seed is 0, there 3" in done.stderr
    assert "run.data.count is 30, there 31" in done.stderr
    assert not run.exists()


def test_r24_the_same_data_may_be_mounted_elsewhere_on_another_machine(tmp_path):
    data, moved = write_lmdb(tmp_path / "words", 30), write_lmdb(tmp_path / "moved" / "elsewhere", 30)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    changed = ["--then", "--data", str(moved), "--loader.threads", "2"]
    done = run_limited(command([str(script), *options(data, tmp_path / "run", steps=2), *changed], 2))
    assert done.returncode == 0, done.stderr
