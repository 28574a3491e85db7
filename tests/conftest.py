"""Shared fixtures: the recorded tensors of the released code, and seeds."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest

# OpenMP threads sleep while they wait, here and in the processes that tests start: workers of pytest-xdist
# share the cores, and a thread that spins takes the time of the one it waits for. Torch reads it on import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Kernels run in Triton's interpreter, which is chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from triton_interpreter import patch_once

    patch_once()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a job in the background; processes inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # workers of pytest-xdist are a process a core

if importlib.util.find_spec("hypothesis"):  # the tests of kernels on a device run without it
    from hypothesis import HealthCheck, settings

    # Examples are the same in every run, and a busy machine is no failure.
    slow = [HealthCheck.too_slow]
    settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=slow)
    settings.load_profile("tests")

SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.fixture(scope="session")
def recorded() -> Path:
    """Folder with tensors recorded from the released code."""
    folder = SHARED / "fixtures"
    if not folder.is_dir():
        pytest.skip(f"no recorded tensors at {folder}")
    return folder


@pytest.fixture(scope="session")
def real_crops() -> Path:
    """Folder with LMDBs of real word crops."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no real crops at {folder}")
    return folder


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
