"""R24: ranks that were started differently are refused before the first step, by what differs."""

from pretrain_runs import options, write_lmdb
from sittings import command, run_limited

from lmim_fast.data.skip_list import skip_list_text
from lmim_fast.data.store.records import RecordStore

SCRIPT = """
import os, sys
from lmim_fast import cli

shared, other = sys.argv[1:sys.argv.index("--then")], sys.argv[sys.argv.index("--then") + 1:]
if os.environ["RANK"] == "1":
    shared = shared[2 if "--data" in other else 0 :] + other  # lists that are given again would add up
sys.exit(cli.main(["pretrain", *shared]))
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


def listed(path, data, number):
    """A skip list of one record, as an option."""
    (database,) = RecordStore([data]).fingerprint()["databases"]
    line = (database["name"], database["hash"], f"image-{number:09d}", "by hand")
    path.write_text(skip_list_text([line]))
    return ["--loader.skip", str(path)]


def test_r24_the_same_data_and_skip_list_may_be_mounted_elsewhere_on_another_machine(tmp_path):
    data, moved = write_lmdb(tmp_path / "words", 30), write_lmdb(tmp_path / "moved" / "elsewhere", 30)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    here, there = (listed(tmp_path / name, data, 1) for name in ("here", "there"))
    changed = ["--then", "--data", str(moved), "--loader.threads", "2", *there]
    done = run_limited(command([str(script), *options(data, tmp_path / "run", *here, steps=2), *changed], 2))
    assert done.returncode == 0, done.stderr


def test_r24_a_rank_with_other_lines_in_its_skip_list_is_refused(tmp_path):
    data, script = write_lmdb(tmp_path / "words", 30), tmp_path / "script.py"
    script.write_text(SCRIPT)
    one, other = (listed(tmp_path / str(number), data, number) for number in (1, 2))
    arguments = options(data, tmp_path / "run", *one, steps=2)
    done = run_limited(command([str(script), *arguments, "--then", *other], 2))
    assert done.returncode != 0
    assert "rank 1 differs from rank 0: run.skip list is" in done.stderr
