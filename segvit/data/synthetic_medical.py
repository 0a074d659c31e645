"""Generated medical images, for demos and studies without a download: polyps on mucosa, organs in CT-like volumes.

Polyps    An irregular blob bulges from pink, shaded, folded ground: a little redder or paler than its surroundings,
          with a soft outline of low contrast. Folds, shadows, glare and a stain of the same colours are no polyps, so
          colour and brightness alone do not solve it. One image in twelve shows no polyp.
Organs    Nested and neighbouring ellipsoids in a body, in noise: a liver, two kidneys alike in grey, a spleen of almost
          the liver's grey, and an aorta. Neighbours in grey are told apart by place, side and size. The values are
          like Hounsfield units and slices are thicker than pixels.

Image i of a split, and volume i, is a function of (seed, split, i) alone.

Shapes    D slices, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segvit.contracts import Classes
from segvit.data.synthetic import Drawn, Plane, Scenes, Seed, grid
from segvit.data.volumes import write_nifti
from segvit.files import write_text

POLYP_CLASSES = Classes(("mucosa", "polyp"), ((0, 0, 0), (255, 255, 255)))
NO_POLYP = 1 / 12  # of the images
GROUND = (0.78, 0.42, 0.38)  # red, green, blue of lit mucosa

ORGANS = ("background", "liver", "right_kidney", "left_kidney", "spleen", "aorta")
ORGAN_CLASSES = Classes(
    ORGANS, ((0, 0, 0), (255, 0, 255), (0, 255, 255), (255, 255, 0), (60, 255, 255), (0, 0, 255))
)  # fmt: skip
HU_RANGE = (-125, 275)  # the window of abdominal CT
# Centre and half axes in parts of the sides (D, H, W), and the grey; later ones lie over earlier ones.
PLACES = {
    1: ((0.55, 0.42, 0.32), (0.36, 0.22, 0.20), 70),
    2: ((0.45, 0.66, 0.30), (0.24, 0.10, 0.08), 110),
    3: ((0.45, 0.66, 0.70), (0.24, 0.10, 0.08), 110),
    4: ((0.60, 0.46, 0.76), (0.22, 0.12, 0.10), 82),
    5: ((0.50, 0.62, 0.50), (0.60, 0.05, 0.05), 150),
}


class Scan(NamedTuple):
    """A volume with its labels."""

    image: NDArray[np.int16]  # (D, H, W) like Hounsfield units
    labels: NDArray[np.uint8]  # (D, H, W)
    spacing: tuple[float, float, float]  # millimetres along D, H, W


def draw_polyps(size: int, seed: Seed) -> Drawn:
    """Image (size, size, 3) and mask (size, size) of one seed."""
    rng = np.random.default_rng(seed)
    shade = _smooth(size, size / 4, rng)
    image = np.asarray(GROUND, np.float32) * (1 + 0.13 * shade + 0.05 * _smooth(size, size / 24, rng))[..., None]
    for _ in range(int(rng.integers(2, 5))):
        image *= (1 - _fold(size, rng))[..., None]
    mask = np.zeros((size, size), np.uint8)
    stain = _blob(size, rng)
    image *= 1 + _soft(stain, size, 0.02)[..., None] * _tint(rng)
    for _ in range(0 if rng.random() < NO_POLYP else int(rng.choice((1, 1, 1, 2)))):
        blob = _blob(size, rng)
        mask[blob < 0] = 1
        edge = _soft(blob, size, rng.uniform(0.015, 0.03))
        dome = 1 - np.clip(1 + blob / max(1e-3, -float(blob.min())), 0, 1) ** 2  # 1 in the middle, 0 at the outline
        rows, columns = grid(size)
        angle = rng.uniform(0, 2 * np.pi)
        lit = 0.22 * dome * (0.6 + np.sin(angle) * (rows - 0.5) + np.cos(angle) * (columns - 0.5))
        rim = -0.10 * np.exp(-((blob * 40) ** 2))  # a bulge throws a narrow shadow, a stain does not
        image *= (1 + edge * lit + rim)[..., None] * (1 + edge[..., None] * _tint(rng))
    for _ in range(int(rng.integers(0, 5))):
        image += 0.5 * _glare(size, rng)[..., None]
    image += rng.normal(0, 0.02, (size, size, 1)).astype(np.float32)
    return (255 * image).clip(0, 255).astype(np.uint8), mask


POLYPS = Scenes("polyps", POLYP_CLASSES, draw_polyps)


def draw_organs(shape: tuple[int, int, int], seed: Seed) -> Scan:
    """A volume (D, H, W) of one seed."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*((np.arange(side, dtype=np.float32) + 0.5) / side for side in shape), indexing="ij")
    body = _ellipsoid(axes, (0.5, 0.5, 0.5), (2.0, 0.42, 0.46))
    grey = np.where(body < 1, -20.0, -900.0).astype(np.float32)
    fat = (body > 0.82) & (body < 1)
    grey[fat] = -100
    labels = np.zeros(shape, np.uint8)
    shift = rng.uniform(-0.03, 0.03, 3)
    for organ, (centre, radii, level) in PLACES.items():
        bumps = ndimage.gaussian_filter(rng.normal(0, 1, shape), [side / 7 for side in shape])
        wobble = 1 + 0.15 * bumps / bumps.std()
        place = np.asarray(centre) + shift + rng.uniform(-0.02, 0.02, 3)
        inside = _ellipsoid(axes, place, np.asarray(radii) * rng.uniform(0.85, 1.15, 3)) * wobble < 1
        labels[inside] = organ
        grey[inside] = level + rng.normal(0, 8)
    soft = ndimage.gaussian_filter(grey, (0, 0.7, 0.7))
    grain = ndimage.gaussian_filter(rng.normal(0, 1, shape), (0, 0.6, 0.6)) * 45
    spacing = (float(rng.choice((3.0, 5.0))), *[round(float(rng.uniform(0.7, 0.9)), 2)] * 2)
    return Scan(np.rint(soft + grain).astype(np.int16), labels, (spacing[0], spacing[1], spacing[2]))


def write_organs(
    folder: str | Path, *, train: int = 12, val: int = 4, shape: tuple[int, int, int] = (16, 64, 64), seed: int = 0
) -> str:
    """Write volumes as NIfTI files with a dataset.yaml, ready for `segvit train`; returns the folder."""
    root = Path(folder)
    for place, (split, count) in enumerate((("train", train), ("val", val)), start=1):
        for i in range(count):
            scan = draw_organs(shape, (seed, i, place))
            affine = np.diag([*scan.spacing[::-1], 1.0])
            for kind, volume in (("images", scan.image), ("masks", scan.labels)):
                write_nifti(root / kind / split / f"case{i:03d}.nii.gz", volume, affine=affine)
    names = "".join(
        f"  {i}: {{name: {name}, color: {list(color)}}}\n"
        for i, (name, color) in enumerate(zip(ORGANS, ORGAN_CLASSES.palette, strict=True))
    )
    splits = "".join(f"{split}: {{images: images/{split}, masks: masks/{split}}}\n" for split in ("train", "val"))
    write_text(root / "dataset.yaml", f"{splits}channels: 1\nrange: {list(HU_RANGE)}\nclasses:\n{names}")
    return str(root)


def _smooth(size: int, width: float, rng: np.random.Generator) -> Plane:
    """Noise of that width, of deviation 1."""
    noise = ndimage.gaussian_filter(rng.normal(0, 1, (size, size)), width, mode="reflect")
    plane: Plane = ((noise - noise.mean()) / noise.std()).astype(np.float32)
    return plane


def _fold(size: int, rng: np.random.Generator) -> Plane:
    """The dark side of a curved fold, 0 to 0.35."""
    rows, columns = grid(size)
    angle, bend = rng.uniform(0, 2 * np.pi), rng.uniform(-0.8, 0.8)
    along = (columns - 0.5) * np.cos(angle) - (rows - 0.5) * np.sin(angle)
    across = (columns - 0.5) * np.sin(angle) + (rows - 0.5) * np.cos(angle) - rng.uniform(-0.4, 0.4) + bend * along**2
    fold: Plane = (rng.uniform(0.12, 0.35) * np.exp(-((across / rng.uniform(0.015, 0.05)) ** 2))).astype(np.float32)
    return fold


def _blob(size: int, rng: np.random.Generator) -> Plane:
    """How far, about, each pixel lies outside an irregular outline, in sides; negative inside."""
    rows, columns = grid(size)
    down, across = rows - rng.uniform(0.2, 0.8), columns - rng.uniform(0.2, 0.8)
    turn = np.arctan2(down, across)
    radius = rng.uniform(0.09, 0.24) * np.ones_like(turn)
    for waves in (2, 3, 4):
        radius *= 1 + rng.uniform(0, 0.16) * np.cos(waves * turn + rng.uniform(0, 2 * np.pi))
    return (np.hypot(down, across) - radius).astype(np.float32)


def _soft(distance: Plane, size: int, width: float) -> Plane:
    """1 inside, 0 outside, with an outline of that width in sides, at least a pixel."""
    soft: Plane = 1 / (1 + np.exp(np.clip(distance / max(width / 2, 0.5 / size), -30, 30)))
    return soft


def _tint(rng: np.random.Generator) -> NDArray[np.float32]:
    """Factors less one of red, green and blue: redder or paler, never by much."""
    direction = np.array([0.06, -0.12, -0.10]) if rng.random() < 0.5 else np.array([0.05, 0.12, 0.09])
    return (direction * rng.uniform(0.4, 1.0)).astype(np.float32)


def _glare(size: int, rng: np.random.Generator) -> Plane:
    rows, columns = grid(size)
    row, column = rng.uniform(0, 1, 2)
    spread = ((rows - row) / rng.uniform(0.01, 0.03)) ** 2 + ((columns - column) / rng.uniform(0.01, 0.03)) ** 2
    glare: Plane = np.exp(-spread).astype(np.float32)
    return glare


def _ellipsoid(
    axes: Sequence[NDArray[Any]], centre: NDArray[np.float64] | tuple[float, ...],
    radii: NDArray[np.float64] | tuple[float, ...],
) -> NDArray[np.float32]:  # fmt: skip
    """The squared distance from the centre in half axes: below 1 inside."""
    total = np.zeros_like(axes[0])
    for axis, middle, radius in zip(axes, centre, radii, strict=True):
        total += ((axis - np.float32(middle)) / np.float32(radius)) ** 2
    return total
