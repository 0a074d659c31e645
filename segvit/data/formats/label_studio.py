"""Label Studio's JSON export (not JSON-MIN).

Classes   the labels that occur, alphabetically
Files     the JSON; a task's image is found by the end of its address, also without the 8 characters that an upload
          puts before the name, and behind `?d=` of local files; the split is always train
Tasks     of several annotations the first one that was not cancelled counts, the others are counted in the notes; tasks
          without any are left out, counted
Shapes    polygons, rectangles (turned about their left top corner), ellipses (x, y is the centre), all in percent of
          the image, and brushes; regions without a label and other results are left out, counted
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from segvit.contracts import Size, UserError
from segvit.data.formats.images import ImageFinder, image_root, upright_size
from segvit.data.formats.polygons import rectangle, turned
from segvit.data.formats.reading import entry_of, index_of, number, points_of, read_json, shown
from segvit.data.formats.rle import decode_brush
from segvit.data.formats.shapes import Annotations, Bitmap, Ellipse, Picture, Polygons, Shape

LABEL_KEYS = ("polygonlabels", "rectanglelabels", "ellipselabels", "brushlabels", "labels")
UPLOAD = re.compile(r"^[0-9a-f]{8}-(?=.)")
UNANNOTATED = "tasks without an annotation, left out"
FURTHER = "further annotations of a task, left out"
UNLABELLED = "regions without a label, left out"


def read_label_studio(path: Path, *, images: Path | None = None) -> Annotations:
    """The regions of a Label Studio export."""
    if path.is_dir():
        path = _only_file(path)
    tasks = read_json(path)
    if not isinstance(tasks, list):
        raise UserError(f"{path}: holds {shown(tasks)}, not a list of tasks; export as JSON")
    finder = ImageFinder(images or image_root(path))
    notes: Counter[str] = Counter()
    found: list[tuple[Path, list[tuple[Mapping[str, Any], str]], str]] = []
    for place, task in enumerate(tasks):
        where = f"{path}: task {task.get('id', place) if isinstance(task, dict) else place}"
        results = _results(task, where, notes)
        if results is not None:
            image = _image(task, finder, path.parent, where)
            found.append((image, list(_regions(results, where, notes)), where))
    names = sorted({_label(entry, where) for _, regions, _ in found for entry, where in regions})
    labels = {name: label for label, name in enumerate(names)}
    pictures = [
        Picture("train", image, partial(_shapes, image, regions, labels), None, where)
        for image, regions, where in found
    ]
    return Annotations(tuple(names), tuple(pictures), notes)


def _only_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.json"))
    if len(files) != 1:
        raise UserError(f"{folder}: {len(files)} JSON files in it; give the one that Label Studio exported")
    return files[0]


def _results(task: Any, where: str, notes: Counter[str]) -> list[Any] | None:
    """The results of the annotation that counts; None where the task has none."""
    if isinstance(task, dict) and "annotations" not in task and "data" not in task:
        raise UserError(f"{where}: holds neither data nor annotations; export as JSON, not as JSON-MIN")
    listed = entry_of(task, "annotations", list, where)
    annotations = [entry for entry in listed if not (isinstance(entry, dict) and entry.get("was_cancelled"))]
    notes[UNANNOTATED] += not annotations
    notes[FURTHER] += max(0, len(annotations) - 1)
    return entry_of(annotations[0], "result", list, where) if annotations else None


def _image(task: Mapping[str, Any], finder: ImageFinder, near: Path, where: str) -> Path:
    data = entry_of(task, "data", dict, where)
    address = next((data[key] for key in ("image", "img", *data) if isinstance(data.get(key), str)), "")
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise UserError(f"{where}: the address {shown(address)} of the image is wrong ({error}); mend it") from None
    name = parse_qs(parts.query).get("d", [""])[0] or unquote(parts.path)
    folder, _, last = name.lstrip("/").rpartition("/")
    try:
        return finder.find(f"{folder}/{last}".lstrip("/"), near=near, split="train", where=where)
    except UserError:
        if not UPLOAD.match(last):
            raise
        return finder.find(UPLOAD.sub("", last), near=near, split="train", where=where)


def _regions(results: Sequence[Any], where: str, notes: Counter[str]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The results that are labelled regions, each with its name for messages."""
    for result in results:
        value = result.get("value") if isinstance(result, dict) else None
        if not isinstance(value, dict) or not any(key in value for key in ("points", "rle", "radiusX", "height")):
            kind = result.get("type", "unknown") if isinstance(result, dict) else "unknown"
            notes[f"results of type {kind}, left out since they cover no area"] += 1
        elif not any(value.get(key) for key in LABEL_KEYS):
            notes[UNLABELLED] += 1  # with a separate Labels tag the labelled region follows as a result of its own
        elif result.get("image_rotation"):
            raise UserError(f"{where}: the image was turned in the tool by {result['image_rotation']}; turn it back")
        else:
            yield result, f"{where}: region {result.get('id', '')}".rstrip()


def _label(result: Mapping[str, Any], where: str) -> str:
    value = result["value"]
    listed = next(value[key] for key in LABEL_KEYS if value.get(key))
    if not isinstance(listed, list) or len(listed) != 1 or not isinstance(listed[0], str):
        raise UserError(f"{where}: has the labels {shown(listed)}; a region needs exactly one")
    return listed[0].strip()


def _shapes(
    image: Path, regions: Sequence[tuple[Mapping[str, Any], str]], labels: Mapping[str, int]
) -> Iterator[Shape]:
    size = upright_size(image) if regions else (0, 0)
    for result, where in regions:
        declared = entry_of(result, "original_height", int, where), entry_of(result, "original_width", int, where)
        if declared != size:
            raise UserError(f"{where}: drawn on (height, width) {declared} but {image} is {size}; give that image")
        yield Shape(index_of(_label(result, where), labels, where), _region(result["value"], size, where))


def _region(value: Mapping[str, Any], size: Size, where: str) -> Polygons | Ellipse | Bitmap:
    if "rle" in value:
        return Bitmap(0, 0, decode_brush(entry_of(value, "rle", list, where), size, where))
    height, width = size
    scale = np.array([width, height]) / 100
    if "points" in value:
        return Polygons((points_of(entry_of(value, "points", list, where), where) * scale,))
    x, y = number(value, "x", where) * scale[0], number(value, "y", where) * scale[1]
    degrees = number(value, "rotation", where, 0)
    if "radiusX" in value:
        radii = number(value, "radiusX", where) * scale[0], number(value, "radiusY", where) * scale[1]
        if min(radii) <= 0:
            raise UserError(f"{where}: an ellipse has a radius of 0 or less; delete that region")
        return Ellipse((x, y), radii, degrees)
    right, bottom = x + number(value, "width", where) * scale[0], y + number(value, "height", where) * scale[1]
    return Polygons((turned(rectangle(x, y, right, bottom), (x, y), degrees),))
