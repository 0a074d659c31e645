"""Films: frames as images, one at a time, and a film written from pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import UserError
from segvit.files import open_atomic

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
CODECS = {".mp4": "mpeg4", ".mkv": "mpeg4", ".avi": "mpeg4"}  # MPEG-4 part 2: its encoder is part of every build
FASTEST = 65535  # ticks a second: what MPEG-4 part 2 has 16 bits for


class Film(NamedTuple):
    """What is known of a film before its frames are decoded."""

    frames: int  # as the file says, 0 where it does not
    rate: Fraction  # frames a second


def is_video(path: Path) -> bool:
    """Whether the name is that of a film."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def _av(path: Path) -> Any:
    try:
        import av
        import av.logging  # before a codec thread does: two imports at once fail
    except ImportError:
        raise UserError(f"{path}: films need PyAV; pip install 'segvit[images]'") from None
    return av


def read_film(path: Path) -> Film:
    """Number of frames and frames a second. Raises UserError for what is no film."""
    av = _av(path)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            return Film(stream.frames, Fraction(stream.average_rate or 25))
    except (av.FFmpegError, IndexError) as error:
        raise UserError(f"{path}: cannot be read as a film ({error or 'it has no pictures'})") from None


def read_frames(path: Path) -> Iterator[NDArray[np.uint8]]:
    """The frames (H, W, 3), one at a time, turned upright as players turn them: phones store films lying.

    Raises UserError where the film is broken, naming the frame.
    """
    av = _av(path)
    number = 0
    try:
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            for frame in container.decode(video=0):
                # Degrees counterclockwise, as in rot90. A flip, which no phone writes, is not undone.
                yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
                number += 1
    except (av.FFmpegError, IndexError) as error:
        raise UserError(f"{path}: frame {number} cannot be decoded ({error}); cut the film before it") from None


@contextmanager
def write_film(path: Path, rate: Fraction) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """A film that takes its name when the block ends well, and vanishes when it does not.

    Yields what takes its pictures (H, W, 3), all of one size. Odd sides lose their last row or column, which the codec
    asks for; a rate that it cannot hold becomes the nearest one that it can. Raises UserError where the codec fails.
    """
    av = _av(path)
    if path.suffix.lower() not in CODECS:
        raise UserError(f"{path}: films are written as {', '.join(CODECS)}; choose such a name")
    try:
        with open_atomic(path) as file, av.open(file, "w", format=_container(path)) as container:
            yield from _encoder(container, CODECS[path.suffix.lower()], rate)
    except av.FFmpegError as error:
        raise UserError(f"{path}: the film cannot be written ({error}); leave out --overlay") from None


def _encoder(container: Any, codec: str, rate: Fraction) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """Yields what puts a picture into the container, and ends the stream after it."""
    import av

    tick = (1 / min(rate, Fraction(FASTEST))).limit_denominator(FASTEST)
    stream = container.add_stream(codec, rate=1 / tick, pix_fmt="yuv420p")
    stream.bit_rate = 8_000_000
    started = False

    def add(picture: NDArray[np.uint8]) -> None:
        nonlocal started
        even = np.ascontiguousarray(picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2])
        if not started:
            stream.height, stream.width = even.shape[:2]
            started = True
        container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))

    yield add
    if started:
        container.mux(stream.encode(None))


def _container(path: Path) -> str:
    suffix = path.suffix.lower()[1:]
    return {"mkv": "matroska"}.get(suffix, suffix)
