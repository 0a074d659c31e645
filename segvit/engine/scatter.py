"""One chart of a comparison as inline SVG: a quantity to maximise over a cost on a logarithmic axis, points named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from segvit.engine.charts import BOTTOM, HEIGHT, HUES, LEFT, RIGHT, TOP, WIDTH, label, nice_ticks

HALO = "paint-order:stroke;stroke:var(--card);stroke-width:4px"  # keeps a name readable on a line
RADIUS, LETTER, LINE = 5.0, 6.6, 13.0  # of a point; a letter's width and a line's height at the page's 12 px


class Point(NamedTuple):
    """One thing compared."""

    name: str
    cost: float  # above 0
    value: float  # a fraction


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def scatter(title: str, points: Sequence[Point], *, unit: str) -> str:
    """A figure of named points; the dashed line joins those that nothing cheaper reaches.

    Points that are not finite or have no cost are left out; without any, "".
    """
    points = [one for one in points if math.isfinite(one.value) and math.isfinite(one.cost) and one.cost > 0]
    if not points:
        return ""
    low, high = min(one.cost for one in points) / 1.5, max(one.cost for one in points) * 1.5
    values = [one.value for one in points]
    room = max(0.15 * (max(values) - min(values)), 0.005)
    ticks = nice_ticks(max(0.0, min(values) - room), max(values) + room)
    bottom, top = ticks[0], max(ticks[-1], max(values) + room)

    def place(one: Point) -> tuple[float, float]:
        across = math.log(one.cost / low) / math.log(high / low)
        up = (one.value - bottom) / (top - bottom)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_rule(place(Point("", low, tick))[1], label(tick, "%")) for tick in ticks if tick <= top]
    parts += [_tick(place(Point("", cost, bottom))[0], label(cost)) for cost in round_costs(low, high)]
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(unit)}</text>')
    front = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, best_for_cost(points)))
    parts.append(f'<polyline class="ideal" fill="none" points="{front}"/>')
    parts += _named([(one, *place(one)) for one in points], unit)
    return (
        f'<figure><figcaption><b>{escape(title)}</b></figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def best_for_cost(points: Sequence[Point]) -> list[Point]:
    """The points that no other of the same or a lower cost reaches, the cheapest first."""
    best: list[Point] = []
    for one in sorted(points, key=lambda point: (point.cost, -point.value)):
        if not best or one.value > best[-1].value:
            best.append(one)
    return best


def round_costs(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between the ends; every second power or so where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    units = (1, 2, 5) if len(powers) <= 4 else (1,)
    found = [unit * 10.0**power for power in powers for unit in units]
    return [cost for cost in found if low <= cost <= high]


def _rule(y: float, text: str) -> str:
    line = f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'


def _tick(x: float, text: str) -> str:
    foot = HEIGHT - BOTTOM
    line = f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{foot}" y2="{foot + 4}"/>'
    return f'{line}<text x="{x:.1f}" y="{foot + 18}" text-anchor="middle">{text}</text>'


def _named(placed: Sequence[tuple[Point, float, float]], unit: str) -> list[str]:
    """Points with their names, each beside, above or below its point: where nothing else stands yet."""
    taken = [_Box(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for _, x, y in placed]
    parts = []
    for number, (one, x, y) in enumerate(placed):
        box = _free_box(len(one.name) * LETTER, x, y, taken)
        taken.append(box)
        told = f"{escape(one.name)}: {label(one.value, '%', exact=True)} at {label(one.cost)} {escape(unit)}"
        parts.append(
            f'<g><title>{told}</title><circle class="hue{number % HUES}" cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}"/>'
            f'<text class="name" style="{HALO}" x="{box.left:.1f}" y="{box.bottom - 3:.1f}">'
            f"{escape(one.name)}</text></g>"
        )
    return parts


def _free_box(width: float, x: float, y: float, taken: Sequence[_Box]) -> _Box:
    """A box for a text near (x, y) that meets no other and stays in the frame; the first place if there is none."""
    gap = RADIUS + 4
    middle = y - LINE / 2
    lefts = [(x + gap, middle), (x - gap - width, middle)]
    for step in range(1, 6):
        for top in (middle - step * LINE, middle + step * LINE):
            lefts += [(x - width / 2, top), (x + gap, top), (x - gap - width, top)]
    boxes = [_Box(left, top, left + width, top + LINE) for left, top in lefts]
    frame = _Box(LEFT, 0, WIDTH, HEIGHT - BOTTOM)
    for box in boxes:
        inside = box.left >= frame.left and box.right <= frame.right and box.top >= 0 and box.bottom <= frame.bottom
        if inside and not any(box.meets(other) for other in taken):
            return box
    return boxes[0]
