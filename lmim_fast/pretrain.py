"""Pre-training: `python -m lmim_fast.pretrain`, or `torchrun --nproc-per-node=N -m lmim_fast.pretrain`."""

import sys

if __name__ == "__main__":
    from lmim_fast.cli import main  # sets what torch reads when it is imported

    sys.exit(main(["pretrain", *sys.argv[1:]]))

from lmim_fast.train.run import run_training as run_pretrain

__all__ = ["run_pretrain"]
