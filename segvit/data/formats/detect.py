"""Which format a file or folder is in, told by looking at names and at the keys of JSON files.

A JSON file is recognised by the keys within its first and last 256 KiB, since large ones take long to read. In a
folder, the JSON files directly in it, in `annotations/` and in folders one level below are looked at; LabelMe's may lie
deeper. Everything must speak for one format, otherwise the user is asked.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from segvit.contracts import UserError
from segvit.data.formats.reading import read_text, read_yaml

Format = Literal["coco", "coco_panoptic", "yolo", "labelme", "cvat", "label_studio", "dataset"]

LOOK = 1 << 18  # bytes of a JSON file's beginning and end
JSON_KEYS: tuple[tuple[Format, frozenset[str]], ...] = (  # the first of these whose keys all occur
    ("coco_panoptic", frozenset({"segments_info", "file_name"})),
    ("labelme", frozenset({"shapes", "imagePath"})),
    ("coco", frozenset({"images", "annotations", "categories"})),
    ("coco", frozenset({"image_id", "category_id"})),  # of a large file, where a list's name is far from both ends
    ("label_studio", frozenset({"data", "result"})),
)
YAML_NAMES = ("dataset.yaml", "data.yaml")


def detect(source: Path) -> Format:
    """The format of a file or folder; UserError where it is none or looks like several."""
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; check the path")
    seen: dict[Format, Path] = {}
    for path in [source] if source.is_file() else _telling(source):
        kind = _kind_of(path)
        if kind:
            seen.setdefault(kind, path)
    if not seen:
        raise UserError(
            f"{source}: no format recognised; give a dataset, a COCO, LabelMe or Label Studio JSON, a CVAT XML or a "
            "YOLO data.yaml, or say its kind"
        )
    if len(seen) > 1:
        found = " and ".join(f"{kind} ({path})" for kind, path in seen.items())
        raise UserError(f"{source}: looks like {found}; say which kind is meant, or give that file alone")
    return next(iter(seen))


def json_files(folder: Path, kind: Format) -> list[Path]:
    """The JSON files of one kind in a folder, in `annotations/` and in folders one level below, sorted."""
    return [path for path in _near(folder, ".json") if kind_of_json(path) == kind]


def kind_of_json(path: Path) -> Format | None:
    """The format whose keys a JSON file shows; None where it is none of them."""
    with path.open("rb") as file:
        text = file.read(LOOK)
        file.seek(max(LOOK, file.seek(0, os.SEEK_END) - LOOK))
        text += file.read()
    keys = {key.decode() for key in re.findall(rb'"(\w+)"\s*:', text)}
    return next((kind for kind, needed in JSON_KEYS if needed <= keys), None)


def _telling(folder: Path) -> list[Path]:
    """The files and folders that may tell the format of a folder."""
    described = [folder / name for name in YAML_NAMES if (folder / name).is_file()]
    if described:
        return described
    if (folder / "labels").is_dir() or any(path.is_dir() for path in folder.glob("*/labels")):
        return [folder / "labels"]
    if (folder / "images").is_dir() and (folder / "masks").is_dir():
        return [folder / "masks"]
    return _near(folder, ".xml") + (_near(folder, ".json") or sorted(folder.rglob("*.json"))[:1])


def _near(folder: Path, suffix: str) -> list[Path]:
    return sorted([*folder.glob(f"*{suffix}"), *folder.glob(f"*/*{suffix}")])


def _kind_of(path: Path) -> Format | None:
    if path.name in ("labels", "masks") and path.suffix == "":
        return "yolo" if path.name == "labels" else "dataset"
    suffix = path.suffix.lower()
    if suffix == ".json":
        return kind_of_json(path)
    if suffix == ".xml":
        return "cvat" if "<annotations" in read_text(path)[:4096] else None
    if suffix in (".yaml", ".yml"):
        return _kind_of_yaml(path)
    return None


def _kind_of_yaml(path: Path) -> Format | None:
    data = read_yaml(path)
    keys = data if isinstance(data, dict) else {}
    return "dataset" if "classes" in keys else "yolo" if "names" in keys else None
