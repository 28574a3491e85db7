"""R31: no control character of a file reaches the terminal or a log, whatever its encoding."""

import io
import json
import os
import sys
import warnings
from pathlib import Path

import lmdb
import pytest
import torch
from pretrain_runs import write_lmdb

from lmim_fast import cli
from lmim_fast.cli_commands import COMMANDS

ESCAPE = "\x1b[31m\x9b\u202e"  # red, the one-byte form of ESC [, text from right to left


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of each kind with escapes in what its reader may quote."""
    root = tmp_path_factory.mktemp("r31")
    words = write_lmdb(root / f"words{ESCAPE}é", 6, broken=(2,))
    keys = root / "keys"
    keys.mkdir()
    with lmdb.open(str(words), map_size=2**26) as environment, environment.begin(write=True) as transaction:
        for number in range(1, 7):
            transaction.put(b"label-%09d" % number, f"naïve中{ESCAPE}".encode())
    with lmdb.open(str(keys), map_size=2**26) as environment, environment.begin(write=True) as transaction:
        transaction.put(f"{ESCAPE}-1".encode(), b"x")
    torch.save({f"{ESCAPE}{n}": torch.ones(2) for n in range(3)}, root / "weights.pth")
    run = root / "run"
    run.mkdir()
    config = {"config": {"objective": ESCAPE, f"key{ESCAPE}": ESCAPE}, "versions": {ESCAPE: ESCAPE}}
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, ESCAPE: 1.0}) + "\n")
    (root / "list.csv").write_text(f"a{ESCAPE},b\nx,y\n")
    return root


COMMANDS_READING = {
    "label": (["data", "inspect", f"words{ESCAPE}é"], 0),
    "labels": (["data", "stats", f"words{ESCAPE}é"], 0),
    "broken": (["data", "verify", f"words{ESCAPE}é"], 0),
    "key": (["data", "inspect", "keys"], 1),
    "tensor": (["convert", "weights.pth", f"out{ESCAPE}.safetensors"], 1),
    "init": (["pretrain", "--teacher", "weights.pth", "--preset", "tiny", "--data", f"words{ESCAPE}é"], 1),
    "report": (["report", "run"], 1),
    "column": (["data", "import", "list.csv"], 2),
    "option": (["pretrain", f"--{ESCAPE}", "--data", "x"], 2),
    "command": ([f"{ESCAPE}"], 2),
}


@pytest.mark.parametrize("case", COMMANDS_READING)
def test_r31_no_command_prints_a_control_character_of_a_file(capfdbinary, monkeypatch, files, case):
    arguments, code = COMMANDS_READING[case]
    monkeypatch.chdir(files)
    assert cli.main(arguments) == code
    printed = b"".join(capfdbinary.readouterr()).decode()
    assert not set("\x1b\x9b\u202e") & set(printed)
    assert "\\x1b" in printed or "\\x9b" in printed or case == "broken", printed


def test_r31_warnings_and_tracebacks_print_none_either(capsys, monkeypatch):
    def fail(config):
        sys.stderr.write(warnings.formatwarning(UserWarning(f"odd {ESCAPE}"), UserWarning, cli.__file__, 1))
        raise KeyError(f"a bug {ESCAPE}\n")

    monkeypatch.setitem(COMMANDS, "convert", COMMANDS["convert"]._replace(entry=fail))
    with pytest.raises(KeyError) as raised:
        cli.main(["convert", "a", "b"])
    sys.excepthook(raised.type, raised.value, raised.tb)
    told = capsys.readouterr().err
    assert "warning: odd \\x1b[31m" in told
    assert "a bug \\x1b[31m" in told
    assert "\x1b" not in told


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_r31_every_name_and_label_can_be_printed_on_a_terminal_without_utf_8(
    monkeypatch, tmp_path: Path, files, encoding
):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    raw = os.fsdecode(bytes(tmp_path) + b"/\xffraw\xe9")  # no UTF-8
    os.rename(write_lmdb(tmp_path / "data", 4), raw)
    assert cli.main(["data", "inspect", raw, str(files / f"words{ESCAPE}é")]) == 0
    assert cli.main(["data", "inspect", f"{raw}中"]) == 2
    assert [stream.errors for stream in streams] == ["strict"] * 2
    for stream in streams:
        stream.flush()
    printed, told = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    assert "\\udcffraw" in printed
    assert told.startswith("error: ")
    assert "\\u4e2d" in told
