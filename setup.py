"""`csrc/` becomes `lmim_fast._C`; the rest is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "lmim_fast._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            optional=True,  # without a compiler the Python form runs, with a warning
        )
    ],
)
