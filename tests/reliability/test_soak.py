"""R4, R8, R9, R18: a short soak; its program takes any time."""

import subprocess
import sys
from pathlib import Path

import pytest
from fault_runs import processes_of

MINUTES = 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_r18_runs_under_trouble_end_with_the_right_weights_and_a_long_one_stays_flat(tmp_path):
    folder = tmp_path / "soak"
    program = [sys.executable, str(Path(__file__).with_name("soak.py")), "--output", str(folder)]
    try:
        done = subprocess.run(
            [*program, "--minutes", str(MINUTES), "--seed", "1"], capture_output=True, text=True, timeout=600
        )
    finally:
        for process in processes_of(folder):
            process.kill()
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict: all held" in done.stdout
    assert not list(folder.glob("round-*"))
