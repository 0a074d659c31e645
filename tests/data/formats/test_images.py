from pathlib import Path

import pytest
from PIL import Image

from segvit.contracts import UserError
from segvit.data.formats.images import ImageFinder, image_root, split_of, stems, upright_size
from tests.data.formats.maps import SIZE, photo


def find(root, name, near=None, split="train"):
    return ImageFinder(root).find(name, near=near or root, split=split, where="a.json: image 1").relative_to(root)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.jpg", "x/a.jpg"),  # by its name
        ("x/a.jpg", "x/a.jpg"),
        ("/mnt/disk/x/a.jpg", "x/a.jpg"),  # of another machine
        ("c:\\data\\x\\a.jpg", "x/a.jpg"),
        ("y/b.jpg", "y/b.jpg"),  # its folder decides
        ("deep/z/b.jpg", "z/b.jpg"),
        ("../x/a.jpg", "x/a.jpg"),
    ],
)
def test_finds_by_the_end_of_the_name(tmp_path, name, found):
    for path in ("x/a.jpg", "y/b.jpg", "z/b.jpg"):
        photo(tmp_path / path)
    assert find(tmp_path, name) == Path(found)


def test_prefers_beside_the_annotations_then_the_split(tmp_path):
    for path in ("train2017/a.jpg", "val2017/a.jpg", "other/a.jpg"):
        photo(tmp_path / path)
    assert find(tmp_path, "a.jpg", near=tmp_path / "other") == Path("other/a.jpg")
    assert find(tmp_path, "a.jpg", split="val") == Path("val2017/a.jpg")
    with pytest.raises(UserError, match=r"a\.json: image 1: a\.jpg may be .*other/a\.jpg or .*train2017/a\.jpg"):
        find(tmp_path, "a.jpg", split="test")


@pytest.mark.parametrize(
    ("name", "message"),
    [("b.jpg", r"no image b\.jpg below"), ("", "name of the image is ''"), ("x\0", "name of the image"),
     ("notes.txt", r"notes\.txt is none of \.jpg")],
)  # fmt: skip
def test_what_cannot_be_found(tmp_path, name, message):
    photo(tmp_path / "a.jpg")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=message):
        find(tmp_path, name)


def test_the_folder_must_exist(tmp_path):
    with pytest.raises(UserError, match="no such folder of images"):
        ImageFinder(tmp_path / "none")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("instances_val2017.json", "val"), ("annotations/panoptic_train2017.json", "train"), ("test.json", "test"),
        ("valid/_annotations.coco.json", "val"), ("validation/x.json", "val"), ("training/a/x.json", "train"),
        ("trainval.json", "train"), ("train_val.json", "train"), ("latest/x.json", "train"),
        ("test_x0/a.json", "train"),
        ("val/train.json", "train"), ("x.json", "train"), ("VAL/x.json", "val"), ("contest.json", "train"),
    ],
)  # fmt: skip
def test_split_of(path, split):
    assert split_of(Path(path)) == split


def test_image_root(tmp_path):
    photo(tmp_path / "a.jpg")
    for name in ("annotations", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.json").write_text("")
    assert image_root(tmp_path) == tmp_path
    assert image_root(tmp_path / "annotations" / "a.json") == tmp_path
    assert image_root(tmp_path / "other" / "a.json") == tmp_path / "other"


def test_upright_size(tmp_path):
    assert upright_size(photo(tmp_path / "a.jpg")) == SIZE
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "b.jpg", exif=exif)
    assert upright_size(tmp_path / "b.jpg") == (30, 20)
    (tmp_path / "c.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"c\.jpg: cannot be read as an image"):
        upright_size(tmp_path / "c.jpg")


def test_stems_keep_folders_only_where_they_differ():
    assert stems([Path("d/x.jpg"), Path("d/y.z.png")]) == ["x", "y.z"]
    assert stems([Path("d/a/x.jpg"), Path("d/b/x.jpg"), Path("d/b/c/y.jpg")]) == ["a/x", "b/x", "b/c/y"]
    assert stems([Path("d/a/x.jpg")]) == ["x"]
    assert stems([]) == []
    with pytest.raises(UserError, match=r"d/x\.jpg and d/x\.png would get the same mask x\.png"):
        stems([Path("d/x.jpg"), Path("d/x.png")])
