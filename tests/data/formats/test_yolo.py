import numpy as np
import pytest
import yaml

from segvit.contracts import UserError
from segvit.data.dataset import open_dataset
from segvit.data.formats.convert import convert
from tests.data.formats.maps import SIZE, assert_identical, example, photo
from tests.data.formats.outlines import keyhole, painted

NAMES = ("road", "car", "sky")


def line(index, points):
    parts = np.array(points) / (SIZE[1], SIZE[0])
    return " ".join([str(index), *(repr(float(part)) for part in parts.ravel())])


def export(labelled, outlines):
    """labels/x.txt for every images/x.jpg."""
    for one in labelled:
        path = labels_of(one.image)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line(*outline) for outline in outlines(one.ids)) + "\n")


def labels_of(image):
    return image.parents[1].parent / "labels" / image.parent.name / f"{image.stem}.txt"


def of_classes(ids):
    """One polygon a class, classes as the file counts them; id 0 is what no line covers."""
    return [(index - 1, keyhole(ids == index)) for index in np.unique(ids).tolist() if index]


def describe(root, **entries):
    (root / "data.yaml").write_text(yaml.safe_dump({"names": list(NAMES), **entries}))


@pytest.fixture
def dataset(tmp_path):
    root = tmp_path / "in"
    labelled = example({split: root / "images" / split for split in ("train", "val")}, range(4))
    export(labelled, of_classes)
    return root, labelled


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"train": "images/train", "val": "images/val"},
        {"path": "/elsewhere", "train": ["images/train"], "val": "../images/val"},
    ],
)
def test_round_trip(dataset, tmp_path, entries):
    root, labelled = dataset
    describe(root, nc=3, **entries)
    result = convert(root, tmp_path / "out")
    assert (result.kind, result.images, result.notes) == ("yolo", {"train": 2, "val": 2}, {})
    assert_identical(tmp_path / "out", ("background", *NAMES), labelled)


def test_names_by_mapping_and_images_by_list(dataset, tmp_path):
    root, labelled = dataset
    for split in ("train", "val"):
        own = [f"./images/{split}/{one.image.name}" for one in labelled if one.split == split]
        (root / f"{split}.txt").write_text("\n".join(own) + "\n")
    describe(root, names=dict(enumerate(NAMES)), train="train.txt", val="val.txt")
    convert(root / "data.yaml", tmp_path / "out")
    assert_identical(tmp_path / "out", ("background", *NAMES), labelled)


def test_without_yaml(dataset, tmp_path):
    root, labelled = dataset
    (root / "classes.txt").write_text("\n".join(NAMES))
    assert convert(root, tmp_path / "out").kind == "yolo"
    assert_identical(tmp_path / "out", ("background", *NAMES), labelled)


def test_a_folder_for_each_split_and_16_bits(tmp_path):
    """train/images, valid/images with labels/ beside; every pixel in a shape."""
    names = [f"class {index}" for index in range(300)]
    root = tmp_path / "in"
    labelled = example({"train": root / "train" / "images", "val": root / "valid" / "images"}, [0, 3, 254, 255, 299])
    for one in labelled:
        folder = one.image.parents[1] / "labels"
        folder.mkdir(exist_ok=True)
        (folder / f"{one.image.stem}.txt").write_text("\n".join(line(*part) for part in painted(one.ids)))
    (root / "data.yaml").write_text(yaml.safe_dump({"names": names}))
    convert(root, tmp_path / "out", background="ignore")
    assert_identical(tmp_path / "out", names, labelled)


def test_boxes_and_missing_labels_are_counted(tmp_path):
    for name in "ab":
        photo(tmp_path / "images" / f"{name}.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text(f"1 0.5 0.5 {20 / SIZE[1]} {10 / SIZE[0]}\n\n")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    result = convert(tmp_path, tmp_path / "out")
    assert result.images == {"train": 2}
    assert sorted(result.notes.values()) == [1, 1]
    first, second = (open_dataset(tmp_path / "out").read("train", i).mask for i in range(2))
    assert (first[15:25, 16:36] == 2).all()
    assert (first == 2).sum() == 200
    assert not second.any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0.1 0.2 0.3 0.4 0.5 0.6\n3 0.1 0.2 0.3 0.4 0.5 0.6", r"train_0\.txt: line 2: class 3 is none of 0\.\.2"),
        ("-1 0.1 0.2 0.3 0.4 0.5 0.6", "class -1 is none of"),
        ("0 0.1 0.2", "1 points but 2 or more"),
        ("0 0.1 0.2 0.3 0.4 0.5", "no pairs of x and y"),
        ("0 0.1 0.2 0.3 0.4 0.5 x", "no list of numbers"),
        ("0 0.1 0.2 0.3 0.4 0.5 nan", "not finite"),
        ("0 10 20 30 40 50 60", r"outside of 0\.\.1"),
        ("0", "0 points"),
    ],
)
def test_wrong_lines(dataset, tmp_path, text, message):
    root, _ = dataset
    describe(root)
    (root / "labels" / "train" / "train_0.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        convert(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"names": ["a", "b"]}, "class 2 is none of 0"),
        ({"names": {0: "a", 2: "b"}}, "names: is {0: 'a', 2: 'b'} but must list"),
        ({"train": "pictures"}, "train: no folder or list .*pictures"),
    ],
)
def test_wrong_descriptions(dataset, tmp_path, entries, message):
    root, _ = dataset
    describe(root, **entries)
    with pytest.raises(UserError, match=message):
        convert(root, tmp_path / "out", kind="yolo")


def test_missing_parts(dataset, tmp_path):
    root, _ = dataset
    with pytest.raises(UserError, match=r"neither a data\.yaml nor classes\.txt"):
        convert(root, tmp_path / "out")
    describe(root)
    (root / "labels").rename(tmp_path / "labels")
    with pytest.raises(UserError, match="no label file for any of 4 images"):
        convert(root, tmp_path / "out")
    (root / "images").rename(tmp_path / "pictures")
    with pytest.raises(UserError, match="no images"):
        convert(root, tmp_path / "out", kind="yolo")
    describe(root, train=str(tmp_path / "pictures"))
    with pytest.raises(UserError, match="is in no folder called images"):
        convert(root, tmp_path / "out", kind="yolo")


def test_images_elsewhere(dataset, tmp_path):
    root, labelled = dataset
    describe(root)
    moved = tmp_path / "pictures"
    (root / "images").rename(moved)
    convert(root, tmp_path / "out", images=moved)
    there = [one._replace(image=moved / one.split / one.image.name) for one in labelled]
    assert_identical(tmp_path / "out", ("background", *NAMES), there)
