"""The scenes of 150 classes."""

import numpy as np
import pytest

from segvit.data.dataset import open_dataset
from segvit.data.synthetic_fine import FINE, HUES, TEXTURES, draw_fine


def test_every_mix_of_traits_is_a_class():
    names = FINE.classes.names
    assert len(names) == len(set(names)) == 150
    assert {tuple(name.split()) for name in names} == {
        (hue, texture, form) for hue in HUES for texture in TEXTURES for form in ("ground", "disc", "square")
    }


@pytest.mark.parametrize("size", [64, 128])
def test_scenes_are_a_function_of_their_seed(size):
    image, mask = draw_fine(size, (0, 3, 1))
    assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((size, size, 3), np.uint8, (size, size), np.uint8)
    again, other = draw_fine(size, (0, 3, 1)), draw_fine(size, (0, 4, 1))
    np.testing.assert_array_equal(image, again[0])
    np.testing.assert_array_equal(mask, again[1])
    assert (image != other[0]).any()
    present = np.unique(mask)
    assert present.max() < 150
    assert present.min() < 50 < present.max()  # a ground and a shape


def test_it_is_opened_by_name():
    dataset = open_dataset("synthetic:fine?train=2&val=1&size=48")
    assert (len(dataset.classes), dataset.count("train")) == (150, 2)
    assert dataset.read("val", 0).mask.shape == (48, 48)
