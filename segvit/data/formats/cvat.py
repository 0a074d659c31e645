"""CVAT's XML "CVAT for images 1.1".

Classes   the labels in the order of the file's <meta>; where that lists none, those that occur, alphabetically
Split     the image's `subset` (train, validation, test ...), else train
Order     by z_order, then as in the file
Shapes    polygon, box and ellipse (both may be turned), mask; polylines, points, cuboids, skeletons and tags cover
          nothing and are left out, counted
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from segvit.contracts import UserError
from segvit.data.formats.images import SPLIT_WORDS, ImageFinder, image_root
from segvit.data.formats.polygons import rectangle, turned
from segvit.data.formats.reading import index_of, number, points_of, shown
from segvit.data.formats.rle import decode_counts
from segvit.data.formats.shapes import Annotations, Bitmap, Ellipse, Picture, Polygons, Shape

AREAS = ("polygon", "box", "ellipse", "mask")


def read_cvat(path: Path, *, images: Path | None = None) -> Annotations:
    """The shapes of a CVAT XML file, or of the only one in a folder."""
    file = path if path.is_file() else _only_file(path)
    tree = _parse(file)
    if tree.tag != "annotations":
        raise UserError(f"{file}: begins with <{tree.tag}>, not <annotations>; export as CVAT for images 1.1")
    if tree.find("track") is not None:
        raise UserError(f"{file}: holds tracks of a video; export as CVAT for images 1.1, which gives frames")
    finder = ImageFinder(images or image_root(file))
    labels = {name: label for label, name in enumerate(_names(tree))}
    notes: Counter[str] = Counter()
    pictures = []
    for entry in tree.findall("image"):
        name = entry.get("name", "")
        where = f"{file}: image {name}"
        split = SPLIT_WORDS.get(entry.get("subset", "").lower(), "train")
        size = _whole(entry, "height", where), _whole(entry, "width", where)
        image = finder.find(name, near=file.parent, split=split, where=where)
        pictures.append(Picture(split, image, partial(_shapes, entry, labels, notes, where), size, where))
    return Annotations(tuple(labels), tuple(pictures), notes)


class _NoDoctype(ET.TreeBuilder):
    """Refuses a DOCTYPE, the only place where XML can define entities that grow without limit or name other files."""

    def doctype(self, name: str, public: str, system: str) -> None:
        raise UserError("has a DOCTYPE, which CVAT never writes; export the file again")


def _parse(file: Path) -> ET.Element:
    try:
        return ET.parse(file, ET.XMLParser(target=_NoDoctype())).getroot()
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (ET.ParseError, LookupError, ValueError) as error:  # the latter two: an unknown or wrong encoding
        raise UserError(f"{file}: not valid XML ({error}); export the file again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error}); check the path") from None


def _only_file(folder: Path) -> Path:
    files = sorted([*folder.glob("*.xml"), *folder.glob("*/*.xml")])
    if len(files) != 1:
        found = f"{len(files)} XML files" if files else "no XML file"
        raise UserError(f"{folder}: {found} in it, nor one folder below; give CVAT's annotations.xml")
    return files[0]


def _names(tree: ET.Element) -> list[str]:
    meta = tree.find("meta")
    found = [] if meta is None else list(meta.iter("label"))
    # The points of a skeleton are listed among the labels, with the skeleton as their parent.
    listed = [(label.findtext("name") or "").strip() for label in found if not label.findtext("parent")]
    used = {shape.get("label", "").strip() for image in tree.findall("image") for shape in image if shape.tag in AREAS}
    return list(dict.fromkeys(filter(None, listed))) or sorted(used)


def _shapes(image: ET.Element, labels: Mapping[str, int], notes: Counter[str], file: str) -> list[Shape]:
    shapes: list[tuple[float, Shape]] = []
    for place, entry in enumerate(image):
        where = f"{file}: {entry.tag} {place}"
        if entry.tag not in AREAS:
            notes[f"<{entry.tag}> shapes, left out since they cover no area"] += 1
            continue
        label = index_of(entry.get("label", "").strip(), labels, where)
        shapes.append((number(entry.attrib, "z_order", where, 0), Shape(label, _region(entry, where))))
    return [shape for _, shape in sorted(shapes, key=lambda pair: pair[0])]


def _region(entry: ET.Element, where: str) -> Polygons | Ellipse | Bitmap:
    if entry.tag == "polygon":
        return Polygons((points_of([pair.split(",") for pair in entry.get("points", "").split(";")], where),))
    if entry.tag == "mask":
        return _bitmap(entry, where)
    value = {
        key: number(entry.attrib, key, where)
        for key in ("cx", "cy", "rx", "ry", "xtl", "ytl", "xbr", "ybr")
        if key.startswith(("c", "r")) == (entry.tag == "ellipse")
    }
    degrees = number(entry.attrib, "rotation", where, 0)
    if entry.tag == "ellipse":
        if min(value["rx"], value["ry"]) <= 0:
            raise UserError(f"{where}: an ellipse has a radius of 0 or less; mend or delete that entry")
        return Ellipse((value["cx"], value["cy"]), (value["rx"], value["ry"]), degrees)
    left, top, right, bottom = value["xtl"], value["ytl"], value["xbr"], value["ybr"]
    return Polygons((turned(rectangle(left, top, right, bottom), ((left + right) / 2, (top + bottom) / 2), degrees),))


def _bitmap(entry: ET.Element, where: str) -> Bitmap:
    left, top, width, height = (_whole(entry, key, where) for key in ("left", "top", "width", "height"))
    if min(width, height) < 1:
        raise UserError(f"{where}: the mask is {width}x{height} pixels; delete it or export the file again")
    text = entry.get("rle", "")
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{where}: rle is {shown(text)} but must be whole numbers; export the file again") from None
    return Bitmap(left, top, decode_counts(counts, (height, width), where, by_columns=False))


def _whole(entry: ET.Element, key: str, where: str) -> int:
    value = number(entry.attrib, key, where)
    if value != int(value):
        raise UserError(f"{where}: {key} is {value} but must be a whole number; export the file again")
    return int(value)
