import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from segvit.contracts import UserError
from segvit.data.dataset import open_dataset
from segvit.data.formats.convert import convert
from segvit.data.formats.labelme import read_labelme
from tests.data.formats.maps import SIZE, assert_identical, assert_only_user_errors, example, photo, spoiled
from tests.data.formats.outlines import keyhole, painted

NAMES = ("cat", "dog", "owl")  # alphabetical, as the labels are read


def save(path, image, shapes, **changes):
    entries = {
        "version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": image, "imageData": "A" * 5000,
        "imageHeight": SIZE[0], "imageWidth": SIZE[1], **changes,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries))
    return path


def shape(label, points, kind="polygon", **more):
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}, **more}


def png_mask(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def mask_shape(label, region):
    """A shape of type mask: the PNG of its box, whose two points are included."""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    (top, bottom), (left, right) = rows[[0, -1]].tolist(), columns[[0, -1]].tolist()
    text = png_mask(region[top : bottom + 1, left : right + 1])
    return shape(label, [[left, top], [right, bottom]], "mask", mask=text)


@pytest.mark.parametrize("kind", ["polygon", "mask"])
def test_round_trip(tmp_path, kind):
    root = tmp_path / "in"
    labelled = example({"train": root / "train", "val": root / "val"}, range(4))
    for one in labelled:
        present = [index for index in np.unique(one.ids).tolist() if index]
        shapes = [
            shape(NAMES[index - 1], keyhole(one.ids == index)) if kind == "polygon"
            else mask_shape(NAMES[index - 1], one.ids == index)
            for index in present
        ]  # fmt: skip
        save(one.image.with_suffix(".json"), one.image.name, shapes)
    result = convert(root, tmp_path / "out")
    assert (result.kind, result.images, result.notes) == ("labelme", {"train": 2, "val": 2}, {})
    assert_identical(tmp_path / "out", ("background", *NAMES), labelled)


def test_round_trip_of_painted_parts_with_labels_file_above_255_classes(tmp_path):
    """labels.txt gives the order; JSONs in a folder of their own, with paths as Windows writes them."""
    names = [f"thing {index}" for index in range(299, -1, -1)]
    root = tmp_path / "in"
    labelled = example({"train": root / "images"}, [0, 4, 255, 256, 299])
    for one in labelled:
        shapes = [shape(names[index], outline) for index, outline in painted(one.ids)]
        save(root / "json" / f"{one.image.stem}.json", f"..\\images\\{one.image.name}", shapes)
    (root / "labels.txt").write_text("\n".join(["__ignore__", *names]))
    convert(root, tmp_path / "out", background="ignore")
    assert_identical(tmp_path / "out", names, labelled)


def drawn(tmp_path, *shapes, **options):
    photo(tmp_path / "a.jpg")
    result = convert(save(tmp_path / "a.json", "a.jpg", list(shapes)), tmp_path / "out", **options)
    return open_dataset(tmp_path / "out").read("train", 0).mask, result


def test_rectangles_and_circles(tmp_path):
    mask, _ = drawn(
        tmp_path,
        shape("box", [[20, 15], [10, 5]], "rectangle"),
        shape("disc", [[35.5, 20.5], [35.5, 28.5]], "circle"),
    )
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    expected = np.where((x - 35) ** 2 + (y - 20) ** 2 <= 64, 2, 0)
    expected[5:15, 10:20] = 1
    np.testing.assert_array_equal(mask, expected)


def test_later_shapes_cover_earlier_ones_and_ignore_is_ignored(tmp_path):
    mask, result = drawn(
        tmp_path,
        shape("b", [[0, 0], [20, 20]], "rectangle"),
        shape("a", [[10, 10], [30, 30]], "rectangle"),
        shape("__ignore__", [[25, 25], [30, 30]], "rectangle"),
    )
    assert result.classes.names == ("background", "a", "b")
    assert (mask[10:20, 10:20] == 1).all()
    assert (mask[:10, :20] == 2).all()
    assert (mask[25:30, 25:30] == 255).all()


def test_labelme_background_is_the_background(tmp_path):
    mask, result = drawn(
        tmp_path, shape("a", [[0, 0], [20, 20]], "rectangle"), shape("_background_", [[5, 5], [9, 9]], "rectangle")
    )
    assert result.classes.names == ("_background_", "a")
    assert mask[7, 7] == mask[30, 30] == 0
    assert mask[0, 0] == 1


def test_lines_and_points_are_counted(tmp_path):
    mask, result = drawn(
        tmp_path,
        shape("a", [[0, 0], [20, 20]], "rectangle"),
        shape("b", [[0, 0], [20, 20]], "line"),
        shape("b", [[3, 3]], "point"),
        shape("b", [[3, 3]], "point"),
    )
    assert result.classes.names == ("background", "a")
    assert sorted(result.notes.values()) == [1, 2]
    assert (mask == 1).sum() == 400


SQUARE = [[1, 1], [9, 1], [9, 9]]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([shape("a", SQUARE[:2])], r"a\.json: shape 0: 2 points but 3 or more are needed"),
        ([shape("a", SQUARE), shape("a", [[1, 2, 3], [4, 5, 6]])], "shape 1: the points are no pairs"),
        ([shape("a", SQUARE, "circle")], "a circle has 2 points, not 3"),
        ([shape("a", SQUARE, "blob")], "type 'blob' is unknown"),
        ([shape("a", SQUARE[:2], "blob")], "type 'blob' is unknown"),
        ([shape(7, SQUARE)], "label is 7 but must be text"),
        (["a"], "shape 0: found 'a' where an object is expected"),
        ([shape("a", "SQUARE")], "points is 'SQUARE' but must be a list"),
        ([shape("a", [[1, 1], [5, 5]], "mask", mask="!!")], "the mask is no PNG in base64"),
        ([shape("a", [[1, 1], [5, 5]], "mask", mask="AAAA")], "the mask is no PNG in base64"),
        ([shape("a", [[1, 1], [5, 5]], "mask")], "mask is missing but must be text"),
        ([shape("a", [[1, 1], [5, 5]], "mask", mask=png_mask(np.ones((5, 4), bool)))], "4x5 pixels but its box is 5x5"),
        ("none", "shapes is 'none' but must be a list"),
    ],
)
def test_wrong_shapes(tmp_path, shapes, message):
    photo(tmp_path / "a.jpg")
    path = save(tmp_path / "a.json", "a.jpg", shapes)
    with pytest.raises(UserError, match=message) as caught:
        convert(path, tmp_path / "out", kind="labelme")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imagePath": "b.jpg"}, r"a\.json: no image b\.jpg below"),
        ({"imagePath": None}, "imagePath is None but must be text"),
        ({"imageHeight": 7}, r"says \(height, width\) \(7, 52\) but .*a\.jpg is \(40, 52\)"),
        ({"imageWidth": None}, "imageWidth is None"),
    ],
)
def test_wrong_files(tmp_path, changes, message):
    photo(tmp_path / "a.jpg")
    path = save(tmp_path / "a.json", "a.jpg", [shape("a", SQUARE)], **changes)
    with pytest.raises(UserError, match=message):
        convert(path, tmp_path / "out")


def test_any_wrong_entry_is_reported(tmp_path):
    photo(tmp_path / "a.jpg")
    shapes = [
        shape("a", SQUARE), shape("a", SQUARE[:2], "circle"), shape("a", SQUARE[:2], "rectangle"),
        mask_shape("a", np.eye(*SIZE, dtype=bool)),
    ]  # fmt: skip
    path = save(tmp_path / "a.json", "a.jpg", shapes)

    def read(variant):
        path.write_text(json.dumps(variant))
        return read_labelme(path)

    assert_only_user_errors(read, spoiled(json.loads(path.read_text())))


def test_labels_file_must_list_the_labels(tmp_path):
    (tmp_path / "labels.txt").write_text("cat\n")
    with pytest.raises(UserError, match=r"shape 0: class 'a' is not among those listed \(cat, __ignore__\)"):
        drawn(tmp_path, shape("a", SQUARE))


def test_the_image_data_is_not_kept(tmp_path):
    photo(tmp_path / "a.jpg")
    annotations = read_labelme(save(tmp_path / "a.json", "a.jpg", [shape("a", SQUARE)]))
    assert "AAAA" not in repr(annotations)
    with pytest.raises(UserError, match="no JSON files in it"):
        read_labelme(photo(tmp_path / "empty" / "a.jpg").parent)
