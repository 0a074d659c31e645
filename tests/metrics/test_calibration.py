"""Calibration against torchmetrics and its plain definition; integer counts whatever the split."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_calibration_error

from segvit.metrics import calibration
from segvit.metrics.calibration import STEPS, CalibrationCounts

IGNORE = 255


def maps(seed, *, size=(20, 15), ignored=0.1):
    rng = np.random.default_rng(seed)
    sure = rng.random(size, np.float32)
    label = rng.integers(0, 4, size).astype(np.uint8)
    pred = np.where(rng.random(size) < sure**2, label, (label + 1) % 4).astype(np.uint8)
    label[rng.random(size) < ignored] = IGNORE
    return sure, pred, label


def counts_of(sure, pred, label, **options):
    counts = CalibrationCounts(IGNORE, **options)
    counts.update(sure, pred, label)
    return counts


def plain(sure, pred, label, bins):
    """(pixels, mean confidence, accuracy) of each bin, one pixel after the other; confidences must be whole steps."""
    members = [[] for _ in range(bins)]
    for confidence, guess, truth in zip(sure.ravel().tolist(), pred.ravel(), label.ravel(), strict=True):
        if truth == IGNORE:
            continue
        step = round(confidence * STEPS)
        index = next(i for i in range(bins) if step * bins <= (i + 1) * STEPS)
        members[index].append((step / STEPS, bool(guess == truth)))
    return [(len(m), *np.mean(m, 0)) if m else (0, np.nan, np.nan) for m in members]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 7, 10, 15, 100]), st.floats(0, 1))
def test_every_figure_equals_its_plain_definition(seed, bins, ignored):
    sure, pred, label = maps(seed, size=(6, 5), ignored=ignored)
    sure = np.rint(sure * STEPS) / STEPS
    result, rows = counts_of(sure, pred, label, bins=bins).metrics(), plain(sure, pred, label, bins)
    for ours, theirs in zip(result.bins, rows, strict=True):
        assert (ours.pixels, ours.confidence, ours.accuracy) == pytest.approx(theirs, nan_ok=True)
    total, filled = sum(row[0] for row in rows), [row for row in rows if row[0]]
    assert result.pixels == total == (label != IGNORE).sum()
    if total:
        gaps = [abs(accuracy - confidence) for _, confidence, accuracy in filled]
        assert result.ece == pytest.approx(sum(row[0] / total * gap for row, gap in zip(filled, gaps, strict=True)))
        assert result.mce == pytest.approx(max(gaps))
        assert result.accuracy == pytest.approx((pred == label)[label != IGNORE].mean())
        assert result.confidence == pytest.approx(sure[label != IGNORE].mean())


@pytest.mark.parametrize("norm", ["l1", "max"])
def test_equals_torchmetrics(norm):
    """Torchmetrics does not round, so that a pixel at an edge may be in another of the bins of 2,400 pixels each."""
    sure, pred, label = maps(0, size=(200, 200))
    result, valid = counts_of(sure, pred, label).metrics(), label != IGNORE
    right = torch.from_numpy((pred == label)[valid].astype(np.int64))
    expected = binary_calibration_error(torch.from_numpy(sure[valid]), right, n_bins=15, norm=norm)
    assert {"l1": result.ece, "max": result.mce}[norm] == pytest.approx(float(expected), abs=1e-3)


def test_by_hand():
    sure = np.array([[0.9, 0.9, 0.9, 0.9, 0.2, 0.2, 1.0]])
    pred, label = np.array([[1, 1, 1, 0, 0, 0, 0]]), np.array([[1, 1, 1, 1, 0, 1, IGNORE]])
    result = counts_of(sure, pred, label, bins=2).metrics()
    assert [one.pixels for one in result.bins] == [2, 4]
    assert (result.bins[1].low, result.bins[1].high) == (0.5, 1.0)
    assert result.ece == pytest.approx(4 / 6 * 0.15 + 2 / 6 * 0.3, abs=1e-5)
    assert result.mce == pytest.approx(0.3, abs=1e-5)
    assert result.accuracy == pytest.approx(4 / 6)


def test_upper_edges_belong_to_their_bin():
    edges = np.arange(16) / 15
    ids = np.zeros(16, int)
    result = counts_of(edges, ids, ids).metrics()
    assert [one.pixels for one in result.bins] == [2] + [1] * 14  # 0 and 1/15 share the first


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_precision_and_tensors(dtype):
    sure, pred, label = maps(1)
    coarse = (np.round(sure * 64) / 64).astype(dtype)  # exact in half precision
    expected = counts_of(coarse.astype(np.float32), pred, label).counts
    np.testing.assert_array_equal(counts_of(coarse, pred, label).counts, expected)
    tensors = [torch.from_numpy(values) for values in (coarse, pred, label)]
    np.testing.assert_array_equal(counts_of(*tensors).counts, expected)
    np.testing.assert_array_equal(counts_of(tensors[0].bfloat16(), *tensors[1:]).counts, expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(0, 20))
def test_parts_add_up_to_the_whole(seed, cut):
    whole, (sure, pred, label) = CalibrationCounts(IGNORE), maps(seed)
    whole.update(sure, pred, label)
    parts, rest = (counts_of(sure[part], pred[part], label[part]) for part in (slice(cut), slice(cut, None)))
    parts.add(rest)
    np.testing.assert_array_equal(parts.counts, whole.counts)
    assert parts.metrics() == whole.metrics()


def test_large_images_are_counted_in_blocks(monkeypatch):
    arrays = maps(2)
    whole = counts_of(*arrays).counts
    monkeypatch.setattr(calibration, "BLOCK", 37)
    np.testing.assert_array_equal(counts_of(*arrays).counts, whole)


@pytest.mark.parametrize("size", [(3, 3), (0, 5)])
def test_nothing_labelled_is_nan(size):
    result = counts_of(np.ones(size), np.zeros(size, int), np.full(size, IGNORE)).metrics()
    assert np.isnan([result.ece, result.mce, result.confidence, result.accuracy]).all()
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert (data["ece"], data["pixels"], data["bins"][0]["share"]) == (None, 0, 0.0)


def test_json():
    data = counts_of(*maps(3)).metrics().to_json()
    assert set(data) == {"ece", "mce", "confidence", "accuracy", "pixels", "bins"}
    assert set(data["bins"][0]) == {"low", "high", "pixels", "share", "confidence", "accuracy"}
    assert sum(row["share"] for row in data["bins"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("sure", "message"),
    [
        (np.array([[0.5, 1.5]]), "spans 0.5 to 1.5"),
        (np.array([[-0.1, 1.0]]), "must lie in 0..1"),
        (np.array([[np.nan, 1.0]]), "spans nan"),
        (np.array([[0, 255]], np.uint8), "confidence holds uint8"),
        (np.array([0.5]), "one number a pixel"),
    ],
)
def test_bad_input_is_named_and_counts_nothing(sure, message):
    counts, ids = CalibrationCounts(IGNORE), np.zeros((1, 2), int)
    with pytest.raises(ValueError, match=message):
        counts.update(sure, ids, ids)
    assert not counts.counts.any()


def test_bad_settings():
    with pytest.raises(ValueError, match="bins is 0"):
        CalibrationCounts(IGNORE, bins=0)
    with pytest.raises(ValueError, match="both must be equal"):
        CalibrationCounts(IGNORE).add(CalibrationCounts(IGNORE, bins=10))
