"""Parts of an image too large to hold: tiles and strips of a TIFF are decoded only where a region touches them.

Shapes    H W pixels, C channels, h w a region.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import Size, UserError
from segvit.data.arrays import Levels, eight_bits, fit_channels
from segvit.data.decode import read_image

TIFF_SUFFIXES = (".tif", ".tiff", ".btf")
HELD = 192 << 20  # bytes of decoded tiles kept: at least two rows of 256-pixel tiles of an RGB image 100,000 wide
LARGEST = 256 << 20  # bytes of one tile or strip; larger ones are whole images that were compressed in one piece
READABLE = ("MINISBLACK", "MINISWHITE", "RGB", "PALETTE")


class Regions(NamedTuple):
    """An image of which any part can be read."""

    size: Size
    read: Callable[[int, int, int, int], NDArray[np.uint8]]  # (top, bottom, left, right) -> (h, w, C)


@contextmanager
def open_regions(path: Path, *, channels: int = 3, levels: Levels | None = None) -> Iterator[Regions]:
    """Regions of an image file as `read_image` would give them; files other than TIFFs are decoded whole.

    Raises UserError for what cannot be read in parts, with the remedy.
    """
    if path.suffix.lower() not in TIFF_SUFFIXES:
        image = read_image(path, channels=channels, levels=levels)
        yield Regions(image.shape[:2], lambda top, bottom, left, right: image[top:bottom, left:right])
        return
    with closing(TiffTiles(path)) as tiles:
        tiles.check()

        def read(top: int, bottom: int, left: int, right: int) -> NDArray[np.uint8]:
            part = tiles.read(top, bottom, left, right)
            if channels in (1, 3):  # otherwise all samples are wanted, as in `read_image`
                part = tiles.without_extra(part)
            return fit_channels(eight_bits(part, str(path), levels), channels, str(path))

        yield Regions(tiles.size, read)


def tiff_size(path: Path) -> Size:
    """Height and width of the first page, also of a TIFF that cannot be read in parts.

    Raises UserError for what is no TIFF or damaged.
    """
    with closing(TiffTiles(path)) as tiles:
        return tiles.size


class TiffTiles:
    """The first page of a TIFF, read in parts if `check` allows it; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        try:
            import tifffile
        except ImportError:
            raise UserError(f"{path}: reading a TIFF in parts needs tifffile; pip install 'segvit[images]'") from None
        self.path, self.lock = path, threading.Lock()
        self.held: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self.bytes_held = 0
        try:
            self.handle = path.open("rb")  # ours, since the library leaves it open when it fails
        except OSError as error:
            raise UserError(f"{path}: cannot be opened ({error.strerror}); check the path and its rights") from None
        try:
            self.file = tifffile.TiffFile(self.handle, name=str(path))
            self.page = page = cast(Any, self.file.pages[0])  # a full page: the first one always is
            self.size: Size = (page.imagelength, page.imagewidth)
            self.tile: Size = (
                (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
            )
            self.across = -(-self.size[1] // self.tile[1])
            self.kind = page.photometric.name
            # Whether all pixels follow each other uncompressed, row by row.
            self.flat = bool(page.is_contiguous) and not page.is_tiled
            if min(*self.size, *self.tile, page.samplesperpixel) < 1:
                raise ValueError("a side of 0 pixels")
        except Exception as error:  # a damaged directory makes the library raise whatever it leads to
            self.handle.close()
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"{path}: cannot be read as a TIFF ({reason}); copy the file again") from None

    def close(self) -> None:
        """Let the file go."""
        self.file.close()
        self.handle.close()

    def check(self) -> None:
        """Raise UserError for kinds of TIFF that cannot be read in parts, or that would need turning."""
        page, path = self.page, self.path
        if page.planarconfig != 1 and page.samplesperpixel > 1:
            raise UserError(f"{path}: each channel is a plane of its own; save it with interleaved channels")
        if self.kind not in READABLE:
            raise UserError(f"{path}: its colours are {self.kind}; save it as RGB or gray")
        turned = page.tags.get("Orientation")
        if turned is not None and turned.value != 1:
            raise UserError(f"{path}: is stored turned (orientation {turned.value}); save it upright")
        if page.dtype is None or (self.kind == "MINISWHITE" and page.dtype.kind not in "bu"):
            raise UserError(f"{path}: its pixels are of a kind that cannot be read; save it with 8 bits a channel")
        if 1 < page.bitspersample < 8 and self.kind != "PALETTE":
            raise UserError(f"{path}: has {page.bitspersample} bits a channel; save it with 8")
        size = self.tile[0] * self.tile[1] * page.samplesperpixel * page.dtype.itemsize
        if size > LARGEST and not page.is_contiguous:
            raise UserError(f"{path}: is compressed in one piece of {size >> 20} MB; save it in tiles of 512 x 512")

    def read(self, top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
        """Raw values (h, w) or (h, w, C) of a region inside the image; colours of a palette are looked up."""
        with self.lock:
            part = self.rows(top, bottom)[:, left:right] if self.flat else self.gather(top, bottom, left, right)
        if self.kind == "PALETTE":
            colors: NDArray[Any] = (self.page.colormap >> 8).astype(np.uint8).T[part[..., 0]]
            return colors
        return ~part if self.kind == "MINISWHITE" else part

    def without_extra(self, part: NDArray[Any]) -> NDArray[Any]:
        """The part without what Pillow drops too: any extra samples beside colours, alpha beside gray."""
        extra, rgb = len(self.page.extrasamples), self.kind == "RGB"
        colored = 3 if rgb else 1
        alpha = extra and part.shape[2] == colored + extra and (rgb or extra == 1)
        return part[..., :colored] if alpha else part

    def rows(self, top: int, bottom: int) -> NDArray[Any]:
        """Whole rows (h, W, C) of a flat file."""
        page = self.page
        row = self.size[1] * page.samplesperpixel
        handle, kind = self.file.filehandle, np.dtype(self.file.byteorder + page.dtype.char)
        handle.seek(page.dataoffsets[0] + top * row * kind.itemsize)
        data = handle.read((bottom - top) * row * kind.itemsize)
        if len(data) < (bottom - top) * row * kind.itemsize:
            raise UserError(f"{self.path}: the file is cut off; copy it again")
        values = np.frombuffer(data, kind).astype(page.dtype, copy=False)
        return values.reshape(bottom - top, self.size[1], page.samplesperpixel)

    def gather(self, top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
        """A region (h, w, C) put together from the tiles that it touches."""
        high, wide = self.tile
        out = np.empty((bottom - top, right - left, self.page.samplesperpixel), self.page.dtype)
        for row in range(top // high, -(-bottom // high)):
            for column in range(left // wide, -(-right // wide)):
                tile = self.decoded(row * self.across + column)
                y, x = row * high, column * wide
                inside = slice(max(top, y), min(bottom, y + high)), slice(max(left, x), min(right, x + wide))
                out[inside[0].start - top : inside[0].stop - top, inside[1].start - left : inside[1].stop - left] = (
                    tile[inside[0].start - y : inside[0].stop - y, inside[1].start - x : inside[1].stop - x]
                )
        return out

    def decoded(self, number: int) -> NDArray[Any]:
        """Tile or strip `number` as (h, w, C); those used last stay in memory."""
        if number in self.held:
            self.held.move_to_end(number)
            return self.held[number]
        page, handle = self.page, self.file.filehandle
        try:
            handle.seek(page.dataoffsets[number])
            data = handle.read(page.databytecounts[number])
            segment = page.decode(data, number, jpegtables=page.jpegtables)[0]
        except Exception as error:  # tifffile and its codecs raise whatever they like
            reason = str(error).partition("\n")[0]
            hint = "pip install imagecodecs" if "imagecodecs" in reason else "copy the file again"
            raise UserError(f"{self.path}: tile {number} cannot be decoded ({reason}); {hint}") from None
        if segment is None:  # left out by the writer: nothing but zeros
            segment = np.zeros((1, *self.tile, page.samplesperpixel), page.dtype)
        tile: NDArray[Any] = segment[0]
        self.held[number] = tile
        self.bytes_held += tile.nbytes
        while self.bytes_held > HELD and len(self.held) > 1:
            self.bytes_held -= self.held.popitem(last=False)[1].nbytes
        return tile
