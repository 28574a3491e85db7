"""R24: ranks that were started differently are refused before the first step, by what differs."""

import json
import subprocess
import sys

import pytest
from pretrain_runs import ENVIRONMENT, options, write_lmdb
from sittings import command, run_limited
from torch.distributed import TCPStore

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
SEED = ["--seed", "3"]
# What rank 1 is started with, beside or in place of what rank 0 is: command, options, environment, and what
# both say of it.
CASES = {
    "seed": ("pretrain", SEED, {}, "--seed is 0, there 3"),
    "learning rate": ("pretrain", ["--optim.lr", "2e-3"], {}, "--optim.lr is 0.001, there 0.002"),
    "batch": ("pretrain", ["--batch-size", "16"], {}, "--batch-size is 8, there 16"),
    "odd batch": ("pretrain", ["--batch-size", "9"], {}, "--batch-size is 8, there 9"),
    "accumulation": ("pretrain", ["--accumulation", "2"], {}, "--accumulation is 1, there 2"),
    "steps": ("pretrain", ["--steps", "5"], {}, "--steps is 4, there 5"),
    "timeout": ("pretrain", ["--timeout", "30"], {}, "--timeout is 60.0, there 30.0"),
    "sharing": ("pretrain", ["--parallel", "shard"], {}, "--parallel is 'auto', there 'shard'"),
    "objective": (
        *("pretrain", ["--objective", "lmim", "--teacher", "random", *SEED], {}),
        "--objective is 'mae', there 'lmim'; start",
    ),
    "finetune": ("finetune", [], {}, "--objective is 'mae', there 'recognizer'; start"),
    "evaluate": ("evaluate", [], {}, "command is 'training', there 'evaluation'; start"),
    "backend": (
        "pretrain",
        [],
        {"LMIM_FAST_BACKEND": "eager"},
        "LMIM_FAST_BACKEND is not set, there 'eager'",
    ),
    "routes": (
        *("pretrain", [], {"LMIM_FAST_ROUTES": "attention.backward.32=cudnn"}),
        "LMIM_FAST_ROUTES is not set, there 'attention.backward.32=cudnn'",
    ),
    "versions": ("pretrain", [], {"TEST_TORCH": "2.0"}, "versions.torch is '1.0', there '2.0'"),
    "more data": ("pretrain", ["--data", "OTHER"], {}, "--data is ['DATA'], there ['DATA', 'OTHER']"),
    "other data": (
        *("pretrain", ["OTHER"], {}),
        "the data has 30 records, there 31; words holds other records there; start",
    ),
    "skip list": (
        "pretrain",
        ["--loader.skip", "SKIP"],
        {},
        "the skip list names other records there; start",
    ),
    "two things": (
        "pretrain",
        [*SEED, "--steps", "5"],
        {},
        "--steps is 4, there 5; --seed is 0, there 3; start",
    ),
}
# One of two processes that are started by hand: all cases, one after the other.
RANK = """
import contextlib, io, json, os, sys
from lmim_fast import cli
from lmim_fast.train import run

rank, cases = sys.argv[1], json.loads(sys.argv[2])
versions, told = run.versions(), []
for port, arguments, variables in cases:
    os.environ.update(variables, RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run.versions = lambda: {**versions, "torch": os.environ["TEST_TORCH"]}
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(arguments)
    told.append((code, stderr.getvalue()))
    for name in variables:
        del os.environ[name]
print(json.dumps(told))
"""


def start_apart(cases):
    """Exit code and stderr of two processes for each case: for each rank its arguments and variables."""
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in cases]
    environment = {**ENVIRONMENT, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = []
    for rank in (0, 1):
        plan = [(store.port, *case[rank]) for store, case in zip(stores, cases, strict=True)]
        arguments = [sys.executable, "-c", RANK, str(rank), json.dumps(plan)]
        ranks.append(subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True))
    return list(zip(*(json.loads(rank.communicate(timeout=120)[0]) for rank in ranks), strict=True))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What both ranks of each case answered, and the folder in which they would run."""
    folder = tmp_path_factory.mktemp("apart")
    data, other = write_lmdb(folder / "words", 30), write_lmdb(folder / "other", 31)
    one, two = (listed(folder / f"skip{number}", data, number) for number in (1, 2))
    common = options(data, folder / "run", "--timeout", "60", *one, steps=4)
    plan = []
    for name, more, variables, _ in CASES.values():
        more = [{"OTHER": str(other), "SKIP": two[1]}.get(text, text) for text in more]
        there = ["pretrain", *common, *more]
        if more == [str(other)]:
            there = [str(other) if text == str(data) else text for text in there[:-1]]
        if name == "finetune":
            there = [name, "--data", str(data), "--output", str(folder / "run"), "--init", "none"]
        if name == "evaluate":
            there = [name, str(data), str(data)]
        versions = {"TEST_TORCH": "1.0"}
        plan.append(((["pretrain", *common], versions), (there, {**versions, **variables})))
    answers = [
        [(code, text.replace(str(data), "DATA").replace(str(other), "OTHER")) for code, text in ranks]
        for ranks in start_apart(plan)
    ]
    return dict(zip(CASES, answers, strict=True)), folder / "run"


@pytest.mark.parametrize("case", CASES)
def test_r24_ranks_that_were_started_apart_are_refused_by_name_and_nothing_is_written(told, case):
    answers, run = told
    for code, text in answers[case]:
        assert code == 2, text
        assert text.startswith("error: rank 1 differs from rank 0: ")
        assert CASES[case][3] in text
        assert "start all ranks by the same command, on the same data" in text
        assert text.count("\n") == 1
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
