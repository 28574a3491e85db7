"""`csrc/` becomes `lmim_fast._C`; the rest is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ParallelCompile().install()  # a file a core

setup(
    ext_modules=[
        Pybind11Extension(
            "lmim_fast._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            # No contraction: a product and a sum round as in NumPy, whatever instructions the machine has.
            extra_compile_args=[
                "-O3",
                "-ffp-contract=off",
                "-fno-trapping-math",  # nobody reads the traps' flags, and loops become vectors
                "-fno-math-errno",
                "-pthread",
            ],
            optional=True,  # without a compiler the Python form runs, with a warning
        )
    ],
)
