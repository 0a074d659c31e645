"""Charts of the report as inline SVG: curves over steps and the confusion heat map.

Colours, fonts and light or dark come from the page's style sheet through the class names used here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

WIDTH, HEIGHT = 528, 262  # of a curve; about its size on the page, so that the text has the page's size
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 16, 40
POINTS = 360  # per curve; more would not be seen and would swell the file
HUES = 8  # series colours that the style sheet defines


@dataclass(frozen=True, eq=False)
class Series:
    """One curve; `dots` for few separate measurements, otherwise drawn raw (faint) and smoothed."""

    name: str
    steps: Values  # (N,)
    values: Values  # (N,) NaN leaves a gap
    dots: bool = False
    smooth: bool = True


def curves(title: str, series: list[Series], *, unit: str = "") -> str:
    """A figure of curves over steps with axes, ticks and a legend; dotted curves have their best point marked.

    `unit` "%" shows fractions as percents. Curves without a finite value are left out; without any curve, "".
    """
    series = [one for one in series if np.isfinite(one.values).any()]
    if not series:
        return ""
    frame = _Frame(*_span_of_steps(series), *_span_of_values(series))
    body = "".join(_curve(one, index % HUES, frame, unit) for index, one in enumerate(series))
    keys = ""
    if len(series) > 1:
        keys = "".join(
            f'<span class="key"><i class="hue{i % HUES}"></i>{escape(one.name)}</span>' for i, one in enumerate(series)
        )
    return (
        f'<figure><figcaption><b>{escape(title)}</b><span class="keys">{keys}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{_axes(frame, unit)}{body}</svg></figure>"
    )


@dataclass(frozen=True)
class _Frame:
    """Where values land on the drawing."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, step: float) -> float:
        return LEFT + (step - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Values beyond the frame stick to its edge: a spike must not flatten all the rest."""
        share = (value - self.y0) / (self.y1 - self.y0)
        return HEIGHT - BOTTOM - min(max(share, 0.0), 1.0) * (HEIGHT - TOP - BOTTOM)


def _span_of_steps(series: list[Series]) -> tuple[float, float]:
    low = min(float(one.steps.min()) for one in series)
    high = max(float(one.steps.max()) for one in series)
    return (low, high) if high > low else (low - 1, high + 1)


def _span_of_values(series: list[Series]) -> tuple[float, float]:
    """The whole smoothed curves and all but the highest 2 % of raw values, from 0 unless all dots lie far above."""
    tops, lows = [], []
    for one in series:
        finite = one.values[np.isfinite(one.values)]
        raw = one.dots or not one.smooth
        tops.append(float(finite.max() if raw else max(np.nanmax(smoothed(one.values)), np.quantile(finite, 0.98))))
        lows.append(float(finite.min()))
    low, high = min(lows), max(tops)
    if low >= 0 and (low < 0.6 * high or low == high or not all(one.dots for one in series)):
        low = 0.0
    gap = high - low or abs(high) or 1.0
    ticks = nice_ticks(low, high + 0.04 * gap if high > low else low + gap)
    step = ticks[1] - ticks[0]
    top = ticks[-1] if ticks[-1] >= high else high + 0.15 * step
    return min(low, ticks[0]), max(top, high)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from at or just below `low` up to at most `high`; always two or more."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * unit for unit in (1, 2, 2.5, 5, 10) if power * unit >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = max(math.floor(high / step + 1e-9), first + 1)
    return [i * step for i in range(first, last + 1)]


def smoothed(values: Values) -> Values:
    """Centred mean over 4 % of the points, shorter at the ends; NaN counts as absent."""
    half = max(1, len(values) // 50)
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    total = counts[last] - counts[first]
    return np.where(total > 0, (sums[last] - sums[first]) / np.maximum(total, 1), np.nan)


def _curve(one: Series, hue: int, frame: _Frame, unit: str) -> str:
    known = np.isfinite(one.values)
    if one.dots or known.sum() == 1:  # a line through a single point would not be seen
        steps, values = one.steps[known], one.values[known]
        dots = "".join(
            f'<circle class="hue{hue}" cx="{frame.x(s):.1f}" cy="{frame.y(v):.1f}" r="2.5"><title>'
            f"step {s:.0f}: {label(v, unit, exact=True)}</title></circle>"
            for s, v in zip(steps, values, strict=True)
        )
        best = _best(steps, values, frame, unit) if one.dots else ""
        return _path(steps, values, frame, f"line hue{hue}") + dots + best
    if not one.smooth or len(one.values) < 20:
        return _path(*_thinned(one.steps, one.values), frame, f"line hue{hue}")
    raw = _path(*_thinned(one.steps, one.values), frame, f"line faint hue{hue}")
    return raw + _path(*_thinned(one.steps, smoothed(one.values)), frame, f"line hue{hue}")


def _best(steps: Values, values: Values, frame: _Frame, unit: str) -> str:
    at = int(values.argmax())
    x, y = frame.x(steps[at]), frame.y(values[at])
    right = x < WIDTH * 0.6
    text = f"best {label(values[at], unit, exact=True)} at step {grouped(steps[at])}"
    # The best point is the top of its curve: there is room below it, unless the curve lies on the axis.
    side = y + 24 if y + 36 < HEIGHT - BOTTOM else y - 12
    return (
        f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
        f'<text class="note" x="{x + (2 if right else 5):.1f}" y="{side:.1f}" '
        f'text-anchor="{"start" if right else "end"}">{text}</text>'
    )


def _thinned(steps: Values, values: Values) -> tuple[Values, Values]:
    """At most about POINTS points: the lowest and the highest of each stretch, so that spikes survive."""
    if len(steps) <= POINTS:
        return steps, values
    keep: set[int] = {0, len(steps) - 1}
    for part in np.array_split(np.arange(len(steps)), POINTS // 2):
        known = part[np.isfinite(values[part])]
        chosen = part[:1] if not len(known) else known[[values[known].argmin(), values[known].argmax()]]
        keep.update(int(i) for i in chosen)
    index = np.array(sorted(keep))
    return steps[index], values[index]


def _path(steps: Values, values: Values, frame: _Frame, kind: str) -> str:
    parts, pen = [], "M"
    for step, value in zip(steps, values, strict=True):
        if not math.isfinite(value):
            pen = "M"
            continue
        parts.append(f"{pen}{frame.x(step):.1f} {frame.y(value):.1f}")
        pen = "L"
    return f'<path class="{kind}" d="{"".join(parts)}"/>'


def _axes(frame: _Frame, unit: str) -> str:
    bottom, right, parts = HEIGHT - BOTTOM, WIDTH - RIGHT, []
    for value in nice_ticks(frame.y0, frame.y1):
        if frame.y0 <= value <= frame.y1 * (1 + 1e-9):
            y = frame.y(value)
            parts.append(f'<line class="rule" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label(value, unit)}</text>')
    for step in nice_ticks(frame.x0, frame.x1, 6):
        if frame.x0 <= step <= frame.x1 and step == round(step):
            x = frame.x(step)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{_short(step)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    return "".join(parts)


def label(value: float, unit: str = "", *, exact: bool = False) -> str:
    """A number for people; `exact` keeps two decimals of a percent."""
    if unit == "%":
        return f"{100 * value:.2f} %" if exact else f"{100 * value:.3g} %"
    if value and abs(value) < 1e-2:
        mantissa, power = f"{value:.3g}", math.floor(math.log10(abs(value)))
        return mantissa if power >= -2 else f"{value / 10.0**power:.3g}e{power}"
    return grouped(value) if abs(value) >= 10_000 else f"{value:.4g}"


def grouped(number: Any) -> str:
    """An integer with thin gaps between the thousands."""
    return f"{int(number):,}".replace(",", "&#8239;")


def _short(step: float) -> str:
    return f"{step / 1000:g}k" if step >= 10_000 else grouped(step)


def reliability(title: str, rows: Sequence[tuple[float, float, float]]) -> str:
    """A reliability diagram: (confidence, accuracy, share of the pixels) of each bin, in fractions.

    Blocks are the accuracies, the dashed line is perfect calibration; the faint blocks below show where pixels are.
    """
    wide, high, foot = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM - 30, 26
    bin_wide = wide / max(len(rows), 1)
    most = max((share for _, _, share in rows), default=0.0) or 1.0
    parts = []
    for i, (confidence, accuracy, share) in enumerate(rows):
        if not share:
            continue
        x, top = LEFT + i * bin_wide + 1, TOP + high * (1 - accuracy)
        told = f"confidence {confidence:.2f}: right in {100 * accuracy:.1f} % ({100 * share:.1f} % of the pixels)"
        size, foot_top = foot * share / most, TOP + high + 4
        parts.append(
            f'<g class="hue0"><title>{told}</title><rect class="block" x="{x:.1f}" y="{top:.1f}" '
            f'width="{bin_wide - 2:.1f}" height="{high * accuracy:.1f}"/><rect class="block" fill-opacity=".3" '
            f'x="{x:.1f}" y="{foot_top:.1f}" width="{bin_wide - 2:.1f}" height="{size:.1f}"/></g>'
        )
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y, x = TOP + high * (1 - tick), LEFT + wide * tick
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{LEFT + wide}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{100 * tick:g}%</text>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{100 * tick:g}%</text>')
    parts.append(f'<line class="ideal" x1="{LEFT}" y1="{TOP + high}" x2="{LEFT + wide}" y2="{TOP}"/>')
    return (
        f'<figure><figcaption><b>{escape(title)}</b><span class="keys">across: confidence, up: accuracy</span>'
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def dumbbells(title: str, rows: Sequence[tuple[str, float, float]], *, labels: tuple[str, str]) -> str:
    """Two fractions of each name on one line, such as IoU and boundary IoU of each class; NaN rows are left out."""
    known = [row for row in rows if math.isfinite(row[1]) and math.isfinite(row[2])]
    if not known:
        return ""
    left, step = 150, 22
    wide, height = WIDTH - left - RIGHT, TOP + step * len(known) + 28
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + wide * tick
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - 26}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{100 * tick:g}%</text>')
    for i, (name, first, second) in enumerate(known):
        y = TOP + step * (i + 0.5)
        short = name if len(name) <= 20 else name[:19] + "..."
        told = f"{escape(name)}: {labels[0]} {100 * first:.1f} %, {labels[1]} {100 * second:.1f} %"
        ends = [left + wide * value for value in (first, second)]
        parts.append(
            f'<g><title>{told}</title><text class="name" x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">'
            f"{escape(short)}</text>"
            f'<line class="link" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle class="hue0" cx="{ends[0]:.1f}" cy="{y:.1f}" r="4.5"/>'
            f'<circle class="hue1" cx="{ends[1]:.1f}" cy="{y:.1f}" r="4.5"/></g>'
        )
    keys = "".join(f'<span class="key"><i class="hue{i}"></i>{escape(text)}</span>' for i, text in enumerate(labels))
    return (
        f'<figure><figcaption><b>{escape(title)}</b><span class="keys">{keys}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def heat_map(matrix: NDArray[np.int64], names: tuple[str, ...]) -> str:
    """Rows (labels) as shares of their sum: what is right in one colour, what is confused in another.

    The strength of a cell grows with the root of its share, so that confusions of a few percent are seen.
    """
    num, sums = len(names), matrix.sum(1)
    cell = max(22, min(56, 720 // num))
    short = [name if len(name) <= 18 else name[:17] + "..." for name in names]
    margin = 16 + round(7.2 * max(map(len, short)))
    rise = 14 + round(6 * max(map(len, short)))  # room for the column names, which stand at 55 degrees
    side = num * cell
    parts = []
    for row in range(num):
        middle = rise + (row + 0.5) * cell + 4
        parts.append(f'<text x="{margin - 8}" y="{middle:.1f}" text-anchor="end">{escape(short[row])}</text>')
        x = margin + (row + 0.5) * cell + 3
        turn = f"rotate(-55 {x:.1f} {rise - 8})"
        parts.append(f'<text x="{x:.1f}" y="{rise - 8}" transform="{turn}">{escape(short[row])}</text>')
        parts += [_cell(matrix, (row, column), names, cell, (margin, rise)) for column in range(num) if sums[row]]
    frame = f'<rect class="frame" x="{margin}" y="{rise}" width="{side}" height="{side}"/>'
    width, height = margin + side + round(rise * 0.7), rise + side + 4
    return (
        f'<svg class="heat" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="confusion matrix">{frame}{"".join(parts)}</svg>'
    )


def _cell(
    matrix: NDArray[np.int64], at: tuple[int, int], names: tuple[str, ...], side: int, corner: tuple[int, int]
) -> str:
    row, column = at
    share = float(matrix[row, column] / matrix[row].sum())
    if not share:
        return ""
    x, y = corner[0] + column * side, corner[1] + row * side
    kind = "right" if row == column else "wrong"
    percent = f"{100 * share:.1f}"
    text = ""
    if side >= 34 and share >= 0.0005:
        strong = " strong" if math.sqrt(share) > 0.62 else ""
        middle = f'x="{x + side / 2:.1f}" y="{y + side / 2 + 4:.1f}"'
        text = f'<text class="value{strong}" {middle} text-anchor="middle">{percent}</text>'
    told = f"{escape(names[row])} read as {escape(names[column])}: {percent} %"
    return (
        f'<g><title>{told}</title><rect class="{kind}" x="{x + 1}" y="{y + 1}" width="{side - 2}" height="{side - 2}" '
        f'rx="3" fill-opacity="{max(math.sqrt(share), 0.04):.3f}"/>{text}</g>'
    )
