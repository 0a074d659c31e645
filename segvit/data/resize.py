"""Resizing that gives the very bytes of OpenCV, without OpenCV.

Published numbers were measured on images resized by OpenCV's 8-bit bilinear filter, which works in integers and
truncates twice; a float filter differs by one level on an eighth of the values, enough to move labels. So the integer
arithmetic is repeated here: 11-bit weights, the horizontal pass in 32 bits, the vertical one as OpenCV's vector code.

Shapes    H W source, h w target, C channels. Sizes are always (height, width).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import Size

Window = tuple[int, int, int, int]  # (top, left, height, width) in pixels of the resized image

BLOCK = 64  # rows of the vertical pass worked on at once: the intermediate products then stay in the cache


class Taps(NamedTuple):
    """The two source positions and integer weights (sum 2048) of every target position along one axis."""

    first: NDArray[np.intp]
    second: NDArray[np.intp]
    first_weight: NDArray[np.int32]
    second_weight: NDArray[np.int32]

    def part(self, start: int, length: int) -> Taps:
        """The taps of the target positions start ... start + length - 1."""
        kept = slice(start, start + length)
        return Taps(self.first[kept], self.second[kept], self.first_weight[kept], self.second_weight[kept])


def resize_image(image: NDArray[np.uint8], size: Size, *, window: Window | None = None) -> NDArray[np.uint8]:
    """Bilinear (H, W, C) -> (h, w, C), as `cv2.resize(..., INTER_LINEAR)` gives it.

    With `window` only that part of the resized image is computed: the same bytes as cutting afterwards, for less work.
    """
    top, left, height, width = window or (0, 0, *size)
    if image.shape[:2] == size:
        return image[top : top + height, left : left + width].copy()
    if image.shape[:2] == (2 * size[0], 2 * size[1]):
        return _halve(image[2 * top : 2 * (top + height), 2 * left : 2 * (left + width)])
    rows = _taps(image.shape[0], size[0], clamp=False).part(top, height)
    columns = _taps(image.shape[1], size[1], clamp=True).part(left, width)
    # Only the source rows that are looked at take part in the horizontal pass.
    start, stop = int(rows.first.min()), int(rows.second.max()) + 1
    wide = _horizontal(image[start:stop], columns)  # (stop-start, w, C)
    return _vertical(wide, rows._replace(first=rows.first - start, second=rows.second - start))


def resize_mask(mask: NDArray[Any], size: Size) -> NDArray[Any]:
    """Nearest neighbour (H, W) -> (h, w), as `cv2.resize(..., INTER_NEAREST)` gives it."""
    if mask.shape == size:
        return mask.copy()
    rows, columns = (_nearest(old, new) for old, new in zip(mask.shape, size, strict=True))
    return mask[rows][:, columns]


def scaled_size(size: Size, *, scale: tuple[int, int], min_side: int | None = None) -> Size:
    """The size at which an image is as large as `scale` allows, its ratio kept.

    The short side becomes at most min(scale), the long side at most max(scale). With `min_side` the short side is
    exactly the larger of min(scale) and `min_side`, and the long side has no limit.
    """
    short, long = min(size), max(size)
    short_limit: float = min(scale)
    long_limit: float = max(scale)
    if min_side is not None:
        short_limit = max(short_limit, min_side)
        long_limit = short_limit * long / short
    factor = min(long_limit / long, short_limit / short)
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


def _taps(old: int, new: int, *, clamp: bool) -> Taps:
    """`clamp` (OpenCV's horizontal axis) snaps the weights at the edges, else (vertical) only the positions."""
    scale = 1 / (new / old)
    place = ((np.arange(new) + 0.5) * scale - 0.5).astype(np.float32)
    floor = np.floor(place)
    fraction = place - floor
    first = floor.astype(np.intp)
    if clamp:
        fraction[(first < 0) | (first >= old - 1)] = 0
    second_weight = np.rint(2048 * fraction).astype(np.int32)
    first_weight = np.rint(2048 * (1 - fraction)).astype(np.int32)
    return Taps(first.clip(0, old - 1), (first + 1).clip(0, old - 1), first_weight, second_weight)


def _horizontal(image: NDArray[np.uint8], columns: Taps) -> NDArray[np.int16]:
    """(H, W, C) -> (H, w, C) in steps of 1/128 level, which just fit into 16 bits."""
    height, _, channels = image.shape
    # Columns first: a gather then copies whole contiguous rows instead of single pixels.
    turned = np.ascontiguousarray(image.swapaxes(0, 1)).reshape(image.shape[1], -1)  # (W, H*C)
    out = np.empty((len(columns.first), height * channels), np.int16)
    for start in range(0, len(out), BLOCK):
        taps = columns.part(start, BLOCK)
        product = turned[taps.first] * taps.first_weight[:, None]
        product += turned[taps.second] * taps.second_weight[:, None]
        product >>= 4
        out[start : start + BLOCK] = product
    return np.ascontiguousarray(out.reshape(-1, height, channels).swapaxes(0, 1))


def _vertical(wide: NDArray[np.int16], rows: Taps) -> NDArray[np.uint8]:
    """(H, w, C) -> (h, w, C) levels."""
    flat = wide.reshape(len(wide), -1)  # (H, w*C)
    out = np.empty((len(rows.first), flat.shape[1]), np.uint8)
    for start in range(0, len(out), BLOCK):
        taps = rows.part(start, BLOCK)
        # Each product loses its low bits before the sum: that is how OpenCV's vector code multiplies 16-bit numbers.
        product = flat[taps.first] * taps.first_weight[:, None]
        product >>= 16
        other = flat[taps.second] * taps.second_weight[:, None]
        other >>= 16
        product += other
        product += 2
        product >>= 2
        out[start : start + BLOCK] = product
    return out.reshape(-1, *wide.shape[1:])


def _halve(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Exact halving of both sides is a 2x2 mean in OpenCV, a different rounding."""
    wide = image.astype(np.uint16)
    total = wide[0::2, 0::2] + wide[0::2, 1::2] + wide[1::2, 0::2] + wide[1::2, 1::2]
    return ((total + 2) >> 2).astype(np.uint8)


def _nearest(old: int, new: int) -> NDArray[np.intp]:
    # In float64: in float32 some positions fall into the neighbouring pixel.
    place: NDArray[np.intp] = np.floor(np.arange(new) * (1 / (new / old))).astype(np.intp)
    return place.clip(max=old - 1)
