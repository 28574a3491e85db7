"""Commands beside training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmim_fast.config.checks import require


@dataclass(frozen=True)
class ReportConfig:
    """What `lmim report` draws."""

    run: str
    """Run folder of a pre-training run."""
    output: str | None = None
    """HTML file to write; None: report.html in the run folder."""
    samples: int = 48
    """Crops on the sheet of plain and guidance views."""
    maps: int = 6
    """Crops with attention maps."""

    def __post_init__(self) -> None:
        require(self.samples >= 1, f"samples must be >= 1, got {self.samples}")
        require(self.maps >= 0, f"maps must be >= 0, got {self.maps}")


@dataclass(frozen=True)
class InspectConfig:
    """What `lmim data inspect` reads."""

    paths: tuple[str, ...]
    """LMDB folders, or folders that hold LMDB folders at any depth."""

    def __post_init__(self) -> None:
        require(len(self.paths) > 0, "name at least one LMDB folder")


@dataclass(frozen=True)
class CharsetConfig:
    """What `lmim data charset` counts and writes."""

    paths: tuple[str, ...]
    """LMDB folders with labels, or folders that hold LMDB folders at any depth."""
    output: str = "charset.txt"
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

    source: str
    """Run folder, or a released or MAERec .pth, or an encoder .safetensors."""
    target: str
    """File to write."""
    to: Literal["released", "encoder"] | None = None
    """released: a .pth that the released code loads; encoder: the plain encoder as .safetensors; None: by the
    target's suffix."""
    step: int | None = None
    """Checkpoint of the run folder; None: the newest."""
