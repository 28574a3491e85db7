"""Commands that make LMDBs out of other collections of crops."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from lmim_fast.config.checks import PathName, require, require_seed
from lmim_fast.config.run import MAX_THREADS

ImportFormat = Literal["auto", "folder", "tsv", "csv", "mmocr", "paddleocr", "tar"]


@dataclass(frozen=True)
class ImportConfig:
    """What `lmim data import` reads, and what it does to crops."""

    sources: tuple[PathName, ...]
    """Folders of images, lists of paths and labels, or tar archives; imported in this order."""
    output: PathName = "data/imported"
    """Folder of the new LMDB; must not hold one already."""
    format: ImportFormat = "auto"
    """folder: images at any depth; tsv: lines `path<TAB>label`; csv: with a header; mmocr: json or jsonl;
    paddleocr: recognition or detection list; tar: also .tar.gz, and WebDataset shards; auto: by what each
    source is, and it says what it took."""
    root: PathName | None = None
    """Folder that the paths of a list are relative to; None: the folder of the list."""
    label_from: Literal["none", "name", "parent"] = "none"
    """Label of an image in a folder: none, the file's name without its suffix, or the name of its folder."""
    sort: Literal["natural", "plain"] = "natural"
    """Order of names within a folder: img2 before img10 (natural), or by code point (plain)."""
    separator: Literal["tab", "space", "comma", "semicolon"] | None = None
    """What stands between the columns of a tsv or csv; None: a tab, or in a csv a comma. After the first one
    the rest of a tsv's line is the label."""
    path_column: str = "path"
    """Column of a csv with the image's path."""
    label_column: str | None = "label"
    """Column of a csv with the label; None: no labels."""
    turn_vertical: bool = True
    """Turn crops whose height is at least 1.5 times their width by 90 degrees counter-clockwise, but for
    those whose label is a single character."""
    apply_exif: bool = True
    """Turn images as their EXIF orientation says; training ignores the tag."""
    keep_broken: bool = False
    """Store images whose header cannot be used as they are, in place of rejecting them."""
    workers: int = 0
    """Threads that read and check images; 0: two per core, 16 at most. The result is the same."""
    restart: bool = False
    """Begin anew where an unfinished import of this output is found, in place of continuing it."""

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "name at least one folder, list or archive")
        require(
            0 <= self.workers <= MAX_THREADS, f"workers must be in [0, {MAX_THREADS}], got {self.workers}"
        )


@dataclass(frozen=True)
class MergeConfig:
    """What `lmim data merge` joins."""

    paths: tuple[PathName, ...]
    """LMDB folders, or folders that hold LMDB folders at any depth; their records follow each other."""
    output: PathName = "data/merged"
    """Folder of the new LMDB; must not hold one already."""
    dedupe: Literal["none", "image", "pair"] = "none"
    """Of records with the same image bytes (image), or the same bytes and label (pair), keep the first."""

    def __post_init__(self) -> None:
        require(len(self.paths) > 0, "name at least one LMDB folder")


@dataclass(frozen=True)
class SplitConfig:
    """How `lmim data split` divides records."""

    paths: tuple[PathName, ...]
    """LMDB folders, or folders that hold LMDB folders at any depth."""
    output: PathName = "data/split"
    """Folder of the new LMDBs, one for each part; must not exist or be empty."""
    parts: str = "train=0.98,val=0.02"
    """Names and shares of the parts; the shares add up to 1."""
    by: Literal["hash", "random"] = "hash"
    """hash: by the image's bytes, so equal images are in one part and shares are met on average; random: any
    record anywhere, shares met exactly."""
    seed: int = 0
    """Same seed, same parts."""

    def __post_init__(self) -> None:
        require(len(self.paths) > 0, "name at least one LMDB folder")
        require_seed(self.seed)
        self.shares()

    def shares(self) -> dict[str, float]:
        """Name of each part to its share; ValueError where `parts` is wrong."""
        shares: dict[str, float] = {}
        for part in self.parts.split(","):
            match = re.fullmatch(r"\s*([A-Za-z0-9][\w.-]*)\s*=\s*([0-9.eE+-]+)\s*", part, re.ASCII)
            require(match is not None, f"parts must look like train=0.98,val=0.02, got {self.parts!r}")
            assert match is not None
            name, share = match[1], _number(match[2])
            require(name not in shares, f"parts has {name} twice")
            require(0 < share < 1, f"the share of {name} must be between 0 and 1, got {match[2]}")
            shares[name] = share
        total = math.fsum(shares.values())
        require(abs(total - 1) < 1e-6, f"the shares of parts must add up to 1, got {total:g}")
        return shares


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
