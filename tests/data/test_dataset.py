"""Opening datasets: descriptions, folders, generated images, and what is said about broken ones."""

import pickle

import numpy as np
import pytest

from segvit.contracts import UserError
from segvit.data.dataset import open_dataset
from segvit.palette import generate_palette
from tests.data.folders import save, two_folders

IMAGE = np.zeros((4, 6, 3), np.uint8)
MASK = np.array([[0, 1, 2, 7, 8, 255]] * 4, np.uint8)
DESCRIPTION = """
path: files
train: {images: images, masks: "labels/{stem}_mask.png"}
classes:
  0: {name: ground, color: [1, 2, 3], values: [1, 2]}
  1: {name: roof, values: [7]}
ignore: [0, 8]
"""


@pytest.fixture
def described(tmp_path):
    save(tmp_path / "files/images/b.jpg", IMAGE)
    save(tmp_path / "files/images/city/a.PNG", IMAGE)
    save(tmp_path / "files/labels/b_mask.png", MASK)
    save(tmp_path / "files/labels/city/a_mask.png", MASK)
    save(tmp_path / "files/labels/b_other.png", MASK)  # not of the template
    (tmp_path / "files/images/notes.txt").write_text("no image")
    path = tmp_path / "dataset.yaml"
    path.write_text(DESCRIPTION)
    return path


def test_description_matches_and_merges(described):
    dataset = open_dataset(described)
    assert dataset.splits == ("train",)
    assert dataset.count("train") == 2
    assert [dataset.name("train", i) for i in range(2)] == ["images/b.jpg", "images/city/a.PNG"]
    assert dataset.classes.names == ("ground", "roof")
    assert dataset.classes.palette == ((1, 2, 3), generate_palette(2)[1])
    sample = dataset.read("train", 1)
    assert sample.mask[0].tolist() == [255, 0, 0, 1, 255, 255]
    assert sample.name == "images/city/a.PNG"
    folder = open_dataset(str(described.parent))
    assert folder.name("train", 1) == sample.name
    assert pickle.loads(pickle.dumps(folder)).read("train", 0).mask.shape == (4, 6)
    with pytest.raises(UserError, match="no split 'val'; there are train"):
        dataset.count("val")


def test_colour_masks(tmp_path):
    save(tmp_path / "images/a.png", IMAGE)
    save(tmp_path / "masks/a.png", np.array([[[9, 8, 7]] * 5 + [[0, 0, 0]]] * 4, np.uint8))
    path = tmp_path / "data.yaml"
    path.write_text(
        "train: {images: images, masks: masks}\nclasses: {0: {name: a, values: [[9, 8, 7]]}}\nignore: [[0, 0, 0]]\n"
    )
    assert open_dataset(tmp_path).read("train", 0).mask[0].tolist() == [0] * 5 + [255]


def test_two_folders(tmp_path):
    root = two_folders(tmp_path, counts={"train": 3, "val": 2})
    (root / "classes.txt").write_text("road\t128 64 128\ncar\nsky\n")
    dataset = open_dataset(root)
    assert dataset.splits == ("train", "val")
    assert (dataset.count("train"), dataset.count("val")) == (3, 2)
    assert dataset.classes.names == ("road", "car", "sky")
    assert dataset.classes.palette[0] == (128, 64, 128)
    assert dataset.read("val", 1).image.shape == (20, 24, 3)


def test_images_and_masks_in_one_folder(tmp_path):
    save(tmp_path / "all/a.png", IMAGE)
    save(tmp_path / "all/a_mask.png", MASK * 0)
    path = tmp_path / "d.yml"
    path.write_text('train: {images: all, masks: "all/{stem}_mask.png"}\nclasses: [ground]\n')
    assert open_dataset(path).name("train", 0) == "all/a.png"


def test_orphans_and_twins_are_named(tmp_path):
    root = two_folders(tmp_path, counts={"train": 6})
    for i in range(4):
        (root / f"masks/train/{i}.png").unlink()
    with pytest.raises(UserError, match=r"4 images have no mask: 0\.png, 1\.png, 2\.png, \.\.\."):
        open_dataset(root)
    for i in range(5):
        (root / f"images/train/{i}.png").unlink()
    with pytest.raises(UserError, match=r"1 masks have no image: 4\.png"):
        open_dataset(root)
    save(root / "images/train/5.jpg", IMAGE)
    with pytest.raises(UserError, match=r"5\..*has the same stem as 5\.(png|jpg)"):
        open_dataset(root)


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(UserError, match=r"neither a dataset\.yaml nor folders images/train"):
        open_dataset(tmp_path)
    (tmp_path / "images/train").mkdir(parents=True)
    with pytest.raises(UserError, match=r"classes\.txt is missing; write one class name a line"):
        open_dataset(tmp_path)
    (tmp_path / "classes.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"masks/train: no such folder"):
        open_dataset(tmp_path)
    (tmp_path / "masks/train").mkdir(parents=True)
    with pytest.raises(UserError, match="images/train: no images"):
        open_dataset(tmp_path)
    save(tmp_path / "images/train/a.png", IMAGE)
    with pytest.raises(UserError, match="masks/train: no masks; put PNG files there"):
        open_dataset(tmp_path)
    save(tmp_path / "masks/train/a.jpg", IMAGE)
    with pytest.raises(UserError, match="no masks; JPEG changes pixel values"):
        open_dataset(tmp_path)
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        open_dataset(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="not a dataset; give a folder"):
        open_dataset(tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_text("\n")
    with pytest.raises(UserError, match=r"classes\.txt is empty"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("path: files", "path: none", "none: no such folder; check path:"),
        ("path: files", "path: [", "not valid YAML"),
        ("path: files", "root: files", r"unknown keys \['root'\]"),
        ("train: {images: images,", "train: {image: images,", r"train: unknown keys \['image'\]"),
        ("train: {images: images,", "train: {images: 3,", "train: images: must name a folder"),
        ("train: {images:", "fit: {images:", "unknown keys"),
        ("name: roof", "name: no", "the name False is not text"),
        ("name: roof", "name: ground", r"names \['ground'\] occur twice"),
        ("  1: {name", "  2: {name", "ids must be 0, 1, 2"),
        ("values: [7]", "values: 7", r"classes: 1: values: found 7; write a list"),
        ("values: [7]", "values: [7, 2]", "value 2 is in class 1 and in class 0"),
        ("values: [7]", "values: [0]", "value 0 is in class 1 and in ignore:"),
        ("values: [7]", "values: [70000]", "70000 cannot stand in a mask"),
        ("values: [7]", "values: [[1, 2]]", "is no colour"),
        ("values: [7]", "values: [[1, 2, 3]]", "values mix numbers"),
        ("color: [1, 2, 3]", "color: [1, 2, 300]", "0: color: .* is no colour"),
    ],
)
def test_descriptions_are_checked(described, old, new, message):
    text = described.read_text()
    assert old in text
    described.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(described)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("", "mapping is expected"), ("train: {}", "no classes")])
def test_descriptions_without_content(tmp_path, text, message):
    (tmp_path / "dataset.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path)


def test_generated_datasets_by_name():
    dataset = open_dataset("synthetic:shapes?train=7&val=2&size=32&seed=3")
    assert (dataset.count("train"), dataset.count("val")) == (7, 2)
    assert dataset.read("val", 0).mask.shape == (32, 32)
    for source in (
        "synthetic:cats",
        "synthetic:shapes?colour=1",
        "synthetic:shapes?size=big",
        "synthetic:shapes?size=3",
    ):
        with pytest.raises(UserError):
            open_dataset(source)


def test_palette_is_distinct_and_grows_at_its_end():
    palette = generate_palette(600)
    assert len(set(palette)) == 600
    assert (0, 0, 0) not in palette
    assert generate_palette(5) == palette[:5]
    assert all(0 <= part <= 255 for color in palette for part in color)
