"""Work beside the caller's: what it will need is made ahead of it, what it leaves is finished behind it.

GDAL, zlib and torch let other threads run; so reading, model and writing take the longest of their times, not the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

P, T = TypeVar("P"), TypeVar("T")


@contextmanager
def ahead(make: Callable[[P], T], parts: Sequence[P]) -> Iterator[Iterator[T]]:
    """What is made of parts, each in a thread while the one before it is in use; a single one in the caller's.

    One at most lies ready. An error arrives where the part would have. The block ends when nothing is being made.
    """
    if len(parts) == 1:
        yield map(make, parts)
        return
    with ThreadPoolExecutor(1, "ahead") as thread:
        yield _one_ahead(thread, make, parts)


def _one_ahead(thread: Executor, make: Callable[[P], T], parts: Sequence[P]) -> Iterator[T]:
    coming = thread.submit(make, parts[0])
    for part in parts[1:]:
        ready = [coming.result()]
        coming = thread.submit(make, part)
        yield ready.pop()  # held by the caller alone
    yield coming.result()


class Behind:
    """Makes calls in a thread, each once the one before it is through: one at most is under way.

    An error arrives at the next call or at the end of the block, which waits for the last one.
    """

    def __init__(self) -> None:
        self._thread, self._under_way = ThreadPoolExecutor(1, "behind"), None

    def __call__(self, function: Callable[[], Any]) -> None:
        self.finish()
        self._under_way = self._thread.submit(function)

    def finish(self) -> None:
        """Wait for what is under way."""
        if self._under_way is not None:
            self._under_way.result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.finish()
