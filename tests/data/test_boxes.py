"""Boxes: COCO's JSON as it is found in the wild, and the boxes of generated shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segvit.contracts import UserError
from segvit.data.boxes import LEAST, SHAPES, open_boxes
from segvit.data.dataset import open_dataset

SYNTHETIC = "synthetic:shapes?train=6&val=2&size=64"


def coco(**changes: Any) -> dict[str, Any]:
    """One image with a cat, a crowd of dogs and a box without width."""
    return {
        "images": [{"id": 7, "file_name": "a.png", "height": 20, "width": 30}],
        "categories": [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [2, 3, 10, 5], "area": 31.5, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 9, "bbox": [0, 0, 30, 20], "iscrowd": 1},
            {"id": 3, "image_id": 7, "category_id": 9, "bbox": [4, 4, 0, 9]},
        ],
    } | changes  # fmt: skip


def write(folder: Path, split: str = "val", **changes: Any) -> Path:
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(folder / "images" / "a.png")
    (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(coco(**changes)))
    return folder


def test_coco(tmp_path: Path) -> None:
    (write(tmp_path) / "annotations" / "captions_val2017.json").write_text("{}")  # beside, and no boxes
    data = open_boxes(str(tmp_path))
    assert data.names == ("cat", "dog")
    assert data.counts == {"val": 1}
    sample = data.read("val", 0)
    assert sample.image.shape == (20, 30, 3)
    assert sample.boxes.corners.tolist() == [[2, 3, 12, 8], [0, 0, 30, 20]]
    assert sample.boxes.labels.tolist() == [0, 1]
    assert sample.boxes.areas.tolist() == [31.5, 600]
    assert sample.boxes.crowd.tolist() == [False, True]


def test_splits_come_from_the_names_of_files(tmp_path: Path) -> None:
    write(tmp_path, "train", annotations=[])
    write(tmp_path, "val")
    data = open_boxes(str(tmp_path))
    assert data.counts == {"train": 1, "val": 1}
    assert data.read("train", 0).boxes.corners.shape == (0, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [{"image_id": 7, "category_id": 3, "bbox": [1, 2, 3]}]}, r"annotations\[0\]: bbox is"),
        ({"annotations": [{"image_id": 7, "category_id": 4, "bbox": [1, 2, 3, 4]}]}, "category_id 4 is not among"),
        ({"images": [{"id": 7, "file_name": "none.png"}]}, "no image none.png below"),
        ({"categories": None}, "categories is None but must be a list"),
    ],
)
def test_mistakes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_boxes(str(write(tmp_path, **changes)))


def test_a_folder_without_annotations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no COCO JSON in it"):
        open_boxes(str(tmp_path))


def test_generated_boxes_are_tight() -> None:
    data, masks = open_boxes(SYNTHETIC), open_dataset(SYNTHETIC)
    assert data.names == ("ball", "box", "tent", "flag", "dice")
    assert data.counts == {"train": 6, "val": 2}
    found = 0
    for i in range(6):
        mask, boxes = masks.read("train", i).mask, data.read("train", i).boxes
        for (left, top, right, bottom), label, area in zip(
            boxes.corners.astype(int), boxes.labels, boxes.areas, strict=True
        ):
            inside = mask[top:bottom, left:right] == SHAPES[label]
            assert min(inside.shape) >= LEAST
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            assert area <= inside.sum()
            found += 1
    assert found >= 6
