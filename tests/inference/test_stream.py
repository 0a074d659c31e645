"""Reading ahead and writing behind: in order, bounded, and no error is lost."""

from __future__ import annotations

import threading
import time

import pytest

from segvit.inference.stream import read_ahead, write_behind


def test_items_come_in_order_with_what_was_read() -> None:
    assert [(item, future.result()) for item, future in read_ahead(str, range(7))] == [(i, str(i)) for i in range(7)]


def test_no_more_than_asked_for_is_read_in_advance() -> None:
    seen: list[int] = []
    stream = read_ahead(seen.append, range(100), ahead=2)
    next(stream)
    time.sleep(0.1)
    assert len(seen) <= 4
    stream.close()


def test_an_unreadable_item_does_not_stop_the_others() -> None:
    def read(value: int) -> int:
        if value == 1:
            raise ValueError("one")
        return value

    results = [(item, future.exception()) for item, future in read_ahead(read, range(3))]
    assert [item for item, error in results if error is None] == [0, 2]


def test_calls_run_one_after_the_other_and_all_before_the_end() -> None:
    done: list[int] = []

    def slow(value: int) -> None:
        time.sleep(0.01)
        done.append(value)

    with write_behind() as write:
        for value in range(6):
            write(slow, value)
    assert done == list(range(6))


def test_at_most_two_calls_wait() -> None:
    gate, waiting = threading.Event(), []
    with write_behind(ahead=2) as write:
        write(gate.wait)
        write(waiting.append, 1)
        timer = threading.Timer(0.2, gate.set)
        timer.start()
        start = time.monotonic()
        write(waiting.append, 2)
        assert time.monotonic() - start > 0.1  # it had to wait for the gate
    assert waiting == [1, 2]


def test_what_a_call_raised_is_raised_here() -> None:
    def fail() -> None:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"), write_behind() as write:
        write(fail)
