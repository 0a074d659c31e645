"""The measures of polyp and skin-lesion papers, for grey prediction maps of one foreground: Dice, IoU, S, E, F, MAE.

Sources   thresholded Dice and IoU as the PraNet evaluation takes them (Fan et al., MICCAI 2020); S-measure: Fan et al.,
          "Structure-measure" (ICCV 2017); E-measure: Fan et al., "Enhanced-alignment Measure" (IJCAI 2018); weighted F:
          Margolin et al., "How to Evaluate Foreground Maps?" (CVPR 2014).
Input     8-bit maps at the image's own size, stretched to the whole of 0..1 unless constant; the label is foreground
          above 128. Curves hold one value for each threshold from 255 down to 0, at which everything is foreground.
Means     `mdice` is not Dice at one half: it is the mean over the images of each threshold's Dice, then over the 256
          thresholds. `miou` is the same of the foreground's IoU and no mean over classes.
Policy    Without a common pixel Dice and IoU are 0, also when both masks are empty. An empty label has weighted F 0,
          S 1 - mean(p) and E the share of pixels predicted as background; a full one S mean(p) and E the reverse.
Checked   tests/golden/medical_metrics__polyp_* and, where it is installed, pysodmetrics itself. That package needs
          OpenCV and an older numpy, so its measures are written out here.

Shapes    H W pixels of one image.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segvit.contracts import UserError
from segvit.metrics.ratios import Ratios

EPS = float(np.spacing(1.0))
LEVELS = 256

Mask = NDArray[np.bool_]


class ImageMeasures(NamedTuple):
    """The measures of one image; curves (256,) run from threshold 255 down to 0."""

    dice: Ratios
    iou: Ratios
    e: Ratios
    dice_half: float  # at p > 0.5
    iou_half: float
    e_adaptive: float  # at p >= min(2 mean(p), 1)
    s: float
    weighted_f: float
    mae: float


@dataclass(frozen=True, kw_only=True)
class PolypMetrics:
    """Means over the images; maxima and means over thresholds are taken of the mean curve."""

    images: int
    mdice: float
    miou: float
    weighted_f: float
    s: float
    mean_e: float
    max_e: float
    adaptive_e: float
    mae: float
    max_dice: float
    max_iou: float
    dice_half: float
    iou_half: float

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        return asdict(self)


class PolypMeasures:
    """Sums over images, one small array whatever their number; several processes' sums can be added."""

    def __init__(self, *, alpha: float = 0.5, beta: float = 1.0) -> None:
        self.alpha, self.beta, self.images = alpha, beta, 0
        self.curves = np.zeros((3, LEVELS))  # dice, iou, e
        self.values = np.zeros(len(ImageMeasures._fields) - 3)

    def update(self, pred: NDArray[np.uint8], label: NDArray[np.uint8]) -> None:
        """Add one image: an 8-bit map and its label (H, W)."""
        found = image_measures(pred, label, alpha=self.alpha, beta=self.beta)
        self.curves += np.stack(found[:3])
        self.values += np.asarray(found[3:])
        self.images += 1

    def update_from_labels(self, labels: NDArray[Any], sure: NDArray[np.float32], mask: NDArray[Any]) -> None:
        """Add one image from class ids 0 and 1, how sure each is in 0..1, and the label's ids, all (H, W).

        The map is the probability of class 1, stretched and rounded to 8 bits as the papers save theirs. What the label
        ignores has probability 0 and is background.
        """
        p = np.where(labels == 1, sure, 1 - sure)
        p = unit_range(np.where(mask <= 1, p, 0).astype(np.float64))
        self.update(np.rint(255 * p).astype(np.uint8), np.where(mask == 1, 255, 0).astype(np.uint8))

    def add(self, other: PolypMeasures) -> None:
        """Add the sums of other images."""
        if (self.alpha, self.beta) != (other.alpha, other.beta):
            raise ValueError(f"(alpha, beta) is {self.alpha, self.beta} here but {other.alpha, other.beta} there")
        self.curves += other.curves
        self.values += other.values
        self.images += other.images

    def metrics(self) -> PolypMetrics:
        """The means so far. Raises UserError where there are no images."""
        if not self.images:
            raise UserError("no image was measured; add some to the split, or name another")
        dice, iou, e = self.curves / self.images
        half, iou_half, adaptive, s, weighted, mae = (float(value) for value in self.values / self.images)
        return PolypMetrics(
            images=self.images, mdice=float(dice.mean()), miou=float(iou.mean()), weighted_f=weighted, s=s,
            mean_e=float(e.mean()), max_e=float(e.max()), adaptive_e=adaptive, mae=mae, max_dice=float(dice.max()),
            max_iou=float(iou.max()), dice_half=half, iou_half=iou_half,
        )  # fmt: skip


def image_measures(
    pred: NDArray[np.uint8], label: NDArray[np.uint8], *, alpha: float = 0.5, beta: float = 1.0
) -> ImageMeasures:
    """All measures of one 8-bit map and its label (H, W).

    `alpha` is the share of the object part in the S-measure, `beta` the weight of precision against recall in F.
    Raises UserError for other types or shapes.
    """
    p, inside = stretched(pred, label)
    counts = threshold_counts(p, inside)
    half, adaptive = p > 0.5, p >= min(2 * p.mean(), 1.0)
    return ImageMeasures(
        dice=dice(*counts), iou=iou(*counts), e=e_measure(*counts),
        dice_half=float(dice(*binary_counts(half, inside))), iou_half=float(iou(*binary_counts(half, inside))),
        e_adaptive=float(e_measure(*binary_counts(adaptive, inside))), s=s_measure(p, inside, alpha=alpha),
        weighted_f=weighted_f(p, inside, beta=beta), mae=float(np.abs(p - inside).mean()),
    )  # fmt: skip


def stretched(pred: NDArray[np.uint8], label: NDArray[np.uint8]) -> tuple[Ratios, Mask]:
    """The map with its least value at 0 and its largest at 1 (a constant one as it is), and where the label is."""
    for name, array in (("pred", pred), ("label", label)):
        if array.dtype != np.uint8 or array.ndim != 2 or not array.size:
            raise UserError(f"{name} is {array.dtype} {array.shape}; give a grey image (H, W) of 8 bits, 0 to 255")
    if pred.shape != label.shape:
        raise UserError(f"pred is {pred.shape} but label is {label.shape}; resize the prediction to the label")
    return unit_range(pred / 255), label > 128


def unit_range(p: Ratios) -> Ratios:
    """Values stretched so that the least is 0 and the largest 1; constant ones as they are."""
    low, high = p.min(), p.max()
    return p if low == high else (p - low) / (high - low)


class Counts(NamedTuple):
    """Pixels predicted as foreground inside and outside of the label, at each threshold, and the label's own."""

    hits: NDArray[Any]
    false: NDArray[Any]
    inside: int
    outside: int


def threshold_counts(p: Ratios, inside: Mask) -> Counts:
    """Counts at the thresholds 255 down to 0: (256,) each."""
    levels = (p * 255).astype(np.uint8)  # cuts off, as the reference does
    hits, false = (np.bincount(levels[part], minlength=LEVELS)[::-1].cumsum() for part in (inside, ~inside))
    return Counts(hits, false, int(hits[-1]), int(false[-1]))


def binary_counts(mask: Mask, inside: Mask) -> Counts:
    """Counts of one binary prediction."""
    held = int(inside.sum())
    return Counts(np.asarray((mask & inside).sum()), np.asarray((mask & ~inside).sum()), held, inside.size - held)


def dice(hits: NDArray[Any], false: NDArray[Any], inside: int, outside: int) -> Ratios:
    """2 |P and G| / (|P| + |G|), 0 without a common pixel."""
    return 2 * hits / np.maximum(hits + false + inside, 1)


def iou(hits: NDArray[Any], false: NDArray[Any], inside: int, outside: int) -> Ratios:
    """|P and G| / |P or G|, 0 without a common pixel."""
    return hits / np.maximum(false + inside, 1)


def e_measure(hits: NDArray[Any], false: NDArray[Any], inside: int, outside: int) -> Ratios:
    """Enhanced alignment of binary predictions, over N - 1: a perfect one of a tiny image is a little above 1.

    A pixel's alignment depends on prediction and label alone, so the four kinds of pixels are all there is to sum.
    """
    size = inside + outside
    predicted = hits + false
    if inside == 0 or outside == 0:
        right = size - predicted if inside == 0 else predicted
        return right / (size - 1 + EPS)
    a, b = predicted / size, inside / size
    total = np.zeros(np.shape(hits))
    for pixels, x, y in (
        (hits, 1 - a, 1 - b), (false, 1 - a, -b), (inside - hits, -a, 1 - b), (outside - false, -a, -b)
    ):  # fmt: skip
        alignment = 2 * x * y / (x**2 + y**2 + EPS)
        total += pixels * (alignment + 1) ** 2 / 4
    return total / (size - 1 + EPS)


def s_measure(p: Ratios, inside: Mask, *, alpha: float = 0.5) -> float:
    """alpha times the likeness of the objects plus 1 - alpha times that of four regions, not below 0."""
    share = inside.mean()
    if share in (0, 1):
        return float(p.mean() if share else 1 - p.mean())
    objects = share * _object(p[inside]) + (1 - share) * _object(1 - p[~inside])
    return float(max(0.0, alpha * objects + (1 - alpha) * _regions(p, inside)))


def _object(values: Ratios) -> float:
    mean, spread = values.mean(), values.std(ddof=1) if values.size > 1 else 0.0
    return float(2 * mean / (mean**2 + 1 + spread + EPS))


def _regions(p: Ratios, inside: Mask) -> float:
    """Likeness of the four quadrants around the label's centroid, by area; its row and column are upper and left."""
    rows, columns = np.nonzero(inside)
    row, column = int(rows.mean().round()) + 1, int(columns.mean().round()) + 1
    total = 0.0
    for part in (np.s_[:row, :column], np.s_[:row, column:], np.s_[row:, :column], np.s_[row:, column:]):
        if inside[part].size:
            total += _likeness(p[part], inside[part]) * inside[part].size / inside.size
    return total


def _likeness(p: Ratios, inside: Mask) -> float:
    """4 mx my sxy / ((mx^2 + my^2) (sx^2 + sy^2)); 1 where both are 0."""
    x, y, count = p.mean(), inside.mean(), p.size - 1 + EPS
    dx, dy = p - x, inside - y
    above = 4 * x * y * (dx * dy).sum() / count
    below = (x**2 + y**2) * ((dx**2).sum() + (dy**2).sum()) / count
    if above == 0:
        return float(below == 0)
    return float(above / (below + EPS))


def weighted_f(p: Ratios, inside: Mask, *, beta: float = 1.0) -> float:
    """F of errors that are smoothed inside the label and weigh more the farther outside they are."""
    if not inside.any():
        return 0.0
    distance, nearest = ndimage.distance_transform_edt(~inside, return_indices=True)
    error = np.abs(p - inside)
    carried = error[tuple(nearest)]  # outside, the error of the nearest pixel of the label
    line = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 5**2))
    smooth = carried
    for axis in (0, 1):  # the 7 x 7 Gaussian of deviation 5, zeros around the image
        smooth = ndimage.convolve1d(smooth, line / line.sum(), axis=axis, mode="constant")
    error = np.where(inside, np.minimum(error, smooth), error * (2 - np.exp(np.log(0.5) / 5 * distance)))
    held = inside.sum()
    hits, false = held - error[inside].sum(), error[~inside].sum()
    recall, precision = 1 - error[inside].mean(), hits / (hits + false + EPS)
    return float((1 + beta) * recall * precision / (recall + beta * precision + EPS))
