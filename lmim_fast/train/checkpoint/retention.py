"""Which checkpoints of a run stay on disk."""

from __future__ import annotations

import math
from pathlib import Path

from lmim_fast import faults
from lmim_fast.errors import CheckpointError, LmimError
from lmim_fast.train.checkpoint import folders


def retain(run: Path, *, keep: int, keep_every: int = 0) -> None:
    """Delete checkpoints but the `keep` newest, multiples of `keep_every` steps, and the best, or warn.

    The best is that of the lowest `score` in its state. Nothing is deleted before the newest has been read
    back whole.

    Raises:
        CheckpointError: it is not whole.
        LmimError: it cannot be read.
    """
    paths = folders.finished(run)
    kept = _kept(paths, keep, keep_every)
    old = [path for path in paths if path not in kept]
    if not old:
        return
    folders.verify(paths[0])
    for path in old:
        faults.point("retention")
        folders.delete(path)
    folders.remove_unfinished(run)  # what could not be deleted before


def _kept(paths: list[Path], keep: int, keep_every: int) -> set[Path]:
    """Those of `paths`, newest first, that stay."""
    kept, scores = set(paths[:keep]), {}
    for path in paths:
        if keep_every and folders.step_of(path) % keep_every == 0:
            kept.add(path)
        try:
            score = folders.read_state(path / folders.STATE_FILE).get("score")
        except CheckpointError:
            continue  # a damaged one is not the best
        except LmimError:
            kept.add(path)  # it cannot be read now, and may be the best
            continue
        if isinstance(score, int | float) and math.isfinite(score):
            scores[path] = score
    if scores:
        kept.add(min(scores, key=lambda path: scores[path]))  # of equals the newest
    return kept
