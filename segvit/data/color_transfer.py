"""Colour transfer between images: one takes the mean and the spread of another's colours in CIELAB.

Source    Reinhard et al., "Color Transfer between Images" (IEEE CG&A 2001), in CIELAB under D65, as DuAT's loader does
          it to each training image; that one rounds to 8 bits in between, which this does not.

Shapes    H W image.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import UserError

Colors = NDArray[np.float64]  # (H, W, 3)

# Rows X, Y, Z of linear red, green and blue, over the white of D65.
TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
TO_XYZ /= TO_XYZ.sum(1, keepdims=True)
TO_LAB = np.array([[0, 116, 0], [500, -500, 0], [0, 200, -200]], float)
EDGE = 6 / 29  # below it the cube root is a straight line


def transfer_colors(image: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`image` (H, W, 3) with each CIELAB channel moved and stretched to the mean and deviation of `other`'s.

    A channel without any spread is only moved. Raises UserError for images of other than three channels.
    """
    if image.shape[2] != 3 or other.shape[2] != 3:
        raise UserError("augment.color_transfer needs red, green and blue; set it to 0 for images of other channels")
    source, target = rgb_to_lab(image), rgb_to_lab(other)
    spread = source.std((0, 1))
    factor = np.divide(target.std((0, 1)), spread, out=np.ones(3), where=spread > 1e-6)
    return lab_to_rgb((source - source.mean((0, 1))) * factor + target.mean((0, 1)))


def rgb_to_lab(image: NDArray[np.uint8]) -> Colors:
    """sRGB levels (H, W, 3) -> lightness 0..100, a and b."""
    levels = np.arange(256) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    xyz = linear[image] @ TO_XYZ.T
    root = np.where(xyz > EDGE**3, np.cbrt(xyz), xyz / (3 * EDGE**2) + 4 / 29)
    lab: Colors = root @ TO_LAB.T - [16, 0, 0]
    return lab


def lab_to_rgb(lab: Colors) -> NDArray[np.uint8]:
    """The inverse, in whole levels; colours that sRGB does not have are cut off."""
    root = (lab + [16, 0, 0]) @ np.linalg.inv(TO_LAB).T
    xyz = np.where(root > EDGE, root**3, 3 * EDGE**2 * (root - 4 / 29))
    linear = (xyz @ np.linalg.inv(TO_XYZ).T).clip(0, 1)
    levels = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * levels).astype(np.uint8)
