"""Polygons and ellipses painted into masks by one exact rule: a pixel belongs to what its centre lies in.

Coordinates are x, y in pixels; the left top corner of the first pixel is (0, 0), so its centre is (0.5, 0.5). What is
inside a polygon is counted by the even-odd rule. An edge belongs to the pixels at its right and below, so that polygons
with a common edge neither overlap nor leave a gap. What lies outside of the image is cut off.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]  # (n, 2) x, y


def fill_polygon(mask: NDArray[Any], points: Points, value: int) -> None:
    """Set the pixels of `mask` (H, W), C-contiguous, that lie inside the polygon."""
    height, width = mask.shape
    following = np.roll(points, -1, axis=0)
    # Every edge is followed from its upper end: two polygons then compute the very same crossings of a common edge.
    swap = (points[:, 1] > following[:, 1])[:, None]
    upper, lower = np.where(swap, following, points), np.where(swap, points, following)
    first, last = _first_centre(upper[:, 1], height), _first_centre(lower[:, 1], height)
    rows_crossed = last - first  # the rows whose centre lies in [upper y, lower y)
    edge = np.repeat(np.arange(len(points)), rows_crossed)
    row = np.arange(len(edge)) + (last - np.cumsum(rows_crossed))[edge]
    (x, y), (x_end, y_end) = upper[edge].T, lower[edge].T
    crossing = x + (row + 0.5 - y) * (x_end - x) / (y_end - y)
    # Each row is crossed an even number of times, so that the sorted crossings are pairs of a begin and an end.
    places = np.sort(row * width + _first_centre(crossing, width))
    pixels = mask.reshape(-1)
    for begin, end in places.reshape(-1, 2).tolist():
        pixels[begin:end] = value


def fill_ellipse(
    mask: NDArray[Any], center: tuple[float, float], radii: tuple[float, float], degrees: float, value: int
) -> None:
    """Set the pixels of `mask` (H, W) in an ellipse; `degrees` turn it clockwise, as x goes right and y down."""
    reach = max(radii)
    (left, right), (top, bottom) = (
        (int(np.clip(math.floor(at - reach), 0, size)), int(np.clip(math.ceil(at + reach), 0, size)))
        for at, size in zip(center, mask.shape[::-1], strict=True)
    )
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x = np.arange(left, right) + 0.5 - center[0]
    y = (np.arange(top, bottom) + 0.5 - center[1])[:, None]
    inside = ((cos * x + sin * y) / radii[0]) ** 2 + ((cos * y - sin * x) / radii[1]) ** 2 <= 1
    mask[top:bottom, left:right][inside] = value


def rectangle(left: float, top: float, right: float, bottom: float) -> Points:
    """The corners of an upright rectangle."""
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)], np.float64)


def turned(points: Points, pivot: tuple[float, float], degrees: float) -> Points:
    """The points turned about `pivot`, clockwise, as x goes right and y down."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = (points - pivot).T
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=1) + pivot


def _first_centre(at: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    """The first of `size` pixels whose centre is not before `at`; `size` where there is none."""
    return np.ceil(at - 0.5).clip(0, size).astype(np.int64)
