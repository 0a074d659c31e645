"""Headers of image files: as training sees them, without decoding a pixel."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from segvit.data.decode import read_image
from segvit.data.doctor.images import look_at_image

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)
GRAY = PIXELS[..., 0]


@pytest.fixture
def undecoded(monkeypatch):
    """Fail where pixels are decoded."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))


def sideways(number=6):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def assert_seen(path, **expected):
    image = look_at_image(path, "name")
    assert (image.path, image.error) == ("name", "")
    assert {key: getattr(image, key) for key in expected} == expected
    return image


@pytest.mark.parametrize(
    ("name", "picture", "mode", "channels", "bits"),
    [
        ("a.jpg", Image.fromarray(PIXELS), "RGB", 3, 8),
        ("a.png", Image.fromarray(PIXELS), "RGB", 3, 8),
        ("a.png", Image.fromarray(np.dstack([PIXELS, GRAY])), "RGBA", 4, 8),
        ("a.webp", Image.fromarray(PIXELS), "RGB", 3, 8),
        ("a.bmp", Image.fromarray(PIXELS), "RGB", 3, 8),
        ("a.png", Image.fromarray(GRAY), "L", 1, 8),
        ("a.png", Image.fromarray(GRAY > 9), "1", 1, 1),
        ("a.tif", Image.fromarray(GRAY > 9), "1", 1, 1),
        ("a.tif", Image.fromarray(PIXELS), "RGB", 3, 8),
        ("a.tif", Image.fromarray(GRAY.astype(np.uint16)), "I;16", 1, 16),
        ("a.tif", Image.fromarray(GRAY.astype(np.int32)), "I", 1, 32),
        ("a.tif", Image.fromarray(GRAY.astype(np.float32)), "F", 1, 32),
    ],
)
def test_kinds(tmp_path, undecoded, name, picture, mode, channels, bits):
    picture.save(tmp_path / name)
    kinds = {"jpg": "JPEG", "tif": "TIFF"}
    suffix = name[2:]
    assert_seen(
        tmp_path / name, size=(12, 17), mode=mode, channels=channels, bits=bits, turned=False, hash=None,
        format=kinds.get(suffix, suffix.upper()),
    )  # fmt: skip


def test_16_bit_pngs(tmp_path):
    Image.fromarray(GRAY.astype(np.uint16)).save(tmp_path / "gray.png")
    assert_seen(tmp_path / "gray.png", channels=1, bits=16)
    # Pillow writes no colours of 16 bits: the header of this file alone is right.
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[24] = 16
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    assert_seen(tmp_path / "a.png", size=(12, 17), channels=3, bits=16)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize(("number", "turned"), [(1, False), (3, False), (6, True), (8, True)])
def test_an_exif_turn_exchanges_height_and_width(tmp_path, undecoded, name, number, turned):
    Image.fromarray(PIXELS).save(tmp_path / name, exif=sideways(number))
    assert_seen(tmp_path / name, size=(17, 12) if turned else (12, 17), turned=turned)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_sizes_are_those_that_training_reads(tmp_path, name):
    Image.fromarray(PIXELS).save(tmp_path / name, exif=sideways())
    assert_seen(tmp_path / name, size=read_image(tmp_path / name).shape[:2])


def test_the_exif_tag_may_follow_the_pixels(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=sideways())
    data = (tmp_path / "a.png").read_bytes()
    start = data.index(b"eXIf") - 4
    length = 12 + struct.unpack(">I", data[start : start + 4])[0]
    end = data.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(
        data[:start] + data[start + length : end] + data[start : start + length] + data[end:]
    )
    assert read_image(tmp_path / "a.png").shape == (17, 12, 3)
    assert_seen(tmp_path / "a.png", size=(17, 12), turned=True)


@pytest.mark.parametrize(("kind", "bits"), [(np.uint8, 8), (np.uint16, 16), (np.float32, 32)])
def test_tiffs_of_many_channels(tmp_path, kind, bits):
    tifffile = pytest.importorskip("tifffile")
    for planar in ("contig", "separate"):
        pixels = np.zeros((12, 17, 6) if planar == "contig" else (6, 12, 17), kind)
        tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", planarconfig=planar)
        assert_seen(tmp_path / "a.tif", size=(12, 17), channels=6, bits=bits, format="TIFF")


@pytest.mark.parametrize(
    ("array", "mode", "channels", "bits"),
    [
        (GRAY, "uint8", 1, 8),
        (PIXELS, "uint8", 3, 8),
        (np.zeros((12, 17, 5), np.uint16), "uint16", 5, 16),
        (np.zeros((12, 17, 2), np.float32), "F", 2, 32),
        (GRAY > 9, "bool", 1, 1),
    ],
)
def test_arrays(tmp_path, array, mode, channels, bits):
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", array)
    np.savez_compressed(tmp_path / "b.npz", image=array, label=np.zeros(3))
    for name in ("a.npy", "a.npz", "b.npz"):
        assert_seen(tmp_path / name, size=(12, 17), mode=mode, channels=channels, bits=bits, format=name[2:].upper())


def test_unusable_files_say_why(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "a.tif").write_bytes(b"II*\0\x08\0\0\0")
    (tmp_path / "folder.png").mkdir()
    np.savez(tmp_path / "two.npz", a=GRAY, b=GRAY)
    np.save(tmp_path / "flat.npy", np.zeros(3))
    np.save(tmp_path / "text.npy", np.array([["a"]]))
    for name, error in {
        "none.jpg": "No such file", "empty.jpg": "the file is empty", "text.jpg": "unknown or damaged format",
        "a.tif": "", "folder.png": "directory", "two.npz": "holds the arrays a, b; one must be called image",
        "flat.npy": "shape (3,) and type float64", "text.npy": "shape (1, 1) and type <U1",
    }.items():  # fmt: skip
        image = look_at_image(tmp_path / name, name)
        assert image.error
        assert error in image.error
        assert (image.path, image.size) == (name, None)
