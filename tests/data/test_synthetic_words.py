"""The set of generated images whose classes have two words each: a texture and a shape."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from segvit.data.dataset import open_dataset
from segvit.data.synthetic_words import NAMES, PAIRS, SHAPES, TEXTURES, WITHHELD, draw_words

WORDS = open_dataset("synthetic:words?train=150&val=10&size=64")


def test_images_depend_on_seed_split_and_number_only() -> None:
    sample, again = WORDS.read("train", 7), pickle.loads(pickle.dumps(WORDS)).read("train", 7)
    assert np.array_equal(sample.image, again.image)
    assert np.array_equal(sample.mask, again.mask)
    assert sample.image.shape == (64, 64, 3)
    assert sample.mask.dtype == np.uint8
    others = (
        WORDS.read("val", 7),
        WORDS.read("train", 8),
        open_dataset("synthetic:words?seed=1&size=64").read("val", 7),
    )
    assert not any(np.array_equal(other.image, sample.image) for other in others)


def test_every_combination_occurs_and_each_word_of_a_withheld_one_is_seen() -> None:
    found = np.unique(np.concatenate([WORDS.read("train", i).mask.ravel() for i in range(150)]))
    assert found.tolist() == list(range(1 + len(TEXTURES) * len(SHAPES)))
    seen = [pair for pair in PAIRS if " ".join(pair) not in WITHHELD]
    assert len(seen) == len(PAIRS) - 5
    assert {word for pair in seen for word in pair} == {*TEXTURES, *SHAPES}
    assert sorted(name.split()[1] for name in WITHHELD) == sorted(SHAPES)


@pytest.mark.parametrize("objects", [0, 1])
def test_as_many_objects_as_asked_for(objects: int) -> None:
    kinds = [np.unique(draw_words(48, (0, i, 1), objects=objects)[1]) for i in range(20)]
    assert all(len(ids) == 1 + objects for ids in kinds)


def test_textures_differ_in_their_lightness_only() -> None:
    """Of the pixels of an object: none is dark, half, fewer, half; hues are no clue."""
    dark: dict[str, list[float]] = {texture: [] for texture in TEXTURES}
    for i in range(200):
        image, mask = draw_words(64, (1, i, 1), objects=1)
        pixels = image[mask > 0].max(-1) / np.percentile(image[mask > 0].max(-1), 90)
        dark[NAMES[mask.max()].split()[0]].append(float((pixels < 0.6).mean()))
    plain, striped, dotted, checked = (np.mean(dark[texture]) for texture in TEXTURES)
    assert plain < 0.02
    assert 0.4 < striped < 0.6
    assert 0.4 < checked < 0.6
    assert 0.1 < dotted < 0.4


def test_zoom_shows_the_same_objects_from_closer_by() -> None:
    far, close = (np.mean([(draw_words(48, (2, i, 1), objects=1, zoom=zoom)[1] > 0).mean() for i in range(40)])
                  for zoom in (1.0, 4 / 3))  # fmt: skip
    assert 1.4 < close / far < 1.9  # 16 / 9, less what the border cuts off
