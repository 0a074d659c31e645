"""Polyp measures: against pysodmetrics where it is installed, against their definitions, and the policies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from segvit.contracts import UserError
from segvit.metrics.polyp import PolypMeasures, image_measures, unit_range

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def pair(seed: int, size: tuple[int, int] = (23, 31)) -> Pair:
    """A smooth map and a label that it half knows."""
    rng = np.random.default_rng(seed)
    p = unit_range(ndimage.gaussian_filter(rng.random(size), 2))
    inside = p + rng.normal(0, 0.15, size) > 0.6
    inside[size[0] // 2, size[1] // 2] = True
    return (p * 200 + 20).astype(np.uint8), np.where(inside, 255, 0).astype(np.uint8)


# Means over six images by pysodmetrics 1.6.2, which cannot stand beside the numpy that the tests run with.
FIGURES = {
    "mdice": 0.463446435, "miou": 0.335570739, "weighted_f": 0.514570559, "s": 0.549213936, "mean_e": 0.408334804,
    "max_e": 0.791843029, "adaptive_e": 0.268732519, "mae": 0.38076087, "max_dice": 0.69435851,
    "max_iou": 0.541374939,
}  # fmt: skip


def test_figures_of_pysodmetrics() -> None:
    ours = PolypMeasures()
    for seed in range(6):
        ours.update(*pair(seed))
    found = ours.metrics().to_json()
    assert {name: found[name] for name in FIGURES} == pytest.approx(FIGURES, abs=1e-6)


def test_like_pysodmetrics() -> None:
    """The same live, where the package is installed."""
    sod = pytest.importorskip("py_sod_metrics")
    dice, iou = (kind(with_dynamic=True, with_adaptive=False) for kind in (sod.DICEHandler, sod.IOUHandler))
    judges = [sod.MAE(), sod.Smeasure(), sod.WeightedFmeasure(), sod.Emeasure()]
    both = sod.FmeasureV2({"dice": dice, "iou": iou})
    ours = PolypMeasures()
    for seed in range(6):
        pred, label = pair(seed)
        for judge in [*judges, both]:
            judge.step(pred, label)
        ours.update(pred, label)
    mae, s, weighted, e = (judge.get_results() for judge in judges)
    curves, found = both.get_results(), ours.metrics()
    theirs = [mae["mae"], s["sm"], weighted["wfm"], e["em"]["curve"].mean(), e["em"]["curve"].max(), e["em"]["adp"]]
    mine = [found.mae, found.s, found.weighted_f, found.mean_e, found.max_e, found.adaptive_e]
    np.testing.assert_allclose(mine, theirs, atol=1e-6)
    np.testing.assert_allclose(found.mdice, curves["dice"]["dynamic"].mean(), atol=1e-6)
    np.testing.assert_allclose(found.miou, curves["iou"]["dynamic"].mean(), atol=1e-6)


def test_curves_by_their_definitions() -> None:
    pred, label = pair(0)
    found, inside = image_measures(pred, label), label > 128
    levels = (unit_range(pred / 255) * 255).astype(np.uint8)
    for threshold in (255, 200, 128, 1, 0):
        mask, place = levels >= threshold, 255 - threshold
        both, either = (mask & inside).sum(), (mask | inside).sum()
        assert found.iou[place] == pytest.approx(both / either)
        assert found.dice[place] == pytest.approx(2 * both / (mask.sum() + inside.sum()))
        a, b = mask - mask.mean(), inside - inside.mean()
        alignment = (2 * a * b / (a**2 + b**2 + 2.3e-16) + 1) ** 2 / 4
        assert found.e[place] == pytest.approx(alignment.sum() / (mask.size - 1))
    assert found.mae == pytest.approx(np.abs(unit_range(pred / 255) - inside).mean())


def test_weighted_f_by_its_definition() -> None:
    pred, label = pair(1, (9, 11))
    p, inside = unit_range(pred / 255), label > 128
    places = np.argwhere(inside)
    error, carried, weight = np.abs(p - inside), np.zeros(p.shape), np.ones(p.shape)
    distances = ndimage.distance_transform_edt(~inside, return_indices=True)[1]
    for y, x in np.ndindex(p.shape):
        carried[y, x] = error[distances[0, y, x], distances[1, y, x]]
        if not inside[y, x]:
            near = min(math.dist((y, x), place) for place in places)
            weight[y, x] = 2 - math.exp(math.log(0.5) / 5 * near)
    grid = np.mgrid[-3:4, -3:4]
    kernel = np.exp(-(grid**2).sum(0) / 50)
    smooth = ndimage.convolve(carried, kernel / kernel.sum(), mode="constant")
    error = weight * np.where(inside, np.minimum(error, smooth), error)
    recall = 1 - error[inside].mean()
    hits = inside.sum() - error[inside].sum()
    precision = hits / (hits + error[~inside].sum())
    assert image_measures(pred, label).weighted_f == pytest.approx(2 * recall * precision / (recall + precision))


def test_means_are_over_images_and_then_over_thresholds() -> None:
    pairs = [pair(seed) for seed in range(3)]
    whole, first, rest = PolypMeasures(), PolypMeasures(), PolypMeasures()
    for number, (pred, label) in enumerate(pairs):
        whole.update(pred, label)
        (first if number == 0 else rest).update(pred, label)
    first.add(rest)
    assert first.metrics().to_json() == pytest.approx(whole.metrics().to_json(), rel=1e-12)
    single = [image_measures(*one) for one in pairs]
    assert whole.metrics().mdice == pytest.approx(np.mean([found.dice.mean() for found in single]))
    assert whole.metrics().max_dice == pytest.approx(np.mean([found.dice for found in single], axis=0).max())
    assert whole.metrics().to_json()["images"] == 3


def test_a_perfect_map() -> None:
    label = pair(2)[1]
    found = image_measures(label, label)
    assert found.dice[:-1].tolist() == [1.0] * 255  # at 0 everything is foreground
    assert (found.s, found.weighted_f, found.mae) == (pytest.approx(1.0), pytest.approx(1.0), 0.0)


def test_empty_and_full_labels() -> None:
    pred = pair(3)[0]
    p = unit_range(pred / 255)
    empty, full = (image_measures(pred, np.full_like(pred, value)) for value in (0, 255))
    assert not empty.dice.any()
    assert (empty.weighted_f, empty.s) == (0.0, pytest.approx(1 - p.mean()))
    assert (empty.e[-1], full.e[-1]) == (0.0, pytest.approx(pred.size / (pred.size - 1)))
    assert full.s == pytest.approx(p.mean())
    nothing = image_measures(np.zeros_like(pred), np.zeros_like(pred))
    assert (nothing.dice_half, nothing.s, nothing.mae) == (0.0, 1.0, 0.0)


def test_a_label_in_the_last_corner() -> None:
    """Three of the four regions are then empty, of which the reference's mean is NaN."""
    pred, label = np.zeros((6, 7), np.uint8), np.zeros((6, 7), np.uint8)
    label[-1, -1] = pred[-1, -1] = 255
    assert image_measures(pred, label).s == pytest.approx(1.0)


def test_from_labels_and_how_sure_they_are() -> None:
    rng = np.random.default_rng(0)
    p = np.concatenate([[0.0, 1.0], rng.random(58)]).reshape(6, 10)
    mask = (rng.random((6, 10)) < 0.5).astype(np.uint8)
    mask[2, 3:5] = 255
    labels, sure = (p > 0.5).astype(np.uint8), np.maximum(p, 1 - p).astype(np.float32)
    ours, same = PolypMeasures(), PolypMeasures()
    ours.update_from_labels(labels, sure, mask)
    known = np.where(mask == 255, 0, p)
    same.update(np.rint(255 * known).astype(np.uint8), np.where(mask == 1, 255, 0).astype(np.uint8))
    assert ours.metrics() == same.metrics()


def test_what_cannot_be_measured() -> None:
    pred, label = pair(0)
    with pytest.raises(UserError, match=r"pred is float64 \(23, 31\); give a grey image"):
        image_measures(pred / 255, label)
    with pytest.raises(UserError, match="resize the prediction to the label"):
        image_measures(pred[1:], label)
    with pytest.raises(UserError, match="no image was measured"):
        PolypMeasures().metrics()
    with pytest.raises(ValueError, match="but"):
        PolypMeasures().add(PolypMeasures(beta=0.3))
