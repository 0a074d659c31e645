"""Generated scenes of 150 classes: every mix of 10 hues, 5 textures and 3 forms (ground, disc, square).

Textures have a wavelength in pixels, not in parts of the side, so that crops of large scenes look like small scenes.
Larger scenes hold more shapes.
"""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import Classes
from segvit.data.synthetic import Drawn, Plane, Scenes, Seed

HUES = ("red", "orange", "yellow", "lime", "green", "teal", "sky", "blue", "violet", "pink")
TEXTURES = ("plain", "rows", "columns", "checked", "noisy")
FORMS = ("ground", "disc", "square")
WAVE = 8  # pixels from stripe to stripe


def _classes() -> Classes:
    names, palette = [], []
    for index in range(len(FORMS) * len(HUES) * len(TEXTURES)):
        form, hue, texture = _traits(index)
        names.append(f"{HUES[hue]} {TEXTURES[texture]} {FORMS[form]}")
        chroma, light = 1 - 0.15 * texture, 1 - 0.25 * form
        red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue / len(HUES), chroma, light))
        palette.append((red, green, blue))
    return Classes(tuple(names), tuple(palette))


def _traits(index: int) -> tuple[int, int, int]:
    """Form, hue and texture of a class."""
    form, rest = divmod(index, len(HUES) * len(TEXTURES))
    return form, *divmod(rest, len(TEXTURES))


def draw_fine(size: int, seed: Seed) -> Drawn:
    """Image and mask of one seed: one or two grounds, and 2 to 4 shapes at 128 pixels, up to 12 at 2048."""
    rng = np.random.default_rng((*seed, 2))  # not the random numbers of the other sets
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    kinds = len(HUES) * len(TEXTURES)
    mask = np.full((size, size), rng.integers(kinds), np.uint8)
    if rng.random() < 2 / 3:
        angle, place = rng.uniform(0, 2 * np.pi), rng.uniform(-0.2, 0.2)
        mask[(rows / size - 0.5) * np.sin(angle) + (columns / size - 0.5) * np.cos(angle) > place] = rng.integers(kinds)
    for _ in range(rng.integers(2, 5) + 2 * max(0, round(np.log2(size / 128)))):
        form = int(rng.integers(1, len(FORMS)))
        radius = size * rng.uniform(0.08, 0.25)
        down, across = (np.abs(plane - size * rng.uniform(0.1, 0.9)) for plane in (rows, columns))
        inside = np.hypot(down, across) < radius if form == 1 else np.maximum(down, across) < 0.9 * radius
        mask[inside] = form * kinds + rng.integers(kinds)
    image = np.empty((size, size, 3), np.float32)
    for index in np.unique(mask):
        region = mask == index
        image[region] = _surface(int(index), rows, columns, rng)[region]
    image += rng.normal(0, 0.02, (size, size, 1)).astype(np.float32)
    return (255 * image).clip(0, 255).astype(np.uint8), mask


def _surface(index: int, rows: Plane, columns: Plane, rng: np.random.Generator) -> NDArray[np.float32]:
    """(size, size, 3) the colour of a class, made lighter and darker by its texture."""
    _, hue, texture = _traits(index)
    shade = (hue + rng.uniform(-0.3, 0.3)) / len(HUES) % 1
    color = np.array(colorsys.hsv_to_rgb(shade, rng.uniform(0.6, 0.9), rng.uniform(0.6, 0.8)), np.float32)
    down, across = (np.sin(2 * np.pi / WAVE * plane + rng.uniform(0, 6)) for plane in (rows, columns))
    name = TEXTURES[texture]
    pattern: Plane = np.zeros_like(rows)  # what a plain surface keeps
    if name in ("rows", "columns"):
        pattern = down if name == "rows" else across
    elif name == "checked":
        pattern = np.sign(down * across)
    elif name == "noisy":
        pattern = rng.normal(0, 0.7, rows.shape).astype(np.float32)
    return (1 + 0.3 * pattern).astype(np.float32)[..., None] * color


FINE = Scenes("fine", _classes(), draw_fine)
