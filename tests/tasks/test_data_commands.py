"""segvit data ...: what the commands write and refuse, over small folders."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from segvit.cli import main
from segvit.contracts import UserError
from segvit.data.dataset import open_dataset
from segvit.tasks.dense import train
from tests.data.folders import save
from tests.tasks.tiny import experiment


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def binary(tmp_path):
    """Images and masks without splits, the masks 0 and 255."""
    shapes, root = open_dataset("synthetic:shapes?train=8&val=1&size=32"), tmp_path / "my_data"
    for i in range(8):
        sample = shapes.read("train", i)
        save(root / "images" / f"{i}.png", sample.image)
        save(root / "masks" / f"{i}.png", np.where(sample.mask > 2, 255, 0).astype(np.uint8))
    return root


def call(*arguments, code=0):
    found = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        found = stop.code or 0
    assert found == code


def test_check_reports_in_text_json_and_pictures(binary, capsys):
    call("data", "check", binary, code=1)
    text = capsys.readouterr().out
    assert "values {0, 255} in 8 of 8 masks: two-class masks stored as 0/255; write values: [255]" in text
    assert "values: [255]" in text
    report = json.loads((binary.parent / "data_report" / "report.json").read_text())
    assert not report["healthy"]
    assert {row["value"]: row["masks"] for row in report["values"]} == {"0": 8, "255": 8}
    assert sum(row["pixels"] for row in report["values"]) == 8 * 32 * 32
    page = (binary.parent / "data_report" / "index.html").read_text()
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    assert page.count("data:image/") >= 12
    assert "two-class masks stored as 0/255" in page
    call("data", "check", binary, "--json", code=1)
    assert json.loads(capsys.readouterr().out)["healthy"] is False


def test_init_writes_what_trains_and_keeps_the_old_file(binary, capsys):
    call("data", "init", binary)
    assert yaml.safe_load((binary / "dataset.yaml").read_text())["classes"][1]["values"] == [255]
    call("data", "check", binary)
    assert "ready to train" in capsys.readouterr().out
    before = (binary / "dataset.yaml").read_bytes()
    call("data", "init", binary, code=2)
    assert "is there already" in capsys.readouterr().err
    (binary / "dataset.yaml").write_text(before.decode().replace("[255]", "[254]"))
    call("data", "init", binary, "--overwrite")
    assert b"[254]" in (binary / "dataset.yaml.bak").read_bytes()
    assert set(np.unique(open_dataset(binary).read("val", 0).mask)) <= {0, 1}


def test_train_refuses_with_the_doctors_sentence_and_can_be_told_not_to(binary, tmp_path):
    call("data", "init", binary)
    (binary / "masks" / "3.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"1 of 8 masks cannot be read: masks/3.png .*segvit data check"):
        train(experiment(tmp_path / "run", data=str(binary), steps=1))
    assert not (tmp_path / "run").exists()
    description = (binary / "dataset.yaml").read_text().replace("masks: masks", "masks: masks\n  exclude: ['3']")
    (binary / "dataset.yaml").write_text(description)
    train(experiment(tmp_path / "run", data=str(binary), steps=1))
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["check"]["healthy"]
    assert report["splits"]["train"] + report["splits"]["val"] == 7


def test_convert_says_what_it_made(tmp_path, capsys):
    picture = np.zeros((20, 30, 3), np.uint8)
    save(tmp_path / "in" / "images" / "a.png", picture)
    annotations = {
        "images": [{"id": 1, "file_name": "a.png", "width": 30, "height": 20}],
        "categories": [{"id": 7, "name": "nut"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "segmentation": [[5, 5, 15, 5, 15, 10, 5, 10]], "iscrowd": 0}
        ],
    }
    (tmp_path / "in" / "coco.json").write_text(json.dumps(annotations))
    call("data", "convert", tmp_path / "in" / "coco.json", "--out", tmp_path / "out", "--images",
         tmp_path / "in" / "images")  # fmt: skip
    said = capsys.readouterr().out
    assert "1 train images from coco, 2 classes: background, nut" in said
    mask = np.array(Image.open(next((tmp_path / "out" / "masks").rglob("*.png"))))
    assert (mask == 1).sum() == 50
    call("data", "convert", tmp_path / "nowhere", "--out", tmp_path / "out2", code=2)


def test_stats_count_pixels_and_images(binary, capsys):
    call("data", "init", binary)
    capsys.readouterr()
    call("data", "stats", binary, "--json")
    report = json.loads(capsys.readouterr().out)
    dataset = open_dataset(binary)
    for split in ("train", "val"):
        masks = [dataset.read(split, i).mask for i in range(dataset.count(split))]
        counts = np.bincount(np.concatenate([mask.ravel() for mask in masks]), minlength=2)
        assert [row["pixels"] for row in report["splits"][split]["classes"]] == counts.tolist()
        assert [row["images"] for row in report["splits"][split]["classes"]] == [
            sum(int((mask == i).any()) for mask in masks) for i in range(2)
        ]
    images = [dataset.read("train", i).image for i in range(dataset.count("train"))]
    mean = np.concatenate([image.reshape(-1, 3) for image in images]).mean(0) / 255
    np.testing.assert_allclose(report["levels"]["mean"], mean, atol=1e-3)
    call("data", "stats", "synthetic:shapes?train=3&val=1&size=16", "--images", "0")
    assert "grass" in capsys.readouterr().out


def test_preview_draws_sheets_of_any_size(binary, tmp_path, capsys):
    call("data", "init", binary)
    capsys.readouterr()
    call("data", "preview", binary, "--out", tmp_path / "sheets", "--count", 13)
    written = capsys.readouterr().out.split()
    assert len(written) == 1  # there are fewer than 12 images
    with Image.open(written[0]) as sheet:
        assert sheet.width == 1260
        assert sheet.height > 300
    call("data", "preview", binary, "--split", "test", code=2)
    assert "no images in split 'test'" in capsys.readouterr().err


def test_a_source_by_name_is_checked_too(binary, tmp_path, capsys):
    for kind in ("images", "masks"):
        shutil.copytree(binary / kind, tmp_path / "Kvasir-SEG" / kind)
    call("data", "check", f"kvasir_seg:{tmp_path / 'Kvasir-SEG'}")
    assert "polyp" in capsys.readouterr().out
