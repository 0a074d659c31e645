import json

import pytest

from segvit.contracts import UserError
from segvit.data.formats.detect import LOOK, detect, json_files, kind_of_json
from tests.data.folders import two_folders
from tests.data.formats.maps import photo

COCO = {"images": [], "annotations": [], "categories": []}
PANOPTIC = {**COCO, "annotations": [{"file_name": "a.png", "segments_info": []}]}
LABELME = {"shapes": [], "imagePath": "a.jpg"}
LABEL_STUDIO = [{"data": {}, "annotations": [{"result": []}]}]


def save(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data) if not isinstance(data, str) else data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a.json", COCO, "coco"), ("a.json", PANOPTIC, "coco_panoptic"), ("a.json", LABELME, "labelme"),
        ("a.json", LABEL_STUDIO, "label_studio"), ("a.XML", "<annotations>", "cvat"), ("a.yaml", "names: [a]", "yolo"),
        ("b.yml", "classes: [a]", "dataset"),
    ],
)  # fmt: skip
def test_files(tmp_path, name, data, kind):
    assert detect(save(tmp_path / name, data)) == kind


def test_keys_of_a_large_file_are_seen_at_both_ends(tmp_path):
    end = {"image_id": 1, "category_id": 1}
    data = {"images": ["x" * 2 * LOOK], "annotations": ["y" * 2 * LOOK, end], "categories": []}
    assert kind_of_json(save(tmp_path / "a.json", data)) == "coco"
    data["annotations"][1] = {"image_id": 1, "caption": "a cat"}
    assert kind_of_json(save(tmp_path / "a.json", data)) is None


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"annotations/instances_val.json": COCO, "annotations/captions_val.json": {"images": []}}, "coco"),
        ({"train/_annotations.coco.json": COCO, "valid/_annotations.coco.json": COCO}, "coco"),
        ({"panoptic_val.json": PANOPTIC}, "coco_panoptic"),
        ({"a/b/c/x.json": LABELME}, "labelme"),
        ({"annotations.xml": "<annotations>", "images/a.txt": ""}, "cvat"),
        ({"data.yaml": "names: [a]", "labels/a.txt": ""}, "yolo"),
        ({"labels/train/a.txt": "", "classes.txt": ""}, "yolo"),
        ({"train/labels/a.txt": ""}, "yolo"),
        ({"dataset.yaml": "classes: [a]", "export.json": COCO}, "dataset"),
    ],
)
def test_folders(tmp_path, files, kind):
    for name, data in files.items():
        save(tmp_path / name, data)
    assert detect(tmp_path) == kind


def test_two_folders_are_a_dataset(tmp_path):
    assert detect(two_folders(tmp_path, counts={"train": 1})) == "dataset"


def test_what_is_nothing_or_several(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        detect(tmp_path / "none")
    with pytest.raises(UserError, match="no format recognised"):
        detect(tmp_path)
    with pytest.raises(UserError, match="no format recognised"):
        detect(photo(tmp_path / "a.jpg"))
    with pytest.raises(UserError, match="not valid YAML"):
        detect(save(tmp_path / "a.yaml", "a: [1"))
    save(tmp_path / "a.json", COCO)
    save(tmp_path / "b.json", PANOPTIC)
    with pytest.raises(UserError, match=r"looks like coco \(.*a\.json\) and coco_panoptic \(.*b\.json\)"):
        detect(tmp_path)
    assert json_files(tmp_path, "coco") == [tmp_path / "a.json"]
