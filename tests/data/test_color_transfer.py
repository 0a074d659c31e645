"""Colour transfer: the space is CIELAB's, and the result has the other image's means and spreads."""

from __future__ import annotations

import numpy as np
import pytest

from segvit.contracts import UserError
from segvit.data.color_transfer import lab_to_rgb, rgb_to_lab, transfer_colors


def test_colours_of_the_standard() -> None:
    rgb = np.array([[[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    known = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86]]
    np.testing.assert_allclose(rgb_to_lab(rgb)[0], known, atol=0.05)


def test_every_colour_comes_back() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    np.testing.assert_array_equal(lab_to_rgb(rgb_to_lab(rgb)), rgb)


def test_means_and_spreads_become_the_others() -> None:
    rng = np.random.default_rng(1)
    image = rng.integers(90, 140, (30, 30, 3)).astype(np.uint8)
    other = (np.array([150, 110, 90]) + rng.integers(-25, 25, (20, 25, 3))).astype(np.uint8)
    found, wanted = rgb_to_lab(transfer_colors(image, other)), rgb_to_lab(other)
    np.testing.assert_allclose(found.mean((0, 1)), wanted.mean((0, 1)), atol=0.3)
    np.testing.assert_allclose(found.std((0, 1)), wanted.std((0, 1)), atol=0.3)
    np.testing.assert_array_equal(transfer_colors(image, image), image)


def test_a_plain_image_is_only_moved() -> None:
    plain = np.full((4, 4, 3), 80, np.uint8)
    other = np.random.default_rng(2).integers(100, 200, (9, 9, 3)).astype(np.uint8)
    found = transfer_colors(plain, other)
    assert (found == found[0, 0]).all()
    np.testing.assert_allclose(rgb_to_lab(found)[0, 0], rgb_to_lab(other).mean((0, 1)), atol=0.5)


def test_other_channels_are_refused() -> None:
    with pytest.raises(UserError, match="color_transfer needs red, green and blue; set it to 0"):
        transfer_colors(np.zeros((4, 4, 1), np.uint8), np.zeros((4, 4, 1), np.uint8))
