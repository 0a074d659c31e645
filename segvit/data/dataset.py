"""Datasets: images with masks, by split and number, whatever they are stored in.

`open_dataset` takes a description (YAML), a folder, or the name of generated images. A folder needs a `dataset.yaml`
or this layout, where image and mask have the same name and line i of `classes.txt` (from 0) names class i:

    images/train/a.jpg   images/val/b.jpg   masks/train/a.png   masks/val/b.png   classes.txt
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qsl

from segvit.contracts import Classes, Sample, UserError
from segvit.data.decode import LabelRule, read
from segvit.data.description import SPLITS, Description, label_rule, read_class_file, read_description
from segvit.data.synthetic import ShapesDataset

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
DESCRIPTIONS = ("dataset.yaml", "data.yaml")
STEM = "{stem}"
SHAPES = "synthetic:shapes"

Pair = tuple[Path, Path]  # an image and its mask


class Dataset(Protocol):
    """What training and evaluation read: samples by split and number, always in the same order."""

    @property
    def classes(self) -> Classes:
        """The classes whose ids the masks hold."""
        ...

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits there are, such as train and val."""
        ...

    def count(self, split: str) -> int:
        """The number of samples in a split."""
        ...

    def name(self, split: str, i: int) -> str:
        """What sample i is called in messages and files."""
        ...

    def read(self, split: str, i: int) -> Sample:
        """Sample i, decoded."""
        ...


@dataclass(frozen=True)
class FolderDataset:
    """Images and masks in files. The files were matched when it was made; their content is read when asked for."""

    classes: Classes
    rule: LabelRule
    root: Path
    pairs: Mapping[str, tuple[Pair, ...]]

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits there are."""
        return tuple(self.pairs)

    def count(self, split: str) -> int:
        """The number of samples in a split."""
        return len(self._of(split))

    def name(self, split: str, i: int) -> str:
        """The path of image i below the root."""
        image = self._of(split)[i][0]
        return (image.relative_to(self.root) if image.is_relative_to(self.root) else image).as_posix()

    def read(self, split: str, i: int) -> Sample:
        """Sample i, decoded."""
        image, mask = self._of(split)[i]
        return read(image, mask, self.rule, self.name(split, i))

    def _of(self, split: str) -> tuple[Pair, ...]:
        if split not in self.pairs:
            raise UserError(f"{self.root}: no split {split!r}; there are {', '.join(self.pairs)}")
        return self.pairs[split]


def open_dataset(source: str | Path) -> Dataset:
    """The dataset described by a YAML file, held by a folder, or generated (`synthetic:shapes?train=400&size=96`)."""
    if str(source).startswith("synthetic:"):
        return _generated(str(source))
    path = Path(source).expanduser()
    if not path.is_dir():
        if path.exists() and path.suffix.lower() not in (".yaml", ".yml"):
            raise UserError(f"{path}: not a dataset; give a folder or its dataset.yaml")
        return _described(read_description(path))
    for name in DESCRIPTIONS:
        if (path / name).is_file():
            return _described(read_description(path / name))
    return _described(_two_folders(path))


def match_files(root: Path, images: str, masks: str) -> tuple[Pair, ...]:
    """Images and masks of equal stems, sorted; entries are folders or templates with `{stem}` below `root`."""
    mask_files = list_files(root, masks, MASK_SUFFIXES)
    # Images and masks may share a folder: what is a mask is then no image.
    image_files = list_files(root, images, IMAGE_SUFFIXES, besides=frozenset(mask_files.values()))
    if not image_files:
        raise UserError(f"{root / images}: no images; put {', '.join(IMAGE_SUFFIXES)} files there")
    if not mask_files:
        jpegs = list_files(root, masks, (".jpg", ".jpeg")) if STEM not in masks else {}
        reason = "JPEG changes pixel values, so make the masks PNGs" if jpegs else "put PNG files there"
        raise UserError(f"{root / masks}: no masks; {reason}")
    for found, others, what, where in (
        (image_files, mask_files, "images have no mask", masks),
        (mask_files, image_files, "masks have no image", images),
    ):
        orphans = sorted(found.keys() - others.keys())
        if orphans:
            shown = ", ".join(found[stem].name for stem in orphans[:3]) + (", ..." if len(orphans) > 3 else "")
            raise UserError(f"{root}: {len(orphans)} {what}: {shown}; add them to {where} or take these files out")
    return tuple((image_files[stem], mask_files[stem]) for stem in sorted(image_files))


def list_files(
    root: Path, entry: str, suffixes: tuple[str, ...], *, besides: frozenset[Path] = frozenset()
) -> dict[str, Path]:
    """The files of a folder (recursively) or a template by stem: the path inside the folder, or what `{stem}` is."""
    before, is_template, after = entry.partition(STEM)
    folder = root / (before.rpartition("/")[0] if is_template else entry)
    start = before.rpartition("/")[2]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check path: and the entry {entry!r}")
    found: dict[str, Path] = {}
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            path = Path(parent, name)
            if name.startswith(".") or not name.lower().endswith(suffixes) or path in besides:
                continue
            inside = path.relative_to(folder).as_posix()
            stem = inside.rpartition(".")[0]
            if is_template:
                if not (inside.startswith(start) and inside.endswith(after) and len(inside) > len(start + after)):
                    continue
                stem = inside[len(start) : len(inside) - len(after)]
            if stem in found:
                raise UserError(f"{path}: has the same stem as {found[stem].name}; keep one of the two files")
            found[stem] = path
    return found


def _described(description: Description) -> FolderDataset:
    root = description.root
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; check path: in the YAML")
    pairs = {split: match_files(root, images, masks) for split, (images, masks) in description.splits.items()}
    return FolderDataset(description.classes, description.rule, root, pairs)


def _two_folders(root: Path) -> Description:
    present = [split for split in SPLITS if (root / "images" / split).is_dir()]
    if not present:
        raise UserError(
            f"{root}: neither a dataset.yaml nor folders images/train, images/val, masks/train, masks/val; make one"
        )
    names = root / "classes.txt"
    classes, values = read_class_file(names)
    rule = label_rule(values, [], classes.ignore_index, str(names))
    return Description(root, {split: (f"images/{split}", f"masks/{split}") for split in present}, classes, rule)


def _generated(source: str) -> ShapesDataset:
    name, _, query = source.partition("?")
    if name != SHAPES:
        raise UserError(f"{name}: no such generated dataset; there is {SHAPES}")
    options: dict[str, int] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in ("train", "val", "size", "seed") or not value.isdecimal():
            raise UserError(f"{source}: cannot use {key}={value}; options are train, val, size and seed with numbers")
        options[key] = int(value)
    return ShapesDataset(**options)
