"""Evaluation: `python -m lmim_fast.evaluate`, or `torchrun --nproc-per-node=N -m lmim_fast.evaluate`."""

import sys

if __name__ == "__main__":
    from lmim_fast.cli import main  # sets what torch reads when it is imported

    sys.exit(main(["evaluate", *sys.argv[1:]]))

from lmim_fast.report.evaluate_run import run_evaluate

__all__ = ["run_evaluate"]
