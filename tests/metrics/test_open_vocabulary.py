"""Seen, unseen and harmonic means against counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from segvit.metrics.confusion import ConfusionMatrix
from segvit.metrics.open_vocabulary import harmonic_mean, open_vocabulary


def test_means_of_both_groups() -> None:
    matrix = ConfusionMatrix(4, 255)
    matrix.update(np.array([0, 0, 1, 1, 2, 2, 2, 0], np.uint8), np.array([0, 0, 1, 2, 2, 2, 1, 255], np.uint8))
    found = open_vocabulary(matrix.metrics(), unseen=[2, 3])  # class 3 occurs nowhere
    assert found.seen == pytest.approx((1 + 1 / 3) / 2)
    assert found.unseen == pytest.approx(2 / 4)
    assert found.harmonic == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert found.aacc == pytest.approx(5 / 7)


def test_a_group_without_values_has_no_mean() -> None:
    matrix = ConfusionMatrix(3, 255)
    matrix.update(np.array([0, 1], np.uint8), np.array([0, 1], np.uint8))
    found = open_vocabulary(matrix.metrics(), unseen=[2])
    assert (found.seen, math.isnan(found.unseen), math.isnan(found.harmonic)) == (1.0, True, True)
    assert math.isnan(open_vocabulary(matrix.metrics(), unseen=[]).unseen)


def test_harmonic_mean() -> None:
    assert harmonic_mean(0.919, 0.778) == pytest.approx(0.8426, abs=1e-4)  # ZegCLIP on VOC
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert harmonic_mean(0.5, 0.0) == 0.0


def test_ids_that_are_no_class() -> None:
    with pytest.raises(ValueError, match=r"\[3, -1\] are no classes"):
        open_vocabulary(ConfusionMatrix(3, 255).metrics(), unseen=[3, -1])
