"""Validation images beside their labels and predictions, on one sheet."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from segvit.data.dataset import Dataset
from segvit.inference.prediction import as_picture, colorize
from segvit.inference.predictor import Predictor
from segvit.tasks.data_preview import GAP, INK, PAPER, draw_legend, legend_lines

CELL = 320  # pixels of the longer side of a picture on the sheet
LINE = 22  # pixels of a line of text


def side_by_side(predictor: Predictor, dataset: Dataset, split: str, indices: Iterable[int]) -> NDArray[np.uint8]:
    """One row an image (image, label, prediction) and a legend of the classes that occur: (H, W, 3)."""
    rows: list[list[Image.Image]] = []
    present: set[int] = set()
    for index in indices:
        sample = dataset.read(split, index)
        labels, _ = predictor.segment(sample.image)
        present |= {int(i) for part in (sample.mask, labels) for i in np.unique(part) if i < len(dataset.classes)}
        views = (as_picture(sample.image), *(colorize(part, dataset.classes) for part in (sample.mask, labels)))
        rows.append([fitted(view, flat=number > 0) for number, view in enumerate(views)])
    width = 3 * (CELL + GAP) + GAP
    lines = legend_lines(dataset.classes, sorted(present), width - 2 * GAP)
    height = LINE + sum(row[0].height + GAP for row in rows) + len(lines) * LINE + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, title in enumerate(("image", "label", "prediction")):
        pen.text((GAP + column * (CELL + GAP), 3), title, INK, font)
    top = LINE
    for row in rows:
        for column, picture in enumerate(row):
            sheet.paste(picture, (GAP + column * (CELL + GAP), top))
        top += row[0].height + GAP
    draw_legend(pen, lines, top)
    return np.asarray(sheet)


def fitted(view: NDArray[np.uint8], *, flat: bool) -> Image.Image:
    """A view (H, W, 3) whose longer side is CELL; flat colours stay unmixed."""
    height, width = view.shape[:2]
    scale = CELL / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Image.fromarray(view).resize(size, Image.Resampling.NEAREST if flat else Image.Resampling.BICUBIC)
