"""COCO's JSON: instances (polygons and both kinds of RLE) and panoptic PNGs.

Classes   the categories in order of their id, used or not; where several files are read, they are joined by id
Files     one JSON, or a folder with JSONs directly in it, in `annotations/` or in folders of splits; where some are
          called instances_*, only these; the split is read from the name of the file or of its folder
          (instances_val2017.json, valid/_annotations.coco.json), else it is train
Order     crowd regions first, then the others in the order of the file; the polygons of one annotation are a union
Panoptic  the PNG of an image lies in the folder called as the JSON, or beside it; red + 256 green + 65536 blue is the
          segment's id; pixels of id 0 are ignored unless the user says otherwise
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from segvit.contracts import Size, UserError
from segvit.data.decode import read_image
from segvit.data.formats.detect import Format, json_files
from segvit.data.formats.images import ImageFinder, image_root, split_of
from segvit.data.formats.reading import entry_of, key_of, points_of, read_json, shown
from segvit.data.formats.rle import decode_counts, parse_coco_text
from segvit.data.formats.shapes import Annotations, Bitmap, Picture, Polygons, Shape

NO_OUTLINE = "annotations without an outline (boxes only), left out"
EMPTY_SEGMENT = "segments without a pixel"

Entry = Mapping[str, Any]


class Source(NamedTuple):
    """One annotation file, read."""

    path: Path
    split: str
    data: Any


class Task(NamedTuple):
    """What is needed to make the shapes of one image."""

    annotations: Sequence[Entry]
    size: Size
    labels: Mapping[int, int]  # category id -> label
    where: str
    notes: Counter[str]


def read_coco(path: Path, *, images: Path | None = None) -> Annotations:
    """The instances of one COCO file, or of the files of a folder."""
    return _read(path, "coco", images, lambda _: _instances, background="background")


def read_coco_panoptic(path: Path, *, images: Path | None = None) -> Annotations:
    """The segments of one COCO panoptic file, or of the files of a folder, with their PNGs."""
    return _read(path, "coco_panoptic", images, lambda file: partial(_segments, file), background="ignore")


def _read(
    path: Path,
    kind: Format,
    images: Path | None,
    reader: Callable[[Path], Callable[[Task], list[Shape]]],
    *,
    background: str,
) -> Annotations:
    root = image_root(path)
    finder = ImageFinder(images or root)
    sources = [Source(file, split_of(file.relative_to(root)), read_json(file)) for file in _files(path, kind)]
    _check_splits(sources)
    categories = _categories(sources)
    labels = {key: label for label, key in enumerate(sorted(categories))}
    pictures: list[Picture] = []
    notes: Counter[str] = Counter()
    for file, split, data in sources:
        of_image, seen = _by_image(data, file), set()
        for entry, where in _entries(data, "images", file):
            name, number = entry_of(entry, "file_name", str, where), key_of(entry, "id", where)
            if number in seen:
                raise UserError(f"{where}: id {number} stands before another image, too; give each image its own id")
            seen.add(number)
            size = entry_of(entry, "height", int, where), entry_of(entry, "width", int, where)
            image = finder.find(name, near=file.parent, split=split, where=where)
            task = Task(of_image.pop(number, []), size, labels, f"{file}: image {number} ({name})", notes)
            pictures.append(Picture(split, image, partial(reader(file), task), size, where))
        if of_image:
            raise UserError(
                f"{file}: annotations of image {next(iter(of_image))}, which images: does not list; mend it"
            )
    return Annotations(tuple(categories[key] for key in labels), tuple(pictures), notes, background)


def _files(path: Path, kind: Format) -> list[Path]:
    if path.is_file():
        return [path]
    files = json_files(path, kind)
    if not files:
        raise UserError(f"{path}: no JSON file of kind {kind} in it, nor one folder below; give the file")
    return [file for file in files if file.name.startswith("instances")] or files


def _check_splits(sources: Sequence[Source]) -> None:
    taken: dict[str, Path] = {}
    for path, split, _ in sources:
        if split in taken:
            raise UserError(f"{taken[split]} and {path} are both of the split {split}; give the one that is meant")
        taken[split] = path


def _categories(sources: Sequence[Source]) -> dict[int, str]:
    """Category ids and names in order of the ids."""
    found: dict[int, str] = {}
    for path, _, data in sources:
        for entry, where in _entries(data, "categories", path):
            key, name = entry_of(entry, "id", int, where), entry_of(entry, "name", str, where)
            if found.setdefault(key, name) != name:
                raise UserError(f"{where}: id {key} is {name!r} here but {found[key]!r} before; give an id one name")
    return dict(sorted(found.items()))


def _by_image(data: Any, path: Path) -> dict[int | str, list[Entry]]:
    """The annotations of each image, in the order of the file."""
    found = defaultdict(list)
    for entry, where in _entries(data, "annotations", path):
        found[key_of(entry, "image_id", where)].append(entry)
    return dict(found)


def _entries(data: Any, key: str, path: Path) -> Iterator[tuple[Any, str]]:
    """The entries of a list of the file, each with its name for messages."""
    for number, entry in enumerate(entry_of(data, key, list, f"{path}")):
        yield entry, f"{path}: {key}[{number}]"


def _instances(task: Task) -> list[Shape]:
    shapes: list[Shape] = []
    for entry in sorted(task.annotations, key=lambda entry: not entry.get("iscrowd")):
        where = f"{task.where}: annotation {entry.get('id', '')}".rstrip()
        label = _label(entry, task.labels, where)
        outline = entry.get("segmentation")
        if not outline:
            task.notes[NO_OUTLINE] += 1
        elif isinstance(outline, list):
            shapes.append(Shape(label, Polygons(tuple(points_of(ring, where) for ring in outline))))
        else:
            shapes.append(Shape(label, _bitmap(outline, task.size, where)))
    return shapes


def _bitmap(outline: Any, size: Size, where: str) -> Bitmap:
    declared = tuple(entry_of(outline, "size", list, where))
    if declared != size:
        raise UserError(f"{where}: the RLE is for (height, width) {declared} but the image is {size}; export again")
    counts = outline.get("counts")
    if isinstance(counts, str):
        counts = parse_coco_text(counts, where)
    return Bitmap(0, 0, decode_counts(counts, size, where, by_columns=True))


def _segments(file: Path, task: Task) -> list[Shape]:
    """One bitmap for each class that occurs in the PNG of an image."""
    if len(task.annotations) != 1:
        raise UserError(f"{task.where}: {len(task.annotations)} annotations but a panoptic image has one; export again")
    entry = task.annotations[0]
    name = entry_of(entry, "file_name", str, task.where)
    folders = (file.with_suffix(""), file.parent)
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{task.where}: no PNG {name} in {folders[0]} or {folders[1]}; put the panoptic PNGs there")
    colors = read_image(path).astype(np.int32)  # (H, W, 3)
    if colors.shape[:2] != task.size:
        raise UserError(f"{path} has (height, width) {colors.shape[:2]} but {task.where} is {task.size}; export again")
    labels_of = {0: 0}  # segment id -> label + 1, so that 0 is what no segment covers
    for segment in entry_of(entry, "segments_info", list, task.where):
        key = entry_of(segment, "id", int, task.where)
        if not 0 <= key < 1 << 24:
            raise UserError(f"{task.where}: segment {key} cannot stand in a PNG; ids are 0..16777215; export again")
        labels_of[key] = 1 + _label(segment, task.labels, task.where)
    known = np.array(sorted(labels_of), np.int64)
    codes = colors @ np.array([1, 256, 65536])  # (H, W)
    place = np.searchsorted(known, codes).clip(max=len(known) - 1)
    if not (known[place] == codes).all():
        strange = codes[known[place] != codes].flat[0]
        raise UserError(f"{path}: holds the segment {strange}, which segments_info does not list; export again")
    task.notes[EMPTY_SEGMENT] += len(labels_of) - len(np.union1d(np.flatnonzero(np.bincount(place.ravel())), [0]))
    labels = np.array([labels_of[key] for key in known.tolist()], np.int32)[place]
    shapes = []
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        if box is not None:
            rows, columns = box
            shapes.append(Shape(label - 1, Bitmap(columns.start, rows.start, labels[box] == label)))
    return shapes


def _label(entry: Any, labels: Mapping[int, int], where: str) -> int:
    category = entry_of(entry, "category_id", int, where)
    if category not in labels:
        raise UserError(f"{where}: category_id {category} is not among the categories {shown(list(labels))}; list it")
    return labels[category]
