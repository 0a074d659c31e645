"""The augmentations: what is drawn, in which order, and what comes out. Parity with the originals is in the goldens."""

import colorsys

import numpy as np
import pytest

from segvit.contracts import Sample, UserError
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
    random_turn,
    rare_crop,
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


def speck(height=60, width=80):
    """Grass and water with a speck of two by three pixels of a third class, and an unlabelled border."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2 :] = 1
    mask[20:22, 10:13] = 2
    mask[0] = 255
    return mask


RARITY = 1 / np.sqrt(np.array([0.5, 0.4, 0.001, 0.1], np.float32))  # the last class is not in `speck`


def test_rare_crops_hold_what_is_rare():
    sample = Sample(np.zeros((60, 80, 3), np.uint8), speck())
    options = {"crop": (16, 16), "ratio_range": (1.0, 1.0), "photometric": False, "cat_max_ratio": 1.0}
    shares = {}
    for probability in (0.0, 0.5, 1.0):
        recipe = Augment(**options, rare_crops=probability)
        masks = [augment(sample, recipe, RNG(seed), 255, RARITY).mask for seed in range(300)]
        assert all(mask.shape == (16, 16) for mask in masks)
        shares[probability] = np.mean([(mask == 2).any() for mask in masks])
    # 17 of 45 x 18 of 65 places hold the speck; the class itself is drawn in 91 % of the rare crops.
    assert 0.05 < shares[0.0] < 0.2
    assert 0.4 < shares[0.5] < 0.65
    assert 0.85 < shares[1.0] < 0.97


def test_a_rare_crop_is_any_of_those_around_the_pixel():
    mask = np.zeros((20, 30), np.uint8)
    mask[9, 3] = 1
    rng, rarity = RNG(0), np.array([0.0, 1.0])
    found = {rare_crop(mask, (5, 6), rarity, rng) for _ in range(600)}
    assert found == {(top, left) for top in range(5, 10) for left in range(4)}
    assert {rare_crop(mask, (5, 60), rarity, rng) for _ in range(100)} == {(top, 0) for top in range(5, 10)}
    assert rare_crop(mask, (20, 30), rarity, rng) == (0, 0)


def test_classes_are_drawn_by_rarity_and_pixels_evenly():
    mask = np.zeros((1, 40), np.uint8)
    mask[0, 30:] = 1
    mask[0, :4] = 255
    rng = RNG(0)
    places = np.array([rare_crop(mask, (1, 1), np.array([1.0, 3.0, 9.0]), rng)[1] for _ in range(4000)])
    counts = np.bincount(places, minlength=40)
    assert counts[:4].sum() == 0
    assert counts[30:].sum() == pytest.approx(3000, rel=0.05)
    assert counts[30:].min() > 230
    assert counts[4:30].min() > 15


def test_without_a_labelled_pixel_a_crop_lies_anywhere():
    mask = np.full((40, 50), 255, np.uint8)
    assert rare_crop(mask, (8, 8), RARITY, RNG(0)) is None
    recipe = Augment(crop=(8, 8), rare_crops=1.0)
    sample = Sample(np.zeros((40, 50, 3), np.uint8), mask)
    assert resize_and_crop(sample, recipe, RNG(0), 255, RARITY).mask.shape == (8, 8)


def test_ids_above_255_have_rare_crops_too():
    mask = np.full((20, 20), 65535, np.uint16)
    mask[3, 4] = 299
    assert rare_crop(mask, (1, 1), np.ones(300), RNG(0)) == (3, 4)


def test_rarity_changes_nothing_without_rare_crops():
    sample, recipe = halves(), Augment(crop=(12, 12))
    for seed in range(10):
        plain, given = augment(sample, recipe, RNG(seed), 255), augment(sample, recipe, RNG(seed), 255, RARITY)
        assert np.array_equal(plain.image, given.image)
        assert np.array_equal(plain.mask, given.mask)


def test_rare_crops_are_a_probability_and_need_the_rarity():
    with pytest.raises(UserError, match=r"rare_crops is 1\.5; it is a probability"):
        Augment(rare_crops=1.5)
    with pytest.raises(ValueError, match="needs the rarity of the classes"):
        augment(halves(), Augment(rare_crops=1.0), RNG(0), 255)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channel_counts_have_no_saturation_and_hue(channels):
    image = RNG(1).integers(0, 256, (40, 50, channels), dtype=np.uint8)
    sample = Sample(image, np.zeros((40, 50), np.uint8))
    script = Scripted(1, 7.0, 1, 1, 1.25)  # brightness, by 7, contrast first, and it is drawn, by 1.25
    result = photometric(sample, script)
    assert script.answers == []
    np.testing.assert_array_equal(result.image, contrast(brightness(image, 7.0), 1.25))
    whole = augment(sample, Augment(crop=(16, 24), cat_max_ratio=1), RNG(2), 255)
    assert whole.image.shape == (16, 24, channels)


class Answers(Scripted):
    """Also answers `random`."""

    def random(self):
        return self.answers.pop(0)


def test_transunet_turns_by_quarters_or_tilts_or_neither():
    image = np.arange(48, dtype=np.uint8).reshape(6, 8, 1)
    sample = Sample(image, image[..., 0] % 7, "x")
    turned = random_turn(sample, Answers(0.6, 3, 1))
    np.testing.assert_array_equal(turned.image, np.rot90(image, 3)[:, ::-1])
    np.testing.assert_array_equal(turned.mask, turned.image[..., 0] % 7)
    assert random_turn(sample, Answers(0.4, 0.5)) is sample
    draws = Answers(0.4, 0.6, 15)
    tilted = random_turn(sample, draws)
    assert draws.asked == [(-20, 20)]
    assert tilted.image.shape == image.shape
    assert set(tilted.image.ravel().tolist()) < {0, *image.ravel().tolist()}  # nearest: no value in between
    np.testing.assert_array_equal(tilted.mask[2:4, 3:5], tilted.image[2:4, 3:5, 0] % 7)
    assert tilted.mask[0, 0] == 0  # a corner from outside


def test_stretched_to_the_crop_by_either_filter():
    sample = halves(40, 50)
    for how in ("bilinear", "nearest", "spline"):
        recipe = Augment(crop=(20, 30), stretch=True, resize=how, ratio_range=(1.0, 1.0), cat_max_ratio=1.0)
        out = resize_and_crop(sample, recipe, RNG(0), 255)
        assert out.image.shape == (20, 30, 3)
        np.testing.assert_array_equal(out.mask, np.repeat([[0] * 15 + [1] * 15], 20, 0))
        places = out.image[0, :, 0].astype(int)
        if how == "nearest":
            assert places.tolist() == [i * 50 // 30 for i in range(30)]
        else:
            corners = (0, 49) if how == "spline" else (0, 49 - 0.33)
            np.testing.assert_allclose(places, np.linspace(*corners, 30), atol=1.1)
    assert places[0] == 0
    assert places[-1] == 49  # splines meet at the corners
    larger = resize_and_crop(
        sample,
        Augment(crop=(20, 30), scale=(40, 60), stretch=True, ratio_range=(1.0, 1.0), cat_max_ratio=1.0),
        RNG(0),
        255,
    )
    assert larger.image.shape == (20, 30, 3)


def test_upside_down_and_the_stream_without_it():
    plain = Augment(crop=(40, 50), ratio_range=(1.0, 1.0), flip=0.0, photometric=False, cat_max_ratio=1.0)
    sample = Sample(NOISE, NOISE[..., 0] % 3, "x")
    upright = augment(sample, plain, RNG(3), 255)
    turned = augment(sample, Augment(**vars(plain) | {"flip_vertical": 1.0}), RNG(3), 255)
    np.testing.assert_array_equal(turned.image, upright.image[::-1])
    np.testing.assert_array_equal(turned.mask, upright.mask[::-1])
    never = augment(sample, Augment(**vars(plain) | {"photometric": True}), RNG(3), 255)
    again = augment(sample, Augment(**vars(plain) | {"photometric": True, "passes": (0.5,)}), RNG(3), 255)
    np.testing.assert_array_equal(never.image, again.image)


def test_colours_of_another_image():
    recipe = Augment(crop=(40, 50), ratio_range=(1.0, 1.0), flip=0.0, photometric=False, cat_max_ratio=1.0)
    sample, other = Sample(NOISE, NOISE[..., 0] % 3, "x"), np.full((5, 6, 3), (200, 40, 30), np.uint8)
    out = augment(sample, recipe, RNG(0), 255, other=other)
    np.testing.assert_allclose(out.image.mean((0, 1)), (200, 40, 30), atol=2)
    np.testing.assert_array_equal(out.mask, sample.mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip_vertical": 1.5}, "augment.flip_vertical is 1.5; it is a probability"),
        ({"color_transfer": -0.1}, "augment.color_transfer is -0.1; it is a probability"),
        ({"passes": (1.0, 0.0)}, r"augment.passes is \[1.0, 0.0\]; give positive factors"),
    ],
)
def test_recipes_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        Augment(**options)
