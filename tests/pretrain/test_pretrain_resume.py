"""A run that is stopped, in every way it can be, continues as if it had not been."""

import os
import signal
import weakref

import pytest
import torch
import warm
from pretrain_runs import curve, options, weights_of, write_lmdb

from lmim_fast import cli
from lmim_fast.train.checkpoint import folders
from lmim_fast.train.telemetry import Telemetry

STEPS = 14  # of 8 images each: several epochs of 30 records; checkpoints at 4, 8, 12, 14


def _killed(arguments, where, step):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync
    if where == "step":
        Telemetry.advance = lambda self, done: die() if done == step else None
    else:
        os.fsync = lambda fd: die() if where in os.readlink(f"/proc/self/fd/{fd}") else fsync(fd)
    return cli.main(["pretrain", *arguments])


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed processes: the order of sums is the same
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lmdb(tmp_path_factory.mktemp("data") / "words", 30)


def arguments_of(kind, data, run):
    """Options of a kind of run; a line of metrics spans three steps, so lines straddle checkpoints."""
    more = ["--log-every", "3"]
    if kind == "lmim":
        more += ["--accumulation", "2", "--teacher", "random", "--optim.clip-norm", "1.0"]
    return options(data, run, *more, objective=kind, steps=STEPS)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Runs that were never stopped, by kind."""
    made = {}

    def run_of(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("whole") / kind
            assert cli.main(["pretrain", *arguments_of(kind, data, made[kind])]) == 0
        return made[kind]

    return run_of


def assert_same_run(run, other):
    assert curve(run) == curve(other)
    assert weights_of(run, STEPS) == weights_of(other, STEPS)


def kill(arguments, where, step=0):
    done = warm.Program(_killed, arguments, where, step).wait()
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("kind", ["mae", "lmim"])
def test_r01_resume_after_kill_9_in_mid_epoch_is_bitwise_equal(data, whole, tmp_path, kind):
    run = tmp_path / "run"
    arguments = arguments_of(kind, data, run)
    kill(arguments, "step", 10)
    assert curve(run)[-1]["step"] == 9  # past the checkpoint of step 8
    assert cli.main(["pretrain", *arguments]) == 0
    assert_same_run(run, whole(kind))


def test_r01_resume_after_kill_9_during_a_save_is_bitwise_equal(data, whole, tmp_path):
    run = tmp_path / "run"
    arguments = arguments_of("mae", data, run)
    kill(arguments, "step-00000008.tmp/optimizer")
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["step-00000004", "step-00000008.tmp"]
    assert cli.main(["pretrain", *arguments]) == 0
    assert_same_run(run, whole("mae"))
    assert not list((run / "checkpoints").glob("*.tmp"))


def stop_at(monkeypatch, step, number):
    """Send this process a signal when that step is done."""

    def advance(self, done):
        if done == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Telemetry, "advance", advance)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)], ids=lambda n: str(n)
)
def test_r09_a_signal_saves_at_the_next_step_and_the_run_continues_bitwise(
    data, whole, tmp_path, monkeypatch, capsys, number, code
):
    run = tmp_path / "run"
    arguments = arguments_of("mae", data, run)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        stop_at(patched, 5, number)
        assert cli.main(["pretrain", *arguments]) == code
    shown = capsys.readouterr()
    assert f"stopped by {signal.Signals(number).name} after step 5 of {STEPS}" in shown.out
    assert "Traceback" not in shown.err
    assert (run / "checkpoints" / "step-00000005").is_dir()
    assert not (run / "encoder.safetensors").exists()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert cli.main(["pretrain", *arguments]) == 0
    assert_same_run(run, whole("mae"))


def test_r05_a_damaged_checkpoint_is_named_set_aside_and_the_older_one_continues_bitwise(
    data, whole, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    arguments = arguments_of("mae", data, run)
    with monkeypatch.context() as patched:
        stop_at(patched, 9, signal.SIGTERM)
        assert cli.main(["pretrain", *arguments]) == 0
    model = run / "checkpoints" / "step-00000009" / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    capsys.readouterr()
    assert cli.main(["pretrain", *arguments]) == 0
    shown = capsys.readouterr().out
    assert f"warning: {model} was altered" in shown
    assert "continuing from step-00000008" in shown
    assert (run / "checkpoints" / "step-00000009.damaged").is_dir()
    assert_same_run(run, whole("mae"))


def test_a_run_without_any_whole_checkpoint_is_refused_and_not_begun_anew(data, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = [*arguments_of("mae", data, run), "--keep-checkpoints", "1"]
    assert cli.main(["pretrain", *arguments]) == 0
    before = curve(run)
    (run / "checkpoints" / f"step-{STEPS:08d}" / "state.json").write_text("{}")
    capsys.readouterr()
    for _ in range(2):
        assert cli.main(["pretrain", *arguments]) == 1
        assert "no checkpoint in" in capsys.readouterr().err
    assert curve(run) == before


def test_a_finished_run_is_left_as_it_is(data, whole, capsys):
    run = whole("mae")
    before = (run / "metrics.jsonl").read_bytes(), weights_of(run, STEPS)
    assert cli.main(["pretrain", *arguments_of("mae", data, run)]) == 0
    assert ((run / "metrics.jsonl").read_bytes(), weights_of(run, STEPS)) == before
    assert f"from step {STEPS}" in capsys.readouterr().out


def test_a_run_continues_with_its_own_teacher_whatever_the_option_names_now(
    data, whole, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    arguments = arguments_of("lmim", data, run)
    with monkeypatch.context() as patched:
        stop_at(patched, 5, signal.SIGTERM)
        assert cli.main(["pretrain", *arguments]) == 0
    assert cli.main(["pretrain", *arguments, "--teacher", "gone.pth", "--init", "gone.pth"]) == 0
    shown = capsys.readouterr().out
    assert "--teacher gone.pth is not read: the run keeps the weights that it has" in shown
    assert "--init gone.pth is not read" in shown
    assert_same_run(run, whole("lmim"))


def test_the_checkpoint_is_not_kept_in_memory_while_the_run_goes_on(data, tmp_path, monkeypatch):
    arguments = arguments_of("mae", data, tmp_path / "run")
    with monkeypatch.context() as patched:
        stop_at(patched, 5, signal.SIGTERM)
        assert cli.main(["pretrain", *arguments]) == 0
    held, alive, read = [], [], folders.read

    def watched(path):
        found = read(path)
        held.append([weakref.ref(found), *map(weakref.ref, found.model.values())])
        held[-1] += map(weakref.ref, found.optimizer.values())
        return found

    monkeypatch.setattr(folders, "read", watched)
    monkeypatch.setattr(
        Telemetry, "advance", lambda self, step: alive.append(sum(ref() is not None for ref in held[0]))
    )
    assert cli.main(["pretrain", *arguments]) == 0
    assert len(held) == 1
    assert len(held[0]) > 50
    assert alive == [0] * (STEPS - 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", "3"], "seed was 0, now 3"),
        (["--steps", "10"], "has finished its 14 steps, --steps 10 is fewer"),
        (["--no-resume"], "already has checkpoints"),
    ],
)
def test_r14_a_run_folder_of_other_settings_is_refused_by_field(data, whole, capsys, change, message):
    assert cli.main(["pretrain", *arguments_of("mae", data, whole("mae")), *change]) == 2
    assert message in capsys.readouterr().err


def test_r14_a_run_folder_of_other_data_is_refused_and_a_renamed_database_is_not(
    data, whole, tmp_path, capsys
):
    other = write_lmdb(tmp_path / "other" / "words", 31)
    assert cli.main(["pretrain", *arguments_of("mae", other, whole("mae"))]) == 2
    assert "data.count was 30, now 31" in capsys.readouterr().err
    moved = write_lmdb(tmp_path / "moved" / "renamed", 30)
    assert cli.main(["pretrain", *arguments_of("mae", moved, whole("mae"))]) == 0
