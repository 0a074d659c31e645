"""Images with boxes: COCO's JSON, or the generated shapes with a box around each.

Shapes    H W pixels, N boxes of one image as left, top, right, bottom in pixels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segvit.contracts import UserError
from segvit.data.dataset import Dataset, open_dataset
from segvit.data.decode import read_image
from segvit.data.formats.images import ImageFinder, image_root, split_of
from segvit.data.formats.reading import entry_of, key_of, read_json, shown
from segvit.data.synthetic import CLASSES, GROUNDS

SHAPES = tuple(number for number in range(len(CLASSES)) if number not in GROUNDS)
LEAST = 4  # pixels a side; smaller parts of generated shapes are no objects


class Boxes(NamedTuple):
    """The objects of one image."""

    corners: NDArray[np.float32]  # (N, 4)
    labels: NDArray[np.int64]  # (N,)
    areas: NDArray[np.float32]  # (N,) pixels of the object, which COCO sorts by
    crowd: NDArray[np.bool_]  # (N,) many at once: neither learned nor counted against a detector


class BoxSample(NamedTuple):
    """One image and its objects."""

    image: NDArray[np.uint8]  # (H, W, 3)
    boxes: Boxes
    name: str


@dataclass(frozen=True)
class BoxDataset:
    """Class names, images of each split, and how sample i of a split is read."""

    names: tuple[str, ...]
    counts: Mapping[str, int]
    read: Callable[[str, int], BoxSample]


def open_boxes(source: str) -> BoxDataset:
    """The boxes of a COCO file, of a folder with such files (one for each split), or of `synthetic:shapes`.

    Raises UserError for what is not to be found or not as the format says.
    """
    if source.startswith("synthetic:"):
        dataset = open_dataset(source)
        if dataset.classes != CLASSES:
            raise UserError(f"{source} has no boxes; use synthetic:shapes")
        counts = {split: dataset.count(split) for split in dataset.splits}
        return BoxDataset(tuple(CLASSES.names[i] for i in SHAPES), counts, partial(_read_shapes, dataset))
    return read_coco_boxes(Path(source).expanduser())


def pack(rows: list[tuple[NDArray[np.float32], int, float, bool]]) -> Boxes:
    """Boxes from (corners, label, area, crowd) of each object."""
    corners = np.array([row[0] for row in rows], np.float32).reshape(-1, 4)
    labels, areas, crowd = (np.array([row[i] for row in rows]) for i in (1, 2, 3))
    return Boxes(corners, labels.astype(np.int64), areas.astype(np.float32), crowd.astype(bool))


def _read_shapes(dataset: Dataset, split: str, i: int) -> BoxSample:
    """Connected parts of one class are objects; shapes that overlap in one class count as one."""
    sample = dataset.read(split, i)
    rows = []
    for label, number in enumerate(SHAPES):
        parts, _ = ndimage.label(sample.mask == number)
        for part, place in enumerate(ndimage.find_objects(parts), start=1):
            (top, bottom), (left, right) = ((side.start, side.stop) for side in place)
            if min(bottom - top, right - left) >= LEAST:
                area = float((parts[place] == part).sum())
                rows.append((np.array([left, top, right, bottom], np.float32), label, area, False))
    return BoxSample(sample.image, pack(rows), sample.name)


class _Picture(NamedTuple):
    path: Path
    boxes: Boxes


def read_coco_boxes(path: Path) -> BoxDataset:
    """Boxes of COCO instances; classes are the categories in order of their ids.

    In a folder, files named instances_* are read if there are any, else every JSON there or one folder below; the split
    is read from the file's or its folder's name, else it is train.
    """
    root = image_root(path)
    files = [path] if path.is_file() else sorted({*path.glob("*.json"), *path.glob("*/*.json")})
    files = [file for file in files if file.name.startswith("instances")] or files
    if not files:
        raise UserError(f"{path}: no COCO JSON in it, nor one folder below; give the file")
    finder, contents = ImageFinder(root), {file: read_json(file) for file in files}
    categories: dict[int, str] = {}
    for file, data in contents.items():
        for entry in entry_of(data, "categories", list, str(file)):
            categories[entry_of(entry, "id", int, f"{file}: categories")] = entry_of(entry, "name", str, str(file))
    labels = {key: label for label, key in enumerate(sorted(categories))}
    splits: dict[str, list[_Picture]] = defaultdict(list)
    for file, data in contents.items():
        split = split_of(file.relative_to(root))
        splits[split] += _pictures(data, file, split, finder, labels)
    names = tuple(categories[key] for key in labels)
    counts = {split: len(pictures) for split, pictures in splits.items()}
    return BoxDataset(names, counts, partial(_read_picture, dict(splits)))


def _pictures(data: Any, file: Path, split: str, finder: ImageFinder, labels: Mapping[int, int]) -> list[_Picture]:
    rows = defaultdict(list)
    for number, entry in enumerate(entry_of(data, "annotations", list, str(file))):
        where = f"{file}: annotations[{number}]"
        category = entry_of(entry, "category_id", int, where)
        if category not in labels:
            raise UserError(f"{where}: category_id {category} is not among the categories; list it")
        corners = _corners(entry.get("bbox"), where)
        size = float((corners[2] - corners[0]) * (corners[3] - corners[1]))
        if size > 0:  # COCO itself has a few boxes without width
            area = float(entry.get("area") or size)
            image = key_of(entry, "image_id", where)
            rows[image].append((corners, labels[category], area, bool(entry.get("iscrowd"))))
    pictures = []
    for number, entry in enumerate(entry_of(data, "images", list, str(file))):
        where = f"{file}: images[{number}]"
        name = entry_of(entry, "file_name", str, where)
        found = finder.find(name, near=file.parent, split=split, where=where)
        pictures.append(_Picture(found, pack(rows[key_of(entry, "id", where)])))
    return pictures


def _corners(box: Any, where: str) -> NDArray[np.float32]:
    """Left, top, right, bottom of COCO's [left, top, width, height]."""
    try:
        left, top, width, height = (float(value) for value in box)
    except (TypeError, ValueError):
        raise UserError(f"{where}: bbox is {shown(box)} but must be [left, top, width, height]; mend it") from None
    return np.array([left, top, left + width, top + height], np.float32)


def _read_picture(splits: Mapping[str, list[_Picture]], split: str, i: int) -> BoxSample:
    picture = splits[split][i]
    return BoxSample(read_image(picture.path), picture.boxes, str(picture.path))
