"""The report of a run or an evaluation: what was measured and how, where it fails, and which labels look wrong.

Shapes    H W pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import Classes
from segvit.engine import page
from segvit.engine.charts import Series, curves, dumbbells, grouped, heat_map, reliability
from segvit.engine.page import bar, percent, swatch
from segvit.inference.prediction import colorize

MAX_HEAT = 30  # classes; a larger heat map has cells too small to read


class Picture(NamedTuple):
    """One evaluated image."""

    name: str
    image: NDArray[np.uint8]  # (H, W, 3)
    label: NDArray[Any]  # (H, W) class ids, with the ignore id
    prediction: NDArray[Any]  # (H, W)
    remark: str  # such as its mIoU


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Pictures under a heading."""

    title: str
    text: str
    pictures: Sequence[Picture]


def write_report(
    path: str | Path, *, title: str, classes: Classes, facts: Sequence[tuple[str, str]],
    history: Sequence[dict[str, Any]] = (), record: dict[str, Any] | None = None, galleries: Sequence[Gallery] = (),
    notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write the report to `path`, atomically. What is empty or None (a run without validation) has no section.

    `record` is what `evaluation_record` gives; `history` holds the rows of `metrics.jsonl`: training rows
    {"step", "loss", "loss_...", "lr", "grad_norm"} and validation rows {"step", "val": {"miou", "macc", "aacc"}}.
    """
    confusion = np.array(record["confusion"], np.int64) if record is not None else None
    sections = [
        _headline(record) if record is not None else "",
        page.notes(notes),
        _curves(history),
        _per_class(record, classes) if record is not None else "",
        _confusion(confusion, classes) if confusion is not None and confusion.any() else "",
        _boundaries_and_confidence(record) if record is not None else "",
        *(_gallery(gallery, classes) for gallery in galleries),
        page.facts(facts),
    ]
    page.write_page(path, title, sections)


def _headline(record: dict[str, Any]) -> str:
    """The means and how many classes they speak of."""
    cells = [
        (percent(record["miou"]), "%", "mIoU, mean over classes"),
        (percent(record["macc"]), "%", "mAcc, mean over classes"),
        (percent(record["aacc"]), "%", "aAcc, of all pixels"),
        (str(record["counted"]), f"of {len(record['classes'])}", "classes counted in mIoU"),
    ]
    if record.get("boundary"):
        cells.insert(3, (percent(record["boundary"]["miou"]), "%", "boundary IoU, mean over classes"))
    if record.get("calibration") and record["calibration"]["ece"] is not None:
        cells.insert(4, (percent(record["calibration"]["ece"]), "%", "expected calibration error"))
    return page.tiles(cells)


def _curves(history: Sequence[dict[str, Any]]) -> str:
    train = [row for row in history if "val" not in row]
    tests = [{"step": row["step"], **row["val"]} for row in history if "val" in row]
    terms = sorted({key for row in train for key in row if key.startswith("loss_")})
    # With one term only, the term is the total.
    losses = [("total", "loss")] + [(key.removeprefix("loss_"), key) for key in terms if len(terms) > 1]
    charts = [
        curves("Training loss", [_series(train, key, name) for name, key in losses]),
        curves("Validation mIoU", [_series(tests, "miou", "mIoU", dots=True)], unit="%"),
        curves("Learning rate", [_series(train, "lr", "learning rate", smooth=False)]),
        curves("Gradient norm", [_series(train, "grad_norm", "gradient norm")]),
    ]
    if not any(charts):
        return ""
    return f'<h2>Training</h2><div class="grid">{"".join(charts)}</div>'


def _series(rows: Sequence[dict[str, Any]], key: str, name: str, *, dots: bool = False, smooth: bool = True) -> Series:
    """The rows that have `key`; null, as JSON writes NaN, leaves a gap."""
    points = [(row["step"], math.nan if row[key] is None else row[key]) for row in rows if key in row]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return Series(name, steps, values, dots=dots, smooth=smooth)


def _per_class(record: dict[str, Any], classes: Classes) -> str:
    """Best class first; those without a value last."""
    order = sorted(record["classes"], key=lambda row: -1.0 if row["iou"] is None else row["iou"], reverse=True)
    head = ["class", "IoU", "accuracy = recall", "precision", "Dice", "share of pixels"]
    edges = record.get("boundary") is not None
    if edges:
        head[5:5] = ["boundary IoU", "boundary F"]
    rows = [
        [
            f"{swatch(row['id'], classes)}{escape(row['name'])}", bar(row["iou"]), percent(row["acc"]),
            percent(row["precision"]), percent(row["dice"]),
            *([percent(row["boundary_iou"]), percent(row["boundary_f"])] if edges else []), percent(row["share"]),
        ]
        for row in order
    ]  # fmt: skip
    return (
        "<h2>Classes</h2><p>In percent, best first. The accuracy of a class is its recall. A dash: not defined, since "
        "the class occurs in no label, or in neither labels nor predictions (then it is not counted in mIoU). A class "
        "that is predicted but never labelled has IoU 0 and counts.</p>" + page.table(head, rows)
    )


def _confusion(matrix: NDArray[np.int64], classes: Classes) -> str:
    few = len(classes) <= MAX_HEAT
    chart = ""
    if few:
        chart = (
            "<p>Rows are what the pixels are, columns what they were read as, in percent of the row. Hold the pointer "
            f'over a cell for its numbers.</p><div class="card scroll">{heat_map(matrix, classes.names)}</div>'
        )
    rows = [
        [
            f"{swatch(row, classes)}<b>{escape(classes.names[row])}</b> read as {swatch(column, classes)}"
            f"<b>{escape(classes.names[column])}</b>: {percent(share, 1)} % of {escape(classes.names[row])} pixels",
            bar(share, 1), grouped(matrix[row, column]),
        ]
        for row, column, share in top_confusions(matrix, 10 if few else 20)
    ]  # fmt: skip
    table = (
        "<h2>Largest confusions</h2><p>By share of the true class.</p>"
        + page.table(["confusion", "percent of the class", "pixels"], rows, kind="wrongs")
    )  # fmt: skip
    return (f"<h2>Confusion</h2>{chart}" if few else "") + (table if rows else "")


def top_confusions(matrix: NDArray[np.int64], count: int) -> list[tuple[int, int, float]]:
    """The (label, prediction, share of the label's pixels) of the largest shares off the diagonal."""
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    np.fill_diagonal(shares, 0)
    order = np.argsort(-shares, axis=None, kind="stable")[:count]
    cells = [divmod(int(i), len(matrix)) for i in order]
    return [(row, column, float(shares[row, column])) for row, column in cells if shares[row, column] > 0]


def _boundaries_and_confidence(record: dict[str, Any]) -> str:
    charts, text = [], []
    if record.get("boundary"):
        rows = [(row["name"], _number(row["iou"]), _number(row["boundary_iou"])) for row in record["classes"]]
        rows.sort(key=lambda row: -1.0 if math.isnan(row[1]) else -row[1])
        charts.append(dumbbells("IoU and boundary IoU", rows, labels=("IoU", "boundary IoU")))
        text.append(
            f"Boundary IoU compares only pixels within {100 * record['boundary']['width']:g} % of the image diagonal "
            "of an outline; a wide gap means that the shapes are found and their edges are not."
        )
    known = record.get("calibration") or {}
    if known.get("ece") is not None:
        rows = [(bin_["confidence"] or 0.0, bin_["accuracy"] or 0.0, bin_["share"]) for bin_ in known["bins"]]
        charts.append(reliability("Calibration", rows))
        text.append(
            f"Confidence is {record['confidence']}. Mean confidence {percent(known['confidence'])} %, "
            f"accuracy {percent(known['accuracy'])} %: the model is "
            + ("over" if known["confidence"] > known["accuracy"] else "under")
            + f"confident by {percent(abs(known['confidence'] - known['accuracy']))} points on the whole."
        )
    if not any(charts):
        return ""
    return f'<h2>Edges and confidence</h2><p>{" ".join(text)}</p><div class="grid">{"".join(charts)}</div>'


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _gallery(gallery: Gallery, classes: Classes) -> str:
    shown = gallery.pictures
    if not shown:
        return ""
    ids = np.unique(np.concatenate([np.unique(part) for one in shown for part in (one.label, one.prediction)]))
    legend = "".join(
        f"<span>{swatch(int(i), classes)}{escape(classes.names[i])}</span>" for i in ids if i < len(classes)
    )
    return f'<h2>{escape(gallery.title)}</h2><p>{escape(gallery.text)}</p><div class="legend">{legend}</div>' + "".join(
        _row(one, classes) for one in shown
    )


def _row(one: Picture, classes: Classes) -> str:
    """One picture's four views."""
    known = one.label != classes.ignore_index
    wrong = known & (one.label != one.prediction)
    grey = np.repeat(one.image.mean(2, keepdims=True) * 0.6 + 60, 3, axis=2)
    grey[wrong] = grey[wrong] * 0.15 + np.array((235, 40, 40)) * 0.85
    share = wrong.sum() / max(known.sum(), 1)
    cells = [
        ("image", one.image, False),
        ("label", colorize(one.label, classes), True),
        ("prediction", colorize(one.prediction, classes), True),
        (f"errors: {percent(share, 1)} % of labelled pixels", grey.astype(np.uint8), False),
    ]
    return page.views(one.name, one.remark, cells)
