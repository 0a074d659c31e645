import json

import numpy as np
import pytest

from segvit.contracts import UserError
from segvit.data.dataset import open_dataset
from segvit.data.formats.convert import convert
from segvit.data.formats.label_studio import read_label_studio
from tests.data.formats.maps import SIZE, assert_identical, assert_only_user_errors, example, photo, spoiled
from tests.data.formats.outlines import brush_code, keyhole, painted

NAMES = ("cat", "dog", "owl")  # alphabetical, as they are read


def region(kind, label, value, **more):
    key = f"{kind}labels"
    return {
        "id": "r1", "type": key, "from_name": "label", "to_name": "image", "image_rotation": 0,
        "original_width": SIZE[1], "original_height": SIZE[0], "value": {**value, key: [label]}, **more,
    }  # fmt: skip


def percent(points):
    return (np.array(points) / (SIZE[1], SIZE[0]) * 100).tolist()


def polygon(label, points):
    return region("polygon", label, {"points": percent(points), "closed": True})


def brush(label, pixels):
    return region("brush", label, {"format": "rle", "rle": brush_code(np.repeat(pixels.ravel() * np.uint8(255), 4))})


def task(image, results, number=1):
    return {"id": number, "data": {"image": image}, "annotations": [{"id": 9, "result": results}], "predictions": []}


def save(path, tasks):
    path.write_text(json.dumps(tasks))
    return path


@pytest.mark.parametrize("kind", [polygon, brush], ids=["polygon", "brush"])
def test_round_trip(tmp_path, kind):
    labelled = example({"train": tmp_path / "in" / "images"}, range(4), per_split=3)
    tasks = []
    for one in labelled:
        present = np.unique(one.ids[one.ids > 0]).tolist()
        shapes = [(NAMES[index - 1], one.ids == index) for index in present]
        results = [kind(label, part if kind is brush else keyhole(part)) for label, part in shapes]
        tasks.append(task(f"/data/upload/4/0a1b2c3d-{one.image.name}", results))
    save(tmp_path / "in" / "project-4.json", tasks)
    result = convert(tmp_path / "in", tmp_path / "out")
    assert (result.kind, result.images, result.notes) == ("label_studio", {"train": 3}, {})
    assert_identical(tmp_path / "out", ("background", *NAMES), labelled)


def test_round_trip_of_painted_parts_above_255_classes(tmp_path):
    names = [f"class {index:03d}" for index in range(300)]
    labelled = example({"train": tmp_path / "in"}, [0, 4, 255, 256, 299])
    tasks = []
    for one in labelled:
        # Only labels that occur are known from an export, so all occur: below the others, hidden by them.
        hidden = [polygon(name, [(0, 0), (1, 0), (0, 1)]) for name in names]
        tasks.append(task(one.image.name, hidden + [polygon(names[i], outline) for i, outline in painted(one.ids)]))
    convert(save(tmp_path / "in" / "a.json", tasks), tmp_path / "out", background="ignore")
    assert_identical(tmp_path / "out", names, labelled)


@pytest.mark.parametrize(
    "address",
    [
        "a.jpg", "sub/a.jpg", "/data/local-files/?d=anything/sub/a.jpg", "s3://bucket/x%20y/a.jpg",
        "https://host/sub/a.jpg?token=1", "/data/upload/1/01234567-a.jpg",
    ],
)  # fmt: skip
def test_addresses_of_images(tmp_path, address):
    photo(tmp_path / "in" / "sub" / "a.jpg")
    path = save(tmp_path / "in" / "a.json", [task(address, [polygon("a", [(0, 0), (9, 0), (0, 9)])])])
    assert convert(path, tmp_path / "out").images == {"train": 1}


def drawn(tmp_path, *results, **options):
    photo(tmp_path / "a.jpg")
    result = convert(save(tmp_path / "a.json", [task("a.jpg", list(results))]), tmp_path / "out", **options)
    return open_dataset(tmp_path / "out").read("train", 0).mask, result


def test_rectangles_turn_about_their_corner_and_ellipses_about_their_centre(tmp_path):
    width, height = SIZE[1] / 100, SIZE[0] / 100
    box = {"x": 20 / width, "y": 10 / height, "width": 12 / width, "height": 6 / height, "rotation": 90}
    disc = {"x": 36.5 / width, "y": 20.5 / height, "radiusX": 4 / width, "radiusY": 9 / height, "rotation": 90}
    mask, _ = drawn(tmp_path, region("rectangle", "a", box), region("ellipse", "b", disc))
    expected = np.zeros(SIZE, int)
    expected[10:22, 14:20] = 1
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    expected[((x - 36) / 9) ** 2 + ((y - 20) / 4) ** 2 <= 1] = 2
    np.testing.assert_array_equal(mask, expected)


def test_what_is_left_out_is_counted(tmp_path):
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "b.jpg")
    square = percent([(0, 0), (8, 0), (8, 8), (0, 8)])
    tasks = [
        task("a.jpg", [
            {"type": "choices", "value": {"choices": ["good"]}},
            {"type": "relation", "from_id": "a", "to_id": "b"},
            region("keypoint", "nose", {"x": 1, "y": 2, "width": 0.3}),
            {"type": "polygon", "id": "p", "value": {"points": square}},
            {"type": "labels", "id": "p", "value": {"points": square, "labels": ["a"]},
             "original_width": SIZE[1], "original_height": SIZE[0]},
        ]),
        {"id": 2, "data": {"image": "b.jpg"}, "annotations": [{"was_cancelled": True, "result": []}]},
    ]  # fmt: skip
    tasks[0]["annotations"] += [{"result": []}]
    result = convert(save(tmp_path / "a.json", tasks), tmp_path / "out")
    assert result.images == {"train": 1}
    assert result.notes == {
        "results of type choices, left out since they cover no area": 1,
        "results of type relation, left out since they cover no area": 1,
        "results of type keypointlabels, left out since they cover no area": 1,
        "regions without a label, left out": 1,
        "tasks without an annotation, left out": 1,
        "further annotations of a task, left out": 1,
    }
    assert (open_dataset(tmp_path / "out").read("train", 0).mask[:8, :8] == 1).all()


TRIANGLE = [(0, 0), (9, 0), (0, 9)]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (polygon("a", TRIANGLE[:2]), r"a\.json: task 1: region r1: 2 points but 3"),
        (polygon("a", TRIANGLE) | {"original_width": 7}, r"drawn on \(height, width\) \(40, 7\) but .*a\.jpg is \(40"),
        (polygon("a", TRIANGLE) | {"original_width": None}, "original_width is None"),
        (polygon("a", TRIANGLE) | {"image_rotation": 90}, "the image was turned in the tool by 90"),
        (region("polygon", "a", {"points": "x"}), "points is 'x' but must be a list"),
        (region("brush", "a", {"rle": [1, 2, 3]}), "breaks off"),
        (region("brush", "a", {"rle": brush_code(np.zeros(4, np.uint8))}), "holds 4 values of 8 bits"),
        (region("ellipse", "a", {"x": 1, "y": 1, "radiusX": 0, "radiusY": 1}), "radius of 0 or less"),
        (region("rectangle", "a", {"x": "?", "y": 1, "width": 3, "height": 1}), "x is '?"),
        (polygon("a", TRIANGLE) | {"value": {"points": [], "polygonlabels": ["a", "b"]}}, "needs exactly one"),
    ],
)  # fmt: skip
def test_wrong_regions(tmp_path, result, message):
    with pytest.raises(UserError, match=message) as caught:
        drawn(tmp_path, result)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a": 1}, "not a list of tasks"),
        ([{"image": "a.jpg", "label": [{"polygonlabels": ["a"]}]}], "not as JSON-MIN"),
        ([7], "task 0: found 7 where an object is expected"),
        ([task("none.jpg", [])], r"task 1: no image none\.jpg below"),
        ([task("", [])], "the name of the image is ''"),
        ([task("a.jpg", None)], "result is None but must be a list"),
        ([task("a.jpg", [])], "no class has a shape"),
        ([], "holds no annotated image"),
    ],
)
def test_wrong_files(tmp_path, data, message):
    photo(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=message):
        convert(save(tmp_path / "a.json", data), tmp_path / "out", kind="label_studio", background="ignore")


def test_any_wrong_entry_is_reported(tmp_path):
    photo(tmp_path / "a.jpg")
    box = {"x": 1, "y": 2, "width": 30, "height": 40, "rotation": 5}
    disc = {"x": 10, "y": 20, "radiusX": 3, "radiusY": 4, "rotation": 5}
    results = [polygon("a", TRIANGLE), region("rectangle", "b", box), region("ellipse", "b", disc),
               brush("c", np.zeros(SIZE, bool))]  # fmt: skip

    def read(variant):
        return read_label_studio(save(tmp_path / "a.json", variant))

    assert_only_user_errors(read, spoiled([task("a.jpg", results)]))


def test_one_file_in_the_folder(tmp_path):
    with pytest.raises(UserError, match="0 JSON files in it"):
        convert(tmp_path, tmp_path / "out", kind="label_studio")
