"""YOLO's text files: one an image, one shape a line, `class x y x y ...` in parts of the image's width and height.

Classes   `names:` of data.yaml (list or mapping), or classes.txt with one name a line; the number in a line is the id
Files     data.yaml with train, val, test: a folder of images, a text file listing images, or a list of these, relative
          to `path:` (where there is no such folder here, to the YAML); without these entries images/{train,val,test},
          {train,valid,test}/images or plain images/. The labels of .../images/x.jpg are in .../labels/x.txt; an image
          without that file has no shapes
Shapes    6 numbers or more are a polygon, 4 a box `centre x, centre y, width, height`, drawn filled and counted
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from segvit.contracts import UserError
from segvit.data.formats.detect import YAML_NAMES
from segvit.data.formats.images import SPLIT_WORDS, ImageFinder, image_files, upright_size
from segvit.data.formats.polygons import rectangle
from segvit.data.formats.reading import points_of, read_text, read_yaml, shown
from segvit.data.formats.shapes import Annotations, Picture, Polygons, Shape

BOXES = "boxes, drawn filled since they have no outline"
UNLABELLED = "images without a label file, taken as empty"
SLACK = 0.01  # how far outside of the image rounding may put a coordinate


def read_yolo(path: Path, *, images: Path | None = None) -> Annotations:
    """The shapes of a YOLO dataset, given by its folder or data.yaml.

    `images` is its images/ where that is elsewhere; labels/ is then in the folder of the dataset.
    """
    root = path.parent if path.is_file() else path
    described = path if path.is_file() else next((root / n for n in YAML_NAMES if (root / n).is_file()), None)
    data = _description(described) if described else {}
    names = _names(data.get("names"), described) if described else _listed(root / "classes.txt")
    notes: Counter[str] = Counter()
    pictures: list[Picture] = []
    for split, files in _splits(data, described, root, images):
        for image in files:
            labels = _labels_of(image) if images is None else root / "labels" / image.relative_to(images)
            labels = labels.with_suffix(".txt")
            notes[UNLABELLED] += not labels.is_file()
            pictures.append(Picture(split, image, partial(_shapes, labels, image, names, notes), None, f"{labels}"))
    if notes[UNLABELLED] == len(pictures):
        raise UserError(
            f"{root}: no label file for any of {len(pictures)} images; put the labels/ folder beside images/"
        )
    return Annotations(names, tuple(pictures), notes)


def _description(path: Path) -> dict[str, Any]:
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds no names: and train:; give the data.yaml of a YOLO dataset")
    return data


def _names(listed: Any, path: Path | None) -> tuple[str, ...]:
    names = dict(enumerate(listed)) if isinstance(listed, list) else listed
    if not isinstance(names, dict) or not names or sorted(map(repr, names)) != sorted(map(repr, range(len(names)))):
        raise UserError(f"{path}: names: is {shown(listed)} but must list the classes 0, 1, 2, ... without gaps")
    return tuple(str(names[index]) for index in range(len(names)))


def _listed(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise UserError(f"{path.parent}: neither a data.yaml nor classes.txt; write one class name a line there")
    return tuple(line.strip() for line in read_text(path).splitlines() if line.strip())


def _splits(
    data: dict[str, Any], described: Path | None, root: Path, images: Path | None
) -> list[tuple[str, list[Path]]]:
    base = root / str(data.get("path") or ".")
    base = base if base.is_dir() else root
    if images is None and any(data.get(word) for word in SPLIT_WORDS):
        wanted = [(split, word) for word, split in SPLIT_WORDS.items() if data.get(word)]
        return [(split, list(_listed_images(data[word], base, f"{described}: {word}"))) for split, word in wanted]
    inside = images or root / "images"
    if inside.is_dir():
        parts = [(split, inside / word) for word, split in SPLIT_WORDS.items() if (inside / word).is_dir()]
        found = [(split, image_files(folder)) for split, folder in parts or [("train", inside)]]
    else:
        parts = [(split, root / word / "images") for word, split in SPLIT_WORDS.items()]
        found = [(split, image_files(folder)) for split, folder in parts if folder.is_dir()]
    if not any(files for _, files in found):
        raise UserError(f"{inside}: no images; put them there, with the labels in a folder labels/ beside it")
    return found


def _listed_images(entry: Any, base: Path, where: str) -> Iterator[Path]:
    """The images of a folder, of a text file that lists them, or of a list of these."""
    if isinstance(entry, list):
        for one in entry:
            yield from _listed_images(one, base, where)
        return
    text = str(entry)
    # Some exports write ../train/images where train/images is meant.
    path = next((p for p in (base / text, base / text.removeprefix("../")) if p.exists()), base / text)
    if path.is_dir():
        yield from image_files(path)
    elif path.is_file():
        finder = ImageFinder(base)
        for line in filter(None, map(str.strip, read_text(path).splitlines())):
            yield finder.find(line, near=path.parent, split="", where=f"{path}")
    else:
        raise UserError(f"{where}: no folder or list {path}; mend the entry or path:")


def _labels_of(image: Path) -> Path:
    """labels/x.jpg for images/x.jpg: the last folder called images is exchanged."""
    parts = list(image.parts)
    places = [place for place, part in enumerate(parts[:-1]) if part == "images"]
    if not places:
        raise UserError(f"{image}: is in no folder called images, so its labels are unknown; use images/ and labels/")
    parts[places[-1]] = "labels"
    return Path(*parts)


def _shapes(labels: Path, image: Path, names: Sequence[str], notes: Counter[str]) -> list[Shape]:
    if not labels.is_file():
        return []
    height, width = upright_size(image)
    shapes: list[Shape] = []
    for number, line in enumerate(read_text(labels).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{labels}: line {number}"
        first, *rest = line.split()
        if not first.isdecimal() or int(first) >= len(names):
            raise UserError(f"{where}: class {first} is none of 0..{len(names) - 1}; mend the line or list the class")
        parts = points_of(rest, where, at_least=2)
        if (parts < -SLACK).any() or (parts > 1 + SLACK).any():
            raise UserError(f"{where}: a coordinate is outside of 0..1; write parts of the image's width and height")
        if len(parts) == 2:
            notes[BOXES] += 1
            (x, y), (wide, high) = parts
            parts = rectangle(x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)
        shapes.append(Shape(int(first), Polygons((points_of(parts, where) * np.array([width, height]),))))
    return shapes
