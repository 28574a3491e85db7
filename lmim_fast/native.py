"""`lmim_fast._C`, the parts written in C++, where it is built."""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any


@functools.cache
def native() -> Any:
    """The module, or None with one warning: everything it does has a Python form, with the same results."""
    try:
        return importlib.import_module("lmim_fast._C")
    except ImportError as error:
        warnings.warn(
            f"lmim_fast._C is not built ({error}); its Python forms run: the same results, slower."
            " A C++ compiler and `pip install -e .` build it.",
            stacklevel=3,
        )
        return None
