"""`kernels/` becomes `lmim_fast.kernels`, `csrc/` becomes `lmim_fast._C`; the rest is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lmim_fast", "lmim_fast.*"]), "lmim_fast.kernels"],
    package_dir={"lmim_fast": "lmim_fast", "lmim_fast.kernels": "kernels"},
    package_data={"lmim_fast": ["py.typed"], "lmim_fast.data.render": ["words.txt"]},
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
