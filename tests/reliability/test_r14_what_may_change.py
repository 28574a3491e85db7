"""R14: a checkpoint knows what it is of. What moves no number may change at a resume, the rest may not."""

import hashlib
import json
import shutil

import pytest
from pretrain_runs import curve, lines, options, weights_of, write_lmdb

from lmim_fast import cli
from lmim_fast.config.io import config_hash, to_dict
from lmim_fast.data.store.records import RecordStore
from lmim_fast.faults import Fault, injected
from lmim_fast.train.checkpoint import folders
from lmim_fast.train.export import load_model

STEPS, STOP = 8, 5
# Each alone, in one process, leaves every bit as it was. Sharding and processes: R2.
MAY_CHANGE = {
    "threads": ("--loader.threads", "3", "--loader.prefetch", "5"),
    "recomputation": ("--activation-checkpointing",),
    "layout": ("--checkpoint-layout", "sharded", "--keep-checkpoints", "1", "--keep-every", "2"),
    "watching": ("--timeout", "900", "--max-time", "1.0", "--log-every", "1", "--profile", "1"),
    "parallel": ("--parallel", "replicate", "--cuda-graph", "off"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lmdb(tmp_path_factory.mktemp("data") / "words", 30)


def arguments_of(data, run):
    return options(data, run, "--teacher", "random", "--seed", "11", objective="lmim", steps=STEPS)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run that was never stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main(["pretrain", *arguments_of(data, run)]) == 0
    return run


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """The same run, stopped after a few steps."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with injected(Fault("step", "term", at=STOP)):
        assert cli.main(["pretrain", *arguments_of(data, run)]) == 0
    return run


def test_r14_a_checkpoint_knows_its_config_its_seed_and_its_data(data, stopped):
    state = folders.read(folders.latest(stopped)).state
    _, config = load_model(stopped)
    assert state["config"] == to_dict(config)
    assert state["config_hash"] == config_hash(config)
    assert (state["step"], state["seed"], config.seed) == (STOP, 11, 11)
    assert state["config"]["data"] == [str(data)]
    assert state["data"] == RecordStore([data]).fingerprint()
    assert state["data"]["count"] == 30
    assert state["teacher"]["bytes"] == (stopped / "teacher.safetensors").stat().st_size


@pytest.mark.parametrize("what", MAY_CHANGE)
def test_r14_options_that_move_no_number_may_change_and_the_run_continues_bitwise(
    data, whole, stopped, tmp_path, what
):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    assert cli.main(["pretrain", *arguments_of(data, run), *MAY_CHANGE[what]]) == 0
    assert curve(run) == curve(whole)
    assert (run / "encoder.safetensors").read_bytes() == (whole / "encoder.safetensors").read_bytes()


def test_r14_a_checkpoint_of_the_first_format_continues_bitwise(data, whole, stopped, tmp_path):
    """As version 0.1.0 wrote it before several processes could share a model: `cuda_graph` was a boolean."""
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    path = folders.latest(run) / "state.json"
    state = json.loads(path.read_text())
    config = state["config"]
    newer = ("parallel", "shard_size", "reshard", "activation_checkpointing", "keep_every")
    newer += ("checkpoint_layout", "max_time", "timeout", "eval_data", "eval_every", "eval_images")
    for name in (*newer, "profile", "wandb"):
        del config[name]
    config["cuda_graph"] = False
    hashed = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    names = (
        "config",
        "config_hash",
        "versions",
        "data",
        "seed",
        "teacher",
        "step",
        "meter",
        "seconds",
        "files",
    )
    body = {name: state[name] for name in names} | {"config": config, "config_hash": hashed[:16]}
    assert set(state) - set(body) == {"score", "checksum"}
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**body, "checksum": checksum}, indent=1))
    described = json.loads((run / "config.json").read_text()) | {"config": config}
    (run / "config.json").write_text(json.dumps(described))

    assert load_model(run)[1].cuda_graph == "off"
    assert cli.main(["pretrain", *arguments_of(data, run)]) == 0
    assert [line["step"] for line in lines(run)] == list(range(1, STEPS + 1))
    assert curve(run) == curve(whole)
    assert weights_of(run, STEPS) == weights_of(whole, STEPS)


def test_a_finished_run_goes_on_to_more_steps_and_may_be_stopped_there(data, whole, tmp_path, capsys):
    runs = [tmp_path / "once", tmp_path / "stopped"]
    for run in runs:
        shutil.copytree(whole, run)
    longer = ("--steps", str(STEPS + 3))
    assert cli.main(["pretrain", *arguments_of(data, runs[0]), *longer]) == 0
    told = capsys.readouterr().out
    assert f"{runs[0]} was finished after 8 steps and goes on to 11: the learning rate goes from " in told
    with injected(Fault("step", "term", at=1)):  # after the first of the new steps
        assert cli.main(["pretrain", *arguments_of(data, runs[1]), *longer]) == 0
    assert "stopped by SIGTERM after step 9 of 11" in capsys.readouterr().out
    assert cli.main(["pretrain", *arguments_of(data, runs[1])]) == 2
    assert "stands at step 9 of 11, --steps 8 would change its learning rate" in capsys.readouterr().err
    assert cli.main(["pretrain", *arguments_of(data, runs[1]), *longer]) == 0
    assert curve(runs[0]) == curve(runs[1])
    assert curve(runs[0])[:STEPS] == curve(whole)
    assert weights_of(runs[0], STEPS + 3) == weights_of(runs[1], STEPS + 3)
    assert [line["step"] for line in lines(runs[0])] == list(range(1, STEPS + 4))


def test_a_damaged_teacher_is_written_again_from_what_the_option_names(
    data, whole, stopped, tmp_path, capsys
):
    run, backup = tmp_path / "run", tmp_path / "backup.safetensors"
    shutil.copytree(stopped, run)
    shutil.copy(run / "teacher.safetensors", backup)
    before = backup.read_bytes()
    damaged = before[:-1] + bytes([before[-1] ^ 1])
    (run / "teacher.safetensors").write_bytes(damaged)
    other = str(whole / "encoder.safetensors")
    for named, why in ((other, "has other weights"), ("gone.pth", "gone.pth does not exist")):
        assert cli.main(["pretrain", *arguments_of(data, run), "--teacher", named]) == 1
        told = capsys.readouterr().err
        assert f"{run / 'teacher.safetensors'} was altered" in told
        assert why in told
        assert "pass --teacher the file that the run began with" in told
        assert (run / "teacher.safetensors").read_bytes() == damaged
    assert cli.main(["pretrain", *arguments_of(data, run), "--teacher", str(backup)]) == 0
    assert f"it is written again from --teacher {backup}, which has the same" in capsys.readouterr().out
    assert (run / "teacher.safetensors").read_bytes() == before
    assert curve(run) == curve(whole)
    (run / "teacher.safetensors").unlink()
    assert cli.main(["pretrain", *arguments_of(data, run)]) == 0  # a random one: the seed gives it again
    assert (run / "teacher.safetensors").read_bytes() == before
