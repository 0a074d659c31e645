"""Decode, compute and encode at the same time: images come from one thread ahead, results are written by one behind.

Bounded: at most `AHEAD` decoded images wait to be segmented and as many results to be written, whatever their number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

AHEAD = 2

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(read: Callable[[T], R], items: Iterable[T], *, ahead: int = AHEAD) -> Iterator[tuple[T, Future[R]]]:
    """(item, what `read` makes of it) in order; `read` runs in a thread, up to `ahead` items in advance.

    What it raises comes out of the future's `result()`.
    """
    rest = iter(items)
    with ThreadPoolExecutor(1, "read") as reader:
        waiting: deque[tuple[T, Future[R]]] = deque()
        try:
            for item in rest:
                waiting.append((item, reader.submit(read, item)))
                if len(waiting) > ahead:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, future in waiting:
                future.cancel()


@contextmanager
def write_behind(*, ahead: int = AHEAD) -> Iterator[Callable[..., None]]:
    """Yields `write(function, *arguments)`, which runs the function in a thread, one after the other.

    It waits while `ahead` calls are pending, and raises here what an earlier one raised; the block ends when all ran.
    """
    with ThreadPoolExecutor(1, "write") as writer:
        pending: deque[Future[Any]] = deque()

        def write(function: Callable[..., Any], *arguments: Any) -> None:
            while len(pending) >= ahead or (pending and pending[0].done()):
                pending.popleft().result()
            pending.append(writer.submit(function, *arguments))

        yield write
        while pending:
            pending.popleft().result()
