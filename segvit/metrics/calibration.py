"""Calibration, streaming: whether a model that is 90 % sure is right in 90 % of the pixels.

Source    Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), equations 2, 3 and 5: bins of equal width,
          (low, high]; the expected calibration error weighs each bin's |accuracy - confidence| by its pixels, the
          maximum takes the worst bin.
Exact     Confidences are rounded to 65,535 steps and counted as integers, so that any split of the data gives the same.
          65,535 is a multiple of 15: the edges of 15 bins (also of 3, 5, 17, 51, 85) lie on steps.
Policy    Pixels whose label is the ignore id are dropped with their predictions. Empty bins have no confidence and no
          accuracy and add to neither error. With no labelled pixel at all every figure is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segvit.metrics.ids import BLOCK, same_shape
from segvit.metrics.ratios import Counts, number, ratio

if TYPE_CHECKING:  # torch costs seconds to import and only its arrays' type is needed
    from torch import Tensor

STEPS = 65535  # between confidence 0 and 1
LEVELS = STEPS + 1
IGNORED = 2  # the row below wrong and right: dropped, which is faster than selecting the others


class Bin(NamedTuple):
    """The pixels whose confidence lies in (low, high]; the first bin holds 0, too."""

    low: float
    high: float
    pixels: int
    confidence: float  # means over the pixels, NaN for none
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class CalibrationMetrics:
    """Fractions in 0..1, and the reliability table."""

    ece: float  # expected calibration error
    mce: float  # maximum calibration error
    confidence: float  # means over all labelled pixels
    accuracy: float
    pixels: int
    bins: tuple[Bin, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it; undefined values are None, which JSON can hold."""
        rows = [
            {
                "low": one.low, "high": one.high, "pixels": one.pixels,
                "share": one.pixels / self.pixels if self.pixels else 0.0,
                "confidence": number(one.confidence), "accuracy": number(one.accuracy),
            }
            for one in self.bins
        ]  # fmt: skip
        return {
            "ece": number(self.ece), "mce": number(self.mce), "confidence": number(self.confidence),
            "accuracy": number(self.accuracy), "pixels": self.pixels, "bins": rows,
        }  # fmt: skip


class CalibrationCounts:
    """How many pixels had which confidence and were wrong or right, in integers: `counts` is (2, 65536)."""

    def __init__(self, ignore_index: int, *, bins: int = 15) -> None:
        if not 1 <= bins <= STEPS:
            raise ValueError(f"bins is {bins}; it must be 1 to {STEPS}")
        self.ignore_index, self.bins = ignore_index, bins
        self.counts: Counts = np.zeros((2, LEVELS), np.int64)  # rows: wrong, right; columns: confidence in steps

    def update(
        self, confidence: NDArray[Any] | Tensor, pred: NDArray[Any] | Tensor, label: NDArray[Any] | Tensor
    ) -> None:
        """Count the pixels of one image or batch.

        `confidence` holds floating point numbers in 0..1 of any precision, `pred` and `label` integer class ids; all
        have one shape. ValueError for anything else (NaN, too); then nothing is counted.
        """
        guess, truth = same_shape(pred, label)
        sure = confidence if isinstance(confidence, np.ndarray) else confidence.detach().float().cpu().numpy()
        if sure.dtype.kind != "f":
            raise ValueError(f"confidence holds {sure.dtype}; give floating point numbers in 0..1")
        if sure.shape != truth.shape:
            raise ValueError(f"confidence is {sure.shape} but label is {truth.shape}; give one number a pixel")
        if not truth.size:
            return
        low, high = sure.min(), sure.max()
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise ValueError(f"confidence spans {low} to {high}; it must lie in 0..1")
        sure, guess, truth = (values.reshape(-1) for values in (sure, guess, truth))
        for start in range(0, truth.size, BLOCK):
            part = slice(start, start + BLOCK)
            codes = np.multiply(sure[part], STEPS, dtype=np.float32)  # holds integers below 2**24 exactly
            np.rint(codes, out=codes)
            row = (guess[part] == truth[part]).astype(np.float32)
            row[truth[part] == self.ignore_index] = IGNORED
            codes += row * LEVELS
            table = np.bincount(codes.astype(np.int64), minlength=(IGNORED + 1) * LEVELS).reshape(-1, LEVELS)
            self.counts += table[:IGNORED]

    def add(self, other: CalibrationCounts) -> None:
        """Add the counts of other pixels: another process, another part of the data."""
        ours, theirs = (self.ignore_index, self.bins), (other.ignore_index, other.bins)
        if ours != theirs:
            raise ValueError(f"(ignore id, bins) is {ours} here but {theirs} there; both must be equal to add up")
        self.counts += other.counts

    def metrics(self) -> CalibrationMetrics:
        """The errors and the reliability table of the counts so far."""
        levels = np.arange(LEVELS)
        # The level q / STEPS lies in bin b if b / bins < q / STEPS <= (b + 1) / bins.
        first = np.searchsorted((np.maximum(levels, 1) * self.bins - 1) // STEPS, np.arange(self.bins))
        right = np.add.reduceat(self.counts[1], first)
        pixels = np.add.reduceat(self.counts.sum(0), first)
        sure = np.add.reduceat(self.counts.sum(0) * levels, first)  # steps, summed
        total = int(pixels.sum())
        confidence, accuracy = ratio(sure, pixels * STEPS), ratio(right, pixels)
        gaps = np.abs(accuracy - confidence)[pixels > 0]
        table = zip(pixels.tolist(), confidence.tolist(), accuracy.tolist(), strict=True)
        return CalibrationMetrics(
            ece=float(ratio((gaps * pixels[pixels > 0]).sum(), total)),
            mce=float(gaps.max()) if total else float("nan"),
            confidence=float(ratio(sure.sum(), total * STEPS)),
            accuracy=float(ratio(right.sum(), total)),
            pixels=total,
            bins=tuple(Bin(i / self.bins, (i + 1) / self.bins, *row) for i, row in enumerate(table)),
        )
