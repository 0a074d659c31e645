"""Writes the plain layout: images/SPLIT/STEM.*, masks/SPLIT/STEM.png and a dataset.yaml, made as a whole or not at all.

Masks are palette PNGs that hold contiguous class ids, with 255 to ignore; above 255 classes 16-bit PNGs with 65535.
Images are copied byte for byte where the source has them as files. Everything is written into a hidden folder beside
the result, which gets its name in the end: an error or Ctrl-C leaves nothing, and what was there before untouched.
"""

from __future__ import annotations

import io
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from segvit.contracts import Classes, UserError
from segvit.data.dataset import Dataset, FolderDataset
from segvit.data.description import SPLITS
from segvit.data.formats.images import stems
from segvit.files import open_atomic, write_bytes, write_text

CONTENT = {"images", "masks", "dataset.yaml"}  # what an earlier result holds; anything else is not ours to delete

Progress = Callable[[int, int], None]  # images done, all images


class PlainWriter:
    """Adds samples to a folder in the plain layout; made by `plain_folder`."""

    def __init__(self, root: Path, classes: Classes, reading: dict[str, Any]) -> None:
        self.root, self.classes = root, classes
        self.reading = reading  # what the description says of the images: channels, range
        self.counts: Counter[str] = Counter()  # samples of each split

    def add(self, split: str, stem: str, image: Path | NDArray[np.uint8], mask: NDArray[Any]) -> None:
        """One sample: an image file to copy or pixels (H, W, C) to save, and class ids (H, W)."""
        if isinstance(image, Path):
            with image.open("rb") as source, open_atomic(self._place("images", split, stem, image.suffix)) as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
        else:
            suffix, data = _encoded(image)
            write_bytes(self._place("images", split, stem, suffix), data)
        picture = Image.fromarray(mask.astype(self.classes.dtype, copy=False))
        if self.classes.dtype == np.uint8:
            # All 256 colours, since Pillow saves fewer bits a pixel for a short palette and would cut off 255.
            palette = np.zeros((256, 3), np.uint8)
            palette[: len(self.classes)] = self.classes.palette
            picture.putpalette(palette.tobytes())
        write_bytes(self._place("masks", split, stem, ".png"), _png(picture))
        self.counts[split] += 1

    def describe(self) -> None:
        """Write the dataset.yaml of what was added."""
        splits = [split for split in SPLITS if self.counts[split]]
        entries = {split: {"images": f"images/{split}", "masks": f"masks/{split}"} for split in splits}
        lines = [f"{key}: {_on_one_line(value)}" for key, value in {"path": ".", **self.reading, **entries}.items()]
        lines.append("classes:")
        for index, (name, color) in enumerate(zip(self.classes.names, self.classes.palette, strict=True)):
            lines.append(f"  {index}: {_on_one_line({'name': name, 'color': list(color)})}")
        write_text(self.root / "dataset.yaml", "\n".join(lines) + "\n")

    def _place(self, folder: str, split: str, stem: str, suffix: str) -> Path:
        if split not in SPLITS:
            raise UserError(f"the split {split!r} has no place in the plain layout; call it {', '.join(SPLITS)}")
        return self.root / folder / split / f"{stem}{suffix}"


@contextmanager
def plain_folder(
    out: Path, classes: Classes, *, overwrite: bool = False, reading: dict[str, Any] | None = None
) -> Iterator[PlainWriter]:
    """A writer whose content becomes the folder `out` when the block ends well.

    `reading` are entries of the dataset.yaml that say how the image files are to be read: channels, range.
    Raises UserError where `out` holds something, unless it holds an earlier result and `overwrite` is set.
    """
    out = Path(os.path.abspath(out))  # a last part such as .. is no name that a folder can get
    _check_free(out, overwrite)
    staging = out.parent / f".{out.name}-{secrets.token_hex(6)}.tmp"
    try:
        writer = PlainWriter(staging / "new", classes, reading or {})
        yield writer
        writer.describe()
        _exchange(staging / "new", out, staging / "old")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_dataset(
    dataset: Dataset, out: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, int]:
    """Convert any dataset to the plain layout; its masks hold the ids that training sees. Returns samples by split."""
    from_files = isinstance(dataset, FolderDataset)
    total = sum(dataset.count(split) for split in dataset.splits)
    done = 0
    with plain_folder(out, dataset.classes, overwrite=overwrite, reading=_reading(dataset)) as writer:
        for split in dataset.splits:
            files = [_file(dataset, split, i) for i in range(dataset.count(split))]
            check_apart(out, files if from_files else [])
            for i, (stem, file) in enumerate(zip(stems(files), files, strict=True)):
                sample = dataset.read(split, i)
                writer.add(split, stem, file if from_files else sample.image, sample.mask)
                done += 1
                if progress:
                    progress(done, total)
    return dict(writer.counts)


def check_apart(out: Path, sources: list[Path]) -> None:
    """Raises UserError where a file of the source lies in `out`."""
    folder = Path(out).resolve()
    folders = {path if path.is_dir() else path.parent: path for path in sources}  # few, however many files there are
    inside = next((path for parent, path in folders.items() if parent.resolve().is_relative_to(folder)), None)
    if inside:
        raise UserError(f"{out}: holds {inside}, which is to be converted; write to another folder")


def _check_free(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder to write to")
    held = {path.name for path in out.iterdir()} if out.exists() else set()
    if held and not overwrite:
        raise UserError(f"{out}: is not empty; give another folder, or overwrite it")
    if held - CONTENT:
        raise UserError(f"{out}: holds {sorted(held - CONTENT)[0]}, which a conversion never wrote; empty it yourself")


def _exchange(new: Path, out: Path, old: Path) -> None:
    """Give `new` the name `out`; what had it becomes `old`, or stays where that fails."""
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise


def _file(dataset: Dataset, split: str, i: int) -> Path:
    """The image file of a sample; a name of the same kind where the dataset has no files."""
    if isinstance(dataset, FolderDataset):
        return dataset.image_path(split, i)
    return Path(dataset.name(split, i))


def _reading(dataset: Dataset) -> dict[str, Any]:
    """The entries that a description needs besides folders and classes, so that the images are read as before."""
    entries: dict[str, Any] = {} if dataset.channels == 3 else {"channels": dataset.channels}
    if isinstance(dataset, FolderDataset) and dataset.levels is not None:  # others hand on images of 8 bits
        entries["range"] = list(dataset.levels)
    return entries


def _encoded(image: NDArray[np.uint8]) -> tuple[str, bytes]:
    """The suffix and content of a file that holds (H, W, C) pixels: PNG, or NumPy's where PNG has no such channels."""
    if image.shape[2] in (1, 3):
        return ".png", _png(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image))
    buffer = io.BytesIO()
    np.save(buffer, image)
    return ".npy", buffer.getvalue()


def _on_one_line(value: Any) -> str:
    """A value as YAML, quoted where that is needed."""
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")  # the latter ends what is no list or mapping


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
