"""Opening datasets: descriptions, folders, generated images, and what is said about broken ones."""

import pickle

import numpy as np
import pytest

from segvit.contracts import UserError
from segvit.data.dataset import describe_source, find_pairs, open_dataset, split_by_name
from segvit.data.description import Entry
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
    with pytest.raises(
        UserError, match=r"a\.jpg: JPEG changes pixel values; make the masks PNGs, or set nearest: true"
    ):
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
        ("path: files", "path: none", "none: no such folder; check the path"),
        ("path: files", "path: [", "not valid YAML"),
        ("path: files", "nearest: 1", "nearest: found 1; write true or false"),
        ("path: files", "channels: 0", "channels: found 0; write a whole number"),
        ("path: files", "channels: true", "channels: found True; write a whole number"),
        ("path: files", "range: [1, 1]", r"range: found \[1, 1\]; write the lowest"),
        ("path: files", "range: 255", "range: found 255; write the lowest"),
        ("path: files", "val: 1.5", r"val: 1\.5 is no part of train"),
        ("path: files", "test: 0.2", "test: only val may be a part of train"),
        ("path: files", "test: []", "test: the list is empty"),
        ("path: files", "test: [{images: a, masks: b}, {images: a}]", "test: entry 2: masks: must name a folder"),
        ("train: {images: images,", "train: {list: 3, images: images,", "train: list: must name a text file"),
        ("train: {images: images,", "train: {list: l.txt, images: images,", r"l\.txt: no such file; list:"),
        ("train: {images: images,", "train: {exclude: [0001], images: images,", r"train: exclude: found \[1\]; write"),
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


def pairs(dataset, split):
    return [dataset.name(split, i) for i in range(dataset.count(split))]


def written(path, text):
    """A description of two classes."""
    path.write_text(text + "\nclasses: [ground, roof]\n")
    return path


def test_several_entries_make_one_split(tmp_path):
    for name in ("a/1", "b/1", "b/2"):
        save(tmp_path / f"images/{name}.png", IMAGE)
        save(tmp_path / f"masks/{name}.png", MASK * 0)
    entries = "train: [{images: images/b, masks: masks/b, exclude: ['2']}, {images: images/a, masks: masks/a}]"
    dataset = open_dataset(written(tmp_path / "d.yaml", entries))
    assert pairs(dataset, "train") == ["images/b/1.png", "images/a/1.png"]
    assert dataset.image_path("train", 1) == tmp_path / "images/a/1.png"
    assert dataset.mask_path("train", 1) == tmp_path / "masks/a/1.png"


def test_lists_and_exclusions(tmp_path):
    for name in ("city/a", "city/b.c", "d", "e[1]", "f1", "f2"):
        save(tmp_path / f"images/{name}.png", IMAGE)
        save(tmp_path / f"masks/{name}.png", MASK * 0)
    path = tmp_path / "d.yaml"
    (tmp_path / "l.txt").write_text("d 1\n\n/far/images/city/a.png  x.png\ncity/b.c\nd.png\ne[1]\n")
    (tmp_path / "masks/d.png").rename(tmp_path / "masks/unlisted.png")
    written(path, "train: {images: images, masks: masks, list: l.txt, exclude: [d]}")
    assert pairs(open_dataset(path), "train") == ["images/city/a.png", "images/city/b.c.png", "images/e[1].png"]
    (tmp_path / "images/d.png").unlink()
    (tmp_path / "masks/unlisted.png").unlink()
    written(path, "train: {images: images, masks: masks, exclude: ['e[1]', 'city/*', 'f?', none]}")
    with pytest.raises(UserError, match="images: no images"):
        open_dataset(path)
    written(path, "train: {images: images, masks: masks, list: l.txt}")
    with pytest.raises(UserError, match=r"l\.txt: no file of images for 2 lines such as 'd 1'; take them out"):
        open_dataset(path)
    assert find_pairs(tmp_path, Entry("images", "masks", "l.txt")).lines_alone == ("d 1", "d.png")


def test_a_part_of_train_becomes_val(tmp_path):
    for i in range(30):
        save(tmp_path / f"images/{i}.png", IMAGE)
        save(tmp_path / f"masks/{i}.png", MASK * 0)
    path = written(tmp_path / "d.yaml", "train: {images: images, masks: masks}\nval: 0.3")
    dataset = open_dataset(path)
    train, val = pairs(dataset, "train"), pairs(dataset, "val")
    assert dataset.splits == ("train", "val")
    assert sorted(train + val) == sorted(f"images/{i}.png" for i in range(30))
    assert 3 < len(val) < 15
    for i in range(30, 60):
        save(tmp_path / f"images/{i}.png", IMAGE)
        save(tmp_path / f"masks/{i}.png", MASK * 0)
    more = open_dataset(path)
    assert set(val) <= set(pairs(more, "val"))
    assert set(train) <= set(pairs(more, "train"))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    path.unlink()
    flat = open_dataset(tmp_path)
    assert flat.count("train") + flat.count("val") == 60
    assert describe_source(tmp_path).val_part == 0.2
    written(path, "train: {images: images, masks: masks, exclude: ['?', '??', none], list: l.txt}\nval: 0.3")
    save(tmp_path / "images/last.png", IMAGE)
    save(tmp_path / "masks/last.png", MASK * 0)
    (tmp_path / "l.txt").write_text("last")
    with pytest.raises(UserError, match="train has one image, so no part of it can be val"):
        open_dataset(path)
    written(path, "test: {images: images, masks: masks}\nval: 0.3")
    with pytest.raises(UserError, match="but there is no train"):
        open_dataset(path)


def test_the_part_is_chosen_by_name_alone():
    stems = [f"{i:04d}" for i in range(2000)]
    chosen = split_by_name(stems, 0.2)
    assert 340 < len(chosen) < 460
    assert split_by_name(stems[::-1] + stems, 0.2) == chosen
    assert split_by_name(stems[:500], 0.2) <= chosen <= split_by_name(stems, 0.3)
    assert len(split_by_name(["a", "b"], 1e-9)) == len(split_by_name(["a", "b"], 1 - 1e-9)) == 1
    assert split_by_name(["a", "a"], 0.5) == split_by_name([], 0.5) == set()


def test_jpeg_masks_need_the_nearest_value(tmp_path):
    black_and_white = np.repeat(np.array([[0, 255]], np.uint8), 16, 0).repeat(16, 1)
    save(tmp_path / "images/a.jpg", np.zeros((16, 32, 3), np.uint8))
    save(tmp_path / "masks/a.jpg", black_and_white)
    path = tmp_path / "d.yaml"
    text = "train: {images: images, masks: masks}\nclasses: {0: ground, 1: {name: polyp, values: [255]}}\n"
    path.write_text(text)
    with pytest.raises(UserError, match=r"a\.jpg: JPEG changes pixel values; .* set nearest: true"):
        open_dataset(path)
    path.write_text(text + "nearest: true\n")
    assert (open_dataset(path).read("train", 0).mask == black_and_white // 255).all()
    save(tmp_path / "masks/a.png", black_and_white)  # the exact one is taken
    assert open_dataset(path).mask_path("train", 0).name == "a.png"
    path.write_text(text)
    save(tmp_path / "masks/overview.jpg", black_and_white)  # a picture for people
    assert open_dataset(path).count("train") == 1


def test_jpegs_beside_the_masks_are_images(tmp_path):
    save(tmp_path / "all/a.jpg", IMAGE)
    save(tmp_path / "all/a.png", MASK * 0)
    path = written(tmp_path / "d.yaml", "nearest: true\ntrain: {images: all, masks: all}")
    assert pairs(open_dataset(path), "train") == ["all/a.jpg"]


def test_channels_and_range(tmp_path):
    (tmp_path / "slices").mkdir()
    np.savez(tmp_path / "slices/a.npz", image=np.full((4, 6, 2), 500.0), label=np.zeros((4, 6)))
    path = written(tmp_path / "d.yaml", "train: {images: slices, masks: slices}\nchannels: 2\nrange: [0, 1000]")
    dataset = open_dataset(path)
    assert (dataset.channels, dataset.levels) == (2, (0, 1000))
    sample = dataset.read("train", 0)
    assert sample.image.shape == (4, 6, 2)
    assert (sample.image == 128).all()
    assert open_dataset("synthetic:shapes").channels == 3


def test_what_has_no_counterpart_is_found(tmp_path):
    for name in ("images/a.png", "images/a.jpg", "images/b.png", "masks/a.png", "masks/c.jpg"):
        save(tmp_path / name, IMAGE)
    found = find_pairs(tmp_path, Entry("images", "masks"))
    assert [(stem, image.name, mask.name) for stem, image, mask in found.pairs] == [("a", "a.jpg", "a.png")]
    assert [(stem, path.name) for stem, path in found.images_alone] == [("a", "a.png"), ("b", "b.png")]
    assert [(stem, path.name) for stem, path in found.masks_alone] == [("c", "c.jpg")]


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
