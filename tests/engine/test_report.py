"""The report is one well-formed page that needs nothing else, whatever the run was."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from segvit.contracts import Classes
from segvit.engine.charts import Series, curves, dumbbells, nice_ticks, reliability, smoothed
from segvit.engine.evaluate import Evaluation, evaluation_record
from segvit.engine.report import Gallery, Picture, top_confusions, write_report
from segvit.metrics.boundary import BoundaryCounts
from segvit.metrics.calibration import CalibrationCounts
from segvit.metrics.confusion import ConfusionMatrix

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags balance and collects the text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.tags = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def table(count):
    names = ['<b>bold & "loud"</b>', *(f"class {i}" for i in range(1, count))]
    return Classes(tuple(names), tuple((i % 256, 90, 200 - i % 200) for i in range(count)))


def run(count=4, size=(48, 64), pictures=3):
    """An evaluation in which the last class occurs nowhere, and pictures."""
    rng = np.random.default_rng(0)
    found = Evaluation(
        ConfusionMatrix(count, 255), boundary=BoundaryCounts(count, 255), calibration=CalibrationCounts(255),
        confidence="a test's",
    )  # fmt: skip
    shown = []
    for index in range(pictures):
        label = rng.integers(0, count - 1, size).astype(np.uint8)
        pred = np.where(rng.random(size) < 0.5 + 0.1 * index, label, rng.integers(0, count - 1, size)).astype(np.uint8)
        label[:4] = 255
        part = ConfusionMatrix(count, 255)
        part.update(pred, label)
        found.confusion.add(part)
        found.boundary.update(pred, label)
        found.calibration.update(rng.random(size).astype(np.float32), pred, label)
        image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        shown.append(Picture(f"image <{index}>", image, label, pred, f"mIoU {100 * part.metrics().miou:.2f} %"))
    return found, shown


def write(path, *, count=4, history=(), size=(48, 64), empty=False, facts=(("Steps", "3 & more"),)):
    found, pictures = run(count, size)
    classes = table(count)
    write_report(
        path / "index.html",
        title="A <run>",
        facts=list(facts),
        history=list(history),
        record=None if empty else evaluation_record(found, classes),
        classes=classes,
        galleries=[] if empty else [Gallery(title="Worst <images>", text="t", pictures=pictures)],
        notes=["a note with <angles>"],
    )
    html = (path / "index.html").read_text("utf-8")
    return html, Page(html)


def history(steps=400):
    rows = []
    for step in range(1, steps + 1):
        loss = float("nan") if step == 50 else None if step == 60 else 1 / step
        rows.append(
            {"step": step, "loss": loss, "loss_a": 0.5, "loss_b": 1 / step, "lr": 1e-5, "grad_norm": 2.0, "time": 1}
        )
        if step % 100 == 0:
            miou = 0.7 if step == 300 else 0.5
            rows.append({"step": step, "val": {"miou": miou, "macc": 0.8, "aacc": 0.9}})
    return rows


def test_page_is_whole_and_self_contained(tmp_path):
    html, page = write(tmp_path, history=history())
    text = "".join(page.text)
    assert not re.search(r"https?:|<script|<link|@import|url\(", html)
    for name in table(4).names:
        assert name in text
    for word in (
        "A <run>",
        "image <2>",
        "a note with <angles>",
        "3 & more",
        "best 70.00 % at step 300",
        "Learning rate",
    ):
        assert word in text
    assert page.tags.count("img") == 12
    assert page.tags.count("svg") == 7
    assert not re.search(r"\bnan\b", html.lower().split("<body>")[1])
    assert len(html) < 400_000


def test_galleries_keep_their_order_and_remarks(tmp_path):
    html, page = write(tmp_path)
    found = re.findall(r"<h3>image &lt;(\d)&gt;<span>mIoU ([\d.]+) %", html)
    assert [name for name, _ in found] == ["0", "1", "2"]
    assert "Worst <images>" in "".join(page.text)


def test_the_tables_show_boundaries_and_calibration(tmp_path):
    html, page = write(tmp_path)
    text = "".join(page.text)
    assert "boundary IoU, mean over classes" in text
    assert "expected calibration error" in text
    assert "confident by" in text
    assert "Confidence is a test's." in text
    # Four classes, of which one occurs nowhere and has no line in the chart.
    assert html.count('<line class="link"') == 3


def test_reliability_has_a_block_for_each_filled_bin():
    svg = reliability("c", [(0.1, 0.2, 0.5), (0.0, 0.0, 0.0), (0.9, 1.0, 0.5)])
    assert svg.count("<title>") == 2
    assert "confidence 0.90: right in 100.0 % (50.0 % of the pixels)" in svg


def test_dumbbells_leave_out_what_is_undefined():
    assert dumbbells("d", [("a", float("nan"), 0.5)], labels=("x", "y")) == ""
    assert dumbbells("d", [("a <b>", 0.5, 0.25)], labels=("x", "y")).count("a &lt;b&gt;") == 2


@pytest.mark.parametrize("rows", [[], history(1), history(5), [{"step": 7, "val": {"miou": None}}], [{"step": 1}]])
def test_short_histories(tmp_path, rows):
    html, _ = write(tmp_path, history=rows)
    assert not re.search(r'="[^"]*\b(nan|inf|None)\b', html)  # no coordinate came out of nothing


def test_run_without_validation(tmp_path):
    html, page = write(tmp_path, empty=True, facts=())
    assert "Confusion" not in html.split("<body>")[1]
    assert page.tags.count("svg") == 0


def test_many_classes_have_no_heat_map(tmp_path):
    html, page = write(tmp_path, count=40)
    assert page.tags.count("svg") == 2  # edges and calibration
    assert html.count(" read as ") == 20


def test_large_pictures_are_reduced(tmp_path):
    html, _ = write(tmp_path, size=(450, 600))
    assert "data:image/jpeg" in html
    assert len(html) < 3_000_000


def test_top_confusions_are_shares_of_the_label():
    matrix = np.array([[90, 10, 0], [400, 600, 0], [0, 0, 0]])
    assert top_confusions(matrix, 5) == [(1, 0, 0.4), (0, 1, 0.1)]


@pytest.mark.parametrize("span", [(0, 1), (0, 3.7), (-2, 5), (1e-6, 6e-5), (0.81, 0.83), (0, 160_000), (7, 7.001)])
def test_ticks_are_few_and_inside(span):
    ticks = nice_ticks(*span)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(ticks)
    assert ticks[-1] <= span[1] * (1 + 1e-6) or len(ticks) == 2


def test_smoothing_keeps_constants_and_skips_gaps():
    values = np.full(100, 3.0)
    values[[0, 50]] = np.nan
    np.testing.assert_allclose(smoothed(values), 3.0)
    assert np.isnan(smoothed(np.full(5, np.nan))).all()


def test_long_curves_are_thinned_but_keep_spikes():
    values = np.ones(100_000)
    values[77_777] = 0.0
    svg = curves("c", [Series("c", np.arange(100_000.0), values, smooth=False)])
    assert len(svg) < 20_000
    assert svg.count("222.0") >= 1, "the spike to zero is gone"
