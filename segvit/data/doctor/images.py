"""What the header of an image file says; no pixel is decoded."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile as OpenPicture
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, IMAGELENGTH, IMAGEWIDTH, SAMPLESPERPIXEL, TiffImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2 as TiffTags

from segvit.contracts import Size
from segvit.data.decode import TIFF_STARTS, is_array_file
from segvit.data.doctor.masks import reason_of
from segvit.data.doctor.tables import ImageFile

SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
BITS = {"1": 1, "I": 32, "F": 32}  # a sample, of the modes that do not have 8
PNG_START = 8  # bytes of the signature


def look_at_image(path: Path, name: str) -> ImageFile:
    """The record of an image, called `name` there. Never raises: what is wrong with the file is in `error`."""
    try:
        if is_array_file(path):
            return _of_array(path, name)
        with path.open("rb") as file:
            try:
                with Image.open(file) as picture:
                    return _of_picture(picture, file, name)
            except UnidentifiedImageError:
                file.seek(0)
                start = file.read(8)
                if not start.startswith(TIFF_STARTS):
                    raise
                return _of_tiff(TiffTags(start), file, name)
    except Exception as error:  # decoders raise anything on damaged files, and one of many must not end the survey
        return ImageFile(name, error=reason_of(error, path))


def _of_picture(picture: OpenPicture, file: BinaryIO, name: str) -> ImageFile:
    if isinstance(picture, TiffImageFile):
        return _of_tags(picture.tag_v2, picture.mode, name)
    orientation = _exif(picture, file).get(ExifTags.Base.Orientation)
    size = (picture.height, picture.width)
    turned = orientation in SIDEWAYS
    return ImageFile(
        name, size[::-1] if turned else size, picture.mode, picture.format or "", len(picture.getbands()),
        _bits(picture), turned,
    )  # fmt: skip


def _exif(picture: OpenPicture, file: BinaryIO) -> Image.Exif:
    # For a PNG without the tag Pillow decodes all pixels to find it behind them, where few programs write it.
    if isinstance(picture, PngImageFile) and not _has_exif(file):
        return Image.Image.getexif(picture)
    return picture.getexif()


def _has_exif(file: BinaryIO) -> bool:
    """Whether a PNG has an EXIF chunk, wherever; the file is left where it was."""
    place = file.tell()
    file.seek(PNG_START)
    found = False
    while not found and len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        found = kind == b"eXIf"
        file.seek(length + 4, 1)  # and its checksum
    file.seek(place)
    return found


def _bits(picture: OpenPicture) -> int:
    deep = picture.mode.startswith("I;16") or any(";16" in str(tile[3]) for tile in picture.tile)
    if deep or (picture.mode == "I" and picture.format == "PNG"):  # what older versions of Pillow make of 16 bits
        return 16
    return BITS.get(picture.mode, 8)


def _of_tiff(tags: TiffTags, file: BinaryIO, name: str) -> ImageFile:
    """A TIFF of a kind that Pillow cannot hold, such as more than four channels."""
    file.seek(tags.next)
    tags.load(file)
    return _of_tags(tags, "", name)


def _of_tags(tags: TiffTags, mode: str, name: str) -> ImageFile:
    size: Size = (tags[IMAGELENGTH], tags[IMAGEWIDTH])
    turned = tags.get(ExifTags.Base.Orientation) in SIDEWAYS
    bits = max(np.atleast_1d(tags.get(BITSPERSAMPLE, 1)).tolist())
    return ImageFile(name, size[::-1] if turned else size, mode, "TIFF", tags.get(SAMPLESPERPIXEL, 1), bits, turned)


def _of_array(path: Path, name: str) -> ImageFile:
    shape, dtype = _array_header(path, "image")
    if len(shape) not in (2, 3) or 0 in shape or dtype.kind not in "biuf":
        raise ValueError(f"shape {shape} and type {dtype}; an image is (H, W) or (H, W, channels) real numbers")
    mode = "F" if dtype.kind == "f" else dtype.name
    bits = 1 if dtype.kind == "b" else 8 * dtype.itemsize
    channels = shape[2] if len(shape) == 3 else 1
    return ImageFile(name, (shape[0], shape[1]), mode, path.suffix[1:].upper(), channels, bits)


def _array_header(path: Path, key: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array that `load_array` would read."""
    if path.suffix.lower() == ".npy":
        with path.open("rb") as file:
            return _npy_header(file)
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        chosen = key if key in names or len(names) != 1 else names[0]
        if chosen not in names:
            shown = ", ".join(names) or "none"
            raise ValueError(f"holds the arrays {shown}; one must be called {key}, or be the only one")
        with archive.open(f"{chosen}.npy") as member:
            return _npy_header(member)


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype
