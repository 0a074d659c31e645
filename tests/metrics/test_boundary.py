"""Boundary IoU and boundary F against their definitions: pixel by pixel, and by scipy's erosions and distances."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from segvit.metrics.boundary import BoundaryCounts, Pixels

IGNORE = 255


def counts_of(pred, label, *, classes=3, reach=1, near=1, ignore=IGNORE):
    """`reach` and `near` are the band's width and the tolerance in pixels."""
    diagonal = math.hypot(*label.shape)
    counts = BoundaryCounts(classes, ignore, width=reach / diagonal, tolerance=near / diagonal)
    counts.update(pred, label)
    return counts


def maps(seed, *, classes=3, size=(9, 7), ignored=0.15, grain=1):
    """Random maps of squares of `grain` pixels; predictions are the labels, moved and partly wrong."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, size).astype(np.uint8)
    pred = np.where(rng.random(size) < 0.7, label, rng.integers(0, classes, size)).astype(np.uint8)
    label, pred = (ids.repeat(grain, 0).repeat(grain, 1) for ids in (label, pred))
    label[rng.random(label.shape) < ignored] = IGNORE
    return np.roll(pred, grain // 3, (0, 1)), label


def plain(pred, label, classes, reach, near):
    """Every class, every pixel, every neighbour."""
    height, width = label.shape
    valid = label != IGNORE
    rows = Pixels(*np.zeros((7, classes), np.int64))

    def window(ids, y, x, far, outside):
        for row in range(y - far, y + far + 1):
            for column in range(x - far, x + far + 1):
                if not (0 <= row < height and 0 <= column < width):
                    yield outside
                elif valid[row, column]:
                    yield ids[row, column]

    inside = [(y, x) for y in range(height) for x in range(width) if valid[y, x]]
    for k in range(classes):
        bands, contours = [], []
        for ids in (pred, label):
            mine = [(y, x) for y, x in inside if ids[y, x] == k]
            bands.append({(y, x) for y, x in mine if any(other != k for other in window(ids, y, x, reach, None))})
            contours.append({(y, x) for y, x in mine if any(other != k for other in window(ids, y, x, 1, k))})
        rows.hit[k], rows.pred[k], rows.label[k] = len(bands[0] & bands[1]), len(bands[0]), len(bands[1])
        met = [
            sum(any(math.dist(point, other) <= near for other in others) for point in points)
            for points, others in (contours, contours[::-1])
        ]
        rows.pred_contour[k], rows.label_contour[k] = map(len, contours)
        rows.pred_met[k], rows.label_met[k] = met
    return rows


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 8), st.floats(0, 1), st.integers(1, 4),
    st.integers(1, 4), st.integers(1, 3),
)  # fmt: skip
def test_every_count_and_ratio_equals_its_plain_definition(seed, height, width, ignored, reach, near, grain):
    pred, label = maps(seed, size=(height, width), ignored=ignored, grain=grain)
    counts, expected = counts_of(pred, label, reach=reach, near=near), plain(pred, label, 3, reach, near)
    for name, ours, theirs in zip(Pixels._fields, counts.pixels(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    result = counts.metrics()
    for k in range(3):
        one = Pixels(*(int(row[k]) for row in expected))
        union = one.pred + one.label - one.hit
        assert result.iou[k] == pytest.approx(one.hit / union if union else np.nan, nan_ok=True)
        precision = one.pred_met / one.pred_contour if one.pred_contour else 0.0
        recall = one.label_met / one.label_contour if one.label_contour else 0.0
        f = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        nowhere = not one.pred_contour and not one.label_contour
        assert result.f[k] == pytest.approx(np.nan if nowhere else f, nan_ok=True)


@pytest.mark.parametrize(("reach", "near"), [(1, 1), (4, 3), (9, 6)])
def test_equals_erosions_and_distances(reach, near):
    """Cheng et al. erode each mask, the image's edge being outside; the contours' distances are Euclidean."""
    pred, label = maps(0, classes=20, size=(8, 10), ignored=0, grain=8)
    counts = counts_of(pred, label, classes=20, reach=reach, near=near)
    square, of = np.ones((3, 3), bool), counts.pixels()
    for k in range(20):
        masks = pred == k, label == k
        bands = [mask & ~ndimage.binary_erosion(mask, square, iterations=reach) for mask in masks]
        edges = [mask & ~ndimage.binary_erosion(mask, square, border_value=1) for mask in masks]
        far = [ndimage.distance_transform_edt(~edge) if edge.any() else np.full(edge.shape, np.inf) for edge in edges]
        assert (of.hit[k], of.pred[k], of.label[k]) == ((bands[0] & bands[1]).sum(), bands[0].sum(), bands[1].sum())
        assert (of.pred_contour[k], of.label_contour[k]) == (edges[0].sum(), edges[1].sum())
        assert of.pred_met[k] == (far[1][edges[0]] <= near).sum()
        assert of.label_met[k] == (far[0][edges[1]] <= near).sum()


def test_a_moved_square_by_hand():
    """A 4 x 4 square in 8 x 8 pixels, predicted one column to the right."""
    label, pred = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    label[2:6, 2:6] = pred[2:6, 3:7] = 1
    result = counts_of(pred, label, classes=2).metrics()
    # Both rings hold 12 pixels; those of the rows at top and bottom share 3 each, and no columns do.
    assert result.iou[1] == 6 / 18
    assert result.f[1] == 1.0
    assert (result.counted, result.counted_f) == (2, 2)
    assert result.miou == pytest.approx(result.iou.mean())


def test_image_edges_are_band_but_not_contour():
    whole = np.zeros((6, 6), np.uint8)
    of = counts_of(whole, whole).pixels()
    assert of.label.tolist() == of.hit.tolist() == [20, 0, 0]
    assert not of.label_contour.any()
    assert not of.pred_contour.any()


def test_ignored_pixels_make_no_edge_and_their_predictions_are_never_looked_at():
    label = np.zeros((9, 9), np.uint8)
    label[3:6, 3:6] = IGNORE
    pred = np.where(label == IGNORE, 77, 0)
    of = counts_of(pred, label).pixels()
    assert of.label.tolist() == of.pred.tolist() == [32, 0, 0]  # the image's edge only
    assert not of.pred_contour.any()


def test_absent_classes():
    """Class 0 is everywhere, 1 labelled only, 2 predicted only, 3 nowhere."""
    label, pred = np.zeros((9, 9), np.uint8), np.zeros((9, 9), np.uint8)
    label[1:3, 1:3], pred[6:8, 6:8] = 1, 2
    result = counts_of(pred, label, classes=4).metrics()
    assert result.iou[1] == result.iou[2] == result.f[1] == result.f[2] == 0
    assert np.isnan(result.iou[3])
    assert np.isnan(result.f[3])
    assert (result.counted, result.counted_f) == (3, 3)
    assert result.mf == pytest.approx(result.f[:3].mean())


@pytest.mark.parametrize("label", [np.full((3, 3), IGNORE, np.uint8), np.zeros((0, 5), np.uint8)])
def test_nothing_labelled_is_nan(label):
    result = counts_of(np.zeros(label.shape, np.uint8), label).metrics()
    assert np.isnan([result.miou, result.mf]).all()
    assert (result.counted, result.counted_f) == (0, 0)
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["miou"] is None


def test_many_classes_and_tensors():
    pred, label = maps(1, grain=3)
    expected = counts_of(pred, label, reach=2).counts
    wide = np.where(label == IGNORE, 65535, label.astype(np.int64) + 297)
    many = counts_of(torch.from_numpy(pred.astype(np.int64) + 297), wide, classes=300, reach=2, ignore=65535)
    np.testing.assert_array_equal(many.counts[:, 297:], expected)
    assert not many.counts[:, :297].any()
    few = counts_of(np.zeros((4, 4), np.uint8), np.full((4, 4), 299, np.uint16), classes=300, ignore=65535)
    assert few.pixels().pred[0] == few.pixels().label[299] == 12


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5), st.integers(0, 5))
def test_parts_add_up_to_the_whole(seeds, cut):
    whole, parts = (BoundaryCounts(3, IGNORE) for _ in range(2))
    other = BoundaryCounts(3, IGNORE)
    for i, seed in enumerate(seeds):
        images = maps(seed, size=(4 + i, 6), grain=2)
        whole.update(*images)
        (parts if i < cut else other).update(*images)
    parts.add(other)
    np.testing.assert_array_equal(parts.counts, whole.counts)


def test_widths_follow_the_diagonal():
    label = np.zeros((300, 400), np.uint8)
    label[:, 200:] = 1
    counts = BoundaryCounts(2, IGNORE)
    counts.update(label, label)
    of = counts.pixels()
    assert of.label[0] == 300 * 200 - 280 * 180  # 2 % of 500 pixels at the image's three edges and at the boundary
    assert of.label_contour.tolist() == [300, 300]
    moved = BoundaryCounts(2, IGNORE)
    moved.update(np.roll(label, 4, 1)[:, 4:], label[:, 4:])  # 0.75 % of the diagonal are 4 pixels
    assert moved.metrics().f[1] == 1
    away = BoundaryCounts(2, IGNORE)
    away.update(np.roll(label, 5, 1)[:, 5:], label[:, 5:])
    assert away.metrics().f[1] == 0


@pytest.mark.parametrize(
    ("pred", "label", "message"),
    [
        (
            np.zeros((2, 2), int),
            np.full((2, 2), 3),
            "label 3 is not a class id; allowed are 0 to 2 or the ignore id 255",
        ),
        (np.full((2, 2), 3), np.zeros((2, 2), int), "prediction 3 is not a class id"),
        (np.zeros((2, 3), int), np.zeros((2, 2), int), "resize the prediction"),
        (np.zeros(4, int), np.zeros(4, int), "one image"),
        (np.zeros((2, 2)), np.zeros((2, 2), int), "pred holds float64"),
    ],
)
def test_bad_input_is_named_and_counts_nothing(pred, label, message):
    counts = BoundaryCounts(3, IGNORE)
    with pytest.raises(ValueError, match=message):
        counts.update(pred, label)
    assert not counts.counts.any()


def test_bad_settings():
    with pytest.raises(ValueError, match="must be above 0"):
        BoundaryCounts(3, IGNORE, width=0)
    with pytest.raises(ValueError, match="num_classes is 0"):
        BoundaryCounts(0, IGNORE)
    with pytest.raises(ValueError, match="make them equal"):
        BoundaryCounts(3, IGNORE).add(BoundaryCounts(3, IGNORE, width=0.01))
