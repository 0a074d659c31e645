"""What the masks of a dataset hold, added up, and how it is written in a sentence.

Shapes    n values of all masks; a colour is the code red * 65536 + green * 256 + blue, as in `tables`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import Color
from segvit.data.doctor.tables import MaskFile, Survey

EXAMPLES = 5  # files that a finding names


class Flat(NamedTuple):
    """The values of many masks."""

    raw: NDArray[np.int64]  # (n,)
    pixels: NDArray[np.int64]  # (n,)
    owner: NDArray[np.int64]  # (n,) the place of the mask in the list


class Seen(NamedTuple):
    """One raw value over all masks."""

    pixels: int
    masks: int
    peak: float  # the largest part of one mask that it fills


def readable_masks(survey: Survey) -> list[MaskFile]:
    """The masks of all splits that could be read."""
    return [pair.mask for split in survey.splits for pair in split.pairs if not pair.mask.error]


def code_of(color: Color) -> int:
    """The code of a colour."""
    return color[0] << 16 | color[1] << 8 | color[2]


def color_of(code: int) -> Color:
    """The colour of a code."""
    return code >> 16 & 255, code >> 8 & 255, code & 255


def values_of(mask: MaskFile, *, colored: bool) -> dict[int, int]:
    """Pixels by number or by colour code, whichever a label rule looks at; empty where numbers are asked of colours."""
    if mask.coloured or not colored:
        return mask.values if mask.coloured == colored else {}
    found: dict[int, int] = {}
    for value, pixels in mask.values.items():
        gray = 255 * value if mask.mode == "1" else min(value, 255)
        code = code_of(mask.palette.get(value, (gray, gray, gray)))
        found[code] = found.get(code, 0) + pixels
    return found


def flatten(masks: Sequence[MaskFile], *, colored: bool) -> Flat:
    """The values of all masks one after the other, so that they are looked up and added up at once."""
    raw: list[int] = []
    pixels: list[int] = []
    sizes: list[int] = []
    for mask in masks:
        values = values_of(mask, colored=colored)
        raw.extend(values)
        pixels.extend(values.values())
        sizes.append(len(values))
    owner = np.repeat(np.arange(len(masks)), np.array(sizes, np.int64))
    return Flat(np.array(raw, np.int64), np.array(pixels, np.int64), owner)


def gather(masks: Sequence[MaskFile], *, colored: bool) -> dict[int, Seen]:
    """Every value with what was seen of it, in ascending order."""
    flat = flatten(masks, colored=colored)
    areas = np.array([mask.size[0] * mask.size[1] if mask.size else 1 for mask in masks], np.int64)
    order = np.argsort(flat.raw, kind="stable")
    values, first, times = np.unique(flat.raw[order], return_index=True, return_counts=True)
    if not len(values):
        return {}
    pixels = np.add.reduceat(flat.pixels[order], first)
    peaks = np.maximum.reduceat((flat.pixels / areas[flat.owner])[order], first)
    return {
        value: Seen(*seen)
        for value, *seen in zip(values.tolist(), pixels.tolist(), times.tolist(), peaks.tolist(), strict=True)
    }


def show(value: int, *, colored: bool) -> str:
    """A value as it stands in YAML."""
    return str(list(color_of(value))) if colored else str(value)


def show_values(values: Sequence[int], *, colored: bool = False, limit: int = 10) -> str:
    """Values in a sentence: 0..10 where they follow each other, else a set, cut off after `limit`."""
    ordered = sorted(values)
    if not colored and len(ordered) > 3 and ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"{ordered[0]}..{ordered[-1]}"
    shown = ", ".join(show(value, colored=colored) for value in ordered[:limit])
    return f"{{{shown}, ... {len(ordered):,} in all}}" if len(ordered) > limit else f"{{{shown}}}"


def part_of(count: int, total: int, what: str) -> str:
    """`1,204 of 5,000 masks`."""
    return f"{count:,} of {total:,} {what}"


def examples(masks: Sequence[MaskFile]) -> tuple[str, ...]:
    """The paths of a few masks."""
    return tuple(mask.path for mask in masks[:EXAMPLES])


def counted(count: int, what: str) -> str:
    """`1 mask`, `1,204 masks`."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}{'es' if what.endswith('s') else 's'}"


def percent(part: float) -> str:
    """A part of 1 in percent with three digits at most."""
    return f"{100 * part:.3g} %"
