"""LabelMe's JSON files: one an image.

Classes   the lines of labels.txt beside the files, where there is one; else the labels that occur, alphabetically.
          `__ignore__` marks pixels to ignore and `_background_` is the background class, as in LabelMe's own examples
Files     a JSON, or a folder searched recursively; the split is the folder (train, val, ...) that a file lies in
Shapes    polygon, rectangle, oriented_rectangle, circle, mask; lines and points cover nothing and are left out, counted
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segvit.contracts import UserError
from segvit.data.decode import BOMB, BROKEN
from segvit.data.formats.images import ImageFinder, image_root, split_of
from segvit.data.formats.polygons import rectangle
from segvit.data.formats.reading import entry_of, index_of, points_of, read_json, read_text
from segvit.data.formats.shapes import IGNORED, Annotations, Bitmap, Ellipse, Picture, Polygons, Shape

IGNORE_LABEL, BACKGROUND_LABEL = "__ignore__", "_background_"
TINY = 1e-9  # pixels; a circle of radius 0 covers nothing, but nothing may be divided by it
NO_AREA = ("point", "points", "line", "linestrip")


def read_labelme(path: Path, *, images: Path | None = None) -> Annotations:
    """The shapes of one LabelMe file, or of all in a folder."""
    root = image_root(path)
    files = [path] if path.is_file() else sorted(path.rglob("*.json"))
    if not files:
        raise UserError(f"{path}: no JSON files in it; give the folder that holds LabelMe's files")
    finder = ImageFinder(images or root)
    found: list[tuple[Path, Any]] = []
    for file in files:
        data = read_json(file)
        entry_of(data, "shapes", list, f"{file}")
        # The image may be in the file as text; only the rest is kept, or a folder would not fit into memory.
        found.append((file, {key: value for key, value in data.items() if key != "imageData"}))
    names = _names(root, found)
    labels = {name: label for label, name in enumerate(names)} | {IGNORE_LABEL: IGNORED}
    notes: Counter[str] = Counter()
    pictures = []
    for file, data in found:
        split = split_of(file.relative_to(root).parent / "_")
        size = entry_of(data, "imageHeight", int, f"{file}"), entry_of(data, "imageWidth", int, f"{file}")
        image = finder.find(entry_of(data, "imagePath", str, f"{file}"), near=file.parent, split=split, where=f"{file}")
        shapes = partial(_shapes, data["shapes"], labels, notes, f"{file}")
        pictures.append(Picture(split, image, shapes, size, f"{file}"))
    background = BACKGROUND_LABEL if BACKGROUND_LABEL in names else "background"
    return Annotations(tuple(names), tuple(pictures), notes, background)


def _names(root: Path, found: Sequence[tuple[Path, Any]]) -> list[str]:
    listed = root / "labels.txt"
    if listed.is_file():
        names = [line.strip() for line in read_text(listed).splitlines()]
        return [name for name in names if name and name != IGNORE_LABEL]
    used: set[str] = set()
    for file, data in found:
        wheres = ((shape, f"{file}: shape {number}") for number, shape in enumerate(data["shapes"]))
        used |= {_label(shape, where) for shape, where in wheres if _kind(shape, where) not in NO_AREA}
    # What LabelMe calls background comes first, so that it is class 0 as the background is in all formats.
    return sorted(used - {IGNORE_LABEL}, key=lambda name: (name != BACKGROUND_LABEL, name))


def _kind(shape: Any, where: str) -> str:
    _label(shape, where)  # refuses what is no shape at all
    return shape.get("shape_type") or "polygon"  # files of old versions hold polygons only


def _label(shape: Any, where: str) -> str:
    return entry_of(shape, "label", str, where).strip()


def _shapes(entries: Sequence[Any], labels: Mapping[str, int], notes: Counter[str], file: str) -> list[Shape]:
    shapes = []
    for number, entry in enumerate(entries):
        where = f"{file}: shape {number}"
        kind = _kind(entry, where)
        if kind in NO_AREA:
            notes[f"shapes of type {kind}, left out since they cover no area"] += 1
            continue
        label = index_of(_label(entry, where), labels, where)
        points = points_of(entry_of(entry, "points", list, where), where, at_least=2)
        shapes.append(Shape(label, _region(kind, points, entry, where)))
    return shapes


def _region(
    kind: str, points: NDArray[np.float64], entry: Mapping[str, Any], where: str
) -> Polygons | Ellipse | Bitmap:
    if kind in ("polygon", "oriented_rectangle") or (kind == "rectangle" and len(points) == 4):
        return Polygons((points_of(points, where),))
    if kind not in ("rectangle", "circle", "mask"):
        raise UserError(f"{where}: the shape type {kind!r} is unknown; draw it as a polygon")
    if len(points) != 2:
        raise UserError(f"{where}: a {kind} has 2 points, not {len(points)}; mend or delete that entry")
    (x, y), (x_end, y_end) = points.tolist()
    if kind == "rectangle":
        return Polygons((rectangle(x, y, x_end, y_end),))
    if kind == "circle":  # its centre and a point on it
        radius = max(math.hypot(x_end - x, y_end - y), TINY)
        return Ellipse((x, y), (radius, radius))
    return _bitmap(points, entry_of(entry, "mask", str, where), where)


def _bitmap(points: NDArray[np.float64], text: str, where: str) -> Bitmap:
    """A PNG in base64 that fills the box from the first point to the last, both included."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as picture:
            pixels = np.array(picture.convert("L")) > 0
    except (binascii.Error, *BROKEN, *BOMB):
        raise UserError(f"{where}: the mask is no PNG in base64; save the file again in LabelMe") from None
    (left, top), (right, bottom) = points.round().astype(int).tolist()
    if pixels.shape != (bottom - top + 1, right - left + 1):
        raise UserError(
            f"{where}: the mask is {pixels.shape[1]}x{pixels.shape[0]} pixels but its box is "
            f"{right - left + 1}x{bottom - top + 1}; save the file again in LabelMe"
        )
    return Bitmap(left, top, pixels)
