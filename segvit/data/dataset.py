"""Datasets: images with masks, by split and number, whatever they are stored in.

`open_dataset` takes a description (YAML), a folder, a well-known source with its folder (`ade20k:FOLDER`), or the name
of generated images. A folder needs a `dataset.yaml`, or the files of a well-known source, or this layout, where image
and mask have the same name and line i of `classes.txt` (from 0) names class i:

    images/train/a.jpg   images/val/b.jpg   masks/train/a.png   masks/val/b.png   classes.txt

The folders train and val may be missing; a fifth of the images is then kept for val.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import parse_qsl

from segvit.contracts import Classes, Sample, UserError
from segvit.data.arrays import ARRAY_SUFFIXES
from segvit.data.decode import LabelRule, read
from segvit.data.description import SPLITS, Description, Entry, label_rule, read_class_file, read_description
from segvit.data.sources import named_source, read_source, recognise
from segvit.data.synthetic import DAY, ShapesDataset
from segvit.data.synthetic_medical import POLYPS
from segvit.data.synthetic_night import NIGHT
from segvit.data.synthetic_words import WORDS
from segvit.data.volumes import NIFTI_SUFFIXES, VolumeDataset, is_volume

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", *ARRAY_SUFFIXES)
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", *ARRAY_SUFFIXES)
JPEG_SUFFIXES = (".jpg", ".jpeg")  # of masks only where values are read as the nearest listed one
DESCRIPTIONS = ("dataset.yaml", "data.yaml")
CLASS_FILE = "classes.txt"
STEM = "{stem}"
GENERATED = {f"synthetic:{scenes.name}": scenes for scenes in (DAY, NIGHT, POLYPS, WORDS)}
FLAT = (Entry("images", "masks"),)
FLAT_VAL_PART = 0.2  # of a folder that has no split of its own

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

    @property
    def channels(self) -> int:
        """The number of channels of the images."""
        ...

    @property
    def levels(self) -> tuple[float, float] | None:
        """The raw levels that become 0 and 255 in the images; None = the full range of their type."""
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
    channels: int = 3
    levels: tuple[float, float] | None = None

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

    def image_path(self, split: str, i: int) -> Path:
        """The file of image i."""
        return self._of(split)[i][0]

    def mask_path(self, split: str, i: int) -> Path:
        """The file of mask i."""
        return self._of(split)[i][1]

    def read(self, split: str, i: int) -> Sample:
        """Sample i, decoded."""
        image, mask = self._of(split)[i]
        return read(image, mask, self.rule, self.name(split, i), channels=self.channels, levels=self.levels)

    def _of(self, split: str) -> tuple[Pair, ...]:
        if split not in self.pairs:
            raise UserError(f"{self.root}: no split {split!r}; there are {', '.join(self.pairs)}")
        return self.pairs[split]


class Found(NamedTuple):
    """The files of an entry, by stem and sorted by it: what inside the folder or the template is the same in a pair."""

    pairs: tuple[tuple[str, Path, Path], ...]  # stem, image, mask
    images_alone: tuple[tuple[str, Path], ...]  # without a mask, or a second file of the same stem
    masks_alone: tuple[tuple[str, Path], ...]
    lines_alone: tuple[str, ...] = ()  # of the list: lines without a file


def open_dataset(source: str | Path) -> Dataset:
    """The dataset of a YAML file, a folder or a well-known source (`ade20k:FOLDER`), or a generated one.

    Generated are `synthetic:shapes`, `synthetic:night`, `synthetic:polyps` and `synthetic:words`, with
    options as in `synthetic:shapes?train=400&size=96`.
    """
    if is_generated(source):
        return _generated(str(source))
    description = describe_source(source)
    root, nearest = description.root, description.rule.nearest
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; check the path")
    found = {
        split: [pair for entry in entries for pair in match_files(root, entry, nearest=nearest)]
        for split, entries in description.splits.items()
    }
    if description.val_part is not None:
        kept = split_by_name([stem for stem, _, _ in found["train"]], description.val_part)
        if not kept:
            raise UserError(f"{root}: train has one image, so no part of it can be val; add images or a val of its own")
        found["val"] = [pair for pair in found["train"] if pair[0] in kept]
        found["train"] = [pair for pair in found["train"] if pair[0] not in kept]
    pairs = {split: tuple((image, mask) for _, image, mask in found[split]) for split in SPLITS if split in found}
    kind = VolumeDataset if any(is_volume(part[0][1]) for part in pairs.values() if part) else FolderDataset
    return kind(
        description.classes, description.rule, root, pairs, channels=description.channels, levels=description.range
    )


def holds_volumes(source: str | Path) -> bool:
    """Whether the labels of a source are volumes, by their names; False also for a source that cannot be found."""
    if is_generated(source):
        return False
    try:
        description = describe_source(source)
        entries = [entry.masks for split in description.splits.values() for entry in split]
        suffixes = (*NIFTI_SUFFIXES, *ARRAY_SUFFIXES)
        first = [list_files(description.root, masks, suffixes)[:1] for masks in entries]
        return any(is_volume(path) for files in first for _, path in files)
    except UserError:
        return False


def is_generated(source: str | Path) -> bool:
    """Whether a source names generated images, which lie in no files."""
    return str(source).startswith("synthetic:")


def describe_source(source: str | Path) -> Description:
    """The description of a YAML file, a folder or a source by name, without looking for all images and masks."""
    named = named_source(str(source))
    if named:
        return read_source(*named)
    path = Path(source).expanduser()
    if not path.is_dir():
        if path.exists() and path.suffix.lower() not in (".yaml", ".yml"):
            raise UserError(f"{path}: not a dataset; give a folder or its dataset.yaml")
        return read_description(path)
    for name in DESCRIPTIONS:
        if (path / name).is_file():
            return read_description(path / name)
    known = None if (path / CLASS_FILE).is_file() else recognise(path)
    return read_source(known, path) if known else _two_folders(path)


def split_by_name(stems: Sequence[str], part: float) -> set[str]:
    """The stems that go to val: about `part` of them, chosen by their names alone.

    A stem keeps its place when others come or go. Of two or more, at least one is chosen and one is not.
    """
    places = sorted((int.from_bytes(hashlib.sha256(stem.encode()).digest()[:8], "big"), stem) for stem in set(stems))
    if len(places) < 2:
        return set()
    count = sum(place < part * 2**64 for place, _ in places)
    return {stem for _, stem in places[: min(max(count, 1), len(places) - 1)]}


def find_pairs(root: Path, entry: Entry) -> Found:
    """The images and masks of an entry, matched by stem. JPEGs count as masks here.

    Raises UserError for a missing folder or list only.
    """
    masks = list_files(root, entry.masks, (*MASK_SUFFIXES, *NIFTI_SUFFIXES))
    # Images and masks may share a folder: what is a mask is then no image. Arrays may hold both.
    taken = {path for _, path in masks if path.suffix.lower() not in ARRAY_SUFFIXES}
    if not _folder(root, entry.images).is_relative_to(_folder(root, entry.masks)) or STEM in entry.masks:
        stems = {stem for stem, _ in masks}
        jpegs = list_files(root, entry.masks, JPEG_SUFFIXES)
        masks += [(stem, path) for stem, path in jpegs if stem not in stems]
        taken.update(path for _, path in jpegs)
    found = list_files(root, entry.images, (*IMAGE_SUFFIXES, *NIFTI_SUFFIXES))
    images = [(stem, path) for stem, path in found if path not in taken]
    lines_alone: tuple[str, ...] = ()
    if entry.list is not None:
        listed, lines_alone = _listed(root / entry.list, {stem for stem, _ in [*images, *masks]})
        images, masks = ([file for file in files if file[0] in listed] for files in (images, masks))
    left_out = _left_out({stem for stem, _ in [*images, *masks]}, entry.exclude)
    images, masks = ([file for file in files if file[0] not in left_out] for files in (images, masks))
    first_image, first_mask = dict(reversed(images)), dict(reversed(masks))
    both = sorted(first_image.keys() & first_mask.keys())
    return Found(
        tuple((stem, first_image[stem], first_mask[stem]) for stem in both),
        tuple((stem, path) for stem, path in images if stem not in first_mask or first_image[stem] != path),
        tuple((stem, path) for stem, path in masks if stem not in first_image or first_mask[stem] != path),
        lines_alone,
    )


def match_files(root: Path, entry: Entry, *, nearest: bool) -> tuple[tuple[str, Path, Path], ...]:
    """Stem, image and mask of all pairs of an entry; raises UserError where a file has no counterpart.

    JPEG masks are only fine where values are read as the `nearest` listed one.
    """
    found = find_pairs(root, entry)
    masks_alone = found.masks_alone
    if not nearest:  # JPEGs beside the masks are then pictures for people
        masks_alone = tuple(file for file in masks_alone if not _is_jpeg(file[1]))
        jpeg = next((mask for _, _, mask in found.pairs if _is_jpeg(mask)), None)
        if jpeg:
            raise UserError(f"{jpeg}: JPEG changes pixel values; make the masks PNGs, or set nearest: true in the YAML")
    if found.lines_alone:
        raise UserError(
            f"{root / str(entry.list)}: no file of {entry.images} for {len(found.lines_alone)} lines such as "
            f"{found.lines_alone[0]!r}; take them out, or add the files"
        )
    if not found.pairs and not found.images_alone:
        raise UserError(f"{root / entry.images}: no images; put {', '.join(IMAGE_SUFFIXES)} files there")
    if not found.pairs and not masks_alone:
        raise UserError(f"{root / entry.masks}: no masks; put PNG files there")
    pairs = {stem: (image, mask) for stem, image, mask in found.pairs}
    for files, what, where, column in (
        (found.images_alone, "images have no mask", entry.masks, 0),
        (masks_alone, "masks have no image", entry.images, 1),
    ):
        for stem, path in files:
            if stem in pairs:
                raise UserError(f"{path}: has the same stem as {pairs[stem][column].name}; keep one of the two files")
        if files:
            shown = ", ".join(path.name for _, path in files[:3]) + (", ..." if len(files) > 3 else "")
            raise UserError(f"{root}: {len(files)} {what}: {shown}; add them to {where} or take these files out")
    return found.pairs


def list_files(root: Path, entry: str, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """The files of a folder (recursively) or a template with their stems, sorted.

    A stem is the path inside the folder without the suffix, or what `{stem}` is.
    """
    folder = _folder(root, entry)
    before, is_template, after = entry.partition(STEM)
    start = before.rpartition("/")[2]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check the path and the entry {entry!r}")
    found: list[tuple[str, Path]] = []
    for parent, _, names in os.walk(folder, followlinks=True):
        below = Path(parent).relative_to(folder).as_posix()
        for name in names:
            if name.startswith(".") or not name.lower().endswith(suffixes):
                continue
            inside = name if below == "." else f"{below}/{name}"
            stem = inside.removesuffix(".gz").rpartition(".")[0]
            if is_template:
                if not (inside.startswith(start) and inside.endswith(after) and len(inside) > len(start + after)):
                    continue
                stem = inside[len(start) : len(inside) - len(after)]
            found.append((stem, Path(parent, name)))
    return sorted(found)


def _folder(root: Path, entry: str) -> Path:
    before, is_template, _ = entry.partition(STEM)
    return root / (before.rpartition("/")[0] if is_template else entry)


def _is_jpeg(path: Path) -> bool:
    return path.suffix.lower() in JPEG_SUFFIXES


def _listed(path: Path, stems: set[str]) -> tuple[set[str], tuple[str, ...]]:
    """The stems that a list file names, and its lines that name none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(f"{path}: {reason}; list: must name a text file with one stem a line") from None
    named: set[str] = set()
    alone: list[str] = []
    for line in filter(str.strip, lines):
        field = line.split()[0]
        # Lists often hold whole paths: a suffix and leading folders may be there or not.
        parts = [part for whole in (field, os.path.splitext(field)[0]) for part in _ends(whole)]
        stem = next((part for part in parts if part in stems), None)
        if stem is None:
            alone.append(line.strip())
        else:
            named.add(stem)
    return named, tuple(alone)


def _ends(path: str) -> list[str]:
    """A path, and what is left of it when leading folders are dropped one by one."""
    parts = path.split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


def _left_out(stems: set[str], patterns: Sequence[str]) -> set[str]:
    left_out = stems & set(patterns)
    for pattern in patterns:
        if any(sign in pattern for sign in "*?["):
            left_out.update(stem for stem in stems if fnmatch.fnmatchcase(stem, pattern))
    return left_out


def find_layout(root: Path) -> dict[str, tuple[Entry, ...]]:
    """The entries of a folder without a YAML, by split; all is train where images/ has no folder of a split."""
    present = [split for split in SPLITS if (root / "images" / split).is_dir()]
    if present:
        return {split: (Entry(f"images/{split}", f"masks/{split}"),) for split in present}
    if (root / "images").is_dir() and (root / "masks").is_dir():
        return {"train": FLAT}
    raise UserError(
        f"{root}: neither a dataset.yaml nor folders images/train, images/val, masks/train, masks/val; make one"
    )


def _two_folders(root: Path) -> Description:
    splits = find_layout(root)
    names = root / CLASS_FILE
    classes, values = read_class_file(names)
    rule = label_rule(values, [], classes.ignore_index, str(names))
    return Description(root, splits, classes, rule, val_part=FLAT_VAL_PART if splits == {"train": FLAT} else None)


def _generated(source: str) -> ShapesDataset:
    name, _, query = source.partition("?")
    if name not in GENERATED:
        raise UserError(f"{name}: no such generated dataset; there is {', '.join(GENERATED)}")
    options: dict[str, int] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in ("train", "val", "size", "seed") or not value.isdecimal():
            raise UserError(f"{source}: cannot use {key}={value}; options are train, val, size and seed with numbers")
        options[key] = int(value)
    return ShapesDataset(**options, scenes=GENERATED[name])
