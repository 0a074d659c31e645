"""Volume measures: against medpy's and MONAI's forms in plain scipy, brute force, the empty rules and bad input."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.distance import cdist

from segvit.contracts import UserError
from segvit.metrics.volume import (
    Empty,
    Package,
    VolumeScores,
    VolumeTable,
    element_areas,
    overlap,
    surface_distances,
    volume_scores,
)

Mask = NDArray[np.bool_]
SPACING = (2.5, 1.0, 0.8)


def blobs(seed: int, size: tuple[int, ...] = (7, 12, 14)) -> tuple[Mask, Mask]:
    """Two smooth random volumes that overlap in part and touch the border."""
    rng = np.random.default_rng(seed)
    base = ndimage.gaussian_filter(rng.random(size), 2)
    maps = [base + 0.5 * ndimage.gaussian_filter(rng.random(size), 2) for _ in range(2)]
    return maps[0] > np.quantile(maps[0], 0.7), maps[1] > np.quantile(maps[1], 0.6)


def medpy_distances(result: Mask, reference: Mask, spacing: tuple[float, ...]) -> NDArray[np.float64]:
    """As medpy: distances of one volume's border voxels to the other's border."""
    footprint = ndimage.generate_binary_structure(result.ndim, 1)
    borders = [mask ^ ndimage.binary_erosion(mask, structure=footprint) for mask in (result, reference)]
    return ndimage.distance_transform_edt(~borders[1], sampling=spacing)[borders[0]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spacing", [SPACING, (1.0, 1.0, 1.0)])
def test_medpy_and_monai(seed: int, spacing: tuple[float, ...]) -> None:
    pred, truth = blobs(seed)
    there, back = medpy_distances(pred, truth, spacing), medpy_distances(truth, pred, spacing)
    medpy = surface_distances(pred, truth, spacing=spacing, package="medpy")
    assert medpy.hausdorff() == pytest.approx(np.percentile(np.hstack([there, back]), 95), abs=1e-6)
    assert medpy.hausdorff(100) == pytest.approx(max(there.max(), back.max()), abs=1e-6)
    assert medpy.average() == pytest.approx(there.mean(), abs=1e-6)
    assert medpy.average_back() == pytest.approx(back.mean(), abs=1e-6)
    assert medpy.symmetric_average() == pytest.approx(np.hstack([there, back]).mean(), abs=1e-6)
    monai = surface_distances(pred, truth, spacing=spacing, package="monai")
    directed = (np.percentile(there, 95), np.percentile(back, 95))
    assert monai.hausdorff() == pytest.approx(max(directed), abs=1e-6)
    assert monai.symmetric_average() == medpy.symmetric_average()


@pytest.mark.parametrize("size", [(5, 8, 9), (13, 17)])
def test_deepmind_by_brute_force(size: tuple[int, ...]) -> None:
    spacing = SPACING[: len(size)]
    pred, truth = blobs(3, size)
    areas = element_areas(spacing)
    points, weights = [], []
    for mask in (pred, truth):
        padded = np.pad(mask, 1)
        found = {}
        for place in np.ndindex(*(side + 1 for side in mask.shape)):
            cell = padded[tuple(slice(start, start + 2) for start in place)]
            if cell.any() and not cell.all():
                found[place] = areas[int("".join(str(int(bit)) for bit in cell.ravel()), 2)]
        points.append(np.array(list(found)) * spacing)
        weights.append(np.array(list(found.values())))
    gaps = cdist(points[0], points[1])
    there, back = gaps.min(1), gaps.min(0)
    deepmind = surface_distances(pred, truth, spacing=spacing, package="deepmind")
    assert deepmind.average() == pytest.approx((there * weights[0]).sum() / weights[0].sum())
    assert deepmind.average_back() == pytest.approx((back * weights[1]).sum() / weights[1].sum())
    assert deepmind.hausdorff(100) == pytest.approx(max(there.max(), back.max()))
    percentiles = []
    for distances, weight in ((there, weights[0]), (back, weights[1])):
        least = [value for value in sorted(set(distances)) if weight[distances <= value].sum() >= 0.95 * weight.sum()]
        percentiles.append(least[0])
    assert deepmind.hausdorff() == pytest.approx(max(percentiles))


def corner_code(*corners: tuple[int, int, int]) -> int:
    return sum(1 << (7 - (4 * z + 2 * y + x)) for z, y, x in corners)


def test_areas_of_surface_elements() -> None:
    """Figures of the marching-cubes table of surface-distance 0.1, for cubes and for a spacing of 2.5, 1.0, 0.8."""
    unit, real = element_areas((1.0, 1.0, 1.0)), element_areas(SPACING)
    cases = {
        corner_code((0, 0, 0)): 0.216506,
        corner_code((0, 0, 0), (1, 0, 0)): 0.707107,
        corner_code((0, 0, 0), (1, 1, 0)): 0.433013,
        corner_code((0, 0, 0), (1, 0, 0), (0, 1, 0)): 1.149519,
        corner_code((0, 0, 0), (1, 0, 0), (1, 1, 1)): 0.923613,
        corner_code((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)): 1.0,
        corner_code((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)): 1.299038,
        corner_code((0, 0, 1), (0, 0, 0), (1, 0, 0), (1, 1, 0)): 1.573132,
        corner_code((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)): 0.866025,
    }
    for code, area in cases.items():
        assert unit[code] == pytest.approx(area, abs=1e-6)
        assert unit[255 - code] == unit[code]
    assert real[corner_code((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1))] == pytest.approx(1.0 * 0.8)
    assert real[corner_code((0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1))] == pytest.approx(2.5 * 0.8)
    assert (unit[0], unit[255]) == (0, 0)
    np.testing.assert_allclose(element_areas((2.0, 3.0))[[1, 3, 5, 6, 7]], [13**0.5 / 2, 3, 2, 13**0.5, 13**0.5 / 2])


def test_the_packages_differ() -> None:
    pred, truth = blobs(4)
    values = {name: surface_distances(pred, truth, spacing=SPACING, package=name).hausdorff() for name in PACKAGES}
    assert len(set(values.values())) == 3


PACKAGES: tuple[Any, ...] = get_args(Package)


@pytest.mark.parametrize("package", PACKAGES)
def test_equal_volumes_are_at_distance_0_and_spacing_scales(package: Any) -> None:
    pred, truth = blobs(5)
    same = volume_scores(pred, pred, spacing=SPACING, package=package)
    assert same == VolumeScores(1.0, 1.0, 0.0, 0.0, 0.0)
    one, two = (volume_scores(pred, truth, spacing=(s, s, s), package=package) for s in (1.0, 2.0))
    assert two[2:] == pytest.approx([2 * value for value in one[2:]])
    assert volume_scores(pred, truth, spacing="voxel", package=package) == one


def test_overlap() -> None:
    pred, truth = blobs(6)
    both = (pred & truth).sum()
    assert overlap(pred, truth).dice == pytest.approx(2 * both / (pred.sum() + truth.sum()))
    assert overlap(pred, truth).jaccard == pytest.approx(both / (pred | truth).sum())


NAN = math.nan
RULES: dict[str, list[tuple[float, float]]] = {  # (overlap, distance): no label; no prediction; neither
    "transunet": [(1, 0), (0, 0), (0, 0)],
    "zero": [(0, 0), (0, 0), (0, 0)],
    "penalty": [(0, 373.13), (0, 373.13), (1, 0)],
    "exclude": [(0, NAN), (0, NAN), (NAN, NAN)],
}


@pytest.mark.parametrize("empty", get_args(Empty))
def test_rules_for_empty_masks(empty: Any) -> None:
    some, none = blobs(0)[0], np.zeros((7, 12, 14), bool)
    for (pred, truth), (share, distance) in zip(
        [(some, none), (none, some), (none, none)], RULES[empty], strict=True
    ):  # fmt: skip
        found = volume_scores(pred, truth, spacing=SPACING, empty=empty)
        np.testing.assert_equal(tuple(found), (share, share, distance, distance, distance))


def test_table_of_cases_and_classes() -> None:
    rng = np.random.default_rng(0)
    table = VolumeTable(3, 255, package="monai")
    wanted = []
    for name in ("a", "b"):
        pred, label = (rng.integers(0, 2, (4, 6, 6)).astype(np.uint8) for _ in range(2))
        pred[0, 0, 0] = 1
        label[0, 0, :2] = 1, 255
        table.update(name, pred, label, spacing=SPACING)
        known = label != 255
        wanted.append(volume_scores((pred == 1) & known, label == 1, spacing=SPACING, package="monai"))
    np.testing.assert_allclose(table.classes()[0], np.mean(wanted, axis=0))
    assert np.isnan(table.classes()[1]).all()  # class 2 is nowhere
    assert table.means().hd95 == pytest.approx(table.classes()[0, 2])
    report = table.to_json()
    assert (report["package"], report["cases"], report["counted"]) == ("monai", 2, 1)
    assert report["classes"][1]["dice"] is None
    with pytest.raises(UserError, match="'a' came twice"):
        table.update("a", pred, label, spacing=SPACING)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spacing": None}, "the volume has no spacing; give the millimetres"),
        ({"spacing": (1.0, 2.0)}, r"spacing is \[1.0, 2.0\] for a volume of 3 axes"),
        ({"spacing": (1.0, 0.0, 2.0)}, "give a positive number for each axis"),
        ({"spacing": (1.0, NAN, 2.0)}, "give a positive number for each axis"),
        ({"spacing": "mm"}, "spacing is 'mm'; give a number for each axis, or 'voxel'"),
        ({"package": "itk"}, "package is 'itk'; choose from medpy, monai, deepmind"),
        ({"empty": "skip"}, "empty is 'skip'; choose from exclude, transunet, zero, penalty"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    pred, truth = blobs(0)
    with pytest.raises(UserError, match=message):
        volume_scores(pred, truth, **({"spacing": "voxel"} | options))
    if "spacing" in options:  # an empty volume does not hide it
        with pytest.raises(UserError, match=message):
            volume_scores(pred & False, truth, **options)


def test_volumes_that_are_refused() -> None:
    pred, truth = blobs(0)
    with pytest.raises(UserError, match=r"pred is float64 \(7, 12, 14\); give a bool volume"):
        volume_scores(np.where(pred, NAN, 0.0), truth, spacing="voxel")
    with pytest.raises(UserError, match="resample one to the other's grid"):
        volume_scores(pred[1:], truth, spacing="voxel")
    with pytest.raises(UserError, match="truth is empty and has no surface"):
        surface_distances(pred, truth & False, spacing="voxel")
    with pytest.raises(UserError, match="no volume was measured"):
        VolumeTable(3, 255).classes()
    with pytest.raises(ValueError, match="num_classes is 1"):
        VolumeTable(1, 255)
    with pytest.raises(ValueError, match="class ids must be integers"):
        VolumeTable(3, 255).update("a", np.full((2, 3, 3), NAN), np.zeros((2, 3, 3), int), spacing="voxel")
