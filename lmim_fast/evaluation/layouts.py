"""Which labelled test sets lie under the user's paths, and which benchmark each belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lmim_fast.data.normalize import chinese, comparison_of, waics
from lmim_fast.data.store.databases import find_databases
from lmim_fast.errors import DataError, UsageError
from lmim_fast.evaluation.metrics import Normalize
from lmim_fast.evaluation.published import Benchmark

Layout = Literal["auto", "six", "union14m", "chinese", "plain"]

_BENCHMARKS: tuple[Benchmark, ...] = ("six", "union14m", "chinese")
# Benchmark -> dataset -> names of its folder in the wild, as `_plain` writes them, without a trailing count.
DATASETS: dict[str, dict[str, tuple[str, ...]]] = {
    "six": {
        "IIIT5K": ("iiit5k", "iiit", "iiit5kwords"),
        "IC13": ("ic13", "icdar13", "icdar2013"),
        "SVT": ("svt",),
        "IC15": ("ic15", "icdar15", "icdar2015"),
        "SVTP": ("svtp", "svtperspective"),
        "CUTE80": ("cute80", "cute"),
    },
    "union14m": {
        "curve": ("curve",),
        "multi_oriented": ("multioriented",),
        "artistic": ("artistic",),
        "contextless": ("contextless",),
        "salient": ("salient",),
        "multi_words": ("multiwords", "multiword"),
        "general": ("general",),
    },
    "chinese": {
        "scene": ("scene",),
        "web": ("web",),
        "document": ("document", "doc"),
        "handwriting": ("handwriting", "hand"),
    },
}
SPLITS: dict[str, tuple[int, ...]] = {
    "IIIT5K": (3000,),
    "IC13": (1015, 857),
    "SVT": (647,),
    "IC15": (2077, 1811),
    "SVTP": (645,),
    "CUTE80": (288,),
}
"""Images of the known splits of a dataset."""
# Names of union14m and chinese are everyday words: one folder alone is no proof. A parent folder may be.
_PARENTS = {"union14m": ("union14m", "u14m"), "chinese": ("chinese", "bctr", "fudan")}
_GENERIC = ("test", "lmdb", "val", "eval", "evaluation")  # folders whose parent says what they hold


@dataclass(frozen=True)
class TestSet:
    """One named test set."""

    __test__ = False  # not a class of tests, whatever pytest thinks of its name

    name: str
    path: Path
    """LMDB folder, or a folder of them that count as one set."""
    benchmark: Benchmark = "plain"
    dataset: str | None = None
    """Name in `DATASETS`; None in plain sets."""
    characters: str = ""
    """Those of the recogniser: they decide how plain sets are compared."""

    @property
    def normalize(self) -> Normalize:
        """What labels and readings become before they are compared."""
        by_benchmark = {"chinese": chinese, "plain": comparison_of(self.characters)}
        return by_benchmark.get(self.benchmark, waics)

    def split(self, count: int) -> str:
        """Which split a set of `count` images is: "IC13-857", or what is odd about the count."""
        if self.dataset not in SPLITS:
            return self.dataset or ""
        if count in SPLITS[self.dataset]:
            return f"{self.dataset}-{count}"
        known = " or ".join(map(str, SPLITS[self.dataset]))
        return f"{self.dataset}, not a known split (has {count} images, not {known})"


def find_test_sets(paths: Sequence[str], layout: Layout = "auto") -> list[TestSet]:
    """The test sets at `paths`: NAME=FOLDER is one set, a folder is one set for each LMDB in it.

    Args:
        paths:  in the order of the result.
        layout: the benchmark that all sets belong to; "auto" recognises it by folder names. Everyday names
            (`general`, `scene`) count only where the benchmark's name is in the path or a second of its sets
            is there. "chinese" takes sets of other names too: it also selects the normalisation.
    Raises:
        UsageError: a path that holds no test set, a name twice, or a set that `layout` does not know.
    """
    sets: list[TestSet] = []
    for path in paths:
        sets += _sets_at(path)
    names = [entry.name for entry in sets]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two test sets are called {name!r}; give each its own name: NAME=FOLDER")
    if layout == "plain":
        return sets
    if layout == "auto":
        return _recognised(sets)
    placed = [replace(entry, benchmark=layout, dataset=_dataset(entry, layout)) for entry in sets]
    for entry in placed:
        if entry.dataset is None and layout != "chinese":
            raise UsageError(
                f"{entry.name!r} is no set of --layout {layout} ({', '.join(DATASETS[layout])});"
                " name it NAME=FOLDER or take another layout"
            )
    return placed


def _sets_at(path: str) -> list[TestSet]:
    name, equals, named = path.partition("=")
    try:
        if equals and not Path(path).exists():
            if not name or not named:
                raise UsageError(f"{path!r} is not NAME=FOLDER; give both, as in IC15=/data/IC15_2077")
            find_databases([named])
            return [TestSet(name, Path(named))]
        root = Path(path).absolute()
        folders = [Path(folder) for folder in find_databases([root])]
        if root.is_file():  # an LMDB by its file
            root = folders[0]
        return [TestSet(_name(root, folder), folder) for folder in folders]
    except DataError as error:  # a path without data is a wrong path
        raise UsageError(str(error)) from error


def _name(root: Path, folder: Path) -> str:
    if folder != root:
        return folder.relative_to(root).as_posix()
    return f"{root.parent.name}/{root.name}" if _plain(root.name) in _GENERIC else root.name


def _recognised(sets: list[TestSet]) -> list[TestSet]:
    result = {entry.name: entry for entry in sets}
    for benchmark in _BENCHMARKS:
        datasets = {entry.name: _dataset(entry, benchmark) for entry in sets}
        several = sum(dataset is not None for dataset in datasets.values()) > 1
        for entry in sets:
            dataset = datasets[entry.name]
            sure = benchmark == "six" or several or _is_named_above(entry.path, benchmark)
            if dataset is not None and sure:
                result[entry.name] = replace(entry, benchmark=benchmark, dataset=dataset)
    return list(result.values())


def _dataset(entry: TestSet, benchmark: str) -> str | None:
    """The dataset that the set's name says it is, in its last part or behind a generic one."""
    parts = [_plain(part) for part in entry.name.split("/")]
    if parts[-1] in _GENERIC:  # scene/test
        parts = parts[:-1] or parts
    for dataset, names in DATASETS[benchmark].items():
        if parts[-1] in {name + end for name in names for end in _endings(dataset)}:
            return dataset
    return None


def _endings(dataset: str) -> list[str]:
    return ["", "test", "val", *(str(count) for count in SPLITS.get(dataset, ()))]


def _is_named_above(path: Path, benchmark: str) -> bool:
    parents = [_plain(part) for part in path.absolute().parts[:-1]]
    return any(name in parent for parent in parents for name in _PARENTS[benchmark])


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
