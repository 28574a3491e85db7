"""Fixtures for tests of ops."""

from collections.abc import Iterator

import pytest
import torch

from lmim_fast.ops import dispatch


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch.empty gives is full of NaN: an output that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernels() -> Iterator[None]:
    """Ops run as kernels, and fail where they have none for their input."""
    with dispatch.backend("triton"):
        yield
