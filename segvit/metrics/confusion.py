"""Streaming confusion matrix and what is read from it: IoU, accuracy, Dice, F-score, precision, recall.

Policy    as mmseg: pixels whose label is the ignore id are dropped with their predictions; counts are summed over the
          whole dataset before any ratio is taken. A class in neither labels nor predictions has IoU NaN and is left out
          of the mean; a class that is predicted but never labelled has IoU 0 (counted) and accuracy NaN (left out).
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

if TYPE_CHECKING:  # torch costs seconds to import and only its arrays' type is needed
    from torch import Tensor

Counts = NDArray[np.int64]
Ratios = NDArray[np.float64]

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
    `aacc` is the share of all labelled pixels that are right.
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
                **{key: _defined(values[i]) for key, values in ratios.items()},
                "pixels": int(self.pixels[i]),
                "share": int(self.pixels[i]) / total if total else 0.0,
            }
            for i, name in enumerate(classes.names)
        ]
        means = {"miou": _defined(self.miou), "macc": _defined(self.macc), "aacc": _defined(self.aacc)}
        return {**means, "counted": self.counted, "classes": rows}

    def table(self, classes: Classes) -> list[tuple[str, ...]]:
        """Rows under `COLUMNS` in percent, one a class in id order and the means last; "-" where undefined."""
        self._check(classes)
        total = max(int(self.pixels.sum()), 1)
        rows = [
            (name, *map(_percent, (self.iou[i], self.acc[i], self.precision[i], self.dice[i], self.pixels[i] / total)))
            for i, name in enumerate(classes.names)
        ]
        means = map(_percent, (self.miou, self.macc, _mean(self.precision), _mean(self.dice)))
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
        """Count the pixels of one image or batch; both are integer class ids of one shape."""
        guess, truth = _integers(pred, "pred"), _integers(label, "label")
        if guess.shape != truth.shape:
            raise ValueError(f"pred is {guess.shape} but label is {truth.shape}; resize the prediction to the label")
        if not truth.size:
            return
        # Ignored pixels become (0, 0) and are taken off again: three times faster than selecting the others.
        valid = truth != self.ignore_index
        truth, guess = truth * valid, guess * valid
        self._check(truth, "label", f" or the ignore id {self.ignore_index}")
        self._check(guess, "prediction", "")
        pairs = truth.ravel().astype(np.int64)  # (N,); int64 is what bincount counts without another copy
        pairs *= self.num_classes
        pairs += guess.ravel().astype(np.int64, copy=False)
        counts = np.bincount(pairs, minlength=self.num_classes**2)
        counts[0] -= truth.size - np.count_nonzero(valid)
        self.matrix += counts.reshape(self.matrix.shape)

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
        acc, precision = _ratio(hit, label), _ratio(hit, pred)
        iou = _ratio(hit, union)
        return Metrics(
            iou=iou,
            acc=acc,
            dice=_ratio(2 * hit, pred + label),
            fscore=_ratio(2 * precision * acc, precision + acc),  # NaN, not 0, where a class has no hit at all
            precision=precision,
            recall=acc.copy(),
            pixels=label,
            miou=_mean(iou),
            macc=_mean(acc),
            aacc=float(_ratio(hit.sum(), label.sum())),
            counted=int(np.isfinite(iou).sum()),
        )

    def _check(self, ids: NDArray[Any], what: str, allowed: str) -> None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.num_classes:
            wrong = low if low < 0 else high
            raise ValueError(f"{what} {wrong} is not a class id; allowed are 0 to {self.num_classes - 1}{allowed}")


def _integers(ids: NDArray[Any] | Tensor, what: str) -> NDArray[Any]:
    array: NDArray[Any] = ids if isinstance(ids, np.ndarray) else ids.detach().cpu().numpy()
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what} holds {array.dtype}; class ids must be integers")
    return array


def _ratio(part: Any, whole: Any) -> Ratios:
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is the NaN that the policy wants
        return np.asarray(np.true_divide(part, whole), np.float64)


def _mean(values: Ratios) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan  # numpy's nanmean would warn here


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"
