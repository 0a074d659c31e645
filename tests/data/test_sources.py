"""Well-known sources: each layout built in miniature and read back, by name and recognised."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from segvit.contracts import UserError
from segvit.data import sources
from segvit.data.dataset import describe_source, open_dataset
from segvit.data.sources import SIGNS, SOURCES, named_source, read_source, recognise
from tests.data.folders import save

# name -> the number of classes, the first with its colour, the last
CLASSES = {
    "ade20k": (150, "wall", (120, 120, 120), "flag"),
    "coco_stuff10k": (171, "person", (0, 192, 64), "wood"),
    "coco_stuff164k": (171, "person", (0, 192, 64), "wood"),
    "coco_stuff164k_raw": (171, "person", (0, 192, 64), "wood"),
    "pascal_context60": (60, "background", (120, 120, 120), "wood"),
    "pascal_context59": (59, "aeroplane", (180, 120, 120), "wood"),
    "voc12": (21, "background", (0, 0, 0), "tvmonitor"),
    "voc12_aug": (21, "background", (0, 0, 0), "tvmonitor"),
    "cityscapes": (19, "road", (128, 64, 128), "bicycle"),
    "cityscapes_labelids": (19, "road", (128, 64, 128), "bicycle"),
    "camvid": (11, "sky", (128, 128, 128), "bicyclist"),
    "synapse": (9, "background", (0, 0, 0), "stomach"),
    "synapse_val": (9, "background", (0, 0, 0), "stomach"),
}
POLYP = (2, "background", (0, 0, 0), "polyp")

# name -> what the masks of its miniature hold, and what must become of it (255 is ignored)
VALUES = {
    "ade20k": ([0, 1, 2, 75, 150, 1], [255, 0, 1, 74, 149, 0]),
    "coco_stuff10k": ([0, 1, 12, 92, 171, 171], [255, 0, 11, 91, 170, 170]),
    "coco_stuff164k": ([0, 11, 80, 170, 255, 255], [0, 11, 80, 170, 255, 255]),
    "coco_stuff164k_raw": ([0, 10, 12, 91, 181, 255], [0, 10, 11, 80, 170, 255]),
    "pascal_context60": ([0, 1, 30, 58, 59, 255], [0, 1, 30, 58, 59, 255]),
    "pascal_context59": ([0, 1, 30, 58, 59, 255], [255, 0, 29, 57, 58, 255]),
    "voc12": ([0, 1, 7, 15, 20, 255], [0, 1, 7, 15, 20, 255]),
    "voc12_aug": ([0, 1, 7, 15, 20, 255], [0, 1, 7, 15, 20, 255]),
    "cityscapes": ([0, 1, 11, 17, 18, 255], [0, 1, 11, 17, 18, 255]),
    "cityscapes_labelids": ([0, 7, 8, 24, 33, 29], [255, 0, 1, 11, 18, 255]),
    "camvid": ([0, 1, 5, 9, 10, 11], [0, 1, 5, 9, 10, 255]),
    "synapse": ([0, 1, 4, 6, 7, 8], [0, 1, 4, 6, 7, 8]),
    "synapse_val": ([0, 1, 4, 6, 7, 8], [0, 1, 4, 6, 7, 8]),
    "kvasir_seg": ([0, 30, 100, 150, 220, 255], [0, 0, 0, 1, 1, 1]),  # JPEG moves values by some levels
}
GREY = ([0, 1, 127, 128, 254, 255], [0, 0, 0, 1, 1, 1])

TEN = " ".join(f"p{i}" for i in range(10))
ADE = ("images/training/{}.jpg", "annotations/training/{}.png", "ADE_train_01 ADE_train_02")
COCO = "annotations/{}2017/{{}}{}.png"
CITY = "gtFine/{}/{{}}_gtFine_{}.png"
POLYP_SETS = [
    (f"TestDataset/{name}/images/{{}}.png", f"TestDataset/{name}/masks/{{}}.png", "1 2")
    for name in ("Kvasir", "CVC-ClinicDB", "CVC-300", "CVC-ColonDB", "ETIS-LaribPolypDB")
]
# name -> where images and masks lie, and the stems; the last stem of VOC and PASCAL-Context is in no list
FILES = {
    "ade20k": [ADE, ("images/validation/{}.jpg", "annotations/validation/{}.png", "ADE_val_01")],
    "coco_stuff10k": [
        ("images/train2014/{}.jpg", "annotations/train2014/{}_labelTrainIds.png", "COCO_train2014_1 COCO_train2014_2"),
        ("images/test2014/{}.jpg", "annotations/test2014/{}_labelTrainIds.png", "COCO_train2014_3"),
    ],
    "coco_stuff164k": [
        ("images/train2017/{}.jpg", COCO.format("train", "_labelTrainIds"), "01 02"),
        ("images/val2017/{}.jpg", COCO.format("val", "_labelTrainIds"), "03"),
    ],
    "coco_stuff164k_raw": [
        ("images/train2017/{}.jpg", COCO.format("train", ""), "01 02"),
        ("images/val2017/{}.jpg", COCO.format("val", ""), "03"),
    ],
    "pascal_context": [("JPEGImages/{}.jpg", "SegmentationClassContext/{}.png", "2008_01 2008_02 2009_01 2010_01")],
    "voc12": [("JPEGImages/{}.jpg", "SegmentationClass/{}.png", "2007_01 2007_02 2009_01 2010_01")],
    "voc12_aug": [
        ("JPEGImages/{}.jpg", "SegmentationClass/{}.png", "2007_01 2007_02 2009_01"),
        ("JPEGImages/{}.jpg", "SegmentationClassAug/{}.png", "2011_01 2010_01"),
    ],
    "cityscapes": [
        ("leftImg8bit/train/{}_leftImg8bit.png", CITY.format("train", "labelTrainIds"), "ulm/ulm_1 bonn/bonn_1"),
        ("leftImg8bit/val/{}_leftImg8bit.png", CITY.format("val", "labelTrainIds"), "lindau/lindau_1"),
    ],
    "cityscapes_labelids": [
        ("leftImg8bit/train/{}_leftImg8bit.png", CITY.format("train", "labelIds"), "ulm/ulm_1 bonn/bonn_1"),
        ("leftImg8bit/val/{}_leftImg8bit.png", CITY.format("val", "labelIds"), "lindau/lindau_1"),
    ],
    "camvid": [
        ("train/{}.png", "trainannot/{}.png", "0001TP_1 0006R0_1"),
        ("val/{}.png", "valannot/{}.png", "0016E5_1"),
        ("test/{}.png", "testannot/{}.png", "Seq05VD_1"),
    ],
    "polyp": [("TrainDataset/images/{}.png", "TrainDataset/masks/{}.png", TEN), *POLYP_SETS],
    "polyp_pranet": [("TrainDataset/image/{}.png", "TrainDataset/mask/{}.png", TEN), *POLYP_SETS],
    **{f"polyp_{name}": POLYP_SETS for name in ("kvasir", "clinicdb", "300", "colondb", "etis")},
    "kvasir_seg": [("images/{}.jpg", "masks/{}.jpg", TEN)],
    "cvc_clinicdb": [("Original/{}.tif", "Ground Truth/{}.tif", TEN)],
}
FILES |= dict.fromkeys(("pascal_context60", "pascal_context59"), FILES.pop("pascal_context"))
SLICES = [f"{case}_slice{i:03d}" for case in ("case0005", "case0028", "case0037") for i in range(2)]
LISTS = {
    "pascal_context60": "SegmentationContext",
    "pascal_context59": "SegmentationContext",
    "voc12": "Segmentation",
    "voc12_aug": "Segmentation",
}
COUNTS = {
    **{name: {"train": 2, "val": 1} for name in SOURCES},
    "voc12_aug": {"train": 3, "val": 1},
    "camvid": {"train": 2, "val": 1, "test": 1},
    "polyp": {"train": 8, "val": 2, "test": 10},
    "polyp_pranet": {"train": 8, "val": 2, "test": 10},
    **{f"polyp_{name}": {"test": 2} for name in ("kvasir", "clinicdb", "300", "colondb", "etis")},
    "kvasir_seg": {"train": 8, "val": 2},
    "cvc_clinicdb": {"train": 8, "val": 2},
    "synapse": {"train": 6},
    "synapse_val": {"train": 2, "val": 4},
}


def build(root: Path, name: str) -> Path:
    """The folder of a source with a few images and masks of six columns."""
    mask = np.repeat(np.array([VALUES.get(name, GREY)[0]] * 16, np.uint8), 16, axis=1)
    for image_path, mask_path, stems in FILES.get(name, ()):
        for stem in stems.split():
            save(root / image_path.format(stem), np.full((16, 96, 3), 90, np.uint8))
            save(root / mask_path.format(stem), mask)
    if name.startswith("synapse"):
        (root / "train_npz").mkdir(parents=True)
        for stem in SLICES:
            image = np.full(mask.shape, 0.5, np.float32)
            np.savez(root / f"train_npz/{stem}.npz", image=image, label=mask.astype(np.float32))
    if name in LISTS:
        listed = root / "ImageSets" / LISTS[name]
        listed.mkdir(parents=True)
        year = "2008" if "context" in name else "2007"
        (listed / "train.txt").write_text(f"{year}_01\n{year}_02\n")
        (listed / "val.txt").write_text("2009_01\n")
        (listed / "aug.txt").write_text("2011_01\n")
    return root


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_in_miniature(tmp_path, name):
    root = build(tmp_path / "data", name)
    dataset = open_dataset(f"{name}:{root}")
    count, first, color, last = CLASSES.get(name, POLYP)
    assert (len(dataset.classes), dataset.classes.names[0], dataset.classes.names[-1]) == (count, first, last)
    assert dataset.classes.palette[0] == color
    assert {split: dataset.count(split) for split in dataset.splits} == COUNTS[name]
    for split in dataset.splits:
        for i in range(dataset.count(split)):
            sample = dataset.read(split, i)
            assert sample.image.shape == (16, 96, 3)
            assert sample.mask[8, 8::16].tolist() == VALUES.get(name, GREY)[1]
    assert abs(int(sample.image[0, 0, 0]) - (128 if name.startswith("synapse") else 90)) <= 1


@pytest.mark.parametrize("name", list(SIGNS))
def test_a_folder_opens_by_itself(tmp_path, name):
    root = build(tmp_path / "data", name)
    assert recognise(root) == name
    assert open_dataset(root).count("train") == COUNTS[name]["train"]
    (root / "dataset.yaml").write_text("train: {images: a, masks: b}\nclasses: [a]\n")
    assert describe_source(root).splits["train"][0].images == "a"


def test_other_folders_are_not_taken_for_a_source(tmp_path):
    assert recognise(tmp_path) is None
    for name in ("train", "trainannot"):  # SegNet's folders, but not its images
        save(tmp_path / name / "mine_1.png", np.zeros((4, 4), np.uint8))
    assert recognise(tmp_path) is None
    root = build(tmp_path / "ade", "ade20k")
    (root / "classes.txt").write_text("a\n")
    with pytest.raises(UserError, match="neither a dataset"):  # then it is somebody's own
        open_dataset(root)


def test_raw_labels_agree_with_converted_ones():
    raw = read_source("coco_stuff164k_raw", Path()).rule
    assert [raw.table[value] for value in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)] == [-1] * 11
    assert sorted(set(raw.table[:182].tolist()) - {-1}) == list(range(171))
    assert read_source("coco_stuff164k", Path()).classes == read_source("coco_stuff10k", Path()).classes
    ids = read_source("cityscapes_labelids", Path()).rule.table
    assert np.flatnonzero(ids[:34] < 255).tolist() == [7, 8, 11, 12, 13, *range(17, 18), *range(19, 29), 31, 32, 33]
    assert ids[ids < 255][ids[ids < 255] >= 0].tolist() == list(range(19))


def test_names_and_paths_are_told_apart(tmp_path, monkeypatch):
    assert named_source("ade20k:data/ade") == ("ade20k", Path("data/ade"))
    assert named_source("voc12:~/voc") == ("voc12", Path.home() / "voc")
    for path in ("C:/data", "c:\\data", "data/ade20k", "./odd:name", "my-data:1", "synthetic:shapes?train=4"):
        assert named_source(path) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voc12:mine").mkdir()
    assert named_source("voc12:mine") is None
    for text, message in (
        ("ade20:data", "no source is called 'ade20'; there is ade20k$"),
        ("coco_stuff:data", "there is coco_stuff10k, coco_stuff164k"),
        ("zzzz:data", "there is ade20k, coco_stuff10k, .*, synapse_val"),
        ("ade20k:", "no folder; write ade20k:FOLDER"),
        ("ade20k:none", "none: no such folder; check the path"),
    ):
        with pytest.raises(UserError, match=message):
            open_dataset(text)


def test_every_file_is_listed_and_says_what_it_is():
    found = {path.stem: path for path in Path(sources.__file__).parent.glob("*.yaml")}
    assert sorted(found) == sorted(SOURCES)
    for path in found.values():
        text = path.read_text(encoding="ascii")
        assert "folder" in text.partition("\ntrain:")[0], path
        assert max(map(len, text.splitlines())) <= 120, path
        assert "path" not in yaml.safe_load(text)
    assert list(SIGNS) == [name for name in SOURCES if name in SIGNS]
