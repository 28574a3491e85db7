"""What `lmim evaluate` reads and counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmim_fast.config.checks import PathName, require


@dataclass(frozen=True)
class EvaluateConfig:
    """An evaluation of a recogniser on labelled test sets."""

    model: PathName
    """Run folder of a fine-tuning, or a recogniser file (ours or released)."""
    data: tuple[PathName, ...]
    """Test sets: LMDB folders, NAME=FOLDER, or folders whose layout is known."""
    output: PathName | None = None
    """Folder for evaluation.json and .html; None: evaluation/ in the run folder or beside the file,
    evaluation-step-N/ in the run folder of a checkpoint."""
    layout: Literal["auto", "six", "union14m", "chinese", "plain"] = "auto"
    """Which benchmark the sets belong to; auto: by their names."""
    compare: bool = False
    """Put the published results beside ours."""
    beam: int = 1
    """Beams of the search; 1 is greedy."""
    batch_size: int = 256
    """Images read at once by a process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of the products: auto is bf16 on CUDA, fp32 on a CPU."""
    errors: int = 60
    """Wrong readings shown as pictures on the page."""

    def __post_init__(self) -> None:
        require(len(self.data) > 0, "data must name at least one test set")
        for name in ("beam", "batch_size"):
            require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        require(self.batch_size <= 2**24, f"batch_size must be at most 2^24, got {self.batch_size}")
        require(self.errors >= 0, f"errors must be >= 0, got {self.errors}")
