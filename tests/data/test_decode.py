"""Reading image and mask files, good and bad, of any number of channels and range of levels."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from segvit.contracts import UserError
from segvit.data.decode import LabelRule, read, read_image, read_mask
from tests.data.folders import save

NUMBERS = LabelRule.of_numbers({0: 0, 7: 1, 8: 1, 300: 2}, 255)
COLORS = LabelRule.of_colors({(0, 0, 0): 0, (128, 64, 128): 1, (255, 255, 255): 255}, 255)
NEAREST = LabelRule.of_numbers({0: 0, 100: 1, 255: 2}, 255, nearest=True)
IMAGE = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_colour_images_come_back_as_saved(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(IMAGE).save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(read_image(path), IMAGE)
    assert np.array_equal(read_image(io.BytesIO(path.read_bytes())), IMAGE)


def test_gray_alpha_and_16_bit_become_rgb(tmp_path):
    gray = IMAGE[..., 0]
    assert np.array_equal(read_image(save(tmp_path / "gray.png", gray)), np.repeat(gray[..., None], 3, 2))
    alpha = np.dstack([IMAGE, np.full((6, 5), 9, np.uint8)])
    assert np.array_equal(read_image(save(tmp_path / "alpha.png", alpha)), IMAGE)
    deep = gray.astype(np.uint16) * 257
    assert np.array_equal(read_image(save(tmp_path / "deep.png", deep))[..., 1], gray)


def test_palette_images_keep_their_colours(tmp_path):
    picture = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.save(tmp_path / "a.png", transparency=b"\x00\x80")
    assert read_image(tmp_path / "a.png").tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_exif_turns_the_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    Image.fromarray(IMAGE).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.rot90(IMAGE, -1))


def test_other_numbers_of_channels(tmp_path):
    gray = save(tmp_path / "gray.png", IMAGE[..., 0])
    assert np.array_equal(read_image(gray, channels=1), IMAGE[..., :1])
    luminance = read_image(save(tmp_path / "color.png", IMAGE), channels=1)
    assert np.abs(luminance[..., 0] - IMAGE @ [0.299, 0.587, 0.114]).max() <= 0.51
    four = np.dstack([IMAGE, IMAGE[..., 0]])
    assert np.array_equal(read_image(save(tmp_path / "four.png", four), channels=4), four)
    cmyk = tmp_path / "cmyk.tif"
    Image.fromarray(four, "CMYK").save(cmyk)
    assert np.array_equal(read_image(cmyk, channels=4), four)
    with pytest.raises(UserError, match=r"color\.png: the pixels have 3 channels but 4 are wanted; set channels: 3"):
        read_image(tmp_path / "color.png", channels=4)


def test_levels_map_to_eight_bits(tmp_path):
    deep = save(tmp_path / "deep.png", np.array([[0, 1000, 2000, 6000, 9999, 30000]], np.uint16))
    assert read_image(deep, channels=1, levels=(1000, 9160))[0, :, 0].tolist() == [0, 0, 31, 156, 255, 255]
    assert read_image(deep)[0, :, 0].tolist() == [0, 4, 8, 23, 39, 117]
    eight = save(tmp_path / "eight.png", np.array([[0, 10, 11, 20, 21]], np.uint8))
    assert read_image(eight, levels=(10, 20))[0, :, 1].tolist() == [0, 0, 26, 255, 255]
    real = save(tmp_path / "real.tif", np.array([[-1, 0, 0.5, 1]], np.float32))
    assert read_image(real, levels=(0, 1))[0, :, 2].tolist() == [0, 0, 128, 255]
    with pytest.raises(UserError, match=r"real\.tif: pixels are of type float32; set range: \[LOWEST, HIGHEST\]"):
        read_image(real)


def test_arrays_are_images_and_masks(tmp_path):
    np.save(tmp_path / "a.npy", np.dstack([IMAGE, IMAGE]))
    assert np.array_equal(read_image(tmp_path / "a.npy", channels=6), np.dstack([IMAGE, IMAGE]))
    both = tmp_path / "both.npz"
    np.savez(both, image=np.array([[0, 0.25, 1]], np.float32), label=np.array([[0, 7, 255]], np.float32))
    assert read_image(both, levels=(0, 1))[0].tolist() == [[0] * 3, [64] * 3, [255] * 3]
    assert read_mask(both, NUMBERS).tolist() == [[0, 1, 255]]
    np.savez(tmp_path / "colors.npz", np.array([[[128, 64, 128]]], np.uint8))
    assert read_mask(tmp_path / "colors.npz", COLORS).tolist() == [[1]]
    for raw, message in (
        (np.array([[0.5]]), "not whole"),
        (np.array([[np.nan]]), "not whole"),
        (np.zeros((2, 2, 2), np.uint8), r"shape \(2, 2, 2\) and type uint8; save \(H, W\)"),
        (np.array([[-1]]), r"mask values span -1\.\.-1"),
    ):
        np.save(tmp_path / "m.npy", raw)
        with pytest.raises(UserError, match=message):
            read_mask(tmp_path / "m.npy", NUMBERS)


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiffs_of_many_samples(tmp_path, planar):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "a.tif"
    raw = np.random.default_rng(0).integers(0, 65536, (6, 5, 8), dtype=np.uint16)
    stored = raw if planar == "contig" else np.moveaxis(raw, -1, 0)
    tifffile.imwrite(path, stored, photometric="minisblack", planarconfig=planar)
    expected = np.floor(raw / 257 + 0.5).astype(np.uint8)
    assert np.array_equal(read_image(path, channels=8), expected)
    assert np.array_equal(read_image(io.BytesIO(path.read_bytes()), channels=8), expected)
    with pytest.raises(UserError, match="the pixels have 8 channels but 3 are wanted"):
        read_image(path)


def test_a_tiff_keeps_the_samples_and_bits_that_pillow_drops(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "a.tif"
    five = np.random.default_rng(0).integers(0, 256, (6, 5, 5), dtype=np.uint8)
    tifffile.imwrite(path, five, photometric="rgb", extrasamples=[0, 0])
    assert np.array_equal(read_image(path, channels=5), five)
    assert np.array_equal(read_image(path), five[..., :3])
    tifffile.imwrite(path, five[..., :3].astype(np.uint16), photometric="rgb")
    assert np.array_equal(read_image(path, levels=(0, 255)), five[..., :3])
    tifffile.imwrite(path, np.stack([five[..., 0], five[..., 1]]), photometric="minisblack")  # two pages
    assert np.array_equal(read_image(path, channels=1), five[..., :1])


def test_without_tifffile_the_message_says_what_to_install(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((6, 5, 8), np.uint8), photometric="minisblack", planarconfig="contig")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UserError, match=r"a\.tif: .* pip install segvit\[images\]"):
        read_image(tmp_path / "a.tif", channels=8)


def test_the_lost_bits_of_a_deep_colour_png_are_told(tmp_path):
    path = tmp_path / "deep.png"
    path.write_bytes(deep_color_png(IMAGE))
    assert np.array_equal(read_image(path), IMAGE)
    with pytest.raises(UserError, match=r"deep\.png: only 8 of the 16 bits .* save it as a TIFF"):
        read_image(path, levels=(0, 1000))


def deep_color_png(image):
    """A PNG with 16 bits a sample, which Pillow can read but not write."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    high, wide, _ = image.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image.astype(np.uint16) * 257)
    header = struct.pack(">IIBBBBB", wide, high, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_broken_files_are_named(tmp_path):
    whole = save(tmp_path / "whole.png", IMAGE.repeat(20, 0)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.tif").write_bytes(save(tmp_path / "whole.tif", IMAGE.repeat(20, 0)).read_bytes()[:1000])
    for name in ("cut.png", "text.jpg", "empty.png", "cut.tif"):
        with pytest.raises(UserError, match=f"{name}: cannot be read as an image") as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"none\.png: no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(UserError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(UserError, match="the given bytes: cannot be read"):
        read_image(io.BytesIO(b"no image"))


@pytest.mark.parametrize("limit", [20, 10])  # Pillow warns above its limit and raises above twice the limit
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, limit):
    path = save(tmp_path / "bomb.png", IMAGE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError, match=r"bomb\.png: too many pixels"):
        read_image(path)


def test_numbers_become_ids(tmp_path):
    raw = np.array([[0, 7, 8], [255, 0, 7]], np.uint8)
    ids = [[0, 1, 1], [255, 0, 1]]
    plain = read_mask(save(tmp_path / "a.png", raw), NUMBERS)
    assert plain.dtype == np.uint8
    assert plain.tolist() == ids
    assert read_mask(save(tmp_path / "rgb.png", np.dstack([raw] * 3)), NUMBERS).tolist() == ids
    indexed = Image.frombytes("P", (3, 2), raw.tobytes())
    indexed.putpalette([5] * 768)
    indexed.save(tmp_path / "palette.png")
    assert read_mask(tmp_path / "palette.png", NUMBERS).tolist() == ids
    deep = read_mask(save(tmp_path / "deep.png", raw.astype(np.uint16) + np.uint16(300) * (raw == 0)), NUMBERS)
    assert deep.tolist() == [[2, 1, 1], [255, 2, 1]]
    bits = read_mask(save(tmp_path / "bits.png", raw == 0), LabelRule.of_numbers({0: 0, 1: 1}, 255))
    assert bits.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_above_255_classes_masks_have_16_bits(tmp_path):
    rule = LabelRule.of_numbers({i: i for i in range(300)}, 65535)
    mask = read_mask(save(tmp_path / "a.png", np.array([[299, 65535]], np.uint16)), rule)
    assert mask.dtype == np.uint16
    assert mask.tolist() == [[299, 65535]]


def test_a_class_may_own_the_value_255(tmp_path):
    rule = LabelRule.of_numbers({0: 0, 255: 1}, 255)
    assert read_mask(save(tmp_path / "a.png", np.array([[0, 255]], np.uint8)), rule).tolist() == [[0, 1]]


def test_colours_become_ids(tmp_path):
    raw = np.array([[[0, 0, 0], [128, 64, 128], [255, 255, 255]]], np.uint8)
    assert read_mask(save(tmp_path / "a.png", raw), COLORS).tolist() == [[0, 1, 255]]
    Image.fromarray(raw).quantize(3).save(tmp_path / "p.png")
    assert read_mask(tmp_path / "p.png", COLORS).tolist() == [[0, 1, 255]]
    raw[0, 0] = 1, 2, 3
    with pytest.raises(UserError, match=r"colours \[\(1, 2, 3\)\] are in no class; add them to values: or ignore:"):
        read_mask(save(tmp_path / "b.png", raw), COLORS)


def test_nearest_numbers(tmp_path):
    raw = np.array([[0, 50, 51, 100, 177, 178, 255]], np.uint8)
    assert read_mask(save(tmp_path / "a.png", raw), NEAREST).tolist() == [[0, 0, 1, 1, 1, 2, 2]]
    grey = np.zeros((16, 16), np.uint8)
    grey[:, 7:] = 255
    grey[4, 4] = 110
    for mode in ("L", "RGB"):
        Image.fromarray(grey).convert(mode).save(tmp_path / "a.jpg", quality=60)
        assert set(np.unique(np.array(Image.open(tmp_path / "a.jpg")))) - {0, 100, 255}
        assert (read_mask(tmp_path / "a.jpg", NEAREST) == np.digitize(grey, [50.5, 177.5])).all()
    deep = save(tmp_path / "deep.png", np.array([[0, 300, 65535]], np.uint16))
    assert read_mask(deep, NEAREST).tolist() == [[0, 2, 2]]


def test_nearest_takes_the_ignored_value_where_it_is_listed(tmp_path):
    path = save(tmp_path / "a.png", np.array([[0, 9, 120, 250, 255]], np.uint8))
    listed = LabelRule.of_numbers({0: 0, 10: 1, 255: 255}, 255, nearest=True)
    assert read_mask(path, listed).tolist() == [[0, 1, 1, 255, 255]]
    assert read_mask(path, LabelRule.of_numbers({0: 0, 10: 1}, 255, nearest=True)).tolist() == [[0, 1, 1, 1, 1]]


def test_nearest_colours(tmp_path):
    rule = LabelRule.of_colors({(0, 0, 0): 0, (128, 64, 128): 1, (255, 255, 255): 255, (2, 0, 0): 2}, 255, nearest=True)
    raw = np.array([[[1, 0, 0], [120, 70, 131], [255, 255, 255], [250, 255, 249], [3, 0, 0]]], np.uint8)
    assert read_mask(save(tmp_path / "a.png", raw), rule).tolist() == [[0, 1, 255, 255, 2]]  # a tie: the lower code
    big = np.zeros((32, 32, 3), np.uint8)
    big[:, 16:] = 128, 64, 128
    Image.fromarray(big).save(tmp_path / "a.jpg", quality=95)
    two = LabelRule.of_colors({(0, 0, 0): 0, (128, 64, 128): 1}, 255, nearest=True)
    assert len(np.unique(np.array(Image.open(tmp_path / "a.jpg")).reshape(-1, 3), axis=0)) > 2
    assert (read_mask(tmp_path / "a.jpg", two) == (big[..., 0] > 0)).all()


def test_unknown_ids_are_listed(tmp_path):
    path = save(tmp_path / "a.png", np.array([[0, 3, 9]], np.uint8))
    with pytest.raises(UserError, match=r"a\.png: ids \[3, 9\] are in no class; add them to values: or ignore:"):
        read_mask(path, NUMBERS)
    path = save(tmp_path / "b.png", np.arange(9, 60, dtype=np.uint8)[None])
    with pytest.raises(UserError, match=r"18, \.\.\. 51 in all\]"):
        read_mask(path, NUMBERS)


def test_masks_that_cannot_be_masks_are_refused(tmp_path):
    with pytest.raises(UserError, match="JPEG changes pixel values"):
        read_mask(save(tmp_path / "a.jpg", IMAGE), NUMBERS)
    with pytest.raises(UserError, match="painted in colours but the classes are given as numbers"):
        read_mask(save(tmp_path / "a.png", IMAGE), NUMBERS)
    with pytest.raises(UserError, match="pixels of kind F"):
        read_mask(save(tmp_path / "a.tif", np.zeros((2, 2), np.float32)), NUMBERS)


def test_sizes_must_agree(tmp_path):
    image, mask = save(tmp_path / "a.png", IMAGE), save(tmp_path / "m.png", np.zeros((6, 4), np.uint8))
    with pytest.raises(UserError, match=r"a\.png is 5x6 pixels but its mask .*m\.png is 4x6"):
        read(image, mask, NUMBERS)
    assert read(image, save(mask, np.zeros((6, 5), np.uint8)), NUMBERS, "a").name == "a"
