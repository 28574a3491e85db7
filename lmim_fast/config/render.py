"""`lmim data render`: what is written, how it is laid out, with which words and fonts."""

from __future__ import annotations

from dataclasses import dataclass

from lmim_fast.config.checks import PathName, require, require_seed

TEXT_SHARES = ("random_share", "lines_share")
LAYOUT_SHARES = ("curved_share", "vertical_share", "sign_share")


@dataclass(frozen=True)
class RenderConfig:
    """The embedded default data: rendered words, written as an LMDB with labels."""

    output: PathName = "data/rendered"
    """Folder of the new LMDB; must not hold one already. A render that was killed goes on here."""
    count: int = 5000
    """Crops to render."""
    seed: int = 0
    """Same seed, same crops."""
    fonts: tuple[PathName, ...] = ()
    """Font files (.ttf, .otf, .ttc) and folders of them, at any depth, in place of the fonts that come with
    matplotlib."""
    words: tuple[PathName, ...] = ()
    """UTF-8 files in place of the built-in list, a word a line or `word<TAB>weight` (any script, given a
    font)."""
    max_length: int = 25
    """Longest label in characters."""
    random_share: float = 0.25
    """Share of the labels that are random strings and numbers instead of words."""
    lines_share: float = 0.08
    """Share of the labels that are lines of two to four words."""
    curved_share: float = 0.06
    """Share of the crops with text on an arc."""
    vertical_share: float = 0.04
    """Share of the crops with text that runs down or up: letters stacked, or the line turned."""
    sign_share: float = 0.06
    """Share of the crops with a sign seen from the side."""
    restart: bool = False
    """Render from the beginning where the output has an unfinished render, instead of going on with it."""
    processes: int = 0
    """Rendering processes; 0 takes one per core."""

    def __post_init__(self) -> None:
        require(self.count >= 1, f"count must be >= 1, got {self.count}")
        require_seed(self.seed)
        for name in ("fonts", "words"):
            paths = getattr(self, name)
            require(isinstance(paths, tuple), f"{name} must be a tuple of paths, got {paths!r}")
        require(self.max_length >= 1, f"max_length must be >= 1, got {self.max_length}")
        for shares in (TEXT_SHARES, LAYOUT_SHARES):
            for name in shares:
                share = getattr(self, name)
                require(0.0 <= share <= 1.0, f"{name} must be in [0, 1], got {share}")
            total = sum(getattr(self, name) for name in shares)
            require(total <= 1.0 + 1e-9, f"{' + '.join(shares)} must be <= 1, got {total:g}")
        require(self.processes >= 0, f"processes must be >= 0, got {self.processes}")
