"""Films: what is written is read back, upright and at any rate, and broken ones say so."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from segvit.contracts import UserError
from segvit.data.video import FASTEST, is_video, read_film, read_frames, write_film


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


@pytest.mark.parametrize("rate", [Fraction(27360000, 912619), Fraction(120000, 1001), Fraction(90000), Fraction(10**6)])
def test_rates_that_the_codec_cannot_hold_become_the_nearest(tmp_path: Path, rate: Fraction) -> None:
    path = tmp_path / "a.mp4"
    with write_film(path, rate) as add:
        for _ in range(3):
            add(np.zeros((32, 48, 3), np.uint8))
    assert float(read_film(path).rate) == pytest.approx(min(rate, FASTEST), rel=1e-6)


def test_usual_rates_stay_exact(tmp_path: Path) -> None:
    with write_film(tmp_path / "a.mp4", Fraction(30000, 1001)) as add:
        add(np.zeros((32, 48, 3), np.uint8))
    assert read_film(tmp_path / "a.mp4").rate == Fraction(30000, 1001)


def test_what_the_codec_refuses_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="the film cannot be written"),
        write_film(tmp_path / "a.mp4", Fraction(10)) as add,
    ):
        add(np.zeros((2, 40_000, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


# The matrix (a b u, c d v, x y w) of a track header takes a pixel (x, y) to (a x + c y, b x + d y), shifted inside.
@pytest.mark.parametrize(
    ("matrix", "corner"),
    [((0, 1, -1, 0), (0, -1)), ((0, -1, 1, 0), (-1, 0)), ((-1, 0, 0, -1), (-1, -1))],
    ids=["clockwise", "counterclockwise", "upside down"],
)
def test_a_film_that_was_stored_lying_is_upright(
    tmp_path: Path, matrix: tuple[int, ...], corner: tuple[int, int]
) -> None:
    """The bright upper left quarter comes where the track's matrix puts it."""
    path = tmp_path / "a.mp4"
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:32, :48] = 255
    with write_film(path, Fraction(10)) as add:
        add(picture)
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44  # of a header of version 0
    a, b, c, d = (part << 16 for part in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    (frame,) = read_frames(path)
    assert frame.shape == ((64, 96, 3) if matrix[0] else (96, 64, 3))
    quarters = frame.reshape(2, frame.shape[0] // 2, 2, frame.shape[1] // 2, 3).mean((1, 3, 4))
    expected = np.zeros((2, 2))
    expected[corner] = 255
    np.testing.assert_allclose(quarters, expected, atol=12)


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
