"""A third set of generated images, whose classes have two words each: a texture and a shape, "striped ring".

    textures  plain, striped, dotted, checked
    shapes    circle, square, triangle, cross, ring

Every combination is a class, and the rest is background. Objects are bright and their hues are drawn from the whole
circle, so that colour tells where an object is and nothing else. Nothing is ignored. It is there to study open
vocabularies: combinations can be withheld from training (`WITHHELD`) while each of their words is known from others.
"""

from __future__ import annotations

import colorsys
from itertools import product

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import Classes
from segvit.data.synthetic import Drawn, Plane, Scenes, Seed, grid
from segvit.palette import generate_palette

TEXTURES = ("plain", "striped", "dotted", "checked")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PAIRS = tuple(product(TEXTURES, SHAPES))
NAMES = ("background", *(f"{texture} {shape}" for texture, shape in PAIRS))
CLASSES = Classes(NAMES, ((40, 40, 40), *generate_palette(len(PAIRS))))
# Each shape once and each texture at least once; 5 of 20, as many as the zero-shot split of PASCAL VOC hides.
WITHHELD = ("striped circle", "dotted square", "checked triangle", "plain cross", "striped ring")
MOST = 2  # objects of a scene


def draw_words(size: int, seed: Seed, *, objects: int | None = None, zoom: float = 1.0) -> Drawn:
    """Image and mask of one seed: one or two objects, or as many as asked for; they may hide each other in part.

    `zoom` makes them larger: with 4/3, those of an image of 48 pixels look as in one of 64.
    """
    rng = np.random.default_rng((*seed, 2))  # one word more: not the random numbers of the other sets
    mask = np.zeros((size, size), np.uint8)
    image = _ground(size, rng)
    count = rng.integers(1, MOST + 1) if objects is None else objects
    for kind in rng.choice(len(PAIRS), count, replace=False):
        _draw_object(image, mask, int(kind), rng, zoom)
    image *= rng.uniform(0.85, 1.1)
    image += rng.normal(0, 0.02, (size, size, 1)).astype(np.float32)
    return (255 * image).clip(0, 255).astype(np.uint8), mask


def _ground(size: int, rng: np.random.Generator) -> Plane:
    """(size, size, 3) a dark surface that gets darker to one side."""
    rows, columns = grid(size)
    color = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.5), rng.uniform(0.1, 0.25)), np.float32)
    down, across = rng.uniform(-0.3, 0.3, 2)
    slope = 1 + np.float32(down) * (rows - 0.5) + np.float32(across) * (columns - 0.5)
    return (slope[..., None] * color).astype(np.float32)


def _draw_object(image: Plane, mask: NDArray[np.uint8], kind: int, rng: np.random.Generator, zoom: float) -> None:
    """An object in place, over what is there."""
    texture, shape = PAIRS[kind]
    size = len(mask)
    rows, columns = (plane / np.float32(zoom) for plane in grid(size))
    row, column = rng.uniform(0.22, 0.78, 2) / zoom
    angle = np.float32(rng.uniform(-0.15, 0.15))
    sine, cosine = np.sin(angle), np.cos(angle)
    down = (rows - np.float32(row)) * cosine - (columns - np.float32(column)) * sine
    across = (rows - np.float32(row)) * sine + (columns - np.float32(column)) * cosine
    inside = _inside(shape, down, across, np.float32(rng.uniform(0.2, 0.3)))
    color = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.2, 0.6), rng.uniform(0.8, 1.0)), np.float32)
    mask[inside] = 1 + kind
    image[inside] = _light(texture, down, across, rng)[inside][:, None] * color


def _inside(shape: str, down: Plane, across: Plane, radius: np.float32) -> NDArray[np.bool_]:
    """Which pixels belong to a shape around (0, 0); all shapes are about as large."""
    far: Plane
    if shape == "circle":
        far = np.hypot(down, across) - radius
    elif shape == "square":
        far = np.maximum(np.abs(down), np.abs(across)) - np.float32(0.9) * radius
    elif shape == "triangle":  # its tip up
        far = np.maximum(down - np.float32(0.75) * radius, np.abs(across) - (down + np.float32(1.2) * radius) / 2)
    elif shape == "cross":
        tall, wide = np.abs(down), np.abs(across)
        far = np.maximum(np.maximum(tall, wide) - np.float32(1.1) * radius, np.minimum(tall, wide) - radius / 3)
    else:
        far = np.abs(np.hypot(down, across) - np.float32(0.8) * radius) - np.float32(0.3) * radius
    return far <= 0


def _light(texture: str, down: Plane, across: Plane, rng: np.random.Generator) -> Plane:
    """(size, size) the lightness of a surface, with about ten waves on a side whatever the size."""
    pace = np.float32(2 * np.pi * rng.uniform(9, 12))
    first, second = (np.float32(phase) for phase in rng.uniform(0, 2 * np.pi, 2))
    if texture == "striped":
        waves = np.sin(pace * down + first)
    elif texture == "dotted":
        waves = np.float32(0.6) - np.sin(pace * down + first) - np.sin(pace * across + second)
    elif texture == "checked":
        waves = np.sin(pace / 2 * down + first) * np.sin(pace / 2 * across + second)
    else:
        return np.ones_like(down)
    return np.where(waves > 0, np.float32(1), np.float32(0.45))


WORDS = Scenes("words", CLASSES, draw_words)
