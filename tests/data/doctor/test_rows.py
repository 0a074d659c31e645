"""Palette PNGs counted from their rows: the same numbers as the picture has, or none at all."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from segvit.data.doctor.masks import look_at_mask
from segvit.data.doctor.rows import count_rows


def encoded(ids, **options):
    picture = Image.fromarray(ids)
    picture.putpalette(np.arange(768, dtype=np.uint16).astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", bits=8, **options)
    return buffer.getvalue()


def counted(data):
    return count_rows(Image.open(io.BytesIO(data)), data)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 5), (64, 61), (200, 300)])
def test_counts_are_those_of_the_pixels(size):
    ids = np.random.default_rng(sum(size)).integers(0, 256, size, dtype=np.uint8)
    assert counted(encoded(ids)).tolist() == np.bincount(ids.ravel(), minlength=256).tolist()
    assert counted(encoded(ids * 0)).tolist() == [ids.size] + [0] * 255


def test_the_record_is_the_one_of_the_picture(tmp_path):
    ids = np.random.default_rng(0).integers(0, 9, (30, 40), dtype=np.uint8)
    for options in ({}, {"transparency": bytes(9)}, {"optimize": True}):
        data = encoded(ids, **options)
        picture = Image.open(io.BytesIO(data))
        mask = look_at_mask(tmp_path / "a.png", data)
        assert (mask.mode, mask.format, mask.size, mask.error) == ("P", "PNG", (30, 40), "")
        assert mask.values == dict(enumerate(np.bincount(ids.ravel()).tolist()))
        colors = np.reshape(picture.getpalette(), (-1, 3))
        assert mask.palette == {value: tuple(colors[value].tolist()) for value in range(9)}


def with_rows(data, change):
    """The same file with other packed rows; Pillow does not mind the wrong checksum."""
    start = data.index(b"IDAT") - 4
    length = int.from_bytes(data[start : start + 4], "big")
    packed = change(data[start + 8 : start + 8 + length])
    return data[:start] + len(packed).to_bytes(4, "big") + b"IDAT" + packed + b"\0\0\0\0" + data[start + 12 + length :]


def test_filtered_rows_are_left_to_pillow(tmp_path):
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)

    def filtered(packed):
        rows = bytearray(zlib.decompress(packed))
        rows[5] = 2  # the second row is stored as its difference to the first
        return zlib.compress(bytes(rows))

    data = with_rows(encoded(ids), filtered)
    assert counted(data) is None
    expected = ids.copy()
    expected[1] += ids[0]
    mask = look_at_mask(tmp_path / "a.png", data)
    assert np.array_equal(np.repeat(list(mask.values), list(mask.values.values())), np.sort(expected.ravel()))


def test_everything_unusual_is_left_to_pillow(tmp_path):
    ids = np.random.default_rng(0).integers(0, 9, (30, 40), dtype=np.uint8)
    whole = encoded(ids)
    for data in (
        whole[: len(whole) // 2],
        with_rows(whole, lambda packed: packed[:-10]),
        with_rows(whole, lambda packed: zlib.compress(zlib.decompress(packed)[:-1])),
        with_rows(whole, lambda packed: zlib.compress(zlib.decompress(packed) + b"\0")),
        whole[:28] + b"\1" + whole[29:],
    ):
        try:
            picture = Image.open(io.BytesIO(data))
        except OSError:
            continue
        assert count_rows(picture, data) is None
    gray = io.BytesIO()
    Image.fromarray(ids).save(gray, "PNG")
    assert counted(gray.getvalue()) is None
    few = io.BytesIO()
    picture = Image.fromarray(ids)
    picture.putpalette(range(27))
    picture.save(few, "PNG")  # 4 bits a pixel
    assert counted(few.getvalue()) is None
    assert look_at_mask(tmp_path / "a.png", few.getvalue()).distinct == 9
