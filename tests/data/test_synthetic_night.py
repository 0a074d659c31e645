"""The second set of generated images: other classes and another look, by the same rules."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from segvit.contracts import UserError
from segvit.data.boxes import open_boxes
from segvit.data.dataset import open_dataset

NIGHT = open_dataset("synthetic:night?train=60&val=20&size=64")
DAY = open_dataset("synthetic:shapes?train=60&val=20&size=64")


def test_images_depend_on_seed_split_and_number_only() -> None:
    sample, again = NIGHT.read("train", 7), pickle.loads(pickle.dumps(NIGHT)).read("train", 7)
    assert np.array_equal(sample.image, again.image)
    assert np.array_equal(sample.mask, again.mask)
    assert sample.image.shape == (64, 64, 3)
    others = (
        NIGHT.read("val", 7),
        NIGHT.read("train", 8),
        open_dataset("synthetic:night?seed=1&size=64").read("train", 7),
    )
    assert not any(np.array_equal(other.image, sample.image) for other in others)


def test_other_classes_and_another_look() -> None:
    assert not set(NIGHT.classes.names) & set(DAY.classes.names)
    light = [np.median([data.read("train", i).image for i in range(60)]) for data in (NIGHT, DAY)]
    assert light[0] < 0.8 * light[1]
    seen = np.unique(np.concatenate([NIGHT.read("train", i).mask.ravel() for i in range(60)]))
    assert seen.tolist() == list(range(len(NIGHT.classes)))  # and nothing is ignored


def test_signs_are_hollow() -> None:
    """All but the plus have a hole: where the sign is whole, its middle is another class."""
    from segvit.data.synthetic_night import GATE, KITE, PLUS, RING, _distance

    rows, columns = np.abs(np.mgrid[-20:21, -20:21].astype(np.float32)) / 40
    inside = {kind: _distance(kind, rows, columns, 0.3) <= 0 for kind in (RING, PLUS, KITE, GATE)}
    assert [bool(inside[kind][20, 20]) for kind in (RING, PLUS, KITE, GATE)] == [False, True, False, False]
    assert all(shape.sum() > 100 for shape in inside.values())


def test_names_and_boxes() -> None:
    with pytest.raises(UserError, match="there is synthetic:shapes, synthetic:night"):
        open_dataset("synthetic:noon")
    with pytest.raises(UserError, match="generated night have no split 'test'"):
        NIGHT.count("test")
    with pytest.raises(UserError, match="has no boxes; use synthetic:shapes"):
        open_boxes("synthetic:night")
