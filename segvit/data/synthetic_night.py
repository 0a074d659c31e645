"""A second set of generated images, of other classes and of another look than `synthetic`: hollow signs in dark scenes.

    road  grey, level dashes  ring  annulus, yellow to green     kite  hollow diamond, red to yellow
    wall  red, bricks         plus  plus sign, yellow to green   gate  hollow square, red to yellow
    sky   blue, stars

Colour tells the dim grounds apart in part, and the signs only in pairs. Signs glow into their surroundings, and the
noise of a camera in the dark lies over all. Nothing is ignored. It is there to study how a network that was trained on
the first set moves to a second one.
"""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import Classes
from segvit.data.synthetic import Drawn, Plane, Scenes, Seed, grid

CLASSES = Classes(
    ("road", "wall", "sky", "ring", "plus", "kite", "gate"),
    ((128, 128, 128), (121, 85, 72), (25, 42, 86), (255, 234, 167), (0, 184, 148), (232, 67, 147), (214, 48, 49)),
)
ROAD, WALL, SKY, RING, PLUS, KITE, GATE = range(7)
GROUNDS = {  # hue and strength of the colour; road and sky overlap
    ROAD: ((0.55, 0.75), (0.0, 0.3)), WALL: ((0.92, 1.08), (0.2, 0.5)), SKY: ((0.58, 0.72), (0.25, 0.6)),
}  # fmt: skip
HUES = {RING: (0.14, 0.34), PLUS: (0.14, 0.34), KITE: (-0.04, 0.13), GATE: (-0.04, 0.13)}
GLOW = 0.05  # how far a sign shines, in parts of the side


def draw_night(size: int, seed: Seed) -> Drawn:
    """Image and mask of one seed."""
    rng = np.random.default_rng((*seed, 1))  # one word more: not the random numbers of the first set
    rows, columns = grid(size)
    first, second = (int(kind) for kind in rng.permutation((ROAD, WALL, SKY))[:2])
    mask = np.full((size, size), first, np.uint8)
    image = _ground(first, size, rng)
    border = rng.uniform(0.3, 0.7) + rng.uniform(-0.3, 0.3) * (columns - 0.5)
    below = rows > border
    mask[below] = second
    image[below] = _ground(second, size, rng)[below]
    for kind in rng.permutation((RING, PLUS, KITE, GATE))[: rng.integers(1, 4)]:
        _draw_sign(image, mask, int(kind), rng)
    noise = rng.normal(0, rng.uniform(0.01, 0.04), image.shape).astype(np.float32)
    return (255 * (image + noise)).clip(0, 255).astype(np.uint8), mask


def _ground(kind: int, size: int, rng: np.random.Generator) -> Plane:
    """(size, size, 3) a dark surface with the pattern of its class."""
    rows, columns = grid(size)
    hue, chroma = (rng.uniform(*ends) for ends in GROUNDS[kind])
    color = np.array(colorsys.hsv_to_rgb(hue % 1, chroma, rng.uniform(0.25, 0.4)), np.float32)
    pace, phase = rng.uniform(7, 11), rng.uniform(0, 1)
    level = (rows * pace + phase) % 1
    if kind == ROAD:
        light = np.where((level < 0.25) & ((columns * pace / 2 + phase) % 1 < 0.6), 1.9, 1.0)
    elif kind == WALL:
        shifted = columns * pace / 2 + 0.5 * (np.floor(rows * pace + phase) % 2)
        light = np.where((level < 0.2) | (shifted % 1 < 0.1), 0.4, 1.1)
    else:
        light = 0.7 + 0.6 * rows + 3.0 * (rng.random((size, size)) < 0.01)
    return (light[..., None] * color).astype(np.float32)


def _draw_sign(image: Plane, mask: NDArray[np.uint8], kind: int, rng: np.random.Generator) -> None:
    """A sign with its glow, in place."""
    rows, columns = grid(len(mask))
    row, column = rng.uniform(0.2, 0.8, 2)
    radius = rng.uniform(0.17, 0.27)
    distance = _distance(kind, np.abs(rows - np.float32(row)), np.abs(columns - np.float32(column)), radius)
    color = np.array(colorsys.hsv_to_rgb(rng.uniform(*HUES[kind]) % 1, rng.uniform(0.5, 0.9), 1.0), np.float32)
    shine = np.float32(rng.uniform(0.6, 0.95)) * np.exp(-np.maximum(distance, 0) / np.float32(GLOW))
    inside = distance <= 0
    mask[inside] = kind
    image += np.where(inside, np.float32(0), 0.45 * shine)[..., None] * color
    image[inside] = shine[inside][:, None] * color


def _distance(kind: int, down: Plane, across: Plane, radius: float) -> Plane:
    """How far each pixel lies outside the sign; `down` and `across` are distances from its middle."""
    size = np.float32(radius)
    if kind == PLUS:
        arms = (np.maximum(down - size, across - size / 3), np.maximum(across - size, down - size / 3))
        return np.minimum(*arms)
    if kind == RING:
        middle = np.hypot(down, across)
    elif kind == KITE:
        middle = down + across
    else:
        middle = np.maximum(down, across)
    return np.abs(middle - 0.75 * size) - size / 4


NIGHT = Scenes("night", CLASSES, draw_night)
