"""`lmim evaluate` with the reader of colours; run in two processes by the tests."""

import sys

from evaluation_sets import install_files

from lmim_fast.cli import main

if __name__ == "__main__":
    install_files()
    sys.exit(main(["evaluate", *sys.argv[1:]]))
