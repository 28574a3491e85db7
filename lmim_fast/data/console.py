"""rich's console for text of files: control characters come from what rich draws alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from lmim_fast.data.visible import beneath, visible_lines


class SafeConsole(Console):
    """A rich console that escapes control characters in everything that it renders."""

    @property
    def file(self) -> IO[str]:
        """The stream itself: what the command line or a progress bar puts around it would escape colours."""
        return beneath(super().file)

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich's, with text made visible."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible_lines(segment.text), segment.style)
