"""Pre-training: `python -m lmim_fast.pretrain`, or `torchrun --nproc-per-node=N -m lmim_fast.pretrain`."""

import sys

from lmim_fast.cli import main
from lmim_fast.train.run import run_pretrain

__all__ = ["run_pretrain"]

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
