"""R24: ranks that were started differently are refused before the first step, by what differs."""

import contextlib
import io
import json
import os

import pytest
import warm
from pretrain_runs import options, write_lmdb
from torch.distributed import TCPStore

from lmim_fast import cli
from lmim_fast.data.skip_list import skip_list_text
from lmim_fast.data.store.records import RecordStore
from lmim_fast.train import run

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


def _answer(rank, cases, path):
    """One of two processes that are started by hand: all cases, one after the other."""
    versions, told = run.versions(), []
    for port, arguments, variables in cases:
        apart = {name: text for name, text in warm.place(rank, 2, port).items() if "LOCAL" not in name}
        os.environ.update(variables | apart)  # each is the first of its machine, which tells
        run.versions = lambda: {**versions, "torch": os.environ["TEST_TORCH"]}
        with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(arguments)
        told.append((code, stderr.getvalue()))
        for name in variables:
            del os.environ[name]
    path.write_text(json.dumps(told))


def start_apart(cases, folder):
    """Exit code and stderr of two processes for each case: for each rank its arguments and variables."""
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in cases]
    ranks, answers = [], []
    for rank in (0, 1):
        plan = [(store.port, *case[rank]) for store, case in zip(stores, cases, strict=True)]
        answers.append(folder / f"rank-{rank}.json")
        ranks.append(warm.Program(_answer, rank, plan, answers[-1]))
    for rank in ranks:
        done = rank.wait()
        assert done.returncode == 0, done.stderr
    return list(zip(*(json.loads(answer.read_text()) for answer in answers), strict=True))


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
        for ranks in start_apart(plan, folder)
    ]
    return dict(zip(CASES, answers, strict=True)), folder / "run"


@pytest.mark.parametrize("case", CASES)
def test_r24_ranks_that_were_started_apart_are_refused_by_name_and_nothing_is_written(told, case):
    answers, folder = told
    for code, text in answers[case]:
        assert code == 2, text
        assert text.startswith("error: rank 1 differs from rank 0: ")
        assert CASES[case][3] in text
        assert "start all ranks by the same command, on the same data" in text
        assert text.count("\n") == 1
    assert not folder.exists()


def listed(path, data, number):
    """A skip list of one record, as an option."""
    (database,) = RecordStore([data]).fingerprint()["databases"]
    line = (database["name"], database["hash"], f"image-{number:09d}", "by hand")
    path.write_text(skip_list_text([line]))
    return ["--loader.skip", str(path)]


def _pretrain(shared, *more):
    return cli.main(["pretrain", *shared, *more[int(os.environ["RANK"])]])


def test_r24_the_same_data_and_skip_list_may_be_mounted_elsewhere_on_another_machine(tmp_path):
    data, moved = write_lmdb(tmp_path / "words", 30), write_lmdb(tmp_path / "moved" / "elsewhere", 30)
    here, there = (listed(tmp_path / name, data, 1) for name in ("here", "there"))
    shared = options(data, tmp_path / "run", *here, steps=2)
    assert shared[:2] == ["--data", str(data)]  # a list that is given again would add up
    arguments = shared[2:], ["--data", str(data)], ["--data", str(moved), "--loader.threads", "2", *there]
    for done in warm.Ranks(_pretrain, *arguments).wait():
        assert done.returncode == 0, done.stderr
