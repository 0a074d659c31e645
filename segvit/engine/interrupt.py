"""SIGINT and SIGTERM ask a run to stop: the step in progress is finished and saved, then the process ends.

A second signal of the same kind ends it at once, as if nothing had been installed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):  # noqa: N818 - it is what was asked for, no error
    """The run was asked to stop and has saved itself; `code` is the exit status that shells expect."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.code = 128 + number


class StopRequest:
    """Which signal asked to stop, 0 for none."""

    def __init__(self) -> None:
        self.number = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note signals instead of dying from them. In another than the main thread signals cannot be caught: no effect."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        request.number = number
        signal.signal(number, before[signal.Signals(number)])

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
