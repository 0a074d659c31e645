"""Any part of a TIFF, whatever its tiles, strips, byte order and colours: the values that reading it whole gives."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from segvit.contracts import UserError
from segvit.data import tiff_regions
from segvit.data.decode import read_image
from segvit.data.tiff_regions import TiffTiles, open_regions, tiff_size

BOXES = [(0, 117, 0, 133), (13, 100, 20, 133), (100, 117, 0, 5), (32, 64, 48, 96)]
LAYOUTS = [
    {"tile": (32, 48), "compression": "zlib"}, {"tile": (32, 48), "compression": "zlib", "predictor": True},
    {"rowsperstrip": 17, "compression": "zlib"}, {"rowsperstrip": 17}, {}, {"tile": (16, 16)},
    {"bigtiff": True, "byteorder": ">", "tile": (32, 48)},
]  # fmt: skip


def drawn(shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def part(path: Path, *box: int) -> np.ndarray:
    with open_regions(path) as regions:
        return regions.read(*box)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_regions_are_parts_of_the_image(tmp_path: Path, layout: dict) -> None:
    pixels = drawn((117, 133, 3))
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", **layout)
    with open_regions(path) as regions:
        assert regions.size == (117, 133)
        for top, bottom, left, right in BOXES:
            np.testing.assert_array_equal(regions.read(top, bottom, left, right), pixels[top:bottom, left:right])


@pytest.mark.parametrize("layout", [{"tile": (32, 48)}, {"byteorder": ">"}], ids=["tiled", "flat big-endian"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_of_8_and_16_bits_is_what_reading_whole_gives(tmp_path: Path, layout: dict, dtype: type) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, drawn((117, 133), dtype), photometric="minisblack", **layout)
    np.testing.assert_array_equal(part(path, 5, 60, 7, 90), read_image(path)[5:60, 7:90])


def test_palette_inverted_gray_and_alpha_are_what_reading_whole_gives(tmp_path: Path) -> None:
    colors = drawn((3, 256), np.uint16)
    tifffile.imwrite(tmp_path / "p.tif", drawn((60, 70)), photometric="palette", colormap=colors, tile=(32, 32))
    tifffile.imwrite(tmp_path / "w.tif", drawn((60, 70)), photometric="miniswhite", tile=(32, 32))
    rgba = drawn((60, 70, 4))
    tifffile.imwrite(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["unassalpha"], tile=(32, 32))
    for name in ("p", "w", "a"):
        path = tmp_path / f"{name}.tif"
        np.testing.assert_array_equal(part(path, 3, 50, 9, 66), read_image(path)[3:50, 9:66])


@pytest.mark.parametrize("layout", [{"tile": (32, 32)}, {"compression": "zlib"}, {}], ids=str)
@pytest.mark.parametrize(
    ("samples", "photometric", "channels"),
    [(5, "minisblack", 5), (4, "rgb", 4), (4, "rgb", 3), (4, "rgb", 1), (2, "minisblack", 2), (2, "minisblack", 3)],
)
def test_as_many_samples_as_the_model_wants(
    tmp_path: Path, layout: dict, samples: int, photometric: str, channels: int
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, drawn((60, 70, samples)), photometric=photometric, planarconfig="contig", **layout)
    with open_regions(path, channels=channels) as regions:
        np.testing.assert_array_equal(regions.read(3, 50, 9, 66), read_image(path, channels=channels)[3:50, 9:66])


def test_bands_are_not_taken_for_gray(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", drawn((60, 70, 5)), photometric="minisblack", planarconfig="contig")
    with pytest.raises(UserError, match="5 channels but 3 are wanted"):
        part(tmp_path / "a.tif", 3, 50, 9, 66)


@pytest.mark.parametrize("photometric", ["miniswhite", "minisblack"])
def test_one_bit_is_what_reading_whole_gives(tmp_path: Path, photometric: str) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, drawn((60, 70)) > 99, photometric=photometric)
    np.testing.assert_array_equal(part(path, 3, 50, 9, 66), read_image(path)[3:50, 9:66])


def test_other_images_are_decoded_whole(tmp_path: Path) -> None:
    pixels = drawn((20, 30, 3))
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(part(tmp_path / "a.png", 2, 9, 3, 20), pixels[2:9, 3:20])


def test_few_tiles_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiff_regions, "HELD", 4 * 32 * 32 * 3)
    tifffile.imwrite(tmp_path / "a.tif", drawn((320, 320, 3)), photometric="rgb", tile=(32, 32), compression="zlib")
    tiles = TiffTiles(tmp_path / "a.tif")
    tiles.read(0, 320, 0, 320)
    tiles.close()
    assert len(tiles.held) == 4
    assert tiles.bytes_held == 4 * 32 * 32 * 3


def test_what_cannot_be_read_in_parts_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, drawn((3, 40, 50)), photometric="rgb", planarconfig="separate")
    with pytest.raises(UserError, match="interleaved channels"):
        part(path, 0, 1, 0, 1)
    tifffile.imwrite(path, drawn((40, 50, 3)), photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    with pytest.raises(UserError, match="stored turned"):
        part(path, 0, 1, 0, 1)
    path.write_bytes(b"II*\0 no tiff")
    with pytest.raises(UserError, match="cannot be read as a TIFF"):
        part(path, 0, 1, 0, 1)
    monkeypatch.setattr(tiff_regions, "LARGEST", 1000)
    tifffile.imwrite(path, drawn((40, 50, 3)), photometric="rgb", rowsperstrip=40, compression="zlib")
    with pytest.raises(UserError, match="save it in tiles of 512 x 512"):
        part(path, 0, 1, 0, 1)


def directory(path: Path) -> dict[int, int]:
    """Where the entry of each tag of a little-endian TIFF lies."""
    content = path.read_bytes()
    (first,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, first)
    places = [first + 2 + 12 * number for number in range(count)]
    return {struct.unpack_from("<H", content, place)[0]: place for place in places}


@pytest.mark.parametrize(
    ("tag", "kind", "count", "value"),
    [
        (322, 4, 1, 0),
        (256, 2, 1, 0),
        (258, 3, 0, 0),
        (259, 3, 1, 7777),
        (324, 4, 1 << 30, 8),
        (277, 3, 1, 0),
        (262, 3, 1, 999),
    ],
    ids=["tile width", "width", "bits", "compression", "offsets", "samples", "colours"],
)
def test_a_damaged_directory_is_one_line(tmp_path: Path, tag: int, kind: int, count: int, value: int) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, drawn((64, 64, 3)), photometric="rgb", tile=(32, 32), compression="zlib")
    content = bytearray(path.read_bytes())
    struct.pack_into("<HHII", content, directory(path)[tag], tag, kind, count, value)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tif"):  # a file left open would be a warning, so an error
        part(path, 0, 64, 0, 64)


def test_the_size_of_what_cannot_be_read_in_parts(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", drawn((3, 40, 50)), photometric="rgb", planarconfig="separate")
    assert tiff_size(tmp_path / "a.tif") == (40, 50)
    with pytest.raises(UserError, match="cannot be opened"):
        tiff_size(tmp_path / "b.tif")


def test_few_bits_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", drawn((40, 50)), photometric="minisblack")
    content = bytearray((tmp_path / "a.tif").read_bytes())
    struct.pack_into("<HHIHH", content, directory(tmp_path / "a.tif")[258], 258, 3, 1, 4, 0)
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(UserError, match="4 bits a channel"):
        part(tmp_path / "a.tif", 0, 1, 0, 1)


def test_a_broken_tile_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, drawn((64, 64, 3)), photometric="rgb", tile=(32, 32), compression="zlib")
    with tifffile.TiffFile(path) as file:
        place = file.pages[0].dataoffsets[3]
    content = bytearray(path.read_bytes())
    content[place : place + 20] = bytes(20)
    path.write_bytes(content)
    part(path, 0, 32, 0, 64)
    with pytest.raises(UserError, match="tile 3 cannot be decoded"):
        part(path, 32, 64, 32, 64)


def test_a_file_that_is_cut_off_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, drawn((64, 64, 3)), photometric="rgb")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="cut off"):
        part(path, 0, 64, 0, 64)
