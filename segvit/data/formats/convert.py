"""One door for all formats: whatever the annotations are in, the plain layout comes out.

Pixels in no shape become the class "background" with id 0, before the source's classes, which keep their order; where
the source has a class of that name, they become that one. For COCO panoptic they are ignored, since it labels what is
background. `background="ignore"` or another class name overrides both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import Classes, UserError
from segvit.data.dataset import open_dataset
from segvit.data.formats.coco import read_coco, read_coco_panoptic
from segvit.data.formats.cvat import read_cvat
from segvit.data.formats.detect import Format, detect
from segvit.data.formats.images import stems, upright_size
from segvit.data.formats.label_studio import read_label_studio
from segvit.data.formats.labelme import read_labelme
from segvit.data.formats.plain import PlainWriter, Progress, check_apart, plain_folder, write_dataset
from segvit.data.formats.shapes import Annotations, Picture, draw
from segvit.data.formats.yolo import read_yolo
from segvit.palette import generate_palette

Kind = Literal["auto", "coco", "coco_panoptic", "yolo", "labelme", "cvat", "label_studio", "dataset"]

READERS: dict[Format, Callable[..., Annotations]] = {
    "coco": read_coco,
    "coco_panoptic": read_coco_panoptic,
    "yolo": read_yolo,
    "labelme": read_labelme,
    "cvat": read_cvat,
    "label_studio": read_label_studio,
}


@dataclass(frozen=True)
class Converted:
    """What a conversion did."""

    kind: Format
    images: dict[str, int]  # by split
    classes: Classes
    notes: dict[str, int]  # what was left out or is worth saying, and how often


def convert(
    source: str | Path,
    out: str | Path,
    *,
    kind: Kind = "auto",
    images: str | Path | None = None,
    background: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Convert a file or folder to the plain layout in the folder `out`.

    `images` is the folder of the images where it is not beside the annotations. `background` is the class of pixels in
    no shape, or "ignore"; None is the format's own rule. `overwrite` replaces an earlier result.
    Raises UserError for everything that is wrong in the source, and leaves `out` as it was.
    """
    generated = str(source).startswith("synthetic:")
    path, folder = Path(source).expanduser(), Path(out).expanduser()
    found = "dataset" if generated else detect(path) if kind == "auto" else kind
    if found == "dataset":
        if images is not None or background is not None:
            raise UserError("images and background are for annotations; a dataset has its images and full masks")
        dataset = open_dataset(str(source) if generated else path)
        return Converted(
            found, write_dataset(dataset, folder, overwrite=overwrite, progress=progress), dataset.classes, {}
        )
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path")
    annotations = READERS[found](path, images=Path(images).expanduser() if images is not None else None)
    if not annotations.pictures:
        raise UserError(f"{path}: holds no annotated image; check the path and the kind ({found})")
    check_apart(folder, [path, *(picture.image for picture in annotations.pictures)])
    classes, ids, fill = class_table(annotations, background, str(path))
    with plain_folder(folder, classes, overwrite=overwrite) as writer:
        _write(annotations, writer, ids, fill, progress)
    notes = {note: count for note, count in annotations.notes.items() if count}
    return Converted(found, dict(writer.counts), classes, notes)


def class_table(annotations: Annotations, background: str | None, where: str) -> tuple[Classes, NDArray[Any], int]:
    """The classes of the result, the id of each label with the ignore id last, and the id of pixels in no shape."""
    names = [" ".join(name.split()) for name in annotations.names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or "" in names:
        raise UserError(f"{where}: class names {twice or ['']} occur twice or are empty; give every class its own name")
    wanted = (annotations.background if background is None else background).strip()
    if not wanted:
        raise UserError("background is empty; give the name of a class or ignore")
    same = [index for index, name in enumerate(names) if name.lower() == wanted.lower()]
    if wanted != "ignore" and not same:
        names.insert(0, wanted)
    if not names:
        raise UserError(f"{where}: no class has a shape; check that the annotations were exported with their labels")
    classes = Classes(tuple(names), generate_palette(len(names)))
    first = len(names) - len(annotations.names)  # 1 where a class was put before the others
    ids = np.array([*range(first, len(names)), classes.ignore_index], classes.dtype)
    fill = classes.ignore_index if wanted == "ignore" else same[0] if same else 0
    return classes, ids, fill


def _write(
    annotations: Annotations, writer: PlainWriter, ids: NDArray[Any], fill: int, progress: Progress | None
) -> None:
    by_split: dict[str, list[Picture]] = {}
    for picture in annotations.pictures:
        by_split.setdefault(picture.split, []).append(picture)
    done = 0
    for split, pictures in by_split.items():
        for stem, picture in zip(stems([picture.image for picture in pictures]), pictures, strict=True):
            size = upright_size(picture.image)
            if picture.size is not None and picture.size != size:
                raise UserError(
                    f"{picture.where}: says (height, width) {picture.size} but {picture.image} is {size}; give the "
                    "image that was annotated (one turned by its EXIF tag is the usual cause)"
                )
            writer.add(split, stem, picture.image, draw(picture.shapes(), size, ids=ids, fill=fill))
            done += 1
            if progress:
                progress(done, len(annotations.pictures))
