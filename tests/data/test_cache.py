"""Cached datasets: the same samples bit for bit, decoded anew when anything changes, refused when they do not fit."""

import errno
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from segvit.contracts import InputSpec, UserError
from segvit.data import cache
from segvit.data.cache import CachedDataset, Disk, cached, read_raw
from segvit.data.dataset import FolderDataset, open_dataset
from segvit.data.loading import samples, train_batches
from segvit.data.transforms import Augment
from segvit.files import cache_folder
from tests.data.folders import save, two_folders


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGVIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def dataset(tmp_path):
    return open_dataset(two_folders(tmp_path / "data", counts={"train": 5, "val": 2}, size=(21, 27)))


class Counting:
    """A dataset that says how often it was read."""

    def __init__(self, dataset):
        self.dataset, self.reads = dataset, []
        self.classes, self.splits = dataset.classes, dataset.splits
        self.channels, self.levels = dataset.channels, dataset.levels

    def count(self, split):
        return self.dataset.count(split)

    def name(self, split, i):
        return self.dataset.name(split, i)

    def read(self, split, i):
        self.reads.append((split, i))
        return self.dataset.read(split, i)


def stored(folder):
    return sorted(folder.rglob("*.raw"))


def assert_same(one, other):
    for split in one.splits:
        assert one.count(split) == other.count(split)
        for i in range(one.count(split)):
            a, b = one.read(split, i), other.read(split, i)
            assert a.name == b.name == other.name(split, i)
            assert (a.mask.dtype, a.image.dtype) == (b.mask.dtype, b.image.dtype)
            np.testing.assert_array_equal(a.image, b.image, strict=True)
            np.testing.assert_array_equal(a.mask, b.mask, strict=True)


def test_none_is_the_dataset_itself(dataset):
    assert cached(dataset, "none", workers=0) is dataset


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_samples_are_bit_identical_and_read_only(where, dataset, folder):
    kept = cached(dataset, where, workers=0)
    assert kept.classes is dataset.classes
    assert (kept.splits, kept.channels, kept.levels) == (dataset.splits, dataset.channels, dataset.levels)
    assert_same(dataset, kept)
    assert_same(dataset, kept)  # the second time from the cache
    for array in kept.read("train", 0)[:2]:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_wide_masks_and_odd_sizes_keep_their_type(tmp_path, folder):
    root = two_folders(tmp_path / "wide", counts={"train": 1, "val": 1}, size=(5, 7))
    (root / "classes.txt").write_text("".join(f"class {i}\n" for i in range(300)))
    for split in ("train", "val"):
        save(root / "masks" / split / "0.png", np.arange(35, dtype=np.uint16).reshape(5, 7) * 8)
    dataset = open_dataset(root)
    assert dataset.read("train", 0).mask.dtype == np.uint16
    kept = cached(dataset, "disk", workers=0)
    assert_same(dataset, kept)
    assert_same(dataset, kept)


def test_ram_reads_each_file_once_and_other_splits_through(dataset):
    counting, seen = Counting(dataset), []
    kept = cached(counting, "ram", splits=("train", "missing"), workers=0, progress=lambda *done: seen.append(done))
    assert seen == [(i, 5) for i in range(1, 6)]
    counting.reads.clear()
    for i in range(5):
        kept.read("train", i)
    assert counting.reads == []
    kept.read("val", 1)
    assert counting.reads == [("val", 1)]


def test_ram_works_for_generated_images_and_disk_says_why_not(folder):
    shapes = open_dataset("synthetic:shapes?train=3&val=2&size=32")
    assert_same(shapes, cached(shapes, "ram", workers=0))
    with pytest.raises(UserError, match="generated ones are not; use --cache ram"):
        cached(shapes, "disk", workers=0)


def test_ram_leaves_the_arrays_of_the_dataset_writable(dataset):
    sample = dataset.read("train", 0)
    counting = Counting(dataset)
    counting.read = lambda split, i: sample
    cached(counting, "ram", workers=0)
    assert sample.image.flags.writeable


@pytest.mark.parametrize("where", ["ram", "disk"])
@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_see_the_same_draws(where, workers, dataset, folder):
    options = {"spec": InputSpec(), "augment": Augment(crop=(16, 16)), "seed": 3, "draws": [[0, 1], [6, 7]]}
    plain = list(train_batches(dataset, workers=0, **options))
    kept = cached(dataset, where, workers=workers)
    for one, other in zip(plain, train_batches(kept, workers=workers, **options), strict=True):
        assert one.images.equal(other.images)
        assert one.masks.equal(other.masks)
        assert one.names == other.names
    for one, other in zip(samples(dataset, "val"), samples(kept, "val", workers=workers), strict=True):
        np.testing.assert_array_equal(one.image, other.image)


# Memory


def test_ram_that_does_not_fit_is_refused_before_it_is_filled(dataset, monkeypatch):
    size = 7 * 21 * 27 * 4
    monkeypatch.setattr(cache, "available_memory", lambda: int(size / cache.RAM_SHARE) + 2)
    cached(dataset, "ram", workers=0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="in each of 2 processes take"):
        cached(dataset, "ram", workers=0)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(cache, "available_memory", lambda: int(size / cache.RAM_SHARE) - 2)
    counting = Counting(dataset)
    with pytest.raises(UserError, match=r"7 decoded samples take 0\.0 GB .* only 80% .* use --cache disk"):
        cached(counting, "ram", workers=0)
    assert len(counting.reads) == 7  # the probes, of which there may be 8
    monkeypatch.setattr(cache, "available_memory", lambda: None)
    with pytest.raises(UserError, match="does not say how much memory"):
        cached(dataset, "ram", workers=0)


def test_ram_stops_when_the_estimate_was_too_low(tmp_path, monkeypatch):
    root = two_folders(tmp_path, counts={"train": 4, "val": 1})
    for kind, shape in (("images", (200, 200, 3)), ("masks", (200, 200))):
        save(root / kind / "train" / "3.png", np.zeros(shape, np.uint8))
    monkeypatch.setattr(cache, "PROBES", 2)  # neither of them is the large one
    monkeypatch.setattr(cache, "available_memory", lambda: 100_000)
    with pytest.raises(UserError, match="use --cache disk"):
        cached(open_dataset(root), "ram", workers=0)


def test_ram_needs_forked_workers(dataset, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    with pytest.raises(UserError, match=r"processes start by spawn.*--cache disk, or --workers 0"):
        cached(dataset, "ram", workers=2)
    kept = cached(dataset, "ram", workers=0)
    with pytest.raises(UserError, match="cannot be sent to another process"):
        pickle.dumps(kept)


def test_a_broken_file_stops_the_filling(dataset):
    dataset.image_path("train", 4).write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot be read as an image"):
        cached(dataset, "ram", workers=0)


# Disk


def test_folder_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SEGVIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "segvit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "segvit"
    monkeypatch.setenv("SEGVIT_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


def filled(dataset):
    kept = cached(dataset, "disk", workers=0)
    for split in dataset.splits:
        for i in range(dataset.count(split)):
            kept.read(split, i)
    return kept


def test_disk_decodes_once_for_all_later_runs(dataset, folder, monkeypatch):
    filled(dataset)
    assert len(stored(folder)) == 7
    monkeypatch.setattr(FolderDataset, "read", lambda *place: pytest.fail(f"decoded {place}"))
    again = filled(dataset)
    assert len(stored(folder)) == 7
    sent = pickle.loads(pickle.dumps(again))  # as to a spawned worker
    np.testing.assert_array_equal(sent.read("val", 1).image, again.read("val", 1).image)


def test_a_changed_file_is_decoded_anew(dataset, folder):
    kept = filled(dataset)
    for path, values in (
        (dataset.image_path("train", 2), np.full((21, 27, 3), 9, np.uint8)),
        (dataset.mask_path("train", 3), np.full((21, 27), 1, np.uint8)),
    ):
        before = path.stat()
        save(path, values)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # clocks of file systems are coarse
    assert_same(dataset, kept)
    assert (kept.read("train", 2).image == 9).all()
    assert (kept.read("train", 3).mask == 1).all()
    assert len(stored(folder)) == 9


def test_another_rule_or_other_channels_are_decoded_anew(dataset, folder, tmp_path):
    before = filled(dataset).read("train", 0).mask
    (tmp_path / "data" / "dataset.yaml").write_text(
        "train: {images: images/train, masks: masks/train}\nval: {images: images/val, masks: masks/val}\n"
        "classes: {0: {name: one, values: [0, 1]}, 1: {name: two, values: [2]}}\n"
    )
    merged = open_dataset(tmp_path / "data")
    after = filled(merged).read("train", 0).mask
    assert_same(merged, filled(merged))
    assert before.max() == 2
    assert after.max() == 1
    assert len(stored(folder)) == 14
    keys = {
        Disk(replace(dataset, **other), folder).path("train", 0) for other in ({}, {"channels": 1}, {"levels": (0, 9)})
    }
    assert len(keys) == 3


@pytest.mark.parametrize("damage", [b"", b"segvit\0\1", b"x" * 300])
def test_a_damaged_entry_is_written_again(damage, dataset, folder):
    kept = filled(dataset)
    for path in stored(folder):
        path.write_bytes(damage)
    assert_same(dataset, kept)
    assert all(read_raw(path, "") is not None for path in stored(folder))


def test_an_entry_cut_short_is_written_again(dataset, folder):
    kept = filled(dataset)
    for path in stored(folder):
        path.write_bytes(path.read_bytes()[:-1])
    assert_same(dataset, kept)


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(dataset, folder, monkeypatch):
    kept = CachedDataset(dataset, Disk(dataset, folder))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left on the disk .* no partial file is left"):
        kept.read("train", 0)
    with pytest.raises(UserError, match="no space left"):
        list(samples(kept, "train", workers=1))
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_a_disk_too_small_is_refused_at_the_start(dataset, folder, monkeypatch):
    free = cache.shutil.disk_usage(folder.parent)._replace(free=1000)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match=r"7 decoded samples take about .* set SEGVIT_CACHE"):
        cached(dataset, "disk", workers=0)
    for split in dataset.splits:  # what is there already needs no room
        for i in range(dataset.count(split)):
            Disk(dataset, folder).read(split, i)
    cached(dataset, "disk", workers=0)


def test_a_folder_that_cannot_be_made(dataset, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEGVIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be made .* set SEGVIT_CACHE"):
        cached(dataset, "disk", workers=0)


def test_a_missing_file_is_named(dataset, folder):
    dataset.mask_path("val", 0).unlink()
    with pytest.raises(UserError, match="no such file"):
        Disk(dataset, folder).read("val", 0)


def _checksums(source: Path) -> list[int]:
    kept = cached(open_dataset(source), "disk", workers=0)
    return [int(kept.read("train", i).image.sum()) + int(kept.read("train", i).mask.sum()) for i in range(5)]


def test_processes_fill_one_cache_together(dataset, folder, tmp_path):
    expected = [int(s.image.sum()) + int(s.mask.sum()) for s in (dataset.read("train", i) for i in range(5))]
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(_checksums, [tmp_path / "data"] * 6)) == [expected] * 6
    assert len(stored(folder)) in (6, 7)  # the train split and what the space was estimated from
    assert not list(folder.rglob("*.tmp"))
