"""Array files, the way to 8 bits and the number of channels, where the readers of files do not reach."""

import numpy as np
import pytest

from segvit.contracts import UserError
from segvit.data.arrays import eight_bits, fit_channels, load_array, load_tiff


def test_arrays_by_name(tmp_path):
    np.savez(tmp_path / "two.npz", image=np.ones(2), label=np.zeros(2))
    assert load_array(tmp_path / "two.npz", "label").sum() == 0
    np.savez_compressed(tmp_path / "one.npz", anything=np.ones(2))
    assert load_array(tmp_path / "one.npz", "image").sum() == 2
    np.save(tmp_path / "a.npy", np.ones(3))
    assert load_array(tmp_path / "a.npy", "label").sum() == 3
    np.savez(tmp_path / "other.npz", a=np.ones(2), b=np.zeros(2))
    with pytest.raises(UserError, match=r"other\.npz: holds the arrays a, b; one must be called image, or be the only"):
        load_array(tmp_path / "other.npz", "image")


def test_broken_arrays_are_named_and_never_unpickled(tmp_path):
    np.savez(tmp_path / "whole.npz", np.arange(1000))
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:500])
    (tmp_path / "bits.npz").write_bytes(whole[:400] + b"\xff" * 100 + whole[500:])
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    for name in ("cut.npz", "bits.npz", "text.npy", "empty.npy", "objects.npy"):
        with pytest.raises(UserError, match=f"{name}: cannot be read as NumPy arrays") as caught:
            load_array(tmp_path / name, "image")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"none\.npz: no such file"):
        load_array(tmp_path / "none.npz", "image")
    with pytest.raises(UserError, match="is a folder"):
        load_array(tmp_path, "image")


def test_broken_tiffs_are_named(tmp_path):
    pytest.importorskip("tifffile")
    (tmp_path / "a.tif").write_bytes(b"II*\0\x08\0\0\0")
    with pytest.raises(UserError, match=r"a\.tif: cannot be read as a TIFF \(.*\); replace the file"):
        load_tiff(tmp_path / "a.tif", str(tmp_path / "a.tif"))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.float32, np.float64])
def test_every_type_maps_alike(kind):
    raw = np.arange(0, 256).astype(kind)
    expected = np.floor((np.arange(256.0) - 20) * 255 / 160 + 0.5).clip(0, 255)
    assert (eight_bits(raw, "a", (20, 180)) == expected).all()


def test_the_natural_ranges():
    assert eight_bits(np.array([True, False]), "a", None).tolist() == [255, 0]
    assert eight_bits(np.array([0, 128, 129, 65535], np.int64), "a", None).tolist() == [0, 0, 1, 255]
    assert eight_bits(np.array([-1000, 400], np.int16), "a", (-1000, 400)).tolist() == [0, 255]
    for raw, message in (
        (np.array([-1]), r"pixels span -1\.\.-1; set range:"),
        (np.array([70000]), r"pixels span 70000\.\.70000; set range:"),
        (np.array([0.5]), "type float64; set range:"),
        (np.array(["a"]), "type <U1; set range:"),
    ):
        with pytest.raises(UserError, match=message):
            eight_bits(raw, "a", None)
    for raw, message in ((np.array([np.nan]), "not finite"), (np.array([1j]), "save real numbers")):
        with pytest.raises(UserError, match=message):
            eight_bits(raw, "a", (0, 1))


def test_channels_that_do_not_fit():
    assert fit_channels(np.zeros((2, 3), np.uint8), 3, "a").shape == (2, 3, 3)
    with pytest.raises(UserError, match=r"8 channels but 4 are wanted; set channels: 8 .* last axis"):
        fit_channels(np.zeros((4, 8, 8), np.uint8), 4, "a")
    for shape in ((4,), (1, 2, 3, 4), (0, 4, 3)):
        with pytest.raises(UserError, match="is no image; save"):
            fit_channels(np.zeros(shape, np.uint8), 3, "a")
