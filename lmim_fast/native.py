"""`lmim_fast._C`, the parts written in C++, where it is built."""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

_INTERFACE = 4  # as in csrc/module.cpp


@functools.cache
def native() -> Any:
    """The module, or None with one warning: all that it does has a Python form."""
    try:
        return load()
    except ImportError as error:
        warnings.warn(
            f"lmim_fast._C is not built ({error}); its Python forms run: the same results up to rounding,"
            " slower. A C++ compiler and `pip install -e .` build it.",
            stacklevel=3,
        )
        return None


def load() -> Any:
    """The module.

    Raises:
        ImportError: it is not built, or from sources of another version: a checkout that was updated.
    """
    module = importlib.import_module("lmim_fast._C")
    found = getattr(module, "interface", None)
    if found != _INTERFACE:
        raise ImportError(f"{module.__file__} is of another version: interface {found}, not {_INTERFACE}")
    return module
