"""Films: what is written is read back, from any frame on, and broken ones say so."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from segvit.contracts import UserError
from segvit.data.video import is_video, read_film, read_frames, write_film


def write(path: Path, frames: int = 12, size: tuple[int, int] = (65, 97)) -> Path:
    with write_film(path, Fraction(10)) as add:
        for number in range(frames):
            add(np.full((*size, 3), (20 * number, 100, 50), np.uint8))
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_film_is_read_back(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}")
    assert is_video(path)
    assert read_film(path).rate == 10
    frames = list(read_frames(path))
    assert [frame.shape for frame in frames] == [(64, 96, 3)] * 12  # the codec asks for even sides
    assert [round(float(frame[..., 0].mean()) / 20) for frame in frames] == list(range(12))


def test_reading_begins_at_any_frame(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    late = list(read_frames(path, first=9))
    np.testing.assert_array_equal(late, list(read_frames(path))[9:])


def test_a_writer_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(IndexError), write_film(tmp_path / "a.mp4", Fraction(10)) as add:
        add(np.zeros((32,), np.uint8))  # no picture: the writer breaks off
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_film_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="cannot be read as a film"):
        read_film(path)
    with pytest.raises(UserError, match="frame 0 cannot be decoded"):
        list(read_frames(path))
    with pytest.raises(UserError, match=r"written as \.mp4"), write_film(tmp_path / "a.gif", Fraction(1)):
        pass
