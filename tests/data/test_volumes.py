"""Volumes: what is read from NIfTI and NumPy files, slice by slice, and what is said of those that are wrong."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segvit.contracts import UserError
from segvit.data.cache import cached
from segvit.data.dataset import FolderDataset, holds_volumes, open_dataset
from segvit.data.volumes import (
    VolumeDataset,
    cases,
    is_volume,
    npz_shapes,
    read_grid,
    read_slice,
    write_labels,
    write_nifti,
)
from tests.data.folders import save

nibabel = pytest.importorskip("nibabel")

YAML = """train: {images: scans, masks: labels}
channels: 1
range: [-100, 155]
classes: [background, organ, vessel]
"""
STEPS = (3.0, 0.8, 0.5)  # along D, H, W
RNG = np.random.default_rng(0)


def scan(shape: tuple[int, ...] = (4, 6, 5)) -> np.ndarray:
    return RNG.integers(-100, 156, shape).astype(np.int16)


def labels(shape: tuple[int, ...] = (4, 6, 5)) -> np.ndarray:
    return RNG.integers(0, 3, shape).astype(np.uint8)


def nifti(path: Path, volume: np.ndarray, *, steps: tuple[float, ...] = STEPS) -> Path:
    write_nifti(path, volume, affine=np.diag([*steps[::-1], 1.0]))
    return path


def folder(root: Path, *, suffix: str = ".nii.gz", count: int = 2, yaml: str = YAML) -> dict[str, Any]:
    """A dataset of `count` volumes; returns the arrays by name."""
    made = {}
    for i in range(count):
        image, mask = scan((4 + i, 6, 5)), labels((4 + i, 6, 5))
        nifti(root / "scans" / f"case{i}{suffix}", image)
        nifti(root / "labels" / f"case{i}{suffix}", mask)
        made[f"case{i}"] = (image, mask)
    (root / "dataset.yaml").write_text(yaml)
    return made


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_slices_are_the_samples(suffix: str, tmp_path: Path) -> None:
    made = folder(tmp_path, suffix=suffix)
    data = open_dataset(tmp_path)
    assert isinstance(data, VolumeDataset)
    assert holds_volumes(tmp_path)
    assert data.count("train") == 4 + 5
    image, mask = made["case1"]
    sample = data.read("train", 6)  # slice 2 of the second volume
    assert sample.name == f"scans/case1{suffix} slice 2"
    np.testing.assert_array_equal(sample.image[..., 0], image[2] + 100)  # the range spans 255 levels
    np.testing.assert_array_equal(sample.mask, mask[2])
    found = cases(data, "train")
    assert [(case.name, case.indices) for case in found] == [
        (f"scans/case0{suffix}", (0, 1, 2, 3)), (f"scans/case1{suffix}", (4, 5, 6, 7, 8)),
    ]  # fmt: skip
    assert found[0].spacing == pytest.approx(STEPS)
    assert data.image_path("train", 6) == tmp_path / "scans" / f"case1{suffix}"
    with pytest.raises(IndexError):
        data.read("train", 9)
    with pytest.raises(UserError, match="no split 'test'; there are train"):
        data.count("test")


def test_axes_and_spacing_are_those_of_the_header(tmp_path: Path) -> None:
    stored = np.arange(24, dtype=np.float32).reshape(2, 3, 4)  # i, j, k
    image = nibabel.Nifti1Image(stored, np.diag([1.5, 2.5, 4.0, 1.0]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, tmp_path / "a.nii")
    grid = read_grid(tmp_path / "a.nii")
    assert grid.shape == (4, 3, 2)
    assert grid.spacing == (4.0, 2.5, 1.5)
    np.testing.assert_array_equal(read_slice(tmp_path / "a.nii", 3), stored[:, :, 3].T)
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "b.nii")
    assert read_grid(tmp_path / "b.nii").spacing == pytest.approx((0.004, 0.0025, 0.0015))


def test_scaled_values(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.full((2, 2, 2), 24, np.int16), np.eye(4))
    image.header.set_slope_inter(2.0, -1000.0)
    nibabel.save(image, tmp_path / "a.nii.gz")
    assert nibabel.load(tmp_path / "a.nii.gz").get_fdata()[0, 0, 0] == -952
    assert read_slice(tmp_path / "a.nii.gz", 1).tolist() == [[-952.0, -952.0], [-952.0, -952.0]]


def test_numpy_volumes(tmp_path: Path) -> None:
    image, mask = scan(), labels()
    (tmp_path / "volumes").mkdir()
    np.savez(tmp_path / "volumes" / "a.npz", image=image, label=mask, spacing=np.array(STEPS))
    np.savez(tmp_path / "volumes" / "b.npz", image=image, label=mask)
    (tmp_path / "dataset.yaml").write_text(YAML.replace("scans", "volumes").replace("labels", "volumes"))
    data = open_dataset(tmp_path)
    assert isinstance(data, VolumeDataset)
    assert [case.spacing for case in cases(data, "train")] == [STEPS, None]
    np.testing.assert_array_equal(data.read("train", 5).mask, mask[1])
    np.testing.assert_array_equal(data.read("train", 5).image[..., 0], image[1] + 100)
    assert npz_shapes(tmp_path / "volumes" / "a.npz") == {"image": (4, 6, 5), "label": (4, 6, 5), "spacing": (3,)}
    assert not is_volume(save_npz(tmp_path / "image.npz", image=scan((6, 5)), label=labels((6, 5))))
    assert not is_volume(tmp_path / "missing.npz")
    painted = np.zeros((6, 5, 3), np.uint8)
    assert not is_volume(save_npz(tmp_path / "painted.npz", image=painted, label=painted))
    assert is_volume(save_npz(tmp_path / "narrow.npz", image=painted, label=painted, spacing=np.ones(3)))


def save_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def test_slices_in_files_are_put_together_by_name(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        for case, numbers in (("case1", (0, 1, 2, 10, *range(3, 10))), ("case10", (4, 5))):
            for number in numbers:
                value = np.full((4, 4), number if kind == "images" else number % 2, np.uint8)
                save(tmp_path / kind / "train" / f"{case}_slice{number}.png", value)
    (tmp_path / "classes.txt").write_text("background\norgan\n")
    data = open_dataset(tmp_path)
    assert isinstance(data, FolderDataset)
    found = {case.name: case for case in cases(data, "train")}
    assert set(found) == {"images/train/case1", "images/train/case10"}
    assert [int(data.read("train", i).image[0, 0, 0]) for i in found["images/train/case1"].indices] == list(range(11))
    assert found["images/train/case1"].spacing is None
    (tmp_path / "images" / "train" / "case1_slice5.png").unlink()
    (tmp_path / "masks" / "train" / "case1_slice5.png").unlink()
    with pytest.raises(UserError, match=r"images/train/case1: slice 5 is missing, so distances would be wrong"):
        cases(open_dataset(tmp_path), "train")
    with pytest.raises(UserError, match="train_00000: no slice of a volume; give NIfTI"):
        cases(open_dataset("synthetic:shapes?train=1&val=1"), "train")


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_caches_keep_slices_apart(where: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGVIT_CACHE", str(tmp_path / "cache"))
    folder(tmp_path / "data")
    data = open_dataset(tmp_path / "data")
    kept = cached(data, where, workers=0)
    for i in (8, 3, 8, 0):
        for one, other in zip(kept.read("train", i), data.read("train", i), strict=True):
            np.testing.assert_array_equal(one, other)


def test_labels_are_written_on_the_grid_of_the_scan(tmp_path: Path) -> None:
    affine = np.array([[0, 0.8, 0, 5], [0.5, 0, 0, -7], [0, 0, 3, 11], [0, 0, 0, 1.0]])
    image = nibabel.Nifti1Image(scan().transpose(2, 1, 0), affine)
    image.header["cal_max"] = 240
    image.header.set_sform(affine, code=1)
    nibabel.save(image, tmp_path / "scan.nii")
    found = labels()
    write_labels(tmp_path / "out" / "scan.nii.gz", found, tmp_path / "scan.nii")
    written = nibabel.load(tmp_path / "out" / "scan.nii.gz")
    np.testing.assert_array_equal(written.affine, nibabel.load(tmp_path / "scan.nii").affine)
    assert written.header["sform_code"] == 1
    assert written.header["cal_max"] == 0
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), found.transpose(2, 1, 0))
    source = save_npz(tmp_path / "scan.npz", image=scan(), spacing=np.array(STEPS))
    write_labels(tmp_path / "out" / "scan.npz", found, source)
    with np.load(tmp_path / "out" / "scan.npz") as arrays:
        np.testing.assert_array_equal(arrays["label"], found)
        assert arrays["spacing"].tolist() == list(STEPS)


def test_values_that_are_no_numbers_name_file_and_slice(tmp_path: Path) -> None:
    folder(tmp_path)
    image = scan().astype(np.float32)
    image[2, 1, 1] = np.nan
    nifti(tmp_path / "scans" / "case0.nii.gz", image)
    data = open_dataset(tmp_path)
    data.read("train", 1)
    with pytest.raises(UserError, match=r"case0.nii.gz slice 2: some pixels are not finite numbers; replace them"):
        data.read("train", 2)


def test_labels_in_no_class_name_file_and_slice(tmp_path: Path) -> None:
    folder(tmp_path)
    mask = labels()
    mask[3, 0, 0] = 9
    nifti(tmp_path / "labels" / "case0.nii.gz", mask)
    data = open_dataset(tmp_path)
    with pytest.raises(UserError, match=r"case0.nii.gz slice 3: ids \[9\] are in no class"):
        data.read("train", 3)


def test_scans_and_labels_of_other_shapes(tmp_path: Path) -> None:
    folder(tmp_path)
    nifti(tmp_path / "labels" / "case1.nii.gz", labels((4, 6, 5)))
    with pytest.raises(UserError, match=r"has shape \(5, 6, 5\) but its labels .*case1.nii.gz \(4, 6, 5\); resample"):
        open_dataset(tmp_path)


def test_labels_that_are_stored_the_other_way_round(tmp_path: Path) -> None:
    made = folder(tmp_path)
    write_nifti(tmp_path / "labels" / "case1.nii.gz", made["case1"][1], affine=np.diag([-0.5, 0.8, 3.0, 1.0]))
    with pytest.raises(UserError, match=r"stored along RAS but its labels .* along LAS; save both the same way"):
        open_dataset(tmp_path)


def test_several_volumes_in_one_file(tmp_path: Path) -> None:
    folder(tmp_path)
    nibabel.save(nibabel.Nifti1Image(np.zeros((5, 6, 4, 3), np.int16), np.eye(4)), tmp_path / "scans" / "case0.nii.gz")
    with pytest.raises(UserError, match=r"case0.nii.gz: an array of shape \(5, 6, 4, 3\) is 3 volumes in one file"):
        open_dataset(tmp_path)
    nibabel.save(nibabel.Nifti1Image(np.zeros((5, 6, 4, 1), np.int16), np.eye(4)), tmp_path / "scans" / "case0.nii.gz")
    assert open_dataset(tmp_path).read("train", 0).image.shape == (6, 5, 1)  # one of one is none too many


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_files_that_end_too_soon(suffix: str, tmp_path: Path) -> None:
    path = nifti(tmp_path / f"a{suffix}", scan((8, 40, 40)))
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(UserError, match=rf"a{suffix}: the volume cannot be read to its end .* copy or download"):
        read_slice(path, 7)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(b"not a volume at all" * 40))
    with pytest.raises(UserError, match=r"a.nii.gz: the volume cannot be read"):
        read_grid(tmp_path / "a.nii.gz")
    with pytest.raises(UserError, match=r"b.nii: no such file"):
        read_grid(tmp_path / "b.nii")
    with pytest.raises(UserError, match=r"a.npz: image has shape \(6, 5\); save one volume of three axes"):
        read_grid(save_npz(tmp_path / "a.npz", image=scan((6, 5)), label=labels()))
    with pytest.raises(UserError, match=r"b.npz: holds label; save the volume as image"):
        read_grid(save_npz(tmp_path / "b.npz", label=labels()))
    with pytest.raises(UserError, match=r"c.npz: spacing is \[1.0, -1.0, 1.0\]; save three positive numbers"):
        read_grid(save_npz(tmp_path / "c.npz", image=scan(), spacing=np.array([1.0, -1.0, 1.0])))


def test_images_among_volumes(tmp_path: Path) -> None:
    folder(tmp_path)
    save(tmp_path / "scans" / "other.png", np.zeros((4, 4), np.uint8))
    save(tmp_path / "labels" / "other.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(UserError, match=r"other.png: is no volume, but lies among volumes"):
        open_dataset(tmp_path)


def test_without_a_range_the_yaml_is_named(tmp_path: Path) -> None:
    folder(tmp_path, yaml=YAML.replace("range: [-100, 155]\n", ""))
    with pytest.raises(UserError, match=r"slice 0: pixels span .* set range: \[LOWEST, HIGHEST\] in the YAML"):
        open_dataset(tmp_path).read("train", 0)


def test_a_header_without_a_step_has_no_spacing(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", scan())
    data = bytearray(path.read_bytes())
    data[80:84] = np.float32(0).tobytes()  # pixdim[1]
    path.write_bytes(bytes(data))
    assert read_grid(path).spacing is None
