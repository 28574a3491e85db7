"""The embedded default data: words rendered as scene-text crops and written as an LMDB with labels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lmim_fast.config import RenderConfig
from lmim_fast.data.render.pool import render_records
from lmim_fast.data.render.words import load_vocabulary
from lmim_fast.data.store.writer import LmdbWriter, check_output_is_free

Item = TypeVar("Item")


def render(config: RenderConfig) -> Path:
    """Render `config.count` crops into a new LMDB (`num-samples`, `image-%09d`, `label-%09d`, from 1).

    Crop k is a function of (seed, k, words, fonts): the number of processes changes nothing, and a longer
    render begins with the crops of a shorter one. The database appears only when it is complete.

    Returns:
        The absolute path of the new LMDB folder.
    Raises:
        UsageError: the output exists or cannot be made; words or fonts are missing, unreadable or unfit.
        LmimError:  a write failed (disk full), or a rendering process died.
    """
    output = Path(os.path.abspath(config.output))
    check_output_is_free(output)
    vocabulary = load_vocabulary(config.words, config.fonts, config.max_length, config.random_share)
    processes = config.processes or len(os.sched_getaffinity(0))
    with (
        LmdbWriter(output, config.count) as writer,
        contextlib.closing(render_records(vocabulary, config.seed, config.count, processes)) as records,
    ):
        for label, image in _with_progress(records, config.count):
            writer.put(image, label)
    return output


def _with_progress(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The items, with a progress bar on a terminal's standard error."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        yield from progress.track(items, total=count, description="Rendering crops")
