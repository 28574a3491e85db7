"""An iterator that works ahead in a thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Background(Generic[Item]):
    """Iterates `source` in a thread, at most `depth` items ahead, in its order.

    What `source` raises is raised by `next` after the items that came before, and again at every later call.

    Args:
        source: consumed by the thread alone.
        depth:  finished items that may wait, >= 1.
        name:   of the thread.
    """

    def __init__(self, source: Iterator[Item], depth: int, name: str) -> None:
        self._source, self._depth = source, depth
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._ended: BaseException | None = None  # what next raises when the items are used up
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Background[Item]:
        return self

    def __next__(self) -> Item:
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._ended is not None or self._closed)
            if self._closed:
                raise StopIteration
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            assert self._ended is not None
            raise self._ended

    def close(self) -> None:
        """Drop what waits and end the thread after the item it is working on."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _work(self) -> None:
        ended: BaseException = StopIteration()
        try:
            for item in self._source:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._items) < self._depth or self._closed)
                    if self._closed:
                        return
                    self._items.append(item)
                    self._changed.notify_all()
        except BaseException as error:  # handed to the consumer, whatever it is
            ended = error
        with self._changed:
            self._ended = ended
            self._changed.notify_all()
