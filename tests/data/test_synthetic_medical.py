"""Generated medical images: they depend on their number only, and colour or grey alone does not solve them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segvit.data.dataset import open_dataset
from segvit.data.synthetic_medical import ORGANS, PLACES, draw_organs, write_organs
from segvit.data.volumes import VolumeDataset, cases

POLYPS = open_dataset("synthetic:polyps?train=60&val=20&size=64")


def test_images_depend_on_seed_split_and_number_only() -> None:
    sample, again = POLYPS.read("train", 7), open_dataset("synthetic:polyps?size=64").read("train", 7)
    np.testing.assert_array_equal(sample.image, again.image)
    np.testing.assert_array_equal(sample.mask, again.mask)
    others = (
        POLYPS.read("val", 7),
        POLYPS.read("train", 8),
        open_dataset("synthetic:polyps?seed=1&size=64").read("train", 7),
    )
    assert not any(np.array_equal(other.image, sample.image) for other in others)


def test_most_images_show_a_polyp_and_some_none() -> None:
    shares = np.array([POLYPS.read("train", i).mask.mean() for i in range(60)])
    assert 1 <= (shares == 0).sum() <= 15
    assert 0.02 < np.median(shares[shares > 0]) < 0.25
    assert shares.max() < 0.6


def test_colour_alone_does_not_find_polyps() -> None:
    """The best threshold on any channel, or on the redness, of each pixel."""
    samples = [POLYPS.read("train", i) for i in range(60)]
    pixels = np.concatenate([sample.image.reshape(-1, 3) for sample in samples]).astype(float)
    inside = np.concatenate([sample.mask.ravel() for sample in samples]).astype(bool)
    best = 0.0
    for values in (*pixels.T, pixels[:, 0] - pixels[:, 1]):
        for sign in (1, -1):
            for cut in np.quantile(sign * values, np.linspace(0.5, 0.99, 25)):
                found = sign * values >= cut
                best = max(best, 2 * (found & inside).sum() / (found.sum() + inside.sum()))
    assert best < 0.45


def test_volumes_hold_all_organs_between_thick_slices() -> None:
    scan, again = draw_organs((12, 48, 48), (0, 3, 1)), draw_organs((12, 48, 48), (0, 3, 1))
    np.testing.assert_array_equal(scan.image, again.image)
    assert not np.array_equal(scan.labels, draw_organs((12, 48, 48), (0, 4, 1)).labels)
    assert np.unique(scan.labels).tolist() == list(range(len(ORGANS)))
    assert scan.spacing[0] > 3 * scan.spacing[1]
    greys = {organ: np.median(scan.image[scan.labels == organ]) for organ in PLACES}
    assert abs(greys[2] - greys[3]) < 30  # right and left kidney: place alone tells
    assert greys[5] > greys[1]


def test_volumes_are_ready_to_train_on(tmp_path: Path) -> None:
    pytest.importorskip("nibabel")
    data = open_dataset(write_organs(tmp_path, train=2, val=1, shape=(5, 16, 16)))
    assert isinstance(data, VolumeDataset)
    assert (data.count("train"), data.count("val"), data.channels) == (10, 5, 1)
    scan = draw_organs((5, 16, 16), (0, 1, 1))
    np.testing.assert_array_equal(data.read("train", 7).mask, scan.labels[2])
    assert cases(data, "train")[1].spacing == pytest.approx(scan.spacing)
