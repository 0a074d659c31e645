"""Resizing against a slow pixel-by-pixel reading of OpenCV's integer recipe."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segvit.data.resize import resize_image, resize_mask, scaled_size

SIDE = st.integers(1, 24)


def weights(i: int, old: int, new: int, *, clamp: bool) -> tuple[int, int, int, int]:
    place = np.float32((i + 0.5) * (1 / (new / old)) - 0.5)
    source = math.floor(place)
    fraction = place - np.float32(source)
    if clamp and (source < 0 or source >= old - 1):
        source, fraction = min(max(source, 0), old - 1), np.float32(0)
    first, second = (min(max(s, 0), old - 1) for s in (source, source + 1))
    return first, second, round(float(2048 * (1 - fraction))), round(float(2048 * fraction))


def slow(image, size):
    """One output pixel at a time in Python's unlimited integers."""
    (old_height, old_width), (height, width) = image.shape[:2], size
    if (old_height, old_width) == size:
        return image
    out = np.zeros((*size, image.shape[2]), np.uint8)
    for i, j, c in np.ndindex(out.shape):
        if (old_height, old_width) == (2 * height, 2 * width):
            out[i, j, c] = (int(image[2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c].astype(int).sum()) + 2) >> 2
            continue
        top, bottom, a, b = weights(i, old_height, height, clamp=False)
        left, right, w0, w1 = weights(j, old_width, width, clamp=True)
        upper, lower = (w0 * int(image[r, left, c]) + w1 * int(image[r, right, c]) for r in (top, bottom))
        out[i, j, c] = ((a * (upper >> 4) >> 16) + (b * (lower >> 4) >> 16) + 2) >> 2
    return out


@settings(max_examples=60, deadline=None)
@given(old=st.tuples(SIDE, SIDE), new=st.tuples(SIDE, SIDE), seed=st.integers(0, 1000))
def test_image_equals_the_slow_recipe(old, new, seed):
    image = np.random.default_rng(seed).integers(0, 256, (*old, 3), dtype=np.uint8)
    assert np.array_equal(resize_image(image, new), slow(image, new))


@pytest.mark.parametrize("size", [(40, 54), (23, 31), (46, 62), (100, 62)])
def test_window_equals_cutting_afterwards(size):
    image = np.random.default_rng(1).integers(0, 256, (46, 62, 3), dtype=np.uint8)
    window = (7, 5, 13, 20)
    assert np.array_equal(resize_image(image, size, window=window), resize_image(image, size)[7:20, 5:25])


def test_many_rows_cross_the_blocks():
    image = np.random.default_rng(2).integers(0, 256, (90, 7, 3), dtype=np.uint8)
    assert np.array_equal(resize_image(image, (200, 5)), slow(image, (200, 5)))
    turned = image.swapaxes(0, 1)
    assert np.array_equal(resize_image(turned, (5, 200)), slow(turned, (5, 200)))


@settings(max_examples=60, deadline=None)
@given(old=st.tuples(SIDE, SIDE), new=st.tuples(SIDE, SIDE))
def test_mask_is_nearest_in_double_precision(old, new):
    mask = np.arange(old[0] * old[1], dtype=np.uint16).reshape(old)
    rows, columns = (
        [min(math.floor(i * (1 / (n / o))), o - 1) for i in range(n)] for o, n in zip(old, new, strict=True)
    )
    assert np.array_equal(resize_mask(mask, new), mask[np.ix_(rows, columns)])


def test_results_never_share_memory_with_the_source():
    image, mask = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)
    assert not np.shares_memory(resize_image(image, (4, 4)), image)
    assert not np.shares_memory(resize_mask(mask, (4, 4)), mask)


def test_scaled_size_limits_short_and_long_side():
    assert scaled_size((784, 659), scale=(2048, 640)) == (761, 640)
    assert scaled_size((877, 215), scale=(2048, 640)) == (2048, 502)
    assert scaled_size((1307, 128), scale=(1024, 256), min_side=512) == (5228, 512)
    assert scaled_size((1, 5000), scale=(100, 10)) == (1, 100)
