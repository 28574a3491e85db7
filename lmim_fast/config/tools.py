"""Commands beside training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lmim_fast.config.checks import PathName, require, require_seed
from lmim_fast.config.run import MAX_PIXELS, MAX_PIXELS_LIMIT, MAX_THREADS
from lmim_fast.config.view import GuidanceConfig


@dataclass(frozen=True)
class ReportConfig:
    """What `lmim report` draws."""

    run: PathName
    """Run folder of a pre-training run."""
    output: PathName | None = None
    """HTML file to write; None: report.html in the run folder."""
    samples: int = 48
    """Crops on the sheet of plain and guidance views."""
    maps: int = 6
    """Crops with attention maps."""

    def __post_init__(self) -> None:
        require(self.samples >= 1, f"samples must be >= 1, got {self.samples}")
        require(self.maps >= 0, f"maps must be >= 0, got {self.maps}")


NO_REPLAY = (-1, -1, -1)
"""Three numbers as well: an option of three or none would take the paths behind it for some of them."""


@dataclass(frozen=True)
class InspectConfig:
    """What `lmim data inspect` reads."""

    paths: tuple[PathName, ...]
    """LMDB folders, or folders that hold LMDB folders at any depth."""
    replay: tuple[int, int, int] = NO_REPLAY
    """Seed, epoch and index of a sample: show its views, operations and mask as training had them. All -1
    stands for no replay."""
    run: PathName | None = None
    """Run folder or config.json whose data and settings the replay takes; paths, if given, are its data."""
    output: PathName = "replay.png"
    """PNG of the replay."""
    view: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Guidance view of a replay without a run."""

    def __post_init__(self) -> None:
        require(len(self.paths) > 0 or self.run is not None, "name at least one LMDB folder")
        require(self.run is None or self.replay != NO_REPLAY, "run is for a replay: give --replay too")
        if self.replay != NO_REPLAY:
            seed, epoch, index = self.replay
            require_seed(seed)
            require(0 <= epoch < 2**32, f"the epoch of a replay must be in [0, 2^32), got {epoch}")
            require(index >= 0, f"the index of a replay must be >= 0, got {index}")


@dataclass(frozen=True)
class SheetConfig:
    """What `lmim data sheet` draws."""

    paths: tuple[PathName, ...]
    """LMDB folders, or folders that hold LMDB folders at any depth."""
    output: PathName = "sheet.png"
    """PNG to write."""
    count: int = 64
    """Crops on the sheet."""
    seed: int = 0
    """Which crops: the first that a run of this seed trains on."""
    columns: int = 8
    """Crops in a row."""
    views: bool = False
    """Draw the guidance view of the first epoch beside each crop."""

    def __post_init__(self) -> None:
        require(len(self.paths) > 0, "name at least one LMDB folder")
        require(1 <= self.count <= 10_000, f"count must be in [1, 10000], got {self.count}")
        require_seed(self.seed)
        require(1 <= self.columns <= 100, f"columns must be in [1, 100], got {self.columns}")


@dataclass(frozen=True)
class VerifyConfig:
    """What `lmim data verify` decodes and writes."""

    paths: tuple[PathName, ...]
    """LMDB folders, or folders that hold LMDB folders at any depth."""
    output: PathName | None = None
    """Folder for verify.json (every broken record) and skip.txt (for --loader.skip); None: only printed."""
    threads: int = 0
    """Decoding threads; 0 takes one per core."""
    max_pixels: int = MAX_PIXELS
    """A record that claims more pixels than this is broken; as --loader.max-pixels of training."""
    skip_labels: bool = False
    """Put records whose label is missing, empty or not UTF-8 into skip.txt too."""
    strict: bool = False
    """Exit with 1 if a record is broken."""

    def __post_init__(self) -> None:
        require(len(self.paths) > 0, "name at least one LMDB folder")
        require(
            0 <= self.threads <= MAX_THREADS, f"threads must be in [0, {MAX_THREADS}], got {self.threads}"
        )
        require(
            1 <= self.max_pixels <= MAX_PIXELS_LIMIT,
            f"max_pixels must be in [1, 2^40], got {self.max_pixels}",
        )


@dataclass(frozen=True)
class StatsConfig:
    """What `lmim data stats` counts and draws."""

    paths: tuple[PathName, ...]
    """LMDB folders, or folders that hold LMDB folders at any depth."""
    output: PathName | None = None
    """Folder for stats.json and histograms (PNG); None: only printed."""
    max_pixels: int = MAX_PIXELS
    """A record that claims more pixels than this is broken; as --loader.max-pixels of training."""

    def __post_init__(self) -> None:
        require(len(self.paths) > 0, "name at least one LMDB folder")
        require(
            1 <= self.max_pixels <= MAX_PIXELS_LIMIT,
            f"max_pixels must be in [1, 2^40], got {self.max_pixels}",
        )


@dataclass(frozen=True)
class CharsetConfig:
    """What `lmim data charset` counts and writes."""

    paths: tuple[PathName, ...]
    """LMDB folders with labels, or folders that hold LMDB folders at any depth."""
    output: PathName = "charset.txt"
    """File to write, one character a line; must not exist."""
    min_count: int = 1
    """Characters that occur less often are left out."""
    normalize: Literal["none", "nfkc", "chinese"] = "none"
    """Labels are counted as they are, in Unicode's NFKC form, or as the Chinese benchmark compares them
    (NFKC, simplified, lower case, no spaces)."""
    order: Literal["frequency", "codepoint"] = "frequency"
    """Order of the classes: most frequent first, or by code point."""

    def __post_init__(self) -> None:
        require(len(self.paths) > 0, "name at least one LMDB folder")
        require(self.min_count >= 1, f"min_count must be >= 1, got {self.min_count}")


@dataclass(frozen=True)
class ConvertConfig:
    """What `lmim convert` reads and writes."""

    source: PathName
    """Run or checkpoint folder, or a file of weights; FILE::KEY chooses one of several models in it."""
    target: PathName
    """File to write."""
    to: Literal["released", "encoder"] | None = None
    """released: a .pth that the released code loads; encoder: the plain encoder as .safetensors; None: by the
    target's suffix."""
    step: int | None = None
    """Checkpoint of the run folder; None: the newest."""
