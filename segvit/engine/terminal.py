"""Curves in a terminal, drawn with braille characters: two by four dots a cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from segvit.engine.charts import label

Values = NDArray[np.float64]
Points = tuple[Values, Values]  # steps (N,) and values (N,), NaN where there is none

COLORS = ("cyan", "yellow", "magenta", "green", "blue", "red", "white", "bright_cyan")
BLANK = 0x2800  # the first of the 256 patterns
DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # bit of each dot, row by column
MARGIN = 9  # characters left of the plot, for the values


def chart(title: str, series: Mapping[str, Points], *, size: tuple[int, int], unit: str = "") -> Text:
    """A titled plot of size (columns, rows) in characters; where curves share a cell the last one colours it.

    The highest 2 % of a curve may lie beyond the top and stick to it. `unit` "%" shows fractions as percents.
    """
    curves = {name: points for name, points in ((n, _finite(*p)) for n, p in series.items()) if len(points[0])}
    text = Text(no_wrap=True, overflow="crop")
    text.append(title, "bold")
    for number, (name, (_, values)) in enumerate(curves.items()):
        name = f"{name} " if len(curves) > 1 else ""
        text.append(f"  {name}{label(float(values[-1]), unit, exact=True)}", COLORS[number % len(COLORS)])
    columns, rows = max(size[0] - MARGIN, 1), max(size[1] - 2, 1)
    if not curves:
        return text.append("\n" * (rows + 1) + " " * MARGIN + "nothing yet", "dim")
    first = min(float(steps[0]) for steps, _ in curves.values())
    last = max(float(steps[-1]) for steps, _ in curves.values())
    bent = [_bend(*points, first, last, 2 * columns) for points in curves.values()]
    low, high = _span(bent)
    cells = np.zeros((rows, columns), np.int64)
    colors = np.zeros((rows, columns), np.int64)
    for number, values in enumerate(bent):
        dots = _dots(values, low, high, 4 * rows)
        patterns = (dots.reshape(rows, 4, columns, 2) * DOTS[:, None]).sum(axis=(1, 3))
        cells |= patterns
        colors[patterns > 0] = number
    for row, (patterns, owners) in enumerate(zip(cells, colors, strict=True)):
        edge = {0: label(high, unit), rows - 1: label(low, unit)}.get(row, "")
        text.append(f"\n{edge[: MARGIN - 1]:>{MARGIN - 1}} ", "dim")
        for pattern, owner in zip(patterns, owners, strict=True):
            text.append(chr(BLANK + int(pattern)), COLORS[owner % len(COLORS)])
    ends = f"{first:.0f}", f"{last:.0f}"
    return text.append(f"\n{'':{MARGIN}}{ends[0]}{ends[1]:>{max(columns - len(ends[0]), len(ends[1]) + 1)}}", "dim")


def _finite(steps: Values, values: Values) -> Points:
    known = np.isfinite(values)
    return steps[known], values[known]


def _span(curves: Sequence[Values]) -> tuple[float, float]:
    """The lowest value, or 0 where that is less, and the highest without outliers."""
    low = min(0.0, *(float(np.nanmin(values)) for values in curves))
    high = max(float(np.nanquantile(values, 0.98)) for values in curves)
    return low, high if high > low else low + 1.0


def _bend(steps: Values, values: Values, first: float, last: float, count: int) -> Values:
    """The curve's value at each of `count` columns, NaN beyond its ends: the mean of what falls in, or in between."""
    place = np.zeros(len(steps)) if last == first else (steps - first) / (last - first) * (count - 1)
    column = place.round().astype(np.int64)
    filled, where = np.unique(column, return_inverse=True)
    means = np.bincount(where, values) / np.bincount(where)
    return np.interp(np.arange(count), filled, means, left=np.nan, right=np.nan)


def _dots(values: Values, low: float, high: float, count: int) -> NDArray[np.bool_]:
    """Where a curve of one value a column passes: (count, columns), the top row first, without gaps on slopes."""
    known = np.isfinite(values)
    level = np.where(known, np.clip((values - low) / (high - low), 0, 1) * (count - 1), -1).round().astype(np.int64)
    before = np.where(np.roll(known, 1) & (np.arange(len(values)) > 0), np.roll(level, 1), level)
    bottom, top = np.where(before < level, before + 1, level), np.where(before > level, before - 1, level)
    heights = np.arange(count - 1, -1, -1)[:, None]
    return known & (bottom <= heights) & (heights <= top)
