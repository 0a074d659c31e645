"""Samples that are decoded once: kept in memory, or in files of raw pixels that are mapped when they are read.

A cached sample is bit for bit the one that the dataset itself reads; nothing can write to its arrays.

ram   filled by threads before the first batch; loader workers share it, because they are forked afterwards.
disk  one file a sample, written when the sample is first asked for, by any process. Its name is a digest of all that
      the sample depends on: paths, sizes and times of image and mask, the label rule, channels, levels, versions of
      the decoders. What changed is thus decoded anew. To clear the cache, delete its folder.

Layout of a file: MAGIC, then height, width, channels and bytes of a mask value as four little-endian 32-bit numbers,
zeros up to byte 64, the mask, the image; both in C order, mask values little-endian.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import PIL
from numpy.typing import NDArray

from segvit import __version__
from segvit.contracts import Classes, Sample, UserError
from segvit.data.dataset import Dataset, FolderDataset
from segvit.data.memory import available_memory
from segvit.data.volumes import VolumeDataset
from segvit.files import cache_folder, open_atomic

Where = Literal["none", "ram", "disk"]
Place = tuple[str, int]  # split and number of a sample
Progress = Callable[[int, int], None]  # gets what is done and the total

PROBES = 8  # samples that the size of all is estimated from
RAM_SHARE, DISK_SHARE = 0.8, 0.9  # of what is free; the rest is for the network, checkpoints and everyone else
MAGIC = b"segvit\0\1"
HEADER, START = "<4I", 64  # an aligned start, for masks of two bytes


class Store(Protocol):
    """Where a cached dataset has its samples from."""

    def read(self, split: str, i: int) -> Sample:
        """Sample i."""
        ...


class CachedDataset:
    """A dataset whose samples come from a store; everything else is as in the dataset itself."""

    def __init__(self, dataset: Dataset, store: Store) -> None:
        self.dataset, self.store = dataset, store

    @property
    def classes(self) -> Classes:
        """The classes whose ids the masks hold."""
        return self.dataset.classes

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits there are."""
        return self.dataset.splits

    @property
    def channels(self) -> int:
        """The number of channels of the images."""
        return self.dataset.channels

    @property
    def levels(self) -> tuple[float, float] | None:
        """The raw levels that become 0 and 255."""
        return self.dataset.levels

    def count(self, split: str) -> int:
        """The number of samples in a split."""
        return self.dataset.count(split)

    def name(self, split: str, i: int) -> str:
        """What sample i is called in messages and files."""
        return self.dataset.name(split, i)

    def read(self, split: str, i: int) -> Sample:
        """Sample i, read-only."""
        return self.store.read(split, i)


def cached(
    dataset: Dataset, where: Where, *, splits: Sequence[str] = ("train", "val"), workers: int,
    progress: Progress = lambda done, total: None,
) -> Dataset:  # fmt: skip
    """The dataset with the samples of `splits` kept in memory or on disk; with "none" the dataset itself.

    `workers` is how many loader processes will read it. Raises UserError when the samples will not fit, and for "ram"
    where workers do not share memory, as they are not forked.
    """
    places = [(split, i) for split in splits if split in dataset.splits for i in range(dataset.count(split))]
    if where == "ram":
        method = multiprocessing.get_start_method()
        if workers and method != "fork":
            raise UserError(
                f"cache ram needs loader workers that are forked, but here processes start by {method}: each would "
                "need a copy; use --cache disk, or --workers 0"
            )
        return CachedDataset(dataset, Ram(dataset, places, progress=progress))
    if where == "disk":
        store = Disk(dataset, cache_folder())
        store.check_space(places)
        return CachedDataset(dataset, store)
    return dataset


class Ram:
    """All samples of some places in memory; others are read from the dataset."""

    def __init__(self, dataset: Dataset, places: Sequence[Place], *, progress: Progress) -> None:
        self.dataset = dataset
        free, self.processes = available_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if free is None:
            raise UserError("this system does not say how much memory is free; use --cache disk")
        self.free, self.places = free, places
        self.check(estimated_bytes(dataset, places))
        self.samples: dict[Place, Sample] = {}
        used = 0
        # Decoders release the interpreter's lock, so threads do; processes would have to send the pixels back.
        pool = ThreadPoolExecutor(max_workers=os.cpu_count())
        try:
            for place, sample in zip(places, pool.map(lambda place: dataset.read(*place), places), strict=True):
                self.samples[place] = _frozen(sample)
                used += _bytes(sample)
                self.check(used)  # the estimate may have been too low
                progress(len(self.samples), len(places))
        finally:
            pool.shutdown(cancel_futures=True)

    def check(self, size: int) -> None:
        """Raise UserError when samples of `size` bytes in all do not fit."""
        need, allowed = self.processes * size, RAM_SHARE * self.free
        if need > allowed:
            each = f" in each of {self.processes} processes" if self.processes > 1 else ""
            raise UserError(
                f"{len(self.places)} decoded samples{each} take {_gb(need)} of memory or more, but only "
                f"{RAM_SHARE:.0%} of what is free, {_gb(allowed)}, may be used; use --cache disk, or smaller images"
            )

    def read(self, split: str, i: int) -> Sample:
        """Sample i."""
        return self.samples[split, i] if (split, i) in self.samples else self.dataset.read(split, i)

    def __getstate__(self) -> dict[str, Any]:
        raise UserError("a cache in memory cannot be sent to another process; use --cache disk, or --workers 0")


class Disk:
    """Samples in files below `folder`. Files that are missing, damaged or cut short are written (again)."""

    def __init__(self, dataset: Dataset, folder: Path) -> None:
        if not isinstance(dataset, FolderDataset | VolumeDataset):
            raise UserError("cache disk is for images in files, which generated ones are not; use --cache ram or none")
        self.dataset, self.folder, self.facts = dataset, folder / "samples", _facts(dataset)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be made ({error.strerror}); set SEGVIT_CACHE to a folder you can write to"
            ) from error

    def read(self, split: str, i: int) -> Sample:
        """Sample i. Raises UserError when the disk is full; nothing half-written stays."""
        try:
            path = self.path(split, i)
        except FileNotFoundError:
            return self.dataset.read(split, i)  # which says what is missing
        name = self.dataset.name(split, i)
        return read_raw(path, name) or _written(path, self.dataset.read(split, i))

    def path(self, split: str, i: int) -> Path:
        """The file that holds sample i, whether it is there or not. Raises FileNotFoundError for a missing source."""
        key = hashlib.blake2b(self.facts, digest_size=20)
        for file in (self.dataset.image_path(split, i), self.dataset.mask_path(split, i)):
            status = file.stat()
            key.update(os.fsencode(file.absolute()) + struct.pack("<Qq", status.st_size, status.st_mtime_ns))
        if isinstance(self.dataset, VolumeDataset):
            key.update(struct.pack("<I", self.dataset.place(split, i)[1]))
        name = key.hexdigest()
        return self.folder / name[:2] / f"{name}.raw"

    def check_space(self, places: Sequence[Place]) -> None:
        """Raise UserError when the samples that are not yet there will not fit on the disk."""
        missing = [place for place in places if not self._has(place)]
        need = estimated_bytes(self, missing)
        free = shutil.disk_usage(self.folder).free
        if need > DISK_SHARE * free:
            raise UserError(
                f"{len(missing)} decoded samples take about {_gb(need)}, but {self.folder} has {_gb(free)} free; "
                "make room, or set SEGVIT_CACHE to a folder on a larger disk"
            )

    def _has(self, place: Place) -> bool:
        try:
            return self.path(*place).exists()
        except FileNotFoundError:
            return False


def read_raw(path: Path, name: str) -> Sample | None:
    """The sample in a file, mapped and not read; None where there is no such file or not a whole one."""
    try:
        data = np.asarray(np.memmap(path, np.uint8, "r"))
    except (FileNotFoundError, ValueError):  # numpy's word for an empty file
        return None
    if len(data) < START or data[: len(MAGIC)].tobytes() != MAGIC:
        return None
    height, width, channels, depth = struct.unpack_from(HEADER, data[len(MAGIC) : START].tobytes())
    middle = START + height * width * depth
    if len(data) != middle + height * width * channels:
        return None
    mask = data[START:middle].view("<u2" if depth == 2 else np.uint8).reshape(height, width)
    return Sample(data[middle:].reshape(height, width, channels), mask, name)


def write_raw(path: Path, sample: Sample) -> None:
    """Write what `read_raw` reads, atomically."""
    depth = sample.mask.dtype.itemsize
    header = MAGIC + struct.pack(HEADER, *sample.image.shape, depth)
    with open_atomic(path) as file:
        file.write(header.ljust(START, b"\0"))
        file.write(sample.mask.astype(f"<u{depth}", copy=False).tobytes())
        file.write(sample.image.tobytes())


def _written(path: Path, sample: Sample) -> Sample:
    write_raw(path, sample)
    return _frozen(sample)


def _facts(dataset: FolderDataset | VolumeDataset) -> bytes:
    """A digest of what all samples depend on."""
    key = hashlib.blake2b()
    key.update(repr((MAGIC, __version__, PIL.__version__, dataset.channels, dataset.levels)).encode())
    for field in fields(dataset.rule):
        value = getattr(dataset.rule, field.name)
        key.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
        key.update(b"\0")
    return key.digest()


def estimated_bytes(store: Store, places: Sequence[Place]) -> int:
    """About how many bytes the samples of `places` are, from a few of them."""
    count = min(PROBES, len(places))
    probes = [places[i * len(places) // count] for i in range(count)]
    return sum(_bytes(store.read(*place)) for place in probes) * len(places) // max(1, count)


def _bytes(sample: Sample) -> int:
    return sample.image.nbytes + sample.mask.nbytes


def _frozen(sample: Sample) -> Sample:
    return sample._replace(image=_read_only(sample.image), mask=_read_only(sample.mask))


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
