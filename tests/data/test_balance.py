"""Pixel counts of a dataset, and weights that follow from them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segvit.contracts import Classes, Sample, UserError
from segvit.data.balance import class_weights, count_pixels

WAYS = ["none", "log", "sqrt", "effective"]
pixel_counts = st.lists(st.integers(0, 10**12), min_size=1, max_size=200).filter(any).map(np.array)


class Masks:
    """A dataset of given masks of three classes; remembers what was read."""

    classes = Classes(("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)))

    def __init__(self, *masks):
        self.masks, self.read_numbers = [np.array(mask, np.uint8) for mask in masks], []

    def count(self, split):
        return len(self.masks) if split == "train" else 0

    def read(self, split, i):
        self.read_numbers.append(i)
        return Sample(np.zeros((*self.masks[i].shape, 3), np.uint8), self.masks[i])


def test_pixels_are_counted_without_the_ignored_ones():
    dataset = Masks([[0, 0, 255]], [[2, 0], [255, 255]], [[255]])
    assert count_pixels(dataset, "train").tolist() == [3, 0, 1]
    assert count_pixels(dataset, "train").dtype == np.int64
    assert count_pixels(dataset, "val").tolist() == [0, 0, 0]


def test_a_limit_spreads_over_the_split():
    dataset = Masks(*[[[i % 3]] for i in range(10)])
    assert count_pixels(dataset, "train", limit=3).tolist() == [3, 0, 0]
    assert dataset.read_numbers == [0, 3, 6]
    assert count_pixels(dataset, "train", limit=20).sum() == 10


@pytest.mark.parametrize("how", WAYS)
@given(pixels=pixel_counts)
def test_weights(how, pixels):
    weights = class_weights(pixels, how)
    assert weights.dtype == np.float32
    assert (weights > 0).all()
    assert np.isfinite(weights).all()
    assert (weights * pixels).sum() / pixels.sum() == pytest.approx(1, rel=1e-5)  # the mean over pixels
    assert (weights[pixels == 0] == 1).all()
    present = pixels > 0
    ordered = weights[present][np.argsort(pixels[present], kind="stable")]
    assert (np.diff(ordered) <= 1e-6 * ordered[:-1]).all()  # the rarer, the heavier


@pytest.mark.parametrize("how", WAYS)
def test_weights_depend_on_shares_and_not_on_the_size_of_the_set(how):
    pixels = np.array([900_000, 90_000, 9_000, 0, 1_000])
    assert class_weights(pixels, how) == pytest.approx(class_weights(1000 * pixels, how), rel=1e-6)


def test_the_published_formulas():
    pixels = np.array([960_000, 30_000, 10_000])
    share = pixels / pixels.sum()
    b = math.exp(-3 / pixels.sum())
    plain = {
        "none": np.ones(3), "log": 1 / np.log(1.02 + share), "sqrt": share**-0.5,
        "effective": (1 - b) / (1 - b**pixels),
    }  # fmt: skip
    for how, expected in plain.items():
        assert class_weights(pixels, how) == pytest.approx(expected / (expected * share).sum(), rel=1e-5)
    assert class_weights(pixels, "effective")[2] > 10 * class_weights(pixels, "log")[0]


def test_equal_classes_weigh_the_same():
    for how in WAYS:
        assert class_weights(np.array([5, 5, 0, 5]), how) == pytest.approx(1)


def test_mistakes():
    with pytest.raises(UserError, match="no pixel of the training masks is labelled"):
        class_weights(np.zeros(3, np.int64), "log")
    with pytest.raises(UserError, match="class_balance is 'linear'; choose from none, log, sqrt, effective"):
        class_weights(np.ones(3, np.int64), "linear")
