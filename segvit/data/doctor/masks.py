"""What one mask file holds, before any label rule: its raw values with their pixels, or why it cannot be read.

Values are counted as `segvit.data.decode` reads them: gray RGB as numbers, alpha and palette ignored, 1-bit as 0 and 1.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from segvit.contracts import Color
from segvit.data.arrays import load_array
from segvit.data.decode import BOMB, INTEGER_MODES, is_array_file
from segvit.data.doctor.rows import count_rows
from segvit.data.doctor.tables import MaskFile

MAX_VALUES = 512  # kept of one mask; class masks have fewer, JPEG and interpolation make any number
GRAY = 0x010101  # the codes of gray colours are its multiples
RANGE = 65536  # numbers below are counted in a table, which is much faster than sorting them

Values = dict[int, int]  # raw value -> pixels


def look_at_mask(path: Path, data: bytes) -> MaskFile:
    """The record of the mask in `data`, the content of `path`, whose name it does not hold yet.

    Never raises: what is wrong with the file is in `error`.
    """
    try:
        if is_array_file(path):
            return _of_array(path)
        return _of_picture(Image.open(BytesIO(data)), data)
    except Exception as error:  # decoders raise anything on damaged files, and one of many must not end the survey
        return MaskFile("", error=reason_of(error, path))


def reason_of(error: Exception, path: Path) -> str:
    """Why the file at `path` cannot be read, in one line without its name."""
    if isinstance(error, UnidentifiedImageError):  # Pillow's own text only repeats the name
        return "the file is empty" if path.exists() and not path.stat().st_size else "unknown or damaged format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = (str(error).partition("\n")[0] or type(error).__name__).removeprefix(f"{path}: ")
    return f"too many pixels: {text}" if isinstance(error, BOMB) else text


def to_json(mask: MaskFile) -> dict[str, Any]:
    """All but the path, as JSON holds it."""
    if mask.error:
        return {"error": mask.error}
    return {
        "size": mask.size, "mode": mask.mode, "format": mask.format, "coloured": mask.coloured,
        "values": [*mask.values], "pixels": [*mask.values.values()], "distinct": mask.distinct,
        "palette": [mask.palette.get(value) for value in mask.values] if mask.palette else [],
    }  # fmt: skip


def from_json(path: str, record: dict[str, Any]) -> MaskFile:
    """The inverse of `to_json`, for the file at `path`."""
    if "error" in record:
        return MaskFile(path, error=record["error"])
    (height, width), values, palette = record["size"], record["values"], record["palette"]
    colors: dict[int, Color] = {
        value: (color[0], color[1], color[2]) for value, color in zip(values, palette, strict=False) if color
    }
    return MaskFile(
        path, (height, width), record["mode"], record["format"], record["coloured"],
        dict(zip(values, record["pixels"], strict=True)), record["distinct"], colors,
    )  # fmt: skip


def _of_picture(picture: Image.Image, data: bytes) -> MaskFile:
    counts = count_rows(picture, data)
    if counts is not None:
        assert picture.palette is not None
        values, coloured, palette = _nonzero(counts.tolist()), False, picture.palette.getdata()[1]
    else:
        picture.load()
        values, coloured = _count(picture)
        palette = bytes(picture.getpalette() or []) if picture.mode == "P" else b""
    kept = _most_frequent(values)
    return MaskFile(
        "", (picture.height, picture.width), picture.mode, picture.format or "", coloured, kept, len(values),
        _colors_of(kept, palette),
    )  # fmt: skip


def _of_array(path: Path) -> MaskFile:
    pixels = load_array(path, "label")
    kind = pixels.dtype.name
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype.kind == "f" and np.isfinite(pixels).all() and (pixels == np.floor(pixels)).all():
        pixels = pixels.astype(np.int64)
    if pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8 and pixels.size:
        values, coloured = _count_codes(Image.fromarray(np.ascontiguousarray(pixels))), True
    elif pixels.ndim == 2 and pixels.dtype.kind in "biu" and pixels.size:
        values, coloured = _count_numbers(pixels), False
    else:
        raise ValueError(f"shape {pixels.shape} and type {kind}; a mask is (H, W) class numbers or (H, W, 3) colours")
    format_ = path.suffix[1:].upper()
    return MaskFile("", pixels.shape[:2], kind, format_, coloured, _most_frequent(values), len(values))


def _count(picture: Image.Image) -> tuple[Values, bool]:
    """Pixels of each raw value, and whether the values are colours."""
    mode = picture.mode
    if mode in ("L", "P"):
        return _nonzero(picture.histogram()), False
    if mode == "LA":
        return _nonzero(picture.getchannel("L").histogram()), False
    if mode in INTEGER_MODES:
        return _count_numbers(np.asarray(picture)), False
    if mode in ("RGB", "RGBA"):
        codes = _count_codes(picture.convert("RGB"))
        if any(code % GRAY for code in codes):
            return codes, True
        return {code // GRAY: pixels for code, pixels in codes.items()}, False
    raise ValueError(f"pixels of kind {mode} cannot hold classes; save an 8-bit PNG")


def _nonzero(counts: list[int]) -> Values:
    return {value: pixels for value, pixels in enumerate(counts) if pixels}


def _count_numbers(pixels: NDArray[Any]) -> Values:
    if pixels.min() >= 0 and pixels.max() < RANGE:
        counts = np.bincount(pixels.ravel().astype(np.intp))
        values = np.flatnonzero(counts)
        return dict(zip(values.tolist(), counts[values].tolist(), strict=True))
    return _unique(pixels)


def _count_codes(picture: Image.Image) -> Values:
    """Pixels of each colour code of an RGB picture."""
    few: Any = picture.getcolors(MAX_VALUES)  # None for more, which it takes long to count
    if few is not None:
        return {red << 16 | green << 8 | blue: pixels for pixels, (red, green, blue) in few}
    return _unique(np.asarray(picture).astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32))


def _unique(values: NDArray[Any]) -> Values:
    found, times = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), times.tolist(), strict=True))


def _most_frequent(values: Values) -> Values:
    """At most MAX_VALUES of them, in ascending order."""
    if len(values) > MAX_VALUES:
        values = dict(sorted(values.items(), key=lambda item: (-item[1], item[0]))[:MAX_VALUES])
    return dict(sorted(values.items()))


def _colors_of(values: Values, palette: bytes) -> dict[int, Color]:
    inside = (value for value in values if palette and 3 * value + 2 < len(palette))
    return {value: (palette[3 * value], palette[3 * value + 1], palette[3 * value + 2]) for value in inside}
