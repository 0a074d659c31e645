"""segvit val: metrics.json, the report, and that both say the same."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from segvit.cli import main
from segvit.engine.evaluate import SURE, suspicious
from segvit.metrics.confusion import ConfusionMatrix
from segvit.tasks.dense import train
from tests.tasks.tiny import DATA, experiment

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    train(experiment(folder, steps=8))
    main(["val", str(folder), "--workers", "0"])
    return folder


def test_the_report_says_what_metrics_json_says(run):
    record = json.loads((run / "evaluation" / "val" / "metrics.json").read_text())
    page = (run / "evaluation" / "val" / "index.html").read_text()
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    for key in ("miou", "macc", "aacc"):
        assert f"<b>{100 * record[key]:.2f} <small>%" in page
    for row in record["classes"]:
        assert row["name"] in page
        if row["iou"] is not None:
            assert f"<span>{100 * row['iou']:.2f}</span>" in page
            assert f"<td>{100 * row['boundary_iou']:.2f}</td>" in page
    assert f"{100 * record['calibration']['ece']:.2f}" in page
    for word in (
        "Worst images",
        "Confusion",
        "Edges and confidence",
        "How it was made",
        "whole images",
        "single scale",
    ):
        assert word in page


def test_the_raw_confusion_gives_the_same_figures(run):
    record = json.loads((run / "evaluation" / "val" / "metrics.json").read_text())
    counts = ConfusionMatrix(8, 255)
    counts.matrix[:] = np.array(record["confusion"])
    metrics = counts.metrics()
    assert metrics.miou == pytest.approx(record["miou"], abs=1e-12)
    assert [row["iou"] for row in record["classes"]] == [None if np.isnan(v) else v for v in metrics.iou]
    assert sum(bin_["pixels"] for bin_ in record["calibration"]["bins"]) == counts.matrix.sum()
    assert record["calibration"]["accuracy"] == pytest.approx(record["aacc"])


def test_training_ends_with_the_same_figures(run):
    at_the_end = json.loads((run / "val.json").read_text())
    later = json.loads((run / "evaluation" / "val" / "metrics.json").read_text())
    for key in ("miou", "confusion", "boundary", "calibration"):
        assert at_the_end[key] == later[key]


def test_the_protocol_names_scales_and_flips_and_another_folder(run, tmp_path, capsys):
    capsys.readouterr()
    main(["val", str(run), "--data", DATA, "--scales", "[0.5,1.0]", "--flip", "--out", str(tmp_path / "e"), "--json",
          "--workers", "0"])  # fmt: skip
    record = json.loads(capsys.readouterr().out)
    assert "scales [0.5, 1.0] and flip" in record["protocol"]
    # The mean of softmaxes of SegViT's scores, which are no logits, is no confidence.
    assert "calibration" not in record
    assert (tmp_path / "e" / "index.html").is_file()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_the_whole_report(run, tmp_path):
    page, picture = run / "evaluation" / "val" / "index.html", tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run([CHROMIUM, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0
    assert shown.stdout.count("<img") == page.read_text().count("<img")
    assert shown.stdout.count("<svg") == page.read_text().count("<svg")
    subprocess.run(
        [CHROMIUM, *flags, "--window-size=1200,3000", f"--screenshot={picture}", page.as_uri()], capture_output=True,
        timeout=120, check=True,
    )  # fmt: skip
    assert picture.stat().st_size > 50_000


def test_a_confident_contradiction_is_a_suspect_and_thin_lines_are_not():
    mask = np.zeros((60, 80), np.uint8)
    labels, sure = mask.copy(), np.full(mask.shape, 0.99, np.float32)
    assert suspicious(3, mask, labels, sure, 255) is None
    labels[10:30, 20:50] = 2
    labels[40:42, :] = 1  # two pixels high
    found = suspicious(3, mask, labels, sure, 255)
    assert found == (3, (10, 30, 20, 50), 0, 2, 600, pytest.approx(0.99))
    assert suspicious(3, mask, labels, sure - (0.99 - SURE) - 0.01, 255) is None  # not sure enough
    mask[10:30, 20:50] = 255
    assert suspicious(3, mask, labels, sure, 255) is None
