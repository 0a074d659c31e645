import json

import numpy as np
import pytest

from segvit.contracts import UserError
from segvit.data.dataset import open_dataset
from segvit.data.formats.convert import class_table, convert
from segvit.data.formats.shapes import Annotations
from tests.data.folders import two_folders
from tests.data.formats.maps import SIZE, photo


def source(root, *labels):
    """A LabelMe file with a square for each label, from the left top corner along the diagonal."""
    photo(root / "a.jpg")
    shapes = [
        {"label": label, "points": [[5 * i, 5 * i], [5 * i + 5, 5 * i + 5]], "shape_type": "rectangle"}
        for i, label in enumerate(labels)
    ]
    data = {"shapes": shapes, "imagePath": "a.jpg", "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
    (root / "a.json").write_text(json.dumps(data))
    return root / "a.json"


@pytest.mark.parametrize(
    ("labels", "background", "names", "inside", "outside"),
    [
        (["b", "a"], None, ("background", "a", "b"), 2, 0),
        (["b", "a"], "ignore", ("a", "b"), 1, 255),
        (["b", "a"], "grass", ("grass", "a", "b"), 2, 0),
        (["b", "a"], "b", ("a", "b"), 1, 1),
        (["b", "Background"], None, ("Background", "b"), 1, 0),
        ([" b"], None, ("background", "b"), 1, 0),
    ],
)
def test_background(tmp_path, labels, background, names, inside, outside):
    result = convert(source(tmp_path, *labels), tmp_path / "out", background=background)
    assert result.classes.names == names
    mask = open_dataset(tmp_path / "out").read("train", 0).mask
    assert (mask[:5, :5] == inside).all()
    assert (mask[-5:, -5:] == outside).all()


def test_255_classes_stay_8_bits_and_one_more_needs_16():
    names = tuple(map(str, range(254)))
    for more, kind, ignore in ((0, np.uint8, 255), (1, np.uint16, 65535)):
        annotations = Annotations((*names, *["x"] * more), ())
        classes, ids, fill = class_table(annotations, None, "a.json")
        assert ids.dtype == kind
        assert ids[[0, -1]].tolist() == [1, ignore]
        assert (len(classes), fill) == (255 + more, 0)


def test_progress_and_result(tmp_path):
    calls = []
    path = source(tmp_path, "b")
    result = convert(path, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert (result.kind, result.images, result.notes, calls) == ("labelme", {"train": 1}, {}, [(1, 1)])
    assert result.classes == open_dataset(tmp_path / "out").classes


def test_datasets_and_generated_images(tmp_path):
    two_folders(tmp_path / "in", counts={"train": 2, "val": 1})
    result = convert(tmp_path / "in", tmp_path / "out")
    assert (result.kind, result.images, result.notes) == ("dataset", {"train": 2, "val": 1}, {})
    assert convert("synthetic:shapes?train=1&val=1&size=16", tmp_path / "new").images == {"train": 1, "val": 1}
    with pytest.raises(UserError, match="images and background are for annotations"):
        convert(tmp_path / "in", tmp_path / "none", background="ignore")


def test_images_elsewhere(tmp_path):
    path = source(tmp_path / "in", "b")
    (tmp_path / "in" / "a.jpg").rename(photo(tmp_path / "pictures" / "deep" / "a.jpg"))
    with pytest.raises(UserError, match=r"no image a\.jpg below"):
        convert(path, tmp_path / "out")
    assert convert(path, tmp_path / "out", images=tmp_path / "pictures").images == {"train": 1}


def test_the_result_may_not_be_the_source(tmp_path):
    path = source(tmp_path / "images", "b")
    with pytest.raises(UserError, match=r"holds .*a\.jpg, which is to be converted"):
        convert(path, tmp_path / "images", overwrite=True)
    with pytest.raises(UserError, match="which is to be converted"):
        convert(path, tmp_path, overwrite=True)
    assert path.is_file()


def test_an_earlier_result_within_the_source_is_not_read_again(tmp_path):
    source(tmp_path, "b")
    for _ in range(2):
        convert(tmp_path / "a.json", tmp_path / "out", overwrite=True)
    assert open_dataset(tmp_path / "out").count("train") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kind": "coco"}, "categories is missing but must be a list"), ({"background": " "}, "background is empty"),
     ({"images": "none"}, "none: no such folder of images")],
)  # fmt: skip
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        convert(source(tmp_path, "b"), tmp_path / "out", **options)
    with pytest.raises(UserError, match=r"b\.json: no such file"):
        convert(tmp_path / "b.json", tmp_path / "out", kind="coco")


@pytest.mark.parametrize("text", ["", "{", '{"shapes": ', "[" * 5000, "\ud800"])
def test_broken_json(tmp_path, text):
    (tmp_path / "a.json").write_text(text, errors="surrogatepass")
    with pytest.raises(UserError, match=r"a\.json: (not valid JSON|cannot be read)"):
        convert(tmp_path / "a.json", tmp_path / "out", kind="labelme")
