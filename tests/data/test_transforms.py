"""The augmentations: what is drawn, in which order, and what comes out. Parity with the originals is in the goldens."""

import colorsys

import numpy as np
import pytest

from segvit.contracts import Sample
from segvit.data.transforms import (
    Augment,
    augment,
    brightness,
    choose_crop,
    contrast,
    crop_accepted,
    hsv_to_rgb,
    hue,
    photometric,
    random_flip,
    resize_and_crop,
    rgb_to_hsv,
    saturation,
)

RNG = np.random.default_rng
NOISE = RNG(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


class Scripted:
    """Stands in for a generator: hands out the given answers and remembers what was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def integers(self, *bounds):
        self.asked.append(bounds)
        return self.answers.pop(0)

    uniform = integers


def halves(height=40, width=50):
    """A mask whose two halves hold two classes, with an image that shows the column number."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2 :] = 1
    image = np.repeat(np.arange(width, dtype=np.uint8)[None, :, None], height, 0).repeat(3, 2)
    return Sample(image, mask, "halves")


def test_steps_cut_off_the_fraction():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert np.array_equal(brightness(levels, -0.4).ravel(), np.maximum(levels.astype(int) - 1, 0).ravel())
    assert np.array_equal(brightness(levels, 0.35), levels)
    assert contrast(levels, 1.5).max() == 255
    assert contrast(levels, 0.5)[0, 3, 0] == 1


def test_hsv_is_a_colour_circle():
    shown = rgb_to_hsv(np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9], [255, 0, 255]]], np.uint8))
    assert shown.tolist() == [[[0, 255, 255], [60, 255, 255], [120, 255, 255], [0, 0, 9], [150, 255, 255]]]
    back = hsv_to_rgb(shown)
    assert np.abs(back.astype(int) - [[[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9], [255, 0, 255]]]).max() <= 1


def test_hsv_agrees_with_the_textbook():
    hsv = rgb_to_hsv(NOISE)
    for pixel, (h, s, v) in zip(NOISE.reshape(-1, 3)[:200], hsv.reshape(-1, 3)[:200].tolist(), strict=True):
        expected = colorsys.rgb_to_hsv(*(pixel / 255))
        assert abs((expected[0] * 180 - h + 90) % 180 - 90) <= 0.6
        assert abs(expected[1] * 255 - s) <= 0.6
        assert v == pixel.max()
        assert np.abs(np.array(colorsys.hsv_to_rgb(h / 180, s / 255, v / 255)) * 255 - pixel).max() < 8


def test_saturation_and_hue():
    gray = rgb_to_hsv(saturation(NOISE, 0.0))
    assert gray[..., 1].max() == 0
    red = np.array([[[255, 0, 0]]], np.uint8)
    assert hue(red, 60).tolist() == [[[0, 255, 0]]]
    assert hue(red, -60).tolist() == [[[0, 0, 255]]]


def test_photometric_draws_in_the_published_order():
    sample = Sample(NOISE, np.zeros((40, 50), np.uint8))
    first = Scripted(1, 9.6, 1, 1, 1.21, 1, 0.77, 1, -11)
    out = photometric(sample, first).image
    assert np.array_equal(out, hue(saturation(contrast(brightness(NOISE, 9.6), 1.21), 0.77), -11))
    assert first.asked == [(2,), (-32, 32), (2,), (2,), (0.5, 1.5), (2,), (0.5, 1.5), (2,), (-18, 18)]
    last = photometric(sample, Scripted(0, 0, 1, 0.77, 0, 1, 1.21)).image
    assert np.array_equal(last, contrast(saturation(NOISE, 0.77), 1.21))
    assert np.array_equal(photometric(sample, Scripted(0, 1, 0, 0, 0)).image, NOISE)


def test_crops_need_two_classes():
    mask = np.zeros((4, 4), np.uint8)
    assert not crop_accepted(mask, 0.75, 255)
    mask[0] = 1
    assert not crop_accepted(mask, 0.75, 255)  # exactly three quarters
    mask[1, 0] = 1
    assert crop_accepted(mask, 0.75, 255)
    mask[mask == 1] = 255
    assert not crop_accepted(mask, 0.75, 255)
    assert not crop_accepted(np.full((4, 4), 255, np.uint8), 0.75, 255)


@pytest.mark.parametrize(("bad", "draws"), [(0, 1), (1, 2), (10, 11), (12, 11)])
def test_a_crop_is_redrawn_ten_times_at_most(bad, draws):
    rng = Scripted(*[0, 0] * bad, *[1, 19] * 12)
    assert choose_crop(halves().mask, (12, 12), 0.75, rng, 255) == ((1, 19) if bad < 11 else (0, 0))
    assert rng.asked == [(29,), (39,)] * draws  # height first


def test_a_cap_of_one_asks_nothing():
    rng = Scripted(0, 0)
    assert choose_crop(np.zeros((40, 50), np.uint8), (12, 60), 1.0, rng, 255) == (0, 0)
    assert rng.asked == [(29,), (1,)]  # drawn even where there is no margin


def test_image_and_mask_stay_together():
    recipe = Augment(crop=(30, 30), photometric=False, cat_max_ratio=0.9)
    for seed in range(30):
        out = augment(halves(), recipe, RNG(seed), 255)
        assert out.image.shape[:2] == out.mask.shape
        assert max(out.mask.shape) <= 30
        column = out.image[0, :, 0].astype(int)
        assert np.all(out.mask[0][column < 23] == 0)
        assert np.all(out.mask[0][column > 26] == 1)
        assert out.name == "halves"


def test_resize_uses_the_scale_or_the_own_size():
    sample = halves()
    base = {"crop": (500, 500), "ratio_range": (0.5, 0.5)}
    assert resize_and_crop(sample, Augment(**base), RNG(0), 255).mask.shape == (20, 25)
    assert resize_and_crop(sample, Augment(**base, scale=(400, 160)), RNG(0), 255).mask.shape == (80, 100)


def test_flip():
    sample = halves()
    flipped = random_flip(sample, RNG(0), probability=1.0)
    assert np.array_equal(flipped.image, sample.image[:, ::-1])
    assert np.array_equal(flipped.mask, sample.mask[:, ::-1])
    assert random_flip(sample, RNG(0), probability=0.0) is sample


def test_the_source_is_never_changed():
    sample = halves()
    image, mask = sample.image.copy(), sample.mask.copy()
    for seed in range(5):
        augment(sample, Augment(crop=(30, 30), ratio_range=(1.0, 1.0)), RNG(seed), 255)
    assert np.array_equal(sample.image, image)
    assert np.array_equal(sample.mask, mask)
