import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch

from lmim_fast.errors import LmimError, UsageError
from lmim_fast.train.side_files import add_new_lines, append, drop_lines_after
from lmim_fast.train.telemetry import Meter, Telemetry, describe
from lmim_fast.train.weights_biases import require_wandb

LOSSES = ("loss", "loss_recon", "loss_align")
CPU = torch.device("cpu")
LINE = {
    "step": 2,
    "epoch": 0.5,
    "loss": 1.25,
    "loss_recon": 1.0,
    "loss_align": 0.25,
    "lr": 1e-3,
    "images_per_second": 800.0,
    "data_wait_fraction": 0.031,
    "grad_norm": 2.0,
    "bad_records": 3,
    "skipped_steps": 0,
    "memory_bytes": 10**9,
    "elapsed_seconds": 1.5,
}


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_a_window_reports_the_means_of_its_finite_steps_and_names_the_others():
    meter = Meter(LOSSES)
    meter.add(1, row(2.0, 1.5, 0.5, 4.0))
    meter.add(2, row(float("nan"), 1.0, 0.5, 4.0))
    meter.add(3, row(1.0, 0.5, 0.5, float("inf")))
    meter.add(4, row(4.0, 3.5, 0.5, 2.0))
    means, skipped = meter.close_window()
    assert means == {"loss": 3.0, "loss_recon": 2.5, "loss_align": 0.5, "grad_norm": 3.0}
    assert skipped == [2, 3]
    assert (meter.skipped, meter.skipped_in_a_row) == (2, 0)


def test_skipped_steps_in_a_row_are_counted_across_windows():
    meter = Meter(LOSSES)
    for step in range(1, 4):
        meter.add(step, row(float("nan"), 0.0, 0.0, 0.0))
        means, _ = meter.close_window()
    assert means["loss"] is None
    assert meter.skipped_in_a_row == 3


def test_a_meter_continues_from_its_state_with_the_same_means():
    meter, values = Meter(LOSSES), (0.1, 0.7, 1.3)
    for step, value in enumerate(values, start=1):
        meter.add(step, row(value, value, 0.0, 1.0))
        meter = Meter.from_state(json.loads(json.dumps(meter.state(), allow_nan=False)), LOSSES, CPU)
    whole = Meter(LOSSES)
    for step, value in enumerate(values, start=1):
        whole.add(step, row(value, value, 0.0, 1.0))
    assert meter.close_window() == whole.close_window()


def test_a_not_finite_row_survives_the_state():
    meter = Meter(LOSSES)
    meter.add(7, row(float("nan"), 1.0, 1.0, float("inf")))
    restored = Meter.from_state(json.loads(json.dumps(meter.state(), allow_nan=False)), LOSSES, CPU)
    assert restored.close_window()[1] == [7]


def test_lines_past_a_step_and_a_torn_last_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"step": 20}\n{"step": 30}\n{"step": 1')
    drop_lines_after(path, 20)
    assert path.read_text() == '{"step": 10}\n{"step": 20}\n'


def test_lines_that_are_there_already_are_not_added_again(tmp_path):
    path = tmp_path / "words.jsonl"
    assert add_new_lines(path, []) == 0
    assert add_new_lines(path, [{"key": "a"}, {"key": "b"}, {"key": "a"}]) == 2
    assert add_new_lines(path, [{"key": "b"}, {"key": "c"}]) == 3
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


def test_a_full_disk_is_a_clear_error_when_a_line_is_written():
    with pytest.raises(LmimError, match="disk full while writing /dev/full"):
        append(Path("/dev/full"), ["line"])


def test_a_logged_line_reaches_the_file_tensorboard_and_the_screen(tmp_path, capsys):
    with Telemetry(tmp_path, LOSSES, total=4, start_step=0) as telemetry:
        telemetry.log(LINE)
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == LINE  # before the file is closed
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(2, 1.25)]
    shown = capsys.readouterr().out
    assert "step 2/4" in shown
    assert "loss 1.250 recon 1.000 align 0.250" in shown
    assert "800 images/s" in shown
    assert "data wait 3%" in shown
    assert "3 bad records" in shown


def test_a_terminal_of_100_columns_shows_losses_rate_and_data_wait_beside_the_bar(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with Telemetry(tmp_path, LOSSES, total=4000, start_step=0) as telemetry:
        telemetry.advance(2)
        telemetry.log({**LINE, "bad_records": 0})
    shown = capsys.readouterr().out
    assert "2/4000" in shown
    assert "loss 1.250 recon 1.000 align 0.250  800 images/s  data wait 3%" in shown
    assert "step 2/4000" not in shown


def test_a_tensorboard_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(LmimError, match=r"cannot write .*tensorboard: "):
        Telemetry(tmp_path, LOSSES, total=4, start_step=0)


def test_missing_tensorboard_is_said_once_and_the_curve_is_still_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Telemetry(tmp_path, LOSSES, total=4, start_step=0) as telemetry:
        telemetry.log(LINE)
        telemetry.log({**LINE, "step": 4})
    assert capsys.readouterr().out.count("no TensorBoard") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_name_that_tensorboard_cannot_write_is_said_and_the_curve_is_still_written(tmp_path, capsys):
    run = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    run.mkdir()
    with Telemetry(run, LOSSES, total=4, start_step=0) as telemetry:
        telemetry.log(LINE)
    assert "warning: no TensorBoard files: it cannot write to the name " in capsys.readouterr().out
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_ranks_other_than_the_first_write_and_say_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Telemetry(None, LOSSES, total=4, start_step=0) as telemetry:
        telemetry.log(LINE)
        telemetry.say("hello")
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_meter_of_an_older_checkpoint_gives_the_task_the_losses_that_it_has():
    state = {"steps": [7], "rows": [[2.0, 2.0, 0.0, None]], "skipped": 1, "skipped_in_a_row": 1}
    meter = Meter.from_state(state, ("loss",), CPU)
    assert meter.names == ("loss", "grad_norm")
    assert meter.rows[0][0] == 2.0
    assert meter.rows[0][1].isnan()
    lmim = Meter.from_state(state, LOSSES, CPU)
    assert lmim.rows[0][:3].tolist() == [2.0, 2.0, 0.0]
    assert lmim.state() == state | {"names": [*LOSSES, "grad_norm"]}


def test_the_progress_line_names_the_losses_of_the_task():
    shown = describe(LINE | {"loss": 1.25}, ("loss", "loss_recon"))
    assert shown.startswith("loss 1.250 recon 1.000  800 images/s")
    assert describe(LINE, ("loss",)).startswith("loss 1.250  800 images/s")


def test_a_held_out_loss_is_shown_and_reaches_tensorboard(tmp_path, capsys):
    with Telemetry(tmp_path, LOSSES, total=10000, start_step=0) as telemetry:
        telemetry.held_out({"step": 500, "loss": 1.234, "loss_recon": 1.0, "loss_align": None})
        telemetry.held_out({"step": 1000, "loss": None, "loss_recon": None, "loss_align": None})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["eval/loss", "eval/loss_recon"]
    assert [(event.step, round(event.value, 3)) for event in board.Scalars("eval/loss")] == [(500, 1.234)]
    shown = capsys.readouterr().out
    assert "step 500/10000  held-out loss 1.234\n" in shown
    assert "step 1000/10000  held-out loss not finite\n" in shown
    assert not (tmp_path / "metrics.jsonl").exists(), "the curve of training is a file of its own"


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: keeps what it is asked for, and fails from `fails_at` calls on."""
    calls, module = [], types.ModuleType("wandb")
    module.calls, module.fails_at = calls, 10**6

    def keep(name, /, **values):
        calls.append((name, values))
        if len(calls) >= module.fails_at:
            raise ConnectionError("no network")

    class Run:
        def log(self, numbers, step):
            keep("log", numbers=numbers, step=step)

        def finish(self, exit_code):
            keep("finish", exit_code=exit_code)

    def init(**values):
        keep("init", **values)
        return Run()

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def boarded(run, **settings):
    return Telemetry(run, LOSSES, total=4, start_step=0, wandb="scene-text", config={"seed": 3}, **settings)


def test_wandb_gets_every_number_and_a_resume_continues_its_run(tmp_path, wandb):
    with boarded(tmp_path) as telemetry:
        telemetry.log(LINE | {"grad_norm": None})
        telemetry.held_out({"step": 2, "loss": 1.5, "loss_recon": 1.0, "loss_align": 0.5})
        telemetry.validated({"step": 2, "accuracy": 0.5, "sets": {"IC15": {"accuracy": 0.5}}})
    (_, first), (_, line), (_, held_out), (_, validated), (last, end) = wandb.calls
    assert (first["project"], first["resume"], first["config"]) == ("scene-text", "allow", {"seed": 3})
    assert (first["name"], first["dir"]) == (tmp_path.name, str(tmp_path))
    numbers = {name: value for name, value in LINE.items() if name not in ("step", "grad_norm")}
    assert line == {"step": 2, "numbers": numbers}
    assert held_out["numbers"] == {"eval/loss": 1.5, "eval/loss_recon": 1.0, "eval/loss_align": 0.5}
    assert validated["numbers"] == {"val/mean": 0.5, "val/IC15": 0.5}
    assert (last, end["exit_code"]) == ("finish", 0)
    wandb.calls.clear()
    with pytest.raises(ZeroDivisionError), boarded(tmp_path):
        raise ZeroDivisionError
    assert wandb.calls[0][1]["id"] == first["id"]
    assert wandb.calls[-1] == ("finish", {"exit_code": 1})
    (tmp_path / "wandb_id").write_bytes(b"\xff../")
    wandb.calls.clear()
    with boarded(tmp_path):
        pass
    new = wandb.calls[0][1]["id"]
    assert new != first["id"]
    assert (tmp_path / "wandb_id").read_text() == new


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_wandb_that_fails_is_said_once_and_the_run_goes_on(tmp_path, capsys, wandb, fails_at):
    wandb.fails_at = fails_at
    with boarded(tmp_path) as telemetry:
        telemetry.log(LINE)
        telemetry.log(LINE | {"step": 4})
    assert (
        capsys.readouterr().out.count("warning: no more is logged to Weights & Biases (ConnectionError") == 1
    )
    assert len(wandb.calls) == fails_at
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_wandb_without_its_package_is_refused_before_training(tmp_path, monkeypatch):
    require_wandb(None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="--wandb scene-text needs the package wandb: pip install wandb"):
        require_wandb("scene-text")
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # a folder of that name
    with pytest.raises(UsageError, match="pip install wandb"):
        require_wandb("scene-text")


def test_ranks_other_than_the_first_start_no_wandb_run(wandb):
    with boarded(None) as telemetry:
        telemetry.log(LINE)
        telemetry.held_out({"step": 2, "loss": 1.5})
    assert wandb.calls == []
