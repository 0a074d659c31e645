"""Reading image and mask files, good and bad."""

import io

import numpy as np
import pytest
from PIL import Image

from segvit.contracts import UserError
from segvit.data.decode import LabelRule, read, read_image, read_mask
from tests.data.folders import save

NUMBERS = LabelRule.of_numbers({0: 0, 7: 1, 8: 1, 300: 2}, 255)
COLORS = LabelRule.of_colors({(0, 0, 0): 0, (128, 64, 128): 1, (255, 255, 255): 255}, 255)
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


def test_broken_files_are_named(tmp_path):
    whole = save(tmp_path / "whole.png", IMAGE.repeat(20, 0)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.png", "text.jpg", "empty.png"):
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
    with pytest.raises(UserError, match="floating point"):
        read_image(tmp_path / "a.tif")


def test_sizes_must_agree(tmp_path):
    image, mask = save(tmp_path / "a.png", IMAGE), save(tmp_path / "m.png", np.zeros((6, 4), np.uint8))
    with pytest.raises(UserError, match=r"a\.png is 5x6 pixels but its mask .*m\.png is 4x6"):
        read(image, mask, NUMBERS)
    assert read(image, save(mask, np.zeros((6, 5), np.uint8)), NUMBERS, "a").name == "a"
