"""Contact sheets: many images under their labels on one page, to look at before training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from segvit.contracts import Classes, UserError
from segvit.data.dataset import Dataset, open_dataset
from segvit.files import open_atomic
from segvit.inference.prediction import Prediction
from segvit.tasks.console import progress_bar

COLUMNS, ROWS = 4, 3  # cells of a sheet
CELL = 300  # pixels, width and height, of a picture in its cell
GAP, CAPTION = 12, 20
PAPER, INK = (250, 250, 248), (40, 44, 52)


def preview_data(source: str, *, out: str, split: str, count: int) -> list[str]:
    """Write sheets of `count` images evenly spread over a split; returns their paths."""
    dataset = open_dataset(source)
    if count < 1:
        raise UserError(f"count must be positive, got {count}")
    if split not in dataset.splits or not dataset.count(split):
        raise UserError(f"{source}: no images in split {split!r}; there are {', '.join(dataset.splits)}")
    total = dataset.count(split)
    count = min(count, total)
    chosen = [i * total // count for i in range(count)]
    written: list[str] = []
    with progress_bar("drawing") as progress:
        for start in range(0, count, COLUMNS * ROWS):
            path = Path(out) / f"{split}_{len(written) + 1:02d}.png"
            sheet = contact_sheet(dataset, split, chosen[start : start + COLUMNS * ROWS])
            with open_atomic(path) as file:
                sheet.save(file, "PNG")
            written.append(str(path))
            progress(min(start + COLUMNS * ROWS, count), count)
    return written


def contact_sheet(dataset: Dataset, split: str, indices: list[int]) -> Image.Image:
    """One sheet: each image with its label over it and its name below, and a legend of the classes that occur."""
    width = COLUMNS * (CELL + GAP) + GAP
    pictures: list[tuple[str, Image.Image]] = []
    present: set[int] = set()
    for index in indices:
        sample = dataset.read(split, index)
        present |= {int(i) for i in np.unique(sample.mask) if i < len(dataset.classes)}
        drawn = Prediction(sample.mask, dataset.classes, image=as_rgb(sample.image)).overlay(alpha=0.55, legend=False)
        drawn.thumbnail((CELL, CELL))
        pictures.append((sample.name, drawn))
    rows = [pictures[start : start + COLUMNS] for start in range(0, len(pictures), COLUMNS)]
    heights = [max(picture.height for _, picture in row) for row in rows]
    cells_high = GAP + sum(height + CAPTION + GAP for height in heights)
    lines = legend_lines(dataset.classes, sorted(present), width - 2 * GAP)
    sheet = Image.new("RGB", (width, cells_high + len(lines) * 22 + GAP), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    y = GAP
    for row, height in zip(rows, heights, strict=True):
        for place, (name, picture) in enumerate(row):
            x = GAP + place * (CELL + GAP)
            sheet.paste(picture, (x + (CELL - picture.width) // 2, y + (height - picture.height) // 2))
            pen.text((x, y + height + 3), shortened(name), INK, font)
        y += height + CAPTION + GAP
    draw_legend(pen, lines, cells_high)
    return sheet


def as_rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, C) as something to look at: one channel as grey, of more than three the first three."""
    if image.shape[2] in (1, 2):
        return np.repeat(image[..., :1], 3, axis=2)
    return np.ascontiguousarray(image[..., :3])


def legend_lines(classes: Classes, ids: list[int], width: int) -> list[list[tuple[str, tuple[int, int, int], int]]]:
    """(name, colour, width in pixels) of the classes, broken into lines."""
    font = ImageFont.load_default(13)
    lines: list[list[tuple[str, tuple[int, int, int], int]]] = []
    used = width
    for i in ids:
        wide = int(font.getlength(classes.names[i])) + 38
        if used + wide > width:
            lines.append([])
            used = 0
        lines[-1].append((classes.names[i], classes.palette[i], wide))
        used += wide
    return lines


def draw_legend(pen: ImageDraw.ImageDraw, lines: list[list[tuple[str, tuple[int, int, int], int]]], top: int) -> None:
    """Draw what `legend_lines` gives, 22 pixels a line, from row `top` on."""
    font = ImageFont.load_default(13)
    for number, line in enumerate(lines):
        x, y = GAP, top + number * 22
        for name, color, wide in line:
            pen.rectangle((x, y + 2, x + 13, y + 15), color, INK)
            pen.text((x + 20, y), name, INK, font)
            x += wide


def shortened(name: str, limit: int = 42) -> str:
    """The end of a long name, which tells files apart."""
    return name if len(name) <= limit else "..." + name[-limit + 3 :]
