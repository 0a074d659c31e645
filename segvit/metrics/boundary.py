"""Boundary IoU and boundary F of label maps, streaming: how well outlines are met, whatever the size of the regions.

Sources   Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation" (CVPR 2021);
          F of contours: Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation"
          (CVPR 2016), with the tolerance of Csurka et al., "What is a good evaluation measure for semantic
          segmentation?" (BMVC 2013).
Band      of class k: pixels of k with a pixel that is not k, or outside the image, at most d rows and d columns away:
          what d erosions with a 3 x 3 square remove. As in the paper, the image's edge counts as outside.
Contour   of class k: pixels of k with one of their eight neighbours in another class. The image's edge is no contour.
          A contour pixel is met if the other map has a contour pixel of the same class within the tolerance (Euclidean
          distance). Precision is the share of predicted contour pixels that are met, recall that of the labelled.
Ignore    Ignored pixels belong to no band and no contour, and their predictions are never looked at: in both maps they
          are no class, and what touches them is no edge for that.
Policy    Counts are summed over the whole dataset before any ratio is taken (the papers average over objects or
          images). A class without a band in both labels and predictions has IoU NaN, one without a contour in both has
          F NaN, and they are left out of the means; where only one of the two has it the class counts as 0.

Shapes    K classes, H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segvit.metrics.ids import labelled, same_shape
from segvit.metrics.ratios import Counts, Ratios, defined, mean, number, ratio

if TYPE_CHECKING:  # torch costs seconds to import and only its arrays' type is needed
    from torch import Tensor

WIDTH = 0.02  # of the band, as a part of the image's diagonal (Cheng et al.)
TOLERANCE = 0.0075  # of contours, likewise (Csurka et al.)

Mask = NDArray[np.bool_]


class Pixels(NamedTuple):
    """Pixel counts of each class, (K,) each: the rows of `BoundaryCounts.counts`."""

    hit: Counts  # in the band of the class in prediction and label
    pred: Counts  # in the predicted band
    label: Counts  # in the labelled band
    pred_contour: Counts
    pred_met: Counts  # predicted contour pixels near a labelled contour of the class
    label_contour: Counts
    label_met: Counts  # labelled contour pixels near a predicted contour of the class


@dataclass(frozen=True, kw_only=True, eq=False)
class BoundaryMetrics:
    """Ratios in 0..1 for each class (K,), NaN where undefined, and the means over the classes that have the value."""

    iou: Ratios
    f: Ratios
    precision: Ratios
    recall: Ratios
    miou: float
    mf: float
    counted: int  # classes in miou
    counted_f: int  # classes in mf
    width: float  # parts of the image diagonal
    tolerance: float

    def to_json(self) -> dict[str, Any]:
        """The means and how they were taken; undefined means are None, which JSON can hold."""
        return {
            "miou": number(self.miou), "mf": number(self.mf), "counted": self.counted, "counted_f": self.counted_f,
            "width": self.width, "tolerance": self.tolerance,
        }  # fmt: skip


class BoundaryCounts:
    """Pixel counts of bands and contours, exact in integers, so that any split of the images gives the same.

    `width` of the bands and `tolerance` of the contours are parts of each image's diagonal, rounded to whole pixels and
    at least one.
    """

    def __init__(
        self, num_classes: int, ignore_index: int, *, width: float = WIDTH, tolerance: float = TOLERANCE
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 1")
        if not (width > 0 and tolerance > 0):
            raise ValueError(f"width is {width} and tolerance {tolerance}; both must be above 0")
        self.num_classes, self.ignore_index, self.width, self.tolerance = num_classes, ignore_index, width, tolerance
        self.counts: Counts = np.zeros((len(Pixels._fields), num_classes), np.int64)

    def update(self, pred: NDArray[Any] | Tensor, label: NDArray[Any] | Tensor) -> None:
        """Count the pixels of one image; both are integer class ids (H, W).

        ValueError for an id that is no class (but not for predictions at ignored pixels); then nothing is counted.
        """
        guess, truth = same_shape(pred, label)
        if truth.ndim != 2:
            raise ValueError(f"label is {truth.shape}; give one image (H, W) at a time")
        guess, truth, valid = labelled(guess, truth, self.num_classes, self.ignore_index)
        dtype = np.uint8 if self.num_classes <= 255 else np.uint16
        void = dtype(np.iinfo(dtype).max)
        guess, truth = (np.where(valid, ids.astype(dtype, copy=False), void) for ids in (guess, truth))
        reach, near = (_pixels(part, truth.shape) for part in (self.width, self.tolerance))
        guess_band, truth_band = (band(ids, reach) for ids in (guess, truth))
        edges, true_edges = (np.where(contour(ids), ids, void) for ids in (guess, truth))
        self.counts += Pixels(
            hit=self._of_classes(truth[guess_band & truth_band & (guess == truth)]),
            pred=self._of_classes(guess[guess_band]),
            label=self._of_classes(truth[truth_band]),
            pred_contour=self._of_classes(edges[edges != void]),
            pred_met=self._of_classes(met(edges, true_edges, near)),
            label_contour=self._of_classes(true_edges[true_edges != void]),
            label_met=self._of_classes(met(true_edges, edges, near)),
        )

    def add(self, other: BoundaryCounts) -> None:
        """Add the counts of other images of the same classes: another process, another part of the data."""
        ours, theirs = self._settings(), other._settings()
        if ours != theirs:
            raise ValueError(
                f"(classes, ignore id, width, tolerance) is {ours} here but {theirs} there; make them equal"
            )
        self.counts += other.counts

    def pixels(self) -> Pixels:
        """The counts by name."""
        return Pixels(*self.counts)

    def metrics(self) -> BoundaryMetrics:
        """All ratios of the counts so far."""
        of = self.pixels()
        iou = ratio(of.hit, of.pred + of.label - of.hit)
        precision, recall = ratio(of.pred_met, of.pred_contour), ratio(of.label_met, of.label_contour)
        f = np.nan_to_num(ratio(2 * precision * recall, precision + recall))
        f[of.pred_contour + of.label_contour == 0] = np.nan
        return BoundaryMetrics(
            iou=iou, f=f, precision=precision, recall=recall, miou=mean(iou), mf=mean(f), counted=defined(iou),
            counted_f=defined(f), width=self.width, tolerance=self.tolerance,
        )  # fmt: skip

    def _settings(self) -> tuple[int, int, float, float]:
        return self.num_classes, self.ignore_index, self.width, self.tolerance

    def _of_classes(self, ids: NDArray[Any]) -> Counts:
        return np.bincount(ids, minlength=self.num_classes)


def band(ids: NDArray[Any], reach: int) -> Mask:
    """Pixels (H, W) with another id, or the outside of the image, at most `reach` rows and columns away.

    The largest number of the type (255, 65535) is no id: such pixels are in no band and make none.
    """
    frame = np.ones(ids.shape, np.bool_)
    frame[reach:-reach, reach:-reach] = False
    return (_differs(ids, reach) | frame) & (ids != np.iinfo(ids.dtype).max)


def contour(ids: NDArray[Any]) -> Mask:
    """Pixels (H, W) one of whose eight neighbours has another id; 255 or 65535, the type's largest, is no id."""
    return _differs(ids, 1) & (ids != np.iinfo(ids.dtype).max)


def met(ids: NDArray[Any], others: NDArray[Any], reach: int) -> NDArray[Any]:
    """The ids (n,) of those pixels of `ids` that have an equal id of `others` at most `reach` away (Euclidean).

    Both are (H, W) and hold the type's largest number where they hold no id. Rings are tried from the nearest on, each
    by what the nearer ones have not met: most contours are nearly right, so that few pixels see the outer rings.
    """
    void = np.iinfo(ids.dtype).max
    padded = np.pad(others, reach, constant_values=void)
    wide, around = padded.shape[1], padded.ravel()
    rows, columns = np.nonzero(ids != void)
    left, places = ids[rows, columns], (rows + reach) * wide + columns + reach
    found = []
    for ring in _rings(reach, wide):
        hit = np.zeros(len(left), np.bool_)
        for offset in ring:
            hit |= around[places + offset] == left
        found.append(left[hit])
        left, places = left[~hit], places[~hit]
    return np.concatenate(found)


def _rings(reach: int, wide: int) -> list[NDArray[np.intp]]:
    """Offsets in a flat image `wide` pixels wide, one array for each distance up to `reach`, the nearest first."""
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    square = y**2 + x**2
    return [(y * wide + x)[square == distance] for distance in np.unique(square[square <= reach**2])]


def _pixels(part: float, size: tuple[int, ...]) -> int:
    return max(1, round(part * math.hypot(*size)))


def _differs(ids: NDArray[Any], reach: int) -> Mask:
    """Whether the (2 reach + 1)^2 pixels around each, cut off at the image's edge, hold another id than its own.

    They do not if their least and their largest id both are its own: two filters for any number of classes.
    """
    void = np.iinfo(ids.dtype).max
    padded = np.pad(ids, reach, constant_values=void)
    low = _square(np.minimum, padded, reach)
    high = _square(np.maximum, np.where(padded == void, 0, padded), reach)
    return (low != ids) | (high != ids)


def _square(combine: np.ufunc, values: NDArray[Any], reach: int) -> NDArray[Any]:
    rows = _slide(combine, values, 2 * reach + 1)
    return _slide(combine, rows.T, 2 * reach + 1).T


def _slide(combine: np.ufunc, values: NDArray[Any], length: int) -> NDArray[Any]:
    """`combine` over every window of `length` rows; each pass doubles the window, so that passes are few."""
    done = 1
    while done < length:
        step = min(done, length - done)
        values, done = combine(values[:-step], values[step:]), done + step
    return values
