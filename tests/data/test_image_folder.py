"""Folders of classes: ids, splits, and one line for each mistake."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segvit.contracts import UserError
from segvit.data.image_folder import open_image_folder


def write(path: Path, level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8, 3), level, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for level, name in enumerate(("train/dog/b.png", "train/cat/a.jpg", "train/cat/more/c.png", "val/dog/d.png")):
        write(tmp_path / name, 50 * level)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    return tmp_path


def test_items_by_class_and_name(folder: Path) -> None:
    data = open_image_folder(folder)
    assert data.names == ("cat", "dog")
    assert [(path.name, label) for path, label in data.items("train")] == [("a.jpg", 0), ("c.png", 0), ("b.png", 1)]
    assert data.name("val", 0) == "val/dog/d.png"
    image, label = data.read("val", 0)
    assert label == 1  # as in train, though val has no cats
    assert image.shape == (6, 8, 3)
    assert image[0, 0, 0] == 150


def test_a_folder_without_train_has_the_classes_of_its_first_split(tmp_path: Path) -> None:
    write(tmp_path / "test" / "a" / "1.png")
    assert list(open_image_folder(tmp_path).splits) == ["test"]


def test_splits_with_classes_of_their_own(folder: Path) -> None:
    write(folder / "test" / "ant" / "e.png", 200)
    write(folder / "test" / "dog" / "f.png", 250)
    with pytest.raises(UserError, match=r"test/ant: train has no class 'ant'"):
        open_image_folder(folder)
    data = open_image_folder(folder, own_classes=True)
    assert data.names == ("cat", "dog", "ant")  # ids of train stay as they are
    assert data.classes("train") == ("cat", "dog")
    assert data.classes("test") == ("dog", "ant")
    assert [label for _, label in data.items("test")] == [2, 1]


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'test'; there are train, val"):
        open_image_folder(folder).items("test")
    (folder / "val" / "dog" / "d.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(UserError, match=r"d\.png: cannot be read as an image"):
        open_image_folder(folder).read("val", 0)
    write(folder / "val" / "bird" / "e.png")
    with pytest.raises(UserError, match=r"val/bird: train has no class 'bird'; it has cat, dog"):
        open_image_folder(folder)
    (folder / "train" / "bird").mkdir()
    with pytest.raises(UserError, match=r"train/bird: no images of this class"):
        open_image_folder(folder)
    empty = tmp_path / "empty"
    with pytest.raises(UserError, match="no such folder"):
        open_image_folder(empty)
    (empty / "images").mkdir(parents=True)
    with pytest.raises(UserError, match="no train, val or test folder"):
        open_image_folder(empty)
    (empty / "train").mkdir()
    with pytest.raises(UserError, match="make one for each class"):
        open_image_folder(empty)
