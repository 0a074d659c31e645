"""Perceptual hashes: 63 bits of an image that hardly change when it is compressed again, scaled or brightened.

The bits are the signs of the lowest frequencies, without the constant one, of the discrete cosine transform of the
image as 32 x 32 gray levels. On street scenes (CamVid) JPEG quality 20, another size or a bit depth of 16 change 0 to 3
bits and 15 % more light up to 7 where the sky is cut off at white; any two frames of different drives differ in 10 or
more, unrelated images in 29 on average. Mirrored and strongly cropped copies are not recognised.

`NEAR` = 4 bits thus count as the same picture: also the next frame of a film, which is no less of a leak.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from segvit.data.arrays import load_array, load_tiff
from segvit.data.decode import TIFF_STARTS, is_array_file

NEAR = 4  # bits of two hashes that may differ
SIDE, LOW = 32, 8  # gray levels a side, frequencies a side
COSINES = np.cos(np.pi / SIDE * np.outer(np.arange(LOW), np.arange(SIDE) + 0.5))  # (8, 32) of the DCT-II
DRAFT = (128, 128)  # pixels that are enough of a JPEG, which is decoded in parts of its size several times faster
CONTRAST = 0.02  # the least standard deviation, as a part of the brightest level; below, all images look alike
BLOCK = 1 << 22  # pairs of hashes compared at a time
ONES = np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8)).reshape(-1, 16).sum(1, dtype=np.uint8)


def hash_of(path: Path, data: bytes) -> int | None:
    """The hash of the image in `data`, the content of `path`; None for one without content, such as a white page.

    Raises whatever the decoder does on damaged files.
    """
    return hash_of_levels(_small_gray(path, data))


def hash_of_levels(gray: NDArray[Any]) -> int | None:
    """The hash of (32, 32) gray levels of any range; None where they are all about the same."""
    levels = gray.astype(np.float64)
    if not np.isfinite(levels).all() or levels.std() <= CONTRAST * np.abs(levels).max():
        return None
    waves = COSINES @ levels @ COSINES.T  # (8, 8)
    bits = waves.ravel()[1:] > 0
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


def near_duplicates(
    ours: Sequence[int | None], theirs: Sequence[int | None], *, distance: int = NEAR
) -> list[tuple[int, int, int]]:
    """All (i, j, bits) where hashes i of `ours` and j of `theirs` differ in at most `distance` bits, in that order.

    Memory is bounded whatever the number of hashes.
    """
    places, values = _known(ours)
    other_places, others = _known(theirs)
    rows = max(1, BLOCK // max(1, len(others)))
    found: list[tuple[int, int, int]] = []
    for start in range(0, len(values), rows):
        bits = _count_ones(values[start : start + rows, None] ^ others)  # (rows, len(others))
        i, j = np.nonzero(bits <= distance)
        found += zip(places[start + i].tolist(), other_places[j].tolist(), bits[i, j].tolist(), strict=True)
    return found


def _known(hashes: Sequence[int | None]) -> tuple[NDArray[np.intp], NDArray[np.uint64]]:
    places = np.array([place for place, value in enumerate(hashes) if value is not None], np.intp)
    return places, np.array([value for value in hashes if value is not None], np.uint64)


def _count_ones(values: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Bits that are set, by a table over 16 of them: NumPy has a function only from version 2 on."""
    parts = ONES[np.ascontiguousarray(values)[..., None].view(np.uint16)]  # (..., 4)
    return parts.sum(-1, dtype=np.uint8)


def _small_gray(path: Path, data: bytes) -> NDArray[Any]:
    """An image of any kind as (32, 32) gray levels, upright."""
    if is_array_file(path):
        return _shrunk(load_array(path, "image"))
    try:
        picture: Image.Image = Image.open(BytesIO(data))
    except UnidentifiedImageError:
        if not data.startswith(TIFF_STARTS):
            raise
        return _shrunk(load_tiff(BytesIO(data), str(path)))
    picture.draft("L", DRAFT)
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture.load()
        return _shrunk(np.asarray(ImageOps.exif_transpose(picture)))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # Pillow warns when a transparent palette loses it directly
    small = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(ImageOps.exif_transpose(small))


def _shrunk(pixels: NDArray[Any]) -> NDArray[Any]:
    """(H, W) or (H, W, C) raw levels as (32, 32), the mean of all channels."""
    gray = pixels.astype(np.float32) if pixels.ndim == 2 else pixels.mean(-1, dtype=np.float32)
    return np.asarray(Image.fromarray(gray).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
