"""Run-length codes of binary masks: COCO's counts and their text form, CVAT's, and Label Studio's brush bytes.

A mask as counts is the lengths of its runs, the first one (possibly 0) of pixels that are out: COCO walks down the
columns of the image, CVAT along the rows of the shape's box.

Sources   COCO       the data format page and the comments of its mask API.
          CVAT       "XML annotation format", version 1.1.
          brush      the packed form of the thi.ng/umbrella `rle-pack` package, over the RGBA bytes of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import Size, UserError

Pixels = NDArray[np.bool_]  # (H, W)


def decode_counts(counts: Any, size: Size, where: str, *, by_columns: bool) -> Pixels:
    """The mask (H, W) of a list of run lengths; UserError naming `where` when they do not fill it exactly."""
    height, width = size
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise UserError(f"{where}: the RLE counts are no list of whole numbers from 0 up; export again")
    if sum(counts) != height * width:
        raise UserError(
            f"{where}: the RLE covers {sum(counts)} pixels but {width}x{height} are {height * width}; export again"
        )
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape(width, height).T if by_columns else flat.reshape(height, width)


def parse_coco_text(text: str, where: str) -> list[int]:
    """The counts in COCO's text: 5 bits a character, low bits first; UserError naming `where` for any other text.

    The fourth and later ones are written as the difference to the last but one.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise UserError(f"{where}: {character!r} cannot stand in a compressed RLE; export again")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more characters follow
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise UserError(f"{where}: the compressed RLE breaks off; export again")
    return counts


def decode_brush(code: Sequence[int], size: Size, where: str) -> Pixels:
    """The mask (H, W) of a Label Studio brush: the pixels that its RGBA image covers at least half (alpha >= 128).

    The code is a stream of bits: 32 bits for the number of values, 5 for the bits of a value - 1, 4 times 4 for the
    four widths that a length may have - 1; then packets of 1 bit (one value repeated, or each value given), 2 bits
    (which width), the length - 1 in that width, and the value or values.
    """
    try:
        data = bytes(code)
    except (TypeError, ValueError):
        raise UserError(f"{where}: the brush RLE is no list of bytes; export again") from None
    bits = _Bits(data + bytes(8), len(data) * 8, where)
    total, width = bits.read(32), bits.read(5) + 1
    if total != size[0] * size[1] * 4 or width != 8:
        raise UserError(
            f"{where}: the brush RLE holds {total} values of {width} bits but the RGBA image of "
            f"{size[1]}x{size[0]} has {size[0] * size[1] * 4} of 8; export again"
        )
    lengths = [bits.read(4) + 1 for _ in range(4)]
    values = np.empty(total, np.uint8)
    at = 0
    while at < total:
        repeated = bits.read(1)
        end = at + bits.read(lengths[bits.read(2)]) + 1
        if end > total:
            raise UserError(f"{where}: the brush RLE runs past its {total} values; export again")
        values[at:end] = bits.read(8) if repeated else bits.read_bytes(end - at)
        at = end
    return values.reshape(*size, 4)[..., 3] >= 128


class _Bits:
    """Reads numbers from a stream of bits, the highest bit first."""

    def __init__(self, data: bytes, end: int, where: str) -> None:
        self.data, self.end, self.where = data, end, where  # at least 8 bytes follow the last bit
        self.at = 0

    def read(self, count: int) -> int:
        """The number in the next `count` <= 32 bits."""
        start = self._advance(count)
        window = int.from_bytes(self.data[start // 8 : start // 8 + 5], "big")
        return window >> (40 - start % 8 - count) & (1 << count) - 1

    def read_bytes(self, count: int) -> NDArray[np.uint8]:
        """The next `count` bytes, which may begin within a byte of the stream."""
        start = self._advance(8 * count)
        held = np.frombuffer(self.data, np.uint8, count + 1, start // 8)
        return np.packbits(np.unpackbits(held)[start % 8 : start % 8 + 8 * count])

    def _advance(self, count: int) -> int:
        start, self.at = self.at, self.at + count
        if self.at > self.end:
            raise UserError(f"{self.where}: the brush RLE breaks off; export again")
        return start
