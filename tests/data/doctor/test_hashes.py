"""Perceptual hashes: copies stay near, other images far, and pictures of nothing have none."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from segvit.data.doctor import hashes
from segvit.data.doctor.hashes import NEAR, hash_of, near_duplicates


def scene(seed, size=(240, 320)):
    """Smooth random light with some hard-edged things in it."""
    rng = np.random.default_rng(seed)
    field = rng.uniform(20, 200, (5, 6, 3)).astype(np.uint8)
    picture = np.array(Image.fromarray(field).resize(size[::-1], Image.Resampling.BICUBIC))
    for _ in range(8):
        top, left = rng.integers(0, size[0] - 20), rng.integers(0, size[1] - 20)
        picture[top : top + rng.integers(10, 90), left : left + rng.integers(10, 90)] = rng.integers(0, 220, 3)
    return Image.fromarray(picture)


def encoded(picture, name="a.png", **options):
    buffer = io.BytesIO()
    picture.save(buffer, {"png": "PNG", "jpg": "JPEG", "tif": "TIFF"}[name[2:]], **options)
    return buffer.getvalue()


def hash_picture(tmp_path, picture, name="a.png", **options):
    return hash_of(tmp_path / name, encoded(picture, name, **options))


def bits(one, two):
    return (one ^ two).bit_count()


@pytest.mark.parametrize(
    ("copy", "options"),
    [
        (lambda picture: picture, {"quality": 60}),
        (lambda picture: picture, {"quality": 20}),
        (lambda picture: picture.resize((160, 120), Image.Resampling.BICUBIC), {"quality": 85}),
        (lambda picture: picture.resize((801, 533), Image.Resampling.BILINEAR), {"quality": 85}),
        (lambda picture: ImageEnhance.Brightness(picture).enhance(1.1), {"quality": 90}),
        (lambda picture: ImageEnhance.Contrast(picture).enhance(0.8), {"quality": 90}),
        (lambda picture: picture.convert("L"), {"quality": 90}),
    ],
    ids=["q60", "q20", "half", "large", "bright", "contrast", "gray"],
)
def test_copies_are_near(tmp_path, copy, options):
    for seed in range(8):
        original = scene(seed)
        changed = hash_picture(tmp_path, copy(original), "a.jpg", **options)
        assert bits(hash_picture(tmp_path, original), changed) <= NEAR


def test_other_images_are_far(tmp_path):
    found = [hash_picture(tmp_path, scene(seed)) for seed in range(60)]
    distances = [bits(one, two) for i, one in enumerate(found) for two in found[:i]]
    assert min(distances) > 2 * NEAR
    assert 25 < np.mean(distances) < 38
    mirrored = hash_picture(tmp_path, scene(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert bits(found[0], mirrored) > 2 * NEAR


def test_kinds_of_files_agree(tmp_path):
    gray = np.array(scene(3).convert("L"))
    expected = hash_picture(tmp_path, Image.fromarray(gray))
    deep = Image.fromarray(gray.astype(np.uint16) * 16)  # 12 of the 16 bits are used
    palette = Image.fromarray(gray)
    palette.putpalette(np.repeat(np.arange(256), 3).astype(np.uint8).tobytes())
    for found in (
        hash_picture(tmp_path, deep),
        hash_picture(tmp_path, deep, "a.tif"),
        hash_picture(tmp_path, Image.fromarray(gray.astype(np.float32) / 255), "a.tif"),
        hash_picture(tmp_path, palette, transparency=bytes([255] * 256)),
    ):
        assert bits(found, expected) <= 1
    np.save(tmp_path / "a.npy", np.repeat(gray[..., None], 7, axis=2))
    np.savez(tmp_path / "a.npz", image=gray.astype(np.float64) - 100, label=gray)
    for name in ("a.npy", "a.npz"):
        assert bits(hash_of(tmp_path / name, b""), expected) <= 1


def test_tiffs_of_many_channels(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    gray = np.array(scene(3).convert("L"))
    pixels = np.repeat(gray[..., None], 6, axis=2)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", planarconfig="contig")
    expected = hash_picture(tmp_path, Image.fromarray(gray))
    assert bits(hash_of(tmp_path / "a.tif", (tmp_path / "a.tif").read_bytes()), expected) <= 1


def test_images_are_turned_upright_first(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = scene(5)
    upright = lying.transpose(Image.Transpose.ROTATE_270)
    for name in ("a.jpg", "a.png", "a.tif"):
        turned = hash_picture(tmp_path, lying, name, exif=exif)
        assert bits(turned, hash_picture(tmp_path, upright)) <= NEAR < bits(turned, hash_picture(tmp_path, lying))


def test_pictures_of_nothing_have_no_hash(tmp_path):
    noise = np.random.default_rng(0).integers(-2, 3, (200, 200, 3))
    for level in (0, 100, 250):
        for picture in (np.full((200, 200, 3), level), (level + noise).clip(0, 255)):
            assert hash_picture(tmp_path, Image.fromarray(picture.astype(np.uint8)), "a.jpg", quality=80) is None
    np.save(tmp_path / "a.npy", np.full((20, 20), np.nan))
    assert hash_of(tmp_path / "a.npy", b"") is None


def test_damaged_files_raise(tmp_path):
    whole = encoded(scene(0), "a.jpg")
    for data in (whole[: len(whole) // 2], b"", b"hello"):
        with pytest.raises(OSError):
            hash_of(tmp_path / "a.jpg", data)


@pytest.mark.parametrize("block", [1, 50, 1 << 22])
def test_search_finds_what_comparing_all_finds(monkeypatch, block):
    monkeypatch.setattr(hashes, "BLOCK", block)
    rng = np.random.default_rng(0)
    ours = [int(value) for value in rng.integers(0, 2**63, 40)]
    theirs = [int(value) for value in rng.integers(0, 2**63, 30)]
    for i, flips in ((3, 0), (17, 2), (17, 5), (39, 4)):
        theirs.append(ours[i] ^ sum(1 << int(bit) for bit in rng.choice(64, flips, replace=False)))
    ours[5] = theirs[2] = None
    pairs = ((i, j, bits(a, b)) for i, a in enumerate(ours) for j, b in enumerate(theirs) if None not in (a, b))
    everything = [found for found in pairs if found[2] <= 20]
    assert near_duplicates(ours, theirs, distance=20) == everything
    assert [found for found in everything if found[2] <= NEAR] == near_duplicates(ours, theirs)
    assert len(near_duplicates(ours, theirs)) == 3
    assert near_duplicates([], theirs) == near_duplicates(ours, [None]) == []
