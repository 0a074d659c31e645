"""Overlap and surface distances of volumes: Dice, Jaccard, HD95, ASD with voxel spacing, as three packages take them.

Surfaces  `medpy` (TransUNet's tables, ACDC) and `monai`: voxels that an erosion with the 6-neighbourhood (in an image
          4) removes; the volume's border counts as outside. `deepmind` (surface-distance): corners between voxels with
          a mixed 2 x 2 x 2 neighbourhood, each with the area that marching cubes give it.
HD95      `medpy`: the 95th percentile of the distances of both directions together. `monai`: the larger of the two
          directions' percentiles. `deepmind`: that too, of percentiles weighted by area.
ASD       from the prediction to the label: the mean distance (for `deepmind` weighted by area). ASSD is the mean over
          both directions together.
Mixing    The same two volumes have 4.2, 6.0 and 9.0 mm HD95: never put two packages into one table.
Spacing   Synapse and ACDC tables measure in voxels: spacing="voxel". Millimetres need one number for each axis, which
          may differ; there is no default, because a forgotten spacing changes every distance.
Empty     What a class without voxels in prediction or label is worth, see `Empty`.
Checked   tests/golden/medical_metrics__surface_* (medpy 0.5.2, monai 1.6.1, surface-distance 0.1).

Shapes    D H W voxels of a volume; images (H, W) work too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segvit.contracts import UserError
from segvit.metrics.ids import labelled, same_shape
from segvit.metrics.ratios import Ratios, defined, mean, number, ratio

Package = Literal["medpy", "monai", "deepmind"]
# transunet  prediction but no label: overlap 1, distance 0; no prediction: 0 and 0, even where the label has none
# zero       overlap 0 and distance 0 as soon as one of the two is empty
# penalty    overlap 0 and distance 373.13 where one is empty, 1 and 0 where both are
# exclude    overlap 0 and no distance where one is empty; both empty: no value, and not counted in the means
Empty = Literal["exclude", "transunet", "zero", "penalty"]
PENALTY = 373.13  # in the unit of the spacing

Mask = NDArray[np.bool_]
Spacing = Sequence[float] | Literal["voxel"] | None


class Overlap(NamedTuple):
    """Ratios in 0..1; NaN where both masks are empty."""

    dice: float
    jaccard: float


class SurfaceDistances(NamedTuple):
    """Distances from each surface element to the other surface, with the weights of the elements."""

    there: Ratios  # from the prediction's elements to the label
    back: Ratios  # from the label's elements to the prediction
    there_weights: Ratios
    back_weights: Ratios
    package: Package

    def hausdorff(self, percent: float = 95.0) -> float:
        """The percentile of the distances as the package takes it; 100 is the Hausdorff distance."""
        if self.package == "medpy":
            return float(np.percentile(np.concatenate([self.there, self.back]), percent))
        if self.package == "monai":
            return float(max(np.percentile(values, percent) for values in (self.there, self.back)))
        return max(
            weighted_percentile(self.there, self.there_weights, percent),
            weighted_percentile(self.back, self.back_weights, percent),
        )

    def average(self) -> float:
        """The mean distance from the prediction to the label (ASD)."""
        return float(np.average(self.there, weights=self.there_weights))

    def average_back(self) -> float:
        """The mean distance from the label to the prediction."""
        return float(np.average(self.back, weights=self.back_weights))

    def symmetric_average(self) -> float:
        """The mean over both directions together (ASSD)."""
        distances, weights = (np.concatenate(pair) for pair in (self[:2], self[2:4]))
        return float(np.average(distances, weights=weights))


class VolumeScores(NamedTuple):
    """What one class of one volume is worth; NaN where it has no value."""

    dice: float
    jaccard: float
    hd95: float
    asd: float
    assd: float


def volume_scores(
    pred: Mask, truth: Mask, *, spacing: Spacing, package: Package = "medpy", empty: Empty = "exclude",
    penalty: float = PENALTY,
) -> VolumeScores:  # fmt: skip
    """All measures of two binary volumes of one shape. Raises UserError for what cannot be measured."""
    check_choices(package, empty)
    check_masks(pred, truth)
    step = steps(spacing, pred.ndim)
    if pred.any() and truth.any():
        surfaces = surface_distances(pred, truth, spacing=step, package=package)
        return VolumeScores(
            *overlap(pred, truth), surfaces.hausdorff(), surfaces.average(), surfaces.symmetric_average()
        )
    predicted, both = bool(pred.any()), not pred.any() and not truth.any()
    worth = {
        "transunet": (float(predicted), 0.0),
        "zero": (0.0, 0.0),
        "penalty": (1.0, 0.0) if both else (0.0, penalty),
        "exclude": (math.nan if both else 0.0, math.nan),
    }
    share, distance = worth[empty]
    return VolumeScores(share, share, distance, distance, distance)


def overlap(pred: Mask, truth: Mask) -> Overlap:
    """Dice 2 |P and G| / (|P| + |G|) and Jaccard |P and G| / |P or G| of bool volumes of one shape."""
    check_masks(pred, truth)
    both, total = int((pred & truth).sum()), int(pred.sum()) + int(truth.sum())
    return Overlap(float(ratio(2 * both, total)), float(ratio(both, total - both)))


def surface_distances(pred: Mask, truth: Mask, *, spacing: Spacing, package: Package = "medpy") -> SurfaceDistances:
    """The distances between the surfaces of two bool volumes, neither of them empty (UserError), in their spacing."""
    check_choices(package, "exclude")
    check_masks(pred, truth)
    step = steps(spacing, pred.ndim)
    for name, mask in (("pred", pred), ("truth", truth)):
        if not mask.any():
            raise UserError(f"{name} is empty and has no surface; volume_scores says what such a class is worth")
    # Beyond both masks there is no surface; one more cell all around keeps the border outside.
    box = ndimage.find_objects((pred | truth).astype(np.uint8))[0]
    pred, truth = np.pad(pred[box], 1), np.pad(truth[box], 1)
    if package == "deepmind":
        areas = element_areas(step)
        codes = [neighbour_codes(mask) for mask in (pred, truth)]
        surfaces = [(code != 0) & (code != len(areas) - 1) for code in codes]
        weights = [areas[code[surface]] for code, surface in zip(codes, surfaces, strict=True)]
    else:
        surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (pred, truth)]
        weights = [np.ones(int(surface.sum())) for surface in surfaces]
    to_pred, to_truth = (ndimage.distance_transform_edt(~surface, sampling=step) for surface in surfaces)
    return SurfaceDistances(to_truth[surfaces[0]], to_pred[surfaces[1]], weights[0], weights[1], package)


def weighted_percentile(distances: Ratios, weights: Ratios, percent: float) -> float:
    """The least distance up to which the elements hold that part of all weight."""
    order = distances.argsort(kind="stable")
    shares = weights[order].cumsum() / weights.sum()
    return float(distances[order[min(int(shares.searchsorted(percent / 100)), len(order) - 1)]])


def neighbour_codes(mask: Mask) -> NDArray[np.intp]:
    """For each corner between the cells of a volume: one bit for each of its 2^n neighbours, the first the highest."""
    corners = list(itertools.product((0, 1), repeat=mask.ndim))
    codes = np.zeros([side - 1 for side in mask.shape], np.intp)
    for corner in corners:
        part = mask[tuple(slice(start, start + side - 1) for start, side in zip(corner, mask.shape, strict=True))]
        codes = 2 * codes + part
    return codes


@cache
def element_areas(spacing: tuple[float, ...]) -> Ratios:
    """The area (in an image: length) of the surface inside a cell between 2^n neighbours, by their code (2^2^n,).

    Marching cubes with vertices in the middle of edges: the outline cuts off each connected group of the neighbours
    that are fewer, so areas of groups add up and a code has that of its complement.
    """
    sides = (2,) * len(spacing)
    count = 2 ** len(spacing)
    areas = np.zeros(2**count)
    for code in range(2**count):
        bits = np.array([code >> (count - 1 - i) & 1 for i in range(count)], bool).reshape(sides)
        groups, number_of_groups = ndimage.label(bits if bits.sum() <= count // 2 else ~bits)
        areas[code] = sum(group_area(groups == i + 1, spacing) for i in range(number_of_groups))
    return areas


def group_area(group: Mask, spacing: tuple[float, ...]) -> float:
    """What cuts off one connected group of corners of a cell, half of them at most.

    Triangles that cut a corner have the normal (x, y, z) / 8, where x, y, z are the areas of the cell's faces; the
    others lie along one face or edge. A pair of corners is cut along its edge, four of a face in its plane.
    """
    edges = [int((group.take(0, axis) & group.take(1, axis)).sum()) for axis in range(group.ndim)]
    corners = int(group.sum())
    if group.ndim == 2:  # a corner is cut across, a pair along its axis
        return math.hypot(*spacing) / 2 if corners == 1 else spacing[edges.index(1)]
    faces = [math.prod(spacing) / step for step in spacing]  # by the axis of their normal
    slant = math.hypot(*faces) / 8
    along = [math.hypot(*(face for other, face in enumerate(faces) if other != axis)) for axis in range(3)]
    if corners == 1:
        return slant
    if corners == 2:
        return along[edges.index(1)] / 2
    if corners == 3:
        return 3 * slant + faces[edges.index(0)] / 2
    if sum(edges) == 4:
        return faces[edges.index(0)]
    ends = chain_ends(group)
    return 6 * slant if ends is None else 4 * slant + sum(along[axis] for axis in ends) / 4


def chain_ends(group: Mask) -> list[int] | None:
    """The axes of the first and last edge of four corners in a chain; None where three surround the fourth."""
    corners = [tuple(corner) for corner in np.argwhere(group)]
    touching = {
        corner: [axis for axis in range(3) if group[tuple(v ^ (i == axis) for i, v in enumerate(corner))]]
        for corner in corners
    }
    ends = [axes[0] for axes in touching.values() if len(axes) == 1]
    return ends if len(ends) == 2 else None


class VolumeTable:
    """Scores of every case and class, for the mean over cases and then over classes.

    Class 0 is background and has no row. Options as in `volume_scores`; voxels with the ignore id count for nothing in
    the label, and the prediction is not looked at there.
    """

    def __init__(
        self, num_classes: int, ignore_index: int, *, package: Package = "medpy", empty: Empty = "exclude",
        penalty: float = PENALTY,
    ) -> None:  # fmt: skip
        check_choices(package, empty)
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; a background and one class at least are needed")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.package: Package = package
        self.empty: Empty = empty
        self.penalty = penalty
        self.cases: dict[str, Ratios] = {}  # name -> (num_classes - 1, 5)

    def update(self, name: str, pred: NDArray[Any], label: NDArray[Any], *, spacing: Spacing) -> None:
        """Add one case: integer class ids (D, H, W). Raises UserError for a second case of one name."""
        if name in self.cases:
            raise UserError(f"the case {name!r} came twice; give each volume its own name")
        guess, truth = same_shape(pred, label)
        guess, truth, _ = labelled(guess, truth, self.num_classes, self.ignore_index)
        self.cases[name] = np.array(
            [
                volume_scores(
                    guess == k, truth == k, spacing=spacing, package=self.package, empty=self.empty,
                    penalty=self.penalty,
                )
                for k in range(1, self.num_classes)
            ]
        )  # fmt: skip

    def classes(self) -> Ratios:
        """Means over the cases that have a value: (num_classes - 1, 5), columns as in `VolumeScores`."""
        if not self.cases:
            raise UserError("no volume was measured; give at least one case")
        scores = np.stack(list(self.cases.values()))
        return np.array([[mean(column) for column in rows.T] for rows in scores.transpose(1, 0, 2)])

    def means(self) -> VolumeScores:
        """Means over the classes that have a value."""
        return VolumeScores(*(mean(column) for column in self.classes().T))

    def to_json(self) -> dict[str, Any]:
        """All figures and how they were taken; undefined ones are None."""
        rows = self.classes()
        return {
            "package": self.package, "empty": self.empty, "cases": len(self.cases), "counted": defined(rows[:, 0]),
            **{name: number(value) for name, value in self.means()._asdict().items()},
            "classes": [
                {name: number(value) for name, value in zip(VolumeScores._fields, row, strict=True)} for row in rows
            ],
        }  # fmt: skip


def steps(spacing: Spacing, axes: int) -> tuple[float, ...]:
    """The spacing as one number for each axis. Raises UserError where it is missing or impossible."""
    if spacing is None:
        raise UserError(
            "the volume has no spacing; give the millimetres of a voxel for each axis, or spacing='voxel' to measure "
            "in voxels, as the tables of Synapse and ACDC do"
        )
    if isinstance(spacing, str):
        if spacing != "voxel":
            raise UserError(f"spacing is {spacing!r}; give a number for each axis, or 'voxel'")
        return (1.0,) * axes
    values = tuple(float(step) for step in spacing)
    if len(values) != axes or not all(math.isfinite(step) and step > 0 for step in values):
        raise UserError(f"spacing is {list(values)} for a volume of {axes} axes; give a positive number for each axis")
    return values


def check_masks(pred: Mask, truth: Mask) -> None:
    """Raises UserError unless both are bool, of one shape and of two or three axes."""
    for name, mask in (("pred", pred), ("truth", truth)):
        if mask.dtype != np.bool_ or mask.ndim not in (2, 3):
            raise UserError(f"{name} is {mask.dtype} {mask.shape}; give a bool volume (D, H, W), such as labels == 1")
    if pred.shape != truth.shape:
        raise UserError(f"pred is {pred.shape} but truth is {truth.shape}; resample one to the other's grid")


def check_choices(package: str, empty: str) -> None:
    """Raises UserError for the name of an unknown package or rule."""
    for name, value, choices in (("package", package, get_args(Package)), ("empty", empty, get_args(Empty))):
        if value not in choices:
            raise UserError(f"{name} is {value!r}; choose from {', '.join(choices)}")
