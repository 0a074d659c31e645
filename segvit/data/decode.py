"""Reads image and mask files into arrays, and says in one line what is wrong with a file that cannot be used.

Images become uint8 of three channels whatever they were (gray, palette, alpha, 16 bit, turned by EXIF), or of as many
channels as asked for. Masks become contiguous class ids through a `LabelRule`, without any EXIF turn; a value that the
rule does not know is an error, never a silent class.
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
from PIL.TiffImagePlugin import TiffImageFile

from segvit.contracts import Color, Sample, UserError
from segvit.data.arrays import ARRAY_SUFFIXES, Levels, eight_bits, fit_channels, load_array, load_tiff

UNKNOWN = -1
INTEGER_MODES = ("L", "P", "1", "I", "I;16", "I;16B", "I;16L")  # Pillow's names for one channel of whole numbers
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)  # what Pillow raises on broken files
JPEG = ("JPEG", "MPO")
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TIFF_SAMPLES = 277  # the tag with the number of channels
BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)

Source = str | Path | BinaryIO


@dataclass(frozen=True, eq=False)
class LabelRule:
    """Which raw value of a mask is which class: a table over numbers, or sorted colour codes; exactly one of both.

    With `nearest`, a value or colour that is not listed counts as the nearest one that is; the lower of two.
    """

    ignore: int
    table: NDArray[np.int32] | None = None  # (65536,) raw number -> id, or UNKNOWN
    codes: NDArray[np.int32] | None = None  # (n,) ascending red * 65536 + green * 256 + blue
    ids: NDArray[np.int32] | None = None  # (n,) the id of each code
    nearest: bool = False

    @staticmethod
    def of_numbers(values: Mapping[int, int], ignore: int, *, nearest: bool = False) -> LabelRule:
        """A rule for masks that hold numbers.

        `ignore` itself is ignored unless `values` gives it to a class; with `nearest` only where `values` lists it.
        """
        table = np.full(65536, UNKNOWN, np.int32)
        table[ignore] = ignore
        for raw, index in values.items():
            table[raw] = index
        if nearest:
            listed = np.array(sorted(values))
            middles = (listed[1:] + listed[:-1]) // 2  # the last value that still belongs to the lower neighbour
            table = table[listed[np.searchsorted(middles, np.arange(65536))]]
        return LabelRule(ignore, table=table, nearest=nearest)

    @staticmethod
    def of_colors(values: Mapping[Color, int], ignore: int, *, nearest: bool = False) -> LabelRule:
        """A rule for masks painted in colours; nearness is the squared distance of red, green and blue."""
        pairs = sorted((red << 16 | green << 8 | blue, index) for (red, green, blue), index in values.items())
        codes, ids = np.array(pairs, np.int32).reshape(-1, 2).T.copy()
        return LabelRule(ignore, codes=codes, ids=ids, nearest=nearest)

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """The integer type of the masks this rule makes."""
        return np.uint8 if self.ignore == 255 else np.uint16


def read_image(source: Source, *, channels: int = 3, levels: Levels | None = None) -> NDArray[np.uint8]:
    """The image in a file as (H, W, channels), turned upright by its EXIF tag; of several pages the first.

    Three channels are red green blue and one is luminance, whatever the file holds; any other number must be what it
    holds. The raw `levels` (low, high) become 0 and 255, by default the full range of 8 or 16 bits. NumPy files hold
    (H, W) or (H, W, C); in a `.npz` the array is called image or is the only one.
    """
    name = _name(source)
    if is_array_file(source):
        raw = load_array(Path(str(source)), "image")
    elif _beyond_pillow(source, whole=channels not in (1, 3) or levels is not None):
        raw = load_tiff(source, name)
    else:
        return from_picture(_open(source, upright=True), name, channels=channels, levels=levels)
    return fit_channels(eight_bits(raw, name, levels), channels, name)


def from_picture(
    picture: Image.Image, name: str, *, channels: int = 3, levels: Levels | None = None
) -> NDArray[np.uint8]:
    """A picture of any kind as (H, W, channels), as `read_image` does it."""
    if channels in (1, 3) and picture.mode != "F" and not picture.mode.startswith("I"):
        if picture.mode == "P" and "transparency" in picture.info:
            picture = picture.convert("RGBA")  # Pillow warns when a transparent palette goes to RGB directly
        picture = picture.convert("L" if channels == 1 else "RGB")
    return fit_channels(eight_bits(np.array(picture), name, levels), channels, name)


def read_mask(source: Source, rule: LabelRule) -> NDArray[Any]:
    """The class ids (H, W) that `rule` makes of the mask in a file; in a `.npz` it is called label or is alone."""
    name = _name(source)
    if is_array_file(source):
        return mask_from_array(load_array(Path(str(source)), "label"), rule, name)
    picture = _open(source, upright=False)
    if picture.format in JPEG and not rule.nearest:
        raise UserError(
            f"{name}: JPEG changes pixel values, so it cannot hold a mask; make it a PNG, or set nearest: true"
        )
    return _ids(_numbers(picture, name) if rule.table is not None else _colors(picture, name), rule, name)


def mask_from_array(raw: NDArray[Any], rule: LabelRule, name: str) -> NDArray[Any]:
    """The class ids (H, W) that `rule` makes of an array: whole numbers (H, W), or colours (H, W, 3)."""
    return _ids(_whole_numbers(raw, name, colors=rule.table is None), rule, name)


def read(
    image: Path, mask: Path, rule: LabelRule, name: str = "", *, channels: int = 3, levels: Levels | None = None
) -> Sample:
    """One image with its mask; both must have the same size."""
    sample = Sample(read_image(image, channels=channels, levels=levels), read_mask(mask, rule), name or str(image))
    if sample.image.shape[:2] != sample.mask.shape:
        (high, wide), (mask_high, mask_wide) = sample.image.shape[:2], sample.mask.shape
        raise UserError(
            f"{image} is {wide}x{high} pixels but its mask {mask} is {mask_wide}x{mask_high}; "
            "make them equal (an image turned by its EXIF tag is the usual cause)"
        )
    return sample


def is_array_file(source: Source) -> bool:
    """Whether this is the path of a NumPy file."""
    return isinstance(source, str | Path) and str(source).lower().endswith(ARRAY_SUFFIXES)


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


def _beyond_pillow(source: Source, *, whole: bool) -> bool:
    """Whether a TIFF needs tifffile: Pillow does not know its kind, or drops samples or bits that are wanted `whole`.

    Raises UserError for files of another kind that Pillow would reduce to 8 bits.
    """
    is_tiff = _is_tiff(source)
    if not (is_tiff or whole):
        return False
    try:
        with Image.open(source) as picture:
            bands = len(picture.getbands())
            samples = picture.tag_v2.get(TIFF_SAMPLES, 1) if isinstance(picture, TiffImageFile) else bands
            drops = samples != bands or (bands > 1 and any(";16" in str(tile[3]) for tile in picture.tile))
    except UnidentifiedImageError:
        return is_tiff
    except (*BOMB, *BROKEN):
        return False  # `_open` finds the words for it
    finally:
        if not isinstance(source, str | Path):
            source.seek(0)
    if whole and drops and not is_tiff:
        raise UserError(f"{_name(source)}: only 8 of the 16 bits of this file can be read; save it as a TIFF")
    return whole and drops


def _is_tiff(source: Source) -> bool:
    if not isinstance(source, str | Path):
        start = source.read(4)
        source.seek(0)
        return start in TIFF_STARTS
    try:
        with Path(source).open("rb") as file:
            return file.read(4) in TIFF_STARTS
    except OSError:
        return False


def _numbers(picture: Image.Image, name: str) -> NDArray[Any]:
    """The raw numbers (H, W) of a mask whose rule is made of numbers."""
    if picture.mode in INTEGER_MODES:
        return np.array(picture)
    if picture.mode in ("RGB", "RGBA", "LA"):
        channels = np.array(picture)[..., : 1 if picture.mode == "LA" else 3]
        if (channels == channels[..., :1]).all():
            return np.ascontiguousarray(channels[..., 0])
        raise UserError(
            f"{name}: the mask is painted in colours but the classes are given as numbers; "
            "list each class's colours under values: in the YAML, such as values: [[128, 64, 128]]"
        )
    raise UserError(f"{name}: a mask with pixels of kind {picture.mode} is not supported; save an 8-bit PNG")


def _colors(picture: Image.Image, name: str) -> NDArray[np.uint8]:
    """The colours (H, W, 3) of a mask whose rule is made of colours."""
    if picture.mode not in ("RGB", "RGBA", "P", "L", "LA", "1"):
        raise UserError(f"{name}: pixels of kind {picture.mode} but the classes are colours; save an RGB PNG")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return np.array(picture.convert("RGB"))


def _whole_numbers(raw: NDArray[Any], name: str, *, colors: bool) -> NDArray[Any]:
    """A mask from a NumPy file as (H, W) integers, or (H, W, 3) colours; labels saved as 1.0 and 2.0 are fine."""
    if raw.ndim == 3 and raw.shape[2] == 1:
        raw = raw[..., 0]
    wanted = "(H, W, 3) colours" if colors else "(H, W)"
    if raw.ndim != (3 if colors else 2) or (colors and (raw.shape[2] != 3 or raw.dtype != np.uint8)) or not raw.size:
        raise UserError(f"{name}: the mask has shape {raw.shape} and type {raw.dtype}; save {wanted} of type uint8")
    if raw.dtype.kind in "biu":
        return raw
    if raw.dtype.kind != "f" or not (np.isfinite(raw).all() and (raw == np.floor(raw)).all()):
        raise UserError(f"{name}: the mask holds values of type {raw.dtype} that are not whole; save class numbers")
    return raw.astype(np.int64)


def _ids(raw: NDArray[Any], rule: LabelRule, name: str) -> NDArray[Any]:
    if rule.table is not None:
        return _ids_of_numbers(raw, rule.table, name).astype(rule.dtype)
    return _ids_of_colors(raw, rule, name).astype(rule.dtype)


def _ids_of_numbers(raw: NDArray[Any], table: NDArray[np.int32], name: str) -> NDArray[np.int32]:
    if raw.dtype == np.bool_:
        raw = raw.astype(np.uint8)
    if raw.dtype not in (np.uint8, np.uint16) and (raw.min() < 0 or raw.max() >= len(table)):
        raise UserError(f"{name}: mask values span {raw.min()}..{raw.max()}; ids must lie in 0..65535")
    ids: NDArray[np.int32] = table[raw]
    if ids.min() == UNKNOWN:
        found = np.unique(raw[ids == UNKNOWN]).tolist()
        raise _unknown(name, "ids", [str(value) for value in found])
    return ids


def _ids_of_colors(raw: NDArray[np.uint8], rule: LabelRule, name: str) -> NDArray[np.int32]:
    assert rule.codes is not None
    assert rule.ids is not None
    red, green, blue = np.moveaxis(raw.astype(np.int32), 2, 0)
    codes = red << 16 | green << 8 | blue
    place = np.searchsorted(rule.codes, codes).clip(max=len(rule.codes) - 1)
    known = rule.codes[place] == codes
    if not known.all():
        found, which = np.unique(codes[~known], return_inverse=True)
        if not rule.nearest:
            raise _unknown(name, "colours", [str(tuple(color)) for color in _split(found).tolist()])
        place[~known] = _nearest(found, rule.codes)[which]
    ids: NDArray[np.int32] = rule.ids[place]
    return ids


def _nearest(codes: NDArray[np.int32], listed: NDArray[np.int32]) -> NDArray[np.intp]:
    """The position in `listed` of the nearest colour to each of `codes`, the first of equally near ones."""
    colors, centres = (_split(side).astype(np.float32) for side in (codes, listed))
    lengths = (centres**2).sum(1)
    # |a - b|^2 without |a|^2, which all of a row share: whole numbers that float32 holds exactly. In parts, for memory.
    starts = range(0, len(colors), 4096)
    return np.concatenate([(lengths - 2 * colors[i : i + 4096] @ centres.T).argmin(1) for i in starts])


def _split(codes: NDArray[np.int32]) -> NDArray[np.int32]:
    """Colour codes (n,) as red, green and blue (n, 3)."""
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1)


def _unknown(name: str, what: str, found: list[str]) -> UserError:
    shown = ", ".join(found[:10]) + (f", ... {len(found)} in all" if len(found) > 10 else "")
    return UserError(f"{name}: {what} [{shown}] are in no class; add them to values: or ignore: in the YAML")
