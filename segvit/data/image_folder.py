"""Images in one folder for each class, as ImageNet and most classification sets come.

    train/cat/a.jpg   train/dog/b.jpg   val/cat/c.jpg   val/dog/d.jpg

Class ids follow the sorted names of the folders of train (of the first split there is, where train is missing). For
retrieval, whose test classes are none of train's, splits may have classes of their own; their ids come behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import UserError
from segvit.data.dataset import IMAGE_SUFFIXES
from segvit.data.decode import read_image

SPLITS = ("train", "val", "test")

Item = tuple[Path, int]  # an image file and its class id


@dataclass(frozen=True)
class ImageFolder:
    """Class names in the order of their ids, and the items of each split, by class and then by name."""

    root: Path
    names: tuple[str, ...]
    splits: Mapping[str, tuple[Item, ...]]

    def items(self, split: str) -> tuple[Item, ...]:
        """The images of a split. Raises UserError where there is no such split."""
        if split not in self.splits:
            raise UserError(f"{self.root}: no split {split!r}; there are {', '.join(self.splits)}")
        return self.splits[split]

    def classes(self, split: str) -> tuple[str, ...]:
        """The names of the classes that a split shows, in the order of their ids."""
        return tuple(self.names[label] for label in sorted({label for _, label in self.items(split)}))

    def read(self, split: str, i: int) -> tuple[NDArray[np.uint8], int]:
        """Image i (H, W, 3) and its class id. Raises UserError for a file that is no image."""
        path, label = self.items(split)[i]
        return read_image(path), label

    def name(self, split: str, i: int) -> str:
        """The path of image i below the root."""
        return self.items(split)[i][0].relative_to(self.root).as_posix()


def open_image_folder(source: str | Path, *, own_classes: bool = False) -> ImageFolder:
    """The images below `source`; only names are looked at, files are read when asked for.

    With `own_classes` a split may have classes that train lacks. Raises UserError for a folder without splits or
    classes, a class without images, and without `own_classes` for a class that train lacks.
    """
    root = Path(source).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give one that holds train/CLASS/IMAGES")
    found = {split: root / split for split in SPLITS if (root / split).is_dir()}
    if not found:
        raise UserError(f"{root}: no train, val or test folder in it; put images into train/CLASS/ and val/CLASS/")
    names = class_names(next(iter(found.values())))
    if own_classes:
        names = tuple(dict.fromkeys([*names, *(name for folder in found.values() for name in class_names(folder))]))
    return ImageFolder(root, names, {split: tuple(list_items(folder, names)) for split, folder in found.items()})


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of the folders in `folder`, sorted. Raises UserError where there are none."""
    names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
    if not names:
        raise UserError(f"{folder}: no folders in it; make one for each class and put its images there")
    return names


def list_items(folder: Path, names: tuple[str, ...]) -> list[Item]:
    """The images in the class folders of one split. Raises UserError for an unknown class and for an empty one."""
    items: list[Item] = []
    for name in class_names(folder):
        if name not in names:
            raise UserError(f"{folder / name}: train has no class {name!r}; it has {', '.join(names[:5])}")
        paths = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise UserError(f"{folder / name}: no images of this class; add some or take the folder out")
        items += [(path, names.index(name)) for path in paths]
    return items
