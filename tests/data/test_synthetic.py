"""The generated images: the same everywhere, and neither solved by colour nor hopeless."""

import pickle

import numpy as np
import pytest

from segvit.contracts import UserError
from segvit.data.synthetic import ShapesDataset

SHAPES = ShapesDataset(train=120, val=40)


def test_images_depend_on_seed_split_and_number_only():
    copy = pickle.loads(pickle.dumps(ShapesDataset(train=1000)))
    sample = SHAPES.read("train", 7)
    assert np.array_equal(copy.read("train", 7).image, sample.image)
    assert sample.image.shape == (96, 96, 3)
    assert sample.mask.shape == (96, 96)
    assert sample.name == "train_00007"
    for other in (SHAPES.read("val", 7), SHAPES.read("train", 8), ShapesDataset(seed=1).read("train", 7)):
        assert not np.array_equal(other.image, sample.image)


def pixels(split):
    found = [SHAPES.read(split, i) for i in range(SHAPES.count(split))]
    colors = np.concatenate([sample.image.reshape(-1, 3) for sample in found]).astype(np.float32)
    return colors, np.concatenate([sample.mask.ravel() for sample in found])


def test_colour_alone_does_not_solve_it():
    """Each pixel gets the class whose mean colour is nearest."""
    num_classes = len(SHAPES.classes)
    colors, ids = pixels("train")
    assert set(np.unique(ids)) == {*range(num_classes), 255}
    means = np.stack([colors[ids == i].mean(0) for i in range(num_classes)])
    colors, ids = pixels("val")
    assert set(np.unique(ids)) == {*range(num_classes), 255}
    nearest = np.stack([((colors - mean) ** 2).sum(1) for mean in means]).argmin(0)
    valid = ids != 255
    table = np.bincount(ids[valid] * num_classes + nearest[valid], minlength=num_classes**2).reshape(num_classes, -1)
    both = np.diag(table)
    assert 0.1 < (both / (table.sum(0) + table.sum(1) - both)).mean() < 0.6


def test_bad_requests():
    with pytest.raises(UserError, match="size must be 16 or more"):
        ShapesDataset(size=8)
    with pytest.raises(UserError, match="no split 'test'; there are train and val"):
        SHAPES.count("test")
    with pytest.raises(IndexError):
        SHAPES.read("val", 40)
