"""Well-known datasets by name: `ade20k:FOLDER` reads FOLDER as the file `ade20k.yaml` beside this one says.

The files are dataset descriptions like a user's own, without `path:`; their first lines say what the folder must hold.
A folder without a description is recognised by the names of a few files in it.
"""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path

from segvit.contracts import UserError
from segvit.data.description import Description, parse_description

# Where two sources read the same folder, it is recognised as the first of them.
SOURCES: tuple[str, ...] = (
    "ade20k",
    "coco_stuff10k",
    "coco_stuff164k",
    "coco_stuff164k_raw",
    "pascal_context60",
    "pascal_context59",
    "voc12",
    "voc12_aug",
    "cityscapes",
    "cityscapes_labelids",
    "camvid",
    "polyp",
    "polyp_pranet",
    "polyp_kvasir",
    "polyp_clinicdb",
    "polyp_300",
    "polyp_colondb",
    "polyp_etis",
    "kvasir_seg",
    "cvc_clinicdb",
    "synapse",
    "synapse_val",
)

# One file of each pattern must exist. Names of files and not of folders alone: anybody's data may lie in `train`.
SIGNS: dict[str, tuple[str, ...]] = {
    "ade20k": ("images/training/ADE_train_*.jpg", "annotations/training/ADE_train_*.png"),
    "coco_stuff10k": ("images/train2014/COCO_train2014_*.jpg", "annotations/train2014/*_labelTrainIds.png"),
    "coco_stuff164k": ("images/train2017/0*.jpg", "annotations/train2017/0*_labelTrainIds.png"),
    "coco_stuff164k_raw": ("images/train2017/0*.jpg", "annotations/train2017/0*[0-9].png"),
    "pascal_context60": ("SegmentationClassContext/20*.png", "ImageSets/SegmentationContext/train.txt"),
    "voc12": ("SegmentationClass/2007_*.png", "JPEGImages/2007_*.jpg", "ImageSets/Segmentation/train.txt"),
    "cityscapes": ("leftImg8bit/train/*/*_leftImg8bit.png", "gtFine/train/*/*_gtFine_labelTrainIds.png"),
    "cityscapes_labelids": ("leftImg8bit/train/*/*_leftImg8bit.png", "gtFine/train/*/*_gtFine_labelIds.png"),
    "camvid": ("train/0001TP_*.png", "trainannot/0001TP_*.png"),
    "polyp": ("TrainDataset/images", "TrainDataset/masks", "TestDataset/Kvasir"),
    "polyp_pranet": ("TrainDataset/image", "TrainDataset/mask", "TestDataset/Kvasir"),
    "synapse": ("train_npz/case0005_slice*.npz",),
}


def named_source(text: str) -> tuple[str, Path] | None:
    """The name and the folder in `name:folder`; None for anything else, such as paths and generated images.

    Raises UserError where there is no such source.
    """
    name, colon, folder = text.partition(":")
    is_drive = len(name) == 1
    if not colon or is_drive or name == "synthetic" or not name.isidentifier() or Path(text).exists():
        return None
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, 3, 0.5) or SOURCES
        raise UserError(f"{text}: no source is called {name!r}; there is {', '.join(near)}")
    if not folder:
        raise UserError(f"{text}: no folder; write {name}:FOLDER")
    return name, Path(folder).expanduser()


def recognise(root: Path) -> str | None:
    """The source that a folder looks like, None where there is none."""
    for name, patterns in SIGNS.items():
        if all(any(root.glob(pattern)) for pattern in patterns):
            return name
    return None


def read_source(name: str, root: Path) -> Description:
    """The description of the source `name` in the folder `root`."""
    text = files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return parse_description(text, f"source {name}", root)
