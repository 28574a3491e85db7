"""`lmim evaluate` with the reader of colours; run in two processes by the tests. {} is the rank."""

import os
import sys

from evaluation_sets import install_files

from lmim_fast.cli import main

if __name__ == "__main__":
    install_files()
    sys.exit(main(["evaluate", *(text.replace("{}", os.environ["RANK"]) for text in sys.argv[1:])]))
