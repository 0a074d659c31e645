"""Streaming confusion matrix and what is read from it: IoU, accuracy, Dice, F-score, precision, recall.

Policy    as mmseg: pixels whose label is the ignore id are dropped with their predictions; counts are summed over the
          whole dataset before any ratio is taken. A class in neither labels nor predictions has IoU NaN and is left out
          of the mean; a class that is predicted but never labelled has IoU 0 (counted) and accuracy NaN (left out).
          In the frequency-weighted IoU a class weighs its share of the labelled pixels, so neither of both adds to it.
Checked   against mmseg's numbers, torchmetrics and scikit-learn.

Shapes    K classes; the matrix is (K, K) with labels as rows and predictions as columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import Classes
from segvit.metrics.ids import BLOCK, labelled, same_shape
from segvit.metrics.ratios import Counts, Ratios, defined, mean, number, ratio

if TYPE_CHECKING:  # torch costs seconds to import and only its arrays' type is needed
    from torch import Tensor

BYTE_IGNORE = 255
SAMPLE = 4096  # pixels that tell whether a map is busy
BUSY = 10  # with a change at more than every 10th pixel, counting pixel by pixel is faster than run by run

COLUMNS = ("class", "IoU", "Acc", "Precision", "Dice", "pixels")  # of Metrics.table; Acc of a class is its recall


class Areas(NamedTuple):
    """Pixel counts of each class, (K,) each."""

    intersect: Counts  # labelled and predicted
    union: Counts  # labelled or predicted
    pred: Counts
    label: Counts


@dataclass(frozen=True, kw_only=True, eq=False)
class Metrics:
    """Ratios in 0..1 for each class (K,), NaN where undefined, and their means.

    `miou` and `macc` are means over the classes that have the value: `counted` classes for `miou` (those labelled or
    predicted anywhere), the labelled ones for `macc`. With no labelled pixel at all they are NaN.
    `aacc` is the share of all labelled pixels that are right; `fwiou` is the mean IoU in which every class weighs its
    share of the labelled pixels.
    """

    iou: Ratios
    acc: Ratios
    dice: Ratios
    fscore: Ratios
    precision: Ratios
    recall: Ratios
    pixels: Counts  # labelled pixels of each class
    miou: float
    macc: float
    aacc: float
    fwiou: float
    counted: int

    def to_json(self, classes: Classes) -> dict[str, Any]:
        """Means and one record a class, as fractions; undefined values are None, which JSON can hold."""
        self._check(classes)
        ratios = {
            "iou": self.iou, "acc": self.acc, "dice": self.dice,
            "fscore": self.fscore, "precision": self.precision, "recall": self.recall,
        }  # fmt: skip
        total = int(self.pixels.sum())
        rows = [
            {
                "id": i,
                "name": name,
                **{key: number(values[i]) for key, values in ratios.items()},
                "pixels": int(self.pixels[i]),
                "share": int(self.pixels[i]) / total if total else 0.0,
            }
            for i, name in enumerate(classes.names)
        ]
        means = {"miou": self.miou, "macc": self.macc, "aacc": self.aacc, "fwiou": self.fwiou}
        return {**{key: number(value) for key, value in means.items()}, "counted": self.counted, "classes": rows}

    def table(self, classes: Classes) -> list[tuple[str, ...]]:
        """Rows under `COLUMNS` in percent, one a class in id order and the means last; "-" where undefined."""
        self._check(classes)
        total = max(int(self.pixels.sum()), 1)
        rows = [
            (name, *map(_percent, (self.iou[i], self.acc[i], self.precision[i], self.dice[i], self.pixels[i] / total)))
            for i, name in enumerate(classes.names)
        ]
        means = map(_percent, (self.miou, self.macc, mean(self.precision), mean(self.dice)))
        return [*rows, (f"mean of {self.counted}", *means, "")]

    def _check(self, classes: Classes) -> None:
        if len(classes) != len(self.iou):
            raise ValueError(f"metrics of {len(self.iou)} classes but a table of {len(classes)} names; pass the same")


class ConfusionMatrix:
    """Counts of (label, prediction) pairs, exact in integers, so that any split of the data gives the same matrix."""

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 1")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.matrix: Counts = np.zeros((num_classes, num_classes), np.int64)  # rows = label, columns = prediction

    def update(self, pred: NDArray[Any] | Tensor, label: NDArray[Any] | Tensor) -> None:
        """Count the pixels of one image or batch; both are integer class ids of one shape.

        Predictions at ignored pixels are never looked at. ValueError for any other id that is no class; then nothing
        is counted. Memory beyond the two arrays does not grow with their size.
        """
        guess, truth = (ids.reshape(-1) for ids in same_shape(pred, label))
        blocks = (slice(start, start + BLOCK) for start in range(0, truth.size, BLOCK))
        self.matrix += sum(self._count(guess[block], truth[block]) for block in blocks)

    def _count(self, guess: NDArray[Any], truth: NDArray[Any]) -> Counts:
        """The (K, K) counts of two flat arrays.

        Label maps are made of runs, so that runs are counted, weighted by their lengths. In a busy map runs do not pay.
        """
        if not _busy(guess, truth):
            ends = _run_ends(guess, truth)
            return self._count_pairs(guess.take(ends), truth.take(ends), np.diff(ends, prepend=-1))
        counts = self._count_bytes(guess, truth)
        return self._count_pairs(guess, truth, None) if counts is None else counts

    def _count_bytes(self, guess: NDArray[Any], truth: NDArray[Any]) -> Counts | None:
        """One histogram of the 65,536 pairs that two bytes can be; None for wider ids, and for ids that are no class.

        Nothing is masked: ignored pixels fill a row of their own.
        """
        in_bytes = guess.dtype == truth.dtype == np.uint8
        if not in_bytes or self.ignore_index != BYTE_IGNORE or self.num_classes > BYTE_IGNORE:
            return None
        codes = truth.astype(np.uint16)
        codes <<= 8
        codes |= guess
        # bincount's own conversion to int64 is slower.
        table = np.bincount(codes.astype(np.int64), minlength=65536).reshape(256, 256)
        counts = table[: self.num_classes, : self.num_classes]
        return counts if counts.sum() + table[BYTE_IGNORE].sum() == truth.size else None

    def _count_pairs(self, guess: NDArray[Any], truth: NDArray[Any], lengths: NDArray[np.intp] | None) -> Counts:
        """Counts of ids of any width, each pair once or `lengths` times."""
        guess, truth, valid = labelled(guess, truth, self.num_classes, self.ignore_index)
        pairs = truth.astype(np.int64)  # int64 is what bincount counts without another copy
        pairs *= self.num_classes
        pairs += guess.astype(np.int64, copy=False)
        # With weights the sums are float64: exact, since a block is far below 2**53 pixels.
        counts = np.bincount(pairs, lengths, minlength=self.num_classes**2).astype(np.int64, copy=False)
        ignored = ~valid
        counts[0] -= np.count_nonzero(ignored) if lengths is None else lengths[ignored].sum()  # they became (0, 0)
        return counts.reshape(self.matrix.shape)

    def add(self, other: ConfusionMatrix) -> None:
        """Add the counts of another matrix of the same classes: another process, another part of the data."""
        ours, theirs = (self.num_classes, self.ignore_index), (other.num_classes, other.ignore_index)
        if ours != theirs:
            raise ValueError(f"(classes, ignore id) is {ours} here but {theirs} there; both must be equal to add up")
        self.matrix += other.matrix

    def areas(self) -> Areas:
        """The pixel counts that all ratios are made of."""
        intersect, label, pred = self.matrix.diagonal().copy(), self.matrix.sum(1), self.matrix.sum(0)
        return Areas(intersect, pred + label - intersect, pred, label)

    def metrics(self) -> Metrics:
        """All ratios of the counts so far."""
        hit, union, pred, label = self.areas()
        iou, acc, precision = ratio(hit, union), ratio(hit, label), ratio(hit, pred)
        return Metrics(
            iou=iou,
            acc=acc,
            dice=ratio(2 * hit, pred + label),
            fscore=ratio(2 * precision * acc, precision + acc),  # NaN, not 0, where a class has no hit at all
            precision=precision,
            recall=acc.copy(),
            pixels=label,
            miou=mean(iou),
            macc=mean(acc),
            aacc=float(ratio(hit.sum(), label.sum())),
            fwiou=float(ratio((label * np.nan_to_num(iou)).sum(), label.sum())),
            counted=defined(iou),
        )


def _busy(guess: NDArray[Any], truth: NDArray[Any]) -> bool:
    """Whether many pixels differ from the one before, by a sample: only the speed depends on the answer."""
    step = 1 + truth.size // SAMPLE
    changed = (truth[1::step] != truth[:-1:step]) | (guess[1::step] != guess[:-1:step])
    return bool(np.count_nonzero(changed) * BUSY > changed.size)


def _run_ends(guess: NDArray[Any], truth: NDArray[Any]) -> NDArray[np.intp]:
    """Where the runs of equal pairs end. Most pixels end none, so that eight at a time are looked at as one word."""
    last = truth.size - 1
    is_end = np.zeros(-(-truth.size // 8) * 8, np.bool_)
    np.not_equal(truth[1:], truth[:-1], out=is_end[:last])
    is_end[:last] |= guess[1:] != guess[:-1]
    is_end[last] = True
    words = is_end.view(np.uint64)
    filled = np.flatnonzero(words != 0)
    places = np.flatnonzero(words[filled].view(np.bool_))
    return 8 * filled[places >> 3] + (places & 7)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"
