"""The embedded default data: words rendered as scene-text crops and written as an LMDB with labels."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmim_fast.config import RenderConfig
from lmim_fast.data.progress import progress_bar
from lmim_fast.data.render.crop import RENDERER, Recipe
from lmim_fast.data.render.layouts import LayoutShares
from lmim_fast.data.render.load import load_vocabulary
from lmim_fast.data.render.pool import render_records
from lmim_fast.data.store.resumable import ResumableWriter
from lmim_fast.data.store.writer import check_output_is_free

_MADE_OF = (
    "count", "seed", "max_length", "random_share", "lines_share", "curved_share", "vertical_share",
    "sign_share",
)  # fmt: skip

_SHOWN_EVERY = 20  # crops between two looks at the bar
_WORTH_A_SPEED = 1000  # crops; fewer are mostly the start of the processes


def render(config: RenderConfig, say: Callable[[str], None] | None = None) -> Path:
    """Render `config.count` crops into a new LMDB (`num-samples`, `image-%09d`, `label-%09d`, from 1).

    Crop k is a function of (seed, k, words, fonts, shares): the number of processes changes nothing, and a
    longer render begins with the crops of a shorter one. The database appears only when it is complete. Where
    a render of the same options was killed, this one goes on behind its last commit.

    Args:
        say: takes lines about what was left out, where it goes on and how fast it was; None: standard error.
    Returns:
        The absolute path of the new LMDB folder.
    Raises:
        UsageError: the output exists or cannot be made; words or fonts are missing, unreadable or unfit; an
            unfinished render has other options.
        LmimError:  a write failed (disk full), or a rendering process died.
    """
    say = say or _to_stderr
    output = Path(os.path.abspath(config.output))
    check_output_is_free(output)
    vocabulary, digests = load_vocabulary(config, say)
    recipe = Recipe(vocabulary, LayoutShares.of(config), config.seed)
    identity: dict[str, Any] = {name: getattr(config, name) for name in _MADE_OF}
    with ResumableWriter(
        output, {**identity, **digests, "renderer version": RENDERER}, restart=config.restart
    ) as writer:
        done = writer.committed
        if done:
            say(f"goes on with the unfinished render: {done:,} of {config.count:,} crops are there")
        _write(writer, recipe, range(done, config.count), config.processes, say)
    return output


def _write(
    writer: ResumableWriter, recipe: Recipe, indices: range, processes: int, say: Callable[[str], None]
) -> None:
    processes = processes or len(os.sched_getaffinity(0))
    started = time.monotonic()
    with (
        contextlib.closing(render_records(recipe, indices, processes)) as records,
        progress_bar("Rendering crops") as advance,
    ):
        for index, (label, image) in zip(indices, records, strict=True):
            writer.put(image, label)
            if writer.commit_is_due():
                writer.commit({})
            if index % _SHOWN_EVERY == 0:
                advance(index / indices.stop, index - indices.start)
    seconds = time.monotonic() - started
    if len(indices) >= _WORTH_A_SPEED:
        say(
            f"{len(indices):,} crops in {seconds:,.0f} s: {len(indices) / seconds:,.0f} crops/s"
            f" with {processes} {'process' if processes == 1 else 'processes'}"
        )


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
