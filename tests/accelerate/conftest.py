"""The fast forms run on the few rows of these tests too."""

from collections.abc import Iterator

import pytest
import torch

from lmim_fast.ops import dispatch


@pytest.fixture(autouse=True)
def _fast_forms() -> Iterator[None]:
    """Backend "auto" would leave a few rows on a CPU to the original forwards."""
    with dispatch.backend("auto" if torch.cuda.is_available() else "eager"):  # kernels are for "auto"
        yield
