"""Few-shot metrics: counts before ratios, ignored pixels, classes without an episode."""

import numpy as np
import pytest

from segvit.metrics.few_shot import EpisodeCounts


def test_counts_are_summed_before_the_ratio_is_taken():
    counts = EpisodeCounts([3, 7])
    counts.update(3, np.array([[1, 1, 0, 0]]), np.array([[1, 0, 0, 255]]))  # object 1 / 2, background 1 / 2
    counts.update(3, np.array([[1, 1, 1, 1]]), np.array([[1, 1, 1, 1]]))  # object 4 / 4
    found = counts.metrics()
    assert found.class_iou == {3: pytest.approx(5 / 6), 7: 0}
    assert found.miou == pytest.approx(5 / 12)
    assert found.fb_iou == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert found.episodes == {3: 2, 7: 0}


def test_sizes_and_classes_are_checked():
    counts = EpisodeCounts([3])
    with pytest.raises(ValueError, match="class 4"):
        counts.update(4, np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="sizes must be equal"):
        counts.update(3, np.zeros((2, 2)), np.zeros((2, 3)))
