"""Work beside the caller's: what it will need is made ahead of it, what it leaves is finished behind it.

GDAL, zlib and torch let other threads run; so reading, model and writing take the longest of their times, not the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
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


@contextmanager
def behind() -> Iterator[Callable[..., None]]:
    """A function that has a call made in a thread, once the call before it is through: one at most is under way.

    An error arrives at the next call, or at the end of the block, which waits for the last one.
    """
    with ThreadPoolExecutor(1, "behind") as thread:
        under_way: Future[Any] = Future()
        under_way.set_result(None)

        def call(function: Callable[..., Any], *given: Any) -> None:
            nonlocal under_way
            under_way.result()
            under_way = thread.submit(function, *given)

        yield call
        under_way.result()
