"""Shared fixtures: the recorded tensors of the released code, and seeds."""

import os
from pathlib import Path

import pytest
import torch

if (
    not torch.cuda.is_available()
):  # kernels run in Triton's interpreter, which is chosen before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

# One thread: OpenMP threads that share their cores with other processes wait for each other far too long.
torch.set_num_threads(1)

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
