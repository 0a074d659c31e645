"""The confusion matrix against torchmetrics, scikit-learn and plain definitions, its policy for absent classes, and its
algebra."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, precision_recall_fscore_support
from torchmetrics.classification import MulticlassF1Score, MulticlassJaccardIndex, MulticlassPrecision, MulticlassRecall

from segvit.contracts import Classes
from segvit.metrics import confusion
from segvit.metrics.confusion import COLUMNS, ConfusionMatrix

IGNORE = 255


def maps(seed, *, num_classes=7, size=(40, 30), ignored=0.1, run=1):
    """Every pixel is drawn on its own; with `run` each becomes so many pixels in a row, as in real label maps."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, num_classes, size).astype(np.uint8)
    pred = np.where(rng.random(size) < 0.6, label, rng.integers(0, num_classes, size)).astype(np.uint8)
    label[rng.random(size) < ignored] = IGNORE
    return pred.repeat(run, 1), label.repeat(run, 1)


def matrix_of(pred, label, num_classes=7):
    counts = ConfusionMatrix(num_classes, IGNORE)
    counts.update(pred, label)
    return counts


def plain_matrix(pred, label, num_classes=7):
    """One pixel after the other."""
    counts = np.zeros((num_classes, num_classes), np.int64)
    for guess, truth in zip(pred.ravel().tolist(), label.ravel().tolist(), strict=True):
        if truth != IGNORE:
            counts[truth, guess] += 1
    return counts


@pytest.mark.parametrize("run", [1, 20])
def test_equals_sklearn_and_torchmetrics(run):
    pred, label = maps(0, run=run)
    counts, valid = matrix_of(pred, label), label != IGNORE
    result, truth, guess = counts.metrics(), label[valid], pred[valid]
    np.testing.assert_array_equal(counts.matrix, confusion_matrix(truth, guess, labels=range(7)))
    np.testing.assert_allclose(result.iou, jaccard_score(truth, guess, average=None))
    assert result.fwiou == pytest.approx(jaccard_score(truth, guess, average="weighted"))
    assert result.aacc == pytest.approx(accuracy_score(truth, guess))
    precision, recall, fscore, pixels = precision_recall_fscore_support(truth, guess)
    for ours, theirs in zip((result.precision, result.recall, result.fscore), (precision, recall, fscore), strict=True):
        np.testing.assert_allclose(ours, theirs)
    np.testing.assert_array_equal(result.pixels, pixels)

    tensors = torch.from_numpy(pred).long(), torch.from_numpy(label).long()
    for metric, ours in (
        (MulticlassJaccardIndex, result.iou), (MulticlassF1Score, result.dice),
        (MulticlassPrecision, result.precision), (MulticlassRecall, result.recall),
    ):  # fmt: skip
        theirs = metric(7, average="none", ignore_index=IGNORE)(*tensors)
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.sampled_from([1, 3, 20]), st.floats(0, 1))
def test_every_figure_equals_its_plain_definition(seed, present, run, ignored):
    pred, label = maps(seed, num_classes=present, size=(6, 5), run=run, ignored=ignored)
    counts = matrix_of(pred, label)
    np.testing.assert_array_equal(counts.matrix, plain_matrix(pred, label))
    valid, result = label != IGNORE, counts.metrics()
    iou, weighted, accuracies = [], 0.0, []
    for k in range(7):
        guess, truth = (pred == k) & valid, label == k
        both, either = (guess & truth).sum(), (guess | truth).sum()
        iou += [both / either] if either else []
        accuracies += [both / truth.sum()] if truth.any() else []
        weighted += both / either * truth.sum() / valid.sum() if truth.any() else 0
        for ours, part, whole in (
            (result.iou, both, either), (result.dice, 2 * both, guess.sum() + truth.sum()),
            (result.precision, both, guess.sum()), (result.recall, both, truth.sum()),
        ):  # fmt: skip
            assert ours[k] == pytest.approx(part / whole if whole else np.nan, nan_ok=True)
    assert result.counted == len(iou)
    expected = (np.mean(iou), np.mean(accuracies), (pred == label)[valid].mean(), weighted) if iou else [np.nan] * 4
    assert (result.miou, result.macc, result.aacc, result.fwiou) == pytest.approx(tuple(expected), nan_ok=True)


@pytest.mark.parametrize("run", [1, 20])
def test_large_images_are_counted_in_blocks(monkeypatch, run):
    pred, label = maps(3, run=run)
    whole = matrix_of(pred, label).matrix
    monkeypatch.setattr(confusion, "BLOCK", 37)
    np.testing.assert_array_equal(matrix_of(pred, label).matrix, whole)
    label[-1, -1] = 7  # in the last block
    counts = ConfusionMatrix(7, IGNORE)
    with pytest.raises(ValueError, match="label 7"):
        counts.update(pred, label)
    assert not counts.matrix.any()


def test_views_count_as_what_they_show():
    pred, label = maps(4)
    expected = matrix_of(pred[::2, ::-1].copy(), label[::2, ::-1].copy()).matrix
    np.testing.assert_array_equal(matrix_of(pred[::2, ::-1], label[::2, ::-1]).matrix, expected)


def test_absent_and_predicted_only_classes():
    # Class 0: 3 labelled, 2 hit. Class 1: 2 labelled, 2 hit. Class 2: predicted only. Class 3: nowhere.
    result = matrix_of(np.array([[0, 0, 2, 1, 1, 3]]), np.array([[0, 0, 0, 1, 1, IGNORE]]), 4).metrics()
    np.testing.assert_allclose(result.iou, [2 / 3, 1, 0, np.nan])
    np.testing.assert_allclose(result.acc, [2 / 3, 1, np.nan, np.nan])
    np.testing.assert_allclose(result.recall, result.acc)
    np.testing.assert_allclose(result.precision, [1, 1, 0, np.nan])
    np.testing.assert_allclose(result.dice, [0.8, 1, 0, np.nan])
    np.testing.assert_allclose(result.fscore, [0.8, 1, np.nan, np.nan])
    assert (result.miou, result.macc, result.aacc) == pytest.approx((5 / 9, 5 / 6, 0.8))
    assert result.fwiou == pytest.approx(2 / 3 * 0.6 + 1 * 0.4)
    assert result.counted == 3


@pytest.mark.parametrize("label", [np.full((3, 3), IGNORE, np.uint8), np.zeros((0, 5), np.uint8)])
def test_nothing_labelled_is_nan_without_warning(label):
    result = matrix_of(np.zeros(label.shape, np.uint8), label, 2).metrics()
    assert np.isnan([result.miou, result.macc, result.aacc, result.fwiou]).all()
    assert result.counted == 0


@pytest.mark.parametrize("run", [1, 20])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, np.uint64])
def test_every_integer_type_counts_the_same(dtype, run):
    pred, label = maps(1, run=run)
    expected = plain_matrix(pred, label)
    np.testing.assert_array_equal(matrix_of(pred.astype(dtype), label.astype(dtype)).matrix, expected)
    tensors = torch.from_numpy(pred.astype(dtype)), torch.from_numpy(label.astype(dtype))
    np.testing.assert_array_equal(matrix_of(*tensors).matrix, expected)
    np.testing.assert_array_equal(matrix_of(tensors[0].long(), label).matrix, expected)


def test_predictions_on_ignored_pixels_are_never_looked_at():
    counts = matrix_of(np.array([[0, 200, -7]]), np.array([[0, IGNORE, IGNORE]]), 2)
    np.testing.assert_array_equal(counts.matrix, [[1, 0], [0, 0]])
    for run in (1, 20):
        pred, label = maps(5, run=run)
        expected = matrix_of(pred, label).matrix
        pred[label == IGNORE] = 254
        np.testing.assert_array_equal(matrix_of(pred, label).matrix, expected)


@pytest.mark.parametrize("ignore", [-1, 3, 255, 1000])
def test_any_ignore_id(ignore):
    pred, label = maps(6)
    marked = np.where(label == IGNORE, ignore, label.astype(np.int32))
    counts = ConfusionMatrix(7, ignore)
    counts.update(pred, marked)
    np.testing.assert_array_equal(counts.matrix, plain_matrix(pred, np.where(marked == ignore, IGNORE, marked)))


def test_many_classes_with_their_own_ignore_id():
    counts = ConfusionMatrix(300, 65535)
    counts.update(np.array([255, 299, 3], np.uint16), np.array([255, 299, 65535], np.uint16))
    assert counts.matrix[255, 255] == counts.matrix[299, 299] == 1
    assert counts.matrix.sum() == 2
    bytes_only = ConfusionMatrix(256, IGNORE)
    bytes_only.update(np.array([255, 7], np.uint8), np.array([7, 255], np.uint8))
    assert bytes_only.matrix[7, 255] == bytes_only.matrix.sum() == 1


@pytest.mark.parametrize("run", [1, 20])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
@pytest.mark.parametrize(
    ("pred", "label", "message"),
    [([0, 1], [0, 7], "label 7 is not"), ([0, 9], [0, 1], "prediction 9 is not"), ([0, 255], [0, 1], "prediction 255")],
)
def test_wrong_ids_are_found_on_every_way(pred, label, message, dtype, run):
    counts = ConfusionMatrix(7, IGNORE)
    with pytest.raises(ValueError, match=message):
        counts.update(np.array(pred, dtype).repeat(run), np.array(label, dtype).repeat(run))
    assert not counts.matrix.any()


@pytest.mark.parametrize(
    ("pred", "label", "message"),
    [
        ([0, 1], [0, 7], "label 7 is not a class id; allowed are 0 to 6 or the ignore id 255"),
        ([0, 1], [0, -1], "label -1 is not a class id"),
        ([0, 9], [0, 1], "prediction 9 is not a class id; allowed are 0 to 6$"),
        ([0, -2], [0, 1], "prediction -2 is not a class id"),
        ([0, 1, 2], [0, 1], r"pred is \(3,\) but label is \(2,\)"),
        ([0.0, 1.0], [0, 1], "pred holds float64"),
    ],
)
def test_bad_input_is_named_and_counts_nothing(pred, label, message):
    counts = ConfusionMatrix(7, IGNORE)
    with pytest.raises(ValueError, match=message):
        counts.update(np.array(pred), np.array(label))
    assert not counts.matrix.any()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.floats(0, 1))
def test_parts_add_up_to_the_whole(seed, cut, ignored):
    pred, label = maps(seed, ignored=ignored)
    whole, parts = matrix_of(pred, label), matrix_of(pred[:cut], label[:cut])
    parts.add(matrix_of(pred[cut:], label[cut:]))
    np.testing.assert_array_equal(parts.matrix, whole.matrix)
    areas = whole.areas()
    np.testing.assert_array_equal(areas.union + areas.intersect, areas.pred + areas.label)
    assert whole.matrix.sum() == (label != IGNORE).sum()


def test_matrices_of_other_classes_do_not_add():
    with pytest.raises(ValueError, match="both must be equal"):
        ConfusionMatrix(3, IGNORE).add(ConfusionMatrix(4, IGNORE))


def test_json_and_table():
    classes = Classes(("a", "b", "c", "d"), ((0, 0, 0),) * 4)
    result = matrix_of(np.array([0, 0, 2, 1, 1]), np.array([0, 0, 0, 1, 1]), 4).metrics()
    data = result.to_json(classes)
    assert data["counted"] == 3
    assert data["fwiou"] == pytest.approx(2 / 3 * 0.6 + 1 * 0.4)
    assert data["classes"][3] == {
        "id": 3, "name": "d", "iou": None, "acc": None, "dice": None, "fscore": None,
        "precision": None, "recall": None, "pixels": 0, "share": 0.0,
    }  # fmt: skip
    rows = result.table(classes)
    assert rows[0] == ("a", "66.67", "66.67", "100.00", "80.00", "60.00")
    assert rows[3] == ("d", "-", "-", "-", "-", "0.00")
    assert rows[4][:2] == ("mean of 3", "55.56")
    assert {len(row) for row in rows} == {len(COLUMNS)}
    with pytest.raises(ValueError, match="4 classes but a table of 1"):
        result.to_json(Classes(("a",), ((0, 0, 0),)))


@pytest.mark.parametrize("run", [1, 32])
def test_speed(run):
    """0.9 and 0.6 ms were measured on one thread; processor time, and room above it, since the machine may be busy."""
    pred, label = maps(2, num_classes=150, size=(512, 512 // run), run=run)
    counts, best = ConfusionMatrix(150, IGNORE), 1.0
    for _ in range(40):
        start = time.thread_time()
        counts.update(pred, label)
        best = min(best, time.thread_time() - start)
    assert best < 0.005
