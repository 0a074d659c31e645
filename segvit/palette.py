"""Colours for class maps: deterministic and distinct, so that a class keeps its colour in all pictures and reports."""

from __future__ import annotations

import colorsys

from segvit.contracts import Color

GOLDEN_RATIO = 0.6180339887498949  # steps of this part of the hue circle never come close to each other soon
TONES = ((0.65, 0.90), (0.85, 0.62), (0.40, 0.98), (0.95, 0.82))  # (saturation, value), changed after 12 hues


def generate_palette(count: int) -> tuple[Color, ...]:
    """`count` distinct colours, none of them black; a shorter palette is the beginning of a longer one."""
    colors: dict[Color, None] = {}
    step = 0
    while len(colors) < count:
        saturation, value = TONES[step // 12 % len(TONES)]
        red, green, blue = colorsys.hsv_to_rgb((0.58 + step * GOLDEN_RATIO) % 1, saturation, value)
        colors[round(255 * red), round(255 * green), round(255 * blue)] = None  # a repeated colour adds nothing
        step += 1
    return tuple(colors)
