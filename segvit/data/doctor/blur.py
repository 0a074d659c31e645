"""Masks whose values JPEG or interpolation has blurred: that they are, and which values were meant.

Blur gives an area's border any number of values, so that each of them fills little of any mask, while the value that
was meant fills an area. Colours are codes red * 65536 + green * 256 + blue, as in `tables`.

Shapes    n values.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations, pairwise
from statistics import median
from typing import NamedTuple

import numpy as np

from segvit.data.decode import JPEG
from segvit.data.doctor.evidence import Seen, code_of, color_of, examples, part_of, show_values, values_of
from segvit.data.doctor.reading import Reading
from segvit.data.doctor.tables import Finding, MaskFile

BLUR, COLOR_BLUR = 12, 24  # levels by which JPEG moves most pixels of an area; it keeps colours less well than grey
COVERED, COLORS_COVERED = 0.8, 0.5  # the least part of all pixels near the values that were meant
CLEAR = 2.0  # how many times larger than the next value the smallest of them must be
AREA = 0.1  # part of some mask that a value fills which is believed against a table that fits otherwise
CANDIDATES = 1500  # values that are looked at; noise makes any number of them
BLENDS = 8  # distinct values from which exact files may be blurred
BLENDS_DROP = 4.0  # as CLEAR, where nothing but the values speaks of blur
BLENDS_REST = 0.2  # the most of all pixels that lie on blurred borders
OVERSHOOT = 0.3  # how far, of their distance, sharpening filters go beyond the values that they blend


class Strong(NamedTuple):
    """Values that fill areas, found among many that do not."""

    values: dict[int, Seen]
    drop: float  # how many times larger the smallest of them is than the next value
    rest: int  # pixels far from all of them


class Blur(NamedTuple):
    """That values are blurred, and those that were meant; None where they cannot be told."""

    finding: Finding
    seen: dict[int, Seen] | None


def judge_blur(
    masks: Sequence[MaskFile], seen: dict[int, Seen], *, colored: bool, basis: Reading | None, hint: Reading | None
) -> Blur | None:
    """`jpeg_masks` (any JPEG, unless read by nearness) and `antialiased_masks`, both errors.

    Exact files count as blurred when a description does not know all values, most of at least eight values fill far
    less of any mask than the others and lie between them, several of them in most masks. `basis` is the table that
    values are judged by, `hint` knows at least the number of classes.
    """
    if basis is not None and basis.nearest:
        return None
    jpegs = [mask for mask in masks if mask.format in JPEG]
    if not jpegs and not seen.keys() - (basis.meaning().keys() if basis else set()):
        return None
    strong = strong_values(seen, colored=colored, count=len(hint.entries) if hint else None)
    if not jpegs and not (strong and are_blends(masks, seen, strong, colored=colored)):
        return None
    meant = agreed(seen, strong, listed_values(basis or hint, colored=colored), colored=colored)
    if not colored and is_crowded(seen, off=2 if jpegs else 0):
        meant = None
    distinct = max([len(seen), *(mask.distinct for mask in masks)])
    areas = (
        f" where {len(meant)} fill areas: {show_values(list(meant), colored=colored)}"
        if meant
        else " in which those that were meant cannot be told apart"
    )
    remedy = ", or read each pixel as the nearest of these with nearest: true" if meant else ""
    if jpegs:
        sentence = (
            f"JPEG masks: {distinct:,} distinct values in {part_of(len(jpegs), len(masks), 'masks')}{areas}; JPEG "
            f"changes pixel values, so export the masks as PNG{remedy}"
        )
        return Blur(Finding("jpeg_masks", "error", sentence, examples(jpegs)), meant)
    sentence = (
        f"antialiased masks: {distinct:,} distinct values in {len(masks):,} masks{areas}; probably they were resized "
        f"with interpolation; resize them with nearest neighbour{remedy}"
    )
    worst = sorted(masks, key=lambda mask: -mask.distinct)
    return Blur(Finding("antialiased_masks", "error", sentence, examples(worst)), meant)


def strong_values(seen: dict[int, Seen], *, colored: bool, count: int | None = None) -> Strong | None:
    """The values that were meant, when blur has spread them; None where no such few values explain the pixels.

    Values are taken from the one that fills most of a mask on, each standing for all within the blur. What was meant
    ends where this part drops most, or after `count` values if they are known to be so many. Pixels at borders are
    spread over many values, so that even a rare class fills more of some mask than any of these.
    """
    blur, least = (COLOR_BLUR, COLORS_COVERED) if colored else (BLUR, COVERED)
    order = sorted(seen, key=lambda value: (-seen[value].peak, value))[:CANDIDATES]
    points = np.array([color_of(value) if colored else (value,) for value in order], np.int64)  # (n, 1 or 3)
    heads: list[int] = []  # places in `order`
    owned: list[int] = []  # pixels near each head
    noise = min(value.peak for value in seen.values()) / 2
    for place, value in enumerate(order):
        far = np.abs(points[heads] - points[place]).max(1) if heads else np.array([blur + 1])
        nearest = int(far.argmin())
        if far[nearest] > blur:
            heads.append(place)
            owned.append(seen[value].pixels)
        else:
            owned[nearest] += seen[value].pixels
            if far[nearest] > 2:  # levels by which even a flat area is off
                noise = max(noise, seen[value].peak)
    total = sum(value.pixels for value in seen.values())
    covered = np.cumsum(owned) / total
    peaks = [*(seen[order[head]].peak for head in heads), noise]
    drops = [high / low for high, low in pairwise(peaks)]
    allowed = [i for i in range(1, len(drops)) if covered[i] >= least and drops[i] >= CLEAR]
    if not allowed and len(drops) > 1 and covered[-1] >= least:
        allowed = [len(drops) - 1]  # noise, if any, is near the values alone
    if not allowed:
        return None
    cut = max(allowed, key=lambda i: drops[i])
    if count is not None and count - 1 in allowed:
        cut = count - 1
    values = {order[head]: seen[order[head]]._replace(pixels=owned[i]) for i, head in enumerate(heads[: cut + 1])}
    return Strong(dict(sorted(values.items())), drops[cut], total - sum(owned[: cut + 1]))


def are_blends(masks: Sequence[MaskFile], seen: dict[int, Seen], strong: Strong, *, colored: bool) -> bool:
    """Whether the values that fill no area look like blends of those that do."""
    heads = list(strong.values)
    few = len(seen) < max(BLENDS, 3 * len(heads)) or strong.drop < BLENDS_DROP
    if few or strong.rest > BLENDS_REST * sum(value.pixels for value in seen.values()):
        return False
    points = np.array([_point(head, colored) for head in heads])
    others = np.array([_point(value, colored) for value in seen])
    if not colored and min(high - low for low, high in pairwise(heads)) <= BLUR:
        return False
    low, high = points.min(0), points.max(0)
    slack = OVERSHOOT * (high - low)
    if (others < low - slack).any() or (others > high + slack).any():
        return False
    mixed = [values_of(mask, colored=colored).keys() for mask in masks if mask.distinct > 1]
    return bool(mixed) and median(len(values - strong.values.keys()) for values in mixed) >= 3


def is_crowded(seen: dict[int, Seen], *, off: int) -> bool:
    """Whether numbers that fill areas lie too close together to be told apart once blurred; a value may be `off`."""
    areas = sorted(value for value, count in seen.items() if count.peak >= AREA)
    return any(off < high - low <= BLUR for low, high in pairwise(areas))


def listed_values(table: Reading | None, *, colored: bool) -> set[int]:
    """The values that a description lists; where masks are painted but classes are numbers, the colours of classes."""
    if table is None:
        return set()
    if colored and not table.colored:
        return {code_of(entry.color) for entry in table.entries}
    return set(table.meaning())


def agreed(
    seen: dict[int, Seen], strong: Strong | None, listed: Collection[int], *, colored: bool
) -> dict[int, Seen] | None:
    """The strong values, each exactly as it is listed where one nearby is.

    Where listed values lie apart and most pixels are near them, only what fills much of some mask is added to them.
    """
    blur, least = (COLOR_BLUR, COLORS_COVERED) if colored else (BLUR, COVERED)
    found: dict[int, Seen] = {}
    for value, count in strong.values.items() if strong else ():
        near = [other for other in listed if _distance(value, other, colored) <= blur and other not in found]
        best = value if value in listed else min(near, key=lambda one: _distance(value, one, colored), default=value)
        found[best] = count
    apart = all(_distance(one, other, colored) > blur for one, other in combinations(listed, 2))
    if listed and apart:
        owned = near_pixels(seen, listed, blur, colored=colored)
        if sum(owned.values()) >= least * sum(value.pixels for value in seen.values()):
            added = {value: count for value, count in found.items() if value in listed or count.peak >= AREA}
            found = {value: Seen(pixels, 0, 0.0) for value, pixels in owned.items() if pixels} | added
    return dict(sorted(found.items())) or None


def near_pixels(seen: dict[int, Seen], listed: Collection[int], blur: int, *, colored: bool) -> dict[int, int]:
    """The pixels within `blur` of each listed value."""
    points = np.array([_point(value, colored) for value in seen])  # (n, 1 or 3)
    pixels = np.array([count.pixels for count in seen.values()])
    return {value: int(pixels[np.abs(points - _point(value, colored)).max(1) <= blur].sum()) for value in listed}


def _point(value: int, colored: bool) -> tuple[int, ...]:
    return color_of(value) if colored else (value,)


def _distance(value: int, other: int, colored: bool) -> int:
    return max(abs(a - b) for a, b in zip(_point(value, colored), _point(other, colored), strict=True))
