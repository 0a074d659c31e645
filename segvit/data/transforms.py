"""The training augmentations of the published dense models: resize, crop, flip and colours, in that order.

Every transform is a function of a sample and an explicit random generator. Colours work on uint8 and end every step by
cutting off the fraction, because the originals do: a brightness of -0.4 darkens every level by one.

Shapes    H W image of any number of channels (saturation and hue: three). HSV images hold hue 0..179, saturation and
          value 0..255, OpenCV's 8-bit convention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import Sample, Size, UserError
from segvit.data.color_transfer import transfer_colors
from segvit.data.resize import resize_image, resize_mask, scaled_size

BRIGHTNESS = 32.0  # levels, either way
FACTORS = (0.5, 1.5)  # of contrast and of saturation
HUE = 18  # steps of two degrees, either way
REDRAWS = 10  # further crops drawn while one class fills too much
TILT = 20  # degrees, either way
BLOCK = 64  # rows of a colour conversion worked on at once: the intermediate planes then stay in the cache

# OpenCV divides through tables of 12-bit fixed-point reciprocals.
SATURATION_TABLE = np.rint((255 << 12) / np.arange(256).clip(1)).astype(np.int32)
HUE_TABLE = np.rint((180 << 12) / (6 * np.arange(256).clip(1))).astype(np.int32)


def _sector_tables() -> NDArray[np.float32]:
    """(3, 256) by hue: how much of the saturation is taken from red, green and blue.

    The textbook's six sectors pick v, p = v(1-s), q = v(1-sf) or t = v(1-s(1-f)); all are v(1-s*part).
    """
    hue = np.arange(256, dtype=np.float32) * np.float32(6 / 180)
    sector = np.floor(hue)
    fraction = hue - sector
    full, none = np.ones_like(hue), np.zeros_like(hue)
    rising, falling = 1 - fraction, fraction  # the parts of t and of q
    which = sector.astype(np.intp) % 6
    red = np.choose(which, [none, falling, full, full, rising, none])
    green = np.choose(which, [rising, none, none, falling, full, full])
    blue = np.choose(which, [full, full, rising, none, none, falling])
    return np.stack([red, green, blue]).astype(np.float32)


PARTS = _sector_tables()


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How training samples are varied.

    `scale` is the size that ratio 1 stands for, as in `scaled_size`; without it the image's own size. `cat_max_ratio`
    is the part of a crop above which one class is too much (1 switches the rule off). `rare_crops` is the probability
    that a crop is placed around a pixel of a rare class instead, see `rare_crop`.

    With `stretch` images become exactly `scale` (without it the crop) times the ratio, whatever theirs. `resize` is how
    their pixels are made: bilinear; nearest as DuAT's loader does it; spline is TransUNet's of third order.
    `turn` is TransUNet's turning of slices, see `random_turn`. `color_transfer` is the probability that an image takes
    the colours of another training image. `passes` are factors of the crop at each of which a batch is used, one
    optimiser step after the other, in multiples of 32 pixels: DuAT and its relatives take 0.75, 1 and 1.25.
    """

    crop: Size = (512, 512)
    scale: tuple[int, int] | None = None
    ratio_range: tuple[float, float] = (0.5, 2.0)
    cat_max_ratio: float = 0.75
    rare_crops: float = 0.0
    flip: float = 0.5
    photometric: bool = True
    flip_vertical: float = 0.0
    stretch: bool = False
    resize: Literal["bilinear", "nearest", "spline"] = "bilinear"
    turn: Literal["none", "transunet"] = "none"
    color_transfer: float = 0.0
    passes: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("rare_crops", "flip_vertical", "color_transfer"):
            if not 0 <= vars(self)[name] <= 1:
                raise UserError(f"augment.{name} is {vars(self)[name]}; it is a probability, so choose one in 0..1")
        if not all(0 < factor < math.inf for factor in self.passes):
            raise UserError(f"augment.passes is {list(self.passes)}; give positive factors of the crop, or none")


def augment(
    sample: Sample, recipe: Augment, rng: np.random.Generator, ignore: int, rarity: NDArray[Any] | None = None,
    other: NDArray[np.uint8] | None = None,
) -> Sample:  # fmt: skip
    """The whole recipe but `passes`; the result is at most as large as the crop (padding follows the normalisation).

    `rarity` (K,), how much each class is sought, is needed where the recipe has `rare_crops`; `other` is an image
    (h, w, 3) whose colours are taken over.
    """
    if other is not None:
        sample = sample._replace(image=transfer_colors(sample.image, other))
    if recipe.turn == "transunet":
        sample = random_turn(sample, rng)
    sample = resize_and_crop(sample, recipe, rng, ignore, rarity)
    sample = random_flip(sample, rng, probability=recipe.flip)
    if recipe.flip_vertical and rng.random() < recipe.flip_vertical:
        sample = sample._replace(image=sample.image[::-1], mask=sample.mask[::-1])
    return photometric(sample, rng) if recipe.photometric else sample


def resize_and_crop(
    sample: Sample, recipe: Augment, rng: np.random.Generator, ignore: int, rarity: NDArray[Any] | None = None
) -> Sample:
    """Resize by a random ratio, then cut out a crop that one class does not fill, or one around a rare class.

    One step and not two, so that only the pixels inside the crop need to be interpolated.
    """
    height, width = sample.mask.shape
    ratio = rng.uniform(*recipe.ratio_range)
    base = recipe.scale or (recipe.crop if recipe.stretch else (height, width))
    size = int(base[0] * ratio), int(base[1] * ratio)
    if not recipe.stretch:
        size = scaled_size((height, width), scale=size)
    mask = resize_mask(sample.mask, size)
    place = None
    if recipe.rare_crops and rng.random() < recipe.rare_crops:  # without rare crops the stream of numbers is untouched
        if rarity is None:
            raise ValueError("rare_crops needs the rarity of the classes; pass rarity=class_weights(pixels, 'sqrt')")
        place = rare_crop(mask, recipe.crop, rarity, rng)
    top, left = place or choose_crop(mask, recipe.crop, recipe.cat_max_ratio, rng, ignore)
    high, wide = min(recipe.crop[0], size[0]), min(recipe.crop[1], size[1])
    if recipe.resize == "bilinear":
        image = resize_image(sample.image, size, window=(top, left, high, wide))
    else:
        image = _resized(sample.image, size, recipe.resize)[top : top + high, left : left + wide]
    return sample._replace(image=image, mask=mask[top : top + high, left : left + wide])


def _resized(image: NDArray[np.uint8], size: Size, how: Literal["nearest", "spline"]) -> NDArray[np.uint8]:
    """(H, W, C) -> (*size, C) by the nearest pixel, or by splines of third order that meet at the corners."""
    if how == "nearest":
        return np.stack([resize_mask(plane, size) for plane in np.moveaxis(image, 2, 0)], axis=2)
    from scipy import ndimage

    factors = (size[0] / image.shape[0], size[1] / image.shape[1], 1)
    values = ndimage.zoom(image.astype(np.float32), factors, order=3)
    return np.rint(values.clip(0, 255)).astype(np.uint8)


def choose_crop(
    mask: NDArray[Any], crop: Size, cat_max_ratio: float, rng: np.random.Generator, ignore: int
) -> tuple[int, int]:
    """The (top, left) of a random crop; after ten refused crops the next one is taken as it is."""
    margins = max(mask.shape[0] - crop[0], 0), max(mask.shape[1] - crop[1], 0)
    top, left = (int(rng.integers(margin + 1)) for margin in margins)
    for _ in range(REDRAWS if cat_max_ratio < 1 else 0):
        if crop_accepted(mask[top : top + crop[0], left : left + crop[1]], cat_max_ratio, ignore):
            break
        top, left = (int(rng.integers(margin + 1)) for margin in margins)
    return top, left


def rare_crop(mask: NDArray[Any], crop: Size, rarity: NDArray[Any], rng: np.random.Generator) -> tuple[int, int] | None:
    """The (top, left) of a crop that holds a pixel of a class drawn by rarity; None where no pixel is labelled.

    The class is drawn among those of the mask, in proportion to `rarity` (K,); then one of its pixels, then one of the
    crops around that pixel, all equally likely.
    """
    counts = np.bincount(mask.ravel(), minlength=len(rarity))[: len(rarity)]
    sought = np.where(counts > 0, rarity, 0.0)
    if not sought.any():
        return None
    chosen = rng.choice(len(rarity), p=sought / sought.sum())
    pixel = np.flatnonzero(mask.ravel() == chosen)[rng.integers(counts[chosen])]
    places = zip(np.unravel_index(pixel, mask.shape), mask.shape, crop, strict=True)
    spans = [(max(0, at - length + 1), min(at, max(side - length, 0))) for at, side, length in places]
    top, left = (int(rng.integers(first, last + 1)) for first, last in spans)
    return top, left


def crop_accepted(mask_crop: NDArray[Any], cat_max_ratio: float, ignore: int) -> bool:
    """Whether at least two classes occur and the largest has less than `cat_max_ratio` of the labelled pixels."""
    counts = np.bincount(mask_crop.ravel(), minlength=ignore + 1)
    counts[ignore] = 0
    return bool(np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < cat_max_ratio)


def random_flip(sample: Sample, rng: np.random.Generator, *, probability: float = 0.5) -> Sample:
    """Mirror left and right with the given probability."""
    if rng.random() < probability:
        return sample._replace(image=sample.image[:, ::-1], mask=sample.mask[:, ::-1])
    return sample


def random_turn(sample: Sample, rng: np.random.Generator) -> Sample:
    """TransUNet's turning of slices, which its relatives share.

    Half of the samples are turned by quarters and mirrored along either axis; half of the others are tilted by up to 20
    whole degrees, image and mask by nearest neighbour (a published oddity), with black corners of class 0.
    """
    if rng.random() > 0.5:
        quarters, axis = int(rng.integers(4)), int(rng.integers(2))
        image, mask = (np.flip(np.rot90(array, quarters), axis) for array in sample[:2])
        return sample._replace(image=image, mask=mask)
    if rng.random() > 0.5:
        from scipy import ndimage

        angle = int(rng.integers(-TILT, TILT))
        image, mask = (ndimage.rotate(array, angle, order=0, reshape=False) for array in sample[:2])
        return sample._replace(image=image, mask=mask)
    return sample


def photometric(sample: Sample, rng: np.random.Generator) -> Sample:
    """Brightness, contrast, saturation and hue, each with probability one half; contrast comes second or last.

    Images of other than three channels have no saturation and no hue: these two are left out.
    """
    image = sample.image
    colored = image.shape[2] == 3
    if rng.integers(2):
        image = brightness(image, rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_first = rng.integers(2) == 1
    if contrast_first and rng.integers(2):
        image = contrast(image, rng.uniform(*FACTORS))
    if colored and rng.integers(2):
        image = saturation(image, rng.uniform(*FACTORS))
    if colored and rng.integers(2):
        image = hue(image, int(rng.integers(-HUE, HUE)))
    if not contrast_first and rng.integers(2):
        image = contrast(image, rng.uniform(*FACTORS))
    return sample._replace(image=image)


def brightness(image: NDArray[np.uint8], delta: float) -> NDArray[np.uint8]:
    """Add `delta` levels."""
    return np.take(_levels(1.0, delta), image)


def contrast(image: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """Multiply all levels by `factor`."""
    return np.take(_levels(factor, 0.0), image)


def saturation(image: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """Multiply the saturation by `factor`."""
    hsv = rgb_to_hsv(image)
    hsv[..., 1] = _levels(factor, 0.0)[hsv[..., 1]]
    return hsv_to_rgb(hsv)


def hue(image: NDArray[np.uint8], delta: int) -> NDArray[np.uint8]:
    """Turn the hue by `delta` steps of two degrees."""
    hsv = rgb_to_hsv(image)
    turned = ((np.arange(256) + delta) % 180).astype(np.uint8)
    hsv[..., 0] = turned[hsv[..., 0]]
    return hsv_to_rgb(hsv)


def rgb_to_hsv(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) red green blue -> hue saturation value, bit for bit OpenCV's."""
    hsv = np.empty_like(image)
    for start in range(0, len(image), BLOCK):
        hsv[start : start + BLOCK] = _block_to_hsv(image[start : start + BLOCK])
    return hsv


def _block_to_hsv(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    red, green, blue = np.moveaxis(image, 2, 0).astype(np.int16, order="C")
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    # The distance along the hue circle from the leading colour; red leads over green, green over blue on ties.
    turn = np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    turn = np.where(value == red, green - blue, turn)
    angle = (turn * np.take(HUE_TABLE, spread) + 2048) >> 12
    angle += 180 & (angle >> 31)  # adds 180 where the sign bit is set
    chroma = (spread * np.take(SATURATION_TABLE, value) + 2048) >> 12
    return np.stack([angle, chroma, value], axis=2).astype(np.uint8)


def hsv_to_rgb(hsv: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) hue saturation value -> red green blue, the fraction cut off as in OpenCV's vector code."""
    image = np.empty_like(hsv)
    unit = np.float32(1 / 255)
    for start in range(0, len(hsv), BLOCK):
        angle, chroma, value = np.moveaxis(hsv[start : start + BLOCK], 2, 0)
        places, part, light = angle.astype(np.intp), chroma * unit, value * unit
        for channel in range(3):
            share = np.take(PARTS[channel], places)
            share *= part
            np.subtract(1, share, out=share)
            share *= light
            share *= 255
            image[start : start + BLOCK, :, channel] = share  # the assignment truncates
    return image


def _levels(factor: float, delta: float) -> NDArray[np.uint8]:
    """(256,) what each level becomes: scaled and moved in float32, limited, cut off."""
    levels = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(delta)
    return levels.clip(0, 255).astype(np.uint8)
