"""The benchmark of two processes, for real, and its table."""

import forked

from benchmarks import bench_parallel
from benchmarks.tables_parallel import checkpoint

# Its processes are forks, which do not import everything once more.
PROGRAM = """
import functools, sys
import torch.multiprocessing as mp
from benchmarks import bench_parallel
mp.spawn = functools.partial(mp.start_processes, start_method="fork")
sys.exit(bench_parallel.main(sys.argv[1:]))
"""


def test_every_form_is_timed_and_a_split_model_takes_half_of_the_memory(tmp_path):
    result = tmp_path / "result.json"
    arguments = ["--preset", "tiny", "--batch", "2", "--rounds", "1", "--results", str(result)]
    done = forked.run("-c", PROGRAM, *arguments)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    rows = {line.split("|")[1].strip(): line.split("|") for line in lines}
    assert list(rows) == ["form", "---", *bench_parallel.FORMS]
    assert rows["DDP"][4].strip() == "1.00x"
    assert int(rows["shard"][5]) == int(rows["DDP"][5]) / 2
    # The flat buffer holds the gradients once more.
    assert int(rows["DDP"][5]) < int(rows["replicate"][5]) < 1.5 * int(rows["DDP"][5])
    assert result.is_file()


def test_the_table_of_checkpoints_gives_median_and_extremes():
    result = dict(preset="small", device="a device", bytes=365_000_000, cores=2, threads=2, versions={})
    result |= dict(commit="abc", milliseconds={"asynchronous": [70.0, 40.0, 990.0]})
    assert "| stall, asynchronous | 70 | 40 | 990 |" in checkpoint(result)
    assert "365 MB" in checkpoint(result)
