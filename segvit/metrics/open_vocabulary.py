"""Generalised zero-shot metrics: mean IoU of seen and of unseen classes, which all compete, and their harmonic mean.

Paper     Y. Xian et al., "Semantic Projection Network for Zero- and Few-Label Semantic Segmentation", CVPR 2019.
Policy    As for all our means: a class that is neither labelled nor predicted is left out of its group's mean.

Shapes    K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from segvit.metrics.confusion import Metrics
from segvit.metrics.ratios import mean


class OpenVocabulary(NamedTuple):
    """Fractions; NaN where a group has no class with a value."""

    seen: float  # mean IoU
    unseen: float
    harmonic: float  # hIoU = 2 S U / (S + U)
    aacc: float  # pixel accuracy over all classes


def open_vocabulary(metrics: Metrics, *, unseen: Sequence[int]) -> OpenVocabulary:
    """The means of both groups from the metrics of a confusion matrix, that is over a whole dataset.

    Raises ValueError for ids that are no class.
    """
    wrong = [number for number in unseen if not 0 <= number < len(metrics.iou)]
    if wrong:
        raise ValueError(f"unseen ids {wrong} are no classes (0..{len(metrics.iou) - 1})")
    hidden = np.zeros(len(metrics.iou), np.bool_)
    hidden[list(unseen)] = True
    known, new = mean(metrics.iou[~hidden]), mean(metrics.iou[hidden])
    return OpenVocabulary(known, new, harmonic_mean(known, new), metrics.aacc)


def harmonic_mean(first: float, second: float) -> float:
    """2ab / (a + b); 0 where both are 0, NaN where one is."""
    total = first + second
    return 2 * first * second / total if total else 0.0
