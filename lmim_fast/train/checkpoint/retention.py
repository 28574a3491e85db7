"""Which checkpoints of a run stay on disk."""

from __future__ import annotations

import math
from pathlib import Path

from lmim_fast import faults
from lmim_fast.errors import CheckpointError, LmimError
from lmim_fast.train.checkpoint import folders, removal


def retain(run: Path, *, keep: int, keep_every: int = 0) -> None:
    """Delete checkpoints but the `keep` newest, multiples of `keep_every` steps, and the best, or warn.

    The best is that of the lowest `score` in its state. Nothing is deleted before the newest has been read
    back whole.

    Raises:
        CheckpointError: it is not whole.
        LmimError: it cannot be read.
    """
    kept, old = _sort(folders.finished(run), keep, keep_every)
    if not old:
        return
    folders.verify(kept[0])
    for path in old:
        faults.point("retention")
        removal.delete(path)
    removal.remove_unfinished(run)  # what could not be deleted before


def _sort(paths: list[Path], keep: int, keep_every: int) -> tuple[list[Path], list[Path]]:
    """Those of `paths`, newest first, that stay, and those that go; of misnamed ones neither."""
    readable, unreadable, scores = [], set(), {}
    for path in paths:
        try:
            score = folders.state_of(path).get("score")
        except folders.MisnamedError:
            continue
        except CheckpointError:
            score = None  # a damaged one is not the best
        except LmimError:
            unreadable.add(path)  # now; it may be the best
            continue
        readable.append(path)
        if isinstance(score, int | float) and math.isfinite(score):
            scores[path] = score
    stay = unreadable | set(readable[:keep])
    stay |= {path for path in readable if keep_every and folders.step_of(path) % keep_every == 0}
    if scores:
        stay.add(min(scores, key=lambda path: scores[path]))  # of equals the newest
    kept = [path for path in paths if path in stay]
    return kept, [path for path in readable if path not in stay]
