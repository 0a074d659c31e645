"""Records of mask files: every kind that can hold a mask, and what cannot."""

import json

import numpy as np
import pytest
from PIL import Image

from segvit.data.doctor.masks import MAX_VALUES, from_json, look_at_mask, to_json

IDS = np.random.default_rng(0).integers(0, 7, (40, 31), dtype=np.uint8) * 3
COLORS = np.random.default_rng(1).integers(0, 256, (7, 3), dtype=np.uint8)[IDS // 3]


def record(path):
    mask = look_at_mask(path, path.read_bytes())
    assert from_json("a", json.loads(json.dumps(to_json(mask)))) == from_json("a", to_json(mask))
    return mask


def codes(colors):
    return colors.astype(np.int64) @ [65536, 256, 1]


def counts(values):
    return dict(zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True))


def palette_picture():
    picture = Image.fromarray(IDS)
    picture.putpalette(np.arange(3 * 19, dtype=np.uint8).tobytes())
    return picture


PICTURES = {
    "L.png": (Image.fromarray(IDS), IDS, False, "L"),
    "P.png": (palette_picture(), IDS, False, "P"),
    "1.png": (Image.fromarray(IDS > 9), IDS > 9, False, "1"),
    "LA.png": (Image.fromarray(np.dstack([IDS, IDS[::-1]]), "LA"), IDS, False, "LA"),
    "deep.png": (Image.fromarray(IDS.astype(np.uint16) * 1000), IDS.astype(np.int64) * 1000, False, "I"),
    "RGB.png": (Image.fromarray(COLORS), codes(COLORS), True, "RGB"),
    "gray.png": (Image.fromarray(np.repeat(IDS[..., None], 3, 2)), IDS, False, "RGB"),
    "RGBA.png": (Image.fromarray(np.dstack([COLORS, IDS])), codes(COLORS), True, "RGBA"),
    "L.bmp": (Image.fromarray(IDS), IDS, False, "L"),
    "P.tif": (palette_picture(), IDS, False, "P"),
    "deep.tif": (Image.fromarray(IDS.astype(np.uint16) * 1000), IDS.astype(np.int64) * 1000, False, "I"),
    "wide.tif": (Image.fromarray(IDS.astype(np.int32) * 100_000 - 5), IDS.astype(np.int64) * 100_000 - 5, False, "I"),
    "RGB.tiff": (Image.fromarray(COLORS), codes(COLORS), True, "RGB"),
}


@pytest.mark.filterwarnings("ignore:'mode' parameter:DeprecationWarning")
@pytest.mark.parametrize("name", PICTURES)
def test_values_are_those_of_the_pixels(tmp_path, name):
    picture, pixels, coloured, mode = PICTURES[name]
    picture.save(tmp_path / name)
    mask = record(tmp_path / name)
    assert (mask.error, mask.size, mask.coloured) == ("", (40, 31), coloured)
    assert mask.mode.startswith(mode)
    assert mask.format == {"p": "PNG", "b": "BMP", "t": "TIFF"}[name.split(".")[1][0]]
    assert mask.values == counts(pixels)
    assert list(mask.values) == sorted(mask.values)
    assert mask.distinct == len(mask.values)
    assert (mask.palette != {}) == (mode == "P")


def test_the_palette_of_what_occurs(tmp_path):
    palette_picture().save(tmp_path / "a.png")
    assert record(tmp_path / "a.png").palette == {
        value: (3 * value, 3 * value + 1, 3 * value + 2) for value in range(0, 19, 3)
    }
    picture = Image.fromarray(np.array([[0, 1, 200]], np.uint8))
    picture.putpalette(range(60))
    picture.save(tmp_path / "short.png")
    mask = record(tmp_path / "short.png")
    assert mask.values == {0: 1, 1: 1, 200: 1}
    assert mask.palette.items() >= {0: (0, 1, 2), 1: (3, 4, 5)}.items()


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
@pytest.mark.parametrize(
    ("pixels", "expected", "coloured"),
    [
        (IDS, IDS, False),
        (IDS[..., None], IDS, False),
        (IDS > 9, IDS > 9, False),
        (IDS.astype(np.float32), IDS, False),
        (IDS.astype(np.int64) - 4, IDS.astype(np.int64) - 4, False),
        (IDS.astype(np.uint64), IDS, False),
        (COLORS, codes(COLORS), True),
    ],
    ids=["uint8", "one_channel", "bool", "float", "negative", "uint64", "colours"],
)
def test_arrays(tmp_path, name, pixels, expected, coloured):
    (np.save if name == "a.npy" else np.savez)(tmp_path / name, pixels)
    mask = record(tmp_path / name)
    assert (mask.error, mask.size, mask.format) == ("", (40, 31), name[2:].upper())
    assert (mask.mode, mask.coloured) == (pixels.dtype.name, coloured)
    assert mask.values == counts(expected)


def test_jpegs_are_recorded_with_what_compression_made_of_them(tmp_path):
    Image.fromarray(np.kron(COLORS, np.ones((3, 3, 1), np.uint8))).save(tmp_path / "a.jpg", quality=50)
    mask = record(tmp_path / "a.jpg")
    assert (mask.format, mask.mode, mask.coloured, mask.error) == ("JPEG", "RGB", True, "")
    found = counts(codes(np.asarray(Image.open(tmp_path / "a.jpg"))))
    assert mask.distinct == len(found) > MAX_VALUES == len(mask.values)
    assert mask.values.items() <= found.items()
    assert min(mask.values.values()) >= sorted(found.values())[-MAX_VALUES]  # the most frequent ones


def test_many_numbers_are_cut_off_but_counted(tmp_path):
    values = np.arange(1000, dtype=np.uint16).reshape(40, 25)
    values[0] = 999
    Image.fromarray(values).save(tmp_path / "a.png")
    mask = record(tmp_path / "a.png")
    assert (len(mask.values), mask.distinct) == (MAX_VALUES, 975)
    assert mask.values[999] == 26
    assert list(mask.values)[:3] == [25, 26, 27]


def test_unusable_files_say_why(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90), dtype=np.uint8)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "bits.npz").write_bytes(b"PK\3\4 nothing")
    Image.fromarray(IDS.astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(IDS).convert("CMYK").save(tmp_path / "cmyk.tif")
    np.save(tmp_path / "half.npy", IDS / 2)
    np.save(tmp_path / "deep.npy", np.zeros((4, 4, 4)))
    np.save(tmp_path / "none.npy", np.zeros((0, 4), np.uint8))
    for name, error in {
        "cut.png": "truncated", "text.png": "unknown or damaged format", "empty.png": "the file is empty",
        "bits.npz": "cannot be read as NumPy arrays", "float.tif": "pixels of kind F cannot hold classes",
        "cmyk.tif": "pixels of kind CMYK", "half.npy": "type float64; a mask is", "deep.npy": "shape (4, 4, 4)",
        "none.npy": "shape (0, 4)",
    }.items():  # fmt: skip
        mask = record(tmp_path / name)
        assert error in mask.error
        assert (mask.size, mask.values) == (None, {})
        assert "\n" not in mask.error
        assert str(tmp_path) not in mask.error


def test_too_many_pixels(tmp_path, monkeypatch):
    Image.fromarray(IDS).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert record(tmp_path / "a.png").error.startswith("too many pixels: ")
