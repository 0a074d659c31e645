"""Colour jitter and random erasing for images that have one label: functions of an image and a random generator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

if TYPE_CHECKING:
    from torch import Tensor

LOOKS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
AREA = (0.02, 0.33)  # share of the image that an erased rectangle has
RATIO = (0.3, 3.3)  # of its height to its width


def jitter(image: NDArray[np.uint8], strength: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Brightness, contrast and saturation of (H, W, 3), in random order, by factors in 1 +- strength."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    for kind in rng.permutation(len(LOOKS)):
        picture = LOOKS[kind](picture).enhance(rng.uniform(1 - strength, 1 + strength))
    return np.asarray(picture)


def erase(image: Tensor, rng: np.random.Generator) -> None:
    """Set a rectangle of a normalised image (C, H, W) to 0, its mean, in place.

    Z. Zhong et al., "Random Erasing Data Augmentation", AAAI 2020. What of the rectangle would be wider or higher than
    the image is left out, where the paper draws again.
    """
    height, width = image.shape[-2:]
    area = rng.uniform(*AREA) * height * width
    ratio = np.exp(rng.uniform(*np.log(RATIO)))
    high, wide = min(height, max(1, round((area * ratio) ** 0.5))), min(width, max(1, round((area / ratio) ** 0.5)))
    top, left = int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1))
    image[:, top : top + high, left : left + wide] = 0
