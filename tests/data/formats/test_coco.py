import json

import numpy as np
import pytest
from PIL import Image

from segvit.contracts import UserError
from segvit.data.dataset import open_dataset
from segvit.data.formats.coco import read_coco, read_coco_panoptic
from segvit.data.formats.convert import convert
from tests.data.formats.maps import SIZE, assert_identical, assert_only_user_errors, blobs, example, photo, spoiled
from tests.data.formats.outlines import coco_text, keyhole, loops, painted, runs

IDS = (0, 1, 2, 3)
NAMES = ("background", "road", "car", "sky")
CATEGORIES = {1: 7, 2: 31, 3: 90}  # id -> category id, with gaps as in COCO


def outline(ids, index, kind):
    """The segmentation of all pixels of a class."""
    region = ids == index
    counts = runs(region.T.ravel())
    size = list(region.shape)
    return {
        "keyhole": [[number for point in keyhole(region) for number in point]] if region.any() else [],
        "counts": {"size": size, "counts": counts},
        "text": {"size": size, "counts": coco_text(counts)},
    }[kind]


def export(path, labelled, kind="keyhole", categories=CATEGORIES, names=NAMES):
    images, annotations = [], []
    for place, one in enumerate(labelled, 50):
        number = place if kind == "text" else one.image.stem  # both occur in the wild
        images.append(listed(number, one.image.name))
        for index in np.unique(one.ids).tolist():
            if index in categories:
                annotations.append({
                    "id": len(annotations), "image_id": number, "category_id": categories[index], "iscrowd": 0,
                    "segmentation": outline(one.ids, index, kind),
                })  # fmt: skip
    entries = [{"id": key, "name": names[index]} for index, key in reversed(categories.items())]
    write(path, {"images": images, "annotations": annotations, "categories": entries})


def listed(number, name, size=SIZE):
    return {"id": number, "file_name": name, "height": size[0], "width": size[1]}


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def dataset(tmp_path):
    """The layout of COCO itself: annotations/instances_*.json, train2017/, val2017/."""
    root = tmp_path / "coco"
    labelled = example({"train": root / "train2017", "val": root / "val2017"}, IDS)
    for split in ("train", "val"):
        own = [one for one in labelled if one.split == split]
        export(root / "annotations" / f"instances_{split}2017.json", own)
    return root, labelled


@pytest.mark.parametrize("kind", ["keyhole", "counts", "text"])
def test_round_trip(dataset, tmp_path, kind):
    root, labelled = dataset
    for split in ("train", "val"):
        own = [one for one in labelled if one.split == split]
        export(root / "annotations" / f"instances_{split}2017.json", own, kind)
        write(
            root / "annotations" / f"person_keypoints_{split}2017.json",
            {"images": [], "annotations": [], "categories": []},
        )
        write(root / "annotations" / f"captions_{split}2017.json", {"images": [], "annotations": []})
    result = convert(root, tmp_path / "out")
    assert result.kind == "coco"
    assert result.images == {"train": 2, "val": 2}
    assert result.notes == {}
    assert_identical(tmp_path / "out", NAMES, labelled)


def test_round_trip_of_painted_parts_above_255_classes(tmp_path):
    """Annotations in painting order, a part of it as union of polygons; ids of 16 bits."""
    names = tuple(f"class {index}" for index in range(300))
    labelled = example({"train": tmp_path / "in"}, [0, 7, 255, 256, 299])
    annotations = []
    for number, one in enumerate(labelled):
        for index, polygon in painted(one.ids):
            flat = [part for point in polygon for part in point]
            annotations.append({"image_id": number, "category_id": index, "segmentation": [flat, flat]})
    write(tmp_path / "in" / "labels.json", {
        "images": [listed(number, one.image.name) for number, one in enumerate(labelled)],
        "annotations": annotations,
        "categories": [{"id": index, "name": name} for index, name in enumerate(names)],
    })  # fmt: skip
    convert(tmp_path / "in" / "labels.json", tmp_path / "out", kind="coco", background="ignore")
    assert_identical(tmp_path / "out", names, labelled)


def test_polygons_of_one_annotation_are_a_union(tmp_path):
    photo(tmp_path / "a.jpg")
    square = [2, 2, 12, 2, 12, 12, 2, 12]
    data = single({"segmentation": [square, [6, 6, 16, 6, 16, 16, 6, 16]]})
    mask = drawn(write(tmp_path / "a.json", data))
    assert mask.sum() == 100 + 100 - 36


def test_crowds_lie_below_single_objects(tmp_path):
    photo(tmp_path / "a.jpg")
    one = {"segmentation": [[2, 2, 12, 2, 12, 12, 2, 12]], "category_id": 5}
    crowd = {"segmentation": {"size": list(SIZE), "counts": [0, SIZE[0] * SIZE[1]]}, "category_id": 9, "iscrowd": 1}
    mask = drawn(write(tmp_path / "a.json", single(one, crowd)))
    assert (mask == 1).sum() == 100
    assert (mask == 2).sum() == mask.size - 100


def test_boxes_without_outline_are_counted(tmp_path):
    photo(tmp_path / "a.jpg")
    write(tmp_path / "a.json", single({"bbox": [1, 2, 3, 4]}, {"segmentation": []}))
    result = convert(tmp_path / "a.json", tmp_path / "out")
    assert result.notes == {"annotations without an outline (boxes only), left out": 2}


def single(*annotations):
    """One image a.jpg with annotations of category 5 unless they say otherwise."""
    return {
        "images": [listed(1, "a.jpg")],
        "annotations": [{"id": i, "image_id": 1, "category_id": 5, **entry} for i, entry in enumerate(annotations)],
        "categories": [{"id": 5, "name": "thing"}, {"id": 9, "name": "other"}],
    }


def drawn(path):
    convert(path, path.parent / "out")
    return open_dataset(path.parent / "out").read("train", 0).mask


def test_roboflow_layout(tmp_path):
    """A JSON beside the images in the folder of each split."""
    folders = {"train": tmp_path / "in" / "train", "val": tmp_path / "in" / "valid", "test": tmp_path / "in" / "test"}
    labelled = example(folders, IDS, per_split=1)
    for one in labelled:
        export(one.image.parent / "_annotations.coco.json", [one])
    assert convert(tmp_path / "in", tmp_path / "out").images == {"train": 1, "val": 1, "test": 1}
    assert_identical(tmp_path / "out", NAMES, labelled)


SQUARE = [[2, 2, 12, 2, 12, 12, 2, 12]]


def broken(**changes):
    return {**single({"segmentation": SQUARE}), **changes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (single({"segmentation": [[1, 2, 3, 4]]}), r"a\.json: image 1 \(a\.jpg\): annotation 0: 2 points but 3"),
        (single({"segmentation": [[1, 2, 3, 4, 5]]}), "no pairs of x and y"),
        (single({"segmentation": [1, 2, 3, 4, 5, 6]}), "no pairs of x and y"),
        (single({"segmentation": [[1, 2, 3, 4, 5, "a"]]}), "no list of numbers"),
        (single({"segmentation": [[1, 2, 3, 4, 5, 1e999]]}), "not finite"),
        (single({"segmentation": {"size": [40, 52], "counts": [3, 4]}}), "covers 7 pixels but 52x40 are 2080"),
        (single({"segmentation": {"size": [4, 5], "counts": [20]}}), r"\(4, 5\) but the image is \(40, 52\)"),
        (single({"segmentation": {"counts": [20]}}), "size is missing but must be a list"),
        (single({"segmentation": SQUARE, "category_id": 6}), "category_id 6 is not among the categories"),
        (single({"segmentation": SQUARE, "category_id": True}), "category_id is True but must be a whole number"),
        (broken(images=[listed(1, "a.jpg", (52, 40))]), r"says \(height, width\) \(52, 40\)"),
        (broken(images=[listed(1, "b.jpg")]), r"images\[0\]: no image b\.jpg below"),
        (broken(images=[listed(2, "a.jpg")]), "annotations of image 1"),
        (broken(images=[listed(1, "a.jpg"), listed(1, "a.jpg")]), r"images\[1\]: id 1 stands before another image"),
        (broken(images=["a.jpg"]), r"images\[0\]: found 'a\.jpg' where an object"),
        (broken(annotations=None), "annotations is None but must be a list"),
        (broken(categories=[{"id": 5, "name": "a"}, {"id": 5, "name": "b"}]), "id 5 is 'b' here but 'a' before"),
        (broken(categories=[{"id": 5, "name": "a"}, {"id": 6, "name": "a "}]), "occur twice"),
        (broken(images=[], annotations=[]), "holds no annotated image"),
    ],
)  # fmt: skip
def test_wrong_files(tmp_path, data, message):
    photo(tmp_path / "a.jpg")
    path = write(tmp_path / "a.json", data)
    with pytest.raises(UserError, match=message) as caught:
        convert(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_any_wrong_entry_is_reported(tmp_path):
    photo(tmp_path / "a.jpg")
    counts = {"size": list(SIZE), "counts": [30, SIZE[0] * SIZE[1] - 30]}
    text = {"size": list(SIZE), "counts": coco_text(counts["counts"])}
    data = single({"segmentation": SQUARE}, {"segmentation": counts}, {"segmentation": text, "iscrowd": 1})
    assert_only_user_errors(lambda variant: read_coco(write(tmp_path / "a.json", variant)), spoiled(data))


def test_two_files_of_one_split(tmp_path):
    photo(tmp_path / "a.jpg")
    for name in ("one.json", "two.json"):
        write(tmp_path / name, single({"segmentation": SQUARE}))
    with pytest.raises(UserError, match=r"one\.json and .*two\.json are both of the split train"):
        read_coco(tmp_path)


def panoptic(root, labelled, name="panoptic_train"):
    """Pixels of id 255 are in no segment; each class of an image is one or two segments with ids above 65535."""
    entries = []
    (root / name).mkdir(parents=True)
    for number, one in enumerate(labelled):
        codes = np.zeros(one.ids.shape, int)
        segments = []
        for index in np.unique(one.ids[one.ids != 255]).tolist():
            for half in range(2):
                part = (one.ids == index) & (np.arange(one.ids.shape[1]) % 2 == half)
                if part.any():
                    key = 70000 * (half + 1) + 301 * index + 1
                    codes[part] = key
                    segments.append({"id": key, "category_id": 10 + index})
        channels = np.stack([codes % 256, codes // 256 % 256, codes // 65536], 2).astype(np.uint8)
        Image.fromarray(channels).save(root / name / f"{one.image.stem}.png")
        entries.append({"image_id": number, "file_name": f"{one.image.stem}.png", "segments_info": segments})
    images = [listed(number, one.image.name) for number, one in enumerate(labelled)]
    categories = [{"id": 10 + index, "name": name} for index, name in enumerate(NAMES)]
    data = {"images": images, "annotations": entries, "categories": categories}
    return write(root / f"{name}.json", data), data


def test_panoptic_round_trip(tmp_path):
    labelled = example({"train": tmp_path / "in" / "images"}, (*IDS, 255), per_split=3)
    panoptic(tmp_path / "in", labelled)
    result = convert(tmp_path / "in", tmp_path / "out")
    assert result.kind == "coco_panoptic"
    assert_identical(tmp_path / "out", NAMES, labelled)


def test_panoptic_void_as_a_class(tmp_path):
    labelled = example({"train": tmp_path / "in" / "images"}, (*IDS, 255), per_split=1)
    panoptic(tmp_path / "in", labelled)
    convert(tmp_path / "in", tmp_path / "out", background="void")
    shifted = [one._replace(ids=np.where(one.ids == 255, 0, one.ids + 1)) for one in labelled]
    assert_identical(tmp_path / "out", ("void", *NAMES), shifted)


def change(data, **segment):
    data["annotations"][0]["segments_info"][0].update(segment)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: change(data, id=5), r"train_0\.png: holds the segment 70001, which segments_info does not list"),
        (lambda data: change(data, id=1 << 70), "cannot stand in a PNG"),
        (lambda data: change(data, category_id=99), "category_id 99 is not among"),
        (lambda data: data["annotations"][0].update(file_name="b.png"), r"no PNG b\.png in .*panoptic_train or"),
        (lambda data: data["annotations"].clear(), "0 annotations but a panoptic image has one"),
        (lambda data: data["annotations"][0].pop("segments_info"), "segments_info is missing"),
    ],
)
def test_wrong_panoptic_files(tmp_path, spoil, message):
    labelled = example({"train": tmp_path / "in" / "images"}, IDS, per_split=1)
    path, data = panoptic(tmp_path / "in", labelled)
    spoil(data)
    write(path, data)
    with pytest.raises(UserError, match=message):
        convert(path, tmp_path / "out", kind="coco_panoptic")


def test_any_wrong_entry_of_a_panoptic_file_is_reported(tmp_path):
    labelled = example({"train": tmp_path / "in" / "images"}, IDS, per_split=1)
    path, data = panoptic(tmp_path / "in", labelled)
    assert_only_user_errors(lambda variant: read_coco_panoptic(write(path, variant)), spoiled(data))


def test_panoptic_size_and_empty_segments(tmp_path):
    labelled = example({"train": tmp_path / "in" / "images"}, IDS, per_split=1)
    path, data = panoptic(tmp_path / "in", labelled)
    data["annotations"][0]["segments_info"].append({"id": 3, "category_id": 10})
    write(path, data)
    assert convert(path, tmp_path / "out").notes == {"segments without a pixel": 1}
    Image.new("RGB", (5, 6)).save(tmp_path / "in" / "panoptic_train" / "train_0.png")
    with pytest.raises(UserError, match=r"has \(height, width\) \(6, 5\) but"):
        convert(path, tmp_path / "out2")


def test_loops_of_a_ring():
    """The exporter itself: a ring has an outer and an inner outline."""
    ring = np.ones((5, 5), bool)
    ring[2, 2] = False
    assert sorted(map(len, loops(ring))) == [4, 20]
    assert blobs(0, IDS).max() == 3
