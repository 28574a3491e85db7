"""What the checks find: a line each, ok, warning or error, with what to do."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from lmim_fast.errors import LmimError

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line."""

    level: Level
    what: str
    """What was looked at, in a word or two."""
    text: str
    advice: str = ""
    """What to do; empty where there is nothing to do, or where the text says it."""


@dataclass
class Findings:
    """All lines so far.

    Args:
        show: called with each finding as soon as it is there.
    """

    show: Callable[[Finding], None] = lambda _: None
    entries: list[Finding] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    """Measured and estimated numbers by name, for machines to read."""

    def ok(self, what: str, text: str) -> None:
        """All is well."""
        self._add(Finding("ok", what, text))

    def warning(self, what: str, text: str, advice: str = "") -> None:
        """A run will work, worse than it could."""
        self._add(Finding("warning", what, text, advice))

    def error(self, what: str, text: str, advice: str = "") -> None:
        """A run will fail."""
        self._add(Finding("error", what, text, advice))

    def count(self, level: Level) -> int:
        """Findings of a level."""
        return sum(entry.level == level for entry in self.entries)

    @contextlib.contextmanager
    def check(self, what: str) -> Iterator[None]:
        """A block whose failure, of whatever kind, is an error line; what it warns of are warning lines."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            try:
                yield
            except (LmimError, ImportError) as error:  # these say what to do
                self.error(what, str(error))
            except Exception as error:
                self.error(
                    what, f"{type(error).__name__}: {error}", "look at this first: it was not expected"
                )
        for text in dict.fromkeys(str(warning.message) for warning in caught):
            self.warning(what, text)

    def _add(self, finding: Finding) -> None:
        self.entries.append(finding)
        self.show(finding)
