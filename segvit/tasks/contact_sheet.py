"""Contact sheets of a search: each query beside its neighbours, framed by whether they are of its class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from segvit.contracts import Color, UserError
from segvit.data.decode import read_image
from segvit.files import open_atomic
from segvit.tasks.data_preview import GAP, INK, PAPER, shortened
from segvit.tasks.gallery import Found, Gallery

CELL, FRAME = 120, 4  # pixels of a picture's longer side and of the frame around its cell
LINE, FONT = 14, 11
CHARACTERS = 20  # of a file's name below its picture
ROWS = 24  # queries on a sheet
RIGHT, WRONG, UNKNOWN = (34, 150, 84), (214, 58, 47), (150, 154, 160)


class Cell(NamedTuple):
    """One picture of a sheet."""

    path: Path
    caption: str
    color: Color | None  # of its frame


def save_sheet(path: str | Path, found: Sequence[Found], gallery: Gallery) -> None:
    """Write a PNG with one row for each of the first 24 queries.

    Raises UserError for a name that is no .png, and for pictures of the gallery that have gone.
    """
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"the sheet is a picture; call it {Path(path).with_suffix('.png')}")
    rows = [cells(one, gallery) for one in found[:ROWS]]
    gone = next((cell.path for row in rows for cell in row[1:] if not cell.path.is_file()), None)
    if gone is not None:
        raise UserError(f"{gone} has gone since the gallery was made; say where its images are with --images")
    picture = draw_sheet(rows)
    with open_atomic(path) as file:
        picture.save(file, "PNG", optimize=True)


def cells(found: Found, gallery: Gallery) -> list[Cell]:
    """The query over its class, and its neighbours: green for that class, red for another, gray where it has none."""
    classes = gallery.classes()
    row = [Cell(found.path, "query" if found.label is None else found.label, None)]
    for place, score in found.neighbours:
        right = classes[place] == found.label
        word, color = ("right", RIGHT) if right else ("wrong", WRONG)
        word, color = (word, color) if found.label is not None else ("", UNKNOWN)
        row.append(Cell(gallery.root / gallery.names[place], f"{score:.3f} {word}".strip(), color))
    return row


def draw_sheet(rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """The sheet of rows of cells; under each picture its caption and the end of its path."""
    wide, high = CELL + 2 * FRAME + GAP, CELL + 2 * FRAME + 2 * LINE + GAP
    sheet = Image.new("RGB", (GAP + max(map(len, rows)) * wide, GAP + len(rows) * high), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    for number, row in enumerate(rows):
        for place, cell in enumerate(row):
            x, y = GAP + place * wide, GAP + number * high
            if cell.color is not None:
                side = CELL + 2 * FRAME
                pen.rectangle((x, y, x + side - 1, y + side - 1), None, cell.color, FRAME)
            picture = Image.fromarray(read_image(cell.path))
            scale = CELL / max(picture.size)
            picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
            middle = x + FRAME + (CELL - picture.width) // 2, y + FRAME + (CELL - picture.height) // 2
            sheet.paste(picture, middle)
            below = y + CELL + 2 * FRAME + 1
            pen.text((x, below), shortened(cell.caption, CHARACTERS), INK if cell.color is None else cell.color, font)
            name = "/".join(cell.path.parts[-2:])
            pen.text((x, below + LINE), shortened(name, CHARACTERS), INK, font)
    return sheet
