"""The layers' own forms run on the few rows of these tests too; test_layers_plain.py has the other ones."""

from collections.abc import Iterator

import pytest
import torch

from lmim_fast.ops import dispatch


@pytest.fixture(autouse=True)
def _own_forms() -> Iterator[None]:
    """Backend "auto" would run PyTorch's own ops for a few rows on a CPU."""
    with dispatch.backend("auto" if torch.cuda.is_available() else "eager"):  # kernels are for "auto"
        yield
