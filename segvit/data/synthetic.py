"""Generated images that make a real segmentation problem without any download: shapes on textured grounds.

Colour alone must not solve it, else a demo would prove nothing. So classes share hues, wholly or in part, and differ
by form or texture:

    grass  green to yellow noise  ball  shaded disc, red        tent  plain triangle, violet
    sand   yellow, level stripes  box   plain square, orange    flag  striped triangle, violet
    water  blue waves                                           dice  dotted square, violet

Image i of a split is a function of (seed, split, i) alone. Every region has its own hue, strength and lightness, the
light falls off across the image, and some shapes are ringed by two pixels of the ignore id.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import Classes, Sample, UserError

Plane = NDArray[np.float32]  # (size, size)
Seed = tuple[int, int, int]
Drawn = tuple[NDArray[np.uint8], NDArray[np.uint8]]  # image (size, size, 3) and mask (size, size)


class Scenes(NamedTuple):
    """One kind of generated scenes."""

    name: str
    classes: Classes
    draw: Callable[[int, Seed], Drawn]


CLASSES = Classes(
    ("grass", "sand", "water", "ball", "box", "tent", "flag", "dice"),
    ((106, 176, 76), (240, 201, 105), (72, 149, 239), (231, 76, 60), (255, 159, 67), (155, 89, 182), (255, 121, 198),
     (44, 62, 110)),
)  # fmt: skip
GRASS, SAND, WATER, BALL, BOX, TENT, FLAG, DICE = range(8)
GROUNDS = (GRASS, SAND, WATER)
HUES = {  # the range of hues (0..1) of each class; neighbours overlap
    GRASS: (0.15, 0.36), SAND: (0.07, 0.19), WATER: (0.50, 0.68), BALL: (0.92, 1.02), BOX: (0.99, 1.09),
    TENT: (0.78, 0.92), FLAG: (0.71, 0.85), DICE: (0.66, 0.77),
}  # fmt: skip
RING = 0.3  # part of the shapes that have a ring to ignore


def draw_shapes(size: int, seed: Seed) -> Drawn:
    """Image and mask of one seed."""
    rng = np.random.default_rng(seed)
    image = np.empty((size, size, 3), np.float32)
    mask = np.empty((size, size), np.uint8)
    _draw_grounds(image, mask, rng)
    for kind in rng.permutation((BALL, BOX, TENT, FLAG, DICE))[: rng.integers(1, 5)]:
        _draw_shape(image, mask, int(kind), rng)
    return _lit(image, rng), mask


DAY = Scenes("shapes", CLASSES, draw_shapes)


@dataclass(frozen=True)
class ShapesDataset:
    """`train` and `val` generated images of `size` pixels a side."""

    size: int = 96
    train: int = 400
    val: int = 80
    seed: int = 0
    scenes: Scenes = DAY

    def __post_init__(self) -> None:
        if self.size < 16 or self.train < 1 or self.val < 1:
            raise UserError(
                f"size {self.size}, train {self.train}, val {self.val}: size must be 16 or more, the others 1 or more"
            )

    @property
    def classes(self) -> Classes:
        """Those of the scenes."""
        return self.scenes.classes

    @property
    def splits(self) -> tuple[str, ...]:
        """Both splits."""
        return ("train", "val")

    @property
    def channels(self) -> int:
        """Red, green and blue."""
        return 3

    @property
    def levels(self) -> None:
        """Images are made with 8 bits."""
        return None

    def count(self, split: str) -> int:
        """The number of samples in a split."""
        if split not in self.splits:
            raise UserError(f"the generated {self.scenes.name} have no split {split!r}; there are train and val")
        return self.train if split == "train" else self.val

    def name(self, split: str, i: int) -> str:
        """Such as train_00012."""
        return f"{split}_{i:05d}"

    def read(self, split: str, i: int) -> Sample:
        """Sample i."""
        if not 0 <= i < self.count(split):
            raise IndexError(f"{split} has samples 0..{self.count(split) - 1}, not {i}")
        image, mask = _drawn(self.scenes, self.size, (self.seed, i, 1 + self.splits.index(split)))
        return Sample(image.copy(), mask.copy(), self.name(split, i))


@lru_cache(maxsize=2048)  # training asks for the same images again and again; 75 MB at 96 pixels
def _drawn(scenes: Scenes, size: int, seed: Seed) -> Drawn:
    return scenes.draw(size, seed)


@lru_cache(maxsize=4)
def grid(size: int) -> tuple[Plane, Plane]:
    """Row and column of every pixel, in parts of the side."""
    rows, columns = np.mgrid[:size, :size].astype(np.float32) / size
    return rows, columns


def _draw_grounds(image: Plane, mask: NDArray[np.uint8], rng: np.random.Generator) -> None:
    """One ground everywhere, and in two images of three a second one behind a slanted line."""
    rows, columns = grid(len(mask))
    first, second = rng.permutation(GROUNDS)[:2]
    mask[:] = first
    image[:] = _texture(int(first), len(mask), rng)
    if rng.random() < 2 / 3:
        angle = rng.uniform(0, 2 * np.pi)
        behind = (rows - 0.5) * np.sin(angle) + (columns - 0.5) * np.cos(angle) > rng.uniform(-0.15, 0.15)
        mask[behind] = second
        image[behind] = _texture(int(second), len(mask), rng)[behind]


def _draw_shape(image: Plane, mask: NDArray[np.uint8], kind: int, rng: np.random.Generator) -> None:
    size = len(mask)
    rows, columns = grid(size)
    radius = rng.uniform(0.2, 0.33)
    row, column = rng.uniform(0.15, 0.85, 2)
    distance = _distance(kind, rows - row, columns - column, radius, rng.uniform(-0.3, 0.3))
    inside = distance <= 0
    mask[inside] = kind
    surface = _texture(kind, size, rng)
    if kind == BALL:  # a sphere: without the shade a few hundred images do not teach a transformer discs from squares
        surface *= (1.15 - 0.5 * (1 + distance / np.float32(radius)) ** 2)[..., None]
    image[inside] = surface[inside]
    if rng.random() < RING:
        mask[np.abs(distance) <= 1 / size] = CLASSES.ignore_index  # one pixel on either side of the outline


def _distance(kind: int, rows: Plane, columns: Plane, radius: float, angle: float) -> Plane:
    """How far each pixel lies outside the outline; negative inside."""
    if kind == BALL:
        return np.hypot(rows, columns) - np.float32(radius)
    sine, cosine = np.float32(np.sin(angle)), np.float32(np.cos(angle))
    down, across = rows * cosine - columns * sine, rows * sine + columns * cosine
    if kind in (BOX, DICE):
        return np.maximum(np.abs(down), np.abs(across)) - np.float32(0.9 * radius)
    # A triangle with its tip up: the floor, and two sides as steep as those of an equilateral one.
    return np.maximum(down - np.float32(0.7 * radius), np.abs(across) * np.float32(0.87) - down / 2 - radius / 2)


def _texture(kind: int, size: int, rng: np.random.Generator) -> Plane:
    """(size, size, 3) the surface of a class: a colour of its own, made lighter and darker by the class's pattern."""
    hue, chroma, light = rng.uniform(*HUES[kind]) % 1, rng.uniform(0.5, 0.85), rng.uniform(0.6, 0.85)
    color = np.array(colorsys.hsv_to_rgb(hue, chroma, light), np.float32)
    return (1 + _pattern(kind, size, rng))[..., None] * color


def _pattern(kind: int, size: int, rng: np.random.Generator) -> Plane:
    """(size, size) around 0, with about 16 waves on a side whatever the size."""
    rows, columns = grid(size)
    pace = np.float32(2 * np.pi * rng.uniform(13, 19))
    phase = np.float32(rng.uniform(0, 2 * np.pi))
    pattern: Plane = np.zeros((size, size), np.float32)  # what a plain surface keeps
    if kind == GRASS:
        pattern = rng.normal(0, 0.22, (size, size)).astype(np.float32)
    elif kind == SAND:
        pattern = 0.16 * np.sin(pace * rows + phase)
    elif kind == WATER:
        pattern = 0.16 * np.sin(pace * 0.6 * rows + 1.5 * np.sin(pace * 0.25 * columns) + phase)
    elif kind == FLAG:
        angle = np.float32(rng.uniform(-0.5, 0.5))
        pattern = 0.4 * np.sign(np.sin(pace * (columns * np.cos(angle) + rows * np.sin(angle))))
    elif kind == DICE:
        dots = np.sin(pace * 0.8 * rows + phase) * np.sin(pace * 0.8 * columns) > 0.45
        pattern = np.where(dots, np.float32(-0.6), np.float32(0.15))
    return pattern


def _lit(image: Plane, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Light from one side, a grain, and whole levels."""
    rows, columns = grid(len(image))
    angle = rng.uniform(0, 2 * np.pi)
    slope = (rows - 0.5) * np.float32(np.sin(angle)) + (columns - 0.5) * np.float32(np.cos(angle))
    light = np.float32(rng.uniform(0.8, 1.1)) + np.float32(0.3) * slope
    grain = rng.normal(0, 0.02, image.shape[:2]).astype(np.float32)
    return (255 * (image * light[..., None] + grain[..., None])).clip(0, 255).astype(np.uint8)
