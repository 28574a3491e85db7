"""`--compile` is refused at the start where nothing can compile."""

import sysconfig
from pathlib import Path

import pytest
import torch
from pretrain_runs import options, write_lmdb

from lmim_fast import cli
from lmim_fast.errors import UsageError
from lmim_fast.train.compiler import require_compiler


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_a_compiler_that_works_passes_and_one_that_does_not_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, variable: str
) -> None:
    monkeypatch.delenv(variable, raising=False)
    require_compiler(torch.device(device))  # the package's own extension was built with it
    for compiler, reason in {
        "/nonexistent": r"it cannot be started \(No such file or directory\)",
        str(tmp_path): r"it cannot be started \(Permission denied\)",
        "/bin/false": r"exit code 1, it says nothing",
        "/bin/true": r"it wrote no file",
    }.items():
        monkeypatch.setenv(variable, compiler)
        with pytest.raises(
            UsageError, match=rf"'{compiler}' does not work: {reason}; install one .*{variable}"
        ):
            require_compiler(torch.device(device))
    monkeypatch.delenv(variable)
    monkeypatch.setattr(sysconfig, "get_paths", lambda **_: {"include": str(tmp_path)})
    with pytest.raises(
        UsageError, match=r"Python\.h: No such file.*apt install python3-dev.*drop --compile$"
    ):
        require_compiler(torch.device(device))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"'g(cc|\+\+)' does not work: it cannot be started"):
        require_compiler(torch.device(device))


def test_a_run_that_cannot_compile_ends_before_it_has_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    data, output = write_lmdb(tmp_path / "data", 8), tmp_path / "run"
    assert cli.main(["pretrain", *options(data, output, "--compile")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --compile needs a C++ compiler, and '/nonexistent' does not work")
    assert told.count("\n") == 1
    assert not output.exists()
