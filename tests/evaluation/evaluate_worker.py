"""`lmim evaluate` with the reader of colours; run by torchrun in the tests."""

import sys

from evaluation_sets import install_files

from lmim_fast.cli import main

if __name__ == "__main__":
    install_files()
    sys.exit(main(["evaluate", *sys.argv[1:]]))
