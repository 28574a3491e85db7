"""`lmim doctor` on a machine that lacks something: a line says so, and all other lines are there."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple

import forked
import pytest
import torch
from pretrain_runs import ENVIRONMENT, options, write_lmdb

from lmim_fast import cli
from lmim_fast.doctor import machine, packages
from lmim_fast.doctor.findings import Findings
from lmim_fast.ops import gelu

Usage = namedtuple("Usage", "total used free")


def doctor_without(*modules, arguments=()):
    """The command in a process of its own, in which these modules cannot be imported."""
    code = f"""
import sys
class NoTorch:  # None in sys.modules is what tyro takes for an imported torch
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name=name)
if "torch" in {modules!r}:
    sys.meta_path.insert(0, NoTorch())
else:
    sys.modules.update(dict.fromkeys({modules!r}))
from lmim_fast.doctor import dry_run
dry_run._SECONDS = 0.1
from lmim_fast.cli import main
sys.exit(main({["doctor", *arguments]!r}))
"""
    if "torch" in modules:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    else:
        done = forked.run("-c", code, env=ENVIRONMENT)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines(), done.stderr


def levels(lines, what):
    return [line.split()[0] for line in lines if line[9:].startswith(what)]


def test_a_good_machine_has_no_error_and_says_what_it_has(tmp_path, capsys):
    file = tmp_path / "findings.json"
    assert cli.main(["doctor", "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["python", "packages", "DALI", "native part", "GPU", "cores", "memory", "/dev/shm", "open files"]
    assert [name for name in names if levels(lines, name)] == names
    document = json.loads(file.read_text())
    assert document["errors"] == 0
    assert [f"{entry['level']:9}{entry['what']:13}" for entry in document["findings"]] == [
        line[:22] for line in lines[:-1]
    ]
    assert lines[-1].startswith("0 errors, ")


def test_without_dali_a_line_says_what_to_install_and_the_step_is_made_on_zeros(tmp_path):
    data, run = write_lmdb(tmp_path / "words", 12), tmp_path / "run"
    arguments = ["pretrain", *options(data, run)]
    code, lines, complaint = doctor_without("nvidia", "nvidia.dali", arguments=arguments)
    assert code == 1
    assert levels(lines, "DALI") == ["error"]
    assert any("DALI" in line and "lmim_fast[cuda13]" in line for line in lines)
    assert levels(lines, "--data") == levels(lines, "records") == ["ok"]
    assert levels(lines, "batches") == ["error"]
    assert any("of zeros, as there is no data," in line for line in lines if levels([line], "step"))
    assert levels(lines, "time") == ["ok"]
    assert complaint == "error: 2 checks failed; the lines above say what to do\n"
    assert not run.exists()


def test_without_lmdb_and_triton_and_the_native_part_the_other_checks_are_made(tmp_path):
    data = write_lmdb(tmp_path / "words", 12)
    arguments = ["pretrain", *options(data, tmp_path / "run")]
    code, lines, _ = doctor_without("lmdb", "triton", "lmim_fast._C", arguments=arguments)
    assert code == 1
    assert levels(lines, "lmdb") == levels(lines, "--data") == ["error"]
    assert levels(lines, "triton") == levels(lines, "native part") == ["warning"]  # for GPUs; slower
    assert "reading records needs lmdb" in next(line for line in lines if levels([line], "--data"))
    assert levels(lines, "model") == levels(lines, "time") == ["ok"]


def test_without_torch_the_machine_is_still_looked_at(tmp_path):
    data = write_lmdb(tmp_path / "words", 12)
    code, lines, _ = doctor_without("torch", arguments=["pretrain", *options(data, tmp_path / "run")])
    assert code == 1
    assert levels(lines, "torch") == levels(lines, "GPU") == levels(lines, "config") == ["error"]
    assert levels(lines, "cores") == levels(lines, "memory") == ["ok"]


def test_an_old_package_is_named_with_what_is_asked_for(monkeypatch):
    version = packages._version
    monkeypatch.setattr(packages, "_version", lambda names: "1.0" if "numpy" in names else version(names))
    monkeypatch.setattr(packages, "_problem", _only_versions)
    findings = Findings()
    packages._packages(findings)
    (entry,) = [entry for entry in findings.entries if entry.level != "ok"]
    assert (entry.level, entry.what) == ("error", "numpy")
    assert entry.text.startswith("1.0, asked for is >=1.26")
    assert entry.advice.startswith('pip install "numpy>=1.26')


def test_a_machine_on_which_dali_was_never_installed_is_told_how(monkeypatch):
    monkeypatch.setattr(packages, "_version", lambda _: None)
    findings = Findings()
    packages._dali(findings)
    (entry,) = findings.entries
    assert (entry.level, entry.text) == ("error", "is not installed")
    assert 'pip install "lmim_fast[cuda13]"' in entry.advice


def _only_versions(names, version, asked):
    return None if asked.contains(version, prereleases=True) else f"{version}, asked for is {asked}"


def test_little_shared_memory_and_few_files_are_warnings_with_a_command(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**26, 0, 2**26))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 512))
    monkeypatch.setattr(machine, "available_memory", lambda: 2**30)
    monkeypatch.setattr(machine, "visible_gpus", lambda: 8)
    monkeypatch.setattr(machine, "cores", lambda: 16.0)
    findings = Findings()
    machine.check_machine(findings)
    found = {entry.what: (entry.level, entry.text, entry.advice) for entry in findings.entries}
    assert found["/dev/shm"][:2] == ("warning", "64 MiB free")
    assert "--shm-size" in found["/dev/shm"][2]
    assert found["open files"] == ("warning", "256 allowed", "ulimit -n 512")
    assert found["memory"][:2] == ("warning", "1.0 GiB available")
    assert found["cores"][:2] == ("warning", "16 for 8 GPUs")


def test_a_gpu_that_torch_cannot_use_is_an_error(monkeypatch):
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/nvidiactl")
    for cuda, words in ((None, "built without CUDA"), ("13.0", "torch for CUDA 13.0 cannot use it")):
        findings = Findings()
        machine._no_gpu(findings, cuda)
        (entry,) = findings.entries
        assert entry.level == "error"
        assert words in entry.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="in Triton's interpreter")
def test_a_kernel_is_run_and_compared_with_its_plain_form(monkeypatch):
    assert machine._kernel_problem(torch.device("cpu")) is None
    right = gelu.operators.bias_gelu
    monkeypatch.setattr(gelu.operators, "bias_gelu", lambda *inputs: right(*inputs) + 0.1)
    assert machine._kernel_problem(torch.device("cpu")) == "a kernel differs from its plain form by 0.1"

    def broken(*_):
        raise OSError("no compiler\nand more")

    monkeypatch.setattr(gelu.operators, "bias_gelu", broken)
    assert machine._kernel_problem(torch.device("cpu")) == "a kernel cannot run: OSError: no compiler"
