"""Lines of the doctor: a failing check is one, and stops no other."""

import io
import warnings

import pytest

from lmim_fast.doctor.findings import Finding, Findings
from lmim_fast.doctor.run import _printer
from lmim_fast.errors import DataError


def test_a_check_that_fails_is_an_error_line_and_the_next_one_runs():
    shown = []
    findings = Findings(shown.append)
    with findings.check("data"):
        raise DataError("no-samples: write them")
    with findings.check("DALI"):
        raise ImportError("pip install it")
    with findings.check("odd"):
        raise KeyError("name")
    with findings.check("good"):
        findings.ok("good", "all well")
    assert shown == findings.entries
    assert [(entry.level, entry.what, entry.text) for entry in shown] == [
        ("error", "data", "no-samples: write them"),
        ("error", "DALI", "pip install it"),
        ("error", "odd", "KeyError: 'name'"),
        ("ok", "good", "all well"),
    ]
    assert (findings.count("error"), findings.count("warning")) == (3, 0)


def test_ctrl_c_ends_the_checks():
    with pytest.raises(KeyboardInterrupt), Findings().check("slow"):
        raise KeyboardInterrupt


def test_what_a_check_warns_of_is_a_warning_line_once():
    findings = Findings()
    with findings.check("data"):
        for _ in range(2):
            warnings.warn("a hole", stacklevel=1)
        warnings.warn("old name", DeprecationWarning, stacklevel=1)
    assert findings.entries == [Finding("warning", "data", "a hole")]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_file_gets_a_line_a_finding_and_a_terminal_colours_and_wrapped_ones(monkeypatch):
    finding = Finding("error", "--data", "/data/\x1b[2Jwords: " + "broken " * 20, "mend it")
    stream = io.StringIO()
    _printer(stream)(finding)
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("error    --data       /data/\\x1b[2Jwords: broken ")
    assert line.endswith("broken - mend it")
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    _printer(terminal)(finding)
    lines = terminal.getvalue().splitlines()
    assert lines[0].startswith("\x1b[31merror    \x1b[0m--data       ")
    assert len(lines) > 2
    assert all(row.startswith(" " * 22) and len(row) < 70 for row in lines[1:])
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    _printer(plain)(finding)
    assert "\x1b" not in plain.getvalue()
