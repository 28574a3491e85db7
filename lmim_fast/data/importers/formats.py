"""The table of formats, and which of them a source has."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lmim_fast.config.collections import ImportConfig
from lmim_fast.data.importers.archive import Tar, is_tar
from lmim_fast.data.importers.entries import Part
from lmim_fast.data.importers.folder import Folder
from lmim_fast.data.importers.lists import Tsv
from lmim_fast.data.importers.mmocr import Mmocr, is_json_line
from lmim_fast.data.importers.paddleocr import PaddleOcr, is_detection
from lmim_fast.data.importers.table import Csv
from lmim_fast.data.visible import visible
from lmim_fast.errors import UsageError

FORMATS: dict[str, Callable[[str, ImportConfig], Part]] = {
    "folder": Folder,
    "tsv": Tsv,
    "csv": Csv,
    "mmocr": Mmocr,
    "paddleocr": PaddleOcr,
    "tar": Tar,
}
_LISTS = ("tsv", "csv", "mmocr", "paddleocr")
_OPTIONS = {
    "root": _LISTS,
    "label_from": ("folder",),
    "sort": ("folder",),
    "separator": ("tsv", "csv"),
    "path_column": ("csv",),
    "label_column": ("csv",),
}  # option -> formats that read it
_BEGINNING = 2**16  # bytes of a file that are looked at


class Opened(NamedTuple):
    """A source, the format that it is read in, and why."""

    part: Part
    format: str
    why: str


def open_sources(config: ImportConfig) -> list[Opened]:
    """Every source in its format.

    Raises:
        UsageError: a source cannot be read, none of the formats or several fit it, or an option is given that
            no source's format reads.
    """
    chosen = [_chosen(source, config) for source in config.sources]
    formats = {name for name, _ in chosen}
    for field in dataclasses.fields(config):
        readers = _OPTIONS.get(field.name)
        if readers and getattr(config, field.name) != field.default and formats.isdisjoint(readers):
            option = "--" + field.name.replace("_", "-")
            raise UsageError(
                f"{option} is for {', '.join(readers)}, this is {', '.join(sorted(formats))}; leave it out"
            )
    return [
        Opened(FORMATS[name](source, config), name, why)
        for source, (name, why) in zip(config.sources, chosen, strict=True)
    ]


def _chosen(source: str, config: ImportConfig) -> tuple[str, str]:
    is_folder = os.path.isdir(source)
    if not is_folder and not os.path.isfile(source):
        found = "not a file or folder" if os.path.exists(source) else "no such file or folder"
        raise UsageError(f"{visible(source)}: {found}; name folders, lists or archives to import")
    if config.format == "auto":
        return _guessed(source, config) if not is_folder else ("folder", "it is a folder")
    if is_folder != (config.format == "folder"):
        what = "a folder" if is_folder else "no folder"
        raise UsageError(f"{visible(source)} is {what}, so it cannot be read as {config.format}")
    return config.format, "as asked for"


def _guessed(source: str, config: ImportConfig) -> tuple[str, str]:
    """Format of a file, and why; by its name where that says it, otherwise by its first lines."""
    if is_tar(source):
        return "tar", "by its name"
    suffix = os.path.splitext(source)[1].lower()
    if suffix == ".csv":
        return "csv", "by its name"
    try:
        with open(source, "rb") as file:
            beginning = file.read(_BEGINNING)
    except OSError as error:
        raise UsageError(f"{visible(source)} cannot be read ({error.strerror})") from error
    if is_json_line(beginning):
        return "mmocr", "its first line is JSON"
    if suffix in (".json", ".jsonl"):
        return "mmocr", "by its name"
    lines = _first_lines(beginning)
    if lines is not None and is_detection(lines):
        return "paddleocr", "its lines hold boxes"
    if lines and config.separator not in (None, "tab"):
        return "tsv", "for it has a separator"
    if lines and all("\t" in line for line in lines):
        return "tsv", "its lines have a tab"
    raise UsageError(
        f"{visible(source)}: {_unclear(lines)}; say which it is: --format {'|'.join(FORMATS)}"
        " (lines of path, space and label: --format tsv --separator space)"
    )


def _first_lines(beginning: bytes) -> list[str] | None:
    """Whole lines of a text; None where it is none. Lines with bytes that are not UTF-8 are left out."""
    if b"\0" in beginning:
        return None
    raw = beginning.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if len(beginning) == _BEGINNING and len(raw) > 1:
        raw.pop()  # cut
    texts = [line.rstrip(b"\r").decode(errors="replace") for line in raw]
    return [text for text in texts if text and "\ufffd" not in text]


def _unclear(lines: Sequence[str] | None) -> str:
    if lines is None:
        return "a binary file and no tar archive by its name"
    if not lines:
        return "no lines to tell the format from"
    tabs = sum("\t" in line for line in lines)
    return f"the format is not clear, {tabs} of its first {len(lines)} lines have a tab"
