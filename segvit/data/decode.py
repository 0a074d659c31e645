"""Reads image and mask files into arrays, and says in one line what is wrong with a file that cannot be used.

Images become uint8 RGB whatever they were (gray, palette, alpha, 16 bit, turned by EXIF). Masks become contiguous class
ids through a `LabelRule`; a value that the rule does not know is an error, never a silent class.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from segvit.contracts import Color, Sample, UserError

UNKNOWN = -1
INTEGER_MODES = ("L", "P", "1", "I", "I;16", "I;16B", "I;16L")  # Pillow's names for one channel of whole numbers
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)  # what Pillow raises on broken files
BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)

Source = str | Path | BinaryIO


@dataclass(frozen=True, eq=False)
class LabelRule:
    """Which raw value of a mask is which class: a table over numbers, or sorted colour codes; exactly one of both."""

    ignore: int
    table: NDArray[np.int32] | None = None  # (65536,) raw number -> id, or UNKNOWN
    codes: NDArray[np.int32] | None = None  # (n,) ascending red * 65536 + green * 256 + blue
    ids: NDArray[np.int32] | None = None  # (n,) the id of each code

    @staticmethod
    def of_numbers(values: Mapping[int, int], ignore: int) -> LabelRule:
        """A rule for masks that hold numbers; `ignore` itself is ignored unless `values` gives it to a class."""
        table = np.full(65536, UNKNOWN, np.int32)
        table[ignore] = ignore
        for raw, index in values.items():
            table[raw] = index
        return LabelRule(ignore, table=table)

    @staticmethod
    def of_colors(values: Mapping[Color, int], ignore: int) -> LabelRule:
        """A rule for masks painted in colours."""
        pairs = sorted((red << 16 | green << 8 | blue, index) for (red, green, blue), index in values.items())
        codes, ids = np.array(pairs, np.int32).reshape(-1, 2).T.copy()
        return LabelRule(ignore, codes=codes, ids=ids)

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """The integer type of the masks this rule makes."""
        return np.uint8 if self.ignore == 255 else np.uint16


def read_image(source: Source) -> NDArray[np.uint8]:
    """The image in a file as (H, W, 3) red green blue, turned upright by its EXIF tag."""
    return to_rgb(_open(source, upright=True), _name(source))


def to_rgb(picture: Image.Image, name: str) -> NDArray[np.uint8]:
    """A picture of any kind as (H, W, 3) red green blue; 16 bits become 8."""
    if picture.mode.startswith("I"):
        return np.repeat(_eight_bits(picture, name)[..., None], 3, axis=2)
    if picture.mode == "F":
        raise UserError(f"{name}: pixels are floating point numbers; save the image with 8 or 16 bits")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # Pillow warns when a transparent palette goes to RGB directly
    return np.array(picture.convert("RGB"))


def read_mask(source: Source, rule: LabelRule) -> NDArray[Any]:
    """The class ids (H, W) that `rule` makes of the mask in a file."""
    picture = _open(source, upright=False)
    if picture.format == "JPEG":
        raise UserError(f"{_name(source)}: JPEG changes pixel values, so it cannot hold a mask; make the mask a PNG")
    if rule.table is not None:
        return _ids_of_numbers(_numbers(picture, source), rule.table, source).astype(rule.dtype)
    return _ids_of_colors(picture, rule, source).astype(rule.dtype)


def read(image: Path, mask: Path, rule: LabelRule, name: str = "") -> Sample:
    """One image with its mask; both must have the same size."""
    sample = Sample(read_image(image), read_mask(mask, rule), name or str(image))
    if sample.image.shape[:2] != sample.mask.shape:
        (high, wide), (mask_high, mask_wide) = sample.image.shape[:2], sample.mask.shape
        raise UserError(
            f"{image} is {wide}x{high} pixels but its mask {mask} is {mask_wide}x{mask_high}; "
            "make them equal (an image turned by its EXIF tag is the usual cause)"
        )
    return sample


def _name(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else "the given bytes"


def _open(source: Source, *, upright: bool) -> Image.Image:
    try:
        with Image.open(source) as picture:
            picture.load()
            kind = picture.format
            result = ImageOps.exif_transpose(picture) if upright else picture
            result.format = kind  # a turned copy forgets it
            return result
    except FileNotFoundError:
        raise UserError(f"{_name(source)}: no such file; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{_name(source)}: is a folder; give an image file") from None
    except BOMB as error:
        raise UserError(f"{_name(source)}: too many pixels ({error}); cut the image into tiles") from None
    except BROKEN as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "unknown or damaged format"  # Pillow's own text only repeats the name
        raise UserError(
            f"{_name(source)}: cannot be read as an image ({reason}); replace the file or take it out of the set"
        ) from None


def _eight_bits(picture: Image.Image, name: str) -> NDArray[np.uint8]:
    values = np.array(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"{name}: pixels span {values.min()}..{values.max()}; save the image with 16 bits")
    return ((values + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257


def _numbers(picture: Image.Image, source: Source) -> NDArray[Any]:
    """The raw numbers (H, W) of a mask whose rule is made of numbers."""
    if picture.mode in INTEGER_MODES:
        return np.array(picture)
    if picture.mode in ("RGB", "RGBA", "LA"):
        channels = np.array(picture)[..., : 1 if picture.mode == "LA" else 3]
        if (channels == channels[..., :1]).all():
            return np.ascontiguousarray(channels[..., 0])
        raise UserError(
            f"{_name(source)}: the mask is painted in colours but the classes are given as numbers; "
            "list each class's colours under values: in the YAML, such as values: [[128, 64, 128]]"
        )
    raise UserError(f"{_name(source)}: a mask with pixels of kind {picture.mode} is not supported; save an 8-bit PNG")


def _ids_of_numbers(raw: NDArray[Any], table: NDArray[np.int32], source: Source) -> NDArray[np.int32]:
    if raw.dtype == np.bool_:
        raw = raw.astype(np.uint8)
    if raw.dtype.itemsize > 2 and (raw.min() < 0 or raw.max() >= len(table)):
        raise UserError(f"{_name(source)}: mask values span {raw.min()}..{raw.max()}; ids must lie in 0..65535")
    ids: NDArray[np.int32] = table[raw]
    if ids.min() == UNKNOWN:
        found = np.unique(raw[ids == UNKNOWN]).tolist()
        raise _unknown(source, "ids", [str(value) for value in found])
    return ids


def _ids_of_colors(picture: Image.Image, rule: LabelRule, source: Source) -> NDArray[np.int32]:
    assert rule.codes is not None
    assert rule.ids is not None
    if picture.mode not in ("RGB", "RGBA", "P", "L", "LA", "1"):
        raise UserError(f"{_name(source)}: pixels of kind {picture.mode} but the classes are colours; save an RGB PNG")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    red, green, blue = np.moveaxis(np.array(picture.convert("RGB")).astype(np.int32), 2, 0)
    codes = red << 16 | green << 8 | blue
    place = np.searchsorted(rule.codes, codes).clip(max=len(rule.codes) - 1)
    known = rule.codes[place] == codes
    if not known.all():
        found = np.unique(codes[~known]).tolist()
        raise _unknown(source, "colours", [str((code >> 16, code >> 8 & 255, code & 255)) for code in found])
    ids: NDArray[np.int32] = rule.ids[place]
    return ids


def _unknown(source: Source, what: str, found: list[str]) -> UserError:
    shown = ", ".join(found[:10]) + (f", ... {len(found)} in all" if len(found) > 10 else "")
    return UserError(f"{_name(source)}: {what} [{shown}] are in no class; add them to values: or ignore: in the YAML")
