"""The whole survey: which files are where, what is wrong with them, and what need not be read twice."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segvit.contracts import UserError
from segvit.data.dataset import open_dataset
from segvit.data.doctor import survey as module
from segvit.data.doctor.survey import survey
from tests.data.folders import save, two_folders


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGVIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    return two_folders(tmp_path / "data", counts={"train": 5, "val": 2})


@pytest.fixture
def reads(monkeypatch):
    """The names of all files whose content is asked for."""
    names = []
    plain = Path.read_bytes

    def read(path):
        names.append(path.name if path.parent.parent.name != "masks" else f"masks/{path.name}")
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    return names


def named(found, name):
    return next(split for split in found.splits if split.name == name)


def without_time(found):
    return found.root, found.source, found.splits, found.classes


def test_pairs_with_what_is_in_them(root):
    told = []
    found = survey(root, progress=lambda *state: told.append(state))
    assert (found.root, found.source, found.classes.names) == (root, root, ("class 0", "class 1", "class 2"))
    assert [(split.name, split.images, split.masks, len(split.pairs)) for split in found.splits] == [
        ("train", "images/train", "masks/train", 5),
        ("val", "images/val", "masks/val", 2),
    ]
    pair = named(found, "val").pairs[1]
    assert (pair.stem, pair.image.path, pair.mask.path) == ("1", "images/val/1.png", "masks/val/1.png")
    assert (pair.image.size, pair.mask.size) == ((20, 24), (20, 24))
    values, counts = np.unique(np.asarray(Image.open(root / "masks/val/1.png")), return_counts=True)
    assert pair.mask.values == dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert pair.image.hash is not None
    assert list(found.seconds) == ["masks", "images", "hashes"]
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert [state for state in told if state[1] == state[2]] == [("masks", 7, 7), ("images", 7, 7), ("hashes", 7, 7)]


def test_hashes_only_where_asked_for(root):
    found = survey(root, hashes=False)
    assert list(found.seconds) == ["masks", "images"]
    assert {pair.image.hash for split in found.splits for pair in split.pairs} == {None}


def test_files_without_a_counterpart_are_listed(root):
    (root / "images/train/3.png").unlink()
    (root / "masks/train/1.png").rename(root / "masks/train/one.png")
    (root / "masks/train/sketch.jpg").write_bytes(b"")  # training does not look at it either
    train = named(survey(root), "train")
    assert [pair.stem for pair in train.pairs] == ["0", "2", "4"]
    assert (train.images_alone, train.masks_alone) == (("1",), ("3", "one"))


def test_damaged_files_never_stop_the_survey(root):
    whole = (root / "masks/train/0.png").read_bytes()
    (root / "masks/train/0.png").write_bytes(whole[: len(whole) // 2])
    (root / "masks/train/1.png").write_bytes(b"")
    (root / "images/train/2.png").write_text("hello")
    whole = (root / "images/train/3.png").read_bytes()
    (root / "images/train/3.png").write_bytes(whole[: len(whole) // 2])  # its header is all right
    for run in range(2):
        pairs = named(survey(root), "train").pairs
        errors = [(pair.mask.error, pair.image.error) for pair in pairs]
        assert [bool(mask) for mask, _ in errors] == [True, True, False, False, False], run
        assert [bool(image) for _, image in errors] == [False, False, True, True, False], run
        assert pairs[0].mask.size is pairs[2].image.size is pairs[3].image.size is None
    unhashed = named(survey(root, hashes=False), "train").pairs
    assert [bool(pair.image.error) for pair in unhashed] == [False, False, True, False, False]


def test_files_without_permission(root, monkeypatch):
    plain, closed = Path.read_bytes, root / "masks/train/0.png"

    def read(path):  # permissions do not stop root, as whom tests may run
        if path == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    assert "ermission" in named(survey(root), "train").pairs[0].mask.error


def test_files_that_vanish(root, monkeypatch):
    plain = module.find_pairs

    def find(*arguments):
        found = plain(*arguments)
        for _, image, mask in found.pairs[:1]:
            image.unlink()
            mask.unlink()
        return found

    monkeypatch.setattr(module, "find_pairs", find)
    pair = named(survey(root), "train").pairs[0]
    assert "No such file" in pair.mask.error
    assert "No such file" in pair.image.error


def test_threads_find_what_one_finds(tmp_path):
    root = two_folders(tmp_path / "data", counts={"train": 40, "val": 9})
    (root / "masks/train/7.png").write_bytes(b"")
    alone = survey(root, workers=1, remember=False)
    assert without_time(survey(root, workers=4, remember=False)) == without_time(alone)
    survey(root)
    assert without_time(survey(root, workers=3)) == without_time(alone)  # and what was remembered


def test_the_second_run_reads_nothing(root, reads):
    first = survey(root)
    assert len(reads) == 14
    reads.clear()
    assert without_time(survey(root)) == without_time(first)
    assert reads == []
    survey(root, remember=False)
    assert len(reads) == 14


def test_only_what_changed_is_read_again(root, reads):
    survey(root, hashes=False)
    looked = len(reads)
    assert looked == 7
    reads.clear()
    mask = root / "masks/train/2.png"
    os.utime(mask, ns=(1, 1))
    save(root / "masks/train/3.png", np.full((20, 24), 2, np.uint8))
    pairs = named(survey(root, hashes=False), "train").pairs
    assert sorted(reads) == ["masks/2.png", "masks/3.png"]
    assert pairs[3].mask.values == {2: 480}


def test_content_of_the_same_size_is_told_apart(root):
    values = np.zeros((20, 24), np.uint8)
    path = save(root / "masks/train/0.bmp", values)
    (root / "masks/train/0.png").unlink()
    survey(root)
    size = path.stat().st_size
    save(path, values + 1)
    assert path.stat().st_size == size
    assert named(survey(root), "train").pairs[0].mask.values == {1: 480}


def test_moved_and_touched_files_are_known_by_content(root, monkeypatch):
    first = survey(root)
    (root / "masks/train/2.png").rename(root / "masks/train/new.png")
    (root / "images/train/2.png").rename(root / "images/train/new.png")
    for path in (root / "masks/val").iterdir():
        os.utime(path, ns=(1, 1))
    monkeypatch.setattr(module, "look_at_mask", lambda path, data: pytest.fail(f"{path} was decoded"))
    monkeypatch.setattr(module, "hash_of", lambda path, data: pytest.fail(f"{path} was decoded"))
    second = survey(root)
    assert named(second, "train").pairs[-1].mask.values == named(first, "train").pairs[2].mask.values
    assert named(second, "train").pairs[-1].image.hash == named(first, "train").pairs[2].image.hash
    assert named(second, "val").pairs == named(first, "val").pairs


def test_an_interrupt_keeps_what_was_read(root, monkeypatch, reads):
    monkeypatch.setattr(module, "CHUNK", 1)

    def stop(name, done, total):
        if (name, done) == ("masks", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        survey(root, workers=1, progress=stop)
    reads.clear()
    survey(root, hashes=False)
    assert len(reads) == 4


def test_a_folder_without_classes(root):
    (root / "classes.txt").unlink()
    found = survey(root)
    assert (found.classes, found.rule, found.description) == (None, None, None)
    assert [(split.name, len(split.pairs)) for split in found.splits] == [("train", 5), ("val", 2)]


def test_a_flat_folder(root):
    for what in ("images", "masks"):
        for path in (root / what / "train").iterdir():
            path.rename(root / what / path.name)
        for path in (root / what / "val").iterdir():
            path.unlink()
        (root / what / "train").rmdir()
        (root / what / "val").rmdir()
    found = survey(root)  # classes.txt is there: as it would be trained
    dataset = open_dataset(root)
    for split in ("train", "val"):
        paths = [pair.image.path for pair in named(found, split).pairs]
        assert paths == [dataset.name(split, i) for i in range(dataset.count(split))]
    (root / "classes.txt").unlink()
    found = survey(root)
    assert [(split.name, split.images, len(split.pairs)) for split in found.splits] == [("train", "images", 5)]


def test_a_yaml(root):
    (root / "list.txt").write_text("0\n1\nmissing\n4\n")
    (root / "a.yaml").write_text(
        "train: [{images: images/train, masks: masks/train, list: list.txt, exclude: ['1']},"
        " {images: images/val, masks: 'masks/val/{stem}.png'}]\n"
        "classes: {0: zero, 1: one, 2: {name: two, values: [2, 3]}}\n"
    )
    found = survey(root / "a.yaml")
    (train,) = found.splits
    assert [pair.image.path for pair in train.pairs] == [
        f"images/{name}.png" for name in ("train/0", "train/4", "val/0", "val/1")
    ]
    assert (train.images, train.masks) == ("images/train, images/val", "masks/train, masks/val/{stem}.png")
    assert train.lines_alone == ("missing",)
    assert found.source == root / "a.yaml"
    assert found.classes.names == ("zero", "one", "two")
    assert found.description.values[2] == (2, 3)


def test_a_part_of_train_is_val_and_orphans_stay_in_train(root):
    (root / "masks/train/4.png").unlink()
    (root / "a.yaml").write_text(
        "train: {images: images/train, masks: masks/train}\nval: 0.5\nclasses: [a, b, c]\n"
        "test: {images: images/val, masks: masks/val}\n"
    )
    found = survey(root / "a.yaml")
    assert [split.name for split in found.splits] == ["train", "val", "test"]
    stems = [[pair.stem for pair in named(found, name).pairs] for name in ("train", "val")]
    assert sorted(stems[0] + stems[1]) == ["0", "1", "2", "3"]
    assert all(stems)
    assert [split.images_alone for split in found.splits] == [("4",), (), ()]
    assert named(found, "val").images == "images/train"


def test_nearest_takes_jpeg_masks_seriously(root):
    save(root / "masks/train/alone.jpg", np.zeros((20, 24), np.uint8))
    text = "train: {images: images/train, masks: masks/train}\nclasses: [a, b, c]\n"
    for more, expected in (("", ()), ("nearest: true\n", ("alone",))):
        (root / "a.yaml").write_text(text + more)
        assert survey(root / "a.yaml").splits[0].masks_alone == expected


def test_mistakes_in_the_description_are_told(tmp_path, root):
    with pytest.raises(UserError, match="no such file"):
        survey(tmp_path / "none.yaml")
    (root / "a.yaml").write_text("path: nowhere\ntrain: {images: a, masks: b}\nclasses: [a, b]\n")
    with pytest.raises(UserError, match="nowhere: no such folder; check the path"):
        survey(root / "a.yaml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither a dataset\.yaml nor folders"):
        survey(tmp_path / "empty")
    (root / "classes.txt").unlink()
    (root / "masks/val/0.png").unlink()
    (root / "masks/val/1.png").unlink()
    (root / "masks/val").rmdir()
    with pytest.raises(UserError, match="val: no such folder"):
        survey(root)


def test_the_survey_needs_no_torch():
    code = "import sys, segvit.data.doctor.survey; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
