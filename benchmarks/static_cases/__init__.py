"""The shipped kernel configurations: launch functions called on meta tensors at the sizes of the models.

One module for each module of kernels/ (or for two that belong together); its `cases` yield (what is computed,
a call). `benchmarks/static.py` records what the calls launch and compiles it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from benchmarks.static_build import Case


def cases() -> Iterator[Case]:
    """All of them."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        if not module.name.endswith(".common"):
            yield from importlib.import_module(module.name).cases()
