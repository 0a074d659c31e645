"""Pixels as arrays: NumPy files, TIFFs that Pillow cannot hold, and raw levels of any kind brought to 8 bits.

Shapes    H W image, C channels.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segvit.contracts import UserError

ARRAY_SUFFIXES = (".npz", ".npy")
# What NumPy and tifffile raise on broken files.
BROKEN = (OSError, ValueError, EOFError, KeyError, IndexError, zipfile.BadZipFile, zlib.error, struct.error)

Levels = tuple[float, float]  # the raw levels that become 0 and 255


def load_array(path: Path, key: str) -> NDArray[Any]:
    """The array in a `.npy` file; in a `.npz` file the one called `key`, or else the only one."""
    try:
        with path.open("rb") as file:  # given a path, NumPy leaves damaged files open
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return content
            chosen = key if key in content.files or len(content.files) != 1 else content.files[0]
            if chosen in content.files:
                array: NDArray[Any] = content[chosen]
                return array
            names = ", ".join(content.files) or "none"
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give a file") from None
    except BROKEN as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read as NumPy arrays ({reason}); save it again with numpy.savez") from None
    raise UserError(f"{path}: holds the arrays {names}; one must be called {key}, or be the only one")


def load_tiff(source: str | Path | BinaryIO, name: str) -> NDArray[Any]:
    """The first page of a TIFF as (H, W) or (H, W, C), with all its samples and bits."""
    try:
        import tifffile
    except ImportError:
        raise UserError(
            f"{name}: Pillow cannot hold what is in this TIFF; install tifffile for it: pip install segvit[images]"
        ) from None
    try:
        with tifffile.TiffFile(source) as file:
            page = file.pages.first
            pixels: NDArray[Any] = page.asarray()
            # Planar files keep one plane a channel.
            return np.moveaxis(pixels, 0, -1) if page.axes.startswith("S") else pixels
    except (*BROKEN, tifffile.TiffFileError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{name}: cannot be read as a TIFF ({reason}); replace the file or take it out") from None


def eight_bits(raw: NDArray[Any], name: str, levels: Levels | None) -> NDArray[np.uint8]:
    """Raw values as 0..255: `levels` map linearly, halves round up, what lies outside is cut off.

    Without `levels`, 8 bits stay and 65535 becomes 255. Raises UserError for values that have no such natural range.
    """
    if raw.dtype == np.bool_:
        raw = raw.astype(np.uint8) * np.uint8(255)
    if levels is None and raw.dtype == np.uint8:
        return raw
    if levels is None and raw.dtype.kind not in "iu":
        raise UserError(f"{name}: pixels are of type {raw.dtype}; set range: [LOWEST, HIGHEST] in the dataset's YAML")
    if raw.size and levels is None and (raw.min() < 0 or raw.max() > 65535):
        raise UserError(f"{name}: pixels span {raw.min()}..{raw.max()}; set range: [LOWEST, HIGHEST] in the YAML")
    low, high = levels or (0, 65535)
    if raw.dtype in (np.uint8, np.uint16):  # a table is several times faster than arithmetic on every pixel
        return _spread(np.arange(np.iinfo(raw.dtype).max + 1), low, high)[raw]
    if raw.dtype.kind == "f" and not np.isfinite(raw).all():
        raise UserError(f"{name}: some pixels are not finite numbers; replace them, for instance by {low:g}")
    if raw.dtype.kind not in "iuf":
        raise UserError(f"{name}: pixels are of type {raw.dtype}; save real numbers")
    return _spread(raw, low, high)


def fit_channels(pixels: NDArray[np.uint8], channels: int, name: str) -> NDArray[np.uint8]:
    """(H, W) or (H, W, C) levels as (H, W, channels): gray is repeated to three, three become their luminance."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or not pixels.size:
        raise UserError(f"{name}: an array of shape {pixels.shape} is no image; save (H, W) or (H, W, channels)")
    found = pixels.shape[2]
    if found == channels:
        return np.ascontiguousarray(pixels)
    if (found, channels) == (1, 3):
        return np.repeat(pixels, 3, axis=2)
    if (found, channels) == (3, 1):
        return np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[..., None]
    raise UserError(
        f"{name}: the pixels have {found} channels but {channels} are wanted; set channels: {found} in the dataset's "
        "YAML if all images are like this (channels are the last axis of an array)"
    )


def _spread(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """The straight line from low to 0 and high to 255, in whole levels."""
    return np.floor((values.astype(np.float64) - low) * 255 / (high - low) + 0.5).clip(0, 255).astype(np.uint8)
