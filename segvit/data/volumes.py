"""Volumes as data: NIfTI and NumPy files whose slices are the samples, read one volume at a time.

NIfTI     .nii and .nii.gz (nibabel). A volume (D, H, W) is the stored array (i, j, k) with its axes reversed: slice k
          holds rows j and columns i. Nothing is turned or resampled, so that label volumes fit their scans. Spacing is
          the header's, in millimetres.
NumPy     .npz with `image` and `label`, both (D, H, W), and `spacing`, three numbers along D, H, W in millimetres. A
          file counts as a volume when it holds `spacing`, or a `label` of three axes that is no colour mask: its last
          is neither 1 nor 3 long. Without `spacing` distances can only be measured with one that the user gives.
Slices    Files called CASE_sliceNNN (Synapse as TransUNet prepared it) are samples like any other; `cases` puts them
          together. They have no spacing.
Memory    One scan and its labels: what was read last is kept, as it is stored. An uncompressed .nii is mapped and only
          the slices that are asked for are read.

Shapes    D slices, H W pixels.
"""

from __future__ import annotations

import gzip
import io
import itertools
import math
import re
import zipfile
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import Classes, Sample, UserError
from segvit.data.arrays import BROKEN, Levels, eight_bits, fit_channels, load_array
from segvit.data.decode import LabelRule, mask_from_array
from segvit.files import write_bytes

if TYPE_CHECKING:
    from segvit.data.dataset import Dataset, Pair

NIFTI_SUFFIXES = (".nii", ".nii.gz")
SLICE_NAME = re.compile(r"(?P<case>.+?)[_-]?slice[_-]?(?P<number>\d+)(\.\w+)*$", re.IGNORECASE)
MILLIMETRES = {"meter": 1000.0, "mm": 1.0, "micron": 1e-3, "unknown": 1.0}

Spacing = tuple[float, float, float]


class Grid(NamedTuple):
    """What a volume's header says."""

    shape: tuple[int, int, int]  # D, H, W
    spacing: Spacing | None  # millimetres along D, H, W; None where the file does not say
    axes: str = ""  # where the stored axes point to, such as LPS; NumPy files do not say


class Case(NamedTuple):
    """The samples of one volume."""

    name: str
    indices: tuple[int, ...]  # of its slices in the split, from the first slice to the last
    spacing: Spacing | None


def is_nifti(path: str | Path) -> bool:
    """Whether a file is a NIfTI volume by its name."""
    return str(path).lower().endswith(NIFTI_SUFFIXES)


def is_volume(path: Path) -> bool:
    """Whether a file holds a volume: NIfTI by its name, `.npz` by its arrays."""
    if is_nifti(path) or path.suffix.lower() != ".npz" or not path.is_file():
        return is_nifti(path)
    shapes = npz_shapes(path)
    label = shapes.get("label", ())
    return "spacing" in shapes or (len(label) == 3 and label[2] not in (1, 3))  # those are masks, 3 painted in colours


def npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays in a `.npz` file, from their headers alone; {} for a file that is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            shapes = {}
            for name in archive.namelist():
                with archive.open(name) as member:
                    first = np.lib.format.read_magic(member) == (1, 0)
                    read = (np.lib.format.read_array_header_2_0, np.lib.format.read_array_header_1_0)[first]
                    shapes[name.removesuffix(".npy")] = read(member)[0]
            return shapes
    except BROKEN:
        return {}  # whoever reads the file finds the words for it


def read_grid(path: Path, key: str = "image") -> Grid:
    """Shape and spacing of a volume. Raises UserError for what is no volume of three axes."""
    if is_nifti(path):
        image = _nifti(path)
        with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as file:
            raw = type(image.header).from_fileobj(file, check=False)  # what was checked has 1 where the file has 0
        steps = raw["pixdim"][1:4].tolist()
        scale = MILLIMETRES[image.header.get_xyzt_units()[0]]
        axes = "".join(str(letter) for letter in _nibabel(path).aff2axcodes(image.affine))
        return Grid(_three_axes(image.shape, str(path))[::-1], _spacing([scale * step for step in steps[::-1]]), axes)
    shapes = npz_shapes(path)
    if key not in shapes:
        raise UserError(f"{path}: holds {', '.join(shapes) or 'no arrays'}; save the volume as {key} with numpy.savez")
    shape = shapes[key]
    if len(shape) != 3:
        raise UserError(f"{path}: {key} has shape {shape}; save one volume of three axes, slices first")
    given = load_array(path, "spacing").ravel().tolist() if "spacing" in shapes else []
    if given and (len(given) != 3 or _spacing(given) is None):
        raise UserError(f"{path}: spacing is {given}; save three positive numbers, millimetres along D, H, W")
    return Grid((shape[0], shape[1], shape[2]), _spacing(given))


def read_slice(path: Path, number: int, key: str = "image") -> NDArray[Any]:
    """Slice `number` (H, W) of a volume, in the file's own values; `key` names the array of a `.npz`."""
    stored = _stored(path, key, path.stat().st_mtime_ns)
    try:
        values: NDArray[Any] = np.asarray(stored.values[number])
    except BROKEN as error:
        raise _unreadable(path, error) from None
    if (stored.slope, stored.offset) != (1.0, 0.0):
        values = values * stored.slope + stored.offset
    return values


def read_scan(path: Path, number: int, *, channels: int, levels: Levels | None) -> NDArray[np.uint8]:
    """Slice `number` as an image (H, W, channels), where the raw `levels` become 0 and 255."""
    name = f"{path} slice {number}"
    return fit_channels(eight_bits(read_slice(path, number), name, levels), channels, name)


def write_labels(path: Path, labels: NDArray[Any], source: Path) -> None:
    """Write class ids (D, H, W) as a volume of the kind and on the grid of `source`, atomically.

    A NIfTI keeps the affine and the header of its scan; a `.npz` holds `label` and the scan's `spacing`.
    """
    if not is_nifti(path):
        buffer, arrays = io.BytesIO(), {"label": labels}
        spacing = read_grid(source).spacing
        if spacing is not None:
            arrays["spacing"] = np.array(spacing)
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        write_bytes(path, buffer.getvalue())
        return
    like = _nifti(source)
    write_nifti(path, labels, affine=like.affine, header=like.header)


def write_nifti(path: Path, volume: NDArray[Any], *, affine: NDArray[Any], header: Any = None) -> None:
    """Write values (D, H, W) as NIfTI-1, atomically; `header` is one of nibabel's to take over."""
    stored = np.ascontiguousarray(volume).transpose(2, 1, 0)
    if header is not None:
        header = header.copy()
        header.set_data_dtype(stored.dtype)
        header["cal_min"] = header["cal_max"] = 0  # a window for the scan's values would hide the labels
        header.set_slope_inter(1, 0)
    data = _nibabel(path).Nifti1Image(stored, affine, header).to_bytes()
    write_bytes(path, gzip.compress(data, mtime=0) if path.name.lower().endswith(".gz") else data)


@dataclass(frozen=True)
class VolumeDataset:
    """Volumes whose slices are the samples, case by case. Headers were read when it was made, values when asked for."""

    classes: Classes
    rule: LabelRule
    root: Path
    pairs: Mapping[str, tuple[Pair, ...]]
    channels: int = 3
    levels: Levels | None = None
    grids: Mapping[str, tuple[Grid, ...]] = field(init=False)
    starts: Mapping[str, tuple[int, ...]] = field(init=False)  # the first sample of each volume, and the end

    def __post_init__(self) -> None:
        grids = {split: tuple(map(_checked, pairs)) for split, pairs in self.pairs.items()}
        counts = {split: [grid.shape[0] for grid in found] for split, found in grids.items()}
        object.__setattr__(self, "grids", grids)
        object.__setattr__(
            self, "starts", {split: (0, *itertools.accumulate(found)) for split, found in counts.items()}
        )

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits there are."""
        return tuple(self.pairs)

    def count(self, split: str) -> int:
        """The number of slices in a split."""
        return self._of(split)[-1]

    def name(self, split: str, i: int) -> str:
        """The path of sample i's volume below the root, and the number of the slice."""
        volume, number = self.place(split, i)
        return f"{_below(self.root, self.pairs[split][volume][0])} slice {number}"

    def image_path(self, split: str, i: int) -> Path:
        """The file of the volume that sample i is a slice of."""
        return self.pairs[split][self.place(split, i)[0]][0]

    def mask_path(self, split: str, i: int) -> Path:
        """The file of its labels."""
        return self.pairs[split][self.place(split, i)[0]][1]

    def place(self, split: str, i: int) -> tuple[int, int]:
        """The number of sample i's volume, and that of the slice in it, both from 0."""
        starts = self._of(split)
        if not 0 <= i < starts[-1]:
            raise IndexError(f"{split} has slices 0..{starts[-1] - 1}, not {i}")
        volume = bisect_right(starts, i) - 1
        return volume, i - starts[volume]

    def read(self, split: str, i: int) -> Sample:
        """Sample i, decoded. Raises UserError that names file and slice."""
        volume, number = self.place(split, i)
        image, mask = self.pairs[split][volume]
        labels = mask_from_array(read_slice(mask, number, "label"), self.rule, f"{mask} slice {number}")
        pixels = read_scan(image, number, channels=self.channels, levels=self.levels)
        return Sample(pixels, labels, self.name(split, i))

    def cases(self, split: str) -> tuple[Case, ...]:
        """The volumes of a split."""
        starts, names = self._of(split), [_below(self.root, image) for image, _ in self.pairs[split]]
        spans = zip(names, itertools.pairwise(starts), self.grids[split], strict=True)
        return tuple(Case(name, tuple(range(*span)), grid.spacing) for name, span, grid in spans)

    def _of(self, split: str) -> tuple[int, ...]:
        if split not in self.starts:
            raise UserError(f"{self.root}: no split {split!r}; there are {', '.join(self.pairs)}")
        return self.starts[split]


def cases(dataset: Dataset, split: str) -> tuple[Case, ...]:
    """The volumes of a split: those of a `VolumeDataset`, or slices in files called CASE_sliceNNN put together.

    Raises UserError for images that are neither, and for cases of which a slice is missing.
    """
    if isinstance(dataset, VolumeDataset):
        return dataset.cases(split)
    found: dict[str, dict[int, int]] = {}
    for i in range(dataset.count(split)):
        match = SLICE_NAME.match(dataset.name(split, i))
        if match is None:
            raise UserError(
                f"{dataset.name(split, i)}: no slice of a volume; give NIfTI or .npz volumes, or call the files "
                "CASE_sliceNNN"
            )
        found.setdefault(match["case"], {})[int(match["number"])] = i
    for case, slices in found.items():
        missing = sorted(set(range(min(slices), max(slices) + 1)) - slices.keys())
        if missing:
            raise UserError(f"{case}: slice {missing[0]} is missing, so distances would be wrong; add the file")
    return tuple(Case(case, tuple(slices[number] for number in sorted(slices)), None) for case, slices in found.items())


class _Stored(NamedTuple):
    """A volume's values (D, H, W) as they lie in the file, and the line that makes them what they stand for."""

    values: NDArray[Any]
    slope: float = 1.0
    offset: float = 0.0


@lru_cache(maxsize=2)  # a scan and its labels
def _stored(path: Path, key: str, changed: int) -> _Stored:
    if not is_nifti(path):
        return _Stored(load_array(path, key))
    proxy = _nifti(path).dataobj
    try:
        values = proxy.get_unscaled()
    except BROKEN as error:
        raise _unreadable(path, error) from None
    return _Stored(values.reshape(values.shape[:3]).transpose(2, 1, 0), float(proxy.slope), float(proxy.inter))


def _nibabel(path: Path) -> Any:
    try:
        import nibabel
    except ImportError:
        raise UserError(f"{path}: NIfTI volumes need nibabel; pip install segvit[medical]") from None
    return nibabel


def _nifti(path: Path) -> Any:
    nibabel = _nibabel(path)
    try:
        return nibabel.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except (*BROKEN, nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: BaseException) -> UserError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return UserError(f"{path}: the volume cannot be read to its end ({reason}); copy or download the file again")


def _three_axes(shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    if len(shape) < 3 or math.prod(shape[3:]) != 1 or 0 in shape:
        many = f"{math.prod(shape[3:])} volumes in one file" if len(shape) > 3 else "no volume"
        raise UserError(f"{name}: an array of shape {shape} is {many}; save one file with three axes for each volume")
    return shape[0], shape[1], shape[2]


def _spacing(steps: list[float]) -> Spacing | None:
    if len(steps) != 3 or not all(math.isfinite(step) and step > 0 for step in steps):
        return None
    return steps[0], steps[1], steps[2]


def _checked(pair: Pair) -> Grid:
    """The grid of a scan, which must be that of its labels."""
    image, mask = pair
    for path in pair:
        if not is_nifti(path) and path.suffix.lower() != ".npz":
            raise UserError(f"{path}: is no volume, but lies among volumes; keep images in a folder of their own")
    grid, labels = read_grid(image), read_grid(mask, "label")
    if grid.shape != labels.shape:
        raise UserError(f"{image} has shape {grid.shape} but its labels {mask} {labels.shape}; resample the labels")
    if grid.axes and labels.axes and grid.axes != labels.axes:
        raise UserError(
            f"{image} is stored along {grid.axes} but its labels {mask} along {labels.axes}; save both the same way"
        )
    return grid


def _below(root: Path, path: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
