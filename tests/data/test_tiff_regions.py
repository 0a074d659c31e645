"""Any part of a TIFF, whatever its tiles, strips, byte order and colours: the values that reading it whole gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from segvit.contracts import UserError
from segvit.data import tiff_regions
from segvit.data.decode import read_image
from segvit.data.tiff_regions import TiffTiles, open_regions

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
