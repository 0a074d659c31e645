"""What a prediction is to the user: a label map with names and colours that saves, draws and measures itself.

Shapes    H W pixels of the original image, K classes.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from segvit.contracts import Classes, Color, UserError
from segvit.files import open_atomic, write_bytes

LEAST = 384  # pixels of the long side below which an overlay is enlarged: less leaves no room for a legend
PAPER, INK, FAINT = (255, 255, 255), (32, 36, 42), (110, 118, 129)  # of the legend
SHADE = 0.4  # brightness of a contour line against the pixels beside it


@dataclass(frozen=True, eq=False)
class Prediction:
    """The class of every pixel of one image, with what is needed to show it."""

    labels: NDArray[Any]  # (H, W) class ids, uint8 (uint16 above 255 classes), may hold the ignore id
    classes: Classes
    image: NDArray[np.uint8] | None = None  # (H, W, C) the picture itself
    scores: NDArray[np.float16] | None = None  # (K, H, W)
    name: str = ""

    def __post_init__(self) -> None:
        size, dtype = self.labels.shape, np.dtype(self.classes.dtype)
        if len(size) != 2 or self.labels.dtype != dtype:
            raise ValueError(f"labels are {self.labels.dtype} {size}; {len(self.classes)} classes need {dtype} (H, W)")
        if self.image is not None and (self.image.ndim != 3 or self.image.shape[:2] != size):
            raise ValueError(f"image is {self.image.shape} but labels are {size}; it must be {(*size, 'channels')}")
        if self.scores is not None and self.scores.shape != (len(self.classes), *size):
            raise ValueError(f"scores are {self.scores.shape}; they must be {(len(self.classes), *size)}")

    def save(self, path: str | Path) -> None:
        """Write the class ids as a PNG, in the classes' colours; above 255 classes as a 16-bit PNG without colours."""
        if Path(path).suffix.lower() != ".png":
            raise UserError(f"label maps are saved as .png, which loses nothing; got {Path(path).name!r}")
        picture = Image.fromarray(self.labels)
        if self.labels.dtype == np.uint8:
            picture.putpalette(color_table(self.classes).tobytes())  # turns the mode from L to P; the ids stay
        file = io.BytesIO()
        picture.save(file, "PNG")
        write_bytes(path, file.getvalue())

    def save_scores(self, path: str | Path) -> None:
        """Write the scores as float16 under the key "scores" of an .npz file; read it with `numpy.load`."""
        if self.scores is None:
            raise UserError("this prediction holds no scores; predict again and ask for scores")
        if Path(path).suffix.lower() != ".npz":  # other names would not be read back as what they are
            raise UserError(f"scores are saved as .npz; got {Path(path).name!r}")
        with open_atomic(path) as file:  # not compressed: it saves little on logits and takes minutes on large images
            np.savez(file, scores=self.scores.astype(np.float16, copy=False))

    def areas(self) -> dict[str, Any]:
        """Pixels and share of the image for every class present, largest first; ready for JSON."""
        total = self.labels.size
        present = [
            {"id": i, "name": self.classes.names[i], "pixels": pixels, "fraction": pixels / total}
            for i, pixels in self._counts()
        ]
        return {"name": self.name, "height": self.labels.shape[0], "width": self.labels.shape[1], "classes": present}

    def overlay(self, alpha: float = 0.5, legend: bool = True) -> Image.Image:
        """The image under its classes' colours, with outlines and, below it, a legend of the classes by area.

        `alpha` is the weight of the colours. Without an image the colours stand alone. Ignored pixels keep the image.
        Images below 384 pixels are enlarged by a whole factor, so that the legend can be read. Of other than RGB images
        see `as_picture` for what is shown.
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}; it must be between 0 and 1")
        factor = max(1, math.ceil(LEAST / max(self.labels.shape)))
        labels = self.labels.repeat(factor, 0).repeat(factor, 1)
        colors = colorize(labels, self.classes)
        if self.image is not None:
            image = as_picture(self.image).repeat(factor, 0).repeat(factor, 1)
            mixed = np.asarray(Image.blend(Image.fromarray(image), Image.fromarray(colors), alpha))
            colors = np.where((labels == self.classes.ignore_index)[..., None], image, mixed)
        outline = _outlines(labels, max(1, round(max(labels.shape) / 900)))
        colors[outline] = (colors[outline] * SHADE).astype(np.uint8)
        picture = Image.fromarray(colors)
        return _with_legend(picture, self._entries()) if legend else picture

    def _counts(self) -> list[tuple[int, int]]:
        """(id, pixels) of the classes present, largest first."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.classes))
        present = [(int(i), int(counts[i])) for i in np.flatnonzero(counts) if i != self.classes.ignore_index]
        strange = [i for i, _ in present if i >= len(self.classes)]
        if strange:
            raise ValueError(f"labels hold id {strange[0]} but there are only {len(self.classes)} classes")
        return sorted(present, key=lambda item: -item[1])

    def _entries(self) -> list[Entry]:
        names, palette = self.classes.names, self.classes.palette
        return [Entry(palette[i], names[i], _share(n / self.labels.size)) for i, n in self._counts()]


def as_picture(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What people are shown of an image (H, W, C): its first three channels, or the first as gray: (H, W, 3)."""
    return image[..., :3] if image.shape[2] >= 3 else image[..., [0, 0, 0]]


class Entry(NamedTuple):
    """One line of a legend."""

    color: Color
    name: str
    share: str


def colorize(labels: NDArray[Any], classes: Classes) -> NDArray[np.uint8]:
    """Class ids (H, W) -> colours (H, W, 3); the ignore id and ids without a class are black."""
    colors: NDArray[np.uint8] = np.take(color_table(classes), labels, axis=0)
    return colors


def color_table(classes: Classes) -> NDArray[np.uint8]:
    """The colour of every value that the label type can hold, (256 or 65536, 3)."""
    table = np.zeros((classes.ignore_index + 1, 3), np.uint8)
    table[: len(classes)] = np.array(classes.palette, np.uint8).reshape(-1, 3)
    return table


def _share(fraction: float) -> str:
    return "<0.1 %" if fraction < 0.001 else f"{100 * fraction:.1f} %"


def _outlines(labels: NDArray[Any], thick: int) -> NDArray[np.bool_]:
    """Where the class `thick` pixels to the right or below is another one: lines of that width between regions."""
    edge = np.zeros(labels.shape, np.bool_)
    edge[:, :-thick] |= labels[:, :-thick] != labels[:, thick:]
    edge[:-thick] |= labels[:-thick] != labels[thick:]
    return edge


def _with_legend(picture: Image.Image, entries: list[Entry]) -> Image.Image:
    """The picture with a strip below it: colour, name and share, in as many columns as fit its width."""
    if not entries:
        return picture
    size = max(14, round(max(picture.size) / 56))
    font = ImageFont.load_default(size)
    gap, line = round(size * 0.8), round(size * 1.55)
    names = max(font.getlength(entry.name) for entry in entries)
    shares = max(font.getlength(entry.share) for entry in entries)
    least = math.ceil(size + 0.6 * size + names + gap + shares)  # the narrowest column that holds every line
    columns = min(max(1, (picture.width - gap) // (least + 2 * gap)), len(entries))
    rows = math.ceil(len(entries) / columns)
    width = max(picture.width, least + 2 * gap)
    canvas = Image.new("RGB", (width, picture.height + rows * line + 2 * gap), PAPER)
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    step = width / columns
    for index, entry in enumerate(entries):
        column, row = divmod(index, rows)  # down first: the order by area reads like a list
        left = gap + column * step
        right = left + step - 2 * gap
        middle = picture.height + gap + (row + 0.5) * line
        box = (left, middle - size / 2, left + size, middle + size / 2)
        draw.rounded_rectangle(box, radius=size * 0.2, fill=entry.color, outline=FAINT)
        draw.text((left + 1.6 * size, middle), entry.name, INK, font, anchor="lm")
        draw.text((right, middle), entry.share, FAINT, font, anchor="rm")
    return canvas
