"""What every reader of this folder returns: class names and pictures, each with its labelled shapes, and their drawing.

Rules, the same for all formats
    background   pixels in no shape become a class of their own, id 0, or are ignored (see `convert`)
    overlap      shapes are painted in the order of the file; a later one covers an earlier one
    coordinates  x, y in pixels, (0, 0) the left top corner of the image; see `polygons.py`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import Size
from segvit.data.formats.polygons import Points, fill_ellipse, fill_polygon

IGNORED = -1  # the label of shapes whose pixels are to be ignored


class Polygons(NamedTuple):
    """The union of polygons."""

    rings: tuple[Points, ...]


class Ellipse(NamedTuple):
    """An ellipse turned clockwise."""

    center: tuple[float, float]  # x, y
    radii: tuple[float, float]  # along its own x and y
    degrees: float = 0.0


class Bitmap(NamedTuple):
    """A region given pixel by pixel; it may reach out of the image."""

    left: int
    top: int
    pixels: NDArray[np.bool_]


class Shape(NamedTuple):
    """A labelled region."""

    label: int  # index of the class name, or IGNORED
    region: Polygons | Ellipse | Bitmap


class Picture(NamedTuple):
    """One image of the source. Its shapes are decoded when asked for, so that only one image's are in memory."""

    split: str
    image: Path
    shapes: Callable[[], Iterable[Shape]]  # in painting order
    size: Size | None  # what the annotations say; None where they do not
    where: str  # the file and the entry, for messages


@dataclass(frozen=True)
class Annotations:
    """What a source holds. `notes` counts what was left out or is worth saying; drawing may add to it."""

    names: tuple[str, ...]  # label i of the shapes is called names[i]
    pictures: tuple[Picture, ...]
    notes: Counter[str] = field(default_factory=Counter)
    background: str = "background"  # what pixels in no shape become unless the user says otherwise


def draw(shapes: Iterable[Shape], size: Size, *, ids: NDArray[Any], fill: int) -> NDArray[Any]:
    """The mask (H, W) of `shapes`: ids[label] where the last shape covers a pixel, `fill` where none does.

    `ids` is uint8 or uint16, one a label and the ignore id last; the mask has its type.
    """
    mask = np.full(size, fill, ids.dtype)
    for shape in shapes:
        value = int(ids[shape.label])
        match shape.region:
            case Polygons(rings):
                for ring in rings:
                    fill_polygon(mask, ring, value)
            case Ellipse(center, radii, degrees):
                fill_ellipse(mask, center, radii, degrees, value)
            case Bitmap() as bitmap:
                _stamp(mask, bitmap, value)
    return mask


def _stamp(mask: NDArray[Any], bitmap: Bitmap, value: int) -> None:
    left, top, pixels = bitmap
    inside = pixels[max(0, -top) :, max(0, -left) :]
    covered = mask[max(0, top) :, max(0, left) :][: inside.shape[0], : inside.shape[1]]
    covered[inside[: covered.shape[0], : covered.shape[1]]] = value
